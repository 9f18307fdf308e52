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

// What the engine may hand over of a graph that it captured (BufferManager::AttachExec).
struct EngineHandles {
  void* graph = nullptr;
  void* exec = nullptr;
  std::shared_ptr<void> owner;  // of `graph`
};

// What launches the captured graph, and owns it.
inline absl::StatusOr<EngineLaunch> EngineEndCapture(Stream& stream, EngineHandles* handles = nullptr) {
#ifdef PRISTINE_HAS_CUDA
  if (stream.device().backend() == Backend::kCuda) {
    cudaGraph_t graph = nullptr;
    PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaStreamEndCapture(NativeOf(stream), &graph)));
    cudaGraphExec_t exec = nullptr;
    const cudaError_t error = cudaGraphInstantiate(&exec, graph, 0);
    std::shared_ptr<void> graph_owner(graph, [](void* dead) { cudaGraphDestroy(static_cast<cudaGraph_t>(dead)); });
    PRISTINE_RETURN_IF_ERROR(CudaStatus(error));
    if (handles != nullptr) *handles = {graph, exec, std::move(graph_owner)};
    const std::shared_ptr<CUgraphExec_st> owner(exec, [](cudaGraphExec_t dead) { cudaGraphExecDestroy(dead); });
    return EngineLaunch([owner](Stream& on) { return CudaStatus(cudaGraphLaunch(owner.get(), NativeOf(on))); });
  }
#endif
  PRISTINE_ASSIGN_OR_RETURN(const std::shared_ptr<Graph> graph, host::EndCapture(stream.native()));
  PRISTINE_ASSIGN_OR_RETURN(std::shared_ptr<GraphExec> exec, graph->Instantiate());
  if (handles != nullptr) *handles = {graph.get(), exec.get(), graph};
  return EngineLaunch([exec](Stream& on) { return exec->Launch(on); });
}

// Updates the exec from its own graph: each node is then as it was captured. On Host an exec cannot be updated.
inline absl::Status EngineUpdateExec(const Device& device, const EngineHandles& handles) {
#ifdef PRISTINE_HAS_CUDA
  if (device.backend() == Backend::kCuda) {
    cudaGraphExecUpdateResultInfo result = {};
    return CudaStatus(cudaGraphExecUpdate(static_cast<cudaGraphExec_t>(handles.exec),
                                          static_cast<cudaGraph_t>(handles.graph), &result));
  }
#endif
  static_cast<void>(device);
  static_cast<void>(handles);
  return absl::OkStatus();
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
