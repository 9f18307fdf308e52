// The two comparisons of a replayed step: *same* (an eager run of the same step, bit for bit) and *truth* (float64).
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_COMPARE_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_COMPARE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "examples/replay_driver/decode_model.h"
#include "examples/replay_driver/step_inputs.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

// All layers' results of one step, on the host.
struct Outputs {
  std::vector<std::vector<std::byte>> out;  // per layer, [bucket, heads, head_dim]
  std::vector<std::vector<float>> lse;      // per layer, [bucket, heads], base 2
};

// The way of a step's outputs to the host: pinned memory, so that the stream's copies never hold up the caller.
class OutputCopy {
 public:
  // `device` must outlive it. RESOURCE_EXHAUSTED: no memory.
  static absl::StatusOr<OutputCopy> Create(Device& device, const ModelConfig& config);
  static int64_t Bytes(const ModelConfig& config);

  // Queues the copies of what `model` has computed for `bucket` by then.
  absl::Status Queue(Stream& stream, const DecodeModel& model, const Extent& bucket);
  // What the last Queue copied; call it once that has run.
  Outputs Read() const;

 private:
  struct Layer {
    absl::Span<std::byte> out;
    absl::Span<float> lse;
  };
  // In the pinned memory, as much as the last bucket needs.
  Layer PlaceOf(int32_t layer) const;

  PinnedBuffer memory_;
  ModelConfig config_;
  Extent bucket_;
};

// Element `index` of what a layer of `config` put out.
double OutputElement(const ModelConfig& config, const std::vector<std::byte>& out, size_t index);

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
