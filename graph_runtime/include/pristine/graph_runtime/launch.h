// Launch: the one switch on the backend.
#ifndef PRISTINE_GRAPH_RUNTIME_LAUNCH_H_
#define PRISTINE_GRAPH_RUNTIME_LAUNCH_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/kernel.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine {

// Queues (or records) `kernel` with a copy of `params`. Does not block. UNIMPLEMENTED: the device is CUDA and the
// kernel was built without it. INTERNAL: the launch was refused; outside a capture that is final for the stream.
template <class Params>
absl::Status Launch(Stream& stream, const Kernel<Params>& kernel, const Params& params) {
  if (stream.device().backend() == Backend::kHost) {
    WriteList writes;
    kernel.writes(params, writes);
    return stream.EnqueueHostKernel(kernel.name, std::move(writes),
                                    [run = kernel.host, params] { return run(params); });
  }
  if (kernel.cuda == nullptr) {
    return absl::UnimplementedError(absl::StrCat(kernel.name, ": built without CUDA"));
  }
  return stream.EnqueueCudaKernel(kernel.name, [&](CUstream_st* native) { return kernel.cuda(native, params); });
}

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_LAUNCH_H_
