#include "graph_runtime/host/host_graph.h"

#include <mutex>
#include <utility>

#include "graph_runtime/host/work_queue.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::host {
namespace {

class HostGraphExec : public GraphExec {
 public:
  HostGraphExec(Device& device, std::shared_ptr<const OpList> ops) : GraphExec(device), ops_(std::move(ops)) {}

 private:
  absl::Status DoUpload(Stream& stream) override { return static_cast<WorkQueue*>(stream.native())->status(); }
  absl::Status DoLaunch(Stream& stream) override {
    auto& queue = *static_cast<WorkQueue*>(stream.native());
    PRISTINE_RETURN_IF_ERROR(queue.status());
    std::lock_guard lock(mutex_);  // streams on two threads may launch the same exec
    Task task;
    task.graph = ops_;
    task.after = last_;
    last_.position = queue.Push(std::move(task));
    last_.queue = queue.shared_from_this();
    return absl::OkStatus();
  }

  const std::shared_ptr<const OpList> ops_;
  std::mutex mutex_;
  Mark last_;  // the launch before, which the next one waits for
};

class HostGraph : public Graph {
 public:
  HostGraph(Device& device, OpList ops, std::vector<GraphEdge> edges)
      : Graph(device), device_(device), ops_(std::make_shared<const OpList>(std::move(ops))) {
    std::vector<GraphNode> nodes;
    nodes.reserve(ops_->size());
    for (const Op& op : *ops_) nodes.push_back({op.kind, op.name, op.foreign(), nullptr});
    SetNodes(std::move(nodes), std::move(edges));
  }

 private:
  absl::StatusOr<std::unique_ptr<GraphExec>> DoInstantiate() const override {
    return std::make_unique<HostGraphExec>(device_, ops_);
  }

  Device& device_;
  const std::shared_ptr<const OpList> ops_;
};

}  // namespace

std::unique_ptr<Graph> MakeHostGraph(Device& device, OpList ops, std::vector<GraphEdge> edges) {
  return std::make_unique<HostGraph>(device, std::move(ops), std::move(edges));
}

}  // namespace pristine::host
