// SparsePageTable: turns each request's sparse page table into CSR inside the graph, without ever writing what the next
// plan reads.
//
// The bug that this shape exists for (docs/the_bug.svg): one preallocated kv_indptr was plan input, conversion output
// and the wrapper's bound buffer at once. Here there are three arrays with three roles, each groups * requests + 1
// long, in tokens:
//   plan lengths   host values, the only plan input
//   kv_indptr      refilled from them each step; its tail repeats its own last real value
//   kv_indptr_ws   the conversion's destination and what the decode wrapper is bound to; kRestored, [0, R, 2R, …]
// After the conversion the graph checks that kv_indptr_ws equals kv_indptr over the bucket.
#ifndef PRISTINE_ATTENTION_SPARSE_PAGE_TABLE_H_
#define PRISTINE_ATTENTION_SPARSE_PAGE_TABLE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"

namespace pristine::attention {

struct SparseConfig {
  std::string name = "sparse";  // prefix of the buffers' names
  int32_t groups = 2;           // KV-head groups; each counts as a request of its own
  int32_t block = 64;           // tokens of a selected block
  int32_t topk = 96;            // blocks that a long request attends; K = topk * block
  int32_t dense_len = 0;        // requests shorter than this attend everything
};

// K = topk * block, and the most tokens of a row: R = max(dense_len - 1, K).
int32_t SparseRowBound(const SparseConfig& config);
// Tokens that a request of length L attends in each group (MiniCPM-SALA):
//   L < dense_len -> L;   L <= K -> L;   L % block == 0 -> K;   else K - block + L % block
int32_t SparseRowLength(const SparseConfig& config, int32_t length);

// A row r = request * groups + group of the sparse page table lists the blocks that the row attends, ascending, the
// last one being the request's last, possibly partial, block. It is read only where length > K (and >= dense_len);
// shorter rows attend positions 0 … L - 1. Used by one thread at a time, as its manager.
class SparsePageTable {
 public:
  // Registers kv_indptr, kv_indptr_ws and kv_indices. `metadata` must outlive this; its worst_length must be one whose
  // SparseRowLength is R. INVALID_ARGUMENT: sizes that do not fit together, or rows * R past int32.
  static absl::StatusOr<std::unique_ptr<SparsePageTable>> Create(BufferManager& manager, StepMetadata& metadata,
                                                                 const SparseConfig& config);

  // Registers one layer's page table, [groups * max_requests, topk], kRefilled. Its original is block 0 everywhere.
  // Codes of BufferManager::Register.
  absl::StatusOr<Buffer<int32_t>> RegisterTable(const std::string& name);

  // Refills kv_indptr with the prefix sums of `plan_lengths` ([groups * real requests]) in the open step. Does not
  // allocate or block. INVALID_ARGUMENT: a negative length.
  absl::Status Refill(absl::Span<const int32_t> plan_lengths);

  // Queues the conversion of `table` for all rows of `bucket` (padded rows get length 0), then the check against
  // kv_indptr. Lengths are the metadata's, as the device sees them: out of [0, its max_length] they are clamped to that
  // and reported (kClamped); the rule then makes every row at most R long. (A request's own length is not clamped to R:
  // one with L > K would become a short one, and attend the first R positions instead of its table's blocks.)
  // Captureable; does not allocate or block. INVALID_ARGUMENT: a bucket past max_requests, a table too small for it.
  // Codes of BufferManager::CheckEqual.
  //   kv_indptr_ws[r + 1] - kv_indptr_ws[r] = SparseRowLength(lengths[r / groups])
  //   kv_indices[kv_indptr_ws[r] + j] = slot(position j of row r) * groups + r % groups,
  //   slot(p) = page(p / page_size) * page_size + p % page_size
  absl::Status Run(Stream& stream, const Extent& bucket, const Buffer<int32_t>& table) const;

  const SparseConfig& config() const { return config_; }
  const Buffer<int32_t>& kv_indptr() const { return kv_indptr_; }        // [groups * max_requests + 1], tokens
  const Buffer<int32_t>& kv_indptr_ws() const { return kv_indptr_ws_; }  // the same shape
  const Buffer<int32_t>& kv_indices() const { return kv_indices_; }      // [groups * max_requests * R], kScratch

 private:
  SparsePageTable(BufferManager& manager, StepMetadata& metadata, const SparseConfig& config)
      : manager_(manager), metadata_(metadata), config_(config) {}
  BufferManager& manager_;
  StepMetadata& metadata_;
  const SparseConfig config_;
  Buffer<int32_t> kv_indptr_, kv_indptr_ws_, kv_indices_;
  std::vector<int32_t> staging_;  // [groups * max_requests + 1], so that Refill does not allocate
};

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_SPARSE_PAGE_TABLE_H_
