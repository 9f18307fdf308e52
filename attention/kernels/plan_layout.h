// How a DecodePlan workspace lies in memory: int32 [count][item_indptr: rows + 1][items: {row, begin, end} *
// max_items]. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_PLAN_LAYOUT_H_
#define PRISTINE_ATTENTION_KERNELS_PLAN_LAYOUT_H_

#include <cstdint>

#include "attention/kernels/host_device.h"

namespace pristine::attention {

constexpr int64_t kPlanCount = 0;
constexpr int64_t kPlanItemIndptr = 1;
PRISTINE_HOST_DEVICE constexpr int64_t PlanItemsAt(int32_t rows) { return int64_t{rows} + 2; }
PRISTINE_HOST_DEVICE constexpr int64_t PlanWords(int32_t rows, int32_t max_items) {
  return PlanItemsAt(rows) + int64_t{3} * max_items;
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PLAN_LAYOUT_H_
