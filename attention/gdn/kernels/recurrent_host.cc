#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/gdn/kernels/qkv_split.h"
#include "attention/gdn/kernels/recurrent.h"
#include "attention/kernels/bfloat16.h"
#include "pristine/attention/gdn/state_pool.h"

namespace pristine::attention::gdn {
namespace {

template <class T>
std::vector<double> Load(const void* from, int64_t first, int32_t count) {
  std::vector<double> values(count);
  for (int32_t i = 0; i < count; ++i) values[i] = ToFloat(static_cast<const T*>(from)[first + i]);
  return values;
}

void Normalise(std::vector<double>& values, double scale) {
  double sum = kNormEpsilon;
  for (const double value : values) sum += value * value;
  for (double& value : values) value *= scale / std::sqrt(sum);
}

template <class T, class State>
void Row(const RecurrentParams& p, int32_t row, const std::vector<float>& g, const std::vector<float>& beta) {
  const int32_t index = p.cache_indices[row];
  const bool padded = index < 0 || index >= p.slots;
  T* const out = static_cast<T*>(p.out);
  const int64_t out_row = int64_t{p.v_heads} * kHeadDim;
  if (padded && !p.clamp_to_zero) {
    if (out != nullptr) std::fill_n(out + row * p.tokens * out_row, p.tokens * out_row, FromFloat<T>(0));
    return;
  }
  State* const slot = static_cast<State*>(p.states) + (padded ? 0 : index) * p.slot_stride;
  const int32_t tokens = p.lengths == nullptr ? p.tokens : std::clamp(p.lengths[row], 0, p.tokens);
  for (int32_t h = 0; h < p.v_heads; ++h) {
    const int32_t qk = h / (p.v_heads / p.qk_heads);
    std::vector<double> state(kStateElements);
    for (int64_t i = 0; i < kStateElements; ++i) state[i] = ToFloat(slot[h * kStateElements + i]);
    for (int32_t t = 0; t < tokens; ++t) {
      const int64_t token = int64_t{row} * p.tokens + t;
      std::vector<double> q = Load<T>(p.q, token * p.q_stride + qk * kHeadDim, kHeadDim);
      std::vector<double> k = Load<T>(p.k, token * p.k_stride + qk * kHeadDim, kHeadDim);
      const std::vector<double> v = Load<T>(p.v, token * p.v_stride + h * kHeadDim, kHeadDim);
      Normalise(q, p.scale);
      Normalise(k, 1);
      const double decay = std::exp(static_cast<double>(g[token * p.v_heads + h]));
      for (int32_t i = 0; i < kHeadDim; ++i) {
        double* const s = &state[int64_t{i} * kHeadDim];
        double read = 0, result = 0;
        for (int32_t j = 0; j < kHeadDim; ++j) read += (s[j] *= decay) * k[j];
        const double u = beta[token * p.v_heads + h] * (v[i] - read);
        for (int32_t j = 0; j < kHeadDim; ++j) result += (s[j] += u * k[j]) * q[j];
        if (out != nullptr) out[token * out_row + h * kHeadDim + i] = FromFloat<T>(static_cast<float>(result));
      }
    }
    if (!p.store || padded || tokens == 0) continue;
    for (int64_t i = 0; i < kStateElements; ++i) {
      slot[h * kStateElements + i] = FromFloat<State>(static_cast<float>(state[i]));
    }
  }
}

}  // namespace

int RecurrentHost(const RecurrentParams& p) {
  const int64_t tokens = int64_t{p.rows} * p.tokens;
  std::vector<float> g(tokens * p.v_heads), beta(tokens * p.v_heads);
  GatesParams gates = p.gates;
  gates.g = g.data();
  gates.beta = beta.data();
  GatesHost(gates);
  const bool wide = p.gates.dtype == DType::kFloat32, wide_state = p.state_dtype == DType::kFloat32;
  for (int32_t row = 0; row < p.rows; ++row) {
    if (wide && wide_state) Row<float, float>(p, row, g, beta);
    if (wide && !wide_state) Row<float, BFloat16>(p, row, g, beta);
    if (!wide && wide_state) Row<BFloat16, float>(p, row, g, beta);
    if (!wide && !wide_state) Row<BFloat16, BFloat16>(p, row, g, beta);
  }
  return 0;
}

}  // namespace pristine::attention::gdn
