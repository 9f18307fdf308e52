// Merges in captured graphs: eager, captured and replayed runs with other lengths are the same, padding stays harmless,
// and what cannot run is refused by name.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "pristine/graph_runtime/graph_runner.h"
#include "tests/attention/merge_rig.h"

namespace pristine::testing {
namespace {

using attention::DType;
using attention::MergeShape;
using attention::MutableStates;
using attention::States;

constexpr int32_t kMaxRows = 8;
constexpr int32_t kMaxStates = 40;
const std::vector<Extent> kBuckets = {{2, 2}, {5, 5}, {8, 8}};

template <class BackendT>
class MergeGraphTest : public MergeTest<BackendT> {
 protected:
  void TearDown() override {
    if (this->stream_ != nullptr) this->stream_->Synchronize().IgnoreError();
    runner_.reset();
    MergeTest<BackendT>::TearDown();
  }
  // Captures `body` for all buckets, with the manager's prologue at the head.
  void Capture(GraphRunner::Body body) {
    ASSERT_OK_AND_ASSIGN(runner_, GraphRunner::Create({.buckets = kBuckets}, std::move(body)));
    ASSERT_OK(runner_->AddHook(*this->manager_));
    ASSERT_OK(runner_->CaptureAll(*this->stream_));
  }
  std::unique_ptr<GraphRunner> runner_;
};
TYPED_TEST_SUITE(MergeGraphTest, AllBackends, BackendNames);

TYPED_TEST(MergeGraphTest, RaggedMergesAreTheSameEagerlyCapturedAndReplayedWithOtherLengths) {
  const MergeShape shape = {DType::kBFloat16, 6, 128};
  std::vector<int32_t> worst(kMaxRows + 1);
  for (int32_t row = 0; row <= kMaxRows; ++row) worst[row] = row * (kMaxStates / kMaxRows);
  ASSERT_OK_AND_ASSIGN(this->manager_, BufferManager::Create(*this->device_));
  ASSERT_OK_AND_ASSIGN(const Buffer<int32_t> indptr,
                       this->manager_->template Register<int32_t>({.name = "merge_indptr",
                                                                   .role = Role::kRefilled,
                                                                   .kind = Kind::kIndptr,
                                                                   .axis = Axis::RequestsPlusOne(),
                                                                   .limit = kMaxStates},
                                                                  worst));
  ASSERT_OK(this->manager_->Seal());
  const MutableStates device = this->Put(RandomStates(shape, kMaxStates, 1));
  const MutableStates out = this->Output(shape, kMaxRows);
  const auto body = [&](Stream& stream, const Extent& bucket) {
    return MergeRaggedStates(stream, shape, bucket.requests, indptr.live, kMaxStates, this->In(device), out,
                             this->reports(bucket));
  };
  this->Capture(body);

  // Longer, shorter, empty, all padding, a full bucket; in this order and back.
  struct Step {
    Extent bucket;
    std::vector<int32_t> indptr;
  };
  std::vector<Step> steps = {
      {{5, 5}, {0, 3, 3, 11, 12}},  {{2, 2}, {0, 40, 40}}, {{8, 8}, {0, 1, 2, 3, 4, 5, 6, 7, 40}}, {{5, 5}, {0}},
      {{5, 5}, {0, 0, 0, 0, 0, 0}}, {{2, 2}, {0, 0, 1}},   {{8, 8}, {0, 13, 13, 14, 20, 33}},      {{2, 2}, {0, 5}}};
  for (size_t i = steps.size(); i-- > 0;) steps.push_back(steps[i]);
  uint64_t seed = 100;
  for (const Step& step : steps) {
    const int32_t real = static_cast<int32_t>(step.indptr.size()) - 1;
    // States that no row names are NaN, with an lse of +inf that would be reported.
    HostStates states = RandomStates(shape, kMaxStates, ++seed, 0.2);
    std::fill(states.v.begin() + int64_t{step.indptr.back()} * 6 * 128, states.v.end(), kNan);
    std::fill(states.lse.begin() + int64_t{step.indptr.back()} * 6, states.lse.end(), kInf);
    ASSERT_OK(Upload(*this->stream_, device.v, ToBytes(states.v, shape.dtype)));
    ASSERT_OK(Upload(*this->stream_, this->AsFloat(device.lse), states.lse));
    std::vector<std::byte> runs[2];
    for (const bool replayed : {false, true}) {
      ASSERT_OK(this->stream_->Fill(out.v, std::byte{0xff}));
      ASSERT_OK(this->stream_->Fill(AsWritableBytes(out.lse), std::byte{0xff}));
      ASSERT_OK(this->manager_->BeginStep(step.bucket, {real, real}));
      ASSERT_OK(this->manager_->template Refill<int32_t>(indptr, step.indptr));
      if (replayed) {
        ASSERT_OK(this->runner_->Replay(*this->stream_, step.bucket, {real, real}));
      } else {
        ASSERT_OK(this->manager_->BeforeReplay(*this->stream_, step.bucket, {real, real}));
        ASSERT_OK(this->manager_->RecordPrologue(*this->stream_, step.bucket));
        ASSERT_OK(body(*this->stream_, step.bucket));
      }
      ASSERT_OK_AND_ASSIGN(runs[replayed], Download(*this->stream_, out.v));
      const HostStates merged = this->Get(shape, kMaxRows, out);
      std::vector<int32_t> padded = step.indptr;  // flat: zeros and -inf
      padded.resize(static_cast<size_t>(step.bucket.requests) + 1, step.indptr.back());
      EXPECT_EQ(this->CheckSets(states, padded, merged), "") << (replayed ? "replayed" : "eager");
      for (size_t i = static_cast<size_t>(step.bucket.requests) * 6; i < merged.lse.size(); ++i) {
        ASSERT_TRUE(std::isnan(merged.lse[i])) << "a row past the bucket was written";
      }
    }
    EXPECT_EQ(runs[0], runs[1]);
    EXPECT_TRUE(this->Poll().empty());
  }

  // A step that breaks the indptr's rule is neutralised: no row has states.
  ASSERT_OK(this->manager_->BeginStep({5, 5}, {3, 3}));
  ASSERT_OK(this->manager_->template Refill<int32_t>(indptr, std::vector<int32_t>{0, 9, 4, 12}));
  ASSERT_OK(this->runner_->Replay(*this->stream_, {5, 5}, {3, 3}));
  EXPECT_EQ(this->CheckSets(RandomStates(shape, 1, 1), std::vector<int32_t>(6, 0), this->Get(shape, kMaxRows, out)),
            "");
  const std::vector<Violation> found = this->Poll();
  ASSERT_FALSE(found.empty());
  EXPECT_EQ(found[0].kind, Violation::Kind::kInvariant);
}

// Kernels come to the device before the one ahead of them has ended, and must wait there for what it writes.
TYPED_TEST(MergeGraphTest, MergesThatReadEachOthersResultsTakeTheirTurns) {
  const MergeShape shape = {DType::kFloat32, 4, 64};
  constexpr int32_t kRows = 400, kSteps = 8;
  const HostStates start = RandomStates(shape, kRows, 40);
  const MutableStates at[2] = {this->Put(start), this->Output(shape, kRows)};
  std::vector<MutableStates> others;
  for (int step = 0; step < kSteps; ++step) others.push_back(this->Put(RandomStates(shape, kRows, 50 + step)));
  const auto merge = [&](Stream& stream, int step) {
    return MergeState(stream, shape, kRows, this->In(at[step % 2]), this->In(others[step]), at[1 - step % 2],
                      this->reports());
  };
  for (int step = 0; step < kSteps; ++step) {
    ASSERT_OK(merge(*this->stream_, step));
    ASSERT_OK(this->stream_->Synchronize());
  }
  ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> expected, Download(*this->stream_, at[kSteps % 2].v));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, pristine::Capture(*this->stream_, [&](Stream& capturing) {
                         for (int step = 0; step < kSteps; ++step) PRISTINE_RETURN_IF_ERROR(merge(capturing, step));
                         return absl::OkStatus();
                       }));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
  for (int run = 0; run < 3; ++run) {
    ASSERT_OK(Upload(*this->stream_, at[0].v, ToBytes(start.v, shape.dtype)));
    ASSERT_OK(Upload(*this->stream_, this->AsFloat(at[0].lse), start.lse));
    ASSERT_OK(this->stream_->Fill(at[1].v, std::byte{0xff}));
    ASSERT_OK(exec->Launch(*this->stream_));
    ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> found, Download(*this->stream_, at[kSteps % 2].v));
    EXPECT_EQ(found, expected) << run;
  }
}

// As flashinfer's merge_state_in_place_with_mask test: many masks through one graph.
TYPED_TEST(MergeGraphTest, AMaskThatIsRefilledEachStepDecidesWhichRowsAreMerged) {
  const MergeShape shape = {DType::kFloat16, 4, 64};
  ASSERT_OK_AND_ASSIGN(this->manager_, BufferManager::Create(*this->device_));
  const std::vector<uint8_t> ones(kMaxRows, 1);
  ASSERT_OK_AND_ASSIGN(
      const Buffer<uint8_t> mask,
      this->manager_->template Register<uint8_t>(
          {.name = "merge_mask", .role = Role::kRefilled, .kind = Kind::kMask, .axis = Axis::Requests()}, ones));
  ASSERT_OK(this->manager_->Seal());
  const MutableStates first = this->Output(shape, kMaxRows), second = this->Output(shape, kMaxRows);
  this->Capture([&](Stream& stream, const Extent& bucket) {
    return MergeStateInPlace(stream, shape, bucket.requests, first, this->In(second), mask.live, this->reports(bucket));
  });
  this->Poll();  // captures ran over NaN
  std::mt19937_64 random(9);
  for (int step = 0; step < 50; ++step) {
    const Extent bucket = kBuckets[random() % kBuckets.size()];
    const int32_t real = static_cast<int32_t>(random() % (bucket.requests + 1));
    HostStates a = RandomStates(shape, kMaxRows, 2 * step + 1, 0.2), b = RandomStates(shape, kMaxRows, 2 * step, 0.2);
    for (int32_t row = real; row < kMaxRows; ++row) {  // padded rows hold poison that nobody may look at
      for (int32_t head = 0; head < 4; ++head) {
        b.Empty(row, head);
        b.lse_of(row, head) = kInf;
      }
    }
    std::vector<uint8_t> values(real);
    for (uint8_t& value : values) value = random() % 2;
    ASSERT_OK(Upload(*this->stream_, first.v, ToBytes(a.v, shape.dtype)));
    ASSERT_OK(Upload(*this->stream_, this->AsFloat(first.lse), a.lse));
    ASSERT_OK(Upload(*this->stream_, second.v, ToBytes(b.v, shape.dtype)));
    ASSERT_OK(Upload(*this->stream_, this->AsFloat(second.lse), b.lse));
    ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> before, Download(*this->stream_, first.v));
    ASSERT_OK(this->manager_->BeginStep(bucket, {real, real}));
    ASSERT_OK(this->manager_->template Refill<uint8_t>(mask, values));
    ASSERT_OK(this->runner_->Replay(*this->stream_, bucket, {real, real}));
    ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> after, Download(*this->stream_, first.v));
    const HostStates merged = this->Get(shape, kMaxRows, first);
    const size_t row_bytes = after.size() / kMaxRows;
    for (int32_t row = 0; row < kMaxRows; ++row) {
      if (row < real && values[row] != 0) {
        for (int32_t head = 0; head < 4; ++head) {
          EXPECT_EQ(Difference(Merged({{&a, row}, {&b, row}}, head, 64), merged, row, head), "");
        }
      } else {
        EXPECT_TRUE(std::equal(&before[row * row_bytes], &before[0] + (row + 1) * row_bytes, &after[row * row_bytes]));
        for (int32_t head = 0; head < 4; ++head) EXPECT_EQ(merged.lse_of(row, head), a.lse_of(row, head));
      }
    }
    EXPECT_TRUE(this->Poll().empty());
  }
}

TYPED_TEST(MergeGraphTest, PoisonInPaddedRowsDoesNotReachLiveOnes) {
  for (const auto& [heads, rows] : {std::pair{5, kEitherForm[0]}, {5, kEitherForm[1]}, {70, kEitherForm[0]}}) {
    const MergeShape shape = {DType::kBFloat16, heads, 128};
    HostStates a = RandomStates(shape, rows, 1, 0.2), b = RandomStates(shape, rows, 2, 0.2);
    const HostStates clean = this->Merge(a, b);
    for (const float poison : {kNan, 3e38f}) {
      for (int32_t row = 4; row < rows; ++row) {
        std::fill_n(a.v_of(row, 0), heads * 128, poison);
        std::fill_n(b.v_of(row, 0), heads * 128, poison);
        std::fill_n(&a.lse_of(row, 0), heads, poison);
        std::fill_n(&b.lse_of(row, 0), heads, poison);
      }
      const HostStates merged = this->Merge(a, b);
      EXPECT_TRUE(std::equal(merged.v.begin(), merged.v.begin() + int64_t{4} * heads * 128, clean.v.begin()));
      EXPECT_TRUE(std::equal(merged.lse.begin(), merged.lse.begin() + 4 * heads, clean.lse.begin()));
    }
  }
}

// --- what is refused ---

TYPED_TEST(MergeGraphTest, WrongArgumentsAreRefusedByName) {
  const MergeShape good = {DType::kFloat16, 4, 64};
  const HostStates host = RandomStates(good, 3, 1);
  const MutableStates a = this->Put(host), b = this->Put(host), out = this->Output(good, 3);
  const auto pair = [&](auto change, absl::StatusCode code, const char* part) {
    MergeShape shape = good;
    int32_t rows = 3;
    States first = this->In(a);
    MutableStates merged = out;
    ReportRing reports = this->reports();
    change(shape, rows, first, merged, reports);
    const absl::Status status = MergeState(*this->stream_, shape, rows, first, this->In(b), merged, reports);
    EXPECT_TRUE(HasStatus(status, code, part));
  };
  const auto kInvalid = absl::StatusCode::kInvalidArgument;
  pair([](auto&, auto& rows, auto&, auto&, auto&) { rows = -1; }, kInvalid, "rows is -1");
  pair([](auto& shape, auto&, auto&, auto&, auto&) { shape.heads = 0; }, kInvalid, "heads is 0, must be in [1, 65535]");
  pair([](auto& shape, auto&, auto&, auto&, auto&) { shape.heads = 65536; }, kInvalid, "heads is 65536");
  pair([](auto& shape, auto&, auto&, auto&, auto&) { shape.head_dim = 96; }, absl::StatusCode::kUnimplemented,
       "no kernel for float16 with head_dim 96; there are float32 with head_dim 64");
  pair([](auto&, auto&, auto&, auto&, auto& reports) { reports = {}; }, kInvalid, "reports is empty");
  pair([](auto&, auto& rows, auto&, auto&, auto&) { rows = 4; }, kInvalid,
       "a.v has 768 elements, needs 4 rows of 256, 256 apart");
  pair([](auto&, auto&, auto& first, auto&, auto&) { first.v = {}; }, kInvalid, "a.v has 0 elements");
  pair(
      [](auto&, auto&, auto& first, auto&, auto&) {
        first.v = {nullptr, first.v.size()};
      },
      kInvalid, "a.v must be aligned to 16 bytes and not null");
  pair([](auto&, auto&, auto& first, auto&, auto&) { first.v_stride = 264; }, kInvalid, "3 rows of 256, 264 apart");
  pair([](auto&, auto&, auto& first, auto&, auto&) { first.v_stride = 248; }, kInvalid,
       "a.v_stride is 248, must be 0 or at least heads * head_dim = 256 and a multiple of 8");
  pair([](auto&, auto&, auto& first, auto&, auto&) { first.v_stride = 257; }, kInvalid, "a.v_stride is 257");
  pair([](auto&, auto&, auto& first, auto&, auto&) { first.v_stride = std::numeric_limits<int64_t>::max() - 7; },
       kInvalid, "a.v has 768 elements");
  pair([](auto&, auto&, auto& first, auto&, auto&) { first.lse = first.lse.Sub(0, 11); }, kInvalid,
       "a.lse has 11 elements, needs 3 rows, 4 apart, of 4 heads, 1 apart");
  pair([](auto&, auto&, auto& first, auto&, auto&) { first.lse = {}; }, kInvalid, "a.lse has 0 elements");
  pair([](auto&, auto&, auto& first, auto&, auto&) { first.lse_stride = -4; }, kInvalid, "a.lse_stride is -4");
  pair([](auto&, auto&, auto& first, auto&, auto&) { first.lse_head_stride = std::numeric_limits<int64_t>::max(); },
       kInvalid, "a.lse has 12 elements");
  pair([](auto&, auto&, auto&, auto& merged, auto&) { merged.v = merged.v.Sub(8, merged.v.size() - 8); }, kInvalid,
       "out.v has 764 elements");
  pair([](auto&, auto&, auto&, auto& merged, auto&) { merged.lse_stride = 1; }, kInvalid,
       "out.lse_stride 1 and lse_head_stride 1 put several of 3 rows and 4 heads at one place");
  pair([](auto&, auto&, auto&, auto& merged, auto&) { merged.lse_stride = 1, merged.lse_head_stride = 3; },
       absl::StatusCode::kOk, "");
  pair([](auto&, auto& rows, auto& first, auto& merged, auto&) { rows = 0, first = {}, merged = {}; },
       absl::StatusCode::kOk, "");

  const auto mask = this->template Array<uint8_t>({1, 1});
  EXPECT_STATUS(MergeStateInPlace(*this->stream_, good, 3, a, this->In(b), mask, this->reports()), kInvalidArgument,
                "mask has 2 bytes, must be empty or have one for each of 3 rows");
  MutableStates without_lse = a;
  without_lse.lse = {};
  EXPECT_STATUS(MergeStateInPlace(*this->stream_, good, 3, without_lse, this->In(b), {}, this->reports()),
                kInvalidArgument, "a.lse has 0 elements");

  EXPECT_STATUS(MergeStates(*this->stream_, good, 1, -1, this->In(a), out, this->reports()), kInvalidArgument,
                "states_per_row is -1");
  EXPECT_STATUS(MergeStates(*this->stream_, good, 1, 4, this->In(a), out, this->reports()), kInvalidArgument,
                "states.v has 768 elements, needs 4 rows");
  EXPECT_STATUS(MergeStates(*this->stream_, good, 2147483647, 2147483647, this->In(a), out, this->reports()),
                kInvalidArgument, "states.v has 768 elements");
  EXPECT_OK(MergeStates(*this->stream_, good, 3, 0, {}, out, this->reports()));

  const auto indptr = this->template Array<int32_t>({0, 1, 2});
  EXPECT_STATUS(MergeRaggedStates(*this->stream_, good, 3, indptr, 3, this->In(a), out, this->reports()),
                kInvalidArgument, "indptr has 3 elements, needs rows + 1 = 4");
  EXPECT_STATUS(MergeRaggedStates(*this->stream_, good, 2, indptr, -1, this->In(a), out, this->reports()),
                kInvalidArgument, "num_states is -1");
  EXPECT_STATUS(MergeRaggedStates(*this->stream_, good, 2, indptr, 4, this->In(a), out, this->reports()),
                kInvalidArgument, "states.v has 768 elements, needs 4 rows");
  EXPECT_OK(this->stream_->Synchronize());
}

}  // namespace
}  // namespace pristine::testing
