// Splits [tokens, q | k | v] into three contiguous tensors. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_QKV_SPLIT_H_
#define PRISTINE_ATTENTION_GDN_KERNELS_QKV_SPLIT_H_

#include <cstdint>

#include "attention/gdn/kernels/gates.h"
#include "pristine/attention/types.h"

struct CUstream_st;

namespace pristine::attention::gdn {

inline constexpr float kNormEpsilon = 1e-6f;  // inside the root

struct QkvSplitParams {
  const void* mixed;  // element (t, d) at t * stride_t + d * stride_d
  void* out[3];       // q, k, v: [tokens, dim[i]]
  int32_t dim[3];     // the first element of segment i is the sum of those before
  DType dtype;
  int64_t stride_t, stride_d;  // elements
  int64_t tokens;
  int32_t norm_head_dim;  // of q and k: 0, 64 or 128
  GatesParams gates;      // g null: none
};

int QkvSplitHost(const QkvSplitParams& params);
int QkvSplitCuda(CUstream_st* stream, const QkvSplitParams& params);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_QKV_SPLIT_H_
