#include "pristine/graph_runtime/stream.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/fault_injector.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {
namespace {

absl::Status CheckCopy(const char* call, const void* to, size_t to_bytes, const void* from, size_t from_bytes) {
  if (to_bytes != from_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(call, ": ", from_bytes, " bytes to a destination of ", to_bytes, "; sizes must match"));
  }
  if (to_bytes > 0 && (to == nullptr || from == nullptr)) {
    return absl::InvalidArgumentError(absl::StrCat(call, ": null ", to == nullptr ? "destination" : "source"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<bool> Event::IsReached() {
  PRISTINE_RETURN_IF_ERROR(device_.Admit(Operation::kQuery, "Event::IsReached"));
  return device_.Settle("Event::IsReached", DoIsReached());
}

absl::Status Event::Synchronize() {
  return device_.Wait("Event::Synchronize", [this] { return DoSynchronize(); });
}

absl::Status Stream::Admit(Operation operation, const char* what) {
  absl::Status refused = device_.Admit(operation, what);
  if (!refused.ok() && DoCapturing()) DoKillCapture(refused);
  return refused;
}

absl::Status Stream::Queued(const char* call, absl::Status outcome, const char* node) {
  PRISTINE_RETURN_IF_ERROR(device_.Settle(call, std::move(outcome)));
  return Observe(node);
}

bool Stream::capturing() const { return DoCapturing(); }

absl::StatusOr<bool> Stream::AtCaptureHead() {
  if (!DoCapturing()) return absl::FailedPreconditionError("AtCaptureHead: the stream is not capturing");
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kQuery, "Stream::AtCaptureHead"));
  return device_.Settle("Stream::AtCaptureHead", DoAtCaptureHead());
}

void* Stream::native() const { return DoNative(); }

// A copy of nothing is no node, on either backend.
absl::Status Stream::Copy(DeviceSpan<std::byte> to, DeviceSpan<const std::byte> from) {
  PRISTINE_RETURN_IF_ERROR(CheckCopy("Copy", to.address(), to.bytes(), from.address(), from.bytes()));
  if (to.empty()) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kCopy, "Stream::Copy"));
  return Queued("Stream::Copy", DoCopy(to.address(), from.address(), to.bytes()), "copy");
}

absl::Status Stream::CopyFromHost(DeviceSpan<std::byte> to, absl::Span<const std::byte> from) {
  PRISTINE_RETURN_IF_ERROR(CheckCopy("CopyFromHost", to.address(), to.bytes(), from.data(), from.size()));
  if (to.empty()) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kCopy, "Stream::CopyFromHost"));
  return Queued("Stream::CopyFromHost", DoCopyFromHost(to.address(), from.data(), to.bytes()), "copy_from_host");
}

absl::Status Stream::CopyToHost(absl::Span<std::byte> to, DeviceSpan<const std::byte> from) {
  PRISTINE_RETURN_IF_ERROR(CheckCopy("CopyToHost", to.data(), to.size(), from.address(), from.bytes()));
  if (to.empty()) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kCopy, "Stream::CopyToHost"));
  return Queued("Stream::CopyToHost", DoCopyToHost(to.data(), from.address(), to.size()), "copy_to_host");
}

absl::Status Stream::Fill(DeviceSpan<std::byte> to, std::byte value) {
  if (to.empty()) return absl::OkStatus();
  if (to.address() == nullptr) return absl::InvalidArgumentError("Fill: null destination");
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kCopy, "Stream::Fill"));
  return Queued("Stream::Fill", DoFill(to.address(), value, to.bytes()), "fill");
}

absl::Status Stream::Record(Event& event) {
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kEvent, "Stream::Record"));
  return device_.Settle("Stream::Record", DoRecord(event));
}

absl::Status Stream::Wait(Event& event) {
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kEvent, "Stream::Wait"));
  return device_.Settle("Stream::Wait", DoWait(event));
}

absl::Status Stream::RefuseWhileCapturing(const char* call) {
  if (!DoCapturing()) return absl::OkStatus();
  absl::Status error =
      absl::FailedPreconditionError(absl::StrCat(call, ": the stream is capturing; the capture fails"));
  DoKillCapture(error);
  return error;
}

absl::Status Stream::Synchronize() {
  PRISTINE_RETURN_IF_ERROR(RefuseWhileCapturing("Stream::Synchronize"));
  return device_.Wait("Stream::Synchronize", [this] { return DoSynchronize(); });
}

absl::StatusOr<bool> Stream::IsIdle() {
  PRISTINE_RETURN_IF_ERROR(RefuseWhileCapturing("Stream::IsIdle"));
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kQuery, "Stream::IsIdle"));
  return device_.Settle("Stream::IsIdle", DoIsIdle());
}

absl::Status Stream::EnqueueHostKernel(const char* name, WriteList writes, std::function<int()> work) {
  if (name == nullptr || work == nullptr) return absl::InvalidArgumentError("Launch: null kernel name or function");
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kLaunch, name));
  return Queued(name, DoEnqueueHostKernel(name, std::move(writes), std::move(work)), name);
}

absl::Status Stream::EnqueueCudaKernel(const char* name, absl::FunctionRef<int(CUstream_st*)> launch) {
  if (name == nullptr) return absl::InvalidArgumentError("Launch: null kernel name");
  PRISTINE_RETURN_IF_ERROR(Admit(Operation::kLaunch, name));
  return Queued(name, DoEnqueueCudaKernel(name, launch), name);
}

absl::Status Stream::Observe(const char* node) {
  if (observer_ == nullptr || DoCapturing()) return absl::OkStatus();
  return observer_(node);
}

}  // namespace pristine
