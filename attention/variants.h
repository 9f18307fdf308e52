// What exists: one row per compiled kernel variant. Wrappers look variants up here, tests walk all of them.
#ifndef PRISTINE_ATTENTION_VARIANTS_H_
#define PRISTINE_ATTENTION_VARIANTS_H_

#include <cstdint>
#include <string>

#include "absl/types/span.h"
#include "attention/kernels/merge_states.h"
#include "attention/kernels/paged_decode.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/kernel.h"

namespace pristine::attention {

struct DecodeVariant {
  DType dtype, kv_dtype;
  int32_t head_dim;
  Kernel<PagedDecodeParams> decode;  // of one query token per row
  Kernel<PagedDecodeParams> verify;  // of several: the same code under its own name, for graphs and reports
  Kernel<MergeStatesParams> merge;
  // The blocks per multiprocessor that rows are cut up over without a plan; 0: the kernel gives each row a block, and
  // takes no scratch.
  int32_t blocks_per_multiprocessor;
  int32_t shared_bytes;  // that a block of the device must be able to have, beyond what every device has; 0: none
  // Allows the kernels their shared memory on the current device, and says whether they may be launched over a
  // programmatic edge there; a cudaError_t. Null without CUDA.
  int (*prepare)(bool* begins_early);
};

absl::Span<const DecodeVariant> DecodeVariants();
// Null where there is none.
const DecodeVariant* FindDecodeVariant(DType dtype, DType kv_dtype, int32_t head_dim);
// "float32 with head_dim 64, bfloat16 over float8_e4m3 with head_dim 64, …", for messages.
std::string DecodeVariantNames();

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_VARIANTS_H_
