// The two comparisons of a replayed step: *same* (an eager run of the same step, bit for bit) and *truth* (float64).
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_COMPARE_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_COMPARE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "examples/replay_driver/decode_model.h"
#include "examples/replay_driver/step_inputs.h"

namespace pristine::replay_driver {

// All layers' results of one step, on the host.
struct Outputs {
  std::vector<std::vector<std::byte>> out;  // per layer, [bucket, heads, head_dim]
  std::vector<std::vector<float>> lse;      // per layer, [bucket, heads], base 2
};

// Blocks.
absl::StatusOr<Outputs> ReadOutputs(Stream& stream, const DecodeModel& model, const Extent& bucket);

struct Comparison {
  int64_t rows = 0;        // compared
  int64_t mismatches = 0;  // of them
  double max_rel_rms = 0;  // infinity: a result was not finite
  std::string first;       // the first mismatch in words
};

// (request row, layer) pairs whose outputs or LSEs differ in any bit, padded rows included, and padded rows that are
// not zeros and -inf.
Comparison CompareSame(const ModelConfig& config, const StepInputs& inputs, const Outputs& replayed,
                       const Outputs& eager);

// `rows` of the live (request, layer, head) triples, drawn by (seed, draw) without repeats; all if there are fewer.
Comparison CompareTruth(const ModelConfig& config, const StepInputs& inputs, const Outputs& replayed, int32_t rows,
                        int64_t draw);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_COMPARE_H_
