// Graph and GraphExec of the Host backend: a list of operations, run in the order recorded.
#ifndef PRISTINE_GRAPH_RUNTIME_HOST_HOST_GRAPH_H_
#define PRISTINE_GRAPH_RUNTIME_HOST_HOST_GRAPH_H_

#include <memory>
#include <vector>

#include "graph_runtime/host/op.h"
#include "pristine/graph_runtime/graph.h"

namespace pristine::host {

std::unique_ptr<Graph> MakeHostGraph(Device& device, OpList ops, std::vector<GraphEdge> edges);

}  // namespace pristine::host

#endif  // PRISTINE_GRAPH_RUNTIME_HOST_HOST_GRAPH_H_
