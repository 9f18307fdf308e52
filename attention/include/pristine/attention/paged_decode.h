// PagedDecode: one query token per row against a paged KV cache.
//   out[r, h] = sum_p softmax_p(scale * q[r, h] . k[p, h / group]) v[p, h / group],  lse[r, h] = log2 sum_p exp(...)
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

// Device memory of one call; rows = rows_per_request * bucket.requests. dtype is the plan's for all but lse.
struct DecodeTensors {
  DeviceSpan<const std::byte> q = {};         // [rows, q_heads, head_dim]
  DeviceSpan<const std::byte> k = {};         // [num_pages, page_size, kv_heads, head_dim] (NHD)
  DeviceSpan<const std::byte> v = {};         // the same shape
  DeviceSpan<std::byte> out = {};             // [rows, q_heads, head_dim]; rows of length 0: zeros
  DeviceSpan<LseBase2> lse = {};              // [rows, q_heads]; rows of length 0: -inf. May be empty
  DeviceSpan<const int32_t> kv_indptr = {};   // [rows + 1] pages
  DeviceSpan<const int32_t> kv_indices = {};  // page numbers
  DeviceSpan<const int32_t> lengths = {};     // [rows] tokens; empty: (kv_indptr[r + 1] - kv_indptr[r]) * page_size
};

// Binds to a plan and is called by any number of layers with that layer's KV.
// Each work item is clipped to the row's length and pages as the device sees them, and page numbers outside the pool
// are skipped: a wrong plan gives wrong numbers, never a wild read.
class PagedDecode {
 public:
  // `plan` must outlive this. `scale` > 0; 1 / sqrt(head_dim) is usual. Sets kernel attributes on the plan's device.
  static absl::StatusOr<std::unique_ptr<PagedDecode>> Create(const DecodePlan& plan, float scale);

  // Queues two kernels, decode and merge. Captureable: grids follow from `bucket`; allocates nothing, reads no host
  // memory, does not block. INVALID_ARGUMENT: a tensor too small for `bucket` (name, size, need). NOT_FOUND: `bucket`
  // has no plan.
  absl::Status Run(Stream& stream, const Extent& bucket, const DecodeTensors& tensors) const;

 private:
  PagedDecode(const DecodePlan& plan, float scale) : plan_(plan), scale_(scale) {}
  const DecodePlan& plan_;
  const float scale_;
};

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_PAGED_DECODE_H_
