// How kernels see one layer's paged KV cache: strides instead of layouts, and both kinds of page table. No Abseil, no
// CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_KV_H_
#define PRISTINE_ATTENTION_KERNELS_PAGED_KV_H_

#include <cstdint>

#include "attention/kernels/host_device.h"

namespace pristine::attention {

struct PagedKvView {
  const void* k;
  const void* v;             // strides and shape of k
  const float* k_scale;      // [1], read by every launch and replay; null: 1
  const float* v_scale;      // [1]; null: 1
  int64_t page_stride;       // elements from page to page
  int64_t token_stride;      // from token to token of a page
  int64_t head_stride;       // from KV head to KV head
  const int32_t* kv_indptr;  // [rows + 1] pages of `pages`; null: row r has pages[r * table_stride …]
  const int32_t* pages;      // page numbers: kv_indices, or a block table [rows, table_stride]
  int64_t pages_size;        // elements of `pages`
  int64_t table_stride;      // of a block table; 0 with kv_indptr
  const int32_t* lengths;    // [rows] tokens; null: all tokens of the row's pages (kv_indptr only)
  int64_t num_pages;         // of the pool; a page number outside [0, num_pages) is skipped
  int32_t page_size;         // tokens
  int32_t kv_heads;
};

// The pages of a row, clipped to what the page table really holds: a wild indptr gives an empty row, never a wild read.
struct RowPages {
  int64_t first;   // index into PagedKvView::pages
  int64_t length;  // tokens, clipped to the pages there are
};

struct PlainRead {
  PRISTINE_HOST_DEVICE int32_t operator()(const int32_t* at) const { return *at; }
};
template <class Read = PlainRead>
PRISTINE_HOST_DEVICE inline RowPages PagesOf(const PagedKvView& kv, int64_t row, Read read = {}) {
  const int64_t most = kv.lengths == nullptr ? INT64_MAX : read(kv.lengths + row);  // no load waits for another
  int64_t first = row * kv.table_stride;
  int64_t last = first + kv.table_stride;
  if (kv.kv_indptr != nullptr) {
    first = read(kv.kv_indptr + row);
    last = read(kv.kv_indptr + row + 1);
  }
  if (last > kv.pages_size) last = kv.pages_size;
  if (first < 0 || last <= first) return {0, 0};
  int64_t length = (last - first) * kv.page_size;
  if (most < length) length = most;
  return {first, length < 0 ? 0 : length};
}

// Elements from the start of k (and of v) to (position, kv_head) of a row; -1: its page number is outside the pool.
PRISTINE_HOST_DEVICE inline int64_t KvOffset(const PagedKvView& kv, const RowPages& row, int64_t position,
                                             int32_t kv_head) {
  const int64_t page = kv.pages[row.first + position / kv.page_size];
  if (page < 0 || page >= kv.num_pages) return -1;
  return page * kv.page_stride + position % kv.page_size * kv.token_stride + kv_head * kv.head_stride;
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_KV_H_
