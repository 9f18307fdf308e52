// Merges the partial results of a row's work items into its output. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_MERGE_STATES_H_
#define PRISTINE_ATTENTION_KERNELS_MERGE_STATES_H_

#include <cstdint>

#include "attention/kernels/bfloat16.h"
#include "attention/kernels/float16.h"
#include "pristine/attention/types.h"

struct CUstream_st;

namespace pristine::attention {

struct MergeStatesParams {
  const float* partial_out;  // [max_items, q_len, q_heads, head_dim]; not read where the item's lse is -inf
  const float* partial_lse;  // [max_items, q_len, q_heads], base 2
  const int32_t* plan;       // plan_layout.h
  const float* sinks;        // [q_heads] logits, natural log, that join what attends anything; null: none
  void* out;                 // [rows, q_len, q_heads, head_dim]; zeros where nothing is attended
  LseBase2* lse;             // [rows, q_len, q_heads]; null: not wanted
  int32_t rows, q_len;
  int32_t max_items;
  int32_t q_heads, head_dim;
};

// Instantiated for T in {float, BFloat16, Float16}: the type of `out`.
template <class T>
int MergeStatesHost(const MergeStatesParams& params);
template <class T>
int MergeStatesCuda(CUstream_st* stream, const MergeStatesParams& params);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_MERGE_STATES_H_
