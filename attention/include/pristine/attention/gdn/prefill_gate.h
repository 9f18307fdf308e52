// CheckGdnPrefill: whether a device can run the chunked prefill, asked before anything is allocated or launched, and as
// a function of values: every answer is tested without the GPU it is about.
#ifndef PRISTINE_ATTENTION_GDN_PREFILL_GATE_H_
#define PRISTINE_ATTENTION_GDN_PREFILL_GATE_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "pristine/attention/device_caps.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/attention/types.h"

namespace pristine::attention::gdn {

struct GdnPrefillOptions {
  DType dtype = DType::kBFloat16;  // of q, k, v
  DType state_dtype = DType::kFloat32;
  int32_t k_dim = kHeadDim, v_dim = kHeadDim;  // of a head
  // What the chosen configuration of the kernel needs: its own SharedBytes (tuning.h). 0: not asked about.
  size_t shared_bytes = 0;
};

enum class GdnPrefillPath {
  kHost,  // the Host function, for tests
  kSm90,  // wgmma: compute capability 9.0, and no other; CUDA 12 or newer
};

// The path that serves `options` on a device of `caps`. Each error says what was found, what is needed and what to use
// instead. UNIMPLEMENTED: no kernel for the capability, dtype or head. FAILED_PRECONDITION: the CUDA runtime is older
// than the path for the capability needs: 13.0 for 10.x (sglang PR #22921), 12.0 for 9.0. INVALID_ARGUMENT: more shared
// memory than a block may have.
absl::StatusOr<GdnPrefillPath> CheckGdnPrefill(const DeviceCaps& caps, const GdnPrefillOptions& options);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_PREFILL_GATE_H_
