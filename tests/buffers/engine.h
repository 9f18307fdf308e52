// What an engine does behind Pristine's back: its own capture, its own launches, its own work on the native stream.
#ifndef PRISTINE_TESTS_BUFFERS_ENGINE_H_
#define PRISTINE_TESTS_BUFFERS_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/host_native.h"
#include "pristine/graph_runtime/status.h"
#include "pristine/graph_runtime/stream.h"
#ifdef PRISTINE_HAS_CUDA
#include <cuda_runtime.h>
#endif

namespace pristine::testing {

using EngineLaunch = std::function<absl::Status(Stream&)>;

#ifdef PRISTINE_HAS_CUDA
inline absl::Status CudaStatus(cudaError_t error) {
  return error == cudaSuccess ? absl::OkStatus() : absl::InternalError(cudaGetErrorString(error));
}
inline cudaStream_t NativeOf(Stream& stream) { return static_cast<cudaStream_t>(stream.native()); }
#endif

inline absl::Status EngineBeginCapture(Stream& stream) {
#ifdef PRISTINE_HAS_CUDA
  if (stream.device().backend() == Backend::kCuda) {
    return CudaStatus(cudaStreamBeginCapture(NativeOf(stream), cudaStreamCaptureModeThreadLocal));
  }
#endif
  return host::BeginCapture(stream.native());
}

// What launches the captured graph, and owns it.
inline absl::StatusOr<EngineLaunch> EngineEndCapture(Stream& stream) {
#ifdef PRISTINE_HAS_CUDA
  if (stream.device().backend() == Backend::kCuda) {
    cudaGraph_t graph = nullptr;
    PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaStreamEndCapture(NativeOf(stream), &graph)));
    cudaGraphExec_t exec = nullptr;
    const cudaError_t error = cudaGraphInstantiate(&exec, graph, 0);
    cudaGraphDestroy(graph);
    PRISTINE_RETURN_IF_ERROR(CudaStatus(error));
    const std::shared_ptr<CUgraphExec_st> owner(exec, [](cudaGraphExec_t dead) { cudaGraphExecDestroy(dead); });
    return EngineLaunch([owner](Stream& on) { return CudaStatus(cudaGraphLaunch(owner.get(), NativeOf(on))); });
  }
#endif
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Graph> graph, host::EndCapture(stream.native()));
  PRISTINE_ASSIGN_OR_RETURN(std::shared_ptr<GraphExec> exec, graph->Instantiate());
  return EngineLaunch([exec](Stream& on) { return exec->Launch(on); });
}

// Sets the four bytes at `address` to `byte` each, on the native stream.
inline absl::Status EngineFill(Stream& stream, int32_t* address, uint8_t byte) {
#ifdef PRISTINE_HAS_CUDA
  if (stream.device().backend() == Backend::kCuda) {
    return CudaStatus(cudaMemsetAsync(address, byte, sizeof(*address), NativeOf(stream)));
  }
#endif
  return host::EnqueueForeign(stream.native(), "engine_fill", [address, byte] {
    *address = static_cast<int32_t>(0x01010101u * byte);
    return 0;
  });
}

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_BUFFERS_ENGINE_H_
