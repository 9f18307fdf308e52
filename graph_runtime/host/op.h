// What a Host stream runs: one kernel, copy or fill. Copyable without allocation, so that queueing never allocates.
#ifndef PRISTINE_GRAPH_RUNTIME_HOST_OP_H_
#define PRISTINE_GRAPH_RUNTIME_HOST_OP_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/kernel.h"

namespace pristine::host {

struct KernelWork {
  std::string name;
  bool foreign = false;
  WriteList writes;
  std::function<int()> run;
};

struct Op {
  GraphNode::Kind kind = GraphNode::Kind::kOther;
  const char* name = "";                     // static storage, or owned by `kernel`
  void* to = nullptr;                        // kCopy, kFill
  const void* from = nullptr;                // kCopy
  size_t bytes = 0;                          // kCopy, kFill
  std::byte value = {};                      // kFill
  std::shared_ptr<const KernelWork> kernel;  // kKernel

  bool foreign() const { return kernel != nullptr && kernel->foreign; }
  absl::Status Run() const;  // the device is lost: it trapped. INTERNAL: it returned something else than 0
};

Op MakeCopy(const char* name, void* to, const void* from, size_t bytes);
Op MakeFill(void* to, std::byte value, size_t bytes);
Op MakeKernel(const char* name, bool foreign, WriteList writes, std::function<int()> run);

// The body of a graph; shared by the Graph, its execs and launches in flight.
using OpList = std::vector<Op>;

// Kernel nodes of a graph that launches run with other params than were recorded.
class ReplacedOps {
 public:
  // Copies the params of `call`. Allocates only for a node, or a size, that is new here.
  void Set(int node, const KernelCall& call);
  // Takes over all that `other` replaces.
  void Assign(const ReplacedOps& other);
  const Op* Find(int node) const;  // null: as recorded

 private:
  struct Replaced {
    int node = 0;
    KernelCall call;                // params: those below
    std::vector<std::byte> params;  // `new` aligns them for every type that SetKernelParams takes
    std::shared_ptr<KernelWork> work;
    Op op;
  };
  std::vector<std::unique_ptr<Replaced>> replaced_;  // few
};

}  // namespace pristine::host

#endif  // PRISTINE_GRAPH_RUNTIME_HOST_OP_H_
