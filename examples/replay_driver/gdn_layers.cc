#include "examples/replay_driver/gdn_layers.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "examples/replay_driver/gdn_kernels.h"
#include "pristine/attention/device_caps.h"
#include "pristine/attention/gdn/prefill_gate.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {
namespace {

namespace gdn = attention::gdn;

// gdn::Prefill takes bfloat16; other contexts are taken in token by token.
bool HasPrefill(const ModelConfig& config) { return config.dtype == attention::DType::kBFloat16; }
// Tokens of a context that are taken in at a time.
int32_t PromptChunk(const ModelConfig& config) { return HasPrefill(config) ? 1024 : 64; }
// Rows of the tensors that decoding and contexts share.
int64_t Rows(const ModelConfig& config) {
  return std::max(config.max_batch() * config.gdn.step_tokens(), PromptChunk(config));
}
int64_t ElementBytes(const ModelConfig& config) { return static_cast<int64_t>(attention::SizeOf(config.dtype)); }

// [rows, elements] of the model's dtype.
absl::StatusOr<DeviceBuffer> Allocate(Device& device, const ModelConfig& config, int64_t rows, int64_t elements,
                                      const char* name) {
  return device.Allocate(static_cast<size_t>(rows * elements * ElementBytes(config)), name);
}

}  // namespace

absl::StatusOr<std::unique_ptr<GdnLayers>> GdnLayers::Create(Device& device, const ModelConfig& config) {
  std::unique_ptr<GdnLayers> layers(new GdnLayers(config));
  const gdn::StatePoolOptions options = {
      .layers = config.gdn.layers, .conv_dim = config.gdn.dim(), .conv_dtype = config.dtype};
  PRISTINE_ASSIGN_OR_RETURN(layers->pool_, gdn::StatePool::Create(device, attention::DType::kFloat32,
                                                                  config.gdn.v_heads, Slots(config), options));
  // Where the gate is shut, for the device or for the CUDA of this build, contexts are taken in token by token.
  if (HasPrefill(config) && gdn::CheckGdnPrefill(attention::CapsOf(device), {}).ok()) {
    const gdn::PrefillConfig prefill = {
        .largest = {1, PromptChunk(config)}, .qk_heads = config.gdn.qk_heads, .v_heads = config.gdn.v_heads};
    PRISTINE_ASSIGN_OR_RETURN(layers->prefill_, gdn::Prefill::Create(device, prefill));
  }
  PRISTINE_RETURN_IF_ERROR(layers->MakeLayers(device));
  PRISTINE_RETURN_IF_ERROR(layers->AllocateTensors(device));
  return layers;
}

int64_t GdnLayers::Bytes(const ModelConfig& config) {
  const GdnConfig& gdn = config.gdn;
  const int64_t state = gdn::kStateElements * gdn.v_heads * 4 + int64_t{gdn.dim()} * gdn::kConvHistory * 4;
  const int64_t rows = (2 * gdn.dim() + gdn.v_dim()) * Rows(config) * (gdn.draft_tokens == 0 ? 1 : gdn.layers) +
                       int64_t{gdn.layers} * gdn.v_dim() * config.max_batch() * gdn.step_tokens();
  // The states of slot 0 are a constant of the manager's, with an original.
  return int64_t{gdn.layers} * (PoolSlots(config) + 2) * state + 4 * rows;
}

absl::Status GdnLayers::MakeLayers(Device& device) {
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.CreateStream());
  const auto make = [&](DeviceBuffer& to, attention::DType dtype, int32_t layer, GdnTensor tensor,
                        int32_t count) -> absl::Status {
    const size_t element = attention::SizeOf(dtype);
    std::vector<std::byte> bytes(static_cast<size_t>(count) * element);
    for (int32_t i = 0; i < count; ++i) {
      const float value = GdnElement(GdnKey(config_.seed, 0, layer, 0, tensor), tensor, i);
      const uint16_t narrow = ToBFloat16(value);
      const bool wide = dtype == attention::DType::kFloat32;
      std::memcpy(&bytes[static_cast<size_t>(i) * element], wide ? static_cast<const void*>(&value) : &narrow, element);
    }
    PRISTINE_ASSIGN_OR_RETURN(to, device.Allocate(bytes.size(), "gdn parameters"));
    PRISTINE_RETURN_IF_ERROR(stream->CopyFromHost(to.As<std::byte>(), bytes));
    return stream->Synchronize();
  };
  for (int32_t layer = 0; layer < config_.gdn.layers; ++layer) {
    Layer& made = layers_.emplace_back();
    const int32_t taps = config_.gdn.dim() * gdn::kConvWidth;
    PRISTINE_RETURN_IF_ERROR(make(made.weight, config_.dtype, layer, GdnTensor::kWeight, taps));
    for (const auto& [to, tensor] : {std::pair(&made.a_log, GdnTensor::kALog), {&made.dt_bias, GdnTensor::kDtBias}}) {
      PRISTINE_RETURN_IF_ERROR(make(*to, attention::DType::kFloat32, layer, tensor, config_.gdn.v_heads));
    }
  }
  return absl::OkStatus();
}

absl::Status GdnLayers::AllocateTensors(Device& device) {
  const GdnConfig& gdn = config_.gdn;
  const int64_t rows = Rows(config_);
  tensors_.resize(gdn.draft_tokens == 0 ? 1 : static_cast<size_t>(gdn.layers));
  for (Tensors& t : tensors_) {
    PRISTINE_ASSIGN_OR_RETURN(t.mixed, Allocate(device, config_, rows, gdn.dim(), "gdn mixed"));
    PRISTINE_ASSIGN_OR_RETURN(t.a, Allocate(device, config_, rows, gdn.v_heads, "gdn a"));
    PRISTINE_ASSIGN_OR_RETURN(t.b, Allocate(device, config_, rows, gdn.v_heads, "gdn b"));
    PRISTINE_ASSIGN_OR_RETURN(t.q, Allocate(device, config_, rows, gdn.qk_dim(), "gdn q"));
    PRISTINE_ASSIGN_OR_RETURN(t.k, Allocate(device, config_, rows, gdn.qk_dim(), "gdn k"));
    PRISTINE_ASSIGN_OR_RETURN(t.v, Allocate(device, config_, rows, gdn.v_dim(), "gdn v"));
  }
  if (prefill_ != nullptr) {
    const size_t gates = static_cast<size_t>(rows) * static_cast<size_t>(gdn.v_heads) * sizeof(float);
    PRISTINE_ASSIGN_OR_RETURN(g_, device.Allocate(gates, "gdn g"));
    PRISTINE_ASSIGN_OR_RETURN(beta_, device.Allocate(gates, "gdn beta"));
    PRISTINE_ASSIGN_OR_RETURN(prompt_out_, Allocate(device, config_, rows, gdn.v_dim(), "gdn prompt out"));
  }
  for (int32_t layer = 0; layer < gdn.layers; ++layer) {
    PRISTINE_ASSIGN_OR_RETURN(
        outs_.emplace_back(),
        Allocate(device, config_, int64_t{config_.max_batch()} * gdn.step_tokens(), gdn.v_dim(), "gdn out"));
  }
  PRISTINE_ASSIGN_OR_RETURN(prompt_, device.Allocate(3 * sizeof(int32_t), "gdn prompt"));
  const size_t differences = static_cast<size_t>(PoolSlots(config_)) * static_cast<size_t>(gdn.layers);
  PRISTINE_ASSIGN_OR_RETURN(differences_, device.Allocate(differences * sizeof(int32_t), "gdn differences"));
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.CreateStream());
  PRISTINE_RETURN_IF_ERROR(stream->Fill(differences_.As<std::byte>(), std::byte{0}));
  return stream->Synchronize();
}

absl::Status GdnLayers::Assign(Stream& stream, absl::Span<const ActiveRequest> active, std::vector<int32_t>& slots) {
  std::map<int32_t, gdn::Slot> gone = std::move(slot_of_);
  slot_of_.clear();
  for (const ActiveRequest& request : active) {
    const auto known = gone.find(request.id);
    if (known == gone.end()) continue;
    slot_of_.insert(*known);
    gone.erase(known);
  }
  for (const auto& [request, slot] : gone) {
    PRISTINE_RETURN_IF_ERROR(pool_->Free(slot));
  }
  slots.clear();
  for (const ActiveRequest& request : active) {
    auto known = slot_of_.find(request.id);
    if (known == slot_of_.end()) {
      PRISTINE_ASSIGN_OR_RETURN(const gdn::Slot slot, pool_->Allocate(stream));
      known = slot_of_.emplace(request.id, slot).first;
      ++handed_out_;
      PRISTINE_RETURN_IF_ERROR(FillContext(stream, request, slot));
    }
    slots.push_back(known->second);
  }
  return absl::OkStatus();
}

absl::Status GdnLayers::ReleaseAll() {
  for (const auto& [request, slot] : slot_of_) {
    PRISTINE_RETURN_IF_ERROR(pool_->Free(slot));
  }
  slot_of_.clear();
  return absl::OkStatus();
}

absl::Status GdnLayers::FillContext(Stream& stream, const ActiveRequest& request, gdn::Slot slot) {
  const int32_t context = request.length - 1;  // the step takes the last token
  for (int32_t layer = 0; layer < config_.gdn.layers; ++layer) {
    for (int32_t first = 0; first < context; first += PromptChunk(config_)) {
      const int32_t tokens = std::min(PromptChunk(config_), context - first);
      const GdnInputsParams params = {.seed = config_.seed,
                                      .layer = layer,
                                      .rows = tokens,
                                      .dim = config_.gdn.dim(),
                                      .v_heads = config_.gdn.v_heads,
                                      .dtype = config_.dtype,
                                      .requests = nullptr,
                                      .positions = nullptr,
                                      .drafts = nullptr,
                                      .request = request.id,
                                      .first = first,
                                      .mixed = tensors(layer).mixed.As<std::byte>().address(),
                                      .a = tensors(layer).a.As<std::byte>().address(),
                                      .b = tensors(layer).b.As<std::byte>().address(),
                                      .slot = slot,
                                      .prompt = prompt_.As<int32_t>().address()};
      PRISTINE_RETURN_IF_ERROR(Launch(stream, kGdnInputs, params));
      PRISTINE_RETURN_IF_ERROR(TakeIn(stream, layer, tokens));
    }
  }
  return absl::OkStatus();
}

absl::Status GdnLayers::TakeIn(Stream& stream, int32_t layer, int32_t tokens) {
  const DeviceSpan<const int32_t> prompt = prompt_.As<const int32_t>();
  const DeviceSpan<const int32_t> slot = prompt.Sub(0, 1), cu_seqlens = prompt.Sub(1, 2);
  const gdn::ConvSequences sequence = {.requests = 1, .cu_seqlens = cu_seqlens};
  const gdn::RecurrentInputs inputs = RecurrentInputsOf(layer, slot);
  gdn::ConvOutputs qkv = QkvOutputs(layer);
  if (prefill_ != nullptr) {
    qkv.norm_head_dim = gdn::kHeadDim;
    qkv.gates = inputs.gates;
    qkv.g = g_.As<float>();
    qkv.beta = beta_.As<float>();
  }
  PRISTINE_RETURN_IF_ERROR(
      gdn::CausalConv1d(stream, tokens, sequence, ConvInputsOf(layer, slot), pool_->conv_view(layer), qkv));
  if (prefill_ == nullptr) return gdn::Commit(stream, 1, tokens, inputs, pool_->view(layer), prompt.Sub(2, 1));
  return prefill_->Run(stream, {1, tokens},
                       {.q = inputs.q,
                        .k = inputs.k,
                        .v = inputs.v,
                        .g = qkv.g,
                        .beta = qkv.beta,
                        .cu_seqlens = cu_seqlens,
                        .initial_slots = slot,
                        .final_slots = slot,
                        .out = prompt_out_.As<std::byte>()},
                       pool_->view(layer));
}

gdn::ConvInputs GdnLayers::ConvInputsOf(int32_t layer, DeviceSpan<const int32_t> slots) const {
  return {.x = {tensors(layer).mixed.As<const std::byte>(), 0},
          .weight = layers_[static_cast<size_t>(layer)].weight.As<const std::byte>(),
          .cache_indices = slots};
}

gdn::ConvOutputs GdnLayers::QkvOutputs(int32_t layer) const {
  return {.q_dim = config_.gdn.qk_dim(),
          .k_dim = config_.gdn.qk_dim(),
          .v_dim = config_.gdn.v_dim(),
          .q = tensors(layer).q.As<std::byte>(),
          .k = tensors(layer).k.As<std::byte>(),
          .v = tensors(layer).v.As<std::byte>()};
}

gdn::RecurrentInputs GdnLayers::RecurrentInputsOf(int32_t layer, DeviceSpan<const int32_t> slots) const {
  const Layer& of = layers_[static_cast<size_t>(layer)];
  return {.qk_heads = config_.gdn.qk_heads,
          .q = {tensors(layer).q.As<const std::byte>(), 0},
          .k = {tensors(layer).k.As<const std::byte>(), 0},
          .v = {tensors(layer).v.As<const std::byte>(), 0},
          .gates = {config_.dtype,
                    config_.gdn.v_heads,
                    {tensors(layer).a.As<const std::byte>(), 0},
                    {tensors(layer).b.As<const std::byte>(), 0},
                    of.a_log.As<const float>(),
                    of.dt_bias.As<const float>()},
          .cache_indices = slots};
}

absl::Status GdnLayers::Run(Stream& stream, int32_t rows, int32_t layer, const Step& step) {
  const int32_t tokens = config_.gdn.draft_tokens;
  const GdnInputsParams params = {.seed = config_.seed,
                                  .layer = layer,
                                  .rows = rows * config_.gdn.step_tokens(),
                                  .dim = config_.gdn.dim(),
                                  .v_heads = config_.gdn.v_heads,
                                  .dtype = config_.dtype,
                                  .requests = step.requests.address(),
                                  .positions = step.positions.address(),
                                  .drafts = tokens == 0 ? nullptr : step.drafts.address(),
                                  .request = -1,
                                  .first = 0,
                                  .mixed = tensors(layer).mixed.As<std::byte>().address(),
                                  .a = tensors(layer).a.As<std::byte>().address(),
                                  .b = tensors(layer).b.As<std::byte>().address(),
                                  .slot = gdn::kNoSlot,
                                  .prompt = nullptr};
  PRISTINE_RETURN_IF_ERROR(Launch(stream, kGdnInputs, params));
  const gdn::ConvInputs conv = ConvInputsOf(layer, step.slots);
  const gdn::RecurrentInputs inputs = RecurrentInputsOf(layer, step.slots);
  if (tokens == 0) {
    PRISTINE_RETURN_IF_ERROR(gdn::CausalConv1dUpdate(stream, rows, conv, pool_->conv_view(layer), QkvOutputs(layer)));
    return gdn::Decode(stream, rows, inputs, pool_->view(layer), out(layer));
  }
  PRISTINE_RETURN_IF_ERROR(
      gdn::CausalConv1dVerify(stream, rows, tokens, conv, pool_->conv_view(layer), QkvOutputs(layer)));
  return gdn::Verify(stream, rows, tokens, inputs, pool_->view(layer), out(layer));
}

absl::Status GdnLayers::Commit(Stream& stream, int32_t rows, DeviceSpan<const int32_t> slots,
                               DeviceSpan<const int32_t> accepted) {
  const int32_t tokens = config_.gdn.draft_tokens;
  for (int32_t layer = 0; layer < config_.gdn.layers; ++layer) {
    PRISTINE_RETURN_IF_ERROR(
        gdn::Commit(stream, rows, tokens, RecurrentInputsOf(layer, slots), pool_->view(layer), accepted));
    PRISTINE_RETURN_IF_ERROR(
        gdn::CausalConv1dCommit(stream, rows, tokens, ConvInputsOf(layer, slots), pool_->conv_view(layer), accepted));
  }
  return absl::OkStatus();
}

absl::Status GdnLayers::TakeStatesOf(Stream& stream, const GdnLayers& other) {
  PRISTINE_RETURN_IF_ERROR(stream.Copy(pool_->view().states, other.pool_->view().states));
  return stream.Copy(pool_->conv_view().states, other.pool_->conv_view().states);
}

absl::Status GdnLayers::CompareStates(Stream& stream, const GdnLayers& other) {
  PRISTINE_RETURN_IF_ERROR(stream.Fill(differences_.As<std::byte>(), std::byte{0}));
  const auto compare = [&](const auto& one, const auto& another) {
    const int64_t layer_bytes =
        one.slot_stride * static_cast<int64_t>(attention::SizeOf(one.dtype)) / config_.gdn.layers;
    return Launch(stream, kStateDifferences,
                  StateDifferencesParams{.one = one.states.address(),
                                         .other = another.states.address(),
                                         .slots = PoolSlots(config_),
                                         .layers = config_.gdn.layers,
                                         .layer_bytes = layer_bytes,
                                         .differences = differences_.As<int32_t>().address()});
  };
  PRISTINE_RETURN_IF_ERROR(compare(pool_->view(), other.pool_->view()));
  return compare(pool_->conv_view(), other.pool_->conv_view());
}

}  // namespace pristine::replay_driver
