// QkvSplit: from what the convolution leaves, [tokens, q_dim + k_dim + v_dim] with any strides, to contiguous q, k and
// v in one launch. Fused on request: the l2 norm of q and k, and the gates.
#ifndef PRISTINE_ATTENTION_GDN_QKV_SPLIT_H_
#define PRISTINE_ATTENTION_GDN_QKV_SPLIT_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "pristine/attention/gdn/gates.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention::gdn {

struct QkvSplitTensors {
  DType dtype = DType::kBFloat16;
  int32_t q_dim = 0, k_dim = 0, v_dim = 0;  // heads * head_dim each; 2^22 together at most (10240 and 12288 are real)
  // Element (t, d) lies at t * stride_t + d * stride_d. A transposed convolution output [dim, tokens] has strides
  // (1, tokens).
  DeviceSpan<const std::byte> mixed = {};
  int64_t stride_t = 0, stride_d = 1;
  DeviceSpan<std::byte> q = {};  // [tokens, q_dim]
  DeviceSpan<std::byte> k = {};  // [tokens, k_dim]
  DeviceSpan<std::byte> v = {};  // [tokens, v_dim]
  // x / sqrt(sum(x^2) + 1e-6) over each head of q and k, summed in float32 and rounded to dtype; 0: bits are copied.
  // Else 64 or 128, dividing q_dim and k_dim.
  int32_t norm_head_dim = 0;
  // Where g is not empty, the gates too; gates.dtype need not be `dtype`.
  GateInputs gates = {};
  DeviceSpan<float> g = {};     // [tokens, v_heads]
  DeviceSpan<float> beta = {};  // [tokens, v_heads]
};

// Queues one kernel over the first `tokens` rows (none: 0); captureable. Outputs must not overlap inputs. Blocking,
// threads and lifetimes: as Gates.
// INVALID_ARGUMENT: `tokens` below 0, a dimension below 1, a tensor too small, null or misaligned, strides that are
// below 1, above 2^31 or put two elements at one place, a norm_head_dim that is not offered. UNIMPLEMENTED: a dtype
// other than float32 and bfloat16.
absl::Status QkvSplit(Stream& stream, int32_t tokens, const QkvSplitTensors& tensors);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_QKV_SPLIT_H_
