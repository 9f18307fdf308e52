#include "tests/support/gdn_truth.h"

#include <cmath>
#include <cstddef>

namespace pristine::testing {

void GdnStep(const GdnToken& token, std::vector<double>& state, double* out) {
  constexpr size_t kDim = kGdnDim;
  double q_sum = 1e-6, k_sum = 1e-6;
  for (size_t i = 0; i < kDim; ++i) {
    q_sum += token.q[i] * token.q[i];
    k_sum += token.k[i] * token.k[i];
  }
  const double q_scale = 1 / std::sqrt(q_sum * kDim), k_scale = 1 / std::sqrt(k_sum);
  const double x = token.a + token.dt_bias;
  const double decay = std::exp(-std::exp(token.a_log) * (x > 20 ? x : std::log1p(std::exp(x))));
  const double beta = 1 / (1 + std::exp(-token.b));
  for (size_t v = 0; v < kDim; ++v) {
    double* const row = &state[v * kDim];
    double read = 0, result = 0;
    for (size_t k = 0; k < kDim; ++k) read += (row[k] *= decay) * token.k[k] * k_scale;
    const double update = beta * (token.v[v] - read) * k_scale;
    for (size_t k = 0; k < kDim; ++k) result += (row[k] += update * token.k[k]) * token.q[k];
    out[v] = result * q_scale;
  }
}

}  // namespace pristine::testing
