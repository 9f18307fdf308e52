// The same kit for layers that carry a state from step to step, in a slot of a pool per request: linear attention,
// gated delta rules, causal convolutions. The kit knows nothing of them but shapes and a rule in double:
//
//   StateShape shape = {.inputs = {{"x", DType::kFloat32, 64}},
//                       .outputs = {{"y", DType::kFloat32, 64}},
//                       .states = {{"sum", DType::kFloat32, 64}},
//                       .rule = [](const StateRow&, const Values& in, Values& states, Values& out) { … }};
//   MyWrapper wrapper(device, shape);  // a StateWrapper
//   EXPECT_TRUE(Conforms(stream, wrapper, shape));
//
// Each step gives its requests slots of their own, in another order each time; all other slots, slot 0 among them, are
// poison and must stay as they are. Results are the live rows of all outputs and the states in their slots: both must
// be bit-equal run eagerly, captured and replayed, under both poisons, and be what the rule gives. Padded rows of
// outputs are zeros. A warm-up and a capture between two steps must leave every byte of the pools as it is.
#ifndef PRISTINE_CONFORMANCE_STATE_CONFORMANCE_H_
#define PRISTINE_CONFORMANCE_STATE_CONFORMANCE_H_

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "pristine/attention/types.h"
#include "pristine/conformance/report.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::conformance {

// One request of a step.
struct StateRow {
  int32_t slot = 0;
  int32_t tokens = 0;
};
// Of one request: per tensor [tokens, width], per pool [width].
using Values = std::vector<std::vector<double>>;

struct StateShape {
  struct Tensor {
    std::string name;
    attention::DType dtype = attention::DType::kFloat32;
    int32_t width = 0;          // elements of a token; of a slot
    double low = -1, high = 1;  // of the values that it starts with; outputs start with poison
  };
  std::vector<Tensor> inputs, outputs;  // [max_tokens()] rows each
  std::vector<Tensor> states;           // pools: [slots()] rows each
  // What the layer computes: `states` before, and afterwards after all tokens.
  std::function<void(const StateRow& row, const Values& inputs, Values& states, Values& outputs)> rule;
  std::vector<int32_t> buckets = {1, 3, 6};  // requests, ascending
  int32_t tokens = 1;                        // of a request; a bucket has requests * tokens of them
  bool ragged = false;                       // requests have from 0 to `tokens` each
  double tolerance = 1e-4;                   // relative RMS of a row, or of a slot, against the rule
  int32_t steps_in_flight = 2;               // Prepare may be called while this many - 1 earlier steps have not run yet
  uint64_t seed = 1;

  int32_t max_requests() const { return buckets.back(); }
  int32_t max_tokens() const { return max_requests() * tokens; }
  // Slot 0 is reserved, the last belongs to nobody either. One more is mapped, so that a slot just out of range reads
  // poison instead of crashing the test.
  int32_t slots() const { return max_requests() + 3; }
};

// Device memory of all runs: the addresses never change. In the order of StateShape.
struct StateTensors {
  std::vector<DeviceSpan<const std::byte>> inputs;
  std::vector<DeviceSpan<std::byte>> states, outputs;
};

// The real part of one step, during the call only.
struct StateStep {
  absl::Span<const int32_t> slots;      // [requests] in [1, slots() - 1), no two alike
  absl::Span<const int32_t> qo_indptr;  // [requests + 1]: where each request's tokens begin
};

// The wrapper under test, as AttentionWrapper.
class StateWrapper {
 public:
  virtual ~StateWrapper() = default;
  virtual absl::Status Prepare(Stream& stream, int32_t bucket, const StateStep& step) = 0;
  virtual absl::Status Run(Stream& stream, int32_t bucket, const StateTensors& tensors) = 0;
  // What the engine runs before it captures `bucket`, with no step prepared and requests in the middle of their work.
  // With BufferManager: RestoreAll and the kernels. An engine without warm-ups returns OK.
  virtual absl::Status WarmUp(Stream& stream, int32_t bucket, const StateTensors& tensors) = 0;
  virtual std::vector<BoundArray> BoundArrays() { return {}; }
};

// As CheckAttention. INVALID_ARGUMENT: a shape that makes no sense.
absl::StatusOr<Report> CheckState(Stream& stream, StateWrapper& wrapper, const StateShape& shape);

// The GoogleTest layer: EXPECT_TRUE(Conforms(stream, wrapper, shape)).
::testing::AssertionResult Conforms(Stream& stream, StateWrapper& wrapper, const StateShape& shape);

}  // namespace pristine::conformance

#endif  // PRISTINE_CONFORMANCE_STATE_CONFORMANCE_H_
