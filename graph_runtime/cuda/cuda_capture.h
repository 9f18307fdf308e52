// The captures that Capture() began on a device and that have not ended: which streams take part, and what our nodes
// are called. CUDA knows neither, and streams that joined a capture record into it too.
#ifndef PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_CAPTURE_H_
#define PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_CAPTURE_H_

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace pristine {

class CudaStream;

// Where a stream stands in a capture: what its next node would depend on.
struct CapturePosition {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;  // NOLINT: CUDA's type
  cudaGraph_t graph = nullptr;
  std::vector<cudaGraphNode_t> after;

  bool capturing() const { return status != cudaStreamCaptureStatusNone; }

  // Not capturing when CUDA cannot tell.
  static CapturePosition Of(cudaStream_t stream);
};

struct NamedNode {
  cudaGraphNode_t node = nullptr;
  std::string name;
};

struct CaptureRecord {
  std::vector<CudaStream*> streams;  // the origin first
  std::vector<NamedNode> nodes;      // in the order recorded
  absl::Status failure;              // the first one
};

class CaptureTable {
 public:
  using Id = unsigned long long;  // NOLINT: CUDA's type

  void Begin(Id id, CudaStream* origin);
  // Whether `stream` is new to capture `id`, and `id` is one of ours.
  bool Join(Id id, CudaStream* stream);
  void AddNode(Id id, cudaGraphNode_t node, const char* name);
  // Marks `id` as failed. Ignored when `id` is not ours, or failed already.
  void Fail(Id id, absl::Status why);
  // `stream` is destroyed.
  void Leave(Id id, CudaStream* stream);
  CaptureRecord End(Id id);

 private:
  std::mutex mutex_;
  std::map<Id, CaptureRecord> captures_;
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_CAPTURE_H_
