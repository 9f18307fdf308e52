#include "graph_runtime/cuda/cuda_stream.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "graph_runtime/cuda/cuda_device.h"
#include "graph_runtime/cuda/cuda_graph.h"
#include "graph_runtime/cuda/cuda_status.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {
namespace {

absl::Status NotCuda(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat(what, ": the event belongs to another backend, not to a CUDA device"));
}

// A kernel or graph that CUDA did not take is INTERNAL whatever the reason, but for captures and a lost device.
absl::Status LaunchStatus(cudaError_t error, const char* what) {
  const absl::Status status = CudaStatus(error, what);
  if (status.ok() || IsCaptureError(error) || IsSticky(error)) return status;
  return absl::InternalError(status.message());
}

}  // namespace

CudaEvent::CudaEvent(CudaDevice& device, cudaEvent_t event) : Event(device), device_(device), event_(event) {}

CudaEvent::~CudaEvent() {
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed;
  cudaEventDestroy(event_);
}

absl::Status CudaEvent::RefuseCaptured(const char* call) {
  if (capture_ == 0) return absl::OkStatus();
  absl::Status error = absl::FailedPreconditionError(
      absl::StrCat(call, ": the event was recorded in a capture, so it marks a place in a graph; record it again"));
  device_.captures().Fail(capture_, error);
  return error;
}

absl::StatusOr<bool> CudaEvent::DoIsReached() {
  PRISTINE_RETURN_IF_ERROR(RefuseCaptured("Event::IsReached"));
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed;
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  PRISTINE_RETURN_IF_ERROR(CudaStatus(error, "cudaEventQuery"));
  return true;
}

absl::Status CudaEvent::DoSynchronize() {
  PRISTINE_RETURN_IF_ERROR(RefuseCaptured("Event::Synchronize"));
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed;
  return CudaStatus(cudaEventSynchronize(event_), "cudaEventSynchronize");
}

NativeStream::~NativeStream() {
  if (!owned_) return;
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed;
  cudaStreamDestroy(stream_);
}

CudaStream::CudaStream(CudaDevice& device, cudaStream_t stream, bool owned)
    : Stream(device), device_(device), native_(std::make_shared<NativeStream>(device, stream, owned)), owned_(owned) {
  if (!owned_) device_.AddAdopted(stream);
}

CudaStream::~CudaStream() {
  if (capture_id_ != 0) {
    device_.captures().Leave(capture_id_, this);
    CountCapture(-1);
  }
  if (!owned_) device_.RemoveAdopted(native_->get());
  if (DoCapturing()) return;  // waiting would kill the engine's capture
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed;
  cudaStreamSynchronize(native_->get());
  cudaGetLastError();
}

bool CudaStream::DoCapturing() const {
  const CurrentContext current(device_.driver(), device_.context());
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(native_->get(), &status) != cudaSuccess) cudaGetLastError();
  return status != cudaStreamCaptureStatusNone;
}

absl::StatusOr<bool> CudaStream::DoAtCaptureHead() {
  const CurrentContext current(device_.driver(), device_.context());
  const CapturePosition position = CapturePosition::Of(native_->get());
  if (position.status != cudaStreamCaptureStatusActive) {
    return absl::FailedPreconditionError(position.status == cudaStreamCaptureStatusNone
                                             ? "the stream is not capturing"
                                             : "the capture that the stream is in has failed");
  }
  size_t nodes = 0;
  PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaGraphGetNodes(position.graph, nullptr, &nodes), "cudaGraphGetNodes"));
  return nodes == 0 && position.after.empty();
}

void* CudaStream::DoNative() const { return native_->get(); }

absl::Status CudaStream::Keep(absl::Status status, bool capturing, bool final) {
  if (status.ok()) return status;
  if (capturing) {
    if (capture_id_ != 0) device_.captures().Fail(capture_id_, status);
  } else if (final) {
    failed_.Update(status);
  }
  return status;
}

void CudaStream::JoinCapture(CaptureTable::Id id) {
  if (capture_id_ == id || !device_.captures().Join(id, this)) return;
  capture_id_ = id;
  CountCapture(1);
}

cudaError_t CudaStream::QueueNode(const char* name, absl::FunctionRef<cudaError_t(cudaStream_t)> queue,
                                  bool* capturing) {
  const CapturePosition before = CapturePosition::Of(native_->get());
  *capturing = before.capturing();
  const RelaxedCaptureMode relaxed(!*capturing && device_.capturing_streams() > 0);
  const cudaError_t error = queue(native_->get());
  if (error != cudaSuccess || !*capturing) return error;
  const CapturePosition after = CapturePosition::Of(native_->get());
  if (after.status != cudaStreamCaptureStatusActive) return cudaErrorStreamCaptureInvalidated;
  JoinCapture(after.id);
  // The new node is what the next one depends on. Unchanged: nothing was added (an empty copy).
  if (after.after.size() == 1 && after.after != before.after) {
    device_.captures().AddNode(after.id, after.after[0], name);
  }
  return cudaSuccess;
}

absl::Status CudaStream::QueueCopy(const char* name, void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (!failed_.ok()) return failed_;
  const CurrentContext current(device_.driver(), device_.context());
  bool capturing = false;
  const cudaError_t error = QueueNode(
      name, [&](cudaStream_t stream) { return cudaMemcpyAsync(to, from, bytes, kind, stream); }, &capturing);
  return Keep(CudaStatus(error, "cudaMemcpyAsync"), capturing, !IsRefusal(error));
}

// Default: a "device" address may be that of pinned host memory.
absl::Status CudaStream::DoCopy(void* to, const void* from, size_t bytes) {
  return QueueCopy("copy", to, from, bytes, cudaMemcpyDefault);
}

// With pageable host memory CUDA stages the copy and may make the caller wait; with pinned memory it never does.
absl::Status CudaStream::DoCopyFromHost(void* to, const void* from, size_t bytes) {
  return QueueCopy("copy_from_host", to, from, bytes, cudaMemcpyHostToDevice);
}

absl::Status CudaStream::DoCopyToHost(void* to, const void* from, size_t bytes) {
  return QueueCopy("copy_to_host", to, from, bytes, cudaMemcpyDeviceToHost);
}

absl::Status CudaStream::DoFill(void* to, std::byte value, size_t bytes) {
  if (!failed_.ok()) return failed_;
  const CurrentContext current(device_.driver(), device_.context());
  bool capturing = false;
  const cudaError_t error = QueueNode(
      "fill", [&](cudaStream_t stream) { return cudaMemsetAsync(to, std::to_integer<int>(value), bytes, stream); },
      &capturing);
  return Keep(CudaStatus(error, "cudaMemsetAsync"), capturing, !IsRefusal(error));
}

absl::Status CudaStream::DoRecord(Event& event) {
  if (!failed_.ok()) return failed_;
  auto* const mark = dynamic_cast<CudaEvent*>(&event);
  if (mark == nullptr) return NotCuda("Record");
  if (&mark->device_ != &device_) {
    return absl::InvalidArgumentError(
        absl::StrCat("Record: the event belongs to ", mark->device_.name(), ", the stream to ", device_.name()));
  }
  const CurrentContext current(device_.driver(), device_.context());
  const CapturePosition position = CapturePosition::Of(native_->get());
  const cudaError_t error = cudaEventRecord(mark->event_, native_->get());
  if (error == cudaSuccess) mark->capture_ = position.id;
  return Keep(CudaStatus(error, "cudaEventRecord"), position.capturing(), !IsRefusal(error));
}

absl::Status CudaStream::DoWait(Event& event) {
  if (!failed_.ok()) return failed_;
  auto* const mark = dynamic_cast<CudaEvent*>(&event);
  if (mark == nullptr) return NotCuda("Wait");
  const CurrentContext current(device_.driver(), device_.context());
  const bool capturing = DoCapturing();
  const cudaError_t error = cudaStreamWaitEvent(native_->get(), mark->event_, cudaEventWaitDefault);
  if (error == cudaSuccess && mark->capture_ != 0) JoinCapture(CapturePosition::Of(native_->get()).id);
  absl::Status status = CudaStatus(error, "cudaStreamWaitEvent");
  if (mark->capture_ != 0 && IsRefusal(error)) {
    status = absl::FailedPreconditionError(
        absl::StrCat("Wait: the event was recorded in a capture that this stream cannot join: ", status.message()));
  }
  return Keep(status, capturing, !IsRefusal(error));
}

absl::Status CudaStream::DoSynchronize() {
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed;
  const cudaError_t error = cudaStreamSynchronize(native_->get());
  const absl::Status status = Keep(CudaStatus(error, "cudaStreamSynchronize"), false, !IsRefusal(error));
  return failed_.ok() ? status : failed_;  // also after a failure the queue is drained: the caller may free memory now
}

absl::StatusOr<bool> CudaStream::DoIsIdle() {
  if (!failed_.ok()) return failed_;
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed;
  const cudaError_t error = cudaStreamQuery(native_->get());
  if (error == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  PRISTINE_RETURN_IF_ERROR(Keep(CudaStatus(error, "cudaStreamQuery"), false, !IsRefusal(error)));
  return true;
}

absl::Status CudaStream::DoEnqueueHostKernel(const char* name, WriteList, std::function<int()>) {
  return absl::UnimplementedError(absl::StrCat(name, ": a host function cannot run on ", device_.name()));
}

absl::Status CudaStream::DoEnqueueCudaKernel(const char* name, absl::FunctionRef<int(CUstream_st*)> launch) {
  if (!failed_.ok()) return failed_;
  const CurrentContext current(device_.driver(), device_.context());
  cudaGetLastError();  // launchers return the last error: one that the caller left behind is not the kernel's
  bool capturing = false;
  const cudaError_t error = QueueNode(
      name, [&](cudaStream_t stream) { return static_cast<cudaError_t>(launch(stream)); }, &capturing);
  return Keep(LaunchStatus(error, name), capturing, /*final=*/true);
}

absl::Status CudaStream::LaunchGraph(cudaGraphExec_t exec) {
  if (!failed_.ok()) return failed_;
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed(device_.capturing_streams() > 0);
  return Keep(LaunchStatus(cudaGraphLaunch(exec, native_->get()), "cudaGraphLaunch"), false, /*final=*/true);
}

absl::Status CudaStream::UploadGraph(cudaGraphExec_t exec) {
  if (!failed_.ok()) return failed_;
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed(device_.capturing_streams() > 0);
  const cudaError_t error = cudaGraphUpload(exec, native_->get());
  return Keep(CudaStatus(error, "cudaGraphUpload"), false, IsSticky(error));  // no memory is no end of the stream
}

absl::Status CudaStream::DoBeginCapture() {
  if (!failed_.ok()) return failed_;
  const CurrentContext current(device_.driver(), device_.context());
  if (DoCapturing()) return absl::FailedPreconditionError("the stream is capturing already");
  const cudaError_t error = cudaStreamBeginCapture(native_->get(), cudaStreamCaptureModeThreadLocal);
  PRISTINE_RETURN_IF_ERROR(Keep(CudaStatus(error, "cudaStreamBeginCapture"), false, !IsRefusal(error)));
  capture_id_ = CapturePosition::Of(native_->get()).id;
  device_.captures().Begin(capture_id_, this);
  CountCapture(1);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Graph>> CudaStream::DoEndCapture(absl::Status body) {
  const CurrentContext current(device_.driver(), device_.context());
  cudaGraph_t graph = nullptr;
  const absl::Status ended = CudaStatus(cudaStreamEndCapture(native_->get(), &graph), "cudaStreamEndCapture");
  CaptureRecord record = device_.captures().End(capture_id_);
  for (CudaStream* stream : record.streams) {
    stream->capture_id_ = 0;
    stream->CountCapture(-1);
  }
  absl::Status status = std::move(body);
  status.Update(record.failure);
  status.Update(ended);
  if (!status.ok()) {
    if (graph != nullptr) cudaGraphDestroy(graph);
    return status;
  }
  return CudaGraph::Create(device_, graph, record.nodes);
}

void CudaStream::DoKillCapture(absl::Status why) {
  if (capture_id_ != 0) {
    device_.captures().Fail(capture_id_, std::move(why));
    return;
  }
  // The engine's capture dies as it would have died of its own query.
  const CurrentContext current(device_.driver(), device_.context());
  cudaStreamQuery(native_->get());
  cudaGetLastError();
}

}  // namespace pristine
