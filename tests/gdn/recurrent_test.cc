#include "attention/gdn/kernels/recurrent.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pristine/attention/gdn/recurrent.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"
#include "tests/support/test_kernels.h"

namespace pristine::testing {
namespace {

using namespace attention::gdn;  // NOLINT(build/namespaces): the suite is about that namespace

// The delta rule as recurrent.h has it, in double and token by token: S is [V, K].
void Recur(const Layer& layer, int64_t token, int32_t head, std::vector<double>& state, double* out) {
  const int64_t at = token * layer.v_heads + head;
  const int32_t qk = head / (layer.v_heads / layer.qk_heads);
  const auto load = [&](int64_t first, double scale, bool norm) {
    std::vector<double> x(128);
    double sum = 1e-6;
    for (int64_t i = 0; i < 128; ++i) {
      x[static_cast<size_t>(i)] = layer.mixed.values[static_cast<size_t>(token * layer.dim() + first + i)];
      sum += x[static_cast<size_t>(i)] * x[static_cast<size_t>(i)];
    }
    for (double& value : x) value *= norm ? scale / std::sqrt(sum) : scale;
    return x;
  };
  const std::vector<double> q = load(qk * 128, 1 / std::sqrt(128.0), true);
  const std::vector<double> k = load(layer.qk_dim() + qk * 128, 1, true);
  const std::vector<double> v = load(2 * layer.qk_dim() + head * 128, 1, false);
  const size_t gate = static_cast<size_t>(at);
  const double x = layer.a.values[gate] + layer.dt_bias.values[static_cast<size_t>(head)];
  const double g = -std::exp(layer.a_log.values[static_cast<size_t>(head)]) * (x > 20 ? x : std::log1p(std::exp(x)));
  const double beta = 1 / (1 + std::exp(-layer.b.values[gate]));
  for (size_t i = 0; i < 128; ++i) {
    double read = 0, result = 0;
    for (size_t j = 0; j < 128; ++j) read += (state[i * 128 + j] *= std::exp(g)) * k[j];
    for (size_t j = 0; j < 128; ++j) result += (state[i * 128 + j] += beta * (v[i] - read) * k[j]) * q[j];
    if (out != nullptr) out[i] = result;
  }
}

struct Expected {
  std::vector<double> out;
  std::vector<double> states;  // of all slots, after
};

template <class BackendT>
class RecurrentTest : public DeviceTest<BackendT> {
 protected:
  // A pool with `slots` usable slots full of random states.
  void MakePool(DType dtype, int32_t v_heads, int32_t slots, std::mt19937_64& random) {
    ASSERT_OK_AND_ASSIGN(pool_, StatePool::Create(*this->device_, dtype, v_heads, slots));
    std::vector<double> states = Uniform(random, pool_->view().states.size() / attention::SizeOf(dtype), -0.3, 0.3);
    SetStates(states);
  }
  void SetStates(const std::vector<double>& states) {
    const Bytes bytes = Encode(pool_->view().dtype, states);
    ASSERT_OK(this->stream_->CopyFromHost(pool_->view().states, bytes));
    ASSERT_OK(this->stream_->Synchronize());
  }
  std::vector<double> States() {
    absl::StatusOr<Bytes> bytes = ReadBytes(*this->stream_, pool_->view().states);
    EXPECT_OK(bytes);
    return Decoded(pool_->view().dtype, *bytes);
  }
  void SetIndices(const std::vector<int32_t>& indices, Tensor& to) {
    std::vector<double> zero(indices.size());
    absl::StatusOr<Tensor> made = MakeTensor(*this->device_, *this->stream_, DType::kFloat32, zero);
    ASSERT_OK(made);
    to = *std::move(made);
    ASSERT_OK(this->stream_->CopyFromHost(
        to.bytes().Sub(0, indices.size() * 4),
        {reinterpret_cast<const std::byte*>(indices.data()), indices.size() * sizeof(int32_t)}));
    ASSERT_OK(this->stream_->Synchronize());
  }
  RecurrentInputs Inputs(const Layer& layer) {
    return {.qk_heads = layer.qk_heads,
            .q = layer.Part(0),
            .k = layer.Part(layer.qk_dim()),
            .v = layer.Part(2 * layer.qk_dim()),
            .gates = layer.gates(),
            .cache_indices = indices_.memory.template As<const int32_t>()};
  }
  // What the formulas give, for the first lengths[r] tokens of each row.
  Expected Reference(const Layer& layer, const std::vector<int32_t>& indices, int32_t tokens,
                     const std::vector<int32_t>& lengths) {
    Expected expected;
    expected.states = States();
    const size_t row_size = static_cast<size_t>(layer.v_dim());
    expected.out.assign(indices.size() * static_cast<size_t>(tokens) * row_size, 0);
    for (size_t r = 0; r < indices.size(); ++r) {
      if (indices[r] < 0 || indices[r] >= pool_->view().slots) continue;
      for (int32_t h = 0; h < layer.v_heads; ++h) {
        double* const slot = &expected.states[(static_cast<size_t>(indices[r]) * layer.v_heads + h) * kStateElements];
        std::vector<double> state(slot, slot + kStateElements);
        for (int32_t t = 0; t < lengths[r]; ++t) {
          const size_t token = r * static_cast<size_t>(tokens) + static_cast<size_t>(t);
          Recur(layer, static_cast<int64_t>(token), h, state, &expected.out[token * row_size + h * 128]);
        }
        std::copy(state.begin(), state.end(), slot);
      }
    }
    return expected;
  }
  void TearDown() override {
    pool_.reset();
    indices_ = {};
    lengths_ = {};
    DeviceTest<BackendT>::TearDown();
  }

  std::unique_ptr<StatePool> pool_;
  Tensor indices_, lengths_;
};
TYPED_TEST_SUITE(RecurrentTest, AllBackends, BackendNames);

// Relative RMS that a result may differ by: half a step of bfloat16 where one is stored.
double Tolerance(DType a) { return a == DType::kBFloat16 ? 4e-3 : 2e-5; }

TYPED_TEST(RecurrentTest, DecodeIsTheFormulaForEveryDtypeAndHeadRatio) {
  std::mt19937_64 random(11);
  const struct {
    int32_t qk_heads, v_heads, rows;
  } shapes[] = {{2, 2, 3}, {1, 2, 3}, {2, 6, 2}, {1, 4, 1}, {4, 12, 12} /* 144 states: two V rows a thread */};
  for (const auto& shape : shapes) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const DType state : {DType::kFloat32, DType::kBFloat16}) {
        for (const bool slow : {true, false}) {
          SCOPED_TRACE(absl::StrCat(shape.qk_heads, "/", shape.v_heads, " ", ToString(dtype), " state ",
                                    ToString(state), slow ? " slow" : " fast"));
          this->MakePool(state, shape.v_heads, shape.rows + 2, random);
          ASSERT_OK_AND_ASSIGN(const Layer layer, MakeLayer(*this->device_, *this->stream_, dtype, shape.qk_heads,
                                                            shape.v_heads, shape.rows, slow, random));
          std::vector<int32_t> indices, one(static_cast<size_t>(shape.rows), 1);
          for (int32_t r = 0; r < shape.rows; ++r) indices.push_back(shape.rows + 1 - r);
          this->SetIndices(indices, this->indices_);
          ASSERT_OK_AND_ASSIGN(const Tensor out,
                               MakeTensor(*this->device_, *this->stream_, dtype,
                                          std::vector<double>(static_cast<size_t>(shape.rows * layer.v_dim()), NAN)));
          const std::vector<double> before = this->States();
          const Expected expected = this->Reference(layer, indices, 1, one);
          ASSERT_OK(Decode(*this->stream_, shape.rows, this->Inputs(layer), this->pool_->view(), out.bytes()));
          ASSERT_OK_AND_ASSIGN(const std::vector<double> got, ReadTensor(*this->stream_, out));
          EXPECT_LT(RelativeRms(expected.out, got), Tolerance(dtype));
          const std::vector<double> after = this->States();
          EXPECT_LT(RelativeRms(expected.states, after), Tolerance(state));
          // Slots that no row names keep every bit.
          const size_t slot = static_cast<size_t>(shape.v_heads) * kStateElements;
          for (const size_t untouched : {size_t{0}, size_t{1}}) {
            EXPECT_TRUE(std::equal(before.begin() + untouched * slot, before.begin() + (untouched + 1) * slot,
                                   after.begin() + untouched * slot));
          }
        }
      }
    }
  }
}

TYPED_TEST(RecurrentTest, PaddedRowsReadAndWriteNothingAndGiveZeros) {
  std::mt19937_64 random(12);
  this->MakePool(DType::kFloat32, 2, 3, random);
  std::vector<double> states = this->States();
  for (size_t i = 0; i < 2 * kStateElements; ++i) states[i] = NAN;  // slot 0
  this->SetStates(states);
  ASSERT_OK_AND_ASSIGN(const Layer layer,
                       MakeLayer(*this->device_, *this->stream_, DType::kBFloat16, 1, 2, 5, true, random));
  const std::vector<int32_t> indices = {-1, 2, 4, std::numeric_limits<int32_t>::max(),
                                        std::numeric_limits<int32_t>::min()};
  this->SetIndices(indices, this->indices_);
  ASSERT_OK_AND_ASSIGN(const Tensor out,
                       MakeTensor(*this->device_, *this->stream_, DType::kBFloat16, std::vector<double>(5 * 256, NAN)));
  ASSERT_OK_AND_ASSIGN(const Bytes before, ReadBytes(*this->stream_, this->pool_->view().states));
  ASSERT_OK(Decode(*this->stream_, 5, this->Inputs(layer), this->pool_->view(), out.bytes()));
  ASSERT_OK_AND_ASSIGN(const Bytes after, ReadBytes(*this->stream_, this->pool_->view().states));
  ASSERT_OK_AND_ASSIGN(const std::vector<double> got, ReadTensor(*this->stream_, out));
  const size_t slot = 2 * kStateElements * sizeof(float);
  for (size_t s = 0; s < 4; ++s) {
    EXPECT_EQ(std::equal(before.begin() + s * slot, before.begin() + (s + 1) * slot, after.begin() + s * slot), s != 2)
        << "slot " << s;
  }
  for (size_t i = 0; i < got.size(); ++i) {
    if (i / 256 == 1) {
      EXPECT_TRUE(std::isfinite(got[i]));
    } else {
      EXPECT_EQ(got[i], 0) << "row " << i / 256;
    }
  }
}

TYPED_TEST(RecurrentTest, VerifyLeavesTheStateAndCommitTakesTheAcceptedPart) {
  std::mt19937_64 random(13);
  constexpr int32_t kRows = 4, kTokens = 5;
  for (const DType state : {DType::kFloat32, DType::kBFloat16}) {
    this->MakePool(state, 3, kRows, random);
    ASSERT_OK_AND_ASSIGN(const Layer layer, MakeLayer(*this->device_, *this->stream_, DType::kFloat32, 1, 3,
                                                      kRows * kTokens, true, random));
    const std::vector<int32_t> indices = {3, -1, 1, 4};
    this->SetIndices(indices, this->indices_);
    ASSERT_OK_AND_ASSIGN(const Tensor out, MakeTensor(*this->device_, *this->stream_, DType::kFloat32,
                                                      std::vector<double>(kRows * kTokens * 3 * 128, NAN)));
    const std::vector<double> before = this->States();
    const Expected all = this->Reference(layer, indices, kTokens, std::vector<int32_t>(kRows, kTokens));
    ASSERT_OK(Verify(*this->stream_, kRows, kTokens, this->Inputs(layer), this->pool_->view(), out.bytes()));
    ASSERT_OK_AND_ASSIGN(const std::vector<double> got, ReadTensor(*this->stream_, out));
    EXPECT_LT(RelativeRms(all.out, got), Tolerance(DType::kFloat32));
    EXPECT_EQ(this->States(), before);

    const Expected accepted = this->Reference(layer, indices, kTokens, {2, 5, 0, 5});
    this->SetIndices({2, 5, -7, 1000}, this->lengths_);  // clamped to [0, 5]
    ASSERT_OK(Commit(*this->stream_, kRows, kTokens, this->Inputs(layer), this->pool_->view(),
                     this->lengths_.memory.template As<const int32_t>()));
    const std::vector<double> after = this->States();
    EXPECT_LT(RelativeRms(accepted.states, after), Tolerance(state));
    const size_t slot = 3 * kStateElements;  // nothing accepted: not a bit changes
    EXPECT_TRUE(std::equal(before.begin() + slot, before.begin() + 2 * slot, after.begin() + slot));
  }
}

TYPED_TEST(RecurrentTest, AChainOfDecodesEqualsVerifyAndCommit) {
  std::mt19937_64 random(14);
  constexpr int32_t kTokens = 6;
  this->MakePool(DType::kFloat32, 2, 2, random);
  ASSERT_OK_AND_ASSIGN(const Layer layer,
                       MakeLayer(*this->device_, *this->stream_, DType::kFloat32, 2, 2, kTokens, true, random));
  this->SetIndices({2}, this->indices_);
  const size_t row = 2 * 128 * sizeof(float);
  ASSERT_OK_AND_ASSIGN(const Tensor out, MakeTensor(*this->device_, *this->stream_, DType::kFloat32,
                                                    std::vector<double>(kTokens * 256, NAN)));
  const std::vector<double> before = this->States();
  ASSERT_OK(Verify(*this->stream_, 1, kTokens, this->Inputs(layer), this->pool_->view(), out.bytes()));
  ASSERT_OK_AND_ASSIGN(const std::vector<double> verified, ReadTensor(*this->stream_, out));
  this->SetIndices({kTokens}, this->lengths_);
  ASSERT_OK(Commit(*this->stream_, 1, kTokens, this->Inputs(layer), this->pool_->view(),
                   this->lengths_.memory.template As<const int32_t>()));
  const std::vector<double> committed = this->States();

  this->SetStates(before);
  for (int32_t t = 0; t < kTokens; ++t) {
    RecurrentInputs one = this->Inputs(layer);
    const size_t skip = static_cast<size_t>(t * layer.dim()) * sizeof(float);
    for (Rows* rows : {&one.q, &one.k, &one.v}) rows->data = rows->data.Sub(skip, rows->data.size() - skip);
    for (Rows* rows : {&one.gates.a, &one.gates.b}) {
      rows->data = rows->data.Sub(static_cast<size_t>(t) * 8, rows->data.size() - static_cast<size_t>(t) * 8);
    }
    ASSERT_OK(Decode(*this->stream_, 1, one, this->pool_->view(), out.bytes().Sub(t * row, row)));
  }
  ASSERT_OK_AND_ASSIGN(const std::vector<double> decoded, ReadTensor(*this->stream_, out));
  EXPECT_LT(RelativeRms(verified, decoded), 1e-6);
  EXPECT_LT(RelativeRms(committed, this->States()), 1e-6);
}

TYPED_TEST(RecurrentTest, AReplayUsesTheSlotsOfTheMoment) {
  std::mt19937_64 random(15);
  this->MakePool(DType::kFloat32, 2, 4, random);
  ASSERT_OK_AND_ASSIGN(const Layer layer,
                       MakeLayer(*this->device_, *this->stream_, DType::kBFloat16, 1, 2, 3, false, random));
  this->SetIndices({-1, -1, -1}, this->indices_);
  ASSERT_OK_AND_ASSIGN(const Tensor out,
                       MakeTensor(*this->device_, *this->stream_, DType::kBFloat16, std::vector<double>(3 * 256, NAN)));
  const RecurrentInputs inputs = this->Inputs(layer);
  const std::vector<double> states = this->States();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& s) {
                         return Decode(s, 3, inputs, this->pool_->view(), out.bytes());
                       }));
  ASSERT_EQ(graph->nodes().size(), 1u);
  EXPECT_EQ(std::string(graph->nodes()[0].name), "gdn_decode");
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
  const std::vector<std::vector<int32_t>> sets = {{1, 2, 3}, {4, -1, 1},  {-1, -1, -1}, {2, -1, -1},
                                                  {3, 4, 2}, {-1, 1, -1}, {1, 3, -1},   {2, 1, 4}};
  for (const std::vector<int32_t>& indices : sets) {
    ASSERT_OK(this->stream_->CopyFromHost(this->indices_.bytes().Sub(0, 12),
                                          {reinterpret_cast<const std::byte*>(indices.data()), 12}));
    ASSERT_OK(this->stream_->Synchronize());
    this->SetStates(states);
    ASSERT_OK(Decode(*this->stream_, 3, inputs, this->pool_->view(), out.bytes()));
    ASSERT_OK_AND_ASSIGN(const Bytes eager, ReadBytes(*this->stream_, out.bytes()));
    ASSERT_OK_AND_ASSIGN(const Bytes eager_states, ReadBytes(*this->stream_, this->pool_->view().states));
    this->SetStates(states);
    ASSERT_OK(exec->Launch(*this->stream_));
    ASSERT_OK_AND_ASSIGN(const Bytes replayed, ReadBytes(*this->stream_, out.bytes()));
    ASSERT_OK_AND_ASSIGN(const Bytes replayed_states, ReadBytes(*this->stream_, this->pool_->view().states));
    EXPECT_TRUE(eager == replayed);
    EXPECT_TRUE(eager_states == replayed_states);
  }
}

// Decode asks for states before the kernel ahead has ended, by the indices that it finds then. Here it finds a wrong
// guess or none in either of them: both are written late.
TYPED_TEST(RecurrentTest, WhatTheKernelAheadWritesLateIsWhatDecodeReads) {
  std::mt19937_64 random(17);
  const std::vector<int32_t> indices = {3, -1, 1, 2};
  const std::vector<std::vector<int32_t>> guesses = {
      {1, 2, 3, 4}, {-1, std::numeric_limits<int32_t>::max(), 2, 5}, {std::numeric_limits<int32_t>::min(), 3, -1, 2}};
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    this->MakePool(dtype, 4, 4, random);
    ASSERT_OK_AND_ASSIGN(const Layer layer,
                         MakeLayer(*this->device_, *this->stream_, DType::kBFloat16, 2, 4, 4, true, random));
    const Expected expected = this->Reference(layer, indices, 1, {1, 1, 1, 1});
    const StateView pool = this->pool_->view();
    const size_t words = pool.states.size() / sizeof(int32_t);
    ASSERT_OK_AND_ASSIGN(const DeviceBuffer staged, this->device_->Allocate(pool.states.size(), "staged"));
    ASSERT_OK(this->stream_->Copy(staged.template As<std::byte>(), pool.states));
    Tensor late_indices;
    this->SetIndices(indices, late_indices);
    const auto late_copy = [this](void* to, const void* from, size_t count) {
      return Launch(*this->stream_, kLateCopy,
                    LateCopyParams{.to = static_cast<int*>(to),
                                   .from = static_cast<const int*>(from),
                                   .count = static_cast<int64_t>(count),
                                   .nanoseconds = 100'000});
    };
    ASSERT_OK_AND_ASSIGN(const Tensor out, MakeTensor(*this->device_, *this->stream_, DType::kBFloat16,
                                                      std::vector<double>(4 * 512, NAN)));
    for (const std::vector<int32_t>& guess : guesses) {
      for (const bool states_last : {false, true}) {
        SCOPED_TRACE(absl::StrCat(ToString(dtype), ", guess ", guess[0], states_last ? ", states last" : ""));
        this->SetStates(std::vector<double>(pool.states.size() / attention::SizeOf(dtype), NAN));
        this->SetIndices(guess, this->indices_);
        for (const bool states : {!states_last, states_last}) {
          if (states) {
            ASSERT_OK(late_copy(pool.states.address(), staged.template As<std::byte>().address(), words));
          } else {
            ASSERT_OK(late_copy(this->indices_.bytes().address(), late_indices.bytes().address(), indices.size()));
          }
        }
        ASSERT_OK(Decode(*this->stream_, 4, this->Inputs(layer), pool, out.bytes()));
        ASSERT_OK_AND_ASSIGN(const std::vector<double> got, ReadTensor(*this->stream_, out));
        EXPECT_LT(RelativeRms(expected.out, got), Tolerance(DType::kBFloat16));
        EXPECT_LT(RelativeRms(expected.states, this->States()), Tolerance(dtype));
      }
    }
  }
}

TYPED_TEST(RecurrentTest, RefusesWhatDoesNotFit) {
  std::mt19937_64 random(16);
  this->MakePool(DType::kFloat32, 4, 2, random);
  ASSERT_OK_AND_ASSIGN(const Layer layer,
                       MakeLayer(*this->device_, *this->stream_, DType::kFloat32, 2, 4, 2, true, random));
  this->SetIndices({1, 2}, this->indices_);
  ASSERT_OK_AND_ASSIGN(const Tensor out,
                       MakeTensor(*this->device_, *this->stream_, DType::kFloat32, std::vector<double>(2 * 512, 0)));
  const StateView pool = this->pool_->view();
  const RecurrentInputs good = this->Inputs(layer);
  RecurrentInputs bad = good;
  bad.qk_heads = 3;
  EXPECT_STATUS(Decode(*this->stream_, 2, bad, pool, out.bytes()), kInvalidArgument, "qk_heads is 3 and v_heads 4");
  bad = good;
  bad.scale = NAN;
  EXPECT_STATUS(Decode(*this->stream_, 2, bad, pool, out.bytes()), kInvalidArgument, "scale is nan");
  bad = good;
  bad.v.stride = 511;
  EXPECT_STATUS(Decode(*this->stream_, 2, bad, pool, out.bytes()), kInvalidArgument, "v has a row stride of 511");
  EXPECT_STATUS(Decode(*this->stream_, 0, good, pool, out.bytes()), kInvalidArgument, "rows is 0");
  EXPECT_STATUS(Decode(*this->stream_, 3, good, pool, out.bytes()), kInvalidArgument, "a has 8 elements, needs 12");
  EXPECT_STATUS(Decode(*this->stream_, 2, good, pool, out.bytes().Sub(0, 4092)), kInvalidArgument,
                "out has 1023 elements, needs 1024");
  EXPECT_STATUS(Verify(*this->stream_, 1, 0, good, pool, out.bytes()), kInvalidArgument, "tokens 0");
  StateView other = pool;
  other.v_heads = 2;
  EXPECT_STATUS(Decode(*this->stream_, 2, good, other, out.bytes()), kInvalidArgument, "slots of 2 heads");
  ASSERT_NO_FATAL_FAILURE(ForBadSlots(pool, [&](const StateView& view) {
    EXPECT_STATUS(Decode(*this->stream_, 2, good, view, out.bytes()), kInvalidArgument, "states");
    EXPECT_STATUS(Verify(*this->stream_, 1, 2, good, view, out.bytes()), kInvalidArgument, "states");
    EXPECT_STATUS(Commit(*this->stream_, 1, 2, good, view, this->indices_.memory.template As<const int32_t>()),
                  kInvalidArgument, "states");
  }));
  bad = good;
  bad.gates.dtype = DType::kFloat16;
  EXPECT_STATUS(Decode(*this->stream_, 2, bad, pool, out.bytes()), kUnimplemented, "dtype is float16");
  other = pool;
  other.dtype = DType::kFloat16;
  EXPECT_STATUS(Decode(*this->stream_, 2, good, other, out.bytes()), kUnimplemented, "states is float16");
  EXPECT_STATUS(StatePool::Create(*this->device_, DType::kFloat16, 4, 2), kUnimplemented, "dtype is float16");
  EXPECT_STATUS(Commit(*this->stream_, 1, 2, good, pool, {}), kInvalidArgument, "accepted has 0 elements, needs 1");
}

TYPED_TEST(RecurrentTest, ClampReadsSlotZeroAndStoresNothingThere) {
  std::mt19937_64 random(21);
  ASSERT_OK_AND_ASSIGN(const Tensor states, MakeTensor(*this->device_, *this->stream_, DType::kFloat32,
                                                       Uniform(random, 3 * kStateElements, -0.3, 0.3)));
  const ForeignPool foreign = {DType::kFloat32, 1, 3, 0, states.bytes(), 1};
  ASSERT_OK_AND_ASSIGN(const StateView view, ViewOf(foreign, PaddedRows::kClampToZero));
  ASSERT_OK_AND_ASSIGN(const Layer layer,
                       MakeLayer(*this->device_, *this->stream_, DType::kFloat32, 1, 1, 2, true, random));
  ASSERT_OK_AND_ASSIGN(const Tensor out,
                       MakeTensor(*this->device_, *this->stream_, DType::kFloat32, std::vector<double>(256, NAN)));
  const int32_t indices[2] = {-1, 2};
  ASSERT_OK_AND_ASSIGN(const DeviceBuffer slots, this->device_->Allocate(sizeof(indices), "slots"));
  ASSERT_OK(this->stream_->CopyFromHost(slots.As<std::byte>(), {reinterpret_cast<const std::byte*>(indices), 8}));
  const RecurrentInputs inputs = {.qk_heads = 1,
                                  .q = layer.Part(0),
                                  .k = layer.Part(128),
                                  .v = layer.Part(256),
                                  .gates = layer.gates(),
                                  .cache_indices = slots.As<const int32_t>()};
  ASSERT_OK(Decode(*this->stream_, 2, inputs, view, out.bytes()));
  ASSERT_OK_AND_ASSIGN(const std::vector<double> got, ReadTensor(*this->stream_, out));
  std::vector<double> state(states.values.begin(), states.values.begin() + kStateElements), expected(128);
  Recur(layer, 0, 0, state, expected.data());
  EXPECT_LT(RelativeRms(expected, {got.begin(), got.begin() + 128}), 2e-5);
  ASSERT_OK_AND_ASSIGN(const std::vector<double> after, ReadTensor(*this->stream_, states));
  EXPECT_TRUE(std::equal(after.begin(), after.begin() + 2 * kStateElements, states.values.begin()));
}

}  // namespace
}  // namespace pristine::testing
