// PagedPrefill: causal attention of ragged queries over a paged KV cache, for extend, mixed and draft extend steps.
// Request r has qo_len_r = qo_indptr[r + 1] - qo_indptr[r] query tokens, the last of its length_r tokens in the cache:
//   query i stands at position c = length_r - qo_len_r + i and attends positions p in (c - window, c]
//   s_p = scale * k_scale * q[i, h] . k[p, h / group];  soft cap: s_p <- cap * tanh(s_p / cap)
//   out[i, h] = v_scale * sum_p exp(s_p) v[p, h / group] / Z,  lse[i, h] = log2 Z,  Z = exp(sinks[h]) + sum_p exp(s_p)
// (soft cap: Gemma 2, arXiv:2408.00118; sinks: gpt-oss, a logit without a value). A query that attends nothing gives
// zeros and -inf, sinks or not.
#ifndef PRISTINE_ATTENTION_PAGED_PREFILL_H_
#define PRISTINE_ATTENTION_PAGED_PREFILL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/extent.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention {

struct PrefillVariant;

// What all layers that share a PagedPrefill agree in.
struct PagedPrefillConfig {
  std::string name = "prefill";       // in messages
  int32_t q_heads = 0, kv_heads = 0;  // q_heads = group * kv_heads, group in [1, 32]; kv_heads at most 65535
  int32_t head_dim = 0;               // 64, 128 or 256
  DType dtype = DType::kFloat32;      // of q and out: float32, float16 or bfloat16
  DType kv_dtype = DType::kFloat32;   // of k and v: dtype, or float8_e4m3 beside float16 and bfloat16
  KvLayout layout = KvLayout::kNHD;   // of k and v
  int32_t page_size = 1;              // tokens
  int32_t window = 0;                 // last tokens attended, the query's own included; 0: all
  float scale = 0;                    // of scores, > 0; 1 / sqrt(head_dim) is usual
  float soft_cap = 0;                 // of scaled scores; 0: none
};

// Device memory of one call; {requests, tokens} is the bucket. Pages of a request: kv_indptr with kv_indices, or a
// block table with lengths.
struct PrefillTensors {
  DeviceSpan<const std::byte> q = {};          // [tokens, q_heads, head_dim]
  DeviceSpan<const std::byte> k = {};          // a pool of pages, as config.layout says
  DeviceSpan<const std::byte> v = {};          // the same shape
  DeviceSpan<std::byte> out = {};              // [tokens, q_heads, head_dim]; tokens behind qo_indptr's end: zeros
  DeviceSpan<LseBase2> lse = {};               // [tokens, q_heads]; tokens behind qo_indptr's end: -inf. May be empty
  DeviceSpan<const float> k_scale = {};        // [1], > 0, read when the kernel runs. May be empty: 1
  DeviceSpan<const float> v_scale = {};        // [1], likewise
  DeviceSpan<const float> sinks = {};          // [q_heads] natural-log logits. May be empty: none
  DeviceSpan<const int32_t> qo_indptr = {};    // [requests + 1] tokens
  DeviceSpan<const int32_t> kv_indptr = {};    // [requests + 1] pages; empty with a block table
  DeviceSpan<const int32_t> kv_indices = {};   // page numbers; empty with a block table
  DeviceSpan<const int32_t> block_table = {};  // [requests, table_width] page numbers; empty with kv_indptr
  int32_t table_width = 0;                     // pages; 0 with kv_indptr
  DeviceSpan<const int32_t> lengths = {};      // [requests] tokens, the queries' own included; with kv_indptr it may be
                                               // empty: (kv_indptr[r + 1] - kv_indptr[r]) * page_size
};

// Called by any number of layers with that layer's KV; thread-safe. Needs no plan and no workspace: the grid follows
// from the bucket, and each block finds its request in qo_indptr. Kernels clip qo_indptr to [0, tokens] and lengths to
// the pages there are, and skip page numbers outside the pool: a wrong array gives wrong numbers, never a wild access.
class PagedPrefill {
 public:
  // `device` must outlive this. Sets kernel attributes on it: call before any capture. INVALID_ARGUMENT: a value
  // outside the ranges above. UNIMPLEMENTED: no kernel for head_dim, dtype and kv_dtype (the message lists those there
  // are), built without CUDA, or a device whose blocks have less shared memory than the kernel needs.
  static absl::StatusOr<std::unique_ptr<PagedPrefill>> Create(Device& device, const PagedPrefillConfig& config);
  // For tests and benchmarks: `variant`, which must fit `config`, rather than the one that the device would get.
  static absl::StatusOr<std::unique_ptr<PagedPrefill>> Create(Device& device, const PagedPrefillConfig& config,
                                                              const PrefillVariant& variant);

  // Queues one kernel (none where bucket.tokens is 0). Captureable: allocates nothing, reads no host memory, does not
  // block. INVALID_ARGUMENT: a stream of another device; a bucket with tokens and no requests, or one where
  // (tokens + requests + 1) * q_heads is 2^31 or more; a tensor too small for `bucket` or not aligned (name, size,
  // need); both or neither kind of page table.
  absl::Status Run(Stream& stream, const Extent& bucket, const PrefillTensors& tensors) const;

  const PagedPrefillConfig& config() const { return config_; }
  // Of the captured graph's node.
  const char* kernel_name() const;

 private:
  PagedPrefill(Device& device, const PagedPrefillConfig& config, const PrefillVariant& variant)
      : device_(device), config_(config), variant_(variant) {}
  Device& device_;
  const PagedPrefillConfig config_;
  const PrefillVariant& variant_;
};

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_PAGED_PREFILL_H_
