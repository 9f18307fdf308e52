#include "tests/support/oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"

namespace pristine::testing {

OracleRow OracleAttention(absl::Span<const double> q, absl::Span<const double> keys, absl::Span<const double> values,
                          const OracleScores& scores) {
  const size_t head_dim = q.size();
  const size_t tokens = keys.size() / head_dim;
  OracleRow row = {.out = std::vector<double>(head_dim, 0.0), .lse = -std::numeric_limits<double>::infinity()};
  if (tokens == 0) return row;
  std::vector<double> weights(tokens);
  for (size_t t = 0; t < tokens; ++t) {
    double score = 0;
    for (size_t d = 0; d < head_dim; ++d) score += q[d] * keys[t * head_dim + d];
    weights[t] = score * scores.scale;
    if (scores.soft_cap > 0) weights[t] = scores.soft_cap * std::tanh(weights[t] / scores.soft_cap);
  }
  const double top = std::max(scores.sink, *std::max_element(weights.begin(), weights.end()));
  double mass = std::exp(scores.sink - top);
  for (double& weight : weights) {
    weight = std::exp(weight - top);
    mass += weight;
  }
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t d = 0; d < head_dim; ++d) row.out[d] += weights[t] * values[t * head_dim + d];
  }
  for (double& value : row.out) value /= mass;
  row.lse = (top + std::log(mass)) / std::log(2.0);
  row.top_mass = *std::max_element(weights.begin(), weights.end()) / mass;
  return row;
}

double OracleTolerance(attention::DType dtype) {
  if (dtype == attention::DType::kFloat32) return 1e-5;
  return dtype == attention::DType::kFloat16 ? 2e-3 : 8e-3;
}

std::string Mismatch(const OracleRow& expected, absl::Span<const float> out, float lse, attention::DType dtype) {
  if (std::isinf(expected.lse)) {
    const bool zeros = std::all_of(out.begin(), out.end(), [](float x) { return x == 0; });
    if (zeros && std::isinf(lse) && lse < 0) return "";
    return absl::StrCat("a row over no keys has ", zeros ? "zeros" : "values", " and LSE ", lse);
  }
  double error = 0, norm = 0;
  for (size_t d = 0; d < out.size(); ++d) {
    error += (out[d] - expected.out[d]) * (out[d] - expected.out[d]);
    norm += expected.out[d] * expected.out[d];
  }
  const double relative = std::sqrt(error / norm);
  const double tolerance = OracleTolerance(dtype);
  // Written so that NaN does not pass.
  if (!(relative <= tolerance)) return absl::StrCat("relative RMS ", relative, " > ", tolerance);
  if (!(std::abs(lse - expected.lse) <= 1e-3)) return absl::StrCat("LSE ", lse, ", expected ", expected.lse);
  return "";
}

}  // namespace pristine::testing
