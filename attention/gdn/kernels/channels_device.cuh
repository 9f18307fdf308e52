// Some channels of a token in one thread, for the kernels over [tokens, channels] that write q, k and v; and hints.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_CHANNELS_DEVICE_CUH_
#define PRISTINE_ATTENTION_GDN_KERNELS_CHANNELS_DEVICE_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "attention/gdn/kernels/qkv_split.h"

namespace pristine::attention::gdn {

// As words: taken apart into elements, a load would be waited for where it is issued.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  static constexpr int kWords = kCount * sizeof(T) / 4;
  uint32_t words[kWords];

  __device__ float Float(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    }
  }
  // The bits of element i, in the low half where they are 16.
  __device__ uint32_t Bits(int i) const {
    if constexpr (sizeof(T) == 4) {
      return words[i];
    } else {
      return i % 2 == 0 ? words[i / 2] & 0xffffu : words[i / 2] >> 16;
    }
  }
  __device__ void SetBits(int i, uint32_t bits) {
    if constexpr (sizeof(T) == 4) {
      words[i] = bits;
    } else {
      words[i / 2] = i % 2 == 0 ? (words[i / 2] & 0xffff0000u) | bits : (words[i / 2] & 0xffffu) | bits << 16;
    }
  }
  __device__ void Set(const float (&values)[kCount]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) words[i] = __float_as_uint(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&two);
      }
    }
  }
};

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using Type = uint32_t;
};
template <>
struct BitsOf<__nv_bfloat16> {
  using Type = uint16_t;
};

// Elements [0, count) of a row whose elements lie `stride` apart; zeros behind them.
template <int kCount, class T>
__device__ Pack<T, kCount> LoadElements(const T* from, int64_t stride, int count) {
  Pack<T, kCount> pack = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) pack.SetBits(i, reinterpret_cast<const typename BitsOf<T>::Type*>(from)[i * stride]);
  }
  return pack;
}

// Divides a head of `head_dim` (64 or 128) channels of each of kTokens tokens, kCount channels in each of as many
// threads that follow each other, by its norm; 0: leaves them. All threads of the warp call it. The order of summing is
// that of four channels by four, then of pairs of these, whatever kCount is: fused and unfused give the same bits.
// With each step a thread keeps the sums of half of its tokens and hands the other half over, so that eight tokens cost
// little more shuffles than one, and each root is taken by one thread.
template <class T, int kCount, int kTokens>
__device__ void NormaliseHeads(Pack<T, kCount> (&y)[kTokens], int head_dim) {
  static_assert((kCount == 4 || kCount == 8) && (kTokens & (kTokens - 1)) == 0 && kTokens <= 64 / kCount);
  float sum[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float fours[kCount / 4];
#pragma unroll
    for (int f = 0; f < kCount / 4; ++f) {
      fours[f] = 0;
#pragma unroll
      for (int i = 4 * f; i < 4 * f + 4; ++i) fours[f] = fmaf(y[t].Float(i), y[t].Float(i), fours[f]);
    }
    sum[t] = fours[0];
    if constexpr (kCount == 8) sum[t] += fours[1];
  }
#pragma unroll
  for (int step = 1; step < 64 / kCount; step *= 2) {
    if (step < kTokens) {
      const bool odd = (threadIdx.x & static_cast<unsigned>(step)) != 0;
#pragma unroll
      for (int i = 0; i < kTokens / (2 * step); ++i) {
        const float keep = odd ? sum[2 * i + 1] : sum[2 * i], give = odd ? sum[2 * i] : sum[2 * i + 1];
        sum[i] = keep + __shfl_xor_sync(0xffffffffu, give, step);
      }
    } else {
      sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], step);
    }
  }
  const float other = __shfl_xor_sync(0xffffffffu, sum[0], 64 / kCount);
  if (head_dim == 128) sum[0] += other;
  const float own_scale = rsqrtf(sum[0] + kNormEpsilon);
  const unsigned owner = threadIdx.x % 32 / kTokens * kTokens;
  float scale[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) scale[t] = __shfl_sync(0xffffffffu, own_scale, static_cast<int>(owner + t));
  if (head_dim == 0) return;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float scaled[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) scaled[i] = y[t].Float(i) * scale[t];
    y[t].Set(scaled);
  }
}

// Channels [first, first + kCount) of the segments: where a token's go. kVector: those that exist lie in one segment,
// at multiples of a Pack's size.
template <class T, int kCount, bool kVector>
class Segments {
 public:
  __device__ Segments(void* const (&out)[3], const int32_t (&dim)[3], int first) : out_(out), dim_(dim), first_(first) {
    count_ = min(kCount, dim[0] + dim[1] + dim[2] - first);
    if constexpr (kVector) {
      int segment = 0, at = first;
      while (segment < 2 && at >= dim[segment]) at -= dim[segment++];
      to_ = static_cast<T*>(out[segment]) + at;
      row_ = dim[segment];
    }
  }
  // Tokens that follow each other.
  template <int kTokens>
  __device__ void Store(int64_t token, const Pack<T, kCount> (&y)[kTokens]) const {
    if constexpr (kVector) {
      if (count_ <= 0) return;
      T* to = to_ + token * row_;
#pragma unroll
      for (int t = 0; t < kTokens; ++t, to += row_) *reinterpret_cast<Pack<T, kCount>*>(to) = y[t];
    } else {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) Store(token + t, y[t]);
    }
  }
  __device__ void Store(int64_t token, const Pack<T, kCount>& y) const {
    if constexpr (kVector) {
      if (count_ > 0) *reinterpret_cast<Pack<T, kCount>*>(to_ + token * row_) = y;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        int segment = 0, at = first_ + i;
        while (segment < 2 && at >= dim_[segment]) at -= dim_[segment++];
        using Bits = typename BitsOf<T>::Type;
        if (i < count_) static_cast<Bits*>(out_[segment])[token * dim_[segment] + at] = static_cast<Bits>(y.Bits(i));
      }
    }
  }

 private:
  void* const (&out_)[3];
  const int32_t (&dim_)[3];
  int first_, count_;
  T* to_;
  int row_;
};

// Whether the block is one of the first, `of_processor` to a multiprocessor: as many as find a place while the kernel
// ahead ends. Only they gain by hints to L2 before they wait.
__device__ inline bool BeginsEarly(unsigned block, unsigned of_processor) {
  unsigned processors;
  asm("mov.u32 %0, %%nsmid;" : "=r"(processors));
  return block < of_processor * processors;
}

// A hint that may come before the wait: L2 has what the kernel ahead writes afterwards.
__device__ inline void PrefetchL2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_CHANNELS_DEVICE_CUH_
