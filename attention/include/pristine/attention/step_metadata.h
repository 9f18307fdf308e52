// StepMetadata: the arrays that every layer of a step reads, registered once and refilled once per step.
#ifndef PRISTINE_ATTENTION_STEP_METADATA_H_
#define PRISTINE_ATTENTION_STEP_METADATA_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "pristine/buffers/buffer_manager.h"

namespace pristine::attention {

struct StepMetadataConfig {
  std::string name = "step";  // prefix of the buffers' names
  int32_t max_requests = 0;
  int32_t max_tokens = 0;      // query tokens; max_requests in decode
  int32_t page_size = 1;       // tokens
  int32_t num_pages = 0;       // of the KV pool; page numbers are in [0, num_pages)
  int32_t max_step_pages = 0;  // capacity of kv_indices: pages over all requests of a step
  int32_t max_length = 0;      // tokens of one request, KV included
  int32_t worst_length = 0;    // what captures and warm-ups see as the length of every request; 0: max_length
  int32_t dummy_page = 0;      // padding and originals point here: kept finite, never handed out
  bool ragged = false;         // registers qo_indptr: requests with different numbers of query tokens
  int32_t state_slots = 0;     // slots of a state pool (gdn::StatePool), the reserved one included; 0: no state_slots
  // Pages of a request, at least those of max_length: a block table instead of kv_indptr and kv_indices, and then
  // without max_step_pages. 0: those two.
  int32_t block_table_width = 0;
};

// The real part of one step; host memory, read during the call only.
struct StepValues {
  absl::Span<const int32_t> lengths;     // [requests] tokens in KV, those appended in this step included
  absl::Span<const int32_t> kv_indptr;   // [requests + 1] in pages: ceil(length / page_size) per request. Empty with
                                         // a block table, and so are kv_indices
  absl::Span<const int32_t> kv_indices;  // [kv_indptr[requests]] page numbers
  absl::Span<const int32_t> slots;      // [tokens] where each token is appended: page * page_size + offset; -1: nowhere
  absl::Span<const int32_t> positions;  // [tokens] in [0, max_length)
  absl::Span<const int32_t> qo_indptr = {};    // [requests + 1] in tokens; only, and always, where config.ragged
  absl::Span<const int32_t> state_slots = {};  // [requests]; only, and always, where config.state_slots > 0
  // [requests, config.block_table_width] page numbers; only, and always, where that is > 0. Columns behind a request's
  // ceil(length / page_size) pages are not looked at: engines leave there what an earlier request had.
  absl::Span<const int32_t> block_table = {};
};

// Originals (what captures and warm-ups see): lengths worst_length, kv_indptr evenly spaced, kv_indices the dummy page,
// slots -1, positions 0. Tails: lengths 0, kv_indptr its own last real value, pages the dummy page, slots -1. A block
// table has the dummy page in its original, and wherever no request has a page of its own: in padded rows, and in the
// columns behind a request's pages, which kernels prefetch. Used by one thread at a time, as its manager.
class StepMetadata {
 public:
  // `manager` must outlive this. INVALID_ARGUMENT: a size < 1 or of 2^31 - 1 requests, max_requests * ceil(worst_length
  // / page_size) more than max_step_pages, or ceil(max_length / page_size) more than block_table_width; codes of
  // BufferManager::Register.
  static absl::StatusOr<std::unique_ptr<StepMetadata>> Create(BufferManager& manager, const StepMetadataConfig& config);

  // Refills all of them in the manager's open step. Does not allocate or block. INVALID_ARGUMENT: sizes that do not
  // belong together (name, size, what was expected); codes of BufferManager::Refill.
  absl::Status Refill(const StepValues& values);

  const StepMetadataConfig& config() const { return config_; }
  const Buffer<int32_t>& lengths() const { return lengths_; }        // [max_requests]
  const Buffer<int32_t>& kv_indptr() const { return kv_indptr_; }    // [max_requests + 1], pages
  const Buffer<int32_t>& kv_indices() const { return kv_indices_; }  // [max_step_pages]
  const Buffer<int32_t>& slots() const { return slots_; }            // [max_tokens]
  const Buffer<int32_t>& positions() const { return positions_; }    // [max_tokens]
  // kv_indptr and kv_indices have no memory with a block table, and the others where config() does not ask for them.
  const Buffer<int32_t>& block_table() const { return block_table_; }  // [max_requests, block_table_width]
  const Buffer<int32_t>& qo_indptr() const { return qo_indptr_; }      // [max_requests + 1], tokens
  const Buffer<int32_t>& state_slots() const { return state_slots_; }  // [max_requests]

 private:
  StepMetadata(BufferManager& manager, const StepMetadataConfig& config) : manager_(manager), config_(config) {}
  absl::Status Register();
  absl::Status CheckSizes(const StepValues& values) const;
  absl::Status RefillBlockTable(const StepValues& values);

  BufferManager& manager_;
  const StepMetadataConfig config_;
  Buffer<int32_t> lengths_, kv_indptr_, kv_indices_, slots_, positions_, qo_indptr_, state_slots_, block_table_;
  std::vector<int32_t> staging_;  // a block table without what lies behind the requests' pages
};

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_STEP_METADATA_H_
