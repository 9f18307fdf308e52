// The two comparisons of compare.h for the gated delta net layers.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_COMPARE_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_COMPARE_H_

#include <cstdint>
#include <vector>

#include "examples/replay_driver/compare.h"
#include "examples/replay_driver/model_config.h"
#include "examples/replay_driver/step_inputs.h"

namespace pristine::replay_driver {

// Adds (request row, layer) pairs whose outputs differ in any bit, padded rows that are not zeros, and (slot, layer)
// pairs whose states do.
void CompareGdnSame(const ModelConfig& config, const StepInputs& inputs, const Outputs& replayed, const Outputs& eager,
                    Comparison& comparison);

// Adds `rows` of the live (request, layer, value head) triples, drawn as CompareTruth draws.
void CompareGdnTruth(const ModelConfig& config, const StepInputs& inputs, const Outputs& replayed, int32_t rows,
                     int64_t draw, Comparison& comparison);

// What value head `head` puts out for the last of `length` tokens of a request, in double and from the definition: the
// inputs of all its tokens come from the hash, no state or slot is looked at. From the last token back: with
//   S_t = a_t S_(t-1) (I - b_t k_t k_t^T) + b_t v_t k_t^T
// S_t w = a_t S_(t-1) (w - b_t (k_t.w) k_t) + b_t (k_t.w) v_t, so that a vector goes back through the tokens instead of
// a state going forward.
struct GdnTruth {
  std::vector<double> out;  // [V]
  // |out| as it would be if all k were of random directions: what the device's rounding is to be measured by where the
  // query is nearly orthogonal to what the state holds, and little is left of `out`.
  double typical_norm = 0;
};
GdnTruth TrueGdn(const ModelConfig& config, int32_t request, int32_t layer, int32_t length, int32_t head);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_COMPARE_H_
