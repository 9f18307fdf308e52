// The gates, one element at a time and as a kernel. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_GATES_H_
#define PRISTINE_ATTENTION_GDN_KERNELS_GATES_H_

#include <cstdint>

#include "pristine/attention/types.h"

struct CUstream_st;

namespace pristine::attention::gdn {

struct GatesParams {
  const void* a;  // [tokens, v_heads], a_stride elements from row to row
  const void* b;
  const float* a_log;    // [v_heads]
  const float* dt_bias;  // [v_heads]
  float* g;              // [tokens, v_heads]
  float* beta;
  int64_t a_stride, b_stride;
  int64_t tokens;
  int32_t v_heads;
  DType dtype;  // of a and b
};

int GatesHost(const GatesParams& params);
int GatesCuda(CUstream_st* stream, const GatesParams& params);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_GATES_H_
