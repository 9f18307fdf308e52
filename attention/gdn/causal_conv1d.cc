#include "pristine/attention/gdn/causal_conv1d.h"

#include "absl/strings/str_cat.h"
#include "attention/gdn/check.h"
#include "attention/gdn/kernels/causal_conv1d.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention::gdn {
namespace {

void ConvWrites(const CausalConv1dParams& p, WriteList& writes) {
  const size_t tokens = static_cast<size_t>(p.tokens), element = SizeOf(p.dtype);
  for (int i = 0; i < 3; ++i) {
    if (p.out[i] != nullptr) writes.Add(p.out[i], tokens * p.out_dim[i] * element);
  }
  if (p.gates.g != nullptr) {
    writes.Add(p.gates.g, tokens * p.gates.v_heads * sizeof(float));
    writes.Add(p.gates.beta, tokens * p.gates.v_heads * sizeof(float));
  }
  if (!p.store) return;
  const size_t last = static_cast<size_t>(p.slots - 1) * p.slot_stride + size_t{kConvHistory} * p.dim;
  writes.Add(p.states, last * element);
}

constexpr Kernel<CausalConv1dParams> Named(const char* name) {
  return {name, &CausalConv1dHost, PRISTINE_CUDA(&CausalConv1dCuda), &ConvWrites};
}
constexpr Kernel<CausalConv1dParams> kPrompts = Named("gdn_conv");
constexpr Kernel<CausalConv1dParams> kUpdate = Named("gdn_conv_update");
constexpr Kernel<CausalConv1dParams> kVerify = Named("gdn_conv_verify");
constexpr Kernel<CausalConv1dParams> kCommit = Named("gdn_conv_commit");

absl::Status CheckIndices(const char* op, const char* what, DeviceSpan<const int32_t> indices, int64_t need) {
  return CheckTensor(op, what, indices.address(), indices.bytes(), sizeof(int32_t), need, sizeof(int32_t));
}

// Fills what all four ops share. Bounds keep every product below 2^63, and grids within what a device takes.
absl::Status CheckInputs(const char* op, int32_t requests, int64_t tokens, const ConvInputs& inputs,
                         const ConvStateView& states, CausalConv1dParams& params) {
  constexpr int32_t kMaxRequests = 65535;
  constexpr int32_t kMaxDim = 1 << 22;
  constexpr int64_t kMaxStride = int64_t{1} << 31;
  if (requests < 1 || requests > kMaxRequests) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": there are ", requests, " requests; must be in [1, ", kMaxRequests, "]"));
  }
  const int64_t packed = int64_t{kConvHistory} * states.dim;
  if (states.dim < 1 || states.dim > kMaxDim || states.slots < 1 || states.slot_stride < packed ||
      states.slot_stride > kMaxStride) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": the states have ", states.slots, " slots of ", states.dim,
                                                   " channels, ", states.slot_stride,
                                                   " elements apart; there must be slots, channels in [1, ", kMaxDim,
                                                   "], and a distance in [3 * channels, ", kMaxStride, "]"));
  }
  PRISTINE_RETURN_IF_ERROR(CheckDType(op, "states", states.dtype));
  const size_t element = SizeOf(states.dtype);
  const auto tensor = [&](const char* what, const auto& span, int64_t need) {
    return CheckTensor(op, what, span.address(), span.bytes(), element, need, element);
  };
  PRISTINE_RETURN_IF_ERROR(CheckRows(op, "x", inputs.x, element, tokens, states.dim, params.x_stride));
  PRISTINE_RETURN_IF_ERROR(tensor("weight", inputs.weight, int64_t{kConvWidth} * states.dim));
  if (!inputs.bias.empty()) {
    PRISTINE_RETURN_IF_ERROR(tensor("bias", inputs.bias, states.dim));
  }
  PRISTINE_RETURN_IF_ERROR(tensor("states", states.states, (states.slots - 1) * states.slot_stride + packed));
  PRISTINE_RETURN_IF_ERROR(CheckIndices(op, "cache_indices", inputs.cache_indices, requests));
  params.x = inputs.x.data.address();
  params.weight = inputs.weight.address();
  params.bias = inputs.bias.address();
  params.states = states.states.address();
  params.cache_indices = inputs.cache_indices.address();
  params.slot_stride = states.slot_stride;
  params.tokens = tokens;
  params.dim = states.dim;
  params.slots = states.slots;
  params.requests = requests;
  params.dtype = states.dtype;
  return absl::OkStatus();
}

// After CheckInputs.
absl::Status CheckOutputs(const char* op, const ConvOutputs& o, CausalConv1dParams& params) {
  const size_t element = SizeOf(params.dtype);
  const auto segment = [&](int i, const char* what, DeviceSpan<std::byte> span, int32_t dim) {
    params.out[i] = span.address();
    params.out_dim[i] = dim;
    return CheckTensor(op, what, span.address(), span.bytes(), element, params.tokens * dim, element);
  };
  if (!o.out.empty()) {
    if (!o.q.empty() || !o.k.empty() || !o.v.empty() || o.norm_head_dim != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(op, ": out is given beside q, k, v or norm_head_dim; give it alone, or q, k and v"));
    }
    PRISTINE_RETURN_IF_ERROR(segment(0, "out", o.out, params.dim));
  } else {
    if (o.q_dim < 1 || o.k_dim < 1 || o.v_dim < 1 || int64_t{o.q_dim} + o.k_dim + o.v_dim != params.dim) {
      return absl::InvalidArgumentError(absl::StrCat(op, ": q_dim is ", o.q_dim, ", k_dim ", o.k_dim, " and v_dim ",
                                                     o.v_dim, "; all must be at least 1, and together the ", params.dim,
                                                     " channels of the states (or give out)"));
    }
    if (o.norm_head_dim != 0 && ((o.norm_head_dim != 64 && o.norm_head_dim != 128) || o.q_dim % o.norm_head_dim != 0 ||
                                 o.k_dim % o.norm_head_dim != 0)) {
      return absl::InvalidArgumentError(absl::StrCat(op, ": norm_head_dim is ", o.norm_head_dim, " with q_dim ",
                                                     o.q_dim, " and k_dim ", o.k_dim,
                                                     "; it must be 0, 64 or 128 and divide both"));
    }
    PRISTINE_RETURN_IF_ERROR(segment(0, "q", o.q, o.q_dim));
    PRISTINE_RETURN_IF_ERROR(segment(1, "k", o.k, o.k_dim));
    PRISTINE_RETURN_IF_ERROR(segment(2, "v", o.v, o.v_dim));
    params.norm_head_dim = o.norm_head_dim;
  }
  if (o.g.empty()) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(CheckGates(op, o.gates, params.tokens, params.gates));
  const int64_t need = params.tokens * o.gates.v_heads;
  PRISTINE_RETURN_IF_ERROR(CheckTensor(op, "g", o.g.address(), o.g.bytes(), sizeof(float), need, sizeof(float)));
  PRISTINE_RETURN_IF_ERROR(
      CheckTensor(op, "beta", o.beta.address(), o.beta.bytes(), sizeof(float), need, sizeof(float)));
  params.gates.g = o.g.address();
  params.gates.beta = o.beta.address();
  return absl::OkStatus();
}

// Of the three ops that have as many tokens in each request.
absl::Status CheckChain(const char* op, int32_t rows, int32_t tokens, const ConvInputs& inputs,
                        const ConvStateView& states, CausalConv1dParams& params) {
  constexpr int32_t kMaxTokens = 1024;
  if (tokens < 1 || tokens > kMaxTokens) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": tokens is ", tokens, ", must be in [1, ", kMaxTokens, "]"));
  }
  params.row_tokens = tokens;
  return CheckInputs(op, rows, int64_t{rows} * tokens, inputs, states, params);
}

}  // namespace

absl::Status CausalConv1d(Stream& stream, int32_t tokens, const ConvSequences& sequences, const ConvInputs& inputs,
                          const ConvStateView& states, const ConvOutputs& outputs) {
  const char* const op = kPrompts.name;
  constexpr int32_t kMaxTokens = 1 << 30;  // so that a token a few behind the last has a number
  if (tokens < 0 || tokens > kMaxTokens) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": tokens is ", tokens, ", must be in [0, ", kMaxTokens, "]"));
  }
  CausalConv1dParams params = {};
  PRISTINE_RETURN_IF_ERROR(CheckInputs(op, sequences.requests, tokens, inputs, states, params));
  PRISTINE_RETURN_IF_ERROR(CheckIndices(op, "cu_seqlens", sequences.cu_seqlens, int64_t{sequences.requests} + 1));
  if (!sequences.has_initial_state.empty()) {
    PRISTINE_RETURN_IF_ERROR(CheckIndices(op, "has_initial_state", sequences.has_initial_state, sequences.requests));
  }
  if (tokens == 0) return absl::OkStatus();  // without outputs there is nothing to say how they are wanted
  PRISTINE_RETURN_IF_ERROR(CheckOutputs(op, outputs, params));
  params.cu_seqlens = sequences.cu_seqlens.address();
  params.has_initial_state = sequences.has_initial_state.address();
  params.store = true;
  return Launch(stream, kPrompts, params);
}

absl::Status CausalConv1dUpdate(Stream& stream, int32_t rows, const ConvInputs& inputs, const ConvStateView& states,
                                const ConvOutputs& outputs) {
  CausalConv1dParams params = {};
  PRISTINE_RETURN_IF_ERROR(CheckChain(kUpdate.name, rows, 1, inputs, states, params));
  PRISTINE_RETURN_IF_ERROR(CheckOutputs(kUpdate.name, outputs, params));
  params.store = true;
  return Launch(stream, kUpdate, params);
}

absl::Status CausalConv1dVerify(Stream& stream, int32_t rows, int32_t tokens, const ConvInputs& inputs,
                                const ConvStateView& states, const ConvOutputs& outputs) {
  CausalConv1dParams params = {};
  PRISTINE_RETURN_IF_ERROR(CheckChain(kVerify.name, rows, tokens, inputs, states, params));
  PRISTINE_RETURN_IF_ERROR(CheckOutputs(kVerify.name, outputs, params));
  return Launch(stream, kVerify, params);
}

absl::Status CausalConv1dCommit(Stream& stream, int32_t rows, int32_t tokens, const ConvInputs& inputs,
                                const ConvStateView& states, DeviceSpan<const int32_t> accepted) {
  CausalConv1dParams params = {};
  PRISTINE_RETURN_IF_ERROR(CheckChain(kCommit.name, rows, tokens, inputs, states, params));
  PRISTINE_RETURN_IF_ERROR(CheckIndices(kCommit.name, "accepted", accepted, rows));
  params.lengths = accepted.address();
  params.store = true;
  return Launch(stream, kCommit, params);
}

}  // namespace pristine::attention::gdn
