// Copies states between a pool and a gathered tensor. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_STATE_COPY_H_
#define PRISTINE_ATTENTION_GDN_KERNELS_STATE_COPY_H_

#include <cstdint>

#include "pristine/attention/types.h"

struct CUstream_st;

namespace pristine::attention::gdn {

struct StateCopyParams {
  void* pool;                    // [slots, elements], pool_stride elements from slot to slot
  void* gathered;                // [rows, elements], gathered_stride elements from row to row
  const int32_t* cache_indices;  // [rows]
  int32_t* gathered_indices;     // [rows]; null: scatter
  int64_t pool_stride, gathered_stride;
  int64_t elements;  // of a state, all heads
  int32_t rows, slots;
  DType pool_dtype, gathered_dtype;
  bool clamp_to_zero;  // PaddedRows::kClampToZero
};

int StateCopyHost(const StateCopyParams& params);
int StateCopyCuda(CUstream_st* stream, const StateCopyParams& params);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_STATE_COPY_H_
