// Eight channels of a token in one thread, for the kernels that run over [tokens, channels].
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_CHANNELS_DEVICE_CUH_
#define PRISTINE_ATTENTION_GDN_KERNELS_CHANNELS_DEVICE_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "attention/gdn/kernels/qkv_split.h"

namespace pristine::attention::gdn {

__device__ inline float AsFloat(float value) { return value; }
__device__ inline float AsFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void Assign(float& to, float value) { to = value; }
__device__ inline void Assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

template <class T>
struct alignas(16) Eight {
  T values[8];
};

// Divides a head of `head_dim` (64 or 128) channels, eight in each of as many threads that follow each other, by its
// norm. All threads of the warp call it. One order of summing for every kernel: fused and unfused give the same bits.
template <class T>
__device__ void NormaliseHead(Eight<T>& y, int head_dim) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum = fmaf(AsFloat(y.values[j]), AsFloat(y.values[j]), sum);
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  sum += __shfl_xor_sync(0xffffffffu, sum, 4);
  const float other = __shfl_xor_sync(0xffffffffu, sum, 8);
  if (head_dim == 128) sum += other;
  const float scale = rsqrtf(sum + kNormEpsilon);
#pragma unroll
  for (int j = 0; j < 8; ++j) Assign(y.values[j], AsFloat(y.values[j]) * scale);
}

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_CHANNELS_DEVICE_CUH_
