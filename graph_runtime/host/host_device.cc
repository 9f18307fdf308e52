// The Host backend's Device.
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "graph_runtime/host/access_guard.h"
#include "graph_runtime/host/host_graph.h"
#include "graph_runtime/host/host_memory.h"
#include "graph_runtime/host/host_stream.h"
#include "graph_runtime/host/work_queue.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {

class HostDevice final : public Device {
 public:
  explicit HostDevice(const HostOptions& options)
      : Device(Backend::kHost, MakeTraits(options)),
        deferred_(options.run == HostOptions::Run::kDeferred),
        protect_(options.protect),
        heap_(options.memory, watch_alignment()),
        guard_(options.enforce_accesses ? std::make_unique<host::AccessGuard>() : nullptr) {}

 private:
  static Traits MakeTraits(const HostOptions& options) {
    Traits traits;
    traits.name = options.run == HostOptions::Run::kDeferred ? "host (deferred)" : "host (eager)";
    traits.multiprocessors = 8;
    traits.watch_alignment = options.enforce_accesses ? host::kPage : 256;
    traits.enforces_accesses = options.enforce_accesses;
    return traits;
  }

  absl::StatusOr<void*> DoAllocate(size_t bytes, const char* name) override { return heap_.Allocate(bytes, name); }
  void DoFree(void* address, size_t bytes) noexcept override {
    if (guard_ != nullptr) guard_->UnwatchRange(address, bytes);
    heap_.Free(address, bytes);
  }

  absl::Status DoAllocatePinned(size_t bytes, void** host, void** device_address) override {
    PRISTINE_ASSIGN_OR_RETURN(*host, host::AllocatePages(bytes));
    std::memset(*host, 0, bytes);
    *device_address = *host;
    return absl::OkStatus();
  }
  void DoFreePinned(void* host, size_t) noexcept override { host::FreePages(host); }

  absl::Status DoAllocateProtected(size_t bytes, ProtectedBuffer& buffer) override {
    const size_t mapped = (bytes + host::kPage - 1) / host::kPage * host::kPage;
    void* address =
        mapped < bytes ? MAP_FAILED : mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) {
      return absl::ResourceExhaustedError(absl::StrCat("no host memory for ", bytes, " protected bytes"));
    }
    buffer.address_ = buffer.writable_ = address;
    buffer.mapped_ = mapped;
    buffer.level_ = protect_ ? ProtectionLevel::kHardware : ProtectionLevel::kDigest;
    return absl::OkStatus();
  }
  absl::Status DoWriteProtected(ProtectedBuffer& buffer, size_t offset, absl::Span<const std::byte> values) override {
    std::memcpy(static_cast<std::byte*>(buffer.writable_) + offset, values.data(), values.size());
    return absl::OkStatus();
  }
  absl::Status DoSeal(ProtectedBuffer& buffer) override {
    if (!protect_) return absl::OkStatus();
    if (mprotect(buffer.address_, buffer.mapped_, PROT_READ) != 0) {
      return absl::InternalError(absl::StrCat("mprotect: ", std::strerror(errno)));
    }
    buffer.writable_ = nullptr;
    sealed_.Add(buffer.address_, buffer.mapped_);
    return absl::OkStatus();
  }
  void DoFreeProtected(ProtectedBuffer& buffer) noexcept override {
    if (protect_) sealed_.Remove(buffer.address_);
    munmap(buffer.address_, buffer.mapped_);
  }

  absl::StatusOr<std::unique_ptr<Stream>> DoCreateStream() override {
    auto stream = std::make_unique<host::HostStream>(*this, sealed_, deferred_, guard_.get());
    std::lock_guard lock(mutex_);
    queues_.erase(std::remove_if(queues_.begin(), queues_.end(), [](const auto& queue) { return queue.expired(); }),
                  queues_.end());
    queues_.push_back(stream->queue());
    return stream;
  }
  absl::StatusOr<std::unique_ptr<Stream>> DoAdoptStream(void* native) override {
    for (std::shared_ptr<host::WorkQueue>& queue : Queues()) {
      if (queue.get() == native) return std::make_unique<host::HostStream>(*this, sealed_, std::move(queue));
    }
    return absl::InvalidArgumentError("AdoptStream: not the native() of a stream of this device");
  }
  absl::StatusOr<std::unique_ptr<GraphExec>> DoAdoptExec(void* graph, void* exec) override {
    return host::AdoptHostExec(*this, static_cast<Graph*>(graph), static_cast<GraphExec*>(exec));
  }
  absl::StatusOr<std::unique_ptr<Event>> DoCreateEvent() override { return std::make_unique<host::HostEvent>(*this); }

  absl::Status DoSynchronize() override {
    absl::Status first;
    for (const std::shared_ptr<host::WorkQueue>& queue : Queues()) {
      queue->FinishAll();
      first.Update(queue->status());
    }
    return first;
  }

  absl::StatusOr<int64_t> DoWatch(const WatchedRegion& region, Watcher* watcher) override {
    return guard_ == nullptr ? int64_t{0} : guard_->Watch(region, watcher);
  }
  void DoUnwatch(int64_t id) override {
    if (guard_ != nullptr) guard_->Unwatch(id);
  }

  std::vector<std::shared_ptr<host::WorkQueue>> Queues() {
    std::vector<std::shared_ptr<host::WorkQueue>> alive;
    std::lock_guard lock(mutex_);
    for (const std::weak_ptr<host::WorkQueue>& queue : queues_) {
      if (std::shared_ptr<host::WorkQueue> locked = queue.lock()) alive.push_back(std::move(locked));
    }
    return alive;
  }

  const bool deferred_;
  const bool protect_;
  host::GuardedHeap heap_;
  host::SealedRanges sealed_;
  const std::unique_ptr<host::AccessGuard> guard_;  // null: not enforcing
  std::mutex mutex_;
  std::vector<std::weak_ptr<host::WorkQueue>> queues_;
};

absl::StatusOr<std::unique_ptr<Device>> CreateHostDevice(HostOptions options) {
  return std::make_unique<HostDevice>(options);
}

}  // namespace pristine
