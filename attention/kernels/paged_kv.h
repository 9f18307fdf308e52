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
// What the page table says of a row: words that are read apart, so that nobody waits for them before he must.
struct RowWords {
  int32_t length, first, last;
};
template <class Read = PlainRead>
PRISTINE_HOST_DEVICE inline RowWords ReadRow(const PagedKvView& kv, int64_t row, Read read = {}) {
  RowWords words = {0, 0, 0};
  if (kv.lengths != nullptr) words.length = read(kv.lengths + row);
  if (kv.kv_indptr != nullptr) {
    words.first = read(kv.kv_indptr + row);
    words.last = read(kv.kv_indptr + row + 1);
  }
  return words;
}
PRISTINE_HOST_DEVICE inline RowPages Clipped(const PagedKvView& kv, int64_t row, const RowWords& words) {
  const bool in_table = kv.kv_indptr == nullptr;
  const int64_t first = in_table ? row * kv.table_stride : words.first;
  int64_t last = in_table ? first + kv.table_stride : words.last;
  if (last > kv.pages_size) last = kv.pages_size;
  if (first < 0 || last <= first) return {0, 0};
  int64_t length = (last - first) * kv.page_size;
  if (kv.lengths != nullptr && words.length < length) length = words.length;
  return {first, length < 0 ? 0 : length};
}
template <class Read = PlainRead>
PRISTINE_HOST_DEVICE inline RowPages PagesOf(const PagedKvView& kv, int64_t row, Read read = {}) {
  return Clipped(kv, row, ReadRow(kv, row, read));
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
