#include "examples/replay_driver/spec_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/model_kernels.h"
#include "pristine/attention/append_kv.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {
namespace {

int32_t MaxLength(const SpecConfig& config) { return config.model.pool_pages * config.model.page_size; }
// Captures and warm-ups need no long requests, grids do not depend on them; but whole windows.
int32_t WorstLength(const SpecConfig& config) {
  return std::min(MaxLength(config), std::max(config.model.window, config.draft_tokens + 1));
}
int32_t MaxStepPages(const SpecConfig& config) {
  const int32_t worst = (WorstLength(config) - 1) / config.model.page_size + 1;
  return std::max(config.model.pool_pages, config.model.max_batch() * worst);
}

attention::StepAttentionConfig AttentionConfig(const SpecConfig& config, SpecPhase phase) {
  using attention::ForwardMode;
  constexpr ForwardMode kModes[] = {ForwardMode::kDecode, ForwardMode::kTargetVerify, ForwardMode::kDraftExtend};
  const bool ragged = phase == SpecPhase::kDraftExtend && config.draft_extend == DraftExtend::kRagged;
  attention::StepAttentionConfig attention;
  attention.mode = kModes[static_cast<size_t>(phase)];
  attention.name = ToString(attention.mode);
  attention.route = {.dtype = config.model.dtype,
                     .kv_dtype = config.model.dtype,
                     .q_heads = config.model.heads,
                     .kv_heads = config.model.kv_heads,
                     .head_dim = config.model.head_dim,
                     .page_size = config.model.page_size,
                     .q_len = ragged ? 0 : config.max_q_len(phase),
                     .decode_draft_extend = config.draft_extend == DraftExtend::kFixedDecode};
  attention.buckets = config.buckets(phase);
  attention.scale = 1.0f / std::sqrt(static_cast<float>(config.model.head_dim));
  attention.scheduler = config.model.scheduler;
  return attention;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SpecModel>> SpecModel::Create(Device& device, Stream& stream, const SpecConfig& config,
                                                             const KvPool& pool, const ManagerOptions& options) {
  std::unique_ptr<SpecModel> model(new SpecModel(config, pool));
  PRISTINE_ASSIGN_OR_RETURN(model->manager_, BufferManager::Create(device, options));
  if (config.model.gdn.layers > 0) {
    PRISTINE_ASSIGN_OR_RETURN(model->gdn_, GdnLayers::Create(device, config.model));
  }
  PRISTINE_RETURN_IF_ERROR(model->RegisterAll(options.check != ManagerOptions::Check::kOff));
  PRISTINE_RETURN_IF_ERROR(model->AllocateTensors(device, stream));
  PRISTINE_RETURN_IF_ERROR(model->manager_->Seal());
  return model;
}

int64_t SpecModel::Bytes(const SpecConfig& config, int staging_slots) {
  const int64_t refilled = int64_t{MaxStepPages(config)} + 8 * int64_t{config.max_tokens()};  // values of 4 bytes
  const int64_t rows = int64_t{config.model.layers} + 4;
  const int64_t gdn = config.model.gdn.layers > 0 ? GdnLayers::Bytes(config.model) : 0;
  return gdn + 4 * (6 + 2 * int64_t{staging_slots}) * refilled +
         rows * static_cast<int64_t>(config.model.q_bytes(config.max_tokens()));
}

absl::Status SpecModel::RegisterAll(bool checked) {
  const int32_t max_batch = config_.model.max_batch();
  attention::StepMetadataConfig metadata;
  metadata.max_requests = max_batch;
  metadata.max_tokens = config_.max_tokens();
  metadata.page_size = config_.model.page_size;
  metadata.num_pages = config_.model.pool_pages + 1;
  metadata.max_step_pages = MaxStepPages(config_);
  metadata.max_length = MaxLength(config_);
  metadata.worst_length = WorstLength(config_);
  metadata.ragged = true;
  if (gdn_ != nullptr) metadata.state_slots = GdnLayers::PoolSlots(config_.model);
  PRISTINE_ASSIGN_OR_RETURN(metadata_, attention::StepMetadata::Create(*manager_, metadata));

  const auto add = [this](Buffer<int32_t>& buffer, const char* name, Kind kind, Axis axis, int32_t count,
                          int32_t original, int32_t limit) -> absl::Status {
    BufferSpec spec;
    spec.name = name;
    spec.role = Role::kRefilled;
    spec.kind = kind;
    spec.axis = axis;
    spec.limit = limit;
    PRISTINE_ASSIGN_OR_RETURN(
        buffer, manager_->Register<int32_t>(spec, std::vector<int32_t>(static_cast<size_t>(count), original)));
    return absl::OkStatus();
  };
  constexpr int32_t kAny = std::numeric_limits<int32_t>::max();
  // A request's id selects what it computes with, as a state slot would: padding is -1.
  PRISTINE_RETURN_IF_ERROR(
      add(token_requests_, "token_requests", Kind::kSlot, Axis::Tokens(), config_.max_tokens(), -1, kAny));
  PRISTINE_RETURN_IF_ERROR(add(drafts_, "drafts", Kind::kPosition, Axis::Tokens(), config_.max_tokens(), 0, kAny));
  PRISTINE_RETURN_IF_ERROR(add(rejected_, "rejected_slots", Kind::kSlot, Axis::Requests(config_.draft_tokens),
                               max_batch * config_.draft_tokens, -1, static_cast<int32_t>(config_.model.pool_slots())));

  if (gdn_ != nullptr) {
    PRISTINE_RETURN_IF_ERROR(add(accepted_, "accepted", Kind::kLength, Axis::Requests(), max_batch,
                                 config_.draft_tokens, config_.draft_tokens));
    if (checked) {
      PRISTINE_RETURN_IF_ERROR(gdn_->pool().Protect(*manager_, "gdn_states"));
    }
  }

  const auto attend = [this](std::unique_ptr<attention::StepAttention>& attention,
                             const attention::StepAttentionConfig& config) -> absl::Status {
    PRISTINE_ASSIGN_OR_RETURN(attention, attention::StepAttention::Create(*manager_, *metadata_, config));
    return absl::OkStatus();
  };
  for (const SpecPhase phase : kSpecPhases) {
    PRISTINE_RETURN_IF_ERROR(attend(attention_[static_cast<size_t>(phase)], AttentionConfig(config_, phase)));
  }
  attention::StepAttentionConfig window = AttentionConfig(config_, SpecPhase::kVerify);
  window.name += "_window";
  window.window = config_.model.window;
  return attend(verify_window_, window);
}

absl::Status SpecModel::ProtectPool() {
  for (int32_t layer = 0; layer < config_.model.layers; ++layer) {
    const size_t element = attention::SizeOf(config_.model.dtype);
    PRISTINE_RETURN_IF_ERROR(manager_->Protect(absl::StrCat("kv_pool.k", layer), pool_.k(layer), element));
    PRISTINE_RETURN_IF_ERROR(manager_->Protect(absl::StrCat("kv_pool.v", layer), pool_.v(layer), element));
  }
  return absl::OkStatus();
}

absl::Status SpecModel::AllocateTensors(Device& device, Stream& stream) {
  const ModelConfig& model = config_.model;
  const size_t q_bytes = model.q_bytes(config_.max_tokens());
  const size_t kv_bytes = q_bytes / model.heads * model.kv_heads;
  PRISTINE_ASSIGN_OR_RETURN(q_, device.Allocate(q_bytes, "q"));
  PRISTINE_ASSIGN_OR_RETURN(k_new_, device.Allocate(kv_bytes, "k_new"));
  PRISTINE_ASSIGN_OR_RETURN(v_new_, device.Allocate(kv_bytes, "v_new"));
  PRISTINE_ASSIGN_OR_RETURN(nothing_, device.Allocate(kv_bytes, "nothing"));
  PRISTINE_RETURN_IF_ERROR(stream.Fill(nothing_.As<std::byte>(), std::byte{0xff}));
  for (int32_t layer = 0; layer < model.layers; ++layer) {
    Output& output = outputs_.emplace_back();
    PRISTINE_ASSIGN_OR_RETURN(output.out, device.Allocate(q_bytes, "out"));
    PRISTINE_ASSIGN_OR_RETURN(output.lse,
                              device.Allocate(sizeof(attention::LseBase2) * config_.max_tokens() * model.heads, "lse"));
  }
  return stream.Synchronize();
}

std::vector<int32_t> SpecModel::LayersOf(SpecPhase phase) const {
  if (phase != SpecPhase::kVerify) return {config_.draft_layer()};
  std::vector<int32_t> layers;
  for (int32_t layer = 0; layer < config_.draft_layer(); ++layer) layers.push_back(layer);
  return layers;
}

absl::Status SpecModel::Begin(const SpecInputs& inputs) {
  absl::Status begun = manager_->BeginStep(inputs.bucket, inputs.extent);
  if (absl::IsResourceExhausted(begun)) {
    PRISTINE_RETURN_IF_ERROR(manager_->WaitForSlot());
    begun = manager_->BeginStep(inputs.bucket, inputs.extent);
  }
  PRISTINE_RETURN_IF_ERROR(begun);
  const attention::StepValues values = {
      .lengths = inputs.lengths,
      .kv_indptr = inputs.kv_indptr,
      .kv_indices = inputs.kv_indices,
      .slots = inputs.slots,
      .positions = inputs.positions,
      .qo_indptr = inputs.qo_indptr,
      .state_slots = gdn_ == nullptr ? absl::Span<const int32_t>() : inputs.state_slots};
  PRISTINE_RETURN_IF_ERROR(metadata_->Refill(values));
  PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(token_requests_, inputs.token_requests));
  PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(drafts_, inputs.drafts));
  PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(rejected_, inputs.rejected));
  if (gdn_ != nullptr) {
    PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(accepted_, inputs.accepted));
  }
  PRISTINE_RETURN_IF_ERROR(attention_[static_cast<size_t>(inputs.phase)]->Plan(inputs.bucket, values));
  return inputs.phase == SpecPhase::kVerify ? verify_window_->Plan(inputs.bucket, values) : absl::OkStatus();
}

absl::Status SpecModel::Append(Stream& stream, int32_t layer, int32_t tokens, const DeviceBuffer& k,
                               const DeviceBuffer& v, const Buffer<int32_t>& slots) {
  attention::AppendKvTensors append;
  append.dtype = config_.model.dtype;
  append.kv_heads = config_.model.kv_heads;
  append.head_dim = config_.model.head_dim;
  append.k_new = k.As<const std::byte>();
  append.v_new = v.As<const std::byte>();
  append.slots = slots.live;
  append.k = pool_.k(layer);
  append.v = pool_.v(layer);
  return attention::AppendKv(stream, tokens, append);
}

absl::Status SpecModel::RunLayer(SpecPhase phase, int32_t layer, Stream& stream, const Extent& bucket) {
  const ModelInputsParams params = {.seed = config_.model.seed,
                                    .layer = layer,
                                    .rows = bucket.tokens,
                                    .heads = config_.model.heads,
                                    .kv_heads = config_.model.kv_heads,
                                    .head_dim = config_.model.head_dim,
                                    .dtype = config_.model.dtype,
                                    .requests = token_requests_.live.address(),
                                    .positions = metadata_->positions().live.address(),
                                    .drafts = drafts_.live.address(),
                                    .q = q_.As<std::byte>().address(),
                                    .k_new = k_new_.As<std::byte>().address(),
                                    .v_new = v_new_.As<std::byte>().address()};
  PRISTINE_RETURN_IF_ERROR(Launch(stream, kModelInputs, params));
  PRISTINE_RETURN_IF_ERROR(Append(stream, layer, bucket.tokens, k_new_, v_new_, metadata_->slots()));
  const bool window = phase == SpecPhase::kVerify && config_.is_window(layer);
  const attention::StepAttention& attention = window ? *verify_window_ : *attention_[static_cast<size_t>(phase)];
  return attention.Run(
      stream, bucket,
      {.q = q_.As<const std::byte>(), .k = pool_.k(layer), .v = pool_.v(layer), .out = out(layer), .lse = lse(layer)});
}

absl::Status SpecModel::Body(SpecPhase phase, Stream& stream, const Extent& bucket) {
  for (const int32_t layer : LayersOf(phase)) {
    for (int32_t i = 0; gdn_ != nullptr && phase == SpecPhase::kVerify && i < kGdnPerAttention; ++i) {
      PRISTINE_RETURN_IF_ERROR(gdn_->Run(stream, bucket.requests, layer * kGdnPerAttention + i,
                                         {.requests = token_requests_.live,
                                          .positions = metadata_->positions().live,
                                          .drafts = drafts_.live,
                                          .slots = metadata_->state_slots().live}));
    }
    PRISTINE_RETURN_IF_ERROR(RunLayer(phase, layer, stream, bucket));
  }
  if (phase != SpecPhase::kDraftExtend) return absl::OkStatus();
  if (gdn_ != nullptr) {  // states roll nothing back: they take in what was accepted
    PRISTINE_RETURN_IF_ERROR(gdn_->Commit(stream, bucket.requests, metadata_->state_slots().live, accepted_.live));
  }
  // Rollback, of both models: NaN, so that whoever looks at a rejected token again is found out.
  const int32_t drafts = bucket.requests * config_.draft_tokens;
  for (int32_t layer = 0; layer < config_.model.layers; ++layer) {
    PRISTINE_RETURN_IF_ERROR(Append(stream, layer, drafts, nothing_, nothing_, rejected_));
  }
  return absl::OkStatus();
}

absl::Status SpecModel::RunEagerly(Stream& stream, const SpecInputs& inputs) {
  PRISTINE_RETURN_IF_ERROR(Begin(inputs));
  PRISTINE_RETURN_IF_ERROR(manager_->BeforeReplay(stream, inputs.bucket, inputs.extent));
  PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream, inputs.bucket));
  return Body(inputs.phase, stream, inputs.bucket);
}

}  // namespace pristine::replay_driver
