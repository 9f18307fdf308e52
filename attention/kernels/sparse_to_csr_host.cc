#include <algorithm>

#include "attention/kernels/sparse_to_csr.h"
#include "pristine/buffers/violation.h"

namespace pristine::attention {
namespace {

bool IsSparse(const SparseToCsrParams& p, int32_t length) {
  return length >= p.dense_len && length > int64_t{p.topk} * p.block;
}

int32_t RowLength(const SparseToCsrParams& p, int32_t length) {
  if (!IsSparse(p, length)) return length;
  const int32_t last_block = length % p.block == 0 ? p.block : length % p.block;
  return (p.topk - 1) * p.block + last_block;
}

// The request's position `j` of row `row`, or -1 where the table names a block that the request does not have.
int64_t Position(const SparseToCsrParams& p, int32_t row, int32_t length, int32_t j) {
  if (!IsSparse(p, length)) return j;
  const int64_t block = p.table[int64_t{row} * p.topk + j / p.block];
  const int64_t position = block * p.block + j % p.block;
  return block < 0 || position >= length ? -1 : position;
}

// The pool slot of a position, or the dummy page's first one where it does not exist.
int64_t Slot(const SparseToCsrParams& p, int32_t request, int64_t position) {
  const int64_t dummy = int64_t{p.dummy_page} * p.page_size;
  const int64_t first = p.page_indptr[request];
  const int64_t last = std::min<int64_t>(p.page_indptr[request + 1], p.page_indices_size);
  const int64_t place = first + position / p.page_size;
  if (position < 0 || first < 0 || place >= last) return dummy;
  const int64_t page = p.page_indices[place];
  if (page < 0 || page >= p.num_pages) return dummy;
  return page * p.page_size + position % p.page_size;
}

}  // namespace

int SparseToCsrHost(const SparseToCsrParams& p) {
  int32_t end = 0;
  p.indptr[0] = 0;
  for (int32_t row = 0; row < p.rows; ++row) {
    const int32_t request = row / p.groups;
    const int32_t group = row % p.groups;
    const int32_t found = p.lengths[request];
    const int32_t length = std::clamp(found, 0, p.max_length);
    if (length != found && group == 0) {
      Report(p.reports, static_cast<int32_t>(Violation::Kind::kClamped), p.lengths_id, request, length, found);
    }
    const int32_t begin = end, count = RowLength(p, length);
    for (int32_t j = 0; j < count; ++j) {
      const int64_t slot = Slot(p, request, Position(p, row, length, j));
      p.indices[begin + j] = static_cast<int32_t>(slot * p.groups + group);
    }
    end = begin + count;
    p.indptr[row + 1] = end;
  }
  return 0;
}

}  // namespace pristine::attention
