// Gates: the decay and the step size of the gated delta rule, per token and value head.
//   g = -exp(A_log) * softplus(a + dt_bias)      log of the decay, at most 0; softplus(x) = x above 20
//   beta = sigmoid(b)
// As in FLA (fla/ops/gated_delta_rule/gate.py); nothing is rounded before it is stored.
#ifndef PRISTINE_ATTENTION_GDN_GATES_H_
#define PRISTINE_ATTENTION_GDN_GATES_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention::gdn {

// Rows of one tensor: row t starts `stride` elements after row t - 1; within a row elements follow each other.
struct Rows {
  DeviceSpan<const std::byte> data = {};
  int64_t stride = 0;  // 0: as many as the row has elements; else at least so many, and at most 2^31
};

struct GateInputs {
  DType dtype = DType::kBFloat16;  // of a and b
  int32_t v_heads = 0;
  Rows a = {};                           // [tokens, v_heads]
  Rows b = {};                           // [tokens, v_heads]
  DeviceSpan<const float> a_log = {};    // [v_heads]
  DeviceSpan<const float> dt_bias = {};  // [v_heads]
};

// Queues one kernel over the first `tokens` rows (none: 0); captureable. g and beta: [tokens, v_heads], float32. As all
// ops of this folder it does not block or allocate, is safe from several threads on streams of their own, and uses
// memory that must stay valid until the kernel, or the last replay, has run. INVALID_ARGUMENT: `tokens` below 0,
// v_heads below 1, a tensor too small, null or misaligned, a stride below v_heads or above 2^31. UNIMPLEMENTED: a dtype
// other than float32 and bfloat16.
absl::Status Gates(Stream& stream, int32_t tokens, const GateInputs& inputs, DeviceSpan<float> g,
                   DeviceSpan<float> beta);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_GATES_H_
