// The recurrent form of the gated delta rule, token by token, on the states of a pool: Decode, Verify and Commit.
// Per value head, with S = state [V, K] (Yang et al., "Gated Delta Networks", arXiv:2412.06464, equation 10):
//   S <- exp(g) S                  decay first
//   u  = beta (v - S k)            of the decayed state
//   S <- S + u k^T
//   o  = scale * S q               of the updated state
// q and k are normalised first, x / sqrt(sum(x^2) + 1e-6); g and beta come from a and b (gates.h). All in float32.
#ifndef PRISTINE_ATTENTION_GDN_RECURRENT_H_
#define PRISTINE_ATTENTION_GDN_RECURRENT_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "pristine/attention/gdn/gates.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention::gdn {

// Of `rows` requests with `tokens` tokens each; token t of request r is row r * tokens + t of every tensor. q, k and v
// may be views into one [.., q_dim + k_dim + v_dim] tensor: their strides say so. gates.dtype is that of q, k, v too.
struct RecurrentInputs {
  int32_t qk_heads = 0;  // v_heads is a multiple of it: value head j uses q and k of head j / (v_heads / qk_heads)
  Rows q = {};           // [rows * tokens, qk_heads, K]
  Rows k = {};           // the same shape
  Rows v = {};           // [rows * tokens, v_heads, V]
  GateInputs gates = {};
  DeviceSpan<const int32_t> cache_indices = {};  // [rows] of Slot; see PaddedRows. No slot twice
  float scale = 0.08838834764831845f;            // 1 / sqrt(K)
};

// Each queues one kernel, captureable, whose grid follows from rows, tokens and heads alone. Blocking, threads and
// lifetimes: as Gates; calls that store into the same slots must be ordered. INVALID_ARGUMENT: counts below 1, more
// than 65535 rows or 1024 tokens each, a tensor too small or misaligned, a stride below the row, heads that do not fit
// the pool or each other, a slot_stride that is none (StateView), a scale that is not finite and positive.
// UNIMPLEMENTED: a dtype other than float32 and bfloat16.

// One token each: writes `out` [rows, v_heads, V] and the states, in place.
absl::Status Decode(Stream& stream, int32_t rows, const RecurrentInputs& inputs, const StateView& states,
                    DeviceSpan<std::byte> out);
// A chain of `tokens` draft tokens each: writes `out` [rows * tokens, v_heads, V] and leaves the states as they are.
absl::Status Verify(Stream& stream, int32_t rows, int32_t tokens, const RecurrentInputs& inputs,
                    const StateView& states, DeviceSpan<std::byte> out);
// After Verify with the same inputs: takes the first accepted[r] draft tokens of each request into its state.
// `accepted` [rows] is read on the device and clamped to [0, tokens]; 0 leaves the state as it is.
absl::Status Commit(Stream& stream, int32_t rows, int32_t tokens, const RecurrentInputs& inputs,
                    const StateView& states, DeviceSpan<const int32_t> accepted);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_RECURRENT_H_
