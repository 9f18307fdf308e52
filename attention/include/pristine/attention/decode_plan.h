// DecodePlan: how a decode step's KV is cut up over the device's multiprocessors (split-KV), by the device itself or by
// the host.
#ifndef PRISTINE_ATTENTION_DECODE_PLAN_H_
#define PRISTINE_ATTENTION_DECODE_PLAN_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "pristine/attention/types.h"
#include "pristine/buffers/buffer_manager.h"

namespace pristine::attention {

// Who cuts the rows up. float32, on CUDA and under kDevice, is not cut: one block for each row and KV head, so few long
// rows want kHost.
enum class DecodeScheduler {
  kDevice,  // the decode kernel, from the lengths that it finds on the device: nothing to plan or refill
  kHost,    // DecodePlan::Plan, from host lengths: pure host arithmetic over memory that no captured kernel writes
};

// One plan kind: layers that agree in all of this share a plan.
struct DecodePlanConfig {
  std::string name = "plan";  // prefix of the buffers' names
  // Of the graphs that decode; at most 8192 rows each, 4096 with head_dim 256. kHost: a private workspace for each.
  std::vector<Extent> buckets = {};
  int32_t rows_per_request = 1;        // KV-head groups that count as requests of their own (sparse path)
  int32_t q_len = 1;                   // query tokens of each row, 1 to 16: the last ones of its length
  int32_t q_heads = 0, kv_heads = 0;   // of one row; q_heads % kv_heads == 0, at most 32 query heads per KV head
  int32_t head_dim = 0;                // 64 or 128; 256 too, but for float32
  DType dtype = DType::kFloat32;       // of q and out: float32, bfloat16 or float16
  std::optional<DType> kv_dtype = {};  // of K and V: dtype (nothing given), or kFloat8E4M3 with 16 bit dtypes
  KvLayout layout = KvLayout::kNHD;
  int32_t page_size = 1;               // tokens
  int32_t window = 0;                  // positions a query attends, its own included; 0: all
  float soft_cap = 0;                  // logits become soft_cap * tanh(logit / soft_cap); 0: they stay
  int32_t max_row_tokens = 0;          // R: kHost plans a longer row as R; kDevice is fast up to R
  int32_t worst_row_tokens = 0;        // kHost: what captures and warm-ups see for every row; 0: max_row_tokens
  std::vector<int> derived_from = {};  // kHost: ids of the manager's buffers that go with the lengths planned from
  DecodeScheduler scheduler = DecodeScheduler::kDevice;
};

// Item i of a row covers KV positions [begin, end) of that row, before clipping to the row's device length and window.
struct WorkItem {
  int32_t row, begin, end;
};

// The host's cut, without any device: deterministic in (config, bucket, multiprocessors, lengths).
// Every row of `bucket` is covered exactly once over its planned range; rows beyond lengths.size() and empty rows get
// no items. Never more than MaxItems(bucket) items. `items` has MaxItems(bucket) places, `item_indptr` rows + 1;
// returns how many items were written. INVALID_ARGUMENT: a negative length, in the words "kv_indptr falls from 36606 at
// 8 to 34891 at 9", where the values are the lengths' prefix sums: a decrease is the one thing that live values are
// refused for.
int32_t MaxItems(const DecodePlanConfig& config, const Extent& bucket, int multiprocessors);
absl::StatusOr<int32_t> PlanItems(const DecodePlanConfig& config, const Extent& bucket, int multiprocessors,
                                  absl::Span<const int32_t> lengths, absl::Span<WorkItem> items,
                                  absl::Span<int32_t> item_indptr);

// How many 4-byte values of scratch a plan registers, for those who budget memory.
int64_t ScratchValues(const DecodePlanConfig& config, int multiprocessors);

// Used by one thread at a time, as its manager.
class DecodePlan {
 public:
  // Registers the partial results that the wrappers of this plan share (kScratch), and what the scheduler needs. kHost:
  // one workspace per bucket (kRefilled, only for that bucket's graphs; its original is the worst-case plan). kDevice:
  // counters of who comes last (kRestored; each launch leaves them zero). `manager` must outlive this.
  // INVALID_ARGUMENT: sizes that do not fit together. UNIMPLEMENTED: dtypes or head_dim without a kernel, a group or
  // q_len beyond the kernels' limit; says what exists.
  static absl::StatusOr<std::unique_ptr<DecodePlan>> Create(BufferManager& manager, const DecodePlanConfig& config);

  // kHost: plans the manager's open step, which must be for `bucket`, and refills the bucket's workspace. kDevice: only
  // checks, so that an engine can call it either way. `lengths`: [rows_per_request * real requests] tokens. Does not
  // allocate or block. NOT_FOUND: not one of config.buckets. INVALID_ARGUMENT: a negative length (see PlanItems), or
  // too many rows. Codes of BufferManager::Refill.
  absl::Status Plan(const Extent& bucket, absl::Span<const int32_t> lengths);

  const DecodePlanConfig& config() const { return config_; }

 private:
  friend class PagedDecode;
  struct Workspace {
    Extent bucket;
    int32_t max_items = 0;
    Buffer<int32_t> values;  // [1 + (rows + 1) + 3 * max_items]: item count, item_indptr, items; kHost only
  };
  DecodePlan(BufferManager& manager, const DecodePlanConfig& config) : manager_(manager), config_(config) {}
  absl::Status RegisterHostPlans();
  absl::Status RegisterDeviceScratch();
  absl::Status RegisterPartials(int64_t count);  // of `count` heads
  const Workspace* Find(const Extent& bucket) const;
  // Plans into staging_; the result is valid until the next call.
  absl::StatusOr<absl::Span<const int32_t>> Fill(const Workspace& workspace, absl::Span<const int32_t> lengths);

  BufferManager& manager_;
  const DecodePlanConfig config_;
  std::vector<Workspace> workspaces_;  // constant after Create
  std::vector<int32_t> staging_;       // kHost: [largest workspace], so that Plan does not allocate
  int32_t blocks_ = 0;                 // of the decode kernel's grid; kDevice only
  Buffer<float> partial_out_;          // PagedDecodeParams::partial_out
  Buffer<float> partial_lse_;          // base 2
  Buffer<uint32_t> counters_;          // [2 * blocks]
};

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_DECODE_PLAN_H_
