// The one place where a CUDA error becomes an absl::Status.
#ifndef PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_STATUS_H_
#define PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include "absl/status/status.h"

namespace pristine {

// OK, or "what: cudaErrorName: text". RESOURCE_EXHAUSTED: no memory. FAILED_PRECONDITION: forbidden while capturing, or
// an event of a capture. INVALID_ARGUMENT: refused for its arguments. A lost device where IsSticky. INTERNAL: all else.
// Takes the error out of the runtime's per-thread "last error", so that it is not blamed on a later launch.
absl::Status CudaStatus(cudaError_t error, const char* what);

// Whether the error stays: the context is dead, and every later call that needs it gives the same. Also for a CUresult,
// which has the same numbers.
bool IsSticky(int error);

// Whether CUDA refused the call because a capture forbids it.
bool IsCaptureError(cudaError_t error);

// Whether the call was refused for what it was given, nothing was queued, and the stream is as good as before.
// Everything else comes from queued work or from the context and is final for the stream.
bool IsRefusal(cudaError_t error);

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_STATUS_H_
