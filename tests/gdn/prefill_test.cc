#include "pristine/attention/gdn/prefill.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/gdn/kernels/prefill.h"
#include "pristine/attention/gdn/recurrent.h"
#include "pristine/graph_runtime/graph.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/gdn/prefill_reference.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using namespace attention::gdn;  // NOLINT(build/namespaces): the suite is about that namespace
using attention::SizeOf;

enum class Decay {
  kOwn,   // the gates' own: -exp(A_log) softplus(a + dt_bias), some heads slow, some fast
  kSlow,  // alpha ~ U(0.9, 1)
  kAny,   // alpha ~ U(0, 1)
  kHard,  // from e^-100 to none, from one token to the next
};

double DrawLogDecay(Decay decay, int32_t head, std::mt19937_64& random) {
  const auto uniform = [&](double low, double high) { return std::uniform_real_distribution(low, high)(random); };
  switch (decay) {
    case Decay::kOwn:
      return -std::exp(0.4 * (head % 5) - 1) * std::log1p(std::exp(uniform(-6, 2)));
    case Decay::kSlow:
      return std::log(uniform(0.9, 1));
    case Decay::kAny:
      return std::log(uniform(1e-9, 1));
    case Decay::kHard:
      return uniform(0, 1) < 0.3 ? uniform(-100, -10) : uniform(-0.01, 0);
  }
  return 0;
}

struct Shape {
  int32_t qk_heads, v_heads;
  Extent bucket;
  DType state = DType::kFloat32;
  Decay decay = Decay::kOwn;
};

// Lengths of up to bucket.requests sequences and their slots.
struct Batch {
  std::vector<int32_t> lengths = {};
  std::vector<Slot> initial = {}, final = {};
  int32_t tokens() const { return std::accumulate(lengths.begin(), lengths.end(), 0); }
};

template <class T>
absl::Status Put(Stream& stream, const DeviceBuffer& to, const std::vector<T>& values) {
  PRISTINE_RETURN_IF_ERROR(
      stream.CopyFromHost(to.As<std::byte>().Sub(0, values.size() * sizeof(T)),
                          {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)}));
  return stream.Synchronize();
}

// Sets a variable until its end.
class ScopedVariable {
 public:
  ScopedVariable(const char* name, const char* value) : name_(name) { EXPECT_EQ(setenv(name, value, 1), 0); }
  ~ScopedVariable() { EXPECT_EQ(unsetenv(name_), 0); }
  ScopedVariable(const ScopedVariable&) = delete;
  ScopedVariable& operator=(const ScopedVariable&) = delete;

 private:
  const char* const name_;
};

template <class BackendT>
class PrefillTest : public DeviceTest<BackendT> {
 protected:
  static constexpr bool kCuda = std::is_same_v<BackendT, Cuda>;
  // PRISTINE_GDN_CHUNK_H_BV for two kernels and for one, whatever the bucket would choose.
  static constexpr const char* kWays[] = {"64", "128"};

  // All tensors of the bucket and a pool whose every number is NaN.
  void Make(const Shape& shape, int32_t slots, uint64_t seed) {
    random_.seed(seed);
    shape_ = shape;
    pool_.reset();
    ASSERT_OK_AND_ASSIGN(
        prefill_, Prefill::Create(*this->device_,
                                  {.largest = shape.bucket, .qk_heads = shape.qk_heads, .v_heads = shape.v_heads}));
    ASSERT_OK_AND_ASSIGN(pool_, StatePool::Create(*this->device_, shape.state, shape.v_heads, slots));
    const size_t requests = static_cast<size_t>(shape.bucket.requests);
    ASSERT_OK_AND_ASSIGN(cu_seqlens_, this->device_->Allocate((requests + 1) * 4, "cu_seqlens"));
    ASSERT_OK_AND_ASSIGN(initial_, this->device_->Allocate(requests * 4, "initial_slots"));
    ASSERT_OK_AND_ASSIGN(final_, this->device_->Allocate(requests * 4, "final_slots"));
    const size_t tokens = static_cast<size_t>(shape.bucket.tokens);
    const size_t qk = static_cast<size_t>(shape.qk_heads), heads = static_cast<size_t>(shape.v_heads);
    q_ = Normal(tokens * qk);
    k_ = Normal(tokens * qk);
    v_ = Uniform(random_, tokens * heads * 128, -1, 1);
    beta_ = Uniform(random_, tokens * heads, 0, 1);
    g_.resize(tokens * heads);
    for (size_t i = 0; i < g_.size(); ++i) {
      g_[i] = DrawLogDecay(shape.decay, static_cast<int32_t>(i % heads), random_);
    }
  }

  // Rows of 128 of length 1.
  std::vector<double> Normal(size_t rows) {
    std::normal_distribution<double> normal;
    std::vector<double> values(rows * 128);
    for (double& value : values) value = normal(random_);
    for (size_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (size_t i = 0; i < 128; ++i) sum += values[r * 128 + i] * values[r * 128 + i];
      for (size_t i = 0; i < 128; ++i) values[r * 128 + i] /= std::sqrt(sum);
    }
    return values;
  }

  // Uploads everything for `batch`: tokens past its end are NaN, and so is every state that nothing starts from.
  void Upload(const Batch& batch) {
    batch_ = batch;
    const auto poisoned = [&](DType dtype, std::vector<double> values, Tensor& tensor) {
      const size_t row = values.size() / static_cast<size_t>(shape_.bucket.tokens);
      std::fill(values.begin() + static_cast<size_t>(batch.tokens()) * row, values.end(), NAN);
      if (tensor.memory.bytes() == 0 || tensor.values.size() != values.size()) {
        ASSERT_OK_AND_ASSIGN(tensor, MakeTensor(*this->device_, *this->stream_, dtype, values));
      } else {
        const Bytes bytes = Encode(dtype, values);
        tensor.values = Decoded(dtype, bytes);
        ASSERT_OK(Put(*this->stream_, tensor.memory, bytes));
      }
    };
    poisoned(DType::kBFloat16, q_, q_tensor_);
    poisoned(DType::kBFloat16, k_, k_tensor_);
    poisoned(DType::kBFloat16, v_, v_tensor_);
    poisoned(DType::kFloat32, g_, g_tensor_);
    poisoned(DType::kFloat32, beta_, beta_tensor_);
    poisoned(DType::kBFloat16, std::vector<double>(v_.size(), NAN), out_);
    const size_t requests = static_cast<size_t>(shape_.bucket.requests);
    std::vector<int32_t> cu(requests + 1);
    std::vector<Slot> initial(requests, kNoSlot), final(requests, kNoSlot);
    for (size_t i = 0; i < requests; ++i) {
      cu[i + 1] = cu[i] + (i < batch.lengths.size() ? batch.lengths[i] : 0);
      if (i < batch.initial.size()) initial[i] = batch.initial[i];
      if (i < batch.final.size()) final[i] = batch.final[i];
    }
    ASSERT_OK(Put(*this->stream_, cu_seqlens_, cu));
    ASSERT_OK(Put(*this->stream_, initial_, initial));
    ASSERT_OK(Put(*this->stream_, final_, final));
    std::vector<double> states(pool_->view().states.size() / SizeOf(shape_.state), NAN);
    const size_t slot_size = static_cast<size_t>(pool_->view().slot_stride);
    for (const Slot slot : batch.initial) {
      if (slot < 0 || slot >= pool_->view().slots) continue;
      const std::vector<double> values = Uniform(random_, slot_size, -0.3, 0.3);
      std::copy(values.begin(), values.end(), states.begin() + static_cast<size_t>(slot) * slot_size);
    }
    state_bytes_ = Encode(shape_.state, states);
    ResetOutputs();
  }
  // The states as uploaded, and an output full of NaN.
  void ResetOutputs() {
    ASSERT_OK(this->stream_->CopyFromHost(pool_->view().states, state_bytes_));
    ASSERT_OK(this->stream_->Fill(out_.bytes(), std::byte{0xFF}));
    ASSERT_OK(this->stream_->Synchronize());
  }

  PrefillTensors Tensors() const {
    return {.q = {q_tensor_.bytes(), 0},
            .k = {k_tensor_.bytes(), 0},
            .v = {v_tensor_.bytes(), 0},
            .g = g_tensor_.memory.template As<const float>(),
            .beta = beta_tensor_.memory.template As<const float>(),
            .cu_seqlens = cu_seqlens_.As<const int32_t>(),
            .initial_slots = initial_.As<const Slot>(),
            .final_slots = final_.As<const Slot>(),
            .out = out_.bytes()};
  }
  absl::Status Run(Stream& stream) const { return prefill_->Run(stream, shape_.bucket, Tensors(), pool_->view()); }

  HeadInputs Inputs(size_t sequence, size_t head) const {
    const size_t begin = static_cast<size_t>(
        std::accumulate(batch_.lengths.begin(), batch_.lengths.begin() + static_cast<std::ptrdiff_t>(sequence), 0));
    const size_t qk = static_cast<size_t>(shape_.qk_heads), heads = static_cast<size_t>(shape_.v_heads);
    const size_t qk_head = head / (heads / qk);
    HeadInputs in;
    in.scale = PrefillConfig().scale;
    for (size_t t = begin; t < begin + static_cast<size_t>(batch_.lengths[sequence]); ++t) {
      const auto append = [](std::vector<double>& to, const Tensor& from, size_t row) {
        const auto at = from.values.begin() + static_cast<std::ptrdiff_t>(row * 128);
        to.insert(to.end(), at, at + 128);
      };
      append(in.q, q_tensor_, t * qk + qk_head);
      append(in.k, k_tensor_, t * qk + qk_head);
      append(in.v, v_tensor_, t * heads + head);
      in.g.push_back(g_tensor_.values[t * heads + head]);
      in.beta.push_back(beta_tensor_.values[t * heads + head]);
    }
    return in;
  }

  // What a run leaves, against the formulas for the value heads that `wanted` names, and against the bits of before for
  // everything that the batch does not name.
  void ExpectRight(const std::function<bool(size_t)>& wanted = [](size_t) { return true; }) {
    const std::vector<double> before = Decoded(shape_.state, state_bytes_);
    ASSERT_OK_AND_ASSIGN(const Bytes after_bytes, ReadBytes(*this->stream_, pool_->view().states));
    const std::vector<double> after = Decoded(shape_.state, after_bytes);
    ASSERT_OK_AND_ASSIGN(const std::vector<double> out, ReadTensor(*this->stream_, out_));
    const size_t heads = static_cast<size_t>(shape_.v_heads), slots = static_cast<size_t>(pool_->view().slots);
    const size_t state_size = static_cast<size_t>(kStateElements), slot_size = heads * state_size;
    std::vector<bool> stored(slots);
    std::vector<double> expected_out, got_out, expected_states, got_states;
    size_t begin = 0;
    for (size_t i = 0; i < batch_.lengths.size(); ++i) {
      const Slot from = i < batch_.initial.size() ? batch_.initial[i] : kNoSlot;
      const Slot to = i < batch_.final.size() ? batch_.final[i] : kNoSlot;
      const bool store = to >= 0 && static_cast<size_t>(to) < slots;
      if (store) stored[static_cast<size_t>(to)] = true;
      for (size_t h = 0; h < heads; ++h) {
        if (!wanted(h)) continue;
        std::vector<double> state(state_size);
        if (from >= 0 && static_cast<size_t>(from) < slots) {
          const auto at =
              before.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(from) * slot_size + h * state_size);
          state.assign(at, at + kStateElements);
        }
        const std::vector<double> o = RecurrentReference(Inputs(i, h), state);
        for (size_t t = 0; t < o.size() / 128; ++t) {
          for (size_t d = 0; d < 128; ++d) {
            expected_out.push_back(o[t * 128 + d]);
            got_out.push_back(out[((begin + t) * heads + h) * 128 + d]);
          }
        }
        if (!store) continue;
        expected_states.insert(expected_states.end(), state.begin(), state.end());
        const auto at =
            after.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(to) * slot_size + h * state_size);
        got_states.insert(got_states.end(), at, at + kStateElements);
      }
      begin += static_cast<size_t>(batch_.lengths[i]);
    }
    ExpectClose(expected_out, got_out, 1e-2, 1e-2, "out");
    ExpectClose(expected_states, got_states, 5e-3, 1e-3, "states");
    for (size_t i = begin * heads * 128; i < out.size(); ++i) ASSERT_EQ(out[i], 0) << "past the last sequence";
    const size_t slot_bytes = slot_size * SizeOf(shape_.state);
    for (size_t s = 0; s < slots; ++s) {
      if (stored[s]) continue;
      EXPECT_TRUE(std::equal(state_bytes_.begin() + static_cast<std::ptrdiff_t>(s * slot_bytes),
                             state_bytes_.begin() + static_cast<std::ptrdiff_t>((s + 1) * slot_bytes),
                             after_bytes.begin() + static_cast<std::ptrdiff_t>(s * slot_bytes)))
          << "slot " << s;
    }
  }
  static void ExpectClose(const std::vector<double>& expected, const std::vector<double>& got, double absolute,
                          double relative, const char* what) {
    EXPECT_LT(RelativeRms(expected, got), 0.005) << what;
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_LE(std::abs(expected[i] - got[i]), absolute + relative * std::abs(expected[i]))
          << what << " element " << i << ": expected " << expected[i] << ", got " << got[i];
    }
  }

  void TearDown() override {
    prefill_.reset();
    pool_.reset();
    for (Tensor* tensor : {&q_tensor_, &k_tensor_, &v_tensor_, &g_tensor_, &beta_tensor_, &out_}) *tensor = {};
    for (DeviceBuffer* buffer : {&cu_seqlens_, &initial_, &final_}) *buffer = {};
    DeviceTest<BackendT>::TearDown();
  }

  std::mt19937_64 random_;
  Shape shape_;
  Batch batch_;
  std::unique_ptr<Prefill> prefill_;
  std::unique_ptr<StatePool> pool_;
  std::vector<double> q_, k_, v_, g_, beta_;
  Tensor q_tensor_, k_tensor_, v_tensor_, g_tensor_, beta_tensor_, out_;
  DeviceBuffer cu_seqlens_, initial_, final_;
  Bytes state_bytes_;
};
TYPED_TEST_SUITE(PrefillTest, AllBackends, BackendNames);

TEST(PrefillReference, RecurrentAndChunkedFormsAreOneFunction) {
  std::mt19937_64 random(1);
  for (const Decay decay : {Decay::kOwn, Decay::kSlow, Decay::kAny, Decay::kHard}) {
    for (const size_t tokens : {1, 7, 63, 64, 65, 150}) {
      HeadInputs in;
      in.scale = PrefillConfig().scale;
      in.q = Uniform(random, tokens * 128, -0.15, 0.15);
      in.k = Uniform(random, tokens * 128, -0.15, 0.15);
      in.v = Uniform(random, tokens * 128, -1, 1);
      in.beta = Uniform(random, tokens, 0, 1);
      for (size_t t = 0; t < tokens; ++t) in.g.push_back(DrawLogDecay(decay, 2, random));
      const std::vector<double> initial = Uniform(random, 128 * 128, -0.3, 0.3);
      std::vector<double> one = initial, other = initial;
      const std::vector<double> recurrent = RecurrentReference(in, one), chunked = ChunkedReference(in, other, 64);
      EXPECT_LT(RelativeRms(recurrent, chunked), 1e-12);
      EXPECT_LT(RelativeRms(one, other), 1e-12);
      for (size_t i = 0; i < recurrent.size(); ++i) ASSERT_NEAR(recurrent[i], chunked[i], 1e-12);
      for (size_t i = 0; i < one.size(); ++i) ASSERT_NEAR(one[i], other[i], 1e-12);
    }
  }
}

// Sequence i's chunks take places from FirstChunk on; whatever the lengths, they are apart and within the bound.
TEST(PrefillPlaces, OfTwoSequencesNeverOverlap) {
  std::mt19937_64 random(2);
  for (int round = 0; round < 2000; ++round) {
    const int32_t sequences = 1 + static_cast<int32_t>(random() % 9);
    int32_t token = 0, next = 0;
    for (int32_t i = 0; i < sequences; ++i) {
      const int32_t length = static_cast<int32_t>(random() % (random() % 2 == 0 ? 4 : 300));
      const int32_t first = FirstChunk(i, token);
      ASSERT_GE(first, next) << "round " << round;
      next = first + (length + kChunk - 1) / kChunk;
      token += length;
    }
    ASSERT_LE(next, ChunkBound(sequences, token)) << "round " << round;
    ASSERT_LE(ChunkBound(sequences, token), ChunkBound(sequences + 1, token));
    ASSERT_LE(ChunkBound(sequences, token), ChunkBound(sequences, token + 1));
  }
}

TEST(PrefillShape, FollowsBucketAndDevice) {
  EXPECT_EQ(PrefillVParts(8, 8, 132), 2);
  EXPECT_EQ(PrefillVParts(6, 11, 132), 2);
  EXPECT_EQ(PrefillVParts(67, 1, 132), 1);
  EXPECT_EQ(PrefillVParts(4, 17, 132), 1);
  EXPECT_EQ(PrefillVParts(3, 64, 132), 2);
  EXPECT_EQ(PrefillHeadsPerBlock(33, 16, 2, 132), 2);
  EXPECT_EQ(PrefillHeadsPerBlock(32, 16, 2, 132), 1);
}

TYPED_TEST(PrefillTest, IsTheFormulaForEveryHeadRatioAndLength) {
  struct Case {
    int32_t qk_heads, v_heads;
    std::vector<int32_t> lengths;
  };
  std::vector<Case> cases = {{1, 1, {64}}, {1, 2, {31}}, {1, 3, {64, 30}}, {1, 4, {61}}};
  if (TestFixture::kCuda) {
    const std::vector<std::vector<int32_t>> all = {{64},           {128}, {256},      {256, 256},
                                                   {64, 128, 512}, {31},  {61},       {91},
                                                   {121},          {251}, {511, 501}, {31, 63, 93, 123, 150, 500}};
    for (const auto& [qk, v] : {std::pair{1, 1}, {3, 3}, {1, 2}, {2, 4}, {2, 6}, {1, 4}}) {
      for (const std::vector<int32_t>& lengths : all) cases.push_back({qk, v, lengths});
    }
    cases.push_back({16, 32, {31, 63, 93, 123, 150, 500}});
    cases.push_back({16, 48, {511, 501}});
    cases.push_back({16, 64, {700, 1, 300}});
    cases.push_back({2, 8, {3000}});
  }
  uint64_t seed = 100;
  for (const Case& c : cases) {
    ++seed;
    const DType state = seed % 2 == 0 ? DType::kFloat32 : DType::kBFloat16;
    const Decay decay = std::array{Decay::kOwn, Decay::kSlow, Decay::kAny, Decay::kHard}[seed / 2 % 4];
    SCOPED_TRACE(absl::StrCat(c.qk_heads, "/", c.v_heads, " ", c.lengths.size(), " sequences, the first of ",
                              c.lengths[0], ", states ", ToString(state), ", decay ", static_cast<int>(decay)));
    const int32_t count = static_cast<int32_t>(c.lengths.size());
    Batch batch = {.lengths = c.lengths};
    for (int32_t i = 0; i < count; ++i) {
      batch.initial.push_back(i % 3 == 1 ? kNoSlot : count - i);
      batch.final.push_back(i % 2 == 0 ? count - i : count + 1 + i);
    }
    ASSERT_NO_FATAL_FAILURE(
        this->Make({c.qk_heads, c.v_heads, {count, batch.tokens()}, state, decay}, 2 * count + 2, seed));
    ASSERT_NO_FATAL_FAILURE(this->Upload(batch));
    ASSERT_OK(this->Run(*this->stream_));
    ASSERT_NO_FATAL_FAILURE(this->ExpectRight([&](size_t h) { return c.v_heads <= 8 || h % 17 == 3; }));
  }
}

TYPED_TEST(PrefillTest, EveryTailAndDecayLeavesTheRightState) {
  for (const char* const bv : TestFixture::kWays) {
    const ScopedVariable way("PRISTINE_GDN_CHUNK_H_BV", bv);
    SCOPED_TRACE(absl::StrCat("BV ", bv));
    for (const Decay decay : {Decay::kSlow, Decay::kHard}) {
      std::vector<int32_t> tails = {1, 2, 33};
      if (TestFixture::kCuda) {
        tails.resize(63);
        std::iota(tails.begin(), tails.end(), 1);
      }
      // One after another in one batch, so that each tail's chunk is followed by the next sequence's tokens.
      Batch batch;
      for (const int32_t tail : tails) {
        batch.lengths.push_back(TestFixture::kCuda ? 64 + tail : tail);
        batch.final.push_back(static_cast<Slot>(batch.lengths.size()));
      }
      batch.initial = batch.final;
      const int32_t count = static_cast<int32_t>(tails.size());
      ASSERT_NO_FATAL_FAILURE(this->Make({1, 1, {count, batch.tokens() + 5}, DType::kFloat32, decay}, count, 7));
      ASSERT_NO_FATAL_FAILURE(this->Upload(batch));
      ASSERT_OK(this->Run(*this->stream_));
      ASSERT_NO_FATAL_FAILURE(this->ExpectRight());
    }
  }
}

// One key over and over, beta near 1 and no decay: each token takes back nearly all that the one before wrote, and what
// is left is a small difference of numbers that were rounded to bfloat16.
TYPED_TEST(PrefillTest, RepeatedKeysWithoutDecay) {
  for (const char* const bv : TestFixture::kWays) {
    const ScopedVariable way("PRISTINE_GDN_CHUNK_H_BV", bv);
    SCOPED_TRACE(absl::StrCat("BV ", bv));
    const int32_t length = TestFixture::kCuda ? 200 : 70;
    ASSERT_NO_FATAL_FAILURE(this->Make({1, 2, {1, length}, DType::kFloat32, Decay::kSlow}, 1, 8));
    for (size_t i = 128; i < this->k_.size(); ++i) this->k_[i] = this->k_[i % 128];
    std::fill(this->g_.begin(), this->g_.end(), 0);
    std::fill(this->beta_.begin(), this->beta_.end(), 0.97);
    ASSERT_NO_FATAL_FAILURE(this->Upload({.lengths = {length}, .initial = {1}, .final = {1}}));
    ASSERT_OK(this->Run(*this->stream_));
    ASSERT_NO_FATAL_FAILURE(this->ExpectRight());
  }
}

TYPED_TEST(PrefillTest, EagerEqualsCapturedEqualsReplayedForAnyLengthsInTheBucket) {
  for (const char* const bv : TestFixture::kWays) {
    const ScopedVariable way("PRISTINE_GDN_CHUNK_H_BV", bv);
    SCOPED_TRACE(absl::StrCat("BV ", bv));
    const int32_t big = TestFixture::kCuda ? 10 : 1;
    for (const DType state : {DType::kFloat32, DType::kBFloat16}) {
      ASSERT_NO_FATAL_FAILURE(this->Make({1, 2, {4, 70 * big}, state, Decay::kOwn}, 6, 9));
      std::vector<Batch> batches = {
          {{70 * big}, {1}, {1}},
          {{}, {}, {}},
          {{1, 1, 1, 1}, {1, 2, 3, 4}, {1, 2, 3, 4}},
          {{0, 33 * big, 0, 12}, {2, -1, 4, 6}, {2, 3, -1, 5}},
          {{64 * big, 1}, {-1, -1}, {6, 5}},
          {{5, 65 * big}, {1, 5}, {3, -1}},
          {{0, 0, 0, 70 * big}, {1, 2, 3, 4}, {4, 3, 2, 1}},
          {{17 * big, 18 * big, 19 * big, 16 * big}, {6, -1, 4, 3}, {6, 5, 4, 3}},
          {{32, 32}, {1, 7}, {std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}},
      };
      batches[6].final = {1, 2, 3, 4};
      ASSERT_NO_FATAL_FAILURE(this->Upload(batches[1]));
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph,
                           Capture(*this->stream_, [&](Stream& s) { return this->Run(s); }));
      EXPECT_EQ(graph->nodes().size(), std::string(bv) == "64" ? 2u : 1u);
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
      const size_t allocations = this->device_->total_allocations();
      for (size_t i = 0; i < batches.size(); ++i) {
        SCOPED_TRACE(absl::StrCat("batch ", i, ", states ", ToString(state)));
        ASSERT_NO_FATAL_FAILURE(this->Upload(batches[i]));
        ASSERT_OK(this->Run(*this->stream_));
        ASSERT_NO_FATAL_FAILURE(this->ExpectRight());
        ASSERT_OK_AND_ASSIGN(const Bytes eager, ReadBytes(*this->stream_, this->out_.bytes()));
        ASSERT_OK_AND_ASSIGN(const Bytes eager_states, ReadBytes(*this->stream_, this->pool_->view().states));
        ASSERT_NO_FATAL_FAILURE(this->ResetOutputs());
        ASSERT_OK(exec->Launch(*this->stream_));
        ASSERT_OK_AND_ASSIGN(const Bytes replayed, ReadBytes(*this->stream_, this->out_.bytes()));
        ASSERT_OK_AND_ASSIGN(const Bytes replayed_states, ReadBytes(*this->stream_, this->pool_->view().states));
        EXPECT_TRUE(eager == replayed);
        EXPECT_TRUE(eager_states == replayed_states);
      }
      EXPECT_EQ(this->device_->total_allocations(), allocations);
    }
  }
}

// A capture runs nothing: one in the middle of serving, of another bucket, leaves every byte of every state.
TYPED_TEST(PrefillTest, ARecaptureLeavesEveryStateAsItIs) {
  for (const char* const bv : TestFixture::kWays) {
    const ScopedVariable way("PRISTINE_GDN_CHUNK_H_BV", bv);
    SCOPED_TRACE(absl::StrCat("BV ", bv));
    ASSERT_NO_FATAL_FAILURE(this->Make({1, 2, {2, 80}}, 3, 13));
    ASSERT_NO_FATAL_FAILURE(this->Upload({.lengths = {66, 5}, .initial = {1, 2}, .final = {1, 3}}));
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> graph,
                         Capture(*this->stream_, [&](Stream& s) { return this->Run(s); }));
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<GraphExec> exec, graph->Instantiate());
    ASSERT_OK(exec->Launch(*this->stream_));
    ASSERT_OK_AND_ASSIGN(const Bytes before, ReadBytes(*this->stream_, this->pool_->view().states));
    this->shape_.bucket = {1, 70};
    ASSERT_OK_AND_ASSIGN(graph, Capture(*this->stream_, [&](Stream& s) { return this->Run(s); }));
    ASSERT_OK_AND_ASSIGN(exec, graph->Instantiate());
    ASSERT_OK_AND_ASSIGN(const Bytes after, ReadBytes(*this->stream_, this->pool_->view().states));
    EXPECT_TRUE(before == after);
  }
}

// A prompt by Prefill, then tokens by Decode: one recurrence over all of them.
TYPED_TEST(PrefillTest, DecodeGoesOnFromThePrefilledState) {
  for (const char* const bv : TestFixture::kWays) {
    const ScopedVariable way("PRISTINE_GDN_CHUNK_H_BV", bv);
    SCOPED_TRACE(absl::StrCat("BV ", bv));
    constexpr int32_t kPrompt = 75, kMore = 5, kQk = 2, kV = 4;
    ASSERT_NO_FATAL_FAILURE(this->Make({kQk, kV, {1, kPrompt + kMore}, DType::kFloat32, Decay::kOwn}, 2, 10));
    const std::vector<double> gates = Uniform(this->random_, size_t{kMore} * kV, -3, 1);
    const std::vector<double> zeros(kV);
    const size_t more = size_t{kPrompt} * kV;
    for (size_t i = 0; i < gates.size(); ++i) {  // what Decode makes of a = b = gates
      const double gate = attention::ToFloat(attention::FromFloat<attention::BFloat16>(static_cast<float>(gates[i])));
      this->g_[more + i] = -std::log1p(std::exp(gate));
      this->beta_[more + i] = 1 / (1 + std::exp(-gate));
    }
    const Batch all = {.lengths = {kPrompt + kMore}, .initial = {kNoSlot}, .final = {2}};
    ASSERT_NO_FATAL_FAILURE(this->Upload(all));
    this->batch_ = {.lengths = {kPrompt}, .initial = {kNoSlot}, .final = {2}};
    ASSERT_OK(Put(*this->stream_, this->cu_seqlens_, std::vector<int32_t>{0, kPrompt}));
    ASSERT_OK(this->Run(*this->stream_));
    ASSERT_OK_AND_ASSIGN(const Tensor a, MakeTensor(*this->device_, *this->stream_, DType::kBFloat16, gates));
    ASSERT_OK_AND_ASSIGN(const Tensor zero, MakeTensor(*this->device_, *this->stream_, DType::kFloat32, zeros));
    for (size_t t = 0; t < kMore; ++t) {
      const auto from = [&](const Tensor& tensor, size_t token, size_t width) -> Rows {
        const size_t skip = token * width * sizeof(attention::BFloat16);
        return {tensor.bytes().Sub(skip, tensor.bytes().size() - skip), 0};
      };
      const RecurrentInputs inputs = {.qk_heads = kQk,
                                      .q = from(this->q_tensor_, kPrompt + t, kQk * 128),
                                      .k = from(this->k_tensor_, kPrompt + t, kQk * 128),
                                      .v = from(this->v_tensor_, kPrompt + t, kV * 128),
                                      .gates = {DType::kBFloat16, kV, from(a, t, kV), from(a, t, kV),
                                                zero.memory.As<const float>(), zero.memory.As<const float>()},
                                      .cache_indices = this->final_.template As<const Slot>()};
      const size_t row = size_t{kV} * 128 * sizeof(attention::BFloat16);
      ASSERT_OK(
          Decode(*this->stream_, 1, inputs, this->pool_->view(), this->out_.bytes().Sub((kPrompt + t) * row, row)));
    }
    this->batch_ = all;
    ASSERT_NO_FATAL_FAILURE(this->ExpectRight());
  }
}

// The state is kept in float32 registers and stored once: no workspace grows with the states, none is in their place.
TYPED_TEST(PrefillTest, AllocatesAtCreateAloneAndNoState) {
  const PrefillConfig config = {.largest = {4, 512}, .qk_heads = 2, .v_heads = 4};
  const int64_t chunks = ChunkBound(4, 512);
  EXPECT_EQ(chunks, 4 + 508 / 64);
  EXPECT_EQ(PrefillWorkspaceBytes(config), chunks * 4 * (3 * 64 * 64 * 2 + 2 * 64 * 4));
  const LiveObjects before = this->device_->live();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Prefill> prefill, Prefill::Create(*this->device_, config));
  EXPECT_EQ(this->device_->live().bytes - before.bytes,
            TestFixture::kCuda ? static_cast<size_t>(PrefillWorkspaceBytes(config)) : size_t{0});
}

TYPED_TEST(PrefillTest, TakesItsTuningFromTheEnvironmentAtCreate) {
  const Batch batch = {.lengths = {40, 30}, .initial = {1, 2}, .final = {1, 2}};
  const Shape shape = {1, 2, {2, 70}};
  for (const char* const bv : {"64", "128"}) {
    {
      const ScopedVariable variable("PRISTINE_GDN_CHUNK_H_BV", bv);
      ASSERT_NO_FATAL_FAILURE(this->Make(shape, 2, 13));
    }
    const ScopedVariable later("PRISTINE_GDN_CHUNK_H_BV", "nonsense");
    ASSERT_NE(this->prefill_->tuning(), nullptr);
    EXPECT_EQ(absl::StrCat(this->prefill_->tuning()->bv), bv);
    ASSERT_NO_FATAL_FAILURE(this->Upload(batch));
    ASSERT_OK(this->Run(*this->stream_));
    ASSERT_NO_FATAL_FAILURE(this->ExpectRight());
    EXPECT_STATUS(Prefill::Create(*this->device_, this->prefill_->config()), kInvalidArgument,
                  "PRISTINE_GDN_CHUNK_H_BV is \"nonsense\"");
  }
  ASSERT_NO_FATAL_FAILURE(this->Make(shape, 2, 13));
  EXPECT_EQ(this->prefill_->tuning(), nullptr);
}

TYPED_TEST(PrefillTest, RefusesATuningThatIsNotCompiledOrFallsBack) {
  const PrefillConfig config = {.largest = {1, 64}, .qk_heads = 1, .v_heads = 1};
  const ScopedVariable variable("PRISTINE_GDN_CHUNK_H_NUM_STAGES", "4");
  const size_t allocations = this->device_->total_allocations();
  EXPECT_STATUS(Prefill::Create(*this->device_, config), kInvalidArgument,
                "gdn_prefill_states: BV 128, 16 warps, 4 stages (PRISTINE_GDN_CHUNK_H_*) is not compiled");
  EXPECT_EQ(this->device_->total_allocations(), allocations);
  std::vector<std::string> warnings;
  TuningPolicy policy(TuningPolicy::OnBadTuning::kFallBack, [&](const std::string& text) { warnings.push_back(text); });
  for (int i = 1; i <= 2; ++i) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Prefill> prefill, Prefill::Create(*this->device_, config, &policy));
    ASSERT_NE(prefill->tuning(), nullptr);
    EXPECT_EQ(*prefill->tuning(), (GdnTuning{128, 16, 3, true}));
    EXPECT_EQ(policy.fallbacks(), i);
  }
  EXPECT_EQ(warnings.size(), 1u);
}

TYPED_TEST(PrefillTest, RefusesWhatDoesNotFit) {
  Device& device = *this->device_;
  const auto create = [&](const PrefillConfig& config) { return Prefill::Create(device, config).status(); };
  EXPECT_STATUS(create({.largest = {0, 64}, .qk_heads = 1, .v_heads = 1}), kInvalidArgument, "0 requests, 64 tokens");
  EXPECT_STATUS(create({.largest = {1, 0}, .qk_heads = 1, .v_heads = 1}), kInvalidArgument, "1 requests, 0 tokens");
  EXPECT_STATUS(create({.largest = {1, 64}, .qk_heads = 3, .v_heads = 4}), kInvalidArgument,
                "qk_heads is 3 and v_heads 4");
  EXPECT_STATUS(create({.largest = {1, 64}, .qk_heads = 1, .v_heads = 1, .scale = NAN}), kInvalidArgument,
                "scale is nan");

  ASSERT_NO_FATAL_FAILURE(this->Make({1, 2, {2, 10}}, 2, 11));
  ASSERT_NO_FATAL_FAILURE(this->Upload({.lengths = {4, 6}, .initial = {1, 2}, .final = {1, 2}}));
  const PrefillTensors good = this->Tensors();
  const StateView pool = this->pool_->view();
  const auto run = [&](const Extent& bucket, const PrefillTensors& tensors, const StateView& states) {
    return this->prefill_->Run(*this->stream_, bucket, tensors, states);
  };
  EXPECT_STATUS(run({3, 10}, good, pool), kInvalidArgument,
                "{3 requests, 10 tokens}; counts must be at least 1 and fit");
  EXPECT_STATUS(run({2, 0}, good, pool), kInvalidArgument, "{2 requests, 0 tokens}");
  PrefillTensors bad = good;
  bad.q.stride = 127;
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "q has a row stride of 127");
  bad = good;
  bad.k.stride = 129;
  EXPECT_STATUS(run({2, 9}, bad, pool), kInvalidArgument, "k and its stride of 129 elements must be aligned");
  bad = good;
  bad.v.data = bad.v.data.Sub(0, 5118);
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "v has 2559 elements, needs 2560");
  bad = good;
  bad.g = bad.g.Sub(0, 19);
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "g has 19 elements, needs 20");
  bad = good;
  bad.beta = {};
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "beta has 0 elements, needs 20");
  bad = good;
  bad.cu_seqlens = bad.cu_seqlens.Sub(0, 2);
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "cu_seqlens has 2 elements, needs 3");
  bad = good;
  bad.initial_slots = {};
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "initial_slots has 0 elements, needs 2");
  bad = good;
  bad.final_slots = bad.final_slots.Sub(0, 1);
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "final_slots has 1 elements, needs 2");
  bad = good;
  bad.out = bad.out.Sub(2, bad.out.size() - 2);
  EXPECT_STATUS(run({2, 9}, bad, pool), kInvalidArgument, "out must be aligned to 16 bytes");
  StateView other = pool;
  other.v_heads = 1;
  EXPECT_STATUS(run({2, 10}, good, other), kInvalidArgument, "slots of 1 heads");
  other = pool;
  other.dtype = DType::kFloat16;
  EXPECT_STATUS(run({2, 10}, good, other), kUnimplemented, "states is float16");
  ASSERT_NO_FATAL_FAILURE(ForBadSlots(pool, [&](const StateView& view) {
    EXPECT_STATUS(run({2, 10}, good, view), kInvalidArgument, "states");
  }));
  other = pool;
  other.states = other.states.Sub(0, other.states.size() - 4);
  EXPECT_STATUS(run({2, 10}, good, other), kInvalidArgument, "states has");
  ASSERT_OK(run({2, 10}, good, pool));
  ASSERT_NO_FATAL_FAILURE(this->ExpectRight());
}

// cu_seqlens that no engine should send: nothing outside the tensors is touched, and the run ends.
TYPED_TEST(PrefillTest, HostileLengthsStayInsideTheTensors) {
  for (const char* const bv : TestFixture::kWays) {
    const ScopedVariable way("PRISTINE_GDN_CHUNK_H_BV", bv);
    SCOPED_TRACE(absl::StrCat("BV ", bv));
    ASSERT_NO_FATAL_FAILURE(this->Make({1, 1, {3, 70}}, 3, 12));
    const Batch batch = {.lengths = {30, 30, 10}, .initial = {1, 2, 3}, .final = {1, 2, 3}};
    constexpr int32_t kMin = std::numeric_limits<int32_t>::min(), kMax = std::numeric_limits<int32_t>::max();
    for (const std::vector<int32_t>& cu : {std::vector<int32_t>{0, kMax, kMax, kMax},
                                           {kMin, kMin, 5, 70},
                                           {50, 20, 60, 10},
                                           {70, 0, 70, 0},
                                           {0, 71, 3, kMin}}) {
      ASSERT_NO_FATAL_FAILURE(this->Upload(batch));
      ASSERT_OK(Put(*this->stream_, this->cu_seqlens_, cu));
      ASSERT_OK(this->Run(*this->stream_));
      ASSERT_OK(this->stream_->Synchronize());
      ASSERT_OK_AND_ASSIGN(const Bytes after, ReadBytes(*this->stream_, this->pool_->view().states));
      EXPECT_TRUE(std::equal(after.begin(), after.begin() + kStateElements * 4, this->state_bytes_.begin()));  // slot 0
    }
    ASSERT_NO_FATAL_FAILURE(this->Upload(batch));
    ASSERT_OK(this->Run(*this->stream_));
    ASSERT_NO_FATAL_FAILURE(this->ExpectRight());
  }
}

}  // namespace
}  // namespace pristine::testing
