// The two kernels that stand for the rest of a model: what a layer's projections would hand to attention, and a context
// that an earlier prefill would have left in the KV pool. No Abseil, no CUDA headers.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_MODEL_KERNELS_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_MODEL_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "examples/replay_driver/kv_hash.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/kernel.h"

namespace pristine::replay_driver {

// q, k_new and v_new of one layer for every row (query token) of a bucket. Rows of request -1 (padding) are zeros.
struct ModelInputsParams {
  uint64_t seed;
  int32_t layer, rows, heads, kv_heads, head_dim;
  attention::DType dtype;
  const int32_t* requests;   // [rows]
  const int32_t* positions;  // [rows]
  const int32_t* drafts;     // [rows] see TokenSeed; null: all 0
  void* q;                   // [rows, heads, head_dim]
  void* k_new;               // [rows, kv_heads, head_dim]
  void* v_new;               // the same shape
};

// K and V of positions 0 … tokens - 1 of one request in one layer, into its pages.
struct FillContextParams {
  uint64_t seed;
  int32_t request, layer, tokens, page_size, kv_heads, head_dim;
  attention::DType dtype;
  const int32_t* pages;  // [ceil(tokens / page_size)]
  void* k;               // [pool pages, page_size, kv_heads, head_dim]
  void* v;               // the same shape
  size_t pool_bytes;     // of k, and of v
};

extern const Kernel<ModelInputsParams> kModelInputs;
extern const Kernel<FillContextParams> kFillContext;

int LaunchModelInputs(CUstream_st* stream, const ModelInputsParams& params);
int LaunchFillContext(CUstream_st* stream, const FillContextParams& params);

PRISTINE_HOST_DEVICE inline void Store(attention::DType dtype, void* base, int64_t index, float value) {
  if (dtype == attention::DType::kFloat32) {
    static_cast<float*>(base)[index] = value;
  } else {
    static_cast<uint16_t*>(base)[index] = ToBFloat16(value);
  }
}

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_MODEL_KERNELS_H_
