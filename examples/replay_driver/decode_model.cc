#include "examples/replay_driver/decode_model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/model_kernels.h"
#include "pristine/attention/append_kv.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {
namespace {

// The longest request, in tokens.
int32_t MaxLength(const ModelConfig& config) {
  return std::max(config.pool_pages * config.page_size, attention::SparseRowBound(config.sparse));
}
// A step's pages: as many as the pool has, and in a capture as many as the worst case needs.
int32_t MaxStepPages(const ModelConfig& config) {
  const int32_t worst = (attention::SparseRowBound(config.sparse) - 1) / config.page_size + 1;
  return std::max(config.pool_pages, config.max_batch() * worst);
}

attention::DecodePlanConfig SparsePlan(const ModelConfig& config) {
  attention::DecodePlanConfig plan;
  plan.name = "sparse_plan";
  plan.buckets = config.buckets;
  plan.rows_per_request = config.sparse.groups;
  plan.q_heads = config.heads / config.sparse.groups;
  plan.kv_heads = config.kv_heads / config.sparse.groups;
  plan.head_dim = config.head_dim;
  plan.dtype = config.dtype;
  plan.page_size = 1;
  plan.max_row_tokens = attention::SparseRowBound(config.sparse);
  plan.scheduler = config.scheduler;
  return plan;
}

attention::DecodePlanConfig WindowPlan(const ModelConfig& config) {
  attention::DecodePlanConfig plan;
  plan.name = "window_plan";
  plan.buckets = config.buckets;
  plan.q_heads = config.heads;
  plan.kv_heads = config.kv_heads;
  plan.head_dim = config.head_dim;
  plan.dtype = config.dtype;
  plan.page_size = config.page_size;
  plan.window = config.window;
  plan.max_row_tokens = MaxLength(config);
  plan.worst_row_tokens = attention::SparseRowBound(config.sparse);
  plan.scheduler = config.scheduler;
  return plan;
}

}  // namespace

absl::StatusOr<std::unique_ptr<DecodeModel>> DecodeModel::Create(Device& device, const ModelConfig& config,
                                                                 const KvPool& pool, const ManagerOptions& options) {
  std::unique_ptr<DecodeModel> model(new DecodeModel(config, pool));
  if (config.gdn.layers > 0) {
    PRISTINE_ASSIGN_OR_RETURN(model->gdn_, GdnLayers::Create(device, config));
  }
  PRISTINE_ASSIGN_OR_RETURN(model->manager_, BufferManager::Create(device, options));
  PRISTINE_RETURN_IF_ERROR(model->RegisterAll(options.check != ManagerOptions::Check::kOff));
  PRISTINE_RETURN_IF_ERROR(model->AllocateTensors(device));
  PRISTINE_RETURN_IF_ERROR(model->manager_->Seal());
  return model;
}

int64_t DecodeModel::Bytes(const ModelConfig& config, int staging_slots, int multiprocessors) {
  const int64_t rows = int64_t{config.max_batch()} * config.sparse.groups;
  int64_t scratch = rows * attention::SparseRowBound(config.sparse);  // values of 4 bytes
  for (const attention::DecodePlanConfig& plan : {SparsePlan(config), WindowPlan(config)}) {
    scratch += attention::ScratchValues(plan, multiprocessors);
  }
  const int64_t refilled = int64_t{MaxStepPages(config)} + (config.layers - 1) * rows * config.sparse.topk;
  const int64_t slots = staging_slots;
  const int64_t tensors = (int64_t{config.layers} + 3) * static_cast<int64_t>(config.q_bytes(config.max_batch()));
  // Each buffer is there live, as the original and as the values that it is registered with; a refilled one also as its
  // engine's and planner's copies and in every staging slot, pinned and on the device.
  const int64_t gdn = config.gdn.layers > 0 ? GdnLayers::Bytes(config) : 0;
  return 4 * (3 * scratch + (6 + 2 * slots) * refilled) + tensors + gdn;
}

absl::Status DecodeModel::RegisterAll(bool checked) {
  const int32_t max_batch = config_.max_batch();

  attention::StepMetadataConfig metadata;
  metadata.max_requests = max_batch;
  metadata.max_tokens = max_batch;
  metadata.page_size = config_.page_size;
  metadata.num_pages = config_.pool_pages + 1;
  metadata.max_step_pages = MaxStepPages(config_);
  metadata.max_length = MaxLength(config_);
  metadata.worst_length = attention::SparseRowBound(config_.sparse);
  if (gdn_ != nullptr) metadata.state_slots = GdnLayers::PoolSlots(config_);
  PRISTINE_ASSIGN_OR_RETURN(metadata_, attention::StepMetadata::Create(*manager_, metadata));
  if (gdn_ != nullptr && checked) {
    PRISTINE_RETURN_IF_ERROR(gdn_->pool().Protect(*manager_, "gdn_states"));
  }

  // A request's id selects what it computes with, as a state slot would: padding is -1.
  BufferSpec requests;
  requests.name = "request_ids";
  requests.role = Role::kRefilled;
  requests.kind = Kind::kSlot;
  requests.axis = Axis::Requests();
  PRISTINE_ASSIGN_OR_RETURN(
      requests_, manager_->Register<int32_t>(requests, std::vector<int32_t>(static_cast<size_t>(max_batch), -1)));

  PRISTINE_ASSIGN_OR_RETURN(sparse_, attention::SparsePageTable::Create(*manager_, *metadata_, config_.sparse));
  for (int32_t layer = 0; config_.is_sparse(layer); ++layer) {
    PRISTINE_ASSIGN_OR_RETURN(tables_.emplace_back(),
                              sparse_->RegisterTable(absl::StrCat("sparse_blocks.layer", layer)));
  }

  attention::DecodePlanConfig sparse_plan = SparsePlan(config_);
  sparse_plan.derived_from = {metadata_->lengths().id};
  PRISTINE_ASSIGN_OR_RETURN(sparse_plan_, attention::DecodePlan::Create(*manager_, sparse_plan));
  attention::DecodePlanConfig window_plan = WindowPlan(config_);
  window_plan.derived_from = {metadata_->lengths().id};
  PRISTINE_ASSIGN_OR_RETURN(window_plan_, attention::DecodePlan::Create(*manager_, window_plan));

  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  PRISTINE_ASSIGN_OR_RETURN(sparse_decode_, attention::PagedDecode::Create(*sparse_plan_, scale));
  PRISTINE_ASSIGN_OR_RETURN(window_decode_, attention::PagedDecode::Create(*window_plan_, scale));
  return absl::OkStatus();
}

absl::Status DecodeModel::AssignSlots(Stream& stream, absl::Span<const ActiveRequest> active, StepInputs& inputs) {
  return gdn_ == nullptr ? absl::OkStatus() : gdn_->Assign(stream, active, inputs.state_slots);
}

absl::Status DecodeModel::ReleaseSlots() { return gdn_ == nullptr ? absl::OkStatus() : gdn_->ReleaseAll(); }

absl::Status DecodeModel::TakeStatesOf(Stream& stream, const DecodeModel& other) {
  return gdn_ == nullptr ? absl::OkStatus() : gdn_->TakeStatesOf(stream, *other.gdn_);
}

absl::Status DecodeModel::CompareStates(Stream& stream, const DecodeModel& other) {
  return gdn_ == nullptr ? absl::OkStatus() : gdn_->CompareStates(stream, *other.gdn_);
}

absl::Status DecodeModel::ProtectPool() {
  for (int32_t layer = 0; layer < config_.layers; ++layer) {
    const size_t element = attention::SizeOf(config_.dtype);
    PRISTINE_RETURN_IF_ERROR(manager_->Protect(absl::StrCat("kv_pool.k", layer), pool_.k(layer), element));
    PRISTINE_RETURN_IF_ERROR(manager_->Protect(absl::StrCat("kv_pool.v", layer), pool_.v(layer), element));
  }
  return absl::OkStatus();
}

absl::Status DecodeModel::AllocateTensors(Device& device) {
  const int32_t rows = config_.max_batch();
  const size_t kv_bytes = config_.q_bytes(rows) / config_.heads * config_.kv_heads;
  PRISTINE_ASSIGN_OR_RETURN(q_, device.Allocate(config_.q_bytes(rows), "q"));
  PRISTINE_ASSIGN_OR_RETURN(k_new_, device.Allocate(kv_bytes, "k_new"));
  PRISTINE_ASSIGN_OR_RETURN(v_new_, device.Allocate(kv_bytes, "v_new"));
  for (int32_t layer = 0; layer < config_.layers; ++layer) {
    Output& output = outputs_.emplace_back();
    PRISTINE_ASSIGN_OR_RETURN(output.out, device.Allocate(config_.q_bytes(rows), "out"));
    PRISTINE_ASSIGN_OR_RETURN(output.lse, device.Allocate(sizeof(attention::LseBase2) * rows * config_.heads, "lse"));
  }
  return absl::OkStatus();
}

absl::Status DecodeModel::Begin(const StepInputs& inputs) {
  absl::Status begun = manager_->BeginStep(inputs.bucket, inputs.extent);
  if (absl::IsResourceExhausted(begun)) {
    const auto since = std::chrono::steady_clock::now();
    PRISTINE_RETURN_IF_ERROR(manager_->WaitForSlot());
    slot_waits_.ms += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - since).count();
    ++slot_waits_.count;
    begun = manager_->BeginStep(inputs.bucket, inputs.extent);
  }
  PRISTINE_RETURN_IF_ERROR(begun);
  PRISTINE_RETURN_IF_ERROR(metadata_->Refill({.lengths = inputs.lengths,
                                              .kv_indptr = inputs.kv_indptr,
                                              .kv_indices = inputs.kv_indices,
                                              .slots = inputs.slots,
                                              .positions = inputs.positions,
                                              .state_slots = inputs.state_slots}));
  PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(requests_, inputs.requests));
  for (size_t layer = 0; layer < tables_.size(); ++layer) {
    PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(tables_[layer], inputs.tables[layer]));
  }
  return absl::OkStatus();
}

absl::Status DecodeModel::PlanSparse(const StepInputs& inputs) {
  return sparse_plan_->Plan(inputs.bucket, inputs.plan_lengths);
}

absl::Status DecodeModel::FinishPlans(const StepInputs& inputs) {
  PRISTINE_RETURN_IF_ERROR(window_plan_->Plan(inputs.bucket, inputs.lengths));
  return sparse_->Refill(inputs.plan_lengths);
}

absl::Status DecodeModel::Body(Stream& stream, const Extent& bucket) {
  for (int32_t layer = 0; layer < config_.layers; ++layer) {
    for (int32_t i = 0; gdn_ != nullptr && i < kGdnPerAttention; ++i) {
      PRISTINE_RETURN_IF_ERROR(gdn_->Run(stream, bucket.requests, layer * kGdnPerAttention + i,
                                         {.requests = requests_.live,
                                          .positions = metadata_->positions().live,
                                          .slots = metadata_->state_slots().live}));
    }
    const ModelInputsParams params = {.seed = config_.seed,
                                      .layer = layer,
                                      .rows = bucket.requests,
                                      .heads = config_.heads,
                                      .kv_heads = config_.kv_heads,
                                      .head_dim = config_.head_dim,
                                      .dtype = config_.dtype,
                                      .requests = requests_.live.address(),
                                      .positions = metadata_->positions().live.address(),
                                      .drafts = nullptr,
                                      .q = q_.As<std::byte>().address(),
                                      .k_new = k_new_.As<std::byte>().address(),
                                      .v_new = v_new_.As<std::byte>().address()};
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kModelInputs, params));
    if (extra_ != nullptr) {
      PRISTINE_RETURN_IF_ERROR(extra_(stream, bucket, layer, Point::kInputsMade));
    }

    attention::AppendKvTensors append;
    append.dtype = config_.dtype;
    append.kv_heads = config_.kv_heads;
    append.head_dim = config_.head_dim;
    append.k_new = k_new_.As<const std::byte>();
    append.v_new = v_new_.As<const std::byte>();
    append.slots = metadata_->slots().live;
    append.k = pool_.k(layer);
    append.v = pool_.v(layer);
    PRISTINE_RETURN_IF_ERROR(attention::AppendKv(stream, bucket.tokens, append));

    attention::DecodeTensors decode;
    decode.q = q_.As<const std::byte>();
    decode.k = pool_.k(layer);
    decode.v = pool_.v(layer);
    decode.out = out(layer);
    decode.lse = lse(layer);
    if (config_.is_sparse(layer)) {
      PRISTINE_RETURN_IF_ERROR(sparse_->Run(stream, bucket, tables_[layer]));
      // [slots, kv_heads, head_dim] is [slots * groups, kv_heads / groups, head_dim]: pages of one token.
      decode.kv_indptr = sparse_->kv_indptr_ws().live;
      decode.kv_indices = sparse_->kv_indices().live;
      PRISTINE_RETURN_IF_ERROR(sparse_decode_->Run(stream, bucket, decode));
    } else {
      decode.kv_indptr = metadata_->kv_indptr().live;
      decode.kv_indices = metadata_->kv_indices().live;
      decode.lengths = metadata_->lengths().live;
      PRISTINE_RETURN_IF_ERROR(window_decode_->Run(stream, bucket, decode));
    }
    if (extra_ != nullptr) {
      PRISTINE_RETURN_IF_ERROR(extra_(stream, bucket, layer, Point::kDecoded));
    }
  }
  return absl::OkStatus();
}

absl::Status DecodeModel::RunEagerly(Stream& stream, const StepInputs& inputs, ManagerOptions::Restore restore) {
  PRISTINE_RETURN_IF_ERROR(Begin(inputs));
  PRISTINE_RETURN_IF_ERROR(PlanSparse(inputs));
  PRISTINE_RETURN_IF_ERROR(FinishPlans(inputs));
  if (restore == ManagerOptions::Restore::kStream) {
    PRISTINE_RETURN_IF_ERROR(manager_->Restore(stream));
  }
  PRISTINE_RETURN_IF_ERROR(manager_->BeforeReplay(stream, inputs.bucket, inputs.extent));
  PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream, inputs.bucket));
  return Body(stream, inputs.bucket);
}

absl::Status DecodeModel::ReadLiveIndptr(Stream& stream, int32_t last, std::vector<int32_t>& values) const {
  values.resize(static_cast<size_t>(last) + 1);
  const DeviceSpan<int32_t> live = kv_indptr_ws().live.Sub(0, values.size());
  PRISTINE_RETURN_IF_ERROR(
      stream.CopyToHost(absl::MakeSpan(reinterpret_cast<std::byte*>(values.data()), live.bytes()), AsBytes(live)));
  return stream.Synchronize();
}

}  // namespace pristine::replay_driver
