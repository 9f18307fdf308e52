// A causal convolution of width 4 with silu over a pool of states. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_CAUSAL_CONV1D_H_
#define PRISTINE_ATTENTION_GDN_KERNELS_CAUSAL_CONV1D_H_

#include <cstdint>

#include "attention/gdn/kernels/gates.h"
#include "pristine/attention/types.h"

struct CUstream_st;

namespace pristine::attention::gdn {

struct CausalConv1dParams {
  const void* x;                     // [tokens, dim], x_stride elements from token to token
  const void* weight;                // [dim, 4]
  const void* bias;                  // [dim]; null: none
  void* states;                      // [slots, dim, 3], oldest first, slot_stride elements from slot to slot
  const int32_t* cache_indices;      // [requests]
  const int32_t* has_initial_state;  // [requests]; null: all have
  const int32_t* cu_seqlens;  // [requests + 1]; null: request r has tokens [r * row_tokens, (r + 1) * row_tokens)
  const int32_t* lengths;     // [requests], clamped to [0, row_tokens]: tokens that count; null: all
  void* out[3];               // segments of the channels, contiguous: [tokens, out_dim[i]]; all null: not wanted
  int32_t out_dim[3];
  GatesParams gates;  // g null: none
  int64_t x_stride, slot_stride;
  int64_t tokens;
  int32_t dim, slots, requests, row_tokens;
  int32_t norm_head_dim;  // of segments 0 and 1: 0, 64 or 128
  DType dtype;            // of x, weight, bias, states and outputs
  bool store;             // the states
};

int CausalConv1dHost(const CausalConv1dParams& params);
int CausalConv1dCuda(CUstream_st* stream, const CausalConv1dParams& params);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_CAUSAL_CONV1D_H_
