// PagedDecode: the last query tokens of each row, one (decode) or a few (target verify), against a paged KV cache.
//   s[p] = scale * k_scale * q[r, i, h] . k[p, h / group], then soft_cap * tanh(s / soft_cap) where there is a cap
//   out[r, i, h] = v_scale * sum_p exp(s[p]) v[p, h / group] / M,  lse[r, i, h] = log2 M,
//   M = sum_p exp(s[p]) + exp(sinks[h])
// over the positions p in (at - window, at] of the row, at = length - q_len + i (a chain: each query sees what stands
// before it). Sinks as in gpt-oss: a logit that takes mass and gives no value.
#ifndef PRISTINE_ATTENTION_PAGED_DECODE_H_
#define PRISTINE_ATTENTION_PAGED_DECODE_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention {

// Device memory of one call; rows = rows_per_request * bucket.requests. What is on the device may change from replay to
// replay; addresses may not. A query that attends nothing gives zeros and -inf, sinks or not.
struct DecodeTensors {
  DeviceSpan<const std::byte> q = {};         // [rows, q_len, q_heads, head_dim] in dtype
  DeviceSpan<const std::byte> k = {};         // [num_pages, …] in kv_dtype and layout
  DeviceSpan<const std::byte> v = {};         // the same shape
  DeviceSpan<std::byte> out = {};             // [rows, q_len, q_heads, head_dim] in dtype
  DeviceSpan<LseBase2> lse = {};              // [rows, q_len, q_heads]. May be empty
  DeviceSpan<const int32_t> kv_indptr = {};   // [rows + 1] pages; empty with a block table
  DeviceSpan<const int32_t> kv_indices = {};  // page numbers; empty with a block table
  DeviceSpan<const int32_t> lengths = {};     // [rows] tokens; empty: (kv_indptr[r + 1] - kv_indptr[r]) * page_size
  // [rows, block_table_stride] page numbers, instead of the two; needs lengths
  DeviceSpan<const int32_t> block_table = {};
  int64_t block_table_stride = 0;        // elements from row to row: the pages that a row can have
  DeviceSpan<const float> k_scale = {};  // [1], > 0, read when the kernel runs; empty: 1
  DeviceSpan<const float> v_scale = {};  // [1], likewise; empty: 1
  DeviceSpan<const float> sinks = {};    // [q_heads] logits, natural log; empty: none
};

// Binds to a plan and is called by any number of layers with that layer's KV.
// Work is clipped to the row's length and pages as the device sees them, and page numbers outside the pool are skipped:
// a wrong plan or table gives wrong numbers, never a wild read. Nothing outside the attended positions is used.
// On CUDA devices from 9.0 on the kernel begins while the one ahead of it ends (a programmatic edge in a graph). Until
// then it looks at the page table only, and at pages in the pool that this names; it uses and writes nothing.
class PagedDecode {
 public:
  // `plan` must outlive this. `scale` > 0; 1 / sqrt(head_dim) is usual. Sets kernel attributes on the plan's device.
  // INVALID_ARGUMENT: `scale`. UNIMPLEMENTED: built without CUDA, or a device whose blocks have less shared memory than
  // the kernel needs (16-bit dtypes: 160 KiB, with head_dim 256 227 KiB).
  static absl::StatusOr<std::unique_ptr<PagedDecode>> Create(const DecodePlan& plan, float scale);

  // Queues one kernel (kDevice), or decode and merge (kHost). Captureable: grids follow from `bucket` and the device;
  // allocates nothing, reads no host memory, does not block. Calls that share a plan must be ordered, as layers are.
  // kDevice: equal inputs give equal bits. INVALID_ARGUMENT: a tensor too small for `bucket` or misaligned (name, size,
  // need), or neither or both kinds of page table. NOT_FOUND: `bucket` has no plan.
  absl::Status Run(Stream& stream, const Extent& bucket, const DecodeTensors& tensors) const;

 private:
  PagedDecode(const DecodePlan& plan, float scale, bool begins_early)
      : plan_(plan), scale_(scale), begins_early_(begins_early) {}
  const DecodePlan& plan_;
  const float scale_;
  const bool begins_early_;
};

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_PAGED_DECODE_H_
