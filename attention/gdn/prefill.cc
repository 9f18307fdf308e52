#include "pristine/attention/gdn/prefill.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "attention/gdn/check.h"
#include "attention/gdn/kernels/prefill.h"
#include "pristine/attention/device_caps.h"
#include "pristine/attention/gdn/prefill_gate.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention::gdn {
namespace {

constexpr const char* kOp = "gdn_prefill";
constexpr int64_t kAlignment = 16;  // bytes, of vector loads

size_t OutBytes(const PrefillParams& p) { return size_t{2} * p.tokens * p.v_heads * kHeadDim; }

void PrepareWrites(const PrefillParams& p, WriteList& writes) {
  writes.Add(p.out, OutBytes(p));
  writes.Add(p.workspace, size_t{sizeof(ChunkRecord)} * ChunkBound(p.sequences, p.tokens) * p.v_heads);
}

void StatesWrites(const PrefillParams& p, WriteList& writes) {
  writes.Add(p.out, OutBytes(p));
  const size_t last = static_cast<size_t>(p.slots - 1) * p.slot_stride + p.v_heads * kStateElements;
  writes.Add(p.states, last * SizeOf(p.state_dtype));
}

constexpr Kernel<PrefillParams> kPrepare = {"gdn_prefill_prepare", &PrefillPrepareHost,
                                            PRISTINE_CUDA(&PrefillPrepareCuda), &PrepareWrites};
constexpr Kernel<PrefillParams> kStates = {"gdn_prefill_states", &PrefillStatesHost, PRISTINE_CUDA(&PrefillStatesCuda),
                                           &StatesWrites};
constexpr Kernel<PrefillParams> kFused = {"gdn_prefill", &PrefillHost, PRISTINE_CUDA(&PrefillCuda), &StatesWrites};
constexpr int (*kSetUps[])() = {PRISTINE_CUDA(&PrefillSetUpPrepareCuda), PRISTINE_CUDA(&PrefillSetUpStatesCuda),
                                PRISTINE_CUDA(&PrefillSetUpCuda)};

// The first takes the most shared memory: where it fits, Run may choose any of them.
constexpr GdnTuning kCompiled[] = {{kHeadDim, PrefillStatesWarps(kHeadDim), kPrefillStages},
                                   {kHeadDim / 2, PrefillStatesWarps(kHeadDim / 2), kPrefillStages}};

// The environment's tuning as far as it may be used on `caps`; none: nothing is set and all that is compiled may be.
absl::StatusOr<std::optional<GdnTuning>> ChooseTuning(const DeviceCaps& caps, TuningPolicy& policy) {
  const TunableKernel kernel = PrefillStateKernel();
  PRISTINE_ASSIGN_OR_RETURN(const GdnTuning asked, GdnTuningFromEnvironment(kernel.compiled));
  const int64_t limit = caps.backend == Backend::kHost ? std::numeric_limits<int64_t>::max()
                                                       : static_cast<int64_t>(caps.shared_bytes_per_block);
  PRISTINE_ASSIGN_OR_RETURN(const GdnTuning chosen, policy.Choose(asked, kernel, limit));
  if (!asked.from_environment && chosen == asked) return std::optional<GdnTuning>();
  return std::optional<GdnTuning>(chosen);
}

// Rows of bfloat16 that vector loads take.
absl::Status CheckVectorRows(const char* what, const Rows& rows, int64_t tokens, int64_t width, int64_t& stride) {
  PRISTINE_RETURN_IF_ERROR(CheckRows(kOp, what, rows, sizeof(uint16_t), tokens, width, stride));
  const int64_t stride_bytes = stride * static_cast<int64_t>(sizeof(uint16_t));
  if (stride_bytes % kAlignment != 0 || reinterpret_cast<uintptr_t>(rows.data.address()) % kAlignment != 0) {
    return absl::InvalidArgumentError(absl::StrCat(kOp, ": ", what, " and its stride of ", stride,
                                                   " elements must be aligned to ", kAlignment, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

TunableKernel PrefillStateKernel() {
  return {"gdn_prefill_states", kCompiled,
          [](const GdnTuning& tuning) { return int64_t{PrefillStatesSharedBytes(tuning.bv, tuning.num_stages)}; }};
}

int64_t PrefillWorkspaceBytes(const PrefillConfig& config) {
  return int64_t{sizeof(ChunkRecord)} * ChunkBound(config.largest.requests, config.largest.tokens) * config.v_heads;
}

absl::StatusOr<std::unique_ptr<Prefill>> Prefill::Create(Device& device, const PrefillConfig& config,
                                                         TuningPolicy* tuning) {
  constexpr int32_t kMaxRequests = 65535;  // of a grid's y
  constexpr int32_t kMaxTokens = 1 << 24;
  constexpr int32_t kMaxHeads = 4096;
  if (config.largest.requests < 1 || config.largest.requests > kMaxRequests || config.largest.tokens < 1 ||
      config.largest.tokens > kMaxTokens) {
    return absl::InvalidArgumentError(absl::StrCat(kOp, ": the largest extent is ", config.largest.ToString(),
                                                   "; it must have 1 to ", kMaxRequests, " requests and 1 to ",
                                                   kMaxTokens, " tokens"));
  }
  if (config.v_heads < 1 || config.v_heads > kMaxHeads || config.qk_heads < 1 ||
      config.v_heads % config.qk_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(kOp, ": qk_heads is ", config.qk_heads, " and v_heads ",
                                                   config.v_heads, "; v_heads must be a multiple of qk_heads, at most ",
                                                   kMaxHeads));
  }
  if (!(config.scale > 0) || !std::isfinite(config.scale)) {
    return absl::InvalidArgumentError(
        absl::StrCat(kOp, ": scale is ", config.scale, ", must be finite and greater than 0"));
  }
  // Whether any configuration runs there; ChooseTuning then looks at the one asked for.
  constexpr size_t kSmallest = PrefillStatesSharedBytes(kHeadDim / 2, kPrefillStages);
  const DeviceCaps caps = CapsOf(device);
  PRISTINE_ASSIGN_OR_RETURN(const GdnPrefillPath path, CheckGdnPrefill(caps, {.shared_bytes = kSmallest}));
  auto prefill = std::unique_ptr<Prefill>(new Prefill(device, config));
  TuningPolicy strict(TuningPolicy::OnBadTuning::kError);
  PRISTINE_ASSIGN_OR_RETURN(prefill->tuning_, ChooseTuning(caps, tuning == nullptr ? strict : *tuning));
  if (path == GdnPrefillPath::kHost) return prefill;
  PRISTINE_ASSIGN_OR_RETURN(prefill->workspace_,
                            device.Allocate(static_cast<size_t>(PrefillWorkspaceBytes(config)), "GDN prefill"));
  // Attributes belong to the current device; queueing on one of its streams makes this device the current one.
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.CreateStream());
  for (int (*const set_up)() : kSetUps) {
    if (set_up == nullptr) return absl::UnimplementedError(absl::StrCat(kOp, ": built without CUDA"));
    PRISTINE_RETURN_IF_ERROR(stream->EnqueueCudaKernel(kOp, [set_up](CUstream_st*) { return set_up(); }));
  }
  return prefill;
}

absl::Status Prefill::Run(Stream& stream, const Extent& bucket, const PrefillTensors& tensors,
                          const StateView& states) const {
  const int32_t v_heads = config_.v_heads;
  if (bucket.requests < 1 || bucket.tokens < 1 || !bucket.FitsIn(config_.largest)) {
    return absl::InvalidArgumentError(absl::StrCat(kOp, ": the bucket is ", bucket.ToString(),
                                                   "; counts must be at least 1 and fit into ",
                                                   config_.largest.ToString()));
  }
  if (&stream.device() != &device_) {
    return absl::InvalidArgumentError(
        absl::StrCat(kOp, ": the stream is of device ", stream.device().name(), ", the workspace of ", device_.name()));
  }
  PRISTINE_RETURN_IF_ERROR(CheckStates(kOp, "states", states, v_heads));
  PrefillParams params = {};
  const int64_t qk_width = int64_t{config_.qk_heads} * kHeadDim, v_width = int64_t{v_heads} * kHeadDim;
  PRISTINE_RETURN_IF_ERROR(CheckVectorRows("q", tensors.q, bucket.tokens, qk_width, params.q_stride));
  PRISTINE_RETURN_IF_ERROR(CheckVectorRows("k", tensors.k, bucket.tokens, qk_width, params.k_stride));
  PRISTINE_RETURN_IF_ERROR(CheckVectorRows("v", tensors.v, bucket.tokens, v_width, params.v_stride));
  const auto check = [](const char* what, const auto& span, size_t element, int64_t need, int64_t alignment) {
    return CheckTensor(kOp, what, span.address(), span.bytes(), element, need, static_cast<size_t>(alignment));
  };
  const int64_t gates = int64_t{bucket.tokens} * v_heads;
  PRISTINE_RETURN_IF_ERROR(check("g", tensors.g, sizeof(float), gates, sizeof(float)));
  PRISTINE_RETURN_IF_ERROR(check("beta", tensors.beta, sizeof(float), gates, sizeof(float)));
  PRISTINE_RETURN_IF_ERROR(
      check("cu_seqlens", tensors.cu_seqlens, sizeof(int32_t), int64_t{bucket.requests} + 1, sizeof(int32_t)));
  PRISTINE_RETURN_IF_ERROR(check("initial_slots", tensors.initial_slots, sizeof(Slot), bucket.requests, sizeof(Slot)));
  PRISTINE_RETURN_IF_ERROR(check("final_slots", tensors.final_slots, sizeof(Slot), bucket.requests, sizeof(Slot)));
  PRISTINE_RETURN_IF_ERROR(check("out", tensors.out, sizeof(uint16_t), bucket.tokens * v_width, kAlignment));
  params.q = tensors.q.data.address();
  params.k = tensors.k.data.address();
  params.v = tensors.v.data.address();
  params.g = tensors.g.address();
  params.beta = tensors.beta.address();
  params.cu_seqlens = tensors.cu_seqlens.address();
  params.initial_slots = tensors.initial_slots.address();
  params.final_slots = tensors.final_slots.address();
  params.out = tensors.out.address();
  params.states = states.states.address();
  params.workspace = workspace_.As<std::byte>().address();
  params.slot_stride = states.slot_stride;
  params.slots = states.slots;
  params.sequences = bucket.requests;
  params.tokens = bucket.tokens;
  params.qk_heads = config_.qk_heads;
  params.v_heads = v_heads;
  const int32_t multiprocessors = device_.multiprocessors();
  params.heads_per_block = PrefillHeadsPerBlock(ChunkBound(bucket.requests, bucket.tokens), config_.qk_heads,
                                                v_heads / config_.qk_heads, multiprocessors);
  params.v_parts = tuning_.has_value() ? kHeadDim / tuning_->bv
                                       : PrefillVParts(bucket.requests, bucket.tokens, v_heads, multiprocessors);
  if (params.v_parts == kByLengths) {
    params.longest_share = PrefillLongestShare(bucket.requests, v_heads, multiprocessors);
  }
  params.scale = config_.scale;
  params.state_dtype = states.dtype;
  params.clamp_to_zero = states.padded_rows == PaddedRows::kClampToZero;
  if (params.v_parts != 2) {
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kFused, params));
  }
  if (params.v_parts == 1) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(Launch(stream, kPrepare, params));
  return Launch(stream, kStates, params);
}

}  // namespace pristine::attention::gdn
