// The kernel of SparsePageTable::Run: the rows' lengths summed up, and every row's indices. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_SPARSE_TO_CSR_H_
#define PRISTINE_ATTENTION_KERNELS_SPARSE_TO_CSR_H_

#include <cstdint>

#include "pristine/buffers/report.h"

struct CUstream_st;

namespace pristine::attention {

struct SparseToCsrParams {
  const int32_t* lengths;       // [rows / groups] tokens
  const int32_t* page_indptr;   // [rows / groups + 1] pages
  const int32_t* page_indices;  // [page_indices_size] page numbers
  const int32_t* table;         // [rows, topk] block numbers
  int32_t* indptr;              // [rows + 1] tokens
  int32_t* indices;             // [rows * row_bound] slot * groups + group
  ReportRing reports;
  int32_t lengths_id;  // buffer of `lengths`, for reports
  int32_t rows;        // groups * requests; rows * row_bound < 2^31
  int32_t row_bound;   // R
  int32_t groups, block, topk, dense_len;
  int32_t max_length;  // a longer request is taken as this and reported
  int32_t page_size;
  int64_t page_indices_size;
  int32_t num_pages;   // groups * num_pages * page_size < 2^31
  int32_t dummy_page;  // stands in for blocks and pages that do not exist
};

int SparseToCsrHost(const SparseToCsrParams& params);
int SparseToCsrCuda(CUstream_st* stream, const SparseToCsrParams& params);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_SPARSE_TO_CSR_H_
