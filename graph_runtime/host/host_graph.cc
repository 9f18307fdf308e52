#include "graph_runtime/host/host_graph.h"

#include <mutex>
#include <utility>

#include "graph_runtime/host/work_queue.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::host {
namespace {

class HostGraph;

class HostGraphExec : public GraphExec {
 public:
  bool IsMadeFrom(const HostGraph& graph) const;
  HostGraphExec(const Device& device, std::shared_ptr<const OpList> ops, std::vector<GraphNode> nodes)
      : GraphExec(device), ops_(std::move(ops)), nodes_(std::move(nodes)) {}

 private:
  friend class AdoptedHostExec;
  absl::Status DoLaunch(Stream& stream) override {
    auto& queue = *static_cast<WorkQueue*>(stream.native());
    PRISTINE_RETURN_IF_ERROR(queue.status());
    std::lock_guard lock(mutex_);  // streams on two threads may launch the same exec
    Task task;
    task.graph = ops_;
    if (current_ >= 0) task.replaced = versions_[current_].ops;
    task.after = last_;
    last_.position = queue.Push(std::move(task));
    last_.queue = queue.shared_from_this();
    if (current_ >= 0) versions_[current_].last = last_;
    return absl::OkStatus();
  }

  absl::StatusOr<int> DoFindKernel(const KernelCall& call) override { return FindNamed(nodes_, call); }

  // A launch in flight keeps the version that it was queued with; one whose last launch is done is used again.
  absl::Status DoSetKernelParams(int node, const KernelCall& call) override {
    PRISTINE_RETURN_IF_ERROR(CheckCall(node, nodes_, call));
    std::lock_guard lock(mutex_);
    if (current_ < 0 || !versions_[current_].Idle()) {
      size_t free = 0;
      while (free < versions_.size() && !versions_[free].Idle()) ++free;
      if (free == versions_.size()) versions_.push_back({std::make_shared<ReplacedOps>(), {}});
      if (current_ >= 0) versions_[free].ops->Assign(*versions_[current_].ops);
      current_ = static_cast<int>(free);
    }
    versions_[current_].ops->Set(node, call);
    return absl::OkStatus();
  }

  struct Version {
    std::shared_ptr<ReplacedOps> ops;
    Mark last;  // the end of the last launch with it
    bool Idle() const { return last.queue == nullptr || last.queue->Done(last.position); }
  };
  const std::shared_ptr<const OpList> ops_;
  const std::vector<GraphNode> nodes_;
  std::mutex mutex_;
  std::vector<Version> versions_;
  int current_ = -1;  // what the next launch takes; -1: all as recorded
  Mark last_;         // the launch before, which the next one waits for
};

class HostGraph : public Graph {
 public:
  const std::shared_ptr<const OpList>& ops() const { return ops_; }
  HostGraph(const Device& device, OpList ops, std::vector<GraphEdge> edges)
      : device_(device), ops_(std::make_shared<const OpList>(std::move(ops))) {
    std::vector<GraphNode> nodes;
    nodes.reserve(ops_->size());
    for (const Op& op : *ops_) nodes.push_back({op.kind, op.name, op.foreign(), nullptr});
    SetNodes(std::move(nodes), std::move(edges));
  }

 private:
  absl::StatusOr<std::unique_ptr<GraphExec>> DoInstantiate() const override {
    return std::make_unique<HostGraphExec>(device_, ops_, nodes());
  }

  const Device& device_;
  const std::shared_ptr<const OpList> ops_;
};

bool HostGraphExec::IsMadeFrom(const HostGraph& graph) const { return graph.ops() == ops_; }

// An exec of the engine's.
class AdoptedHostExec : public GraphExec {
 public:
  AdoptedHostExec(const Device& device, HostGraphExec& exec) : GraphExec(device), exec_(exec) {}

 private:
  absl::Status DoLaunch(Stream& stream) override { return exec_.DoLaunch(stream); }
  absl::Status DoSetKernelParams(int node, const KernelCall& call) override {
    return exec_.DoSetKernelParams(node, call);
  }
  absl::StatusOr<int> DoFindKernel(const KernelCall& call) override { return exec_.DoFindKernel(call); }

  HostGraphExec& exec_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GraphExec>> AdoptHostExec(const Device& device, Graph* graph, GraphExec* exec) {
  auto* const host_graph = dynamic_cast<HostGraph*>(graph);
  auto* const host_exec = dynamic_cast<HostGraphExec*>(exec);
  if (host_graph == nullptr || host_exec == nullptr || !host_exec->IsMadeFrom(*host_graph)) {
    return absl::InvalidArgumentError("AdoptExec: the exec was not made from that graph");
  }
  return std::make_unique<AdoptedHostExec>(device, *host_exec);
}

std::unique_ptr<Graph> MakeHostGraph(const Device& device, OpList ops, std::vector<GraphEdge> edges) {
  return std::make_unique<HostGraph>(device, std::move(ops), std::move(edges));
}

}  // namespace pristine::host
