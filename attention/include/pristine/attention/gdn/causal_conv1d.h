// CausalConv1d: the short convolution in front of the gated delta rule, along each request's tokens and for each
// channel by itself:
//   y[t, c] = silu(bias[c] + sum over j = 0..3 of weight[c, j] * x[t - 3 + j, c])      silu(z) = z / (1 + exp(-z))
// What lies before a request's first token comes from its convolution state, the last three inputs of its slot; the
// state then holds the last three inputs again, as they came, bit for bit. Sums, bias and silu are float32; y is
// rounded to `dtype`, and only then normalised, where that is asked for, and rounded again: the same bits as without
// the fusion. A request gets the same bits in one call, in several chunks and token by token.
//
// Four calls: CausalConv1d for prompts, and for decoding the three of recurrent.h: Update, Verify, Commit.
#ifndef PRISTINE_ATTENTION_GDN_CAUSAL_CONV1D_H_
#define PRISTINE_ATTENTION_GDN_CAUSAL_CONV1D_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "pristine/attention/gdn/gates.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention::gdn {

inline constexpr int32_t kConvWidth = 4;

struct ConvInputs {
  // [tokens, dim], dtype and dim those of the states. Must not overlap an output.
  Rows x = {};
  DeviceSpan<const std::byte> weight = {};       // [dim, 4]; weight[c, 3] meets the token itself
  DeviceSpan<const std::byte> bias = {};         // [dim]; empty: none
  DeviceSpan<const int32_t> cache_indices = {};  // [requests] of Slot. No slot twice
};

// Either `out`, or q, k and v, which get the channels in this order: q_dim + k_dim + v_dim is then dim. All contiguous.
// A token of no request, and of a request whose slot is -1 or past the pool, gets zeros everywhere: g = 0 and beta = 0
// leave a state as it is.
struct ConvOutputs {
  DeviceSpan<std::byte> out = {};  // [tokens, dim]
  int32_t q_dim = 0, k_dim = 0, v_dim = 0;
  DeviceSpan<std::byte> q = {};  // [tokens, q_dim]
  DeviceSpan<std::byte> k = {};  // [tokens, k_dim]
  DeviceSpan<std::byte> v = {};  // [tokens, v_dim]
  // y / sqrt(sum(y^2) + 1e-6) over each head of q and k; 0: not. Else 64 or 128, dividing q_dim and k_dim.
  int32_t norm_head_dim = 0;
  // Where g is not empty, the gates too; gates.dtype need not be that of the states.
  GateInputs gates = {};
  DeviceSpan<float> g = {};     // [tokens, v_heads]
  DeviceSpan<float> beta = {};  // [tokens, v_heads]
};

// The prompts of one step, one after the other along the tokens: request r has tokens [cu_seqlens[r],
// cu_seqlens[r + 1]), from 0 on, not falling; padded requests at the end repeat the last value. Read on the device;
// values that break the rule give wrong results for some tokens, and touch nothing outside the tensors.
struct ConvSequences {
  int32_t requests = 0;
  DeviceSpan<const int32_t> cu_seqlens = {};  // [requests + 1]
  // [requests]: 0 takes the request's state as zeros, whatever the slot holds. Empty: all states are read, which is
  // right for slots of a StatePool: they start as zeros.
  DeviceSpan<const int32_t> has_initial_state = {};
};

// Each queues one kernel, captureable, whose grid follows from requests, tokens and dim alone. Blocking, threads and
// lifetimes: as Gates; calls that store into the same slots must be ordered. INVALID_ARGUMENT: counts
// below 1 (`tokens` of CausalConv1d may be 0), a tensor too small or misaligned, a stride below the row, dimensions
// that do not add up, `out` beside q, k or v, a norm_head_dim that is not offered. UNIMPLEMENTED: a dtype other than
// float32 and bfloat16.

// Writes the outputs of `tokens` tokens, and the states of all requests that have tokens.
absl::Status CausalConv1d(Stream& stream, int32_t tokens, const ConvSequences& sequences, const ConvInputs& inputs,
                          const ConvStateView& states, const ConvOutputs& outputs);

// Of `rows` requests with `tokens` tokens each (Update: one); token t of request r is row r * tokens + t of x and of
// the outputs. Update takes the token into the state.
absl::Status CausalConv1dUpdate(Stream& stream, int32_t rows, const ConvInputs& inputs, const ConvStateView& states,
                                const ConvOutputs& outputs);
// Writes the outputs of a chain of draft tokens and leaves the states as they are.
absl::Status CausalConv1dVerify(Stream& stream, int32_t rows, int32_t tokens, const ConvInputs& inputs,
                                const ConvStateView& states, const ConvOutputs& outputs);
// After Verify with the same inputs: takes the first accepted[r] draft tokens of each request into its state.
// `accepted` [rows] is read on the device and clamped to [0, tokens]; 0 leaves the state as it is.
absl::Status CausalConv1dCommit(Stream& stream, int32_t rows, int32_t tokens, const ConvInputs& inputs,
                                const ConvStateView& states, DeviceSpan<const int32_t> accepted);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_CAUSAL_CONV1D_H_
