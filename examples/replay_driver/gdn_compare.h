// The two comparisons of compare.h for the gated delta net layers.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_COMPARE_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_COMPARE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "examples/replay_driver/compare.h"
#include "examples/replay_driver/model_config.h"
#include "pristine/graph_runtime/extent.h"

namespace pristine::replay_driver {

// Adds (token, layer) pairs whose outputs differ in any bit, padded tokens that are not zeros, and (slot, layer) pairs
// whose states do.
void CompareGdnSame(const ModelConfig& config, const Extent& bucket, const Extent& extent, const Outputs& replayed,
                    const Outputs& eager, Comparison& comparison);

// The token of one row of a step: the last of `length` of a request, of which the last drafts.size() are what `drafts`
// says (TokenSeed).
struct GdnQuery {
  int32_t request = 0, length = 0;
  std::vector<int32_t> drafts = {};
};
// Adds `rows` of the (query, layer, value head) triples, drawn as CompareTruth draws. Query i is row i.
void CompareGdnTruth(const ModelConfig& config, absl::Span<const GdnQuery> queries, const Outputs& replayed,
                     int32_t rows, int64_t draw, Comparison& comparison);

// What value head `head` puts out for the token of `query`, in double and from the definition: the inputs of all its
// tokens come from the hash, no state or slot is looked at. From the last token back: with
//   S_t = a_t S_(t-1) (I - b_t k_t k_t^T) + b_t v_t k_t^T
// S_t w = a_t S_(t-1) (w - b_t (k_t.w) k_t) + b_t (k_t.w) v_t, so that a vector goes back through the tokens instead of
// a state going forward.
struct GdnTruth {
  std::vector<double> out;  // [V]
  // |out| as it would be if all k were of random directions: what the device's rounding is to be measured by where the
  // query is nearly orthogonal to what the state holds, and little is left of `out`.
  double typical_norm = 0;
};
GdnTruth TrueGdn(const ModelConfig& config, const GdnQuery& query, int32_t layer, int32_t head);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_COMPARE_H_
