// A decoder of four layers with random weights, three of gated delta nets to one of attention, that generates greedily
// for requests which come and go: from captured graphs, and the same eagerly. Token for token.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "absl/types/span.h"
#include "pristine/attention/append_kv.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/attention/gdn/causal_conv1d.h"
#include "pristine/attention/gdn/recurrent.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/attention/paged_decode.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/gdn/hybrid_kernels.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {

int EmbedHost(const EmbedParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int32_t i = 0; i < p.width; ++i) EmbedElement(p, row, i);
  }
  return 0;
}
int DenseHost(const DenseParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int32_t o = 0; o < p.out; ++o) DenseElement(p, row, o);
  }
  return 0;
}
int ArgmaxHost(const ArgmaxParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) ArgmaxRow(p, row);
  return 0;
}

namespace {

using namespace attention::gdn;  // NOLINT(build/namespaces): the suite is about that namespace
using attention::DecodePlan;
using attention::PagedDecode;
using attention::StepMetadata;

constexpr int32_t kPrompts = 32;
// The full size takes seconds where the host's kernels are optimised, else minutes.
constexpr int32_t kGenerated = 512, kGeneratedOnSlowHosts = 8;
constexpr int32_t kMaxPrompt = 7;  // tokens
constexpr int32_t kHidden = 64, kVocabulary = 256;
constexpr int32_t kGdnLayers = 3, kQkHeads = 1, kVHeads = 1;
constexpr int32_t kQkDim = kQkHeads * kHeadDim, kVDim = kVHeads * kHeadDim, kDim = 2 * kQkDim + kVDim;
constexpr int32_t kHeads = 2, kKvHeads = 1, kAttentionDim = 64;
constexpr int32_t kPageSize = 16, kMaxLength = kMaxPrompt + kGenerated;
constexpr int32_t kPagesEach = (kMaxLength - 1) / kPageSize + 1;
const std::vector<Extent> kBuckets = {{4, 4}, {8, 8}, {16, 16}};
constexpr int32_t kMaxBatch = 16, kPages = kMaxBatch * kPagesEach + 1;

// Weights of all layers, drawn from a seed: the same in every decoder.
struct Weights {
  struct Gdn {
    Tensor mixed, a, b, conv, a_log, dt_bias, out;
  };
  Tensor embedding, logits, q, k, v, attention_out;
  std::vector<Gdn> gdn;
};

absl::StatusOr<Weights> MakeWeights(Device& device, Stream& stream) {
  std::mt19937_64 random(2024);
  Weights weights;
  absl::Status status;
  const auto make = [&](Tensor& to, int32_t out, int32_t in, double size) {
    const double bound = size / std::sqrt(static_cast<double>(in));
    absl::StatusOr<Tensor> made =
        MakeTensor(device, stream, DType::kFloat32, Uniform(random, static_cast<size_t>(out) * in, -bound, bound));
    status.Update(made.status());
    if (made.ok()) to = *std::move(made);
  };
  make(weights.embedding, kVocabulary, kHidden, 8);
  make(weights.logits, kVocabulary, kHidden, 3);
  make(weights.q, kHeads * kAttentionDim, kHidden, 3);
  make(weights.k, kKvHeads * kAttentionDim, kHidden, 3);
  make(weights.v, kKvHeads * kAttentionDim, kHidden, 3);
  make(weights.attention_out, kHidden, kHeads * kAttentionDim, 3);
  for (int32_t layer = 0; layer < kGdnLayers; ++layer) {
    Weights::Gdn& of = weights.gdn.emplace_back();
    make(of.mixed, kDim, kHidden, 2);
    make(of.a, kVHeads, kHidden, 2);
    make(of.b, kVHeads, kHidden, 2);
    make(of.conv, kDim, kConvWidth, 2);
    make(of.a_log, kVHeads, 1, 1);
    make(of.dt_bias, kVHeads, 1, 3);
    make(of.out, kHidden, kVDim, 8);
  }
  PRISTINE_RETURN_IF_ERROR(status);
  return weights;
}

struct Request {
  std::vector<int32_t> prompt, tokens;  // tokens: the prompt and what was generated
  int32_t length = 0;                   // tokens that the model has taken in
  Slot slot = kNoSlot;
  std::vector<int32_t> pages;
};

// A model with states, a KV cache and a manager of its own, that serves the requests and keeps their tokens.
class Decoder {
 public:
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(Device& device, Stream& stream, const Weights& weights,
                                                         bool captured) {
    std::unique_ptr<Decoder> decoder(new Decoder(stream, weights));
    PRISTINE_RETURN_IF_ERROR(decoder->SetUp(device, captured));
    return decoder;
  }

  absl::Status Enter(Request& request) {
    PRISTINE_ASSIGN_OR_RETURN(request.slot, states_->Allocate(stream_));
    for (int32_t i = 0; i < kPagesEach; ++i) {
      request.pages.push_back(free_pages_.back());
      free_pages_.pop_back();
    }
    return absl::OkStatus();
  }
  absl::Status Leave(Request& request) {
    free_pages_.insert(free_pages_.end(), request.pages.begin(), request.pages.end());
    return states_->Free(request.slot);
  }
  // One token further for each of `active`: the next of its prompt, or the one that was generated last.
  absl::Status Step(absl::Span<Request* const> active);
  GraphRunner* runner() { return runner_.get(); }
  BufferManager& manager() { return *manager_; }

 private:
  Decoder(Stream& stream, const Weights& weights) : stream_(stream), weights_(weights) {}
  absl::Status SetUp(Device& device, bool captured);
  absl::Status Body(Stream& stream, const Extent& bucket);
  absl::Status Dense(Stream& stream, const DeviceBuffer& x, int32_t in, const Tensor& w, const DeviceBuffer& y,
                     int32_t out, int32_t rows, bool normalise, bool add) {
    return Launch(stream, kDense,
                  {x.As<float>().address(), w.memory.As<float>().address(), y.As<float>().address(), rows, in, out,
                   normalise, add});
  }

  Stream& stream_;
  const Weights& weights_;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
  std::unique_ptr<DecodePlan> plan_;
  std::unique_ptr<PagedDecode> decode_;
  std::unique_ptr<StatePool> states_;
  Buffer<int32_t> tokens_;
  DeviceBuffer x_, mixed_, a_, b_, qkv_, gdn_out_, q_, k_new_, v_new_, out_, lse_, k_, v_, logits_, next_;
  std::vector<int32_t> free_pages_;
  std::unique_ptr<GraphRunner> runner_;  // null: eager
};

absl::Status Decoder::SetUp(Device& device, bool captured) {
  PRISTINE_ASSIGN_OR_RETURN(
      states_, StatePool::Create(device, DType::kFloat32, kVHeads, kMaxBatch, {kGdnLayers, kDim, DType::kFloat32}));
  PRISTINE_ASSIGN_OR_RETURN(manager_, BufferManager::Create(device));
  PRISTINE_ASSIGN_OR_RETURN(metadata_, StepMetadata::Create(*manager_, {.max_requests = kMaxBatch,
                                                                        .max_tokens = kMaxBatch,
                                                                        .page_size = kPageSize,
                                                                        .num_pages = kPages,
                                                                        .max_step_pages = kMaxBatch * kPagesEach,
                                                                        .max_length = kMaxLength,
                                                                        .state_slots = kMaxBatch + 1}));
  PRISTINE_ASSIGN_OR_RETURN(tokens_, manager_->Register<int32_t>({.name = "tokens",
                                                                  .role = Role::kRefilled,
                                                                  .kind = Kind::kSlot,
                                                                  .axis = Axis::Requests(),
                                                                  .limit = kVocabulary},
                                                                 std::vector<int32_t>(kMaxBatch, -1)));
  PRISTINE_ASSIGN_OR_RETURN(plan_, DecodePlan::Create(*manager_, {.buckets = kBuckets,
                                                                  .q_heads = kHeads,
                                                                  .kv_heads = kKvHeads,
                                                                  .head_dim = kAttentionDim,
                                                                  .page_size = kPageSize,
                                                                  .max_row_tokens = kMaxLength,
                                                                  .derived_from = {metadata_->lengths().id}}));
  PRISTINE_ASSIGN_OR_RETURN(decode_, PagedDecode::Create(*plan_, 0.125f));
  PRISTINE_RETURN_IF_ERROR(states_->Protect(*manager_, "states"));
  const struct {
    DeviceBuffer& to;
    int32_t width;
  } tensors[] = {{x_, kHidden},
                 {mixed_, kDim},
                 {a_, kVHeads},
                 {b_, kVHeads},
                 {qkv_, kDim},
                 {gdn_out_, kVDim},
                 {q_, kHeads * kAttentionDim},
                 {k_new_, kKvHeads * kAttentionDim},
                 {v_new_, kKvHeads * kAttentionDim},
                 {out_, kHeads * kAttentionDim},
                 {lse_, kHeads},
                 {logits_, kVocabulary},
                 {next_, 1}};
  for (const auto& [to, width] : tensors) {
    PRISTINE_ASSIGN_OR_RETURN(to, device.Allocate(sizeof(float) * kMaxBatch * static_cast<size_t>(width), "decoder"));
  }
  for (DeviceBuffer* pool : {&k_, &v_}) {
    PRISTINE_ASSIGN_OR_RETURN(
        *pool, device.Allocate(sizeof(float) * kPages * kPageSize * kKvHeads * kAttentionDim, "decoder KV"));
    PRISTINE_RETURN_IF_ERROR(stream_.Fill(pool->As<std::byte>(), std::byte{0}));
  }
  for (int32_t page = kPages - 1; page >= 1; --page) free_pages_.push_back(page);
  PRISTINE_RETURN_IF_ERROR(manager_->Seal());
  if (!captured) return absl::OkStatus();
  PRISTINE_ASSIGN_OR_RETURN(
      runner_,
      GraphRunner::Create({.buckets = kBuckets}, [this](Stream& s, const Extent& bucket) { return Body(s, bucket); }));
  PRISTINE_RETURN_IF_ERROR(runner_->AddHook(*manager_));
  return runner_->CaptureAll(stream_);
}

absl::Status Decoder::Body(Stream& stream, const Extent& bucket) {
  const int32_t rows = bucket.requests;
  PRISTINE_RETURN_IF_ERROR(Launch(stream, kEmbed,
                                  {tokens_.live.address(), weights_.embedding.memory.As<float>().address(),
                                   x_.As<float>().address(), rows, kHidden, kVocabulary}));
  const DeviceSpan<std::byte> qkv = qkv_.As<std::byte>();
  constexpr size_t kBatchBytes = sizeof(float) * kMaxBatch;
  const ConvOutputs split = {.q_dim = kQkDim,
                             .k_dim = kQkDim,
                             .v_dim = kVDim,
                             .q = qkv.Sub(0, kBatchBytes * kQkDim),
                             .k = qkv.Sub(kBatchBytes * kQkDim, kBatchBytes * kQkDim),
                             .v = qkv.Sub(2 * kBatchBytes * kQkDim, kBatchBytes * kVDim)};
  const DeviceSpan<const int32_t> slots = metadata_->state_slots().live;
  for (int32_t layer = 0; layer < kGdnLayers; ++layer) {
    const Weights::Gdn& w = weights_.gdn[static_cast<size_t>(layer)];
    PRISTINE_RETURN_IF_ERROR(Dense(stream, x_, kHidden, w.mixed, mixed_, kDim, rows, true, false));
    PRISTINE_RETURN_IF_ERROR(Dense(stream, x_, kHidden, w.a, a_, kVHeads, rows, true, false));
    PRISTINE_RETURN_IF_ERROR(Dense(stream, x_, kHidden, w.b, b_, kVHeads, rows, true, false));
    PRISTINE_RETURN_IF_ERROR(CausalConv1dUpdate(
        stream, rows, {.x = {mixed_.As<const std::byte>()}, .weight = w.conv.bytes(), .cache_indices = slots},
        states_->conv_view(layer), split));
    const RecurrentInputs inputs = {.qk_heads = kQkHeads,
                                    .q = {split.q},
                                    .k = {split.k},
                                    .v = {split.v},
                                    .gates = {DType::kFloat32,
                                              kVHeads,
                                              {a_.As<const std::byte>()},
                                              {b_.As<const std::byte>()},
                                              w.a_log.memory.As<const float>().Sub(0, kVHeads),
                                              w.dt_bias.memory.As<const float>().Sub(0, kVHeads)},
                                    .cache_indices = slots};
    PRISTINE_RETURN_IF_ERROR(Decode(stream, rows, inputs, states_->view(layer), gdn_out_.As<std::byte>()));
    PRISTINE_RETURN_IF_ERROR(Dense(stream, gdn_out_, kVDim, w.out, x_, kHidden, rows, false, true));
  }
  constexpr int32_t kQDim = kHeads * kAttentionDim, kKvDim = kKvHeads * kAttentionDim;
  PRISTINE_RETURN_IF_ERROR(Dense(stream, x_, kHidden, weights_.q, q_, kQDim, rows, true, false));
  PRISTINE_RETURN_IF_ERROR(Dense(stream, x_, kHidden, weights_.k, k_new_, kKvDim, rows, true, false));
  PRISTINE_RETURN_IF_ERROR(Dense(stream, x_, kHidden, weights_.v, v_new_, kKvDim, rows, true, false));
  PRISTINE_RETURN_IF_ERROR(attention::AppendKv(stream, rows,
                                               {.dtype = DType::kFloat32,
                                                .kv_heads = kKvHeads,
                                                .head_dim = kAttentionDim,
                                                .k_new = k_new_.As<const std::byte>(),
                                                .v_new = v_new_.As<const std::byte>(),
                                                .slots = metadata_->slots().live,
                                                .k = k_.As<std::byte>(),
                                                .v = v_.As<std::byte>()}));
  PRISTINE_RETURN_IF_ERROR(decode_->Run(stream, bucket,
                                        {.q = q_.As<const std::byte>(),
                                         .k = k_.As<const std::byte>(),
                                         .v = v_.As<const std::byte>(),
                                         .out = out_.As<std::byte>(),
                                         .lse = lse_.As<attention::LseBase2>(),
                                         .kv_indptr = metadata_->kv_indptr().live,
                                         .kv_indices = metadata_->kv_indices().live,
                                         .lengths = metadata_->lengths().live}));
  PRISTINE_RETURN_IF_ERROR(Dense(stream, out_, kQDim, weights_.attention_out, x_, kHidden, rows, false, true));
  PRISTINE_RETURN_IF_ERROR(Dense(stream, x_, kHidden, weights_.logits, logits_, kVocabulary, rows, true, false));
  return Launch(stream, kArgmax, {logits_.As<float>().address(), next_.As<int32_t>().address(), rows, kVocabulary});
}

absl::Status Decoder::Step(absl::Span<Request* const> active) {
  const int32_t real = static_cast<int32_t>(active.size());
  const Extent bucket =
      *std::find_if(kBuckets.begin(), kBuckets.end(), [&](const Extent& b) { return b.requests >= real; });
  std::vector<int32_t> tokens, lengths, indptr = {0}, indices, slots, positions, states;
  for (Request* request : active) {
    const int32_t position = request->length++;
    const int32_t pages = position / kPageSize + 1;
    tokens.push_back(request->tokens[static_cast<size_t>(position)]);
    lengths.push_back(request->length);
    indices.insert(indices.end(), request->pages.begin(), request->pages.begin() + pages);
    indptr.push_back(static_cast<int32_t>(indices.size()));
    slots.push_back(request->pages[static_cast<size_t>(pages - 1)] * kPageSize + position % kPageSize);
    positions.push_back(position);
    states.push_back(request->slot);
  }
  PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(bucket, {real, real}));
  PRISTINE_RETURN_IF_ERROR(metadata_->Refill({.lengths = lengths,
                                              .kv_indptr = indptr,
                                              .kv_indices = indices,
                                              .slots = slots,
                                              .positions = positions,
                                              .state_slots = states}));
  PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(tokens_, tokens));
  PRISTINE_RETURN_IF_ERROR(plan_->Plan(bucket, lengths));
  if (runner_ != nullptr) {
    PRISTINE_RETURN_IF_ERROR(runner_->Replay(stream_, bucket, {real, real}));
  } else {
    PRISTINE_RETURN_IF_ERROR(manager_->BeforeReplay(stream_, bucket, {real, real}));
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream_, bucket));
    PRISTINE_RETURN_IF_ERROR(Body(stream_, bucket));
  }
  std::vector<int32_t> next(static_cast<size_t>(real));
  PRISTINE_RETURN_IF_ERROR(
      stream_.CopyToHost(absl::MakeSpan(reinterpret_cast<std::byte*>(next.data()), next.size() * sizeof(int32_t)),
                         next_.As<std::byte>().Sub(0, next.size() * sizeof(int32_t))));
  PRISTINE_RETURN_IF_ERROR(stream_.Synchronize());
  for (size_t i = 0; i < active.size(); ++i) {
    if (active[i]->length == static_cast<int32_t>(active[i]->tokens.size())) active[i]->tokens.push_back(next[i]);
  }
  return absl::OkStatus();
}

template <class BackendT>
class HybridGenerationTest : public DeviceTest<BackendT> {
 protected:
  int32_t Generated() const {
#if !defined(__OPTIMIZE__) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    const bool slow = this->device_->backend() == Backend::kHost;
#else
    const bool slow = this->device_->deferred();
#endif
    return slow ? kGeneratedOnSlowHosts : kGenerated;
  }
  // Prompt i arrives at step i * generated / 32, at the latest when one of 16 places is free. Recaptures a graph in the
  // middle of the run.
  std::vector<Request> Serve(Decoder& decoder) {
    std::vector<Request> requests(kPrompts);
    std::mt19937_64 random(5);
    for (Request& request : requests) {
      for (size_t i = 1 + random() % kMaxPrompt; i > 0; --i) {
        request.prompt.push_back(static_cast<int32_t>(random() % kVocabulary));
      }
      request.tokens = request.prompt;
    }
    std::vector<Request*> active;
    size_t waiting = 0;
    for (int32_t step = 0; waiting < requests.size() || !active.empty(); ++step) {
      while (waiting < requests.size() && active.size() < static_cast<size_t>(kMaxBatch) &&
             static_cast<int32_t>(waiting) * Generated() / kPrompts <= step) {
        active.push_back(&requests[waiting++]);
        EXPECT_OK(decoder.Enter(*active.back()));
      }
      if (active.empty()) continue;
      if (step == Generated() && decoder.runner() != nullptr) {
        EXPECT_OK(decoder.runner()->Recapture(*this->stream_, kBuckets.back()));
      }
      const absl::Status stepped = decoder.Step(active);
      EXPECT_OK(stepped);
      if (!stepped.ok()) break;
      const auto done = [&](Request* request) {
        if (request->tokens.size() < request->prompt.size() + static_cast<size_t>(Generated())) return false;
        EXPECT_OK(decoder.Leave(*request));
        return true;
      };
      active.erase(std::remove_if(active.begin(), active.end(), done), active.end());
    }
    return requests;
  }
};
TYPED_TEST_SUITE(HybridGenerationTest, AllBackends, BackendNames);

TYPED_TEST(HybridGenerationTest, CapturedIsEagerTokenForToken) {
  ASSERT_OK_AND_ASSIGN(const Weights weights, MakeWeights(*this->device_, *this->stream_));
  std::vector<std::vector<Request>> runs;
  for (const bool captured : {true, false}) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Decoder> decoder,
                         Decoder::Create(*this->device_, *this->stream_, weights, captured));
    runs.push_back(this->Serve(*decoder));
    ASSERT_OK_AND_ASSIGN(const std::vector<Violation> violations, decoder->manager().Verify(*this->stream_));
    EXPECT_TRUE(violations.empty()) << violations[0].ToString();
    if (!captured) continue;
    for (const int64_t replays : decoder->runner()->stats().replays_by_bucket) EXPECT_GT(replays, 0);
  }
  std::set<int32_t> seen;
  for (size_t i = 0; i < kPrompts; ++i) {
    EXPECT_EQ(runs[0][i].tokens.size(), runs[0][i].prompt.size() + static_cast<size_t>(this->Generated()));
    EXPECT_EQ(runs[0][i].tokens, runs[1][i].tokens) << "prompt " << i;
    seen.insert(runs[0][i].tokens.begin() + static_cast<std::ptrdiff_t>(runs[0][i].prompt.size()),
                runs[0][i].tokens.end());
  }
  EXPECT_GT(seen.size(), 64u) << "a model that says the same always would show nothing";
}

}  // namespace
}  // namespace pristine::testing
