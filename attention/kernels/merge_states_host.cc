#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/kernels/merge_states.h"
#include "attention/kernels/plan_layout.h"

namespace pristine::attention {

template <class T>
int MergeStatesHost(const MergeStatesParams& p) {
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  const int32_t count = std::clamp(p.plan[kPlanCount], 0, p.max_items);
  std::vector<double> sum(p.head_dim);
  for (int32_t row = 0; row < p.rows; ++row) {
    const int32_t begin = std::clamp(p.plan[kPlanItemIndptr + row], 0, count);
    const int32_t end = std::clamp(p.plan[kPlanItemIndptr + row + 1], 0, count);
    for (int32_t head = 0; head < p.q_heads; ++head) {
      float top = kMinusInfinity;
      for (int32_t i = begin; i < end; ++i) top = std::max(top, p.partial_lse[int64_t{i} * p.q_heads + head]);
      double mass = 0;
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int32_t i = begin; i < end; ++i) {
        const int64_t place = int64_t{i} * p.q_heads + head;
        if (p.partial_lse[place] == kMinusInfinity) continue;
        const double weight = std::exp2(double{p.partial_lse[place]} - top);
        mass += weight;
        for (int32_t d = 0; d < p.head_dim; ++d) sum[d] += weight * p.partial_out[place * p.head_dim + d];
      }
      const int64_t place = int64_t{row} * p.q_heads + head;
      T* const out = static_cast<T*>(p.out) + place * p.head_dim;
      for (int32_t d = 0; d < p.head_dim; ++d) {
        out[d] = FromFloat<T>(mass == 0 ? 0.0f : static_cast<float>(sum[d] / mass));
      }
      if (p.lse != nullptr) {
        p.lse[place].value = mass == 0 ? kMinusInfinity : top + static_cast<float>(std::log2(mass));
      }
    }
  }
  return 0;
}

template int MergeStatesHost<float>(const MergeStatesParams&);
template int MergeStatesHost<BFloat16>(const MergeStatesParams&);

}  // namespace pristine::attention
