// What prefill kernels exist: one row per compiled variant. The wrapper looks variants up here, tests walk all of them.
#ifndef PRISTINE_ATTENTION_PREFILL_VARIANTS_H_
#define PRISTINE_ATTENTION_PREFILL_VARIANTS_H_

#include <cstdint>
#include <string>

#include "absl/types/span.h"
#include "attention/kernels/paged_prefill.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/kernel.h"

namespace pristine::attention {

struct PrefillVariant {
  DType dtype;     // of q and out
  DType kv_dtype;  // of k and v
  int32_t head_dim;
  int32_t only_capability;  // of the devices that can run it, as Device::compute_capability; 0: any from 80 on
  int32_t shared_bytes;     // as DecodeVariant's
  Kernel<PagedPrefillParams> kernel;
  int (*prepare)();  // sets attributes on the current device; a cudaError_t. Null: nothing to set, or no CUDA
};

absl::Span<const PrefillVariant> PrefillVariants();
// The variant that a device of `capability` (Host: 0) runs: the one made for it, or else the one for all. Null where
// there is none.
const PrefillVariant* FindPrefillVariant(DType dtype, DType kv_dtype, int32_t head_dim, int32_t capability);
// "float32 with float32 KV and head_dim 64, …", for messages.
std::string PrefillVariantNames();

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_PREFILL_VARIANTS_H_
