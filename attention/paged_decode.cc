#include "pristine/attention/paged_decode.h"

#include <cmath>

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
absl::Status CheckTensor(const std::string& plan, const char* what, const void* address, size_t bytes,
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

}  // namespace

absl::StatusOr<std::unique_ptr<PagedDecode>> PagedDecode::Create(const DecodePlan& plan, float scale) {
  if (!(scale > 0) || !std::isfinite(scale)) {
    return absl::InvalidArgumentError(
        absl::StrCat(plan.config_.name, ": scale is ", scale, ", must be finite and greater than 0"));
  }
  Device& device = plan.manager_.device();
  if (device.backend() == Backend::kCuda) {
    const DecodeVariant* variant = FindDecodeVariant(plan.config_.dtype, plan.config_.head_dim);
    if (variant->prepare == nullptr) {
      return absl::UnimplementedError(absl::StrCat(variant->decode.name, ": built without CUDA"));
    }
    // Attributes belong to the current device; queueing on one of its streams makes this device the current one.
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.CreateStream());
    PRISTINE_RETURN_IF_ERROR(
        stream->EnqueueCudaKernel(variant->decode.name, [variant](CUstream_st*) { return variant->prepare(); }));
  }
  return std::unique_ptr<PagedDecode>(new PagedDecode(plan, scale));
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
  const size_t element = SizeOf(config.dtype);
  const int32_t rows = config.rows_per_request * bucket.requests;
  const int64_t row_elements = int64_t{config.q_heads} * config.head_dim;
  const int64_t page_elements = int64_t{config.page_size} * config.kv_heads * config.head_dim;
  const int64_t num_pages = static_cast<int64_t>(tensors.k.bytes() / element) / page_elements;
  const auto check = [&](const char* what, auto span, size_t element_bytes, int64_t need, size_t alignment) {
    return CheckTensor(config.name, what, span.address(), span.bytes(), element_bytes, need, alignment);
  };
  PRISTINE_RETURN_IF_ERROR(check("q", tensors.q, element, rows * row_elements, kAlignment));
  PRISTINE_RETURN_IF_ERROR(check("k", tensors.k, element, page_elements, kAlignment));
  PRISTINE_RETURN_IF_ERROR(check("v", tensors.v, element, num_pages * page_elements, kAlignment));
  PRISTINE_RETURN_IF_ERROR(check("out", tensors.out, element, rows * row_elements, kAlignment));
  PRISTINE_RETURN_IF_ERROR(check("kv_indptr", tensors.kv_indptr, sizeof(int32_t), int64_t{rows} + 1, sizeof(int32_t)));
  PRISTINE_RETURN_IF_ERROR(check("kv_indices", tensors.kv_indices, sizeof(int32_t), 1, sizeof(int32_t)));
  if (!tensors.lengths.empty()) {
    PRISTINE_RETURN_IF_ERROR(check("lengths", tensors.lengths, sizeof(int32_t), rows, sizeof(int32_t)));
  }
  if (!tensors.lse.empty()) {
    PRISTINE_RETURN_IF_ERROR(
        check("lse", tensors.lse, sizeof(LseBase2), int64_t{rows} * config.q_heads, sizeof(float)));
  }

  const DecodeVariant* variant = FindDecodeVariant(config.dtype, config.head_dim);
  PRISTINE_RETURN_IF_ERROR(Launch(stream, variant->decode,
                                  PagedDecodeParams{.q = tensors.q.address(),
                                                    .k = tensors.k.address(),
                                                    .v = tensors.v.address(),
                                                    .partial_out = plan_.partial_out_.live.address(),
                                                    .partial_lse = plan_.partial_lse_.live.address(),
                                                    .plan = workspace->values.live.address(),
                                                    .kv_indptr = tensors.kv_indptr.address(),
                                                    .kv_indices = tensors.kv_indices.address(),
                                                    .lengths = tensors.lengths.address(),
                                                    .kv_indices_size = static_cast<int64_t>(tensors.kv_indices.size()),
                                                    .num_pages = num_pages,
                                                    .rows = rows,
                                                    .max_items = workspace->max_items,
                                                    .q_heads = config.q_heads,
                                                    .kv_heads = config.kv_heads,
                                                    .head_dim = config.head_dim,
                                                    .page_size = config.page_size,
                                                    .window = config.window,
                                                    .scale_log2 = scale_ * kLog2E}));
  return Launch(stream, variant->merge,
                MergeStatesParams{.partial_out = plan_.partial_out_.live.address(),
                                  .partial_lse = plan_.partial_lse_.live.address(),
                                  .plan = workspace->values.live.address(),
                                  .out = tensors.out.address(),
                                  .lse = tensors.lse.address(),
                                  .rows = rows,
                                  .max_items = workspace->max_items,
                                  .q_heads = config.q_heads,
                                  .head_dim = config.head_dim});
}

}  // namespace pristine::attention
