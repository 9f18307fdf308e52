// Device: where memory, streams and events come from. Two backends, CUDA and Host, with the same semantics
// (docs/capture_semantics.md lists them; each is a conformance test run on both).
#ifndef PRISTINE_GRAPH_RUNTIME_DEVICE_H_
#define PRISTINE_GRAPH_RUNTIME_DEVICE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "pristine/graph_runtime/memory.h"

namespace pristine {

namespace host {
class WorkQueue;
}

class Event;
class FaultInjector;
class Graph;
class GraphExec;
class Stream;

enum class Backend { kHost, kCuda };
enum class Operation;  // fault_injector.h

// A write that a node made without having declared it (Kernel::writes).
struct UndeclaredWrite {
  std::string node;    // the kernel, copy or fill
  std::string region;  // the name given to Watch()
  size_t index = 0;    // first element written, in units of the region's element_bytes
};

// Is told of undeclared writes to the regions it watches. Called on a stream's worker thread, right after the node;
// must not call the device. Watchers are independent: one per BufferManager.
class Watcher {
 public:
  virtual ~Watcher() = default;
  virtual void OnUndeclaredWrite(const UndeclaredWrite& write) = 0;
};

// Memory that no node may write unless it declares so.
struct WatchedRegion {
  std::string name;
  const void* address = nullptr;
  size_t bytes = 0;
  size_t element_bytes = 1;
};

// Asked for the last violation it recorded when the device is found lost, to be part of the final status.
class Witness {
 public:
  virtual ~Witness() = default;
  // "": none. Called on any thread; must not call the device, nor wait for anything that does.
  virtual std::string LastViolation() = 0;
};

// What is alive of a device.
struct LiveObjects {
  size_t allocations = 0;  // of all three kinds
  size_t bytes = 0;        // as asked for
  size_t streams = 0;
  size_t events = 0;
  size_t graphs = 0;
  size_t execs = 0;
  friend bool operator==(const LiveObjects&, const LiveObjects&) = default;
};

// One GPU, or one Host device. Thread-safe. Must outlive all it creates. Calls set the CUDA current device they need
// and put the caller's back. Nothing is process-wide, with one exception: while a Host device that enforces accesses
// lives, a SIGSEGV handler is installed that chains to the one before.
class Device {
 public:
  virtual ~Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  Backend backend() const { return backend_; }
  const std::string& name() const { return name_; }         // "host (eager)", "cuda:0 (NVIDIA H200)"
  int multiprocessors() const { return multiprocessors_; }  // Host: 8, so that planners have something to fill
  int compute_capability() const { return capability_; }    // 90 for 9.0; Host: 0
  // Shared memory that one block may have after opting in, in bytes: 232,448 on compute capability 9.0. Host: 0.
  size_t shared_bytes_per_block() const { return shared_bytes_per_block_; }
  // As CUDA counts: 13020 for 13.2. The runtime that this library is linked with, and the newest one that the driver
  // serves. Host: 0.
  int cuda_runtime_version() const { return cuda_runtime_version_; }
  int cuda_driver_version() const { return cuda_driver_version_; }
  size_t watch_alignment() const {
    return watch_alignment_;
  }  // what a buffer is aligned to so that Watch can protect it

  // Device memory. `bytes` > 0; the address is a multiple of watch_alignment(), at least 256. Contents unspecified
  // (Host: 0xCB, with guard bands around it that are checked on free). `name` appears in reports. Does not block on
  // Host; may on CUDA. INVALID_ARGUMENT: 0 bytes. RESOURCE_EXHAUSTED: no memory. FAILED_PRECONDITION: a stream of this
  // device is capturing.
  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes, const char* name);
  // The same codes; see PinnedBuffer and ProtectedBuffer. Pinned memory starts zeroed.
  absl::StatusOr<PinnedBuffer> AllocatePinned(size_t bytes, const char* name);
  absl::StatusOr<ProtectedBuffer> AllocateProtected(size_t bytes, const char* name);

  absl::StatusOr<std::unique_ptr<Stream>> CreateStream();
  // A stream over one that the engine owns (a cudaStream_t; on Host, another Stream's native()), which must outlive it.
  // It may be capturing: what is queued then goes into the engine's graph. INVALID_ARGUMENT: null.
  absl::StatusOr<std::unique_ptr<Stream>> AdoptStream(void* native);
  absl::StatusOr<std::unique_ptr<Event>> CreateEvent();
  // An exec over one that the engine owns, and the graph that it was made from: a cudaGraphExec_t and its cudaGraph_t;
  // on Host, a GraphExec* and its Graph*. Both must outlive it. INVALID_ARGUMENT: null.
  absl::StatusOr<std::unique_ptr<GraphExec>> AdoptExec(void* graph, void* exec);

  // Blocks until all queued work of all streams is done. FAILED_PRECONDITION: a stream is capturing.
  absl::Status Synchronize();

  // Reports every write to `region` by a node that did not declare it to `watcher`, until Unwatch. Returns an id.
  // Host with enforce_accesses: pages that belong to the region alone are write-protected except while a declaring node
  // runs, the rest is compared around each node; a region that is not page-aligned is compared whole. Otherwise (CUDA,
  // or not enforcing) the id is 0 and nothing is watched. `watcher` and the memory must stay valid until Unwatch, which
  // waits for running nodes. INVALID_ARGUMENT: null or empty.
  absl::StatusOr<int64_t> Watch(const WatchedRegion& region, Watcher* watcher);
  void Unwatch(int64_t id);
  bool enforces_accesses() const { return enforces_accesses_; }
  // Whether queued work runs only when something synchronizes (HostOptions::Run::kDeferred).
  bool deferred() const { return deferred_; }

  // OK, or the final status of a device that was found lost (IsDeviceLost in status.h). Does not call the driver.
  absl::Status status() {
    return gated_.load(std::memory_order_acquire) ? LostStatus("Device::status") : absl::OkStatus();
  }
  // `witness` until RemoveWitness, which waits for a question under way.
  void AddWitness(Witness* witness);
  void RemoveWitness(Witness* witness);
  // For tests: `injector`, which must outlive its use, is asked before each fallible operation; null: none.
  void SetFaultInjector(FaultInjector* injector);
  LiveObjects live() const;

  // Owned allocations of all three kinds that are alive; tests assert 0 at the end.
  size_t live_allocations() const { return live_allocations_.load(); }
  // Allocations made so far; a hot path asserts that it does not change.
  size_t total_allocations() const { return total_allocations_.load(); }
  // Streams of this device that are capturing.
  int capturing_streams() const { return capturing_.load(); }

 protected:
  struct Traits {
    std::string name;
    int multiprocessors = 0;
    int capability = 0;
    size_t shared_bytes_per_block = 0;
    int cuda_runtime_version = 0;
    int cuda_driver_version = 0;
    size_t watch_alignment = 256;
    bool enforces_accesses = false;
    bool deferred = false;
  };
  Device(Backend backend, Traits traits)
      : backend_(backend),
        name_(std::move(traits.name)),
        multiprocessors_(traits.multiprocessors),
        capability_(traits.capability),
        shared_bytes_per_block_(traits.shared_bytes_per_block),
        cuda_runtime_version_(traits.cuda_runtime_version),
        cuda_driver_version_(traits.cuda_driver_version),
        watch_alignment_(traits.watch_alignment),
        enforces_accesses_(traits.enforces_accesses),
        deferred_(traits.deferred) {}

 private:
  friend class DeviceBuffer;
  friend class PinnedBuffer;
  friend class ProtectedBuffer;
  friend class Event;
  friend class Graph;
  friend class GraphExec;
  friend class Stream;
  friend class host::WorkQueue;  // loses the device on its worker thread
  friend absl::StatusOr<std::unique_ptr<Graph>> Capture(Stream&, absl::FunctionRef<absl::Status(Stream&)>);

  virtual absl::StatusOr<void*> DoAllocate(size_t bytes, const char* name) = 0;
  virtual void DoFree(void* address, size_t bytes) noexcept = 0;
  virtual absl::Status DoAllocatePinned(size_t bytes, void** host, void** device_address) = 0;
  virtual void DoFreePinned(void* host, size_t bytes) noexcept = 0;
  // Fills address_, writable_, backing_, mapped_ and level_ of `buffer`.
  virtual absl::Status DoAllocateProtected(size_t bytes, ProtectedBuffer& buffer) = 0;
  virtual absl::Status DoWriteProtected(ProtectedBuffer& buffer, size_t offset, absl::Span<const std::byte> values) = 0;
  virtual absl::Status DoSeal(ProtectedBuffer& buffer) = 0;
  virtual void DoFreeProtected(ProtectedBuffer& buffer) noexcept = 0;
  virtual absl::StatusOr<std::unique_ptr<Stream>> DoCreateStream() = 0;
  virtual absl::StatusOr<std::unique_ptr<Stream>> DoAdoptStream(void* native) = 0;
  virtual absl::StatusOr<std::unique_ptr<Event>> DoCreateEvent() = 0;
  virtual absl::StatusOr<std::unique_ptr<GraphExec>> DoAdoptExec(void* graph, void* exec) = 0;
  virtual absl::Status DoSynchronize() = 0;
  virtual absl::StatusOr<int64_t> DoWatch(const WatchedRegion& region, Watcher* watcher) = 0;
  virtual void DoUnwatch(int64_t id) = 0;

  // Captures in progress on this device, begun by Capture().
  void AddCapture(Stream* stream);
  void RemoveCapture(Stream* stream);
  // FAILED_PRECONDITION: a stream of this device is capturing. Captures begun by the calling thread are then dead:
  // their body did what it must not.
  absl::Status RefuseWhileCapturing(const std::string& call);
  // Asked by each public call right before its Do…: the final status of a lost device, or what the injector says. One
  // load where there is neither.
  absl::Status Admit(Operation operation, const char* what) {
    return gated_.load(std::memory_order_relaxed) ? AdmitGated(operation, what) : absl::OkStatus();
  }
  absl::Status AdmitGated(Operation operation, const char* what);
  // What `call` returns when its Do… gave `outcome`: the final status if that lost the device.
  absl::Status Settle(const char* call, absl::Status outcome) {
    return outcome.ok() ? outcome : SettleFailure(call, std::move(outcome));
  }
  template <class T>
  absl::StatusOr<T> Settle(const char* call, absl::StatusOr<T> outcome) {
    if (outcome.ok()) return outcome;
    return SettleFailure(call, std::move(outcome).status());
  }
  absl::Status SettleFailure(const char* call, absl::Status outcome);
  // Admit and Settle around a call that waits. A lost device is waited for too: the caller may then free memory.
  absl::Status Wait(const char* call, absl::FunctionRef<absl::Status()> wait);
  // From now on the device is lost. Any thread; the first cause stays. `cause` is a DeviceLostError.
  void Lose(const absl::Status& cause);
  bool lost() const { return lost_.load(std::memory_order_acquire); }
  // The final status, made by the first `call` that asks; OK while the device is not lost.
  absl::Status LostStatus(const char* call);
  void CountAllocation(size_t bytes);
  void UncountAllocation(size_t bytes);

  absl::Status CheckMayAllocate(size_t bytes, const char* name);

  const Backend backend_;
  const std::string name_;
  const int multiprocessors_;
  const int capability_;
  const size_t shared_bytes_per_block_;
  const int cuda_runtime_version_;
  const int cuda_driver_version_;
  const size_t watch_alignment_;
  const bool enforces_accesses_;
  const bool deferred_;
  std::atomic<size_t> live_allocations_{0};
  std::atomic<size_t> total_allocations_{0};
  std::atomic<size_t> live_bytes_{0};
  std::atomic<size_t> live_streams_{0};
  std::atomic<size_t> live_events_{0};
  std::atomic<size_t> live_graphs_{0};
  std::atomic<size_t> live_execs_{0};
  std::atomic<int> capturing_{0};
  std::atomic<bool> gated_{false};  // an injector is set, or the device is lost
  std::atomic<bool> lost_{false};
  std::atomic<FaultInjector*> injector_{nullptr};
  std::mutex lost_mutex_;
  absl::Status cause_;               // guarded by lost_mutex_, as are the next two: what the backend said
  absl::Status final_;               // what calls return
  std::vector<Witness*> witnesses_;  // in the order added
  std::mutex captures_mutex_;
  std::vector<std::pair<Stream*, std::thread::id>> captures_;  // guarded by captures_mutex_
};

struct HostOptions {
  enum class Run {
    kEager,     // a stream's worker runs work as it comes
    kDeferred,  // nothing runs before something synchronizes: shows code that forgets to
  } run = Run::kEager;
  bool enforce_accesses = false;     // see Device::Watch; slow, on in all tests
  MemoryResource* memory = nullptr;  // null: the process heap. Not owned
  bool protect = true;               // false: as on a platform that cannot protect memory (ProtectionLevel::kDigest)
};
// A strict in-process device. Work runs on a worker thread per stream, never on the caller's. Fresh memory is 0xCB,
// freed memory 0xDD, and guard bands surround each allocation: a damaged band is printed to stderr and aborts, on free.
absl::StatusOr<std::unique_ptr<Device>> CreateHostDevice(HostOptions options = {});

struct CudaOptions {
  MemoryResource* memory = nullptr;  // null: cudaMalloc. Not owned
  bool protect = true;               // false: as on a GPU that cannot protect memory (ProtectionLevel::kDigest)
};
// UNIMPLEMENTED: built without CUDA. UNAVAILABLE: no driver, or no GPU `ordinal` (the message says how many there are).
absl::StatusOr<std::unique_ptr<Device>> CreateCudaDevice(int ordinal = 0, CudaOptions options = {});

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_DEVICE_H_
