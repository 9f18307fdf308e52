// Attention layers: a paged attention layer and a gated delta net layer, captured for two forward modes over the same
// arrays. Target verify looks at three draft tokens of each request at once; some of them hold; a decode step goes on
// behind those. What was rejected must have left no trace: the decode step's first output is the one that verify had
// at that token already.
//
//   StepMetadata    what all layers of a step read, refilled once
//   StepAttention   one for each mode: whatever kernels Route says
//   StatePool       the delta rule's states, a slot for each request
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "examples/device_option.h"
#include "pristine/attention/append_kv.h"
#include "pristine/attention/gdn/recurrent.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/attention/step_attention.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::examples {
namespace {

namespace gdn = attention::gdn;
using attention::DType;
using attention::ForwardMode;

constexpr int32_t kRequests = 2, kDrafts = 3, kTokens = kRequests * kDrafts;
constexpr int32_t kPageSize = 2, kPages = 5, kMaxLength = 4;  // page 0 is the dummy page, then two for each request
constexpr int32_t kHeads = 4, kKvHeads = 2, kHeadDim = 64;
constexpr int32_t kQkHeads = 1, kVHeads = 2, kMixed = (2 * kQkHeads + kVHeads) * gdn::kHeadDim;
constexpr Extent kDecodeBucket = {kRequests, kRequests}, kVerifyBucket = {kRequests, kTokens};

// A query token of a step.
struct Token {
  int32_t request, position;
};

// What the layers before would compute: a float32 tensor with a row for each token of a step.
class Input {
 public:
  static absl::StatusOr<Input> Create(Device& device, int32_t tensor, int32_t width) {
    Input input(tensor, width);
    PRISTINE_ASSIGN_OR_RETURN(input.memory_, device.Allocate(size_t{4} * kTokens * width, "input"));
    return input;
  }
  // Made up from request, position and tensor. Blocks.
  absl::Status Set(Stream& stream, absl::Span<const Token> tokens) {
    std::vector<float> values;
    for (const Token& token : tokens) {
      for (int32_t i = 0; i < width_; ++i) {
        values.push_back(std::sin(1.0f + token.request + 7 * token.position + 31 * tensor_ + 0.37f * i));
      }
    }
    const absl::Span<const std::byte> bytes(reinterpret_cast<const std::byte*>(values.data()), 4 * values.size());
    PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(memory_.As<std::byte>().Sub(0, bytes.size()), bytes));
    return stream.Synchronize();
  }
  DeviceSpan<const std::byte> bytes() const { return memory_.As<const std::byte>(); }
  gdn::Rows Columns(int32_t first) const {  // of each row, from `first` on
    const size_t skip = size_t{4} * first;
    return {bytes().Sub(skip, bytes().size() - skip), width_};
  }

 private:
  Input(int32_t tensor, int32_t width) : tensor_(tensor), width_(width) {}
  int32_t tensor_, width_;
  DeviceBuffer memory_;
};

// One row of each request's, `count` tokens that end at `lengths`.
struct Step {
  Step(const std::vector<int32_t>& of_lengths, int32_t count, std::vector<int32_t> of_state_slots)
      : lengths(of_lengths), state_slots(std::move(of_state_slots)) {
    for (int32_t r = 0; r < kRequests; ++r) {
      const int32_t pages = (lengths[r] + kPageSize - 1) / kPageSize;
      for (int32_t page = 0; page < pages; ++page) kv_indices.push_back(Page(r, page));
      kv_indptr.push_back(kv_indptr.back() + pages);
      for (int32_t at = lengths[r] - count; at < lengths[r]; ++at) {
        tokens.push_back({r, at});
        slots.push_back(Page(r, at / kPageSize) * kPageSize + at % kPageSize);
        positions.push_back(at);
      }
    }
  }
  static int32_t Page(int32_t request, int32_t page) { return 1 + 2 * request + page; }
  attention::StepValues values() const {
    return {.lengths = lengths,
            .kv_indptr = kv_indptr,
            .kv_indices = kv_indices,
            .slots = slots,
            .positions = positions,
            .state_slots = state_slots};
  }
  std::vector<Token> tokens;
  std::vector<int32_t> lengths, kv_indptr = {0}, kv_indices, slots, positions, state_slots;
};

absl::StatusOr<std::vector<float>> Read(Stream& stream, const DeviceBuffer& buffer) {
  std::vector<float> values(buffer.bytes() / sizeof(float));
  PRISTINE_RETURN_IF_ERROR(
      stream.CopyToHost({reinterpret_cast<std::byte*>(values.data()), buffer.bytes()}, buffer.As<const std::byte>()));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return values;
}

// The largest difference of row `a` of `left` and row `b` of `right`.
float Difference(const std::vector<float>& left, int32_t a, const std::vector<float>& right, int32_t b, int32_t width) {
  float most = 0;
  for (int32_t i = 0; i < width; ++i) most = std::fmax(most, std::fabs(left[a * width + i] - right[b * width + i]));
  return most;
}

absl::Status Run(int argc, char** argv) {
  PRISTINE_ASSIGN_OR_RETURN(const auto device, DeviceFromArgs(argc, argv));
  PRISTINE_ASSIGN_OR_RETURN(const auto stream, device->CreateStream());
  // The manager goes before the pool that it protects, and after everything that it registered.
  PRISTINE_ASSIGN_OR_RETURN(const auto states,
                            gdn::StatePool::Create(*device, DType::kFloat32, kVHeads, /*slots=*/kRequests));
  PRISTINE_ASSIGN_OR_RETURN(const auto manager, BufferManager::Create(*device));
  PRISTINE_RETURN_IF_ERROR(states->Protect(*manager, "states"));

  // One set of arrays for all modes: the longest step decides their sizes.
  PRISTINE_ASSIGN_OR_RETURN(const auto metadata,
                            attention::StepMetadata::Create(*manager, {.max_requests = kRequests,
                                                                       .max_tokens = kTokens,
                                                                       .page_size = kPageSize,
                                                                       .num_pages = kPages,
                                                                       .max_step_pages = kPages,
                                                                       .max_length = kMaxLength,
                                                                       .state_slots = kRequests + 1}));
  const auto attend = [&](ForwardMode mode, int32_t q_len, const Extent& bucket) {
    attention::StepAttentionConfig config;
    config.name = ToString(mode);
    config.mode = mode;
    config.route = {.dtype = DType::kFloat32,
                    .kv_dtype = DType::kFloat32,
                    .q_heads = kHeads,
                    .kv_heads = kKvHeads,
                    .head_dim = kHeadDim,
                    .page_size = kPageSize,
                    .q_len = q_len};
    config.buckets = {bucket};
    config.scale = 0.125f;  // 1 / sqrt(kHeadDim)
    return attention::StepAttention::Create(*manager, *metadata, config);
  };
  PRISTINE_ASSIGN_OR_RETURN(const auto decode, attend(ForwardMode::kDecode, 1, kDecodeBucket));
  PRISTINE_ASSIGN_OR_RETURN(const auto verify, attend(ForwardMode::kTargetVerify, kDrafts, kVerifyBucket));

  PRISTINE_ASSIGN_OR_RETURN(Input q, Input::Create(*device, 0, kHeads * kHeadDim));
  PRISTINE_ASSIGN_OR_RETURN(Input k_new, Input::Create(*device, 1, kKvHeads * kHeadDim));
  PRISTINE_ASSIGN_OR_RETURN(Input v_new, Input::Create(*device, 2, kKvHeads * kHeadDim));
  PRISTINE_ASSIGN_OR_RETURN(Input mixed, Input::Create(*device, 3, kMixed));  // q, k and v of the delta rule
  PRISTINE_ASSIGN_OR_RETURN(Input a, Input::Create(*device, 4, kVHeads));
  PRISTINE_ASSIGN_OR_RETURN(Input b, Input::Create(*device, 5, kVHeads));
  PRISTINE_ASSIGN_OR_RETURN(Input heads, Input::Create(*device, 6, kVHeads));  // A_log and dt_bias
  PRISTINE_RETURN_IF_ERROR(heads.Set(*stream, {{0, 0}}));
  const size_t pool_bytes = size_t{4} * kPages * kPageSize * kKvHeads * kHeadDim;
  PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer k, device->Allocate(pool_bytes, "k"));
  PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer v, device->Allocate(pool_bytes, "v"));
  PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer out, device->Allocate(size_t{4} * kTokens * kHeads * kHeadDim, "out"));
  PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer gdn_out,
                            device->Allocate(size_t{4} * kTokens * kVHeads * gdn::kHeadDim, "gdn out"));
  PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer accepted, device->Allocate(kRequests * sizeof(int32_t), "accepted"));

  const DeviceSpan<const float> per_head(reinterpret_cast<const float*>(heads.bytes().address()), kVHeads);
  const gdn::RecurrentInputs recurrent = {
      .qk_heads = kQkHeads,
      .q = mixed.Columns(0),
      .k = mixed.Columns(kQkHeads * gdn::kHeadDim),
      .v = mixed.Columns(2 * kQkHeads * gdn::kHeadDim),
      .gates = {DType::kFloat32, kVHeads, a.Columns(0), b.Columns(0), per_head, per_head},
      .cache_indices = metadata->state_slots().live};
  const auto attention_layer = [&](Stream& s, const Extent& bucket, const attention::StepAttention& attention) {
    const absl::Status appended = attention::AppendKv(s, bucket.tokens,
                                                      {.kv_heads = kKvHeads,
                                                       .head_dim = kHeadDim,
                                                       .k_new = k_new.bytes(),
                                                       .v_new = v_new.bytes(),
                                                       .slots = metadata->slots().live,
                                                       .k = k.As<std::byte>(),
                                                       .v = v.As<std::byte>()});
    if (!appended.ok()) return appended;
    return attention.Run(
        s, bucket,
        {.q = q.bytes(), .k = k.As<const std::byte>(), .v = v.As<const std::byte>(), .out = out.As<std::byte>()});
  };
  // A model has many of both layers; all of them read the same metadata.
  const auto make_runner = [&](const attention::StepAttention& attention, const Extent& bucket,
                               GraphRunner::Body states_layer) -> absl::StatusOr<std::unique_ptr<GraphRunner>> {
    PRISTINE_ASSIGN_OR_RETURN(auto runner,
                              GraphRunner::Create({.name = attention.config().name, .buckets = {bucket}},
                                                  [&, states_layer](Stream& s, const Extent& extent) -> absl::Status {
                                                    PRISTINE_RETURN_IF_ERROR(attention_layer(s, extent, attention));
                                                    return states_layer(s, extent);
                                                  }));
    PRISTINE_RETURN_IF_ERROR(runner->AddHook(*manager));
    PRISTINE_RETURN_IF_ERROR(runner->CaptureAll(*stream));
    return runner;
  };
  PRISTINE_ASSIGN_OR_RETURN(
      const auto decode_runner, make_runner(*decode, kDecodeBucket, [&](Stream& s, const Extent& bucket) {
        return gdn::Decode(s, bucket.requests, recurrent, states->view(), gdn_out.As<std::byte>());
      }));
  PRISTINE_ASSIGN_OR_RETURN(
      const auto verify_runner, make_runner(*verify, kVerifyBucket, [&](Stream& s, const Extent& bucket) {
        return gdn::Verify(s, bucket.requests, kDrafts, recurrent, states->view(), gdn_out.As<std::byte>());
      }));

  // A step of either mode: refill once, plan (nothing to do where the device schedules), one launch.
  const auto run_step = [&](GraphRunner& runner, attention::StepAttention& attention, const Extent& bucket,
                            const Step& step) -> absl::Status {
    for (Input* input : {&q, &k_new, &v_new, &mixed, &a, &b}) {
      PRISTINE_RETURN_IF_ERROR(input->Set(*stream, step.tokens));
    }
    PRISTINE_RETURN_IF_ERROR(manager->BeginStep(bucket, bucket));
    PRISTINE_RETURN_IF_ERROR(metadata->Refill(step.values()));
    PRISTINE_RETURN_IF_ERROR(attention.Plan(bucket, step.values()));
    return runner.Replay(*stream, bucket, bucket);
  };

  std::vector<int32_t> slots;
  for (int32_t r = 0; r < kRequests; ++r) {
    PRISTINE_ASSIGN_OR_RETURN(const gdn::Slot slot, states->Allocate(*stream));
    slots.push_back(slot);
  }
  const Step drafts({kDrafts, kDrafts}, kDrafts, slots);
  PRISTINE_RETURN_IF_ERROR(run_step(*verify_runner, *verify, kVerifyBucket, drafts));
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<float> verified, Read(*stream, out));
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<float> gdn_verified, Read(*stream, gdn_out));

  // One draft of the first request holds, two of the second. KV is rolled back by the lengths of the next step; a state
  // cannot be, so verify left it alone, and it takes in what held.
  const std::vector<int32_t> held = {1, 2};
  PRISTINE_RETURN_IF_ERROR(stream->CopyFromHost(accepted.As<std::byte>(),
                                                {reinterpret_cast<const std::byte*>(held.data()), accepted.bytes()}));
  PRISTINE_RETURN_IF_ERROR(
      gdn::Commit(*stream, kRequests, kDrafts, recurrent, states->view(), accepted.As<const int32_t>()));
  PRISTINE_RETURN_IF_ERROR(stream->Synchronize());

  const Step next({held[0] + 1, held[1] + 1}, 1, slots);
  PRISTINE_RETURN_IF_ERROR(run_step(*decode_runner, *decode, kDecodeBucket, next));
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<float> decoded, Read(*stream, out));
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<float> gdn_decoded, Read(*stream, gdn_out));

  std::printf("%s\n\nrequest  held  next token's output in verify and in decode differs by\n", device->name().c_str());
  for (int32_t r = 0; r < kRequests; ++r) {
    const int32_t row = r * kDrafts + held[r];
    const float attention = Difference(verified, row, decoded, r, kHeads * kHeadDim);
    const float recurrent_rule = Difference(gdn_verified, row, gdn_decoded, r, kVHeads * gdn::kHeadDim);
    std::printf("%7d  %d of %d  attention %.1e, delta rule %.1e\n", r, held[r], kDrafts, attention, recurrent_rule);
    // Written so that NaN does not pass.
    if (!(attention < 1e-5f && recurrent_rule < 1e-5f)) {
      return absl::DataLossError(absl::StrCat("request ", r, ": what was rejected left a trace"));
    }
    PRISTINE_RETURN_IF_ERROR(states->Free(slots[r]));
  }
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<Violation> violations, manager->Verify(*stream));
  for (const Violation& violation : violations) std::printf("%s\n", violation.ToString().c_str());
  return violations.empty() ? absl::OkStatus() : absl::DataLossError("see above");
}

}  // namespace
}  // namespace pristine::examples

int main(int argc, char** argv) {
  const absl::Status status = pristine::examples::Run(argc, argv);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
