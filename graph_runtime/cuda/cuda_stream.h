// CudaStream and CudaEvent: a cudaStream_t and a cudaEvent_t with the semantics of stream.h.
#ifndef PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_STREAM_H_
#define PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_STREAM_H_

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "graph_runtime/cuda/cuda_capture.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine {

class CudaDevice;

class CudaEvent final : public Event {
 public:
  // Takes `event`, which does not measure time.
  CudaEvent(CudaDevice& device, cudaEvent_t event);
  ~CudaEvent() override;

 private:
  friend class CudaStream;
  absl::StatusOr<bool> DoIsReached() override;
  absl::Status DoSynchronize() override;
  // FAILED_PRECONDITION when the mark is in a capture, which then is dead.
  absl::Status RefuseCaptured(const char* call);

  CudaDevice& device_;
  const cudaEvent_t event_;
  // The capture in which it was recorded last: the mark is then a place in a graph, which is never reached. 0: none.
  CaptureTable::Id capture_ = 0;
};

// Shared with the execs that ran on the stream last, which mark it when they are destroyed.
class NativeStream {
 public:
  NativeStream(CudaDevice& device, cudaStream_t stream, bool owned) : device_(device), stream_(stream), owned_(owned) {}
  ~NativeStream();
  NativeStream(const NativeStream&) = delete;
  NativeStream& operator=(const NativeStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  CudaDevice& device_;
  const cudaStream_t stream_;
  const bool owned_;
};

class CudaStream final : public Stream {
 public:
  CudaStream(CudaDevice& device, cudaStream_t stream, bool owned);
  ~CudaStream() override;

  // Launches `exec`. A failure is final for the stream.
  absl::Status LaunchGraph(cudaGraphExec_t exec);
  absl::Status UploadGraph(cudaGraphExec_t exec);
  const std::shared_ptr<NativeStream>& native_stream() const { return native_; }

 private:
  bool DoCapturing() const override;
  absl::StatusOr<bool> DoAtCaptureHead() override;
  void* DoNative() const override;
  absl::Status DoCopy(void* to, const void* from, size_t bytes) override;
  absl::Status DoCopyFromHost(void* to, const void* from, size_t bytes) override;
  absl::Status DoCopyToHost(void* to, const void* from, size_t bytes) override;
  absl::Status DoFill(void* to, std::byte value, size_t bytes) override;
  absl::Status DoRecord(Event& event) override;
  absl::Status DoWait(Event& event) override;
  absl::Status DoSynchronize() override;
  absl::StatusOr<bool> DoIsIdle() override;
  absl::Status DoEnqueueHostKernel(const char* name, WriteList writes, std::function<int()> work) override;
  absl::Status DoEnqueueCudaKernel(const char* name, absl::FunctionRef<int(CUstream_st*)> launch) override;
  absl::Status DoBeginCapture() override;
  absl::StatusOr<std::unique_ptr<Graph>> DoEndCapture(absl::Status body) override;
  void DoKillCapture(absl::Status why) override;

  // Runs `queue`, which queues one node; while capturing, finds the node that it added and names it.
  cudaError_t QueueNode(const char* name, absl::FunctionRef<cudaError_t(cudaStream_t)> queue, bool* capturing);
  absl::Status QueueCopy(const char* name, void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
  // A failed call kills the capture, or is final for the stream unless CUDA merely refused it.
  absl::Status Keep(absl::Status status, bool capturing, bool final);
  // Counts this stream in if it has become part of capture `id`, and `id` is ours.
  void JoinCapture(CaptureTable::Id id);

  CudaDevice& device_;
  const std::shared_ptr<NativeStream> native_;
  const bool owned_;
  absl::Status failed_;              // the first final failure
  CaptureTable::Id capture_id_ = 0;  // the capture of ours that this stream takes part in; 0: none
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_STREAM_H_
