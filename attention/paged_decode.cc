#include "pristine/attention/paged_decode.h"

#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "attention/kernels/merge_states.h"
#include "attention/kernels/paged_decode.h"
#include "attention/variants.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr size_t kAlignment = 16;  // of vector loads

// `need` in elements of `element_bytes`.
absl::Status CheckBytes(const std::string& plan, const char* what, const void* address, size_t bytes,
                        size_t element_bytes, int64_t need, size_t alignment) {
  if (static_cast<int64_t>(bytes / element_bytes) < need) {
    return absl::InvalidArgumentError(
        absl::StrCat(plan, ": ", what, " has ", bytes / element_bytes, " elements, needs ", need));
  }
  if (need > 0 && (address == nullptr || reinterpret_cast<uintptr_t>(address) % alignment != 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat(plan, ": ", what, " must be aligned to ", alignment, " bytes and not null"));
  }
  return absl::OkStatus();
}

template <class Span>
absl::Status Check(const DecodePlanConfig& config, const char* what, const Span& span, size_t element_bytes,
                   int64_t need, size_t alignment) {
  return CheckBytes(config.name, what, span.address(), span.bytes(), element_bytes, need, alignment);
}

// So that no row makes the count of all tiles overflow; DecodePlan::Create has seen that max_row_tokens fit.
int32_t MostTiles(const DecodePlanConfig& config, int32_t rows) {
  const int64_t units = DecodeUnits(config.kv_heads, config.head_dim, config.q_heads / config.kv_heads * config.q_len);
  return static_cast<int32_t>(std::numeric_limits<int32_t>::max() / (units * rows));
}

// One of the two kinds of page table, with lengths where it needs them.
absl::Status CheckPageTable(const DecodePlanConfig& config, int32_t rows, const DecodeTensors& tensors) {
  if (!tensors.lengths.empty()) {
    PRISTINE_RETURN_IF_ERROR(Check(config, "lengths", tensors.lengths, sizeof(int32_t), rows, sizeof(int32_t)));
  }
  if (tensors.block_table.empty()) {
    PRISTINE_RETURN_IF_ERROR(
        Check(config, "kv_indptr", tensors.kv_indptr, sizeof(int32_t), int64_t{rows} + 1, sizeof(int32_t)));
    return Check(config, "kv_indices", tensors.kv_indices, sizeof(int32_t), 1, sizeof(int32_t));
  }
  if (!tensors.kv_indptr.empty() || !tensors.kv_indices.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        config.name, ": block_table and kv_indptr or kv_indices are given, must be one kind of page table"));
  }
  if (tensors.lengths.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": block_table is given without lengths"));
  }
  if (tensors.block_table_stride < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.name, ": block_table_stride is ", tensors.block_table_stride, ", must be at least 1"));
  }
  const int64_t most = static_cast<int64_t>(tensors.block_table.size()) / rows;
  if (tensors.block_table_stride > most) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": block_table has ", tensors.block_table.size(),
                                                   " elements, which is ", most, " for each of ", rows,
                                                   " rows; block_table_stride is ", tensors.block_table_stride));
  }
  return Check(config, "block_table", tensors.block_table, sizeof(int32_t), 1, sizeof(int32_t));
}

// The KV cache as kernels see it.
absl::Status ViewOf(const DecodePlanConfig& config, int32_t rows, const DecodeTensors& tensors, PagedKvView& view) {
  const size_t element = SizeOf(*config.kv_dtype);
  const int64_t page_elements = int64_t{config.page_size} * config.kv_heads * config.head_dim;
  PRISTINE_RETURN_IF_ERROR(Check(config, "k", tensors.k, element, page_elements, kAlignment));
  const int64_t num_pages = static_cast<int64_t>(tensors.k.bytes() / element) / page_elements;
  PRISTINE_RETURN_IF_ERROR(Check(config, "v", tensors.v, element, num_pages * page_elements, kAlignment));
  PRISTINE_RETURN_IF_ERROR(CheckPageTable(config, rows, tensors));
  if (!tensors.k_scale.empty()) {
    PRISTINE_RETURN_IF_ERROR(Check(config, "k_scale", tensors.k_scale, sizeof(float), 1, sizeof(float)));
  }
  if (!tensors.v_scale.empty()) {
    PRISTINE_RETURN_IF_ERROR(Check(config, "v_scale", tensors.v_scale, sizeof(float), 1, sizeof(float)));
  }
  const bool table = !tensors.block_table.empty();
  const bool tokens_first = config.layout == KvLayout::kNHD;
  view = {.k = tensors.k.address(),
          .v = tensors.v.address(),
          .k_scale = tensors.k_scale.address(),
          .v_scale = tensors.v_scale.address(),
          .page_stride = page_elements,
          .token_stride = tokens_first ? int64_t{config.kv_heads} * config.head_dim : int64_t{config.head_dim},
          .head_stride = tokens_first ? int64_t{config.head_dim} : int64_t{config.page_size} * config.head_dim,
          .kv_indptr = tensors.kv_indptr.address(),
          .pages = table ? tensors.block_table.address() : tensors.kv_indices.address(),
          .pages_size = static_cast<int64_t>(table ? tensors.block_table.size() : tensors.kv_indices.size()),
          .table_stride = table ? tensors.block_table_stride : 0,
          .lengths = tensors.lengths.address(),
          .num_pages = num_pages,
          .page_size = config.page_size,
          .kv_heads = config.kv_heads};
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<PagedDecode>> PagedDecode::Create(const DecodePlan& plan, float scale) {
  if (!(scale > 0) || !std::isfinite(scale)) {
    return absl::InvalidArgumentError(
        absl::StrCat(plan.config_.name, ": scale is ", scale, ", must be finite and greater than 0"));
  }
  Device& device = plan.manager_.device();
  bool begins_early = false;
  if (device.backend() == Backend::kCuda) {
    const DecodeVariant* variant = FindDecodeVariant(plan.config_.dtype, *plan.config_.kv_dtype, plan.config_.head_dim);
    if (variant->prepare == nullptr) {
      return absl::UnimplementedError(absl::StrCat(variant->decode.name, ": built without CUDA"));
    }
    if (static_cast<size_t>(variant->shared_bytes) > device.shared_bytes_per_block()) {
      return absl::UnimplementedError(absl::StrCat(variant->decode.name, ": ", device.name(), " has ",
                                                   device.shared_bytes_per_block(),
                                                   " bytes of shared memory per block, needs ", variant->shared_bytes));
    }
    // Attributes belong to the current device; queueing on one of its streams makes this device the current one.
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.CreateStream());
    PRISTINE_RETURN_IF_ERROR(
        stream->EnqueueCudaKernel(variant->decode.name, [&](CUstream_st*) { return variant->prepare(&begins_early); }));
  }
  return std::unique_ptr<PagedDecode>(new PagedDecode(plan, scale, begins_early));
}

absl::Status PagedDecode::Run(Stream& stream, const Extent& bucket, const DecodeTensors& tensors) const {
  const DecodePlanConfig& config = plan_.config_;
  const DecodePlan::Workspace* workspace = plan_.Find(bucket);
  if (workspace == nullptr) {
    return absl::NotFoundError(absl::StrCat(config.name, ": no plan for bucket ", bucket.ToString()));
  }
  if (&stream.device() != &plan_.manager_.device()) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": the stream is of device ", stream.device().name(),
                                                   ", the plan of ", plan_.manager_.device().name()));
  }
  const int32_t rows = config.rows_per_request * bucket.requests;
  PagedKvView kv = {};
  PRISTINE_RETURN_IF_ERROR(ViewOf(config, rows, tensors, kv));
  const size_t element = SizeOf(config.dtype);
  const int64_t heads = int64_t{rows} * config.q_len * config.q_heads;
  PRISTINE_RETURN_IF_ERROR(Check(config, "q", tensors.q, element, heads * config.head_dim, kAlignment));
  PRISTINE_RETURN_IF_ERROR(Check(config, "out", tensors.out, element, heads * config.head_dim, kAlignment));
  if (!tensors.lse.empty()) {
    PRISTINE_RETURN_IF_ERROR(Check(config, "lse", tensors.lse, sizeof(LseBase2), heads, sizeof(float)));
  }
  if (!tensors.sinks.empty()) {
    PRISTINE_RETURN_IF_ERROR(
        Check(config, "sinks", tensors.sinks, sizeof(float), int64_t{config.q_heads}, sizeof(float)));
  }

  const DecodeVariant* variant = FindDecodeVariant(config.dtype, *config.kv_dtype, config.head_dim);
  const Kernel<PagedDecodeParams>& kernel = config.q_len == 1 ? variant->decode : variant->verify;
  PagedDecodeParams decode = {.q = tensors.q.address(),
                              .kv = kv,
                              .plan = nullptr,
                              .sinks = tensors.sinks.address(),
                              .out = tensors.out.address(),
                              .lse = tensors.lse.address(),
                              .partial_out = plan_.partial_out_.live.address(),
                              .partial_lse = plan_.partial_lse_.live.address(),
                              .counters = plan_.counters_.live.address(),
                              .rows = rows,
                              .q_len = config.q_len,
                              .q_heads = config.q_heads,
                              .head_dim = config.head_dim,
                              .max_items = 0,
                              .blocks = plan_.blocks_,
                              .most_tiles = MostTiles(config, rows),
                              .row_tokens = config.max_row_tokens,
                              .window = config.window,
                              .scale_log2 = scale_ * kLog2E,
                              .soft_cap = config.soft_cap,
                              .begins_early = begins_early_};
  if (config.scheduler == DecodeScheduler::kDevice) return Launch(stream, kernel, decode);

  decode.plan = workspace->values.live.address();
  decode.max_items = workspace->max_items;
  decode.sinks = nullptr;
  decode.out = nullptr;
  decode.lse = nullptr;
  PRISTINE_RETURN_IF_ERROR(Launch(stream, kernel, decode));
  return Launch(stream, variant->merge,
                MergeStatesParams{.partial_out = decode.partial_out,
                                  .partial_lse = decode.partial_lse,
                                  .plan = decode.plan,
                                  .sinks = tensors.sinks.address(),
                                  .out = tensors.out.address(),
                                  .lse = tensors.lse.address(),
                                  .rows = rows,
                                  .q_len = config.q_len,
                                  .max_items = workspace->max_items,
                                  .q_heads = config.q_heads,
                                  .head_dim = config.head_dim});
}

}  // namespace pristine::attention
