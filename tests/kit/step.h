// The steps that the kit runs: which lengths in which bucket, and their page tables.
#ifndef PRISTINE_TESTS_KIT_STEP_H_
#define PRISTINE_TESTS_KIT_STEP_H_

#include <cstdint>
#include <vector>

#include "pristine/attention/step_metadata.h"
#include "pristine/conformance/attention_conformance.h"

namespace pristine::conformance {

struct KitStep {
  int32_t bucket = 0;
  uint64_t seed = 0;  // of the step's values
  std::vector<int32_t> lengths, indptr, indices, slots, positions;

  int32_t requests() const { return static_cast<int32_t>(lengths.size()); }
  attention::StepValues values() const {
    return {.lengths = lengths, .kv_indptr = indptr, .kv_indices = indices, .slots = slots, .positions = positions};
  }
  // Where position `p` of request `r` lies in the pool.
  int64_t Slot(const AttentionShape& shape, int32_t r, int32_t p) const {
    return int64_t{indices[indptr[r] + p / shape.page_size]} * shape.page_size + p % shape.page_size;
  }
};

// All steps of a check, buckets interleaved: step i is for bucket i % buckets. The first of each bucket is its worst
// case, the second has no requests.
std::vector<KitStep> MakeSteps(const AttentionShape& shape);

}  // namespace pristine::conformance

#endif  // PRISTINE_TESTS_KIT_STEP_H_
