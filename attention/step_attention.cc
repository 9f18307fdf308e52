#include "pristine/attention/step_attention.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/attention/device_caps.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention {

absl::StatusOr<std::unique_ptr<StepAttention>> StepAttention::Create(BufferManager& manager,
                                                                     const StepMetadata& metadata,
                                                                     const StepAttentionConfig& config) {
  PRISTINE_ASSIGN_OR_RETURN(const KernelFamily family, Route(config.mode, CapsOf(manager.device()), config.route));
  std::unique_ptr<StepAttention> attention(new StepAttention(metadata, config, family));
  if (family == KernelFamily::kNone) return attention;
  if (config.route.page_size != metadata.config().page_size) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": page_size is ", config.route.page_size,
                                                   ", must be that of ", metadata.config().name, ", ",
                                                   metadata.config().page_size));
  }
  const int32_t q_len = config.route.q_len;
  for (const Extent& bucket : config.buckets) {
    if (q_len > 0 && bucket.tokens != int64_t{bucket.requests} * q_len) {
      return absl::InvalidArgumentError(absl::StrCat(config.name, ": bucket is ", bucket.ToString(),
                                                     ", must have q_len = ", q_len, " tokens for each request"));
    }
  }
  RegistrationScope registration(manager);
  PRISTINE_RETURN_IF_ERROR(family == KernelFamily::kDecode ? attention->CreateDecode(manager)
                                                           : attention->CreateContext(manager));
  registration.Keep();
  return attention;
}

absl::Status StepAttention::CreateDecode(BufferManager& manager) {
  const RouteConfig& route = config_.route;
  DecodePlanConfig plan;
  plan.name = config_.name;
  plan.buckets = config_.buckets;
  plan.q_len = route.q_len;
  plan.q_heads = route.q_heads;
  plan.kv_heads = route.kv_heads;
  plan.head_dim = route.head_dim;
  plan.dtype = route.dtype;
  plan.kv_dtype = route.kv_dtype;
  plan.layout = config_.layout;
  plan.page_size = route.page_size;
  plan.window = config_.window;
  plan.soft_cap = config_.soft_cap;
  plan.max_row_tokens = metadata_.config().max_length;
  plan.worst_row_tokens = metadata_.config().worst_length;
  plan.derived_from = {metadata_.lengths().id};
  plan.scheduler = config_.scheduler;
  PRISTINE_ASSIGN_OR_RETURN(plan_, DecodePlan::Create(manager, plan));
  PRISTINE_ASSIGN_OR_RETURN(decode_, PagedDecode::Create(*plan_, config_.scale));
  return absl::OkStatus();
}

absl::Status StepAttention::CreateContext(BufferManager& manager) {
  const RouteConfig& route = config_.route;
  if (!metadata_.config().ragged) {
    return absl::InvalidArgumentError(absl::StrCat(config_.name, ": ", ToString(config_.mode), " needs qo_indptr, and ",
                                                   metadata_.config().name, " has none; must be created with ragged"));
  }
  PagedPrefillConfig context;
  context.name = config_.name;
  context.q_heads = route.q_heads;
  context.kv_heads = route.kv_heads;
  context.head_dim = route.head_dim;
  context.dtype = route.dtype;
  context.kv_dtype = route.kv_dtype;
  context.layout = config_.layout;
  context.page_size = route.page_size;
  context.window = config_.window;
  context.scale = config_.scale;
  context.soft_cap = config_.soft_cap;
  PRISTINE_ASSIGN_OR_RETURN(context_, PagedPrefill::Create(manager.device(), context));
  return absl::OkStatus();
}

absl::Status StepAttention::Plan(const Extent& bucket, const StepValues& values) {
  const int64_t q_len = config_.route.q_len;
  const int64_t requests = static_cast<int64_t>(values.lengths.size());
  for (int64_t i = 0; q_len > 0 && i < requests; ++i) {
    // Without qo_indptr the slots say how many tokens there are.
    const bool indexed = static_cast<int64_t>(values.qo_indptr.size()) > i + 1;
    const int64_t first = indexed ? values.qo_indptr[i] : i * q_len;
    const int64_t next = indexed ? values.qo_indptr[i + 1] : i + 1 < requests ? first + q_len : values.slots.size();
    if (next - first == q_len) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        config_.name, ": request ", i, " has ", next - first, " query tokens; ",
        family_ == KernelFamily::kDecode
            ? absl::StrCat("the decode kernels of a ", ToString(config_.mode), " graph run ", q_len,
                           " for every request, a constant of its capture, and would read its neighbours' (sglang PR "
                           "#24856)")
            : absl::StrCat("route.q_len says that a ", ToString(config_.mode), " graph has ", q_len,
                           " for every request"),
        "; instead: a graph of a mode whose requests may differ, q_len 0 of extend or draft_extend"));
  }
  return plan_ == nullptr ? absl::OkStatus() : plan_->Plan(bucket, values.lengths);
}

absl::Status StepAttention::Run(Stream& stream, const Extent& bucket, const StepAttentionTensors& tensors) const {
  if (decode_ != nullptr) {
    DecodeTensors decode;
    decode.q = tensors.q;
    decode.k = tensors.k;
    decode.v = tensors.v;
    decode.out = tensors.out;
    decode.lse = tensors.lse;
    decode.k_scale = tensors.k_scale;
    decode.v_scale = tensors.v_scale;
    decode.sinks = tensors.sinks;
    decode.kv_indptr = metadata_.kv_indptr().live;  // these two, or the table, are empty
    decode.kv_indices = metadata_.kv_indices().live;
    decode.block_table = metadata_.block_table().live;
    decode.block_table_stride = metadata_.config().block_table_width;
    decode.lengths = metadata_.lengths().live;
    return decode_->Run(stream, bucket, decode);
  }
  if (context_ == nullptr) return absl::OkStatus();
  PrefillTensors context;
  context.q = tensors.q;
  context.k = tensors.k;
  context.v = tensors.v;
  context.out = tensors.out;
  context.lse = tensors.lse;
  context.k_scale = tensors.k_scale;
  context.v_scale = tensors.v_scale;
  context.sinks = tensors.sinks;
  context.qo_indptr = metadata_.qo_indptr().live;
  context.kv_indptr = metadata_.kv_indptr().live;
  context.kv_indices = metadata_.kv_indices().live;
  context.block_table = metadata_.block_table().live;
  context.table_width = metadata_.config().block_table_width;
  context.lengths = metadata_.lengths().live;
  return context_->Run(stream, bucket, context);
}

}  // namespace pristine::attention
