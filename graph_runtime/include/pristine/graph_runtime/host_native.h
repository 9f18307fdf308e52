// The Host backend's counterpart of the raw CUDA stream API: what an engine does behind our back. For tests and
// examples of foreign work and of engine-owned captures; `native` is Stream::native() of a Host stream.
#ifndef PRISTINE_GRAPH_RUNTIME_HOST_NATIVE_H_
#define PRISTINE_GRAPH_RUNTIME_HOST_NATIVE_H_

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/graph_runtime/graph.h"

namespace pristine::host {

// Queues (or records, as a foreign node) work that Pristine knows nothing of. A non-zero result fails the stream.
absl::Status EnqueueForeign(void* native, const char* name, std::function<int()> work);
// cudaStreamBeginCapture and cudaStreamEndCapture. The graph is launched through GraphExec.
absl::Status BeginCapture(void* native);
absl::StatusOr<std::unique_ptr<Graph>> EndCapture(void* native);

}  // namespace pristine::host

#endif  // PRISTINE_GRAPH_RUNTIME_HOST_NATIVE_H_
