#include "pristine/graph_runtime/device.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine {

void Device::AddCapture(Stream* stream) {
  std::lock_guard lock(captures_mutex_);
  captures_.emplace_back(stream, std::this_thread::get_id());
}

void Device::RemoveCapture(Stream* stream) {
  std::lock_guard lock(captures_mutex_);
  captures_.erase(std::find_if(captures_.begin(), captures_.end(),
                               [stream](const auto& capture) { return capture.first == stream; }));
}

absl::Status Device::RefuseWhileCapturing(const std::string& call) {
  if (capturing_ == 0) return absl::OkStatus();
  absl::Status error = absl::FailedPreconditionError(
      absl::StrCat(call, ": a stream of ", name_, " is capturing; do this before the capture"));
  std::lock_guard lock(captures_mutex_);
  for (const auto& [stream, thread] : captures_) {
    if (thread == std::this_thread::get_id()) stream->DoKillCapture(error);
  }
  return error;
}

absl::Status Device::CheckMayAllocate(size_t bytes, const char* name) {
  if (name == nullptr) return absl::InvalidArgumentError("Allocate: null name");
  if (bytes == 0) return absl::InvalidArgumentError(absl::StrCat("Allocate '", name, "': 0 bytes; at least 1"));
  return RefuseWhileCapturing(absl::StrCat("Allocate '", name, "'"));
}

absl::StatusOr<DeviceBuffer> Device::Allocate(size_t bytes, const char* name) {
  PRISTINE_RETURN_IF_ERROR(CheckMayAllocate(bytes, name));
  DeviceBuffer buffer;
  PRISTINE_ASSIGN_OR_RETURN(buffer.address_, DoAllocate(bytes, name));
  buffer.device_ = this;
  buffer.bytes_ = bytes;
  ++live_allocations_;
  ++total_allocations_;
  return buffer;
}

absl::StatusOr<PinnedBuffer> Device::AllocatePinned(size_t bytes, const char* name) {
  PRISTINE_RETURN_IF_ERROR(CheckMayAllocate(bytes, name));
  PinnedBuffer buffer;
  PRISTINE_RETURN_IF_ERROR(DoAllocatePinned(bytes, &buffer.host_, &buffer.device_address_));
  buffer.device_ = this;
  buffer.bytes_ = bytes;
  ++live_allocations_;
  ++total_allocations_;
  return buffer;
}

absl::StatusOr<ProtectedBuffer> Device::AllocateProtected(size_t bytes, const char* name) {
  PRISTINE_RETURN_IF_ERROR(CheckMayAllocate(bytes, name));
  ProtectedBuffer buffer;
  PRISTINE_RETURN_IF_ERROR(DoAllocateProtected(bytes, buffer));
  buffer.device_ = this;
  buffer.bytes_ = bytes;
  ++live_allocations_;
  ++total_allocations_;
  return buffer;
}

absl::StatusOr<std::unique_ptr<Stream>> Device::CreateStream() { return DoCreateStream(); }

absl::StatusOr<std::unique_ptr<GraphExec>> Device::AdoptExec(void* graph, void* exec) {
  if (graph == nullptr || exec == nullptr) {
    return absl::InvalidArgumentError(graph == nullptr ? "AdoptExec: null graph" : "AdoptExec: null exec");
  }
  return DoAdoptExec(graph, exec);
}

absl::StatusOr<std::unique_ptr<Stream>> Device::AdoptStream(void* native) {
  if (native == nullptr) return absl::InvalidArgumentError("AdoptStream: null");
  return DoAdoptStream(native);
}

absl::StatusOr<std::unique_ptr<Event>> Device::CreateEvent() { return DoCreateEvent(); }

absl::Status Device::Synchronize() {
  PRISTINE_RETURN_IF_ERROR(RefuseWhileCapturing("Device::Synchronize"));
  return DoSynchronize();
}

absl::StatusOr<int64_t> Device::Watch(const WatchedRegion& region, Watcher* watcher) {
  if (watcher == nullptr || region.address == nullptr || region.bytes == 0 || region.element_bytes == 0) {
    return absl::InvalidArgumentError(absl::StrCat("Watch '", region.name, "': ", region.bytes,
                                                   " bytes of elements of ", region.element_bytes,
                                                   "; a watcher, an address and sizes of at least 1 are needed"));
  }
  return DoWatch(region, watcher);
}

void Device::Unwatch(int64_t id) {
  if (id != 0) DoUnwatch(id);
}

#ifndef PRISTINE_HAS_CUDA
absl::StatusOr<std::unique_ptr<Device>> CreateCudaDevice(int, CudaOptions) {
  return absl::UnimplementedError("built without CUDA (PRISTINE_ENABLE_CUDA=OFF); the host device exists");
}
#endif

}  // namespace pristine
