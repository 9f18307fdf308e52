// The layers of the gated delta net under the kit, with slots and lengths that go through StepMetadata.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "pristine/attention/gdn/causal_conv1d.h"
#include "pristine/attention/gdn/prefill.h"
#include "pristine/attention/gdn/qkv_split.h"
#include "pristine/attention/gdn/recurrent.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/conformance/state_conformance.h"
#include "pristine/graph_runtime/status.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/support/backends.h"
#include "tests/support/gdn_truth.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using namespace attention::gdn;  // NOLINT(build/namespaces): the suite is about that namespace
using attention::DType;
using attention::StepMetadata;
using conformance::BoundArray;
using conformance::Conforms;
using conformance::StateRow;
using conformance::StateShape;
using conformance::StateStep;
using conformance::StateTensors;
using conformance::Values;

constexpr int32_t kQkHeads = 1, kVHeads = 2;
constexpr int32_t kQkDim = kQkHeads * kHeadDim, kVDim = kVHeads * kHeadDim, kDim = 2 * kQkDim + kVDim;
constexpr float kALog[kVHeads] = {-0.5f, 0.25f}, kDtBias[kVHeads] = {-3, 0.5f};

// The rule over what the convolution leaves, [tokens, q + k + v], and the inputs of the gates; `stored`: how many of
// the tokens go into the state.
template <class Stored>
auto GdnRule(Stored stored) {
  return [stored](const StateRow& row, const Values& inputs, Values& states, Values& outputs) {
    const std::vector<double>&mixed = inputs[0], &a = inputs[1], &b = inputs[2];
    for (int32_t h = 0; h < kVHeads; ++h) {
      const size_t head = static_cast<size_t>(h), first = head * kStateElements;
      double* const slot = &states[0][first];
      std::vector<double> state(slot, slot + kStateElements);
      for (int32_t t = 0; t < row.tokens; ++t) {
        const double* const at = &mixed[static_cast<size_t>(t) * kDim];
        const size_t gate = static_cast<size_t>(t) * kVHeads + head;
        const int32_t qk = h / (kVHeads / kQkHeads) * kHeadDim;
        GdnStep({at + qk, at + kQkDim + qk, at + 2 * kQkDim + h * kHeadDim, a[gate], b[gate], kALog[h], kDtBias[h]},
                state, &outputs[0][static_cast<size_t>(t) * kVDim + head * kHeadDim]);
        if (t + 1 == stored(row)) std::copy(state.begin(), state.end(), slot);
      }
    }
  };
}

// What all of them share: slots in StepMetadata, and the parameters of the gates.
class GdnWrapper : public conformance::StateWrapper {
 public:
  absl::Status Prepare(Stream& stream, int32_t bucket, const StateStep& step) override {
    const Extent wide = {bucket, bucket * shape_.tokens};
    const Extent extent = {static_cast<int32_t>(step.slots.size()), step.qo_indptr.back()};
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(wide, extent));
    const std::vector<int32_t> none(step.qo_indptr.back(), 0), nowhere(step.qo_indptr.back(), -1);
    const std::vector<int32_t> lengths(step.slots.size(), 0), indptr(step.slots.size() + 1, 0);
    PRISTINE_RETURN_IF_ERROR(
        metadata_->Refill({.lengths = lengths,
                           .kv_indptr = indptr,
                           .kv_indices = {},
                           .slots = nowhere,
                           .positions = none,
                           .qo_indptr = shape_.ragged ? step.qo_indptr : absl::Span<const int32_t>(),
                           .state_slots = step.slots}));
    PRISTINE_RETURN_IF_ERROR(RefillMore(step));
    return manager_->BeforeReplay(stream, wide, extent);
  }
  absl::Status Run(Stream& stream, int32_t bucket, const StateTensors& tensors) override {
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream, {bucket, bucket * shape_.tokens}));
    return Layer(stream, bucket, tensors);
  }
  // As GraphRunner does.
  absl::Status WarmUp(Stream& stream, int32_t bucket, const StateTensors& tensors) override {
    PRISTINE_RETURN_IF_ERROR(manager_->RestoreAll(stream, {bucket, bucket * shape_.tokens}));
    PRISTINE_RETURN_IF_ERROR(Layer(stream, bucket, tensors));
    return manager_->RestoreAll(stream, {bucket, bucket * shape_.tokens});
  }
  std::vector<BoundArray> BoundArrays() override {
    std::vector<BoundArray> arrays = {{Kind::kSlot, metadata_->state_slots().live, shape_.slots()}};
    if (shape_.ragged) arrays.push_back({Kind::kIndptr, metadata_->qo_indptr().live, shape_.max_tokens()});
    return arrays;
  }

 protected:
  explicit GdnWrapper(const StateShape& shape) : shape_(shape) {}
  absl::Status Open(Device& device, Stream& stream) {
    PRISTINE_ASSIGN_OR_RETURN(manager_, BufferManager::Create(device));
    PRISTINE_ASSIGN_OR_RETURN(metadata_, StepMetadata::Create(*manager_, {.max_requests = shape_.max_requests(),
                                                                          .max_tokens = shape_.max_tokens(),
                                                                          .page_size = 1,
                                                                          .num_pages = 1,
                                                                          .max_step_pages = shape_.max_requests(),
                                                                          .max_length = 1,
                                                                          .ragged = shape_.ragged,
                                                                          .state_slots = shape_.slots()}));
    PRISTINE_ASSIGN_OR_RETURN(gate_params_, device.Allocate(sizeof(kALog) + sizeof(kDtBias), "gate params"));
    const DeviceSpan<std::byte> to = gate_params_.As<std::byte>();
    PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(to.Sub(0, sizeof(kALog)), std::as_bytes(std::span(kALog))));
    PRISTINE_RETURN_IF_ERROR(
        stream.CopyFromHost(to.Sub(sizeof(kALog), sizeof(kDtBias)), std::as_bytes(std::span(kDtBias))));
    return stream.Synchronize();
  }
  virtual absl::Status RefillMore(const StateStep&) { return absl::OkStatus(); }
  virtual absl::Status Layer(Stream& stream, int32_t bucket, const StateTensors& tensors) = 0;

  absl::StatusOr<StateView> View(const StateTensors& t) const {
    return ViewOf({shape_.states[0].dtype, kVHeads, shape_.slots(), 0, t.states[0], 1}, PaddedRows::kSkip);
  }
  GateInputs Gates(const StateTensors& t) const {
    return {shape_.inputs[1].dtype,
            kVHeads,
            {t.inputs[1], 0},
            {t.inputs[2], 0},
            gate_params_.As<const float>().Sub(0, kVHeads),
            gate_params_.As<const float>().Sub(kVHeads, kVHeads)};
  }

  const StateShape shape_;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
  DeviceBuffer gate_params_;  // a_log, dt_bias
};

StateShape GdnShape(DType dtype, DType state, int32_t tokens) {
  StateShape shape;
  shape.inputs = {{"mixed", dtype, kDim}, {"a", dtype, kVHeads, -4, 2}, {"b", dtype, kVHeads, -3, 3}};
  shape.outputs = {{"out", dtype, kVDim}};
  shape.states = {{"states", state, kVHeads * kHeadDim * kHeadDim, -0.3, 0.3}};
  shape.buckets = {1, 2, 4};
  shape.tokens = tokens;
  shape.tolerance = dtype == DType::kFloat32 && state == DType::kFloat32 ? 2e-5 : 1e-2;
  return shape;
}

// QkvSplit, then a token each.
class DecodeWrapper : public GdnWrapper {
 public:
  static StateShape Shape(DType dtype, DType state) {
    StateShape shape = GdnShape(dtype, state, 1);
    shape.rule = GdnRule([](const StateRow&) { return 1; });
    return shape;
  }
  static absl::StatusOr<std::unique_ptr<DecodeWrapper>> Create(Device& device, Stream& stream,
                                                               const StateShape& shape) {
    std::unique_ptr<DecodeWrapper> wrapper(new DecodeWrapper(shape));
    PRISTINE_RETURN_IF_ERROR(wrapper->Open(device, stream));
    const size_t bytes = attention::SizeOf(shape.inputs[0].dtype) * static_cast<size_t>(shape.max_tokens() * kDim);
    PRISTINE_ASSIGN_OR_RETURN(wrapper->qkv_, device.Allocate(bytes, "qkv"));
    PRISTINE_RETURN_IF_ERROR(wrapper->manager_->Seal());
    return wrapper;
  }

 private:
  explicit DecodeWrapper(const StateShape& shape) : GdnWrapper(shape) {}
  absl::Status Layer(Stream& stream, int32_t bucket, const StateTensors& t) override {
    const size_t row = static_cast<size_t>(shape_.max_tokens()) * attention::SizeOf(shape_.inputs[0].dtype);
    const DeviceSpan<std::byte> all = qkv_.As<std::byte>();
    const DeviceSpan<std::byte> q = all.Sub(0, row * kQkDim), k = all.Sub(row * kQkDim, row * kQkDim),
                                v = all.Sub(2 * row * kQkDim, row * kVDim);
    PRISTINE_RETURN_IF_ERROR(QkvSplit(stream, bucket,
                                      {.dtype = shape_.inputs[0].dtype,
                                       .q_dim = kQkDim,
                                       .k_dim = kQkDim,
                                       .v_dim = kVDim,
                                       .mixed = t.inputs[0],
                                       .stride_t = kDim,
                                       .q = q,
                                       .k = k,
                                       .v = v}));
    PRISTINE_ASSIGN_OR_RETURN(const StateView view, View(t));
    return Decode(stream, bucket,
                  {.qk_heads = kQkHeads,
                   .q = {q},
                   .k = {k},
                   .v = {v},
                   .gates = Gates(t),
                   .cache_indices = metadata_->state_slots().live},
                  view, t.outputs[0]);
  }
  DeviceBuffer qkv_;
};

// Of the convolution: multiples of 1/64, the same in every dtype.
float Weight(int32_t channel, int32_t tap) { return static_cast<float>((channel * 7 + tap * 13) % 64 - 32) / 64; }

absl::StatusOr<DeviceBuffer> ConvWeights(Device& device, Stream& stream, DType dtype) {
  std::vector<double> weights;
  for (int32_t i = 0; i < kDim * kConvWidth; ++i) weights.push_back(Weight(i / kConvWidth, i % kConvWidth));
  PRISTINE_ASSIGN_OR_RETURN(Tensor tensor, MakeTensor(device, stream, dtype, weights));
  return std::move(tensor.memory);
}

// The convolution and the rule, over all tokens.
void LayerRule(const StateRow& row, const Values& inputs, Values& states, Values& outputs) {
  Values convolved = inputs;
  for (int32_t t = 0; t < row.tokens; ++t) {
    for (int32_t c = 0; c < kDim; ++c) {
      double* const history = &states[1][static_cast<size_t>(c) * kConvHistory];
      double& x = convolved[0][static_cast<size_t>(t * kDim + c)];
      const double sum =
          Weight(c, 0) * history[0] + Weight(c, 1) * history[1] + Weight(c, 2) * history[2] + Weight(c, 3) * x;
      std::copy(history + 1, history + 3, history);
      history[2] = x;
      x = sum / (1 + std::exp(-sum));
    }
  }
  GdnRule([](const StateRow& of) { return of.tokens; })(row, convolved, states, outputs);
}

// What a layer of a model does with a token each: the convolution, straight into normalised q, k and v, and the rule.
// Two pools, of convolution states and of the rule's.
class ConvDecodeWrapper : public GdnWrapper {
 public:
  static StateShape Shape(DType dtype, DType state) {
    StateShape shape = GdnShape(dtype, state, 1);
    shape.states.push_back({"conv_states", dtype, kDim * kConvHistory});
    shape.rule = LayerRule;
    return shape;
  }
  static absl::StatusOr<std::unique_ptr<ConvDecodeWrapper>> Create(Device& device, Stream& stream,
                                                                   const StateShape& shape) {
    std::unique_ptr<ConvDecodeWrapper> wrapper(new ConvDecodeWrapper(shape));
    PRISTINE_RETURN_IF_ERROR(wrapper->Open(device, stream));
    const size_t element = attention::SizeOf(shape.inputs[0].dtype);
    PRISTINE_ASSIGN_OR_RETURN(wrapper->qkv_, device.Allocate(element * shape.max_tokens() * kDim, "qkv"));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->weight_, ConvWeights(device, stream, shape.inputs[0].dtype));
    PRISTINE_RETURN_IF_ERROR(wrapper->manager_->Seal());
    return wrapper;
  }

 private:
  explicit ConvDecodeWrapper(const StateShape& shape) : GdnWrapper(shape) {}
  absl::Status Layer(Stream& stream, int32_t bucket, const StateTensors& t) override {
    const size_t row = static_cast<size_t>(shape_.max_tokens()) * attention::SizeOf(shape_.inputs[0].dtype);
    const DeviceSpan<std::byte> all = qkv_.As<std::byte>();
    const ConvOutputs qkv = {.q_dim = kQkDim,
                             .k_dim = kQkDim,
                             .v_dim = kVDim,
                             .q = all.Sub(0, row * kQkDim),
                             .k = all.Sub(row * kQkDim, row * kQkDim),
                             .v = all.Sub(2 * row * kQkDim, row * kVDim)};
    const DeviceSpan<const int32_t> slots = metadata_->state_slots().live;
    PRISTINE_RETURN_IF_ERROR(CausalConv1dUpdate(
        stream, bucket, {.x = {t.inputs[0]}, .weight = weight_.As<const std::byte>(), .cache_indices = slots},
        {shape_.states[1].dtype, kDim, shape_.slots(), kDim * kConvHistory, t.states[1]}, qkv));
    PRISTINE_ASSIGN_OR_RETURN(const StateView view, View(t));
    return Decode(
        stream, bucket,
        {.qk_heads = kQkHeads, .q = {qkv.q}, .k = {qkv.k}, .v = {qkv.v}, .gates = Gates(t), .cache_indices = slots},
        view, t.outputs[0]);
  }
  DeviceBuffer qkv_, weight_;
};

// Prompts of any lengths, from none on: the convolution, with norm and gates, and the rule in chunks.
class PrefillWrapper : public GdnWrapper {
 public:
  static StateShape Shape(DType dtype, DType state) {
    StateShape shape = GdnShape(dtype, state, 66);  // past a chunk
    shape.states.push_back({"conv_states", dtype, kDim * kConvHistory});
    shape.rule = LayerRule;
    shape.buckets = {1, 2};
    shape.ragged = true;
    return shape;
  }
  static absl::StatusOr<std::unique_ptr<PrefillWrapper>> Create(Device& device, Stream& stream,
                                                                const StateShape& shape) {
    std::unique_ptr<PrefillWrapper> wrapper(new PrefillWrapper(shape));
    PRISTINE_RETURN_IF_ERROR(wrapper->Open(device, stream));
    const size_t rows = static_cast<size_t>(shape.max_tokens());
    PRISTINE_ASSIGN_OR_RETURN(wrapper->qkv_,
                              device.Allocate(attention::SizeOf(shape.inputs[0].dtype) * rows * kDim, "qkv"));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->gates_, device.Allocate(2 * sizeof(float) * rows * kVHeads, "gates"));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->weight_, ConvWeights(device, stream, shape.inputs[0].dtype));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->prefill_,
                              Prefill::Create(device, {{shape.max_requests(), shape.max_tokens()}, kQkHeads, kVHeads}));
    PRISTINE_RETURN_IF_ERROR(wrapper->manager_->Seal());
    return wrapper;
  }

 private:
  explicit PrefillWrapper(const StateShape& shape) : GdnWrapper(shape) {}
  absl::Status Layer(Stream& stream, int32_t bucket, const StateTensors& t) override {
    const int32_t tokens = bucket * shape_.tokens;
    const size_t row = static_cast<size_t>(shape_.max_tokens()) * attention::SizeOf(shape_.inputs[0].dtype);
    const DeviceSpan<std::byte> all = qkv_.As<std::byte>();
    const DeviceSpan<float> gates = gates_.As<float>();
    const ConvOutputs qkv = {.q_dim = kQkDim,
                             .k_dim = kQkDim,
                             .v_dim = kVDim,
                             .q = all.Sub(0, row * kQkDim),
                             .k = all.Sub(row * kQkDim, row * kQkDim),
                             .v = all.Sub(2 * row * kQkDim, row * kVDim),
                             .norm_head_dim = kHeadDim,
                             .gates = Gates(t),
                             .g = gates.Sub(0, gates.size() / 2),
                             .beta = gates.Sub(gates.size() / 2, gates.size() / 2)};
    const DeviceSpan<const int32_t> slots = metadata_->state_slots().live, lengths = metadata_->qo_indptr().live;
    PRISTINE_RETURN_IF_ERROR(
        CausalConv1d(stream, tokens, {.requests = bucket, .cu_seqlens = lengths},
                     {.x = {t.inputs[0]}, .weight = weight_.As<const std::byte>(), .cache_indices = slots},
                     {shape_.states[1].dtype, kDim, shape_.slots(), kDim * kConvHistory, t.states[1]}, qkv));
    PRISTINE_ASSIGN_OR_RETURN(const StateView view, View(t));
    return prefill_->Run(stream, {bucket, tokens},
                         {.q = {qkv.q},
                          .k = {qkv.k},
                          .v = {qkv.v},
                          .g = qkv.g,
                          .beta = qkv.beta,
                          .cu_seqlens = lengths,
                          .initial_slots = slots,
                          .final_slots = slots,
                          .out = t.outputs[0]},
                         view);
  }
  DeviceBuffer qkv_, gates_, weight_;
  std::unique_ptr<Prefill> prefill_;
};

// Verifies a chain of draft tokens, then commits as many as a request's slot says: 0 and all among them.
class VerifyWrapper : public GdnWrapper {
 public:
  static constexpr int32_t kTokens = 3;
  static int32_t Accepted(int32_t slot) { return slot % (kTokens + 1); }
  static StateShape Shape(DType dtype, DType state) {
    StateShape shape = GdnShape(dtype, state, kTokens);
    shape.rule = GdnRule([](const StateRow& row) { return Accepted(row.slot); });
    return shape;
  }
  static absl::StatusOr<std::unique_ptr<VerifyWrapper>> Create(Device& device, Stream& stream,
                                                               const StateShape& shape) {
    std::unique_ptr<VerifyWrapper> wrapper(new VerifyWrapper(shape));
    PRISTINE_RETURN_IF_ERROR(wrapper->Open(device, stream));
    const std::vector<int32_t> all(static_cast<size_t>(shape.max_requests()), kTokens);
    PRISTINE_ASSIGN_OR_RETURN(wrapper->accepted_, wrapper->manager_->Register<int32_t>({.name = "accepted",
                                                                                        .role = Role::kRefilled,
                                                                                        .kind = Kind::kLength,
                                                                                        .axis = Axis::Requests(),
                                                                                        .limit = kTokens},
                                                                                       all));
    PRISTINE_RETURN_IF_ERROR(wrapper->manager_->Seal());
    return wrapper;
  }
  std::vector<BoundArray> BoundArrays() override {
    std::vector<BoundArray> arrays = GdnWrapper::BoundArrays();
    arrays.push_back({Kind::kLength, accepted_.live, kTokens});
    return arrays;
  }

 private:
  explicit VerifyWrapper(const StateShape& shape) : GdnWrapper(shape) {}
  absl::Status RefillMore(const StateStep& step) override {
    std::vector<int32_t> accepted;
    for (const int32_t slot : step.slots) accepted.push_back(Accepted(slot));
    return manager_->Refill<int32_t>(accepted_, accepted);
  }
  absl::Status Layer(Stream& stream, int32_t bucket, const StateTensors& t) override {
    const size_t element = attention::SizeOf(shape_.inputs[0].dtype);
    const auto part = [&](size_t first) {
      return Rows{t.inputs[0].Sub(first * element, t.inputs[0].size() - first * element), kDim};
    };
    const RecurrentInputs inputs = {.qk_heads = kQkHeads,
                                    .q = part(0),
                                    .k = part(kQkDim),
                                    .v = part(2 * kQkDim),
                                    .gates = Gates(t),
                                    .cache_indices = metadata_->state_slots().live};
    PRISTINE_ASSIGN_OR_RETURN(const StateView view, View(t));
    PRISTINE_RETURN_IF_ERROR(Verify(stream, bucket, kTokens, inputs, view, t.outputs[0]));
    return Commit(stream, bucket, kTokens, inputs, view, accepted_.live);
  }
  Buffer<int32_t> accepted_;
};

template <class BackendT>
class GdnWrappersTest : public DeviceTest<BackendT> {
 protected:
  template <class Wrapper>
  void Check(DType dtype, DType state) {
    const StateShape shape = Wrapper::Shape(dtype, state);
    ASSERT_OK_AND_ASSIGN(const auto wrapper, Wrapper::Create(*this->device_, *this->stream_, shape));
    EXPECT_TRUE(Conforms(*this->stream_, *wrapper, shape));
  }
};
TYPED_TEST_SUITE(GdnWrappersTest, AllBackends, BackendNames);

TYPED_TEST(GdnWrappersTest, DecodeConforms) { this->template Check<DecodeWrapper>(DType::kFloat32, DType::kFloat32); }

TYPED_TEST(GdnWrappersTest, DecodeInBFloat16Conforms) {
  this->template Check<DecodeWrapper>(DType::kBFloat16, DType::kBFloat16);
}

TYPED_TEST(GdnWrappersTest, ConvolutionAndDecodeConform) {
  this->template Check<ConvDecodeWrapper>(DType::kFloat32, DType::kFloat32);
}

TYPED_TEST(GdnWrappersTest, ConvolutionAndDecodeInBFloat16Conform) {
  this->template Check<ConvDecodeWrapper>(DType::kBFloat16, DType::kBFloat16);
}

TYPED_TEST(GdnWrappersTest, PrefillConforms) {
  this->template Check<PrefillWrapper>(DType::kBFloat16, DType::kFloat32);
}

TYPED_TEST(GdnWrappersTest, VerifyAndCommitConform) {
  this->template Check<VerifyWrapper>(DType::kFloat32, DType::kFloat32);
}

}  // namespace
}  // namespace pristine::testing
