// CudaGraph and CudaGraphExec: a cudaGraph_t read into nodes and edges, and its executable form.
#ifndef PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_GRAPH_H_
#define PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_GRAPH_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "graph_runtime/cuda/cuda_capture.h"
#include "graph_runtime/cuda/cuda_stream.h"
#include "pristine/graph_runtime/graph.h"

namespace pristine {

class CudaDevice;

// Owned by the Graph and by each exec made from it: setting an exec's params takes nodes of the source graph.
class NativeGraph {
 public:
  NativeGraph(CudaDevice& device, cudaGraph_t graph) : device_(device), graph_(graph) {}
  ~NativeGraph();
  NativeGraph(const NativeGraph&) = delete;
  NativeGraph& operator=(const NativeGraph&) = delete;
  cudaGraph_t get() const { return graph_; }

 private:
  CudaDevice& device_;
  const cudaGraph_t graph_;
};

class CudaGraph final : public Graph {
 public:
  // Takes `graph`, also when it fails. `ours` are the nodes that Stream queued, in order; the others are foreign.
  static absl::StatusOr<std::unique_ptr<Graph>> Create(CudaDevice& device, cudaGraph_t graph,
                                                       const std::vector<NamedNode>& ours);

 private:
  CudaGraph(CudaDevice& device, cudaGraph_t graph)
      : device_(device), graph_(std::make_shared<const NativeGraph>(device, graph)) {}
  absl::Status ReadNodes(const std::vector<NamedNode>& ours);
  absl::StatusOr<std::unique_ptr<GraphExec>> DoInstantiate() const override;

  CudaDevice& device_;
  const std::shared_ptr<const NativeGraph> graph_;
};

// Gives kernel nodes of one exec other params.
class CudaKernelParams {
 public:
  absl::Status Set(CudaDevice& device, cudaGraphExec_t exec, void* node, const KernelCall& call);
  // UNIMPLEMENTED: the kernel has no cuda_launch.
  absl::StatusOr<CUfunction> Function(const KernelCall& call);

 private:
  std::vector<std::pair<const void*, CUfunction>> functions_;  // by the address that the runtime knows them by
};

class CudaGraphExec final : public GraphExec {
 public:
  CudaGraphExec(CudaDevice& device, std::shared_ptr<const NativeGraph> graph, std::vector<GraphNode> nodes,
                cudaGraphExec_t exec, cudaEvent_t done);
  ~CudaGraphExec() override;

 private:
  absl::Status DoLaunch(Stream& stream) override;
  absl::Status DoSetKernelParams(int node, const KernelCall& call) override;
  absl::StatusOr<int> DoFindKernel(const KernelCall& call) override;

  CudaDevice& device_;
  const std::shared_ptr<const NativeGraph> graph_;
  const std::vector<GraphNode> nodes_;
  CudaKernelParams params_;
  const cudaGraphExec_t exec_;
  const cudaEvent_t done_;                   // recorded only when an exec is destroyed, so that a launch pays nothing
  std::weak_ptr<NativeStream> launched_on_;  // of the last launch; earlier launches end before it
};

// An exec of the engine's.
class AdoptedCudaExec final : public GraphExec {
 public:
  static absl::StatusOr<std::unique_ptr<GraphExec>> Create(CudaDevice& device, cudaGraph_t graph, cudaGraphExec_t exec);

 private:
  AdoptedCudaExec(CudaDevice& device, std::vector<GraphNode> nodes, cudaGraphExec_t exec);
  absl::Status DoLaunch(Stream& stream) override;
  absl::Status DoSetKernelParams(int node, const KernelCall& call) override;
  absl::StatusOr<int> DoFindKernel(const KernelCall& call) override;

  CudaDevice& device_;
  std::vector<GraphNode> nodes_;
  CudaKernelParams params_;
  const cudaGraphExec_t exec_;
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_GRAPH_H_
