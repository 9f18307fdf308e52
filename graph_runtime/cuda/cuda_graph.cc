#include "graph_runtime/cuda/cuda_graph.h"

#include <functional>
#include <queue>
#include <string>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "graph_runtime/cuda/cuda_device.h"
#include "graph_runtime/cuda/cuda_status.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {
namespace {

absl::StatusOr<std::vector<cudaGraphNode_t>> Nodes(cudaGraph_t graph) {
  size_t count = 0;
  PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaGraphGetNodes(graph, nullptr, &count), "cudaGraphGetNodes"));
  std::vector<cudaGraphNode_t> nodes(count);
  if (count > 0) {
    PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaGraphGetNodes(graph, nodes.data(), &count), "cudaGraphGetNodes"));
  }
  return nodes;
}

struct NativeEdges {
  std::vector<cudaGraphNode_t> from, to;
};

cudaError_t GetEdges(cudaGraph_t graph, cudaGraphNode_t* from, cudaGraphNode_t* to, cudaGraphEdgeData* data,
                     size_t* count) {
#if CUDART_VERSION >= 13000
  return cudaGraphGetEdges(graph, from, to, data, count);
#else
  return cudaGraphGetEdges_v2(graph, from, to, data, count);
#endif
}

absl::StatusOr<NativeEdges> Edges(cudaGraph_t graph) {
  size_t count = 0;
  PRISTINE_RETURN_IF_ERROR(CudaStatus(GetEdges(graph, nullptr, nullptr, nullptr, &count), "cudaGraphGetEdges"));
  NativeEdges edges{std::vector<cudaGraphNode_t>(count), std::vector<cudaGraphNode_t>(count)};
  std::vector<cudaGraphEdgeData> data(count);  // asked for, or a programmatic edge makes the query fail
  if (count > 0) {
    PRISTINE_RETURN_IF_ERROR(
        CudaStatus(GetEdges(graph, edges.from.data(), edges.to.data(), data.data(), &count), "cudaGraphGetEdges"));
  }
  return edges;
}

GraphNode::Kind KindOf(cudaGraphNodeType type) {
  switch (type) {
    case cudaGraphNodeTypeKernel:
      return GraphNode::Kind::kKernel;
    case cudaGraphNodeTypeMemcpy:
      return GraphNode::Kind::kCopy;
    case cudaGraphNodeTypeMemset:
      return GraphNode::Kind::kFill;
    default:
      return GraphNode::Kind::kOther;
  }
}

// The symbol of a kernel node, or "".
std::string KernelName(const CudaDriver& driver, cudaGraphNode_t node) {
  CUDA_KERNEL_NODE_PARAMS_v2 params = {};
  if (driver.kernel_node_get_params(node, &params) != CUDA_SUCCESS) return "";
  const char* name = nullptr;
  if (params.func != nullptr) {
    if (driver.function_get_name(&name, params.func) != CUDA_SUCCESS) return "";
  } else if (params.kern != nullptr) {
    if (driver.kernel_get_name(&name, params.kern) != CUDA_SUCCESS) return "";
  }
  return name == nullptr ? "" : name;
}

// FAILED_PRECONDITION if `graph`, or a graph inside it, allocates or frees memory: such a graph may have one exec only,
// and its addresses are not ours to promise.
absl::Status CheckNoAllocation(cudaGraph_t graph) {
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<cudaGraphNode_t> nodes, Nodes(graph));
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
    PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType"));
    if (type == cudaGraphNodeTypeMemAlloc || type == cudaGraphNodeTypeMemFree) {
      return absl::FailedPreconditionError(absl::StrCat("the graph ",
                                                        type == cudaGraphNodeTypeMemAlloc ? "allocates" : "frees",
                                                        " memory: allocate before the capture, outside the graph"));
    }
    if (type == cudaGraphNodeTypeGraph) {
      cudaGraph_t child = nullptr;
      PRISTINE_RETURN_IF_ERROR(
          CudaStatus(cudaGraphChildGraphNodeGetGraph(node, &child), "cudaGraphChildGraphNodeGetGraph"));
      PRISTINE_RETURN_IF_ERROR(CheckNoAllocation(child));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Graph>> CudaGraph::Create(CudaDevice& device, cudaGraph_t graph,
                                                         const std::vector<NamedNode>& ours) {
  std::unique_ptr<CudaGraph> result(new CudaGraph(device, graph));
  PRISTINE_RETURN_IF_ERROR(result->ReadNodes(ours));
  return result;
}

NativeGraph::~NativeGraph() {
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed;
  cudaGraphDestroy(graph_);
}

absl::Status CudaGraph::ReadNodes(const std::vector<NamedNode>& ours) {
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<cudaGraphNode_t> natives, Nodes(graph_->get()));
  PRISTINE_ASSIGN_OR_RETURN(const NativeEdges edges, Edges(graph_->get()));

  // Order: ours as they were recorded, a foreign node as soon as what it depends on has come.
  struct Entry {
    int order = -1;  // place among ours; -1: foreign, which goes first
    int blockers = 0;
    std::vector<int> next;
  };
  std::unordered_map<cudaGraphNode_t, int> index;
  for (size_t i = 0; i < natives.size(); ++i) index[natives[i]] = static_cast<int>(i);
  std::vector<Entry> entries(natives.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    if (const auto found = index.find(ours[i].node); found != index.end()) {
      entries[found->second].order = static_cast<int>(i);
    }
  }
  for (size_t i = 0; i < edges.from.size(); ++i) {
    entries[index[edges.from[i]]].next.push_back(index[edges.to[i]]);
    ++entries[index[edges.to[i]]].blockers;
  }
  std::priority_queue<std::pair<int, int>, std::vector<std::pair<int, int>>, std::greater<>> ready;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (entries[i].blockers == 0) ready.push({entries[i].order, static_cast<int>(i)});
  }

  std::vector<GraphNode> nodes;
  std::vector<int> place(natives.size(), 0);  // in `nodes`
  while (!ready.empty()) {
    const int i = ready.top().second;
    ready.pop();
    const Entry& entry = entries[i];
    cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
    PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaGraphNodeGetType(natives[i], &type), "cudaGraphNodeGetType"));
    GraphNode node;
    node.kind = KindOf(type);
    node.foreign = entry.order < 0;
    node.native = natives[i];
    if (!node.foreign) {
      node.name = ours[entry.order].name;
    } else if (node.kind == GraphNode::Kind::kKernel) {
      node.name = KernelName(device_.driver(), natives[i]);
    }
    place[i] = static_cast<int>(nodes.size());
    nodes.push_back(std::move(node));
    for (const int next : entry.next) {
      if (--entries[next].blockers == 0) ready.push({entries[next].order, next});
    }
  }
  std::vector<GraphEdge> ordered;
  for (size_t i = 0; i < edges.from.size(); ++i) {
    ordered.push_back({place[index[edges.from[i]]], place[index[edges.to[i]]]});
  }
  SetNodes(std::move(nodes), std::move(ordered));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<GraphExec>> CudaGraph::DoInstantiate() const {
  const CurrentContext current(device_.driver(), device_.context());
  PRISTINE_RETURN_IF_ERROR(CheckNoAllocation(graph_->get()));
  device_.SweepRetired();
  cudaEvent_t done = nullptr;
  PRISTINE_RETURN_IF_ERROR(
      CudaStatus(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
  cudaGraphExec_t exec = nullptr;
  if (absl::Status status = CudaStatus(cudaGraphInstantiate(&exec, graph_->get(), 0), "cudaGraphInstantiate");
      !status.ok()) {
    cudaEventDestroy(done);
    return status;
  }
  return std::make_unique<CudaGraphExec>(device_, graph_, nodes(), exec, done);
}

CudaGraphExec::CudaGraphExec(CudaDevice& device, std::shared_ptr<const NativeGraph> graph, std::vector<GraphNode> nodes,
                             cudaGraphExec_t exec, cudaEvent_t done)
    : GraphExec(device),
      device_(device),
      graph_(std::move(graph)),
      nodes_(std::move(nodes)),
      exec_(exec),
      done_(done) {}

CudaGraphExec::~CudaGraphExec() {
  const CurrentContext current(device_.driver(), device_.context());
  const RelaxedCaptureMode relaxed;
  device_.SweepRetired();
  // A stream that is gone was drained first. One that is capturing now cannot be marked: the mark would go into the
  // capture; then the exec is destroyed at once, which CUDA survives (it only is slower to return).
  if (const std::shared_ptr<NativeStream> stream = launched_on_.lock(); stream != nullptr) {
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing(stream->get(), &capturing) == cudaSuccess && capturing == cudaStreamCaptureStatusNone &&
        cudaEventRecord(done_, stream->get()) == cudaSuccess && cudaEventQuery(done_) == cudaErrorNotReady) {
      cudaGetLastError();
      device_.Retire(exec_, done_);
      return;
    }
  }
  cudaGraphExecDestroy(exec_);
  cudaEventDestroy(done_);
  cudaGetLastError();
}

absl::Status CudaGraphExec::DoLaunch(Stream& stream) {
  auto& on = static_cast<CudaStream&>(stream);  // GraphExec::Launch checked the device
  PRISTINE_RETURN_IF_ERROR(on.LaunchGraph(exec_));
  launched_on_ = on.native_stream();
  return absl::OkStatus();
}

absl::Status CudaGraphExec::DoSetKernelParams(int node, const KernelCall& call) {
  PRISTINE_RETURN_IF_ERROR(CheckCall(node, nodes_, call));
  return params_.Set(device_, exec_, nodes_[static_cast<size_t>(node)].native, call);
}

absl::StatusOr<int> CudaGraphExec::DoFindKernel(const KernelCall& call) { return FindNamed(nodes_, call); }

absl::Status CudaKernelParams::Set(CudaDevice& device, cudaGraphExec_t exec, void* node, const KernelCall& call) {
  const CurrentContext current(device.driver(), device.context());
  const RelaxedCaptureMode relaxed(device.capturing_streams() > 0);
  PRISTINE_ASSIGN_OR_RETURN(const CUfunction function, Function(call));
  void* arguments[] = {const_cast<void*>(call.params)};
  CUDA_KERNEL_NODE_PARAMS params = {};
  params.func = function;
  params.gridDimX = call.cuda.grid;
  params.gridDimY = params.gridDimZ = 1;
  params.blockDimX = call.cuda.block;
  params.blockDimY = params.blockDimZ = 1;
  params.sharedMemBytes = static_cast<unsigned>(call.cuda.shared_bytes);
  params.kernelParams = arguments;
  return device.driver().ToStatus(
      device.driver().exec_kernel_node_set_params(exec, static_cast<CUgraphNode>(node), &params),
      "cuGraphExecKernelNodeSetParams");
}

// Remembered: the runtime looks a kernel up by its address at each call.
absl::StatusOr<CUfunction> CudaKernelParams::Function(const KernelCall& call) {
  if (call.cuda.function == nullptr) {
    return absl::UnimplementedError(absl::StrCat("SetKernelParams: ", call.name, " has no cuda_launch"));
  }
  for (const auto& [known, function] : functions_) {
    if (known == call.cuda.function) return function;
  }
  cudaFunction_t function = nullptr;
  PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaGetFuncBySymbol(&function, call.cuda.function), "cudaGetFuncBySymbol"));
  functions_.emplace_back(call.cuda.function, function);
  return function;
}

absl::StatusOr<std::unique_ptr<GraphExec>> AdoptedCudaExec::Create(CudaDevice& device, cudaGraph_t graph,
                                                                   cudaGraphExec_t exec) {
  const CurrentContext current(device.driver(), device.context());
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<cudaGraphNode_t> natives, Nodes(graph));
  std::vector<GraphNode> nodes;
  for (cudaGraphNode_t native : natives) {
    cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
    PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaGraphNodeGetType(native, &type), "cudaGraphNodeGetType"));
    const GraphNode::Kind kind = KindOf(type);
    std::string name = kind == GraphNode::Kind::kKernel ? KernelName(device.driver(), native) : "";
    nodes.push_back({kind, std::move(name), /*foreign=*/true, native});
  }
  return std::unique_ptr<GraphExec>(new AdoptedCudaExec(device, std::move(nodes), exec));
}

AdoptedCudaExec::AdoptedCudaExec(CudaDevice& device, std::vector<GraphNode> nodes, cudaGraphExec_t exec)
    : GraphExec(device), device_(device), nodes_(std::move(nodes)), exec_(exec) {}

absl::Status AdoptedCudaExec::DoLaunch(Stream& stream) { return static_cast<CudaStream&>(stream).LaunchGraph(exec_); }

absl::Status AdoptedCudaExec::DoSetKernelParams(int node, const KernelCall& call) {
  PRISTINE_RETURN_IF_ERROR(CheckCall(node, nodes_, call));
  return params_.Set(device_, exec_, nodes_[static_cast<size_t>(node)].native, call);
}

// CUDA knows a node's kernel by its symbol only.
absl::StatusOr<int> AdoptedCudaExec::DoFindKernel(const KernelCall& call) {
  const CurrentContext current(device_.driver(), device_.context());
  PRISTINE_ASSIGN_OR_RETURN(const CUfunction function, params_.Function(call));
  const char* symbol = nullptr;
  PRISTINE_RETURN_IF_ERROR(
      device_.driver().ToStatus(device_.driver().function_get_name(&symbol, function), "cuFuncGetName"));
  for (GraphNode& node : nodes_) {
    if (!node.foreign || node.kind != GraphNode::Kind::kKernel || node.name != symbol) continue;
    node.foreign = false;
    node.name = call.name;
  }
  return FindNamed(nodes_, call);
}

}  // namespace pristine
