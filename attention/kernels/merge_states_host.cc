#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/kernels/merge_states.h"
#include "attention/kernels/plan_layout.h"

namespace pristine::attention {
namespace {

// One (row, query token, head): `from` and `to` are places of [.., q_len, q_heads] within items and rows.
template <class T>
void MergeOne(const MergeStatesParams& p, int32_t begin, int32_t end, int64_t from, int64_t to, int32_t head,
              std::vector<double>& sum) {
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  const int64_t item_heads = int64_t{p.q_len} * p.q_heads;
  float top = kMinusInfinity;
  for (int32_t i = begin; i < end; ++i) top = std::max(top, p.partial_lse[i * item_heads + from]);
  double mass = 0;
  if (top != kMinusInfinity && p.sinks != nullptr) {
    const float sink = static_cast<float>(p.sinks[head] / std::log(2.0));
    top = std::max(top, sink);
    mass = std::exp2(double{sink} - top);
  }
  std::fill(sum.begin(), sum.end(), 0.0);
  for (int32_t i = begin; i < end; ++i) {
    const int64_t place = i * item_heads + from;
    if (p.partial_lse[place] == kMinusInfinity) continue;
    const double weight = std::exp2(double{p.partial_lse[place]} - top);
    mass += weight;
    for (int32_t d = 0; d < p.head_dim; ++d) sum[d] += weight * p.partial_out[place * p.head_dim + d];
  }
  T* const out = static_cast<T*>(p.out) + to * p.head_dim;
  for (int32_t d = 0; d < p.head_dim; ++d) {
    out[d] = FromFloat<T>(mass == 0 ? 0.0f : static_cast<float>(sum[d] / mass));
  }
  if (p.lse != nullptr) p.lse[to].value = mass == 0 ? kMinusInfinity : top + static_cast<float>(std::log2(mass));
}

}  // namespace

template <class T>
int MergeStatesHost(const MergeStatesParams& p) {
  const int32_t count = std::clamp(p.plan[kPlanCount], 0, p.max_items);
  std::vector<double> sum(p.head_dim);
  for (int32_t row = 0; row < p.rows; ++row) {
    const int32_t begin = std::clamp(p.plan[kPlanItemIndptr + row], 0, count);
    const int32_t end = std::clamp(p.plan[kPlanItemIndptr + row + 1], 0, count);
    for (int64_t place = 0; place < int64_t{p.q_len} * p.q_heads; ++place) {
      MergeOne<T>(p, begin, end, place, row * int64_t{p.q_len} * p.q_heads + place,
                  static_cast<int32_t>(place % p.q_heads), sum);
    }
  }
  return 0;
}

template int MergeStatesHost<float>(const MergeStatesParams&);
template int MergeStatesHost<BFloat16>(const MergeStatesParams&);
template int MergeStatesHost<Float16>(const MergeStatesParams&);

}  // namespace pristine::attention
