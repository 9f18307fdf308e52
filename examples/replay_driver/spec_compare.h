// The two comparisons of a replayed step of speculation: *same* (an eager run of the same step, bit for bit) and
// *truth* (float64, from what was drafted and accepted).
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_COMPARE_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_COMPARE_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "examples/replay_driver/compare.h"
#include "examples/replay_driver/kv_pool.h"
#include "examples/replay_driver/spec_inputs.h"
#include "examples/replay_driver/spec_model.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

// What `model` has computed for the step of `inputs`: of the phase's layers, in order, the bucket's tokens. Blocks.
absl::StatusOr<Outputs> ReadOutputs(Stream& stream, const SpecModel& model, const SpecInputs& inputs);

// (token, layer) pairs whose outputs or LSEs differ in any bit, padded tokens included, and padded tokens that are not
// zeros and -inf.
Comparison CompareSame(const SpecModel& model, const SpecInputs& inputs, const Outputs& replayed, const Outputs& eager);

// `rows` of the live (token, layer, head) triples, drawn by (seed, draw) without repeats; all if there are fewer. What
// each token attends is worked out from inputs.rows alone: no table, indptr, length or position of the step is read.
Comparison CompareTruth(const SpecModel& model, const SpecInputs& inputs, const Outputs& replayed, int32_t rows,
                        int64_t draw);

// (slot, layer) pairs that a draft extend should have rolled back, and where `pool` still holds something. Blocks.
absl::StatusOr<Comparison> CompareRolledBack(Stream& stream, const SpecModel& model, const KvPool& pool,
                                             const SpecInputs& inputs);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_COMPARE_H_
