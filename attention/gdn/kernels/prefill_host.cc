#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/gdn/kernels/prefill.h"
#include "attention/kernels/bfloat16.h"
#include "pristine/attention/gdn/state_pool.h"

namespace pristine::attention::gdn {
namespace {

const BFloat16* Row(const void* rows, int64_t stride, int64_t token, int32_t head) {
  return static_cast<const BFloat16*>(rows) + token * stride + int64_t{head} * kHeadDim;
}

bool InPool(const PrefillParams& p, int32_t slot) { return slot >= 0 && slot < p.slots; }

// The recurrent form in double: as far from the chunked kernel as can be.
void Recur(const PrefillParams& p, int32_t begin, int32_t end, int32_t head, std::vector<double>& state) {
  const int32_t qk_head = head / (p.v_heads / p.qk_heads);
  for (int64_t t = begin; t < end; ++t) {
    const BFloat16* const q = Row(p.q, p.q_stride, t, qk_head);
    const BFloat16* const k = Row(p.k, p.k_stride, t, qk_head);
    const BFloat16* const v = Row(p.v, p.v_stride, t, head);
    BFloat16* const out = static_cast<BFloat16*>(p.out) + (t * p.v_heads + head) * kHeadDim;
    double qs[kHeadDim], ks[kHeadDim];
    for (int32_t j = 0; j < kHeadDim; ++j) {
      qs[j] = double{ToFloat(q[j])} * p.scale;
      ks[j] = ToFloat(k[j]);
    }
    const double decay = std::exp(double{p.g[t * p.v_heads + head]}), beta = p.beta[t * p.v_heads + head];
    for (int32_t i = 0; i < kHeadDim; ++i) {
      double* const s = &state[int64_t{i} * kHeadDim];
      double read = 0, result = 0;
      for (int32_t j = 0; j < kHeadDim; ++j) read += (s[j] *= decay) * ks[j];
      const double u = beta * (ToFloat(v[i]) - read);
      for (int32_t j = 0; j < kHeadDim; ++j) result += (s[j] += u * ks[j]) * qs[j];
      out[i] = FromFloat<BFloat16>(static_cast<float>(result));
    }
  }
}

template <class State>
void Sequence(const PrefillParams& p, int32_t sequence) {
  const int32_t begin = std::clamp(p.cu_seqlens[sequence], 0, p.tokens);
  const int32_t end = std::clamp(p.cu_seqlens[sequence + 1], begin, p.tokens);
  int32_t from = p.initial_slots[sequence];
  const int32_t to = p.final_slots[sequence];
  if (!InPool(p, from)) from = p.clamp_to_zero ? 0 : -1;
  State* const states = static_cast<State*>(p.states);
  for (int32_t head = 0; head < p.v_heads; ++head) {
    std::vector<double> state(kStateElements);
    if (from >= 0) {
      const State* const at = states + from * p.slot_stride + head * kStateElements;
      std::transform(at, at + kStateElements, state.begin(), [](State value) { return ToFloat(value); });
    }
    Recur(p, begin, end, head, state);
    if (!InPool(p, to)) continue;
    std::transform(state.begin(), state.end(), states + to * p.slot_stride + head * kStateElements,
                   [](double value) { return FromFloat<State>(static_cast<float>(value)); });
  }
}

void ZeroTail(const PrefillParams& p) {
  const int32_t end = std::clamp(p.cu_seqlens[p.sequences], 0, p.tokens);
  const int64_t row = int64_t{p.v_heads} * kHeadDim;
  std::fill(static_cast<BFloat16*>(p.out) + end * row, static_cast<BFloat16*>(p.out) + p.tokens * row, BFloat16{0});
}

void AllSequences(const PrefillParams& p) {
  for (int32_t i = 0; i < p.sequences; ++i) {
    p.state_dtype == DType::kFloat32 ? Sequence<float>(p, i) : Sequence<BFloat16>(p, i);
  }
}

}  // namespace

int PrefillPrepareHost(const PrefillParams& p) {
  if (Runs(p, 2)) ZeroTail(p);
  return 0;
}

int PrefillStatesHost(const PrefillParams& p) {
  if (Runs(p, 2)) AllSequences(p);
  return 0;
}

int PrefillHost(const PrefillParams& p) {
  if (!Runs(p, 1)) return 0;
  ZeroTail(p);
  AllSequences(p);
  return 0;
}

}  // namespace pristine::attention::gdn
