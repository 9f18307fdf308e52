#include "graph_runtime/cuda/cuda_capture.h"

#include <algorithm>
#include <utility>

namespace pristine {

CapturePosition CapturePosition::Of(cudaStream_t stream) {
  CapturePosition position;
  // The cheap question first: it is asked before each launch.
  if (cudaStreamIsCapturing(stream, &position.status) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  if (position.status == cudaStreamCaptureStatusNone) return position;
  const cudaGraphNode_t* after = nullptr;
  const cudaGraphEdgeData* edges = nullptr;  // asked for, or a programmatic edge makes the query fail
  size_t count = 0;
#if CUDART_VERSION >= 13000
  const cudaError_t error =
      cudaStreamGetCaptureInfo(stream, &position.status, &position.id, &position.graph, &after, &edges, &count);
#else
  const cudaError_t error =
      cudaStreamGetCaptureInfo_v3(stream, &position.status, &position.id, &position.graph, &after, &edges, &count);
#endif
  if (error != cudaSuccess) {
    cudaGetLastError();
    position.status = cudaStreamCaptureStatusInvalidated;
  }
  if (position.status == cudaStreamCaptureStatusActive) position.after.assign(after, after + count);
  return position;
}

void CaptureTable::Begin(Id id, CudaStream* origin) {
  std::lock_guard lock(mutex_);
  captures_[id].streams.push_back(origin);
}

bool CaptureTable::Join(Id id, CudaStream* stream) {
  std::lock_guard lock(mutex_);
  const auto found = captures_.find(id);
  if (found == captures_.end()) return false;
  std::vector<CudaStream*>& streams = found->second.streams;
  if (std::find(streams.begin(), streams.end(), stream) != streams.end()) return false;
  streams.push_back(stream);
  return true;
}

void CaptureTable::AddNode(Id id, cudaGraphNode_t node, const char* name) {
  std::lock_guard lock(mutex_);
  const auto found = captures_.find(id);
  if (found != captures_.end()) found->second.nodes.push_back({node, name});
}

void CaptureTable::Fail(Id id, absl::Status why) {
  std::lock_guard lock(mutex_);
  const auto found = captures_.find(id);
  if (found != captures_.end()) found->second.failure.Update(std::move(why));
}

void CaptureTable::Leave(Id id, CudaStream* stream) {
  std::lock_guard lock(mutex_);
  const auto found = captures_.find(id);
  if (found != captures_.end()) std::erase(found->second.streams, stream);
}

CaptureRecord CaptureTable::End(Id id) {
  std::lock_guard lock(mutex_);
  const auto found = captures_.find(id);
  if (found == captures_.end()) return {};
  CaptureRecord record = std::move(found->second);
  captures_.erase(found);
  return record;
}

}  // namespace pristine
