// The instructions of the tensor core kernels, which all devices from sm_80 on have: cp.async, ldmatrix, mma.m16n8k16.
#ifndef PRISTINE_ATTENTION_KERNELS_MMA_SM80_CUH_
#define PRISTINE_ATTENTION_KERNELS_MMA_SM80_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "attention/kernels/bfloat16.h"
#include "attention/kernels/float16.h"
#include "attention/kernels/float8.h"

namespace pristine::attention {

__device__ inline unsigned SharedAddress(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, or zeros without reading `from`. L2 drops them first: who streams leaves there what others will need.
__device__ inline void CopyAsync(unsigned to, const void* from, bool valid) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}
// The line at `at` is asked for, into the L2 cache. Nothing waits for it.
__device__ inline void PrefetchL2(const void* at) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(at)); }
__device__ inline void CommitAsync() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kLeft>
__device__ inline void WaitAsync() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

__device__ inline void LoadMatrices(unsigned address, unsigned (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}
__device__ inline void LoadTransposed(unsigned address, unsigned (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

__device__ inline void Multiply(BFloat16, float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void Multiply(Float16, float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers, the first in the low half.
__device__ inline unsigned PackPair(BFloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ inline unsigned PackPair(Float16, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ inline float2 UnpackPair(BFloat16, unsigned pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ inline float2 UnpackPair(Float16, unsigned pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
// The two e4m3 in the low half of `pair` as float16, exactly.
__device__ inline unsigned WidenPair(unsigned pair) {
  const __half2_raw wide = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  return static_cast<unsigned>(wide.x) | static_cast<unsigned>(wide.y) << 16;
}

// From the L2 cache, kOffset bytes away, and only if `there`; without a branch, so that loads that follow do not wait.
template <int kOffset>
__device__ inline void LoadIf(bool there, const float* from, float& to) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p ld.global.cg.f32 %0, [%1 + %3];\n}\n"
               : "+f"(to)
               : "l"(from), "r"(static_cast<int>(there)), "n"(kOffset));
}
template <int kOffset>
__device__ inline void LoadIf(bool there, const float* from, float4& to) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4 + %6];\n}\n"
               : "+f"(to.x), "+f"(to.y), "+f"(to.z), "+f"(to.w)
               : "l"(from), "r"(static_cast<int>(there)), "n"(kOffset));
}
// A counter shared with other blocks, to 0 past `most`; returns what it was. What a thread of this block wrote before a
// barrier ahead of it is seen by those who come later, behind a barrier.
__device__ inline unsigned IncrementAcqRel(unsigned* counter, unsigned most) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;\n" : "=r"(before) : "l"(counter), "r"(most) : "memory");
  return before;
}

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_MMA_SM80_CUH_
