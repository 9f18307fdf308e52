// Graph and GraphExec of the Host backend: a list of operations, run in the order recorded.
#ifndef PRISTINE_GRAPH_RUNTIME_HOST_HOST_GRAPH_H_
#define PRISTINE_GRAPH_RUNTIME_HOST_HOST_GRAPH_H_

#include <memory>
#include <vector>

#include "graph_runtime/host/op.h"
#include "pristine/graph_runtime/graph.h"

namespace pristine::host {

// See Device::AdoptExec. INVALID_ARGUMENT: not Host's, or `exec` was made from another graph.
absl::StatusOr<std::unique_ptr<GraphExec>> AdoptHostExec(const Device& device, Graph* graph, GraphExec* exec);

std::unique_ptr<Graph> MakeHostGraph(const Device& device, OpList ops, std::vector<GraphEdge> edges);

}  // namespace pristine::host

#endif  // PRISTINE_GRAPH_RUNTIME_HOST_HOST_GRAPH_H_
