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
  DType dtype;
  int32_t head_dim;
  Kernel<PagedDecodeParams> decode;
  Kernel<MergeStatesParams> merge;
  int32_t shared_bytes;  // dynamic shared memory of a decode block
  int (*prepare)();      // allows shared_bytes on the current device; a cudaError_t. Null without CUDA
};

absl::Span<const DecodeVariant> DecodeVariants();
// Null where there is none.
const DecodeVariant* FindDecodeVariant(DType dtype, int32_t head_dim);
// "float32 64, float32 128, …", for messages.
std::string DecodeVariantNames();

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_VARIANTS_H_
