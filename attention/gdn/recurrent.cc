#include "pristine/attention/gdn/recurrent.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "attention/gdn/check.h"
#include "attention/gdn/kernels/recurrent.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention::gdn {
namespace {

void RecurrentWrites(const RecurrentParams& p, WriteList& writes) {
  const size_t tokens = static_cast<size_t>(p.rows) * p.tokens;
  writes.Add(p.out, tokens * p.v_heads * kHeadDim * SizeOf(p.gates.dtype));
  if (!p.store) return;
  const size_t last = static_cast<size_t>(p.slots - 1) * p.slot_stride + p.v_heads * kStateElements;
  writes.Add(p.states, last * SizeOf(p.state_dtype));
}

constexpr Kernel<RecurrentParams> Named(const char* name) {
  return {name, &RecurrentHost, PRISTINE_CUDA(&RecurrentCuda), &RecurrentWrites};
}
constexpr Kernel<RecurrentParams> kDecode = Named("gdn_decode");
constexpr Kernel<RecurrentParams> kVerify = Named("gdn_verify");
constexpr Kernel<RecurrentParams> kCommit = Named("gdn_commit");

// All of the params but out, lengths and store.
absl::Status Check(const char* op, int32_t rows, int32_t tokens, const RecurrentInputs& inputs, const StateView& states,
                   RecurrentParams& params) {
  constexpr int32_t kMaxRows = 65535;  // of a grid's y
  constexpr int32_t kMaxTokens = 1024;
  constexpr int32_t kMaxHeads = 1 << 16;
  const int32_t v_heads = inputs.gates.v_heads;
  if (rows < 1 || rows > kMaxRows || tokens < 1 || tokens > kMaxTokens) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": rows is ", rows, " and tokens ", tokens,
                                                   "; they must be in [1, ", kMaxRows, "] and [1, ", kMaxTokens, "]"));
  }
  if (v_heads < 1 || v_heads > kMaxHeads || inputs.qk_heads < 1 || v_heads % inputs.qk_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": qk_heads is ", inputs.qk_heads, " and v_heads ", v_heads,
                                                   "; v_heads must be a multiple of qk_heads, at most ", kMaxHeads));
  }
  PRISTINE_RETURN_IF_ERROR(CheckStates(op, "states", states, v_heads));
  if (!(inputs.scale > 0) || !std::isfinite(inputs.scale)) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": scale is ", inputs.scale, ", must be finite and greater than 0"));
  }
  const int64_t all = int64_t{rows} * tokens;
  const size_t element = SizeOf(inputs.gates.dtype);
  PRISTINE_RETURN_IF_ERROR(CheckGates(op, inputs.gates, all, params.gates));
  const int64_t qk_width = int64_t{inputs.qk_heads} * kHeadDim;
  PRISTINE_RETURN_IF_ERROR(CheckRows(op, "q", inputs.q, element, all, qk_width, params.q_stride));
  PRISTINE_RETURN_IF_ERROR(CheckRows(op, "k", inputs.k, element, all, qk_width, params.k_stride));
  PRISTINE_RETURN_IF_ERROR(CheckRows(op, "v", inputs.v, element, all, int64_t{v_heads} * kHeadDim, params.v_stride));
  PRISTINE_RETURN_IF_ERROR(CheckTensor(op, "cache_indices", inputs.cache_indices.address(),
                                       inputs.cache_indices.bytes(), sizeof(int32_t), rows, sizeof(int32_t)));
  params.q = inputs.q.data.address();
  params.k = inputs.k.data.address();
  params.v = inputs.v.data.address();
  params.states = states.states.address();
  params.cache_indices = inputs.cache_indices.address();
  params.slot_stride = states.slot_stride;
  params.slots = states.slots;
  params.rows = rows;
  params.tokens = tokens;
  params.qk_heads = inputs.qk_heads;
  params.v_heads = v_heads;
  params.scale = inputs.scale;
  params.state_dtype = states.dtype;
  params.clamp_to_zero = states.padded_rows == PaddedRows::kClampToZero;
  return absl::OkStatus();
}

absl::Status CheckOut(const char* op, const RecurrentParams& params, DeviceSpan<std::byte> out) {
  const size_t element = SizeOf(params.gates.dtype);
  const int64_t need = params.gates.tokens * params.v_heads * kHeadDim;
  return CheckTensor(op, "out", out.address(), out.bytes(), element, need, element);
}

}  // namespace

absl::Status Decode(Stream& stream, int32_t rows, const RecurrentInputs& inputs, const StateView& states,
                    DeviceSpan<std::byte> out) {
  RecurrentParams params = {};
  PRISTINE_RETURN_IF_ERROR(Check(kDecode.name, rows, 1, inputs, states, params));
  PRISTINE_RETURN_IF_ERROR(CheckOut(kDecode.name, params, out));
  params.out = out.address();
  params.store = true;
  return Launch(stream, kDecode, params);
}

absl::Status Verify(Stream& stream, int32_t rows, int32_t tokens, const RecurrentInputs& inputs,
                    const StateView& states, DeviceSpan<std::byte> out) {
  RecurrentParams params = {};
  PRISTINE_RETURN_IF_ERROR(Check(kVerify.name, rows, tokens, inputs, states, params));
  PRISTINE_RETURN_IF_ERROR(CheckOut(kVerify.name, params, out));
  params.out = out.address();
  return Launch(stream, kVerify, params);
}

absl::Status Commit(Stream& stream, int32_t rows, int32_t tokens, const RecurrentInputs& inputs,
                    const StateView& states, DeviceSpan<const int32_t> accepted) {
  RecurrentParams params = {};
  PRISTINE_RETURN_IF_ERROR(Check(kCommit.name, rows, tokens, inputs, states, params));
  PRISTINE_RETURN_IF_ERROR(CheckTensor(kCommit.name, "accepted", accepted.address(), accepted.bytes(), sizeof(int32_t),
                                       rows, sizeof(int32_t)));
  params.lengths = accepted.address();
  params.store = true;
  return Launch(stream, kCommit, params);
}

}  // namespace pristine::attention::gdn
