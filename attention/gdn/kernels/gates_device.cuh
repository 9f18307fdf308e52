// The gates of one token and head, for every kernel that needs them.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_GATES_DEVICE_CUH_
#define PRISTINE_ATTENTION_GDN_KERNELS_GATES_DEVICE_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "attention/gdn/kernels/gates.h"

namespace pristine::attention::gdn {

__device__ inline float LoadGateInput(const void* rows, DType dtype, int64_t index) {
  return dtype == DType::kBFloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(rows)[index])
                                   : static_cast<const float*>(rows)[index];
}

struct Gate {
  float g, beta;
};

__device__ inline Gate GateOf(const GatesParams& p, int64_t token, int32_t head) {
  const float x = LoadGateInput(p.a, p.dtype, token * p.a_stride + head) + p.dt_bias[head];
  const float b = LoadGateInput(p.b, p.dtype, token * p.b_stride + head);
  const float softplus = x > 20.f ? x : log1pf(expf(x));
  return {-expf(p.a_log[head]) * softplus, 1.f / (1.f + expf(-b))};
}

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_GATES_DEVICE_CUH_
