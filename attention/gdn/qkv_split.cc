#include "pristine/attention/gdn/qkv_split.h"

#include "absl/strings/str_cat.h"
#include "attention/gdn/check.h"
#include "attention/gdn/kernels/qkv_split.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention::gdn {
namespace {

constexpr const char* kName = "gdn_qkv_split";

void QkvSplitWrites(const QkvSplitParams& p, WriteList& writes) {
  for (int i = 0; i < 3; ++i) writes.Add(p.out[i], static_cast<size_t>(p.tokens) * p.dim[i] * SizeOf(p.dtype));
  const size_t gates = static_cast<size_t>(p.tokens) * p.gates.v_heads * sizeof(float);
  writes.Add(p.gates.g, gates);
  writes.Add(p.gates.beta, gates);
}

constexpr Kernel<QkvSplitParams> kQkvSplit = {kName, &QkvSplitHost, PRISTINE_CUDA(&QkvSplitCuda), &QkvSplitWrites};

}  // namespace

absl::Status QkvSplit(Stream& stream, int32_t tokens, const QkvSplitTensors& t) {
  constexpr int64_t kMaxDim = 1 << 22;  // of a grid's y, in tiles
  const int64_t dim = int64_t{t.q_dim} + t.k_dim + t.v_dim;
  if (tokens < 0 || t.q_dim < 1 || t.k_dim < 1 || t.v_dim < 1 || dim > kMaxDim) {
    return absl::InvalidArgumentError(
        absl::StrCat(kName, ": tokens is ", tokens, ", q_dim ", t.q_dim, ", k_dim ", t.k_dim, ", v_dim ", t.v_dim,
                     "; tokens must be at least 0, the others at least 1, their sum at most ", kMaxDim));
  }
  PRISTINE_RETURN_IF_ERROR(CheckDType(kName, "dtype", t.dtype));
  if (t.norm_head_dim != 0 && ((t.norm_head_dim != 64 && t.norm_head_dim != 128) || t.q_dim % t.norm_head_dim != 0 ||
                               t.k_dim % t.norm_head_dim != 0)) {
    return absl::InvalidArgumentError(absl::StrCat(kName, ": norm_head_dim is ", t.norm_head_dim, " with q_dim ",
                                                   t.q_dim, " and k_dim ", t.k_dim,
                                                   "; it must be 0, 64 or 128 and divide both"));
  }
  // Before any product of them.
  constexpr int64_t kMaxStride = int64_t{1} << 31;
  const bool in_range = t.stride_t >= 1 && t.stride_t <= kMaxStride && t.stride_d >= 1 && t.stride_d <= kMaxStride;
  // Strides whose rows overlap cannot come from a real tensor: one of the two steps over the other's whole extent.
  const bool token_major = in_range && t.stride_t > (dim - 1) * t.stride_d;
  const bool channel_major = in_range && t.stride_d > int64_t{tokens - 1} * t.stride_t;
  if (!token_major && !channel_major) {
    return absl::InvalidArgumentError(absl::StrCat(kName, ": strides (", t.stride_t, ", ", t.stride_d, ") of [", tokens,
                                                   ", ", dim, "]; both must be in [1, ", kMaxStride,
                                                   "] and rows must not overlap"));
  }
  const size_t element = SizeOf(t.dtype);
  QkvSplitParams params = {};
  const int64_t mixed = tokens == 0 ? 0 : int64_t{tokens - 1} * t.stride_t + (dim - 1) * t.stride_d + 1;
  PRISTINE_RETURN_IF_ERROR(CheckTensor(kName, "mixed", t.mixed.address(), t.mixed.bytes(), element, mixed, element));
  const struct {
    const char* what;
    DeviceSpan<std::byte> span;
    int32_t dim;
  } outs[] = {{"q", t.q, t.q_dim}, {"k", t.k, t.k_dim}, {"v", t.v, t.v_dim}};
  for (int i = 0; i < 3; ++i) {
    PRISTINE_RETURN_IF_ERROR(CheckTensor(kName, outs[i].what, outs[i].span.address(), outs[i].span.bytes(), element,
                                         int64_t{tokens} * outs[i].dim, element));
    params.out[i] = outs[i].span.address();
    params.dim[i] = outs[i].dim;
  }
  if (!t.g.empty()) {
    PRISTINE_RETURN_IF_ERROR(CheckGates(kName, t.gates, tokens, params.gates));
    const int64_t need = int64_t{tokens} * t.gates.v_heads;
    PRISTINE_RETURN_IF_ERROR(CheckTensor(kName, "g", t.g.address(), t.g.bytes(), sizeof(float), need, sizeof(float)));
    PRISTINE_RETURN_IF_ERROR(
        CheckTensor(kName, "beta", t.beta.address(), t.beta.bytes(), sizeof(float), need, sizeof(float)));
    params.gates.g = t.g.address();
    params.gates.beta = t.beta.address();
  }
  if (tokens == 0) return absl::OkStatus();
  params.mixed = t.mixed.address();
  params.dtype = t.dtype;
  params.stride_t = t.stride_t;
  params.stride_d = t.stride_d;
  params.tokens = tokens;
  params.norm_head_dim = t.norm_head_dim;
  return Launch(stream, kQkvSplit, params);
}

}  // namespace pristine::attention::gdn
