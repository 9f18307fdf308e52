#include "pristine/graph_runtime/stream.h"

#include <utility>

#include "absl/strings/str_cat.h"
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

absl::StatusOr<bool> Event::IsReached() { return DoIsReached(); }
absl::Status Event::Synchronize() { return DoSynchronize(); }

bool Stream::capturing() const { return DoCapturing(); }

absl::StatusOr<bool> Stream::AtCaptureHead() {
  if (!DoCapturing()) return absl::FailedPreconditionError("AtCaptureHead: the stream is not capturing");
  return DoAtCaptureHead();
}

void* Stream::native() const { return DoNative(); }

// A copy of nothing is no node, on either backend.
absl::Status Stream::Copy(DeviceSpan<std::byte> to, DeviceSpan<const std::byte> from) {
  PRISTINE_RETURN_IF_ERROR(CheckCopy("Copy", to.address(), to.bytes(), from.address(), from.bytes()));
  if (to.empty()) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(DoCopy(to.address(), from.address(), to.bytes()));
  return Observe("copy");
}

absl::Status Stream::CopyFromHost(DeviceSpan<std::byte> to, absl::Span<const std::byte> from) {
  PRISTINE_RETURN_IF_ERROR(CheckCopy("CopyFromHost", to.address(), to.bytes(), from.data(), from.size()));
  if (to.empty()) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(DoCopyFromHost(to.address(), from.data(), to.bytes()));
  return Observe("copy_from_host");
}

absl::Status Stream::CopyToHost(absl::Span<std::byte> to, DeviceSpan<const std::byte> from) {
  PRISTINE_RETURN_IF_ERROR(CheckCopy("CopyToHost", to.data(), to.size(), from.address(), from.bytes()));
  if (to.empty()) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(DoCopyToHost(to.data(), from.address(), to.size()));
  return Observe("copy_to_host");
}

absl::Status Stream::Fill(DeviceSpan<std::byte> to, std::byte value) {
  if (to.empty()) return absl::OkStatus();
  if (to.address() == nullptr) return absl::InvalidArgumentError("Fill: null destination");
  PRISTINE_RETURN_IF_ERROR(DoFill(to.address(), value, to.bytes()));
  return Observe("fill");
}

absl::Status Stream::Record(Event& event) { return DoRecord(event); }
absl::Status Stream::Wait(Event& event) { return DoWait(event); }

absl::Status Stream::RefuseWhileCapturing(const char* call) {
  if (!DoCapturing()) return absl::OkStatus();
  absl::Status error =
      absl::FailedPreconditionError(absl::StrCat(call, ": the stream is capturing; the capture fails"));
  DoKillCapture(error);
  return error;
}

absl::Status Stream::Synchronize() {
  PRISTINE_RETURN_IF_ERROR(RefuseWhileCapturing("Stream::Synchronize"));
  return DoSynchronize();
}

absl::StatusOr<bool> Stream::IsIdle() {
  PRISTINE_RETURN_IF_ERROR(RefuseWhileCapturing("Stream::IsIdle"));
  return DoIsIdle();
}

absl::Status Stream::EnqueueHostKernel(const char* name, WriteList writes, std::function<int()> work) {
  if (name == nullptr || work == nullptr) return absl::InvalidArgumentError("Launch: null kernel name or function");
  PRISTINE_RETURN_IF_ERROR(DoEnqueueHostKernel(name, std::move(writes), std::move(work)));
  return Observe(name);
}

absl::Status Stream::EnqueueCudaKernel(const char* name, absl::FunctionRef<int(CUstream_st*)> launch) {
  if (name == nullptr) return absl::InvalidArgumentError("Launch: null kernel name");
  PRISTINE_RETURN_IF_ERROR(DoEnqueueCudaKernel(name, launch));
  return Observe(name);
}

absl::Status Stream::Observe(const char* node) {
  if (observer_ == nullptr || DoCapturing()) return absl::OkStatus();
  return observer_(node);
}

}  // namespace pristine
