// Truth: what attention over the replay driver's made-up model must give, in float64, from the definition alone. Reads
// no pool, page table, indptr, plan or manager: K, V and Q come from the hash, the sparse selection from its
// definition.
#ifndef PRISTINE_TESTS_SUPPORT_TRUTH_H_
#define PRISTINE_TESTS_SUPPORT_TRUTH_H_

#include <cstdint>
#include <vector>

#include "pristine/attention/types.h"

namespace pristine::testing {

struct TruthModel {
  uint64_t seed = 0;
  int32_t heads = 0, kv_heads = 0, head_dim = 0;
  attention::DType dtype = attention::DType::kFloat32;
  int32_t groups = 1, block = 0, topk = 0, dense_len = 0;  // of sparse layers
  int32_t window = 0;                                      // of sliding window layers
};

struct TruthRow {
  std::vector<double> out;  // [head_dim]
  double lse = 0;           // base 2
};

enum class TruthLayer { kSparse, kWindow, kFull };

// One query head of one request with `length` tokens, whose last one asks. The last drafts.size() of them are what
// `drafts` says (TokenSeed in kv_hash.h), those before are the request's own.
TruthRow DenseAttention(const TruthModel& model, TruthLayer kind, int32_t request, int32_t layer, int32_t length,
                        int32_t head, const std::vector<int32_t>& drafts = {});

// sqrt(sum (actual - expected)^2 / sum expected^2); NaN if an actual value is.
double RelativeRms(const std::vector<double>& expected, const std::vector<double>& actual);

// The largest relative RMS that counts as equal, and the largest difference of an LSE.
double RmsTolerance(attention::DType dtype);
constexpr double kLseTolerance = 1e-3;

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_SUPPORT_TRUTH_H_
