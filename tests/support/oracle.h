// Dense attention in float64 over plain arrays, and the comparison that every attention test uses.
#ifndef PRISTINE_TESTS_SUPPORT_ORACLE_H_
#define PRISTINE_TESTS_SUPPORT_ORACLE_H_

#include <limits>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "pristine/attention/types.h"

namespace pristine::testing {

struct OracleRow {
  std::vector<double> out;  // [head_dim]
  double lse = 0;           // base 2; -inf over no keys
  double top_mass = 0;      // the largest probability: at least 0.5 in needle cases
};

struct OracleScores {
  double scale = 1;
  double soft_cap = 0;  // 0: none
  double sink = -std::numeric_limits<double>::infinity();
};

// One query head, [head_dim], over `keys` and `values`, each [tokens, head_dim].
OracleRow OracleAttention(absl::Span<const double> q, absl::Span<const double> keys, absl::Span<const double> values,
                          const OracleScores& scores);

// The largest relative RMS that counts as equal: 1e-5 for float32, 2e-3 for float16, 8e-3 for bfloat16 and KV in 8
// bits.
double OracleTolerance(attention::DType dtype);

// "" if `out` and `lse` are within the tolerances of `dtype` (LSE 1e-3; a row over no keys must be exactly 0 and -inf);
// what differs, otherwise.
std::string Mismatch(const OracleRow& expected, absl::Span<const float> out, float lse, attention::DType dtype);

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_SUPPORT_ORACLE_H_
