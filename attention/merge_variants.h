// What merges exist: one row per compiled kernel variant. The wrapper looks variants up here, tests walk all of them.
#ifndef PRISTINE_ATTENTION_MERGE_VARIANTS_H_
#define PRISTINE_ATTENTION_MERGE_VARIANTS_H_

#include <cstdint>
#include <string>

#include "absl/types/span.h"
#include "attention/kernels/merge.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/kernel.h"

namespace pristine::attention {

struct MergeVariant {
  DType dtype;
  int32_t head_dim;
  int32_t max_heads_per_block;  // what block_per_token can be launched with
  Kernel<MergePairParams> block_per_token;
  Kernel<MergePairParams> token_head;
  Kernel<MergeSetsParams> sets;
};

absl::Span<const MergeVariant> MergeVariants();
// Null where there is none.
const MergeVariant* FindMergeVariant(DType dtype, int32_t head_dim);
// "float32 with head_dim 64, …", for messages.
std::string MergeVariantNames();

// Which kernel merges two states of `heads` heads: a block per token where a block can have that many threads and there
// are tokens enough to fill a device, the grid over tokens and heads otherwise. A function of the shape alone, so a
// capture and its warm-ups choose alike. (sglang PR #23993: a launch of 65 heads of 128 in 16 bits is refused by the
// driver, and inside a capture ends the capture.)
enum class MergeForm { kBlockPerToken, kTokenHead };
constexpr int32_t kMergeFewRows = 128;  // one row of 64 heads takes 1.6 us as eight blocks, 1.9 as one
constexpr int32_t MaxHeadsPerBlock(DType dtype, int32_t head_dim) {
  return kMergeMaxThreads / MergeLanes(static_cast<int32_t>(SizeOf(dtype)), head_dim);
}
constexpr MergeForm ChooseMergeForm(DType dtype, int32_t head_dim, int32_t heads, int32_t rows) {
  if (heads > MaxHeadsPerBlock(dtype, head_dim) || rows <= kMergeFewRows) return MergeForm::kTokenHead;
  return MergeForm::kBlockPerToken;
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_MERGE_VARIANTS_H_
