// FaultInjector: lets a test fail any call of this library that can fail, where the driver would. Nothing below is
// called then, so the failure costs nothing but the call.
//
//   class EveryThird : public FaultInjector { absl::Status Before(Operation, const char*) override { … } };
//   device.SetFaultInjector(&injector);
#ifndef PRISTINE_GRAPH_RUNTIME_FAULT_INJECTOR_H_
#define PRISTINE_GRAPH_RUNTIME_FAULT_INJECTOR_H_

#include "absl/status/status.h"

namespace pristine {

enum class Operation {
  kAllocate,     // Device::Allocate, AllocatePinned, AllocateProtected
  kCreate,       // streams and events, made or adopted
  kWatch,        // Device::Watch
  kWrite,        // ProtectedBuffer::Write
  kSeal,         // ProtectedBuffer::Seal
  kCopy,         // Stream::Copy, CopyFromHost, CopyToHost, Fill
  kLaunch,       // a kernel
  kEvent,        // Stream::Record, Wait
  kSynchronize,  // what blocks until work is done, of streams, events and devices
  kQuery,        // Stream::IsIdle, AtCaptureHead, Event::IsReached
  kCapture,      // Capture, twice: before it begins, and before it ends
  kInstantiate,  // Graph::Instantiate
  kUpload,       // GraphExec::Upload
  kSetParams,    // GraphExec::SetKernelParams
  kGraphLaunch,  // GraphExec::Launch
};
inline constexpr int kOperations = static_cast<int>(Operation::kGraphLaunch) + 1;
const char* ToString(Operation operation);

class FaultInjector {
 public:
  virtual ~FaultInjector() = default;
  // Asked by each public call when its arguments are found good, right before the backend is called. Not OK: the
  // backend is not called, and the public call returns this; a capture in which that happens fails with it, as with an
  // error of the driver. `what`: the call, or the name of the kernel or the allocation. On the calling thread; calls on
  // several threads at once where the device is used by several. Must not call the device. Fail single calls:
  // destructors wait by the same calls, more than one of them where it matters, and an injector that refuses every
  // kSynchronize would have memory freed under queued work.
  virtual absl::Status Before(Operation operation, const char* what) = 0;
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_FAULT_INJECTOR_H_
