// What both prefill kernels use: packed bfloat16, asynchronous copies, matrix fragments in shared memory.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_DEVICE_CUH_
#define PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "attention/gdn/kernels/prefill.h"

// Both kernels need Hopper: other device compilations leave them empty (Prefill::Create refuses other devices).
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PRISTINE_GDN_PREFILL 1
#endif

namespace pristine::attention::gdn {

inline constexpr int kDim = 128;  // K and V

// A sequence's tokens and the place of its first chunk; whatever cu_seqlens holds, inside the tensors.
struct PrefillSpan {
  int32_t begin, length, first_chunk, chunks;
};
__device__ inline PrefillSpan SpanOf(const PrefillParams& p, int32_t sequence) {
  const int32_t begin = min(max(p.cu_seqlens[sequence], 0), p.tokens);
  const int32_t end = min(max(p.cu_seqlens[sequence + 1], begin), p.tokens);
  const int32_t first = FirstChunk(sequence, begin);
  return {begin, end - begin, first,
          min((end - begin + kChunk - 1) / kChunk, ChunkBound(p.sequences, p.tokens) - first)};
}

__device__ inline uint32_t Pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, or zeros without reading anything.
__device__ inline void CopyAsync(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void LoadMatrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ inline void LoadMatricesTransposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_DEVICE_CUH_
