// The prefill kernels: causal attention of ragged queries over a paged KV cache. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_H_
#define PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_H_

#include <cstdint>

#include "attention/kernels/bfloat16.h"
#include "attention/kernels/float16.h"
#include "attention/kernels/float8.h"
#include "attention/kernels/host_device.h"
#include "attention/kernels/paged_kv.h"

struct CUstream_st;

namespace pristine::attention {

// The most shared memory that a tensor core kernel's block takes: what compute capability 8.6 and 8.9 have.
constexpr int32_t kPrefillMmaSharedBytes = 99 * 1024;

struct PagedPrefillParams {
  const void* q;             // [tokens, q_heads, head_dim]
  PagedKvView kv;            // rows are requests
  const float* sinks;        // [q_heads], base e; null: none
  const int32_t* qo_indptr;  // [requests + 1] tokens
  void* out;                 // [tokens, q_heads, head_dim]
  float* lse;                // [tokens, q_heads], base 2; may be null
  int32_t requests, tokens;
  int32_t q_heads, head_dim;
  int32_t window;  // 0: all
  float scale;     // of scores, before k_scale
  float soft_cap;  // 0: none
};

// T: q and out. KV: k and v, T or Float8E4M3. Instantiated as prefill_variants.cc says.
template <class T, class KV>
int PagedPrefillHost(const PagedPrefillParams& params);

// Tensor cores, 16-bit T, through mma.sync: sm_80 and newer.
template <class T, class KV, int kHeadDim>
int PagedPrefillMmaCuda(CUstream_st* stream, const PagedPrefillParams& params);
// The same through wgmma: sm_90a alone. head_dim 64 and 128.
template <class T, class KV, int kHeadDim>
int PagedPrefillWgmmaCuda(CUstream_st* stream, const PagedPrefillParams& params);
// Set the kernels' shared memory limit on the current device. Return a cudaError_t.
template <class T, class KV, int kHeadDim>
int PreparePagedPrefillMma();
template <class T, class KV, int kHeadDim>
int PreparePagedPrefillWgmma();

// float32 throughout, a warp per query and head: exact rather than fast.
template <int kHeadDim>
int PagedPrefillFloat32Cuda(CUstream_st* stream, const PagedPrefillParams& params);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_H_
