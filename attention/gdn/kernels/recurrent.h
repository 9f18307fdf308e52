// The recurrent gated delta rule over a pool of states. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_RECURRENT_H_
#define PRISTINE_ATTENTION_GDN_KERNELS_RECURRENT_H_

#include <cstdint>

#include "attention/gdn/kernels/gates.h"
#include "pristine/attention/types.h"

struct CUstream_st;

namespace pristine::attention::gdn {

struct RecurrentParams {
  const void* q;  // [rows * tokens, qk_heads, K], q_stride elements from token to token
  const void* k;
  const void* v;                 // [rows * tokens, v_heads, V]
  GatesParams gates;             // its g and beta are not used; gates.dtype is that of q, k, v and out
  void* out;                     // [rows * tokens, v_heads, V]; null: not wanted
  void* states;                  // [slots, v_heads, V, K], slot_stride elements from slot to slot
  const int32_t* cache_indices;  // [rows]
  const int32_t* lengths;        // [rows], clamped to [0, tokens]; null: all tokens
  int64_t q_stride, k_stride, v_stride;
  int64_t slot_stride;
  int32_t slots;
  int32_t rows, tokens;
  int32_t qk_heads, v_heads;
  float scale;
  DType state_dtype;
  bool store;          // the states, when the last token is done
  bool clamp_to_zero;  // PaddedRows::kClampToZero
};

int RecurrentHost(const RecurrentParams& params);
int RecurrentCuda(CUstream_st* stream, const RecurrentParams& params);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_RECURRENT_H_
