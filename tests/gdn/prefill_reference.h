// The gated delta rule of one sequence and one value head in double, in two forms that share nothing: token by token,
// and by chunks with an explicit triangular inverse.
#ifndef PRISTINE_TESTS_GDN_PREFILL_REFERENCE_H_
#define PRISTINE_TESTS_GDN_PREFILL_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace pristine::testing {

// q, k, v: [tokens, 128]; g, beta: [tokens]. The state is [V, K], as in a pool.
struct HeadInputs {
  std::vector<double> q, k, v, g, beta;
  double scale = 1;
  size_t tokens() const { return g.size(); }
};

// Both return out [tokens, 128] and advance `state`.
inline std::vector<double> RecurrentReference(const HeadInputs& in, std::vector<double>& state) {
  constexpr size_t kDim = 128;
  std::vector<double> s(kDim * kDim), out(in.tokens() * kDim), read(kDim), u(kDim);  // s is [K, V]: loops run along V
  for (size_t i = 0; i < kDim * kDim; ++i) s[i % kDim * kDim + i / kDim] = state[i];
  for (size_t t = 0; t < in.tokens(); ++t) {
    const double decay = std::exp(in.g[t]);
    double* const o = &out[t * kDim];
    std::fill(read.begin(), read.end(), 0);
    for (size_t j = 0; j < kDim; ++j) {
      const double k = in.k[t * kDim + j];
      for (size_t i = 0; i < kDim; ++i) read[i] += (s[j * kDim + i] *= decay) * k;
    }
    for (size_t i = 0; i < kDim; ++i) u[i] = in.beta[t] * (in.v[t * kDim + i] - read[i]);
    for (size_t j = 0; j < kDim; ++j) {
      const double k = in.k[t * kDim + j], q = in.scale * in.q[t * kDim + j];
      for (size_t i = 0; i < kDim; ++i) o[i] += (s[j * kDim + i] += u[i] * k) * q;
    }
  }
  for (size_t i = 0; i < kDim * kDim; ++i) state[i] = s[i % kDim * kDim + i / kDim];
  return out;
}

inline std::vector<double> ChunkedReference(const HeadInputs& in, std::vector<double>& state, size_t chunk) {
  constexpr size_t kDim = 128;
  std::vector<double> out(in.tokens() * kDim);
  const auto dot = [](const double* a, const double* b) {
    double sum = 0;
    for (size_t i = 0; i < kDim; ++i) sum += a[i] * b[i];
    return sum;
  };
  for (size_t first = 0; first < in.tokens(); first += chunk) {
    const size_t n = std::min(chunk, in.tokens() - first);
    const double* const q = &in.q[first * kDim];
    const double* const k = &in.k[first * kDim];
    std::vector<double> sums(n);  // G
    double sum = 0;
    for (size_t i = 0; i < n; ++i) sums[i] = sum += in.g[first + i];
    const auto decay = [&](size_t i, size_t j) { return std::exp(sums[i] - sums[j]); };
    // x = T diag(beta) (V - diag(exp G) K S^T), row after row: row i needs the rows above it alone.
    std::vector<double> x(n * kDim);
    for (size_t i = 0; i < n; ++i) {
      for (size_t v = 0; v < kDim; ++v) {
        x[i * kDim + v] = in.beta[first + i] *
                          (in.v[(first + i) * kDim + v] - std::exp(sums[i]) * dot(&state[v * kDim], &k[i * kDim]));
      }
      for (size_t j = 0; j < i; ++j) {
        const double a = in.beta[first + i] * decay(i, j) * dot(&k[i * kDim], &k[j * kDim]);
        for (size_t v = 0; v < kDim; ++v) x[i * kDim + v] -= a * x[j * kDim + v];
      }
    }
    for (size_t i = 0; i < n; ++i) {
      double* const o = &out[(first + i) * kDim];
      for (size_t v = 0; v < kDim; ++v) o[v] = std::exp(sums[i]) * dot(&state[v * kDim], &q[i * kDim]);
      for (size_t j = 0; j <= i; ++j) {
        const double p = decay(i, j) * dot(&q[i * kDim], &k[j * kDim]);
        for (size_t v = 0; v < kDim; ++v) o[v] += p * x[j * kDim + v];
      }
      for (size_t v = 0; v < kDim; ++v) o[v] *= in.scale;
    }
    for (size_t v = 0; v < kDim; ++v) {
      for (size_t j = 0; j < kDim; ++j) state[v * kDim + j] *= std::exp(sums[n - 1]);
      for (size_t i = 0; i < n; ++i) {
        const double weight = decay(n - 1, i) * x[i * kDim + v];
        for (size_t j = 0; j < kDim; ++j) state[v * kDim + j] += weight * k[i * kDim + j];
      }
    }
  }
  return out;
}

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_GDN_PREFILL_REFERENCE_H_
