// The oracle: the definition in double, one row and head at a time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/kernels/merge.h"
#include "pristine/buffers/violation.h"

namespace pristine::attention {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
struct State {
  const T* v;
  double lse;
};

// Appends the state of (row, head) unless it is empty: what lies in its v is then never looked at.
template <class T>
void Collect(const MergeInput& input, int64_t row, int32_t head, int32_t head_dim, int32_t which,
             const ReportRing& reports, std::vector<State<T>>& states) {
  const float lse = input.lse[row * input.lse_stride + head * input.lse_head_stride];
  if (lse == -kInfinity) return;
  if (lse == kInfinity) {
    Report(reports, static_cast<int32_t>(Violation::Kind::kInfiniteLse), -1, row, which, head);
    return;
  }
  const T* const v = static_cast<const T*>(input.v) + row * input.v_stride + int64_t{head} * head_dim;
  states.push_back({v, lse});
}

template <class T>
void Write(const std::vector<State<T>>& states, const MergeOutput& out, int64_t row, int32_t head,
           std::vector<double>& sum) {
  double top = -kInfinity, mass = 0;
  for (const State<T>& state : states) top = std::fmax(top, state.lse);
  std::fill(sum.begin(), sum.end(), 0.0);
  for (const State<T>& state : states) {
    const double weight = std::exp2(state.lse - top);
    mass += weight;
    for (size_t d = 0; d < sum.size(); ++d) sum[d] += weight * ToFloat(state.v[d]);
  }
  // All of the row's values were read: `out` may be where they lie.
  T* const v = static_cast<T*>(out.v) + row * out.v_stride + head * static_cast<int64_t>(sum.size());
  for (size_t d = 0; d < sum.size(); ++d) {
    v[d] = FromFloat<T>(states.empty() ? 0.0f : static_cast<float>(sum[d] / mass));
  }
  if (out.lse == nullptr) return;
  out.lse[row * out.lse_stride + head * out.lse_head_stride] =
      states.empty() ? -kInfinity : static_cast<float>(top + std::log2(mass));
}

}  // namespace

template <class T>
int MergePairHost(const MergePairParams& p) {
  std::vector<State<T>> states;
  std::vector<double> sum(p.head_dim);
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.mask != nullptr && p.mask[row] == 0) continue;
    for (int32_t head = 0; head < p.heads; ++head) {
      states.clear();
      Collect(p.a, row, head, p.head_dim, 0, p.reports, states);
      Collect(p.b, row, head, p.head_dim, 1, p.reports, states);
      Write(states, p.out, row, head, sum);
    }
  }
  return 0;
}

template <class T>
int MergeSetsHost(const MergeSetsParams& p) {
  std::vector<State<T>> states;
  std::vector<double> sum(p.head_dim);
  for (int64_t row = 0; row < p.rows; ++row) {
    int64_t begin = row * p.states_per_row, end = begin + p.states_per_row;
    if (p.indptr != nullptr) {
      begin = std::clamp<int64_t>(p.indptr[row], 0, p.num_states);
      end = std::clamp<int64_t>(p.indptr[row + 1], 0, p.num_states);
    }
    for (int32_t head = 0; head < p.heads; ++head) {
      states.clear();
      for (int64_t i = begin; i < end; ++i) Collect(p.states, i, head, p.head_dim, 0, p.reports, states);
      Write(states, p.out, row, head, sum);
    }
  }
  return 0;
}

int ConvertLseHost(const ConvertLseParams& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    const float lse = p.from[i];
    const bool empty = lse == -kInfinity || lse == p.empty_from;
    p.to[i] = empty ? p.empty_to : static_cast<float>(double{lse} * p.factor);
  }
  return 0;
}

template int MergePairHost<float>(const MergePairParams&);
template int MergePairHost<Float16>(const MergePairParams&);
template int MergePairHost<BFloat16>(const MergePairParams&);
template int MergeSetsHost<float>(const MergeSetsParams&);
template int MergeSetsHost<Float16>(const MergeSetsParams&);
template int MergeSetsHost<BFloat16>(const MergeSetsParams&);

}  // namespace pristine::attention
