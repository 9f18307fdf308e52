#include "pristine/attention/gdn/prefill.h"

#include <array>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/gdn/kernels/prefill.h"
#include "pristine/attention/gdn/recurrent.h"
#include "pristine/attention/gdn/state_access.h"
#include "pristine/graph_runtime/graph.h"
#include "tests/gdn/prefill_rig.h"

namespace pristine::testing {
namespace {

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
  EXPECT_EQ(PrefillVParts(8, 9000, 8, 132), 2);
  EXPECT_EQ(PrefillVParts(6, 9000, 11, 132), 2);
  EXPECT_EQ(PrefillVParts(67, 9000, 1, 132), 1);
  EXPECT_EQ(PrefillVParts(4, 9000, 17, 132), 1);
  EXPECT_EQ(PrefillVParts(1, 9000, 128, 132), 2);
  EXPECT_EQ(PrefillVParts(2, 9000, 33, 132), 2);
  EXPECT_EQ(PrefillVParts(2, 9000, 34, 132), kByLengths);
  EXPECT_EQ(PrefillVParts(2, 9000, 66, 132), kByLengths);
  EXPECT_EQ(PrefillVParts(2, 9000, 67, 132), 2);
  EXPECT_EQ(PrefillVParts(3, 9000, 44, 132), kByLengths);
  EXPECT_EQ(PrefillVParts(3, 9000, 45, 132), 2);
  EXPECT_EQ(PrefillVParts(3, 321, 44, 132), kByLengths);
  EXPECT_EQ(PrefillVParts(3, 320, 44, 132), 1);
  EXPECT_EQ(PrefillHeadsPerBlock(33, 16, 2, 132), 2);
  EXPECT_EQ(PrefillHeadsPerBlock(32, 16, 2, 132), 1);
}

// The least share of the longest sequence with which the second of two kernels, block by block wherever there is room
// first, and the first ahead of it end before one kernel does.
TEST(PrefillShape, TheShareOfTheLongestIsWhereTwoKernelsEndFirst) {
  const auto two_end_first = [](int32_t sequences, int32_t v_heads, int32_t multiprocessors, int32_t share) {
    std::vector<double> room(static_cast<size_t>(multiprocessors));
    for (int32_t block = 0; block < 2 * v_heads * sequences; ++block) {
      *std::min_element(room.begin(), room.end()) += block < 2 * v_heads ? share : (64. - share) / (sequences - 1);
    }
    const double prepare = 0.65 * 64 * v_heads / multiprocessors;
    return prepare + *std::max_element(room.begin(), room.end()) < 2. * share;
  };
  for (const int32_t multiprocessors : {8, 78, 132}) {
    for (int32_t sequences = 2; sequences <= kMaxByLengths; ++sequences) {
      for (int32_t v_heads = 1; v_heads < 70; ++v_heads) {
        if (PrefillVParts(sequences, 9000, v_heads, multiprocessors) != kByLengths) continue;
        SCOPED_TRACE(absl::StrCat(sequences, " sequences, ", v_heads, " heads, ", multiprocessors));
        const int32_t share = PrefillLongestShare(sequences, v_heads, multiprocessors);
        const int32_t least = (63 + sequences) / sequences;
        ASSERT_GE(share, least);
        ASSERT_LT(share, 64);
        EXPECT_TRUE(two_end_first(sequences, v_heads, multiprocessors, share));
        for (int32_t below = least; below < share; ++below) {
          EXPECT_FALSE(two_end_first(sequences, v_heads, multiprocessors, below)) << below;
        }
      }
    }
  }
}

// In the pool, by slot; and on states that were gathered, with row numbers for slots, and scattered back.
TYPED_TEST(PrefillTest, InPlaceAndOnGatheredStatesTheBitsAreTheSame) {
  for (const DType state : {DType::kFloat32, DType::kBFloat16}) {
    constexpr int32_t kRequests = 4, kHeads = 2;
    this->Make({1, kHeads, {kRequests, 150}, state}, 5, 31);
    const std::vector<Slot> slots = {2, 5, 4};  // the last request is padded
    this->Upload({.lengths = {70, 0, 64}, .initial = slots, .final = slots});
    ASSERT_OK(this->Run(*this->stream_));
    ASSERT_OK_AND_ASSIGN(const Bytes out, ReadBytes(*this->stream_, this->out_.bytes()));
    ASSERT_OK_AND_ASSIGN(const Bytes states, ReadBytes(*this->stream_, this->pool_->view().states));
    EXPECT_FALSE(states == this->state_bytes_);

    this->ResetOutputs();
    ASSERT_OK_AND_ASSIGN(const Tensor memory,
                         MakeTensor(*this->device_, *this->stream_, state,
                                    std::vector<double>(kRequests * kHeads * kStateElements, NAN)));
    ASSERT_OK_AND_ASSIGN(const DeviceBuffer rows, this->device_->Allocate(kRequests * sizeof(Slot), "rows"));
    const StateView pool = this->pool_->view();
    const StateView gathered = {state, kHeads, kRequests, kHeads * kStateElements, memory.bytes(), PaddedRows::kSkip};
    const DeviceSpan<const Slot> of_pool = this->initial_.template As<const Slot>();
    ASSERT_OK(GatherStates(*this->stream_, kRequests, of_pool, pool, gathered, rows.As<Slot>()));
    PrefillTensors tensors = this->Tensors();
    tensors.initial_slots = tensors.final_slots = rows.As<const Slot>();
    ASSERT_OK(this->prefill_->Run(*this->stream_, this->shape_.bucket, tensors, gathered));
    ASSERT_OK(ScatterStates(*this->stream_, kRequests, of_pool, gathered, pool));
    ASSERT_OK_AND_ASSIGN(const Bytes got, ReadBytes(*this->stream_, this->out_.bytes()));
    EXPECT_TRUE(got == out);
    ASSERT_OK_AND_ASSIGN(const Bytes after, ReadBytes(*this->stream_, pool.states));
    EXPECT_TRUE(after == states);
  }
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

// Where lengths decide: one graph takes either way, and what comes out is that way's, to the bit.
TYPED_TEST(PrefillTest, OneGraphTakesTheWayThatItsLengthsChoose) {
  struct Case {
    std::vector<int32_t> lengths;
    int32_t v_parts;
  };
  const int32_t multiprocessors = this->device_->multiprocessors();
  for (const int32_t sequences : {2, 3}) {
    const int32_t v_heads = multiprocessors / (2 * sequences) + 1;
    const Extent bucket = {sequences, TestFixture::kCuda ? 1500 : 330};
    ASSERT_EQ(PrefillVParts(sequences, bucket.tokens, v_heads, multiprocessors), kByLengths);
    std::vector<Case> cases = {{{30, 34}, 1}, {{1, 219}, 2}, {{}, 1}, {{64}, 1}};
    if (sequences == 3) cases = {{{40, 1, 30}, 1}, {{3, 5, 202}, 2}, {{2, 190}, 2}};
    if (TestFixture::kCuda) {
      const int32_t share = PrefillLongestShare(sequences, v_heads, multiprocessors);
      const int32_t edge = 10 * share + 64, rest = 640 - edge;  // of 640
      const std::vector<Case> more =
          sequences == 2 ? std::vector<Case>{{{700, 700}, 1}, {{0, 1500}, 2},    {{1100, 390}, 2},
                                             {{511, 501}, 1}, {{edge, rest}, 2}, {{edge - 1, rest + 1}, 1}}
                         : std::vector<Case>{{{500, 500, 500}, 1},
                                             {{0, 0, 1500}, 2},
                                             {{200, 1000, 300}, 2},
                                             {{63, 0, 65}, 1},
                                             {{rest / 2, rest - rest / 2, edge}, 2},
                                             {{rest / 2 + 1, rest - rest / 2, edge - 1}, 1}};
      cases.insert(cases.end(), more.begin(), more.end());
    }
    std::unique_ptr<Prefill> ways[2];
    for (int i = 0; i < 2; ++i) {
      const ScopedVariable way("PRISTINE_GDN_CHUNK_H_BV", i == 0 ? "128" : "64");
      ASSERT_OK_AND_ASSIGN(ways[i],
                           Prefill::Create(*this->device_, {.largest = bucket, .qk_heads = 1, .v_heads = v_heads}));
    }
    const DType state = sequences == 2 ? DType::kFloat32 : DType::kBFloat16;
    ASSERT_NO_FATAL_FAILURE(this->Make({1, v_heads, bucket, state, Decay::kOwn}, sequences + 1, 14));
    ASSERT_NO_FATAL_FAILURE(this->Upload({}));
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph,
                         Capture(*this->stream_, [&](Stream& s) { return this->Run(s); }));
    EXPECT_EQ(graph->nodes().size(), 3u);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
    for (size_t i = 0; i < cases.size(); ++i) {
      SCOPED_TRACE(absl::StrCat(sequences, " sequences, case ", i));
      Batch batch = {.lengths = cases[i].lengths};
      for (int32_t s = 0; s < static_cast<int32_t>(batch.lengths.size()); ++s) {
        batch.initial.push_back(s == 1 ? kNoSlot : s + 1);  // the first and the third in place
        batch.final.push_back(s + 1);
      }
      ASSERT_NO_FATAL_FAILURE(this->Upload(batch));
      ASSERT_OK(exec->Launch(*this->stream_));
      ASSERT_NO_FATAL_FAILURE(this->ExpectRight([](size_t h) { return h % 11 == 1; }));
      ASSERT_OK_AND_ASSIGN(const Bytes out, ReadBytes(*this->stream_, this->out_.bytes()));
      ASSERT_OK_AND_ASSIGN(const Bytes states, ReadBytes(*this->stream_, this->pool_->view().states));
      const auto expect = [&](const Prefill& prefill, bool same) {
        ASSERT_NO_FATAL_FAILURE(this->ResetOutputs());
        ASSERT_OK(prefill.Run(*this->stream_, bucket, this->Tensors(), this->pool_->view()));
        ASSERT_OK_AND_ASSIGN(const Bytes got_out, ReadBytes(*this->stream_, this->out_.bytes()));
        ASSERT_OK_AND_ASSIGN(const Bytes got_states, ReadBytes(*this->stream_, this->pool_->view().states));
        EXPECT_EQ(out == got_out && states == got_states, same);
      };
      const int32_t taken = cases[i].v_parts;
      ASSERT_NO_FATAL_FAILURE(expect(*this->prefill_, true));
      ASSERT_NO_FATAL_FAILURE(expect(*ways[taken - 1], true));
      // Where the ways round differently, the other's bits show that this was not it.
      if (TestFixture::kCuda && batch.tokens() > 300) {
        ASSERT_NO_FATAL_FAILURE(expect(*ways[2 - taken], false));
      }
    }
    // Lengths that nobody should send: the kernels agree on a way and stay inside the tensors.
    constexpr int32_t kMin = std::numeric_limits<int32_t>::min(), kMax = std::numeric_limits<int32_t>::max();
    for (const std::vector<int32_t>& cu :
         {std::vector<int32_t>{kMin, kMax, 5, 7}, {200, 20, 220, 10}, {20, 0, 240, 20}, {0, kMax, kMin, kMax}}) {
      ASSERT_NO_FATAL_FAILURE(this->ResetOutputs());
      ASSERT_OK(Put(*this->stream_, this->cu_seqlens_, std::vector<int32_t>(cu.begin(), cu.begin() + sequences + 1)));
      ASSERT_OK(exec->Launch(*this->stream_));
      ASSERT_OK_AND_ASSIGN(const Bytes after, ReadBytes(*this->stream_, this->pool_->view().states));
      const auto slot_bytes =
          static_cast<std::ptrdiff_t>(v_heads * kStateElements) * (state == DType::kFloat32 ? 4 : 2);
      EXPECT_TRUE(std::equal(after.begin(), after.begin() + slot_bytes, this->state_bytes_.begin())) << "slot 0";
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

}  // namespace
}  // namespace pristine::testing
