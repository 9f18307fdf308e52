// Copies new K and V rows to their slots, or quantizes them on the way. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_APPEND_KV_H_
#define PRISTINE_ATTENTION_KERNELS_APPEND_KV_H_

#include <cstdint>

#include "attention/kernels/bfloat16.h"
#include "attention/kernels/float16.h"
#include "attention/kernels/float8.h"

struct CUstream_st;

namespace pristine::attention {

struct AppendKvParams {
  const void* k_new;  // [tokens, kv_heads, head_dim]
  const void* v_new;
  const int32_t* slots;  // [tokens]; outside [0, num_slots): writes nothing
  void* k;  // element (slot, head, d) is at slot / page_size * page_stride + slot % page_size * token_stride
  void* v;  // + head * head_stride + d
  const float* k_scale;  // [1], quantizing only; null: 1
  const float* v_scale;
  int64_t page_stride, token_stride, head_stride;  // elements; a page has fewer than 2^31 bytes
  int64_t num_slots;
  int32_t tokens;  // > 0
  int32_t page_size, kv_heads, head_dim;
  int32_t element_bytes;  // of k_new and v_new; of k and v too, unless they quantize
};

// The reciprocal is one division, and exact where the scale is a power of two.
PRISTINE_HOST_DEVICE inline float QuantizeFactor(const float* scale) { return scale == nullptr ? 1.0f : 1.0f / *scale; }

// Copies bytes: head_dim * element_bytes is a multiple of 4, as are all addresses; or, where heads lie one after the
// other, kv_heads * head_dim * element_bytes is.
int AppendKvHost(const AppendKvParams& params);
int AppendKvCuda(CUstream_st* stream, const AppendKvParams& params);

// Quantizes T to float8 e4m3; head_dim is a multiple of 8, and k_new, v_new, k and v are aligned to 16 bytes.
// Instantiated for T in {float, Float16, BFloat16}.
template <class T>
int AppendKvQuantizeHost(const AppendKvParams& params);
template <class T>
int AppendKvQuantizeCuda(CUstream_st* stream, const AppendKvParams& params);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_APPEND_KV_H_
