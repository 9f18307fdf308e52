// StepAttention: the attention of one forward mode over a StepMetadata, by whatever kernels Route says.
//
//   auto verify = StepAttention::Create(manager, metadata, {.name = "verify", .mode = ForwardMode::kTargetVerify,
//                                                           .route = {…, .q_len = 4}, .buckets = {{8, 32}}, …});
//   …in the captured body, for each layer:  (*verify)->Run(stream, bucket, {.q = …, .k = …, .v = …, .out = …});
//   …each step, after metadata.Refill(values):  (*verify)->Plan(bucket, values);
#ifndef PRISTINE_ATTENTION_STEP_ATTENTION_H_
#define PRISTINE_ATTENTION_STEP_ATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/attention/forward_mode.h"
#include "pristine/attention/paged_decode.h"
#include "pristine/attention/paged_prefill.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/attention/types.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention {

// What all layers that share it agree in.
struct StepAttentionConfig {
  std::string name = "attention";  // in messages, and prefix of the buffers' names
  ForwardMode mode = ForwardMode::kDecode;
  RouteConfig route;                 // page_size is the metadata's
  std::vector<Extent> buckets = {};  // of the mode's graphs; with a q_len, tokens = requests * q_len
  KvLayout layout = KvLayout::kNHD;  // of k and v
  int32_t window = 0;                // last positions that a query attends, its own included; 0: all
  float scale = 0;                   // of scores, > 0; 1 / sqrt(head_dim) is usual
  float soft_cap = 0;                // of scaled scores: s becomes soft_cap * tanh(s / soft_cap); 0: none
  DecodeScheduler scheduler = DecodeScheduler::kDevice;  // where the decode kernels run
};

// Device memory of one call; `tokens` is the bucket's. What is on the device may change from replay to replay;
// addresses may not. Tokens behind the step's real ones, and those that attend nothing, sinks or not: zeros and -inf.
struct StepAttentionTensors {
  DeviceSpan<const std::byte> q = {};    // [tokens, q_heads, head_dim] in route.dtype
  DeviceSpan<const std::byte> k = {};    // [num_pages, …] in route.kv_dtype and layout
  DeviceSpan<const std::byte> v = {};    // the same shape
  DeviceSpan<std::byte> out = {};        // [tokens, q_heads, head_dim] in route.dtype
  DeviceSpan<LseBase2> lse = {};         // [tokens, q_heads]. May be empty
  DeviceSpan<const float> k_scale = {};  // [1], > 0, read when the kernel runs; empty: 1
  DeviceSpan<const float> v_scale = {};  // [1], likewise; empty: 1
  DeviceSpan<const float> sinks = {};    // [q_heads] logits, natural log; empty: none
};

// Reads of the metadata: lengths; kv_indptr and kv_indices, or the block table where it has one; qo_indptr where
// requests may differ. Not thread-safe.
class StepAttention {
 public:
  // Registers what the kernels need with `manager`, whose device Route is asked about. `manager` and `metadata` must
  // outlive this. Codes of Route; of DecodePlan, PagedDecode and PagedPrefill. INVALID_ARGUMENT: a bucket that is not
  // requests * q_len; the context kernels without StepMetadataConfig::ragged; another page_size than the metadata's.
  static absl::StatusOr<std::unique_ptr<StepAttention>> Create(BufferManager& manager, const StepMetadata& metadata,
                                                               const StepAttentionConfig& config);

  // For the manager's open step, of `bucket`, after its metadata's Refill with the same `values`: plans, where the
  // kernels are planned for on the host. Does not allocate or block. INVALID_ARGUMENT: a request with another number of
  // tokens than the graph's q_len, which the decode kernels would run all the same, over the tokens of its neighbours
  // (sglang PR #24856); the message says which and what to do. Codes of DecodePlan::Plan.
  absl::Status Plan(const Extent& bucket, const StepValues& values);

  // Queues the kernels of one layer; nothing in an idle step. Captureable: grids follow from `bucket`; allocates
  // nothing and does not block. Codes of PagedDecode::Run and PagedPrefill::Run.
  absl::Status Run(Stream& stream, const Extent& bucket, const StepAttentionTensors& tensors) const;

  KernelFamily family() const { return family_; }
  const StepAttentionConfig& config() const { return config_; }

 private:
  StepAttention(const StepMetadata& metadata, const StepAttentionConfig& config, KernelFamily family)
      : metadata_(metadata), config_(config), family_(family) {}
  absl::Status CreateDecode(BufferManager& manager);
  absl::Status CreateContext(BufferManager& manager);

  const StepMetadata& metadata_;
  const StepAttentionConfig config_;
  const KernelFamily family_;
  std::unique_ptr<DecodePlan> plan_;  // of decode_
  // At most one of the two is there; neither in idle steps.
  std::unique_ptr<PagedDecode> decode_;
  std::unique_ptr<PagedPrefill> context_;
};

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_STEP_ATTENTION_H_
