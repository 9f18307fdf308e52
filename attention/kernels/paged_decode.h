// The decode kernel: one partial result per work item and head. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_H_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_H_

#include <cstdint>

#include "attention/kernels/bfloat16.h"
#include "attention/kernels/host_device.h"

struct CUstream_st;

namespace pristine::attention {

struct PagedDecodeParams {
  const void* q;              // [rows, q_heads, head_dim]
  const void* k;              // [num_pages, page_size, kv_heads, head_dim]
  const void* v;              // the same shape
  float* partial_out;         // [max_items, q_heads, head_dim]; not written where the item's lse is -inf
  float* partial_lse;         // [max_items, q_heads], base 2; -inf: the item attends nothing
  const int32_t* plan;        // plan_layout.h
  const int32_t* kv_indptr;   // [rows + 1] pages
  const int32_t* kv_indices;  // [kv_indices_size] page numbers
  const int32_t* lengths;     // [rows] tokens; null: all tokens of the row's pages
  int64_t kv_indices_size;
  int64_t num_pages;
  int32_t rows;
  int32_t max_items;
  int32_t q_heads, kv_heads, head_dim;
  int32_t page_size;
  int32_t window;    // 0: all
  float scale_log2;  // scale * log2(e): scores are in base 2
};

// The CUDA kernel's tile: tokens staged in shared memory at a time, and query heads of a KV head at most.
constexpr int32_t kDecodeTile = 64;
constexpr int32_t kDecodeMaxGroup = 32;
constexpr int32_t kDecodeThreads = 128;
// 32 bytes more than a row of K or V, so that the eight lanes of a 16-byte access phase meet eight different banks.
PRISTINE_HOST_DEVICE constexpr int32_t DecodeRowStride(int32_t element_bytes, int32_t head_dim) {
  return element_bytes * head_dim + 32;
}
// Dynamic shared memory of a block: K and V tile, queries as float, one pool offset per token of the tile.
PRISTINE_HOST_DEVICE constexpr int32_t DecodeSharedBytes(int32_t element_bytes, int32_t head_dim) {
  return 2 * kDecodeTile * DecodeRowStride(element_bytes, head_dim) + kDecodeMaxGroup * head_dim * 4 + kDecodeTile * 8;
}

// Instantiated for T in {float, BFloat16} and kHeadDim in {64, 128}.
template <class T, int kHeadDim>
int PagedDecodeHost(const PagedDecodeParams& params);
template <class T, int kHeadDim>
int PagedDecodeCuda(CUstream_st* stream, const PagedDecodeParams& params);
// Sets the kernels' shared memory limit on the current device. Returns a cudaError_t.
template <class T, int kHeadDim>
int PagedDecodePrepare();

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_H_
