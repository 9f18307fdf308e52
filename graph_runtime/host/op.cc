#include "graph_runtime/host/op.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "graph_runtime/device_lost.h"

namespace pristine::host {

absl::Status Op::Run() const {
  switch (kind) {
    case GraphNode::Kind::kCopy:
      std::memmove(to, from, bytes);
      return absl::OkStatus();
    case GraphNode::Kind::kFill:
      std::memset(to, std::to_integer<int>(value), bytes);
      return absl::OkStatus();
    case GraphNode::Kind::kKernel: {
      const int result = kernel->run();
      if (result == 0) return absl::OkStatus();
      if (result == kKernelTrap) return DeviceLostError(absl::StrCat("kernel ", name, " trapped"));
      return absl::InternalError(absl::StrCat("kernel ", name, " returned ", result));
    }
    case GraphNode::Kind::kOther:
      break;
  }
  return absl::OkStatus();
}

Op MakeCopy(const char* name, void* to, const void* from, size_t bytes) {
  Op op;
  op.kind = GraphNode::Kind::kCopy;
  op.name = name;
  op.to = to;
  op.from = from;
  op.bytes = bytes;
  return op;
}

Op MakeFill(void* to, std::byte value, size_t bytes) {
  Op op;
  op.kind = GraphNode::Kind::kFill;
  op.name = "fill";
  op.to = to;
  op.bytes = bytes;
  op.value = value;
  return op;
}

Op MakeKernel(const char* name, bool foreign, WriteList writes, std::function<int()> run) {
  auto kernel = std::make_shared<KernelWork>();
  kernel->name = name != nullptr ? name : "";
  kernel->foreign = foreign;
  kernel->writes = std::move(writes);
  kernel->run = std::move(run);
  Op op;
  op.kind = GraphNode::Kind::kKernel;
  op.name = kernel->name.c_str();
  op.kernel = std::move(kernel);
  return op;
}

void ReplacedOps::Set(int node, const KernelCall& call) {
  Replaced* found = nullptr;
  for (const std::unique_ptr<Replaced>& candidate : replaced_) {
    if (candidate->node == node) found = candidate.get();
  }
  if (found == nullptr) {
    replaced_.push_back(std::make_unique<Replaced>());
    found = replaced_.back().get();
    found->node = node;
    found->work = std::make_shared<KernelWork>();
    found->work->name = call.name;
    found->work->run = [found] { return found->call.run(found->call.host, found->call.params); };
    found->op.kind = GraphNode::Kind::kKernel;
    found->op.name = found->work->name.c_str();
    found->op.kernel = found->work;
  }
  const auto* const bytes = static_cast<const std::byte*>(call.params);
  found->params.assign(bytes, bytes + call.bytes);
  found->call = call;
  found->call.params = found->params.data();
  found->work->writes.Clear();
  call.declare(call.writes, found->call.params, found->work->writes);
}

void ReplacedOps::Assign(const ReplacedOps& other) {
  for (const std::unique_ptr<Replaced>& replaced : other.replaced_) Set(replaced->node, replaced->call);
}

const Op* ReplacedOps::Find(int node) const {
  for (const std::unique_ptr<Replaced>& replaced : replaced_) {
    if (replaced->node == node) return &replaced->op;
  }
  return nullptr;
}

}  // namespace pristine::host
