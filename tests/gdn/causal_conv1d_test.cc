#include "pristine/attention/gdn/causal_conv1d.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pristine/attention/gdn/qkv_split.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/graph_runtime/graph.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using namespace attention::gdn;  // NOLINT(build/namespaces): the suite is about that namespace

// The convolution as its formula has it, in double: `history` is [dim, 3], oldest first, and is advanced. Returns
// [tokens, dim], rounded to `dtype`.
std::vector<double> Convolved(DType dtype, int64_t dim, const std::vector<double>& x, int64_t stride, int64_t first,
                              int64_t tokens, const std::vector<double>& weight, const std::vector<double>& bias,
                              double* history) {
  std::vector<double> y(static_cast<size_t>(tokens * dim));
  for (int64_t c = 0; c < dim; ++c) {
    double* const h = history + 3 * c;
    for (int64_t t = 0; t < tokens; ++t) {
      const double in = x[static_cast<size_t>((first + t) * stride + c)];
      const double* const w = &weight[static_cast<size_t>(4 * c)];
      const double z =
          w[0] * h[0] + w[1] * h[1] + w[2] * h[2] + w[3] * in + (bias.empty() ? 0 : bias[static_cast<size_t>(c)]);
      h[0] = h[1];
      h[1] = h[2];
      h[2] = in;
      y[static_cast<size_t>(t * dim + c)] = z / (1 + std::exp(-z));
    }
  }
  return Decoded(dtype, Encode(dtype, y));
}

void Normalise(std::vector<double>& y, int64_t dim, int64_t channels, int32_t head_dim) {
  for (int64_t row = 0; row < static_cast<int64_t>(y.size()) / dim; ++row) {
    for (int64_t c = 0; c < channels; c += head_dim) {
      double sum = 1e-6;
      double* const head = &y[static_cast<size_t>(row * dim + c)];
      for (int32_t i = 0; i < head_dim; ++i) sum += head[i] * head[i];
      for (int32_t i = 0; i < head_dim; ++i) head[i] /= std::sqrt(sum);
    }
  }
}

struct ConvShape {
  DType dtype = DType::kBFloat16;
  int32_t q_dim = 128, k_dim = 128, v_dim = 256;
  int32_t norm = 0;
  bool bias = true;
  bool split = true;  // into q, k and v; else one output
  bool gates = false;
  int64_t pad = 0;   // elements between the rows of x
  size_t shift = 0;  // elements that x and the outputs start late
  int32_t dim() const { return q_dim + k_dim + v_dim; }
};

template <class BackendT>
class CausalConv1dTest : public DeviceTest<BackendT> {
 protected:
  static constexpr int32_t kHeads = 3;

  // Everything for up to `tokens` tokens and `requests` requests, with a pool of `slots` full of random states.
  void Make(const ConvShape& shape, int64_t tokens, int32_t requests, int32_t slots) {
    shape_ = shape;
    tokens_ = tokens;
    stride_ = shape.dim() + shape.pad;
    Device& device = *this->device_;
    Stream& stream = *this->stream_;
    ASSERT_OK_AND_ASSIGN(pool_, StatePool::Create(device, DType::kFloat32, 1, slots,
                                                  {.conv_dim = shape.dim(), .conv_dtype = shape.dtype}));
    const size_t dim = static_cast<size_t>(shape.dim()), count = static_cast<size_t>(tokens);
    const auto random = [&](Tensor& to, size_t size, double low, double high) {
      ASSERT_OK_AND_ASSIGN(to, MakeTensor(device, stream, shape.dtype, Uniform(random_, size, low, high)));
    };
    random(x_, shape.shift + count * static_cast<size_t>(stride_), -2, 2);
    random(weight_, dim * 4, -1, 1);
    random(bias_, dim, -1, 1);
    random(states_, static_cast<size_t>(slots + 1) * dim * 3, -2, 2);
    ASSERT_OK_AND_ASSIGN(gates_, MakeLayer(device, stream, DType::kBFloat16, 1, kHeads, tokens, false, random_));
    const int32_t dims[3] = {shape.split ? shape.q_dim : shape.dim(), shape.k_dim, shape.v_dim};
    for (int i = 0; i < 3; ++i) {
      ASSERT_OK_AND_ASSIGN(out_[i], MakeTensor(device, stream, shape.dtype,
                                               std::vector<double>(shape.shift + count * dims[i] + kGuard, NAN)));
    }
    for (Tensor* gate : {&g_, &beta_}) {
      ASSERT_OK_AND_ASSIGN(*gate,
                           MakeTensor(device, stream, DType::kFloat32, std::vector<double>(count * kHeads, NAN)));
    }
    for (DeviceBuffer* to : {&cu_seqlens_, &indices_, &initial_, &accepted_}) {
      ASSERT_OK_AND_ASSIGN(*to, device.Allocate(static_cast<size_t>(requests + 1) * sizeof(int32_t), "metadata"));
    }
    SetStates();
  }
  void SetStates() {
    const Bytes bytes = Encode(shape_.dtype, states_.values);
    ASSERT_OK(this->stream_->CopyFromHost(pool_->conv_view().states, bytes));
    ASSERT_OK(this->stream_->Synchronize());
  }
  void Set(const DeviceBuffer& to, const std::vector<int32_t>& values) {
    const size_t bytes = values.size() * sizeof(int32_t);
    ASSERT_OK(this->stream_->CopyFromHost(to.As<std::byte>().Sub(0, bytes),
                                          {reinterpret_cast<const std::byte*>(values.data()), bytes}));
    ASSERT_OK(this->stream_->Synchronize());
  }
  // On the device alone.
  void SetX(const std::vector<double>& values) {
    const Bytes bytes = Encode(shape_.dtype, values);
    ASSERT_OK(this->stream_->CopyFromHost(x_.bytes(), bytes));
    ASSERT_OK(this->stream_->Synchronize());
  }
  // From token `token` on.
  ConvInputs Inputs(int64_t token = 0) const {
    const size_t skip = (shape_.shift + static_cast<size_t>(token * stride_)) * attention::SizeOf(shape_.dtype);
    return {.x = {x_.bytes().Sub(skip, x_.bytes().size() - skip), stride_},
            .weight = weight_.bytes(),
            .bias = shape_.bias ? DeviceSpan<const std::byte>(bias_.bytes()) : DeviceSpan<const std::byte>(),
            .cache_indices = indices_.As<const int32_t>()};
  }
  DeviceSpan<std::byte> Out(int i, int64_t token = 0) const {
    const int32_t dims[3] = {shape_.split ? shape_.q_dim : shape_.dim(), shape_.k_dim, shape_.v_dim};
    const size_t skip = (shape_.shift + static_cast<size_t>(token) * dims[i]) * attention::SizeOf(shape_.dtype);
    return out_[i].bytes().Sub(skip, out_[i].bytes().size() - skip);
  }
  ConvOutputs Outputs(int64_t token = 0) const {
    ConvOutputs outputs;
    if (shape_.split) {
      outputs.q_dim = shape_.q_dim;
      outputs.k_dim = shape_.k_dim;
      outputs.v_dim = shape_.v_dim;
      outputs.q = Out(0, token);
      outputs.k = Out(1, token);
      outputs.v = Out(2, token);
      outputs.norm_head_dim = shape_.norm;
    } else {
      outputs.out = Out(0, token);
    }
    if (shape_.gates) {
      outputs.gates = gates_.gates();
      outputs.g = g_.memory.As<float>();
      outputs.beta = beta_.memory.As<float>();
    }
    return outputs;
  }
  ConvSequences Sequences(int32_t requests, bool initial = false) const {
    return {requests, cu_seqlens_.As<const int32_t>(),
            initial ? initial_.As<const int32_t>() : DeviceSpan<const int32_t>()};
  }
  // All channels of the first `tokens` tokens, as [tokens, dim].
  std::vector<double> Got(int64_t tokens) {
    std::vector<double> all(static_cast<size_t>(tokens * shape_.dim()));
    const int32_t dims[3] = {shape_.split ? shape_.q_dim : shape_.dim(), shape_.k_dim, shape_.v_dim};
    int64_t first = 0;
    for (int i = 0; i < (shape_.split ? 3 : 1); ++i) {
      absl::StatusOr<std::vector<double>> part = ReadTensor(*this->stream_, out_[i]);
      EXPECT_OK(part);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int32_t c = 0; c < dims[i]; ++c) {
          all[static_cast<size_t>(t * shape_.dim() + first + c)] =
              (*part)[shape_.shift + static_cast<size_t>(t) * dims[i] + c];
        }
      }
      for (size_t e = 0; e < part->size(); ++e) {
        if (e < shape_.shift || e >= shape_.shift + static_cast<size_t>(tokens_) * dims[i]) {
          EXPECT_TRUE(std::isnan((*part)[e])) << "written outside of output " << i << " at " << e;
        }
      }
      first += dims[i];
    }
    return all;
  }
  Bytes States() {
    absl::StatusOr<Bytes> bytes = ReadBytes(*this->stream_, pool_->conv_view().states);
    EXPECT_OK(bytes);
    return *bytes;
  }

  // One call over requests of these lengths, against the formula. `initial[r]` 0: the state counts as zeros.
  void Check(const std::vector<int32_t>& lengths, const std::vector<int32_t>& slots,
             const std::vector<int32_t>& initial) {
    const int64_t dim = shape_.dim();
    const int32_t requests = static_cast<int32_t>(lengths.size());
    std::vector<int32_t> cu(1);
    for (const int32_t length : lengths) cu.push_back(cu.back() + length);
    // What no request may read: x behind the tokens, x of padded requests, states of other slots, gaps.
    std::vector<double> x = x_.values;
    const auto live = [&](int64_t token) {
      for (int32_t r = 0; r < requests; ++r) {
        if (token >= cu[r] && token < cu[r + 1]) return slots[r] >= 0 && slots[r] < pool_->conv_view().slots;
      }
      return false;
    };
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t c = live(t) ? dim : 0; c < stride_; ++c)
        x[shape_.shift + static_cast<size_t>(t * stride_ + c)] = NAN;
    }
    SetX(x);
    const std::vector<double> before = states_.values;
    std::vector<double> states(before.size(), NAN), expected(static_cast<size_t>(tokens_ * dim));
    for (int32_t r = 0; r < requests; ++r) {
      if (slots[r] < 0 || slots[r] >= pool_->conv_view().slots) continue;
      const size_t at = static_cast<size_t>(slots[r] * dim * 3), size = static_cast<size_t>(dim * 3);
      if (initial[r] != 0) std::copy_n(&before[at], size, &states[at]);
    }
    states_.values = states;
    SetStates();
    Set(cu_seqlens_, cu);
    Set(indices_, slots);
    Set(initial_, initial);
    ASSERT_OK(CausalConv1d(*this->stream_, static_cast<int32_t>(tokens_), Sequences(requests, true), Inputs(),
                           pool_->conv_view(), Outputs()));
    const std::vector<double> shifted(x.begin() + static_cast<std::ptrdiff_t>(shape_.shift), x.end());
    for (int32_t r = 0; r < requests; ++r) {
      if (slots[r] < 0 || slots[r] >= pool_->conv_view().slots || lengths[r] == 0) continue;
      double* const history = &states[static_cast<size_t>(slots[r] * dim * 3)];
      if (initial[r] == 0) std::fill_n(history, dim * 3, 0);
      std::vector<double> y = Convolved(shape_.dtype, dim, shifted, stride_, cu[r], lengths[r], weight_.values,
                                        shape_.bias ? bias_.values : std::vector<double>(), history);
      if (shape_.norm != 0) Normalise(y, dim, shape_.q_dim + shape_.k_dim, shape_.norm);
      std::copy(y.begin(), y.end(), &expected[static_cast<size_t>(cu[r] * dim)]);
    }
    const std::vector<double> got = Got(tokens_);
    // A last bit of bfloat16 before the norm, and one after it.
    const double tolerance = shape_.dtype == DType::kFloat32 ? 4e-6 : shape_.norm == 0 ? 8e-3 : 1.2e-2;
    int64_t wrong = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      wrong += !(std::abs(got[i] - expected[i]) <= tolerance * std::abs(expected[i]) + 1e-6);
    }
    EXPECT_EQ(wrong, 0);
    EXPECT_TRUE(States() == Encode(shape_.dtype, states));  // the others are NaN still, bit for bit
    states_.values = before;
    if (!shape_.gates) return;
    ASSERT_OK_AND_ASSIGN(const std::vector<double> g, ReadTensor(*this->stream_, g_));
    ASSERT_OK_AND_ASSIGN(const std::vector<double> beta, ReadTensor(*this->stream_, beta_));
    ASSERT_OK(Gates(*this->stream_, static_cast<int32_t>(tokens_), gates_.gates(), g_.memory.template As<float>(),
                    beta_.memory.template As<float>()));
    ASSERT_OK_AND_ASSIGN(const std::vector<double> own_g, ReadTensor(*this->stream_, g_));
    ASSERT_OK_AND_ASSIGN(const std::vector<double> own_beta, ReadTensor(*this->stream_, beta_));
    for (size_t i = 0; i < g.size(); ++i) {
      const bool counts = live(static_cast<int64_t>(i) / kHeads);
      EXPECT_EQ(g[i], counts ? own_g[i] : 0) << i;
      EXPECT_EQ(beta[i], counts ? own_beta[i] : 0) << i;
    }
  }

  void TearDown() override {
    for (Tensor* tensor : {&x_, &weight_, &bias_, &states_, &out_[0], &out_[1], &out_[2], &g_, &beta_}) *tensor = {};
    gates_ = {};
    for (DeviceBuffer* buffer : {&cu_seqlens_, &indices_, &initial_, &accepted_}) *buffer = {};
    pool_.reset();
    DeviceTest<BackendT>::TearDown();
  }

  static constexpr size_t kGuard = 64;  // elements behind each output
  ConvShape shape_;
  int64_t tokens_ = 0, stride_ = 0;
  std::mt19937_64 random_{31};
  std::unique_ptr<StatePool> pool_;
  Tensor x_, weight_, bias_, states_, out_[3], g_, beta_;
  Layer gates_;
  DeviceBuffer cu_seqlens_, indices_, initial_, accepted_;
};
TYPED_TEST_SUITE(CausalConv1dTest, AllBackends, BackendNames);

TYPED_TEST(CausalConv1dTest, IsTheFormulaForRaggedPromptsWithEmptyAndPaddedOnes) {
  const std::vector<ConvShape> shapes = {
      {.split = false},
      {.norm = 128, .gates = true},
      {.q_dim = 192, .k_dim = 64, .norm = 64, .bias = false, .pad = 8},
      {.dtype = DType::kFloat32, .norm = 128, .gates = true},
      {.dtype = DType::kFloat32, .split = false, .pad = 3},
      {.q_dim = 17, .k_dim = 5, .v_dim = 300, .gates = true},          // no multiple of anything
      {.q_dim = 128, .k_dim = 128, .norm = 128, .pad = 1, .shift = 1}  // rows that are not aligned
  };
  for (const ConvShape& shape : shapes) {
    SCOPED_TRACE(absl::StrCat(ToString(shape.dtype), " ", shape.q_dim, "+", shape.k_dim, "+", shape.v_dim, " norm ",
                              shape.norm, " pad ", shape.pad));
    this->Make(shape, 210, 9, 8);
    this->Check({70, 0, 1, 2, 3, 40, 64, 0, 0}, {3, 2, 8, 1, 7, -1, 5, -1, 99}, {1, 1, 1, 0, 1, 1, 1, 0, 0});
    this->Check({210, 0, 0, 0, 0, 0, 0, 0, 0}, {3, -1, -1, -1, -1, -1, -1, -1, -1}, {0, 0, 0, 0, 0, 0, 0, 0, 0});
    this->Check({0, 0, 0, 0, 0, 0, 0, 0, 0}, {1, 2, 3, 4, 5, 6, 7, 8, -1}, {1, 1, 1, 1, 1, 1, 1, 1, 1});
  }
}

TYPED_TEST(CausalConv1dTest, StartsOfRequestsMayLieAnywhere) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  // On CUDA tokens are in longer runs where more than about 5000 of as few channels follow.
  for (const int32_t tokens : {150, 5400}) {
    this->Make({.q_dim = 64, .k_dim = 64, .v_dim = 64, .norm = 64, .gates = true}, tokens, 40, 40);
    for (int round = 0; round < (tokens > 1000 ? 2 : 6); ++round) {
      std::vector<int32_t> lengths(40), slots(40), initial(40);
      int32_t left = tokens;
      for (size_t r = 0; r < lengths.size(); ++r) {
        const int32_t most = round % 2 == 0 ? 5 : 40;  // many that are shorter than the window; or few
        lengths[r] = std::min<int32_t>(left, static_cast<int32_t>(random() % static_cast<unsigned>(most)));
        left -= lengths[r];
        slots[r] = random() % 5 == 0 ? kNoSlot : static_cast<int32_t>(r) + 1;
        initial[r] = random() % 3 != 0;
      }
      if (left > 1000) lengths.back() += left - 21;
      std::shuffle(slots.begin(), slots.end(), random);
      this->Check(lengths, slots, initial);
    }
  }
}

TYPED_TEST(CausalConv1dTest, ChunksAndSingleTokensGiveTheBitsOfOneCall) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    constexpr int32_t kTokens = 83;
    this->Make({.dtype = dtype, .norm = 128}, kTokens, 1, 2);
    this->Set(this->indices_, {2});
    this->Set(this->cu_seqlens_, {0, kTokens});
    const ConvStateView states = this->pool_->conv_view();
    ASSERT_OK(CausalConv1d(*this->stream_, kTokens, this->Sequences(1), this->Inputs(), states, this->Outputs()));
    const std::vector<double> whole = this->Got(kTokens);
    const Bytes after = this->States();

    this->SetStates();
    int32_t at = 0;
    for (const int32_t length : {1, 2, 40, 3, 37}) {
      this->Set(this->cu_seqlens_, {0, length});
      ASSERT_OK(CausalConv1d(*this->stream_, length, this->Sequences(1), this->Inputs(at), states, this->Outputs(at)));
      at += length;
    }
    ASSERT_EQ(at, kTokens);
    EXPECT_EQ(this->Got(kTokens), whole);
    EXPECT_TRUE(this->States() == after);

    this->SetStates();
    for (int32_t t = 0; t < kTokens; ++t) {
      ASSERT_OK(CausalConv1dUpdate(*this->stream_, 1, this->Inputs(t), states, this->Outputs(t)));
    }
    EXPECT_EQ(this->Got(kTokens), whole);
    EXPECT_TRUE(this->States() == after);
  }
}

TYPED_TEST(CausalConv1dTest, FusedIsTheSplitOfTheUnfused) {
  const ConvShape fused = {.q_dim = 256, .k_dim = 128, .v_dim = 384, .norm = 128};
  constexpr int32_t kTokens = 130;
  this->Make(fused, kTokens, 2, 2);
  this->Set(this->indices_, {1, 2});
  this->Set(this->cu_seqlens_, {0, 50, kTokens});
  ASSERT_OK(CausalConv1d(*this->stream_, kTokens, this->Sequences(2), this->Inputs(), this->pool_->conv_view(),
                         this->Outputs()));
  const std::vector<double> expected = this->Got(kTokens);
  ASSERT_OK_AND_ASSIGN(const Tensor mixed,
                       MakeTensor(*this->device_, *this->stream_, fused.dtype,
                                  std::vector<double>(static_cast<size_t>(kTokens) * fused.dim(), NAN)));
  this->SetStates();
  ASSERT_OK(CausalConv1d(*this->stream_, kTokens, this->Sequences(2), this->Inputs(), this->pool_->conv_view(),
                         {.out = mixed.bytes()}));
  QkvSplitTensors split;
  split.q_dim = fused.q_dim;
  split.k_dim = fused.k_dim;
  split.v_dim = fused.v_dim;
  split.mixed = mixed.bytes();
  split.stride_t = fused.dim();
  split.q = this->Out(0);
  split.k = this->Out(1);
  split.v = this->Out(2);
  split.norm_head_dim = fused.norm;
  ASSERT_OK(QkvSplit(*this->stream_, kTokens, split));
  EXPECT_EQ(this->Got(kTokens), expected);
}

TYPED_TEST(CausalConv1dTest, UpdateLeavesPaddedRowsAndTheirStatesAlone) {
  for (const ConvShape& shape :
       {ConvShape{.norm = 128, .gates = true}, ConvShape{.q_dim = 9, .k_dim = 7, .v_dim = 3}}) {
    this->Make(shape, 5, 5, 4);
    const std::vector<int32_t> slots = {2, -1, 4, std::numeric_limits<int32_t>::max(),
                                        std::numeric_limits<int32_t>::min()};
    this->Set(this->indices_, slots);
    const int64_t dim = shape.dim();
    std::vector<double> states = this->states_.values, expected(static_cast<size_t>(5 * dim));
    for (const size_t r : {0, 2}) {
      std::vector<double> y =
          Convolved(shape.dtype, dim, this->x_.values, dim, static_cast<int64_t>(r), 1, this->weight_.values,
                    this->bias_.values, &states[static_cast<size_t>(slots[r] * dim * 3)]);
      if (shape.norm != 0) Normalise(y, dim, shape.q_dim + shape.k_dim, shape.norm);
      std::copy(y.begin(), y.end(), &expected[r * static_cast<size_t>(dim)]);
    }
    std::vector<double> x = this->x_.values;
    for (const int64_t r : {1, 3, 4}) std::fill_n(&x[static_cast<size_t>(r * dim)], dim, NAN);
    this->SetX(x);
    ASSERT_OK(CausalConv1dUpdate(*this->stream_, 5, this->Inputs(), this->pool_->conv_view(), this->Outputs()));
    const std::vector<double> got = this->Got(5);
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_NEAR(got[i], expected[i], 1.2e-2 * std::abs(expected[i]) + 1e-6) << i;
    }
    EXPECT_TRUE(this->States() == Encode(shape.dtype, states));
    if (!shape.gates) continue;
    ASSERT_OK_AND_ASSIGN(const std::vector<double> beta, ReadTensor(*this->stream_, this->beta_));
    for (size_t i = 0; i < beta.size(); ++i) EXPECT_EQ(beta[i] > 0, i / 3 == 0 || i / 3 == 2) << i;
  }
}

TYPED_TEST(CausalConv1dTest, VerifyLeavesTheStateAndCommitTakesTheAcceptedPart) {
  constexpr int32_t kRows = 5, kTokens = 4;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    this->Make({.dtype = dtype, .norm = 128}, kRows * kTokens, kRows, kRows);
    this->Set(this->indices_, {3, -1, 1, 4, 5});
    const ConvStateView states = this->pool_->conv_view();
    ASSERT_OK(CausalConv1dVerify(*this->stream_, kRows, kTokens, this->Inputs(), states, this->Outputs()));
    const std::vector<double> verified = this->Got(kRows * kTokens);
    const Bytes before = Encode(dtype, this->states_.values);
    EXPECT_TRUE(this->States() == before);
    this->Set(this->accepted_, {2, 4, -3, 1000, 1});  // clamped to [0, 4]
    ASSERT_OK(CausalConv1dCommit(*this->stream_, kRows, kTokens, this->Inputs(), states,
                                 this->accepted_.template As<const int32_t>()));
    const Bytes committed = this->States();

    // The same tokens, each by itself.
    this->SetStates();
    const int32_t accepted[kRows] = {2, 0, 0, 4, 1};
    const int32_t slots[kRows] = {3, -1, 1, 4, 5};
    for (int32_t r = 0; r < kRows; ++r) {
      this->Set(this->indices_, {slots[r]});
      for (int32_t t = 0; t < accepted[r]; ++t) {
        const int32_t token = r * kTokens + t;
        ASSERT_OK(CausalConv1dUpdate(*this->stream_, 1, this->Inputs(token), states, this->Outputs(token)));
      }
    }
    EXPECT_TRUE(this->States() == committed);
    EXPECT_EQ(this->Got(kRows * kTokens), verified);
  }
}

TYPED_TEST(CausalConv1dTest, AReplayServesOtherLengthsAndSlots) {
  constexpr int32_t kTokens = 96, kRequests = 5;
  this->Make({.norm = 128, .gates = true}, kTokens, kRequests, 8);
  this->Set(this->cu_seqlens_, {0, 0, 0, 0, 0, 0});
  this->Set(this->indices_, {-1, -1, -1, -1, -1});
  const ConvInputs inputs = this->Inputs();
  const ConvOutputs outputs = this->Outputs();
  const auto body = [&](Stream& s) {
    return CausalConv1d(s, kTokens, this->Sequences(kRequests), inputs, this->pool_->conv_view(), outputs);
  };
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, Capture(*this->stream_, body));
  ASSERT_EQ(graph->nodes().size(), 1u);
  EXPECT_EQ(std::string(graph->nodes()[0].name), "gdn_conv");
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
  const std::vector<std::vector<int32_t>> sets = {
      {0, 96, 96, 96, 96, 96}, {0, 1, 2, 3, 4, 5},      {0, 0, 0, 0, 0, 0},      {0, 20, 40, 60, 80, 96},
      {0, 3, 3, 64, 64, 90},   {0, 63, 64, 65, 66, 67}, {0, 31, 32, 33, 95, 96}, {0, 0, 0, 0, 0, 96}};
  for (size_t i = 0; i < sets.size(); ++i) {
    this->Set(this->cu_seqlens_, sets[i]);
    std::vector<int32_t> slots = {1, 2, 3, 4, 5};
    for (size_t r = 0; r < slots.size(); ++r) slots[r] = (r + i) % 4 == 0 ? -1 : 1 + static_cast<int32_t>(r + i) % 8;
    this->Set(this->indices_, slots);
    this->SetStates();
    ASSERT_OK(body(*this->stream_));
    const std::vector<double> eager = this->Got(kTokens);
    const Bytes eager_states = this->States();
    this->SetStates();
    ASSERT_OK(exec->Launch(*this->stream_));
    EXPECT_EQ(this->Got(kTokens), eager);
    EXPECT_TRUE(this->States() == eager_states);
  }
}

TYPED_TEST(CausalConv1dTest, SequencesThatBreakTheirRuleTouchNothingOutside) {
  constexpr int32_t kTokens = 70, kRequests = 4;
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max(), kMin = std::numeric_limits<int32_t>::min();
  this->Make({.norm = 128, .gates = true}, kTokens, kRequests, 4);
  this->Set(this->indices_, {1, 2, 3, 4});
  for (const std::vector<int32_t>& cu : std::vector<std::vector<int32_t>>{{0, 60, 20, 65, 70},
                                                                          {-9, 5, 30, 60, 70},
                                                                          {5, 20, 30, 60, 1000},
                                                                          {kMax, kMax, kMax, kMax, kMax},
                                                                          {kMin, kMin, kMin, kMin, kMax},
                                                                          {kMax, 0, kMin, 1, kMax},
                                                                          {70, 60, 50, 40, 30}}) {
    this->Set(this->cu_seqlens_, cu);
    EXPECT_OK(CausalConv1d(*this->stream_, kTokens, this->Sequences(kRequests), this->Inputs(),
                           this->pool_->conv_view(), this->Outputs()));
    this->Got(kTokens);  // finds what is written outside
    const Bytes states = this->States(), before = Encode(this->shape_.dtype, this->states_.values);
    const size_t slot = states.size() / 5;
    EXPECT_TRUE(std::equal(states.begin(), states.begin() + static_cast<std::ptrdiff_t>(slot), before.begin()));
  }
}

TYPED_TEST(CausalConv1dTest, RefusesWhatDoesNotFit) {
  this->Make({.dtype = DType::kFloat32, .norm = 128}, 6, 2, 2);
  Stream& stream = *this->stream_;
  const ConvStateView states = this->pool_->conv_view();
  const ConvInputs inputs = this->Inputs();
  const ConvOutputs outputs = this->Outputs();
  const ConvSequences sequences = this->Sequences(2);
  ConvInputs bad = inputs;
  bad.x.stride = 511;
  EXPECT_STATUS(CausalConv1d(stream, 6, sequences, bad, states, outputs), kInvalidArgument,
                "x has a row stride of 511");
  EXPECT_STATUS(CausalConv1d(stream, 7, sequences, inputs, states, outputs), kInvalidArgument,
                "x has 3072 elements, needs 3584");
  EXPECT_STATUS(CausalConv1d(stream, -1, sequences, inputs, states, outputs), kInvalidArgument, "tokens is -1");
  EXPECT_STATUS(CausalConv1d(stream, 6, this->Sequences(0), inputs, states, outputs), kInvalidArgument, "0 requests");
  EXPECT_STATUS(CausalConv1d(stream, 6, this->Sequences(3), inputs, states, outputs), kInvalidArgument,
                "cu_seqlens has 3 elements, needs 4");
  EXPECT_OK(CausalConv1d(stream, 0, sequences, inputs, states, outputs));
  EXPECT_OK(CausalConv1d(stream, 0, sequences, inputs, states, {}));
  bad = inputs;
  bad.weight = bad.weight.Sub(0, 8188);
  EXPECT_STATUS(CausalConv1d(stream, 6, sequences, bad, states, outputs), kInvalidArgument,
                "weight has 2047 elements, needs 2048");
  bad = inputs;
  bad.bias = bad.bias.Sub(0, 4);
  EXPECT_STATUS(CausalConv1dUpdate(stream, 2, bad, states, outputs), kInvalidArgument,
                "bias has 1 elements, needs 512");
  ConvOutputs other = outputs;
  other.v_dim = 255;
  EXPECT_STATUS(CausalConv1dUpdate(stream, 2, inputs, states, other), kInvalidArgument, "v_dim 255");
  other = outputs;
  other.norm_head_dim = 32;
  EXPECT_STATUS(CausalConv1dUpdate(stream, 2, inputs, states, other), kInvalidArgument, "norm_head_dim is 32");
  other = outputs;
  other.out = outputs.q;
  EXPECT_STATUS(CausalConv1dUpdate(stream, 2, inputs, states, other), kInvalidArgument, "out is given beside q, k, v");
  other = outputs;
  other.k = other.k.Sub(0, 1020);
  EXPECT_STATUS(CausalConv1dUpdate(stream, 2, inputs, states, other), kInvalidArgument,
                "k has 255 elements, needs 256");
  EXPECT_STATUS(CausalConv1dVerify(stream, 2, 0, inputs, states, outputs), kInvalidArgument, "tokens is 0");
  EXPECT_STATUS(CausalConv1dVerify(stream, 2, 4, inputs, states, outputs), kInvalidArgument, "x has 3072 elements");
  EXPECT_STATUS(CausalConv1dCommit(stream, 2, 3, inputs, states, {}), kInvalidArgument, "accepted has 0 elements");
  ConvStateView pool = states;
  pool.slot_stride = 1535;
  EXPECT_STATUS(CausalConv1dUpdate(stream, 2, inputs, pool, outputs), kInvalidArgument, "1535 elements apart");
  pool = states;
  pool.dtype = DType::kFloat16;
  EXPECT_STATUS(CausalConv1dUpdate(stream, 2, inputs, pool, outputs), kUnimplemented, "states is float16");
  EXPECT_STATUS(CausalConv1dUpdate(stream, 2, inputs, this->pool_->conv_view(1), outputs), kInvalidArgument,
                "the states have 0 slots");
}

}  // namespace
}  // namespace pristine::testing
