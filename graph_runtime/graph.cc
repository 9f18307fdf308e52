#include "pristine/graph_runtime/graph.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {
namespace {

// Nodes so that each comes after all that it depends on. Shorter than `n` if there is a cycle.
std::vector<int> TopologicalOrder(int n, const std::vector<std::vector<int>>& successors) {
  std::vector<int> missing(n, 0);
  for (const std::vector<int>& list : successors) {
    for (const int to : list) ++missing[to];
  }
  std::vector<int> order;
  order.reserve(n);
  for (int i = 0; i < n; ++i) {
    if (missing[i] == 0) order.push_back(i);
  }
  for (size_t next = 0; next < order.size(); ++next) {
    for (const int to : successors[order[next]]) {
      if (--missing[to] == 0) order.push_back(to);
    }
  }
  return order;
}

// Drops each edge that a longer path implies.
std::vector<GraphEdge> TransitiveReduction(int n, const std::vector<GraphEdge>& edges) {
  std::vector<std::vector<int>> successors(n);
  std::vector<std::vector<int>> predecessors(n);
  for (const GraphEdge& edge : edges) {
    successors[edge.from].push_back(edge.to);
    predecessors[edge.to].push_back(edge.from);
  }
  const std::vector<int> order = TopologicalOrder(n, successors);
  std::vector<int> rank(n, 0);
  for (size_t i = 0; i < order.size(); ++i) rank[order[i]] = static_cast<int>(i);

  std::vector<std::vector<bool>> ancestors(n);  // by rank, as long as the node's own rank
  std::vector<GraphEdge> kept;
  for (const int node : order) {
    std::vector<bool>& mine = ancestors[node];
    mine.assign(rank[node], false);
    std::vector<int>& before = predecessors[node];
    // Latest first: whatever implies an edge comes later than its start.
    std::sort(before.begin(), before.end(), [&](int a, int b) { return rank[a] > rank[b]; });
    for (const int from : before) {
      if (mine[rank[from]]) continue;
      kept.push_back({from, node});
      mine[rank[from]] = true;
      const std::vector<bool>& theirs = ancestors[from];
      for (size_t i = 0; i < theirs.size(); ++i) {
        if (theirs[i]) mine[i] = true;
      }
    }
  }
  return kept;
}

std::string Escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out;
}

// Ends the capture even if the body throws.
class CaptureEnd {
 public:
  explicit CaptureEnd(absl::FunctionRef<void()> abandon) : abandon_(abandon) {}
  ~CaptureEnd() {
    if (armed_) abandon_();
  }
  void Disarm() { armed_ = false; }

 private:
  absl::FunctionRef<void()> abandon_;
  bool armed_ = true;
};

}  // namespace

void Graph::SetNodes(std::vector<GraphNode> nodes, std::vector<GraphEdge> edges) {
  nodes_ = std::move(nodes);
  edges_ = TransitiveReduction(static_cast<int>(nodes_.size()), edges);
  std::sort(edges_.begin(), edges_.end());
}

std::string Graph::ToDot(const std::string& title) const {
  std::string out = absl::StrCat("digraph \"", Escaped(title), "\" {\n  node [shape=box];\n");
  for (size_t i = 0; i < nodes_.size(); ++i) {
    absl::StrAppend(&out, "  n", i, " [label=\"", Escaped(nodes_[i].name), "\"",
                    nodes_[i].foreign ? ", style=dashed" : "", "];\n");
  }
  for (const GraphEdge& edge : edges_) absl::StrAppend(&out, "  n", edge.from, " -> n", edge.to, ";\n");
  return out + "}\n";
}

absl::Status GraphExec::Launch(Stream& stream) { return Launch(stream, stream.capturing()); }

absl::Status GraphExec::Launch(Stream& stream, bool capturing) {
  if (&stream.device() != &device_) {
    return absl::InvalidArgumentError(absl::StrCat("GraphExec::Launch: the stream belongs to ", stream.device().name(),
                                                   ", another device than the graph's, ", device_.name()));
  }
  if (capturing) return absl::FailedPreconditionError("GraphExec::Launch: the stream is capturing");
  return DoLaunch(stream);
}

absl::Status GraphExec::CheckCall(int node, const std::vector<GraphNode>& nodes, const KernelCall& call) {
  if (node < 0 || node >= static_cast<int>(nodes.size())) {
    return absl::OutOfRangeError(
        absl::StrCat("SetKernelParams: node ", node, " of a graph with ", nodes.size(), " nodes"));
  }
  const GraphNode& found = nodes[node];
  if (found.kind != GraphNode::Kind::kKernel || found.foreign || found.name != call.name) {
    return absl::InvalidArgumentError(absl::StrCat("SetKernelParams: node ", node, " is ",
                                                   found.foreign ? "the foreign " : "", found.name, ", not the kernel ",
                                                   call.name));
  }
  return absl::OkStatus();
}

absl::StatusOr<int> GraphExec::FindNamed(const std::vector<GraphNode>& nodes, const KernelCall& call) {
  int found = -1;
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].kind != GraphNode::Kind::kKernel || nodes[i].foreign || nodes[i].name != call.name) continue;
    if (found >= 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("FindKernel: both node ", found, " and node ", i, " are ", call.name));
    }
    found = static_cast<int>(i);
  }
  if (found >= 0) return found;
  return absl::NotFoundError(absl::StrCat("FindKernel: none of the graph's ", nodes.size(), " nodes is ", call.name));
}

absl::StatusOr<std::unique_ptr<Graph>> Capture(Stream& stream, absl::FunctionRef<absl::Status(Stream&)> body) {
  if (stream.capturing()) return absl::FailedPreconditionError("Capture: the stream is capturing already");
  PRISTINE_RETURN_IF_ERROR(stream.DoBeginCapture());
  stream.device().AddCapture(&stream);
  const auto abandon = [&stream] {
    stream.device().RemoveCapture(&stream);
    stream.DoEndCapture(absl::AbortedError("Capture: the body threw")).IgnoreError();
  };
  CaptureEnd end(abandon);
  absl::Status outcome = body(stream);
  end.Disarm();
  stream.device().RemoveCapture(&stream);
  return stream.DoEndCapture(std::move(outcome));
}

}  // namespace pristine
