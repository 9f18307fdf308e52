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

}  // namespace pristine::host
