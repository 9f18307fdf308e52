#include "pristine/graph_runtime/device.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "graph_runtime/device_lost.h"
#include "pristine/graph_runtime/fault_injector.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/status.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine {

const char* ToString(Operation operation) {
  switch (operation) {
    case Operation::kAllocate:
      return "allocate";
    case Operation::kCreate:
      return "create";
    case Operation::kWatch:
      return "watch";
    case Operation::kWrite:
      return "write";
    case Operation::kSeal:
      return "seal";
    case Operation::kCopy:
      return "copy";
    case Operation::kLaunch:
      return "launch";
    case Operation::kEvent:
      return "event";
    case Operation::kSynchronize:
      return "synchronize";
    case Operation::kQuery:
      return "query";
    case Operation::kCapture:
      return "capture";
    case Operation::kInstantiate:
      return "instantiate";
    case Operation::kUpload:
      return "upload";
    case Operation::kSetParams:
      return "set params";
    case Operation::kGraphLaunch:
      return "graph launch";
  }
  return "unknown operation";
}

void Device::SetFaultInjector(FaultInjector* injector) {
  injector_ = injector;
  gated_ = injector != nullptr || lost_;
  if (lost_) gated_ = true;  // lost meanwhile
}

absl::Status Device::AdmitGated(Operation operation, const char* what) {
  PRISTINE_RETURN_IF_ERROR(LostStatus(what));
  FaultInjector* const injector = injector_;
  return injector == nullptr ? absl::OkStatus() : injector->Before(operation, what);
}

absl::Status Device::SettleFailure(const char* call, absl::Status outcome) {
  if (IsDeviceLost(outcome)) Lose(outcome);
  const absl::Status lost = LostStatus(call);
  return lost.ok() ? outcome : lost;
}

absl::Status Device::Wait(const char* call, absl::FunctionRef<absl::Status()> wait) {
  const absl::Status admitted = Admit(Operation::kSynchronize, call);
  if (!admitted.ok() && !lost()) return admitted;
  PRISTINE_RETURN_IF_ERROR(Settle(call, wait()));
  return LostStatus(call);  // by other work of the device
}

void Device::Lose(const absl::Status& cause) {
  std::lock_guard lock(lost_mutex_);
  if (lost_) return;
  cause_ = cause;
  lost_ = true;
  gated_ = true;
}

absl::Status Device::LostStatus(const char* call) {
  if (!lost()) return absl::OkStatus();
  std::lock_guard lock(lost_mutex_);
  if (!final_.ok()) return final_;
  std::string violations;
  for (Witness* witness : witnesses_) {
    const std::string violation = witness->LastViolation();
    if (!violation.empty()) absl::StrAppend(&violations, violations.empty() ? "" : "\n", violation);
  }
  final_ = DeviceLostError(
      absl::StrCat(name_, " is lost, for good: ", call, " found \"", std::string(cause_.message()), "\"; ",
                   violations.empty() ? "no violation was recorded" : "last violation recorded: ", violations),
      violations);
  return final_;
}

void Device::AddWitness(Witness* witness) {
  std::lock_guard lock(lost_mutex_);
  witnesses_.push_back(witness);
}

void Device::RemoveWitness(Witness* witness) {
  std::lock_guard lock(lost_mutex_);
  witnesses_.erase(std::remove(witnesses_.begin(), witnesses_.end(), witness), witnesses_.end());
}

void Device::CountAllocation(size_t bytes) {
  ++live_allocations_;
  ++total_allocations_;
  live_bytes_ += bytes;
}

void Device::UncountAllocation(size_t bytes) {
  --live_allocations_;
  live_bytes_ -= bytes;
}

LiveObjects Device::live() const {
  return {live_allocations_, live_bytes_, live_streams_, live_events_, live_graphs_, live_execs_};
}

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
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kAllocate, name));
  PRISTINE_ASSIGN_OR_RETURN(buffer.address_, Settle("Device::Allocate", DoAllocate(bytes, name)));
  buffer.device_ = this;
  buffer.bytes_ = bytes;
  CountAllocation(bytes);
  return buffer;
}

absl::StatusOr<PinnedBuffer> Device::AllocatePinned(size_t bytes, const char* name) {
  PRISTINE_RETURN_IF_ERROR(CheckMayAllocate(bytes, name));
  PinnedBuffer buffer;
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kAllocate, name));
  PRISTINE_RETURN_IF_ERROR(
      Settle("Device::AllocatePinned", DoAllocatePinned(bytes, &buffer.host_, &buffer.device_address_)));
  buffer.device_ = this;
  buffer.bytes_ = bytes;
  CountAllocation(bytes);
  return buffer;
}

absl::StatusOr<ProtectedBuffer> Device::AllocateProtected(size_t bytes, const char* name) {
  PRISTINE_RETURN_IF_ERROR(CheckMayAllocate(bytes, name));
  ProtectedBuffer buffer;
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kAllocate, name));
  PRISTINE_RETURN_IF_ERROR(Settle("Device::AllocateProtected", DoAllocateProtected(bytes, buffer)));
  buffer.device_ = this;
  buffer.bytes_ = bytes;
  CountAllocation(bytes);
  return buffer;
}

absl::StatusOr<std::unique_ptr<Stream>> Device::CreateStream() {
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kCreate, "Device::CreateStream"));
  return Settle("Device::CreateStream", DoCreateStream());
}

absl::StatusOr<std::unique_ptr<GraphExec>> Device::AdoptExec(void* graph, void* exec) {
  if (graph == nullptr || exec == nullptr) {
    return absl::InvalidArgumentError(graph == nullptr ? "AdoptExec: null graph" : "AdoptExec: null exec");
  }
  return DoAdoptExec(graph, exec);
}

absl::StatusOr<std::unique_ptr<Stream>> Device::AdoptStream(void* native) {
  if (native == nullptr) return absl::InvalidArgumentError("AdoptStream: null");
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kCreate, "Device::AdoptStream"));
  return Settle("Device::AdoptStream", DoAdoptStream(native));
}

absl::StatusOr<std::unique_ptr<Event>> Device::CreateEvent() {
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kCreate, "Device::CreateEvent"));
  return Settle("Device::CreateEvent", DoCreateEvent());
}

absl::Status Device::Synchronize() {
  PRISTINE_RETURN_IF_ERROR(RefuseWhileCapturing("Device::Synchronize"));
  return Wait("Device::Synchronize", [this] { return DoSynchronize(); });
}

absl::StatusOr<int64_t> Device::Watch(const WatchedRegion& region, Watcher* watcher) {
  if (watcher == nullptr || region.address == nullptr || region.bytes == 0 || region.element_bytes == 0) {
    return absl::InvalidArgumentError(absl::StrCat("Watch '", region.name, "': ", region.bytes,
                                                   " bytes of elements of ", region.element_bytes,
                                                   "; a watcher, an address and sizes of at least 1 are needed"));
  }
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kWatch, region.name.c_str()));
  return Settle("Device::Watch", DoWatch(region, watcher));
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
