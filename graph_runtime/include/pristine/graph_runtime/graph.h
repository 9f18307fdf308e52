// Graph (what a capture recorded, inspectable) and GraphExec (what can be launched).
#ifndef PRISTINE_GRAPH_RUNTIME_GRAPH_H_
#define PRISTINE_GRAPH_RUNTIME_GRAPH_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/graph_runtime/kernel.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine {

struct GraphNode {
  enum class Kind { kKernel, kCopy, kFill, kOther } kind = Kind::kOther;
  std::string
      name;  // Kernel::name, "copy", "copy_from_host", "copy_to_host", "fill"; foreign kernels: the symbol or ""
  bool foreign = false;    // queued on the native stream, not through Stream
  void* native = nullptr;  // cudaGraphNode_t; null on Host
};

// `to` runs after `from`; both are indices into nodes(). Edges are transitively reduced, so both backends agree.
struct GraphEdge {
  int from = 0;
  int to = 0;
  friend bool operator==(const GraphEdge&, const GraphEdge&) = default;
  friend auto operator<=>(const GraphEdge&, const GraphEdge&) = default;
};

// Immutable; may be destroyed while an exec made from it runs.
class Graph {
 public:
  virtual ~Graph() = default;
  const std::vector<GraphNode>& nodes() const {
    return nodes_;
  }  // in the order recorded; foreign nodes last where unknown
  const std::vector<GraphEdge>& edges() const { return edges_; }  // sorted
  // Graphviz text: a box per node, foreign ones dashed, an arrow per edge.
  std::string ToDot(const std::string& title) const;
  // Blocks while the driver builds (milliseconds on CUDA). FAILED_PRECONDITION: the graph allocates memory.
  absl::StatusOr<std::unique_ptr<GraphExec>> Instantiate() const { return DoInstantiate(); }

 protected:
  void SetNodes(std::vector<GraphNode> nodes, std::vector<GraphEdge> edges);  // reduces and sorts `edges`

 private:
  virtual absl::StatusOr<std::unique_ptr<GraphExec>> DoInstantiate() const = 0;
  std::vector<GraphNode> nodes_;
  std::vector<GraphEdge> edges_;
};

// A kernel and its params, type erased. Valid as long as the params.
struct KernelCall {
  using Function = void (*)();
  const char* name = "";
  const void* params = nullptr;
  size_t bytes = 0;
  Function host = nullptr;
  Function writes = nullptr;
  int (*run)(Function host, const void* params) = nullptr;
  void (*declare)(Function writes, const void* params, WriteList& out) = nullptr;
  CudaLaunch cuda;  // function null: not offered
};

// A graph that can be launched. One launch runs at a time: a launch waits for the one before, on any stream. May be
// destroyed while a launch is in flight: it is then retired, and the launch completes.
class GraphExec {
 public:
  virtual ~GraphExec() = default;
  // Queues one run: after earlier work of `stream`, before later work. Does not block or allocate.
  // FAILED_PRECONDITION: `stream` is capturing. INVALID_ARGUMENT: it belongs to another device.
  absl::Status Launch(Stream& stream);

  // Launches from now on run `kernel` with a copy of `params` at place `node` of Graph::nodes(); those in flight keep
  // theirs. Does not block; allocates only when more launches are in flight than ever before. OUT_OF_RANGE: no such
  // node. INVALID_ARGUMENT: it is not a kernel queued through Launch, or its name is not kernel.name. UNIMPLEMENTED:
  // the device is CUDA and the kernel has no cuda_launch.
  template <class Params>
  absl::Status SetKernelParams(int node, const Kernel<Params>& kernel, const Params& params) {
    return DoSetKernelParams(node, CallOf(kernel, params));
  }
  // The place of the one node that runs `kernel`, for SetKernelParams. In a graph that the engine captured (see
  // Device::AdoptExec) that node counts as ours from then on. NOT_FOUND: no node does. INVALID_ARGUMENT: several do.
  template <class Params>
  absl::StatusOr<int> FindKernel(const Kernel<Params>& kernel, const Params& params) {
    return DoFindKernel(CallOf(kernel, params));
  }

 protected:
  explicit GraphExec(const Device& device) : device_(device) {}
  // The errors that are the same on every backend.
  static absl::Status CheckCall(int node, const std::vector<GraphNode>& nodes, const KernelCall& call);
  // The one node of ours with the kernel's name.
  static absl::StatusOr<int> FindNamed(const std::vector<GraphNode>& nodes, const KernelCall& call);

 private:
  template <class Params>
  static KernelCall CallOf(const Kernel<Params>& kernel, const Params& params) {
    static_assert(alignof(Params) <= alignof(std::max_align_t));
    using Function = KernelCall::Function;
    KernelCall call;
    call.name = kernel.name;
    call.params = &params;
    call.bytes = sizeof(Params);
    call.host = reinterpret_cast<Function>(kernel.host);
    call.writes = reinterpret_cast<Function>(kernel.writes);
    call.run = [](Function host, const void* bytes) {
      return reinterpret_cast<int (*)(const Params&)>(host)(*static_cast<const Params*>(bytes));
    };
    call.declare = [](Function writes, const void* bytes, WriteList& out) {
      reinterpret_cast<void (*)(const Params&, WriteList&)>(writes)(*static_cast<const Params*>(bytes), out);
    };
    if (kernel.cuda_launch != nullptr) call.cuda = kernel.cuda_launch(params);
    return call;
  }

  friend class GraphRunner;  // which has asked already whether the stream is capturing
  absl::Status Launch(Stream& stream, bool capturing);
  virtual absl::Status DoLaunch(Stream& stream) = 0;
  virtual absl::Status DoSetKernelParams(int node, const KernelCall& call) = 0;
  virtual absl::StatusOr<int> DoFindKernel(const KernelCall& call) = 0;
  const Device& device_;
};

// Runs `body` once; what it queues on `stream`, and on streams that joined, is recorded and not executed. The stream is
// out of capture on return, whatever happened, and usable. Returns the error of `body` if it fails.
// FAILED_PRECONDITION: already capturing; or `body` synchronized, allocated, or left a fork unjoined.
absl::StatusOr<std::unique_ptr<Graph>> Capture(Stream& stream, absl::FunctionRef<absl::Status(Stream&)> body);

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_GRAPH_H_
