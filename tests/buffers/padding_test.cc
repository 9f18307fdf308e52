// What follows from a buffer's Kind and Axis: the padded tail, the rule for live values, the harmless state.

#include <cstdlib>

#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

constexpr Extent kBucket{4, 8};
using Ints = std::vector<int32_t>;

template <class BackendT>
class PaddingTest : public BufferTest<BackendT> {
 protected:
  // Registers `spec`, captures a graph that copies the buffer, replays `values` with real extent `extent`. Returns what
  // the graph's body saw.
  Ints Place(const BufferSpec& spec, const Ints& original, const Ints& values, const Extent& extent) {
    this->MakeManager();
    buffer_ = this->Register(spec, original);
    CaptureCopy();
    return PlaceAgain(values, extent);
  }
  Ints PlaceAgain(const Ints& values, const Extent& extent) {
    EXPECT_OK(this->manager().BeginStep(kBucket, extent));
    EXPECT_OK(this->Refill(buffer_, values));
    EXPECT_OK(this->Replay(kBucket, extent));
    const Ints seen = this->Read(seen_);
    EXPECT_EQ(this->Read(buffer_), seen);
    return seen;
  }
  void CaptureCopy() {
    const int64_t size = static_cast<int64_t>(buffer_.live.size());
    seen_ = this->EngineMemory(Ints(buffer_.live.size(), -77));
    this->Capture({kBucket}, [this, size](Stream& stream, const Extent&) {
      return Launch(stream, kCopyInts, CopyIntsParams{seen_.address(), buffer_.live.address(), size});
    });
  }
  // The replay was neutralised for exactly this reason.
  void ExpectInvariant(int64_t index, int64_t expected, int64_t actual) {
    const std::vector<Violation> found = this->Poll();
    ASSERT_EQ(found.size(), 1u) << Describe(found);
    EXPECT_EQ(found[0].kind, Violation::Kind::kInvariant);
    EXPECT_STREQ(found[0].buffer, "buffer");
    EXPECT_EQ(found[0].index, index);
    EXPECT_EQ(found[0].expected, expected);
    EXPECT_EQ(found[0].actual, actual);
    EXPECT_EQ(found[0].bucket, kBucket);
  }
  void ExpectTrapRecorded() {
    FlightRecord record;
    ASSERT_EQ(this->manager().FlightRecords(absl::MakeSpan(&record, 1)), 1u);
    EXPECT_EQ(record.status, FlightRecord::Status::kTrapped);
    EXPECT_EQ(record.violation, Violation::Kind::kInvariant);
    EXPECT_EQ(record.extent, (Extent{2, 2}));
  }
  static BufferSpec Refilled(Kind kind, Axis axis, int32_t limit = 100) {
    BufferSpec spec = Spec("buffer", Role::kRefilled, kind, axis);
    spec.limit = limit;
    return spec;
  }
  Buffer<int32_t> buffer_;
  DeviceSpan<int32_t> seen_;
};
TYPED_TEST_SUITE(PaddingTest, AllBackends, BackendNames);

TYPED_TEST(PaddingTest, AnIndptrsTailRepeatsItsOwnLastRealValue) {
  const auto spec = this->Refilled(Kind::kIndptr, Axis::RequestsPlusOne());
  EXPECT_EQ(this->Place(spec, {0, 10, 20, 30, 40, 50, 60}, {0, 3, 7}, {2, 2}), (Ints{0, 3, 7, 7, 7, 50, 60}))
      << "elements past the bucket keep what they held";
  EXPECT_EQ(this->PlaceAgain({0}, {0, 0}), (Ints{0, 0, 0, 0, 0, 50, 60}));
  EXPECT_EQ(this->PlaceAgain({0, 1, 2, 3, 100}, {4, 4}), (Ints{0, 1, 2, 3, 100, 50, 60}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(PaddingTest, GroupsCountAsRequestsOfTheirOwn) {
  const auto spec = this->Refilled(Kind::kIndptr, Axis::RequestsPlusOne(2));
  EXPECT_EQ(this->Place(spec, {0, 1, 2, 3, 4, 5, 6, 7, 8}, {0, 5, 9}, {1, 1}), (Ints{0, 5, 9, 9, 9, 9, 9, 9, 9}));
}

TYPED_TEST(PaddingTest, ALengthsTailIsTheMinimumThatTheWrapperBears) {
  auto spec = this->Refilled(Kind::kLength, Axis::Requests());
  spec.contract.min_length = 1;
  EXPECT_EQ(this->Place(spec, {9, 9, 9, 9, 9}, {5, 6}, {2, 2}), (Ints{5, 6, 1, 1, 9}));
}

TYPED_TEST(PaddingTest, APageTablesTailIsTheDummyPage) {
  auto spec = this->Refilled(Kind::kPageTable, Axis::Rows(2));
  spec.dummy = 7;
  EXPECT_EQ(this->Place(spec, {7, 7, 7, 7, 7, 7, 7, 7}, {1, 2, 3, 4}, {2, 2}), (Ints{1, 2, 3, 4, 7, 7, 7, 7}));
}

TYPED_TEST(PaddingTest, PagesTakeAsManyAsGivenAndPadToTheEnd) {
  auto spec = this->Refilled(Kind::kPageTable, Axis::Pages());
  spec.dummy = 3;
  EXPECT_EQ(this->Place(spec, {3, 3, 3, 3, 3, 3}, {1, 2, 9, 4, 5}, {2, 2}), (Ints{1, 2, 9, 4, 5, 3}));
  EXPECT_EQ(this->PlaceAgain({8}, {1, 1}), (Ints{8, 3, 3, 3, 3, 3}));
  EXPECT_EQ(this->PlaceAgain({}, {0, 0}), (Ints{3, 3, 3, 3, 3, 3}));
}

TYPED_TEST(PaddingTest, ASlotsTailIsMinusOne) {
  const auto spec = this->Refilled(Kind::kSlot, Axis::Tokens());
  EXPECT_EQ(this->Place(spec, Ints(9, -1), {4, -1, 6}, {2, 3}), (Ints{4, -1, 6, -1, -1, -1, -1, -1, -1}));
}

TYPED_TEST(PaddingTest, ASlotsTailIsTheDummyWhereMinusOneIsNotBorne) {
  auto spec = this->Refilled(Kind::kSlot, Axis::Requests());
  spec.contract.negative_ok = false;
  spec.dummy = 99;
  EXPECT_EQ(this->Place(spec, Ints(4, 99), {4}, {1, 1}), (Ints{4, 99, 99, 99}));
  EXPECT_EQ(this->PlaceAgain({-1}, {1, 1}), (Ints{99, 99, 99, 99}));
  this->ExpectInvariant(0, 0, -1);
}

TYPED_TEST(PaddingTest, PositionsAndOpaqueBytesPadWithZero) {
  EXPECT_EQ(this->Place(this->Refilled(Kind::kPosition, Axis::Tokens()), Ints(8, 9), {4, 5}, {2, 2}),
            (Ints{4, 5, 0, 0, 0, 0, 0, 0}));
  this->runner_.reset();
  EXPECT_EQ(this->Place(this->Refilled(Kind::kOpaque, Axis::Requests()), Ints(5, 9), {-4, 5}, {2, 2}),
            (Ints{-4, 5, 0, 0, 9}));
}

TYPED_TEST(PaddingTest, AWrapperThatReadsTheTailGetsItPaddedToTheEnd) {
  auto spec = this->Refilled(Kind::kIndptr, Axis::RequestsPlusOne());
  spec.contract.reads_tail = true;
  EXPECT_EQ(this->Place(spec, {0, 10, 20, 30, 40, 50, 60}, {0, 3, 7}, {2, 2}), (Ints{0, 3, 7, 7, 7, 7, 7}));
}

TYPED_TEST(PaddingTest, AMaskPadsWithZeroBytes) {
  this->MakeManager();
  const auto mask = this->template Register<uint8_t>(Spec("mask", Role::kRefilled, Kind::kMask, Axis::Requests(3)),
                                                     std::vector<uint8_t>(14 * 3, 0xEE));
  this->Capture({kBucket}, kEmptyBody);
  ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
  const std::vector<uint8_t> values = {1, 2, 3};
  ASSERT_OK(this->manager().template Refill<uint8_t>(mask, values));
  ASSERT_OK(this->Replay(kBucket, {1, 1}));
  std::vector<uint8_t> expected(14 * 3, 0xEE);
  std::fill(expected.begin(), expected.begin() + 12, 0);
  std::copy(values.begin(), values.end(), expected.begin());
  EXPECT_EQ(this->Read(mask), expected);
}

// --- rules ---

TYPED_TEST(PaddingTest, ADecreasingIndptrIsNeutralisedAndTheNextReplayIsCorrect) {
  const auto spec = this->Refilled(Kind::kIndptr, Axis::RequestsPlusOne());
  EXPECT_EQ(this->Place(spec, {0, 10, 20, 30, 40, 50}, {0, 9, 8, 10}, {3, 3}), (Ints{0, 0, 0, 0, 0, 50}));
  this->ExpectInvariant(2, 9, 8);
  EXPECT_EQ(this->PlaceAgain({0, 8, 9, 10}, {3, 3}), (Ints{0, 8, 9, 10, 10, 50}));
  EXPECT_EQ(Describe(this->Poll()), "");
  EXPECT_EQ(this->manager().stats().neutralised, 1);
  ASSERT_OK(this->device().Synchronize());
  ASSERT_OK(this->device().Allocate(64, "the context is alive"));
}

TYPED_TEST(PaddingTest, AnIndptrStartsAtZeroAndEndsWithinItsLimit) {
  const auto spec = this->Refilled(Kind::kIndptr, Axis::RequestsPlusOne());
  this->Place(spec, {0, 10, 20, 30, 40}, {1, 2, 3}, {2, 2});
  this->ExpectInvariant(0, 0, 1);
  this->PlaceAgain({0, 2, 101}, {2, 2});
  this->ExpectInvariant(2, 100, 101);
  this->PlaceAgain({0, 100, 100}, {2, 2});
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(PaddingTest, LengthsAreWithinTheirLimit) {
  auto spec = this->Refilled(Kind::kLength, Axis::Requests());
  spec.contract.min_length = 1;
  EXPECT_EQ(this->Place(spec, {9, 9, 9, 9}, {5, 101, -3, 102}, {4, 4}), (Ints{1, 1, 1, 1}));
  this->ExpectInvariant(1, 100, 101);
  this->PlaceAgain({5, -2}, {2, 2});
  this->ExpectInvariant(1, 1, -2);
  EXPECT_EQ(this->PlaceAgain({1, 100}, {2, 2}), (Ints{1, 100, 1, 1}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(PaddingTest, AWrapperThatNeedsLengthsOfOneNeverGetsZero) {
  auto spec = this->Refilled(Kind::kLength, Axis::Requests());
  spec.contract.min_length = 1;
  EXPECT_EQ(this->Place(spec, {9, 9, 9, 9}, {5, 0}, {2, 2}), (Ints{1, 1, 1, 1}));
  this->ExpectInvariant(1, 1, 0);
  spec.name = "zero";
  EXPECT_STATUS(this->manager().template Register<int32_t>(spec, Ints{4, 0, 4, 4}), kInvalidArgument,
                "original[1] is 0; it must be in [1, 100]");
}

TYPED_TEST(PaddingTest, PagesAndPositionsAreBelowTheirLimit) {
  auto pages = this->Refilled(Kind::kPageTable, Axis::Pages());
  pages.dummy = 2;
  EXPECT_EQ(this->Place(pages, Ints(3, 2), {1, 100}, {1, 1}), (Ints{2, 2, 2}));
  this->ExpectInvariant(1, 99, 100);
  this->runner_.reset();
  EXPECT_EQ(this->Place(this->Refilled(Kind::kPosition, Axis::Tokens()), Ints(8, 1), {99, -1}, {2, 2}), Ints(8, 0));
  this->ExpectInvariant(1, 0, -1);
}

TYPED_TEST(PaddingTest, ASlotIsMinusOneOrBelowItsLimit) {
  EXPECT_EQ(this->Place(this->Refilled(Kind::kSlot, Axis::Requests()), Ints(4, -1), {5, -2}, {2, 2}), Ints(4, -1));
  this->ExpectInvariant(1, -1, -2);
  this->PlaceAgain({100, 5}, {2, 2});
  this->ExpectInvariant(0, 99, 100);
}

TYPED_TEST(PaddingTest, OneBrokenBufferMakesAllOfThemHarmless) {
  this->MakeManager();
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 3));
  const auto indptr =
      this->Register(Spec("indptr", Role::kRestored, Kind::kIndptr, Axis::RequestsPlusOne()), {0, 3, 6, 9, 12});
  const auto slots = this->Register(Spec("slots", Role::kRefilled, Kind::kSlot, Axis::Tokens()), Ints(8, -1));
  const auto work = this->Register(Spec("plan", Role::kRefilled), {7, 7, 7});
  const auto constant = this->Register(Spec("constant", Role::kConstant), {1, 2});
  this->Capture({kBucket}, kEmptyBody);
  ASSERT_OK(this->manager().BeginStep(kBucket, {2, 2}));
  ASSERT_OK(this->Refill(lengths, {1, -1}));
  ASSERT_OK(this->Refill(slots, {5, 6}));
  ASSERT_OK(this->Refill(work, {4, 5, 6}));
  ASSERT_OK(this->Replay(kBucket, {2, 2}));
  EXPECT_EQ(this->Read(lengths), Ints(4, 0));
  EXPECT_EQ(this->Read(indptr), Ints(5, 0));
  EXPECT_EQ(this->Read(slots), Ints(8, -1));
  EXPECT_EQ(this->Read(work), Ints(3, 0));
  EXPECT_EQ(this->Read(constant), (Ints{1, 2}));
  EXPECT_EQ(this->Poll().size(), 1u);
  EXPECT_EQ(this->manager().stats().neutralised, 1);
}

TYPED_TEST(PaddingTest, AViolatedReplayIsHarmlessWhereTheCallerRestoresToo) {
  ManagerOptions options;
  options.restore = ManagerOptions::Restore::kStream;
  this->MakeManager(options);
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 3));
  this->buffer_ =
      this->Register(Spec("indptr", Role::kRestored, Kind::kIndptr, Axis::RequestsPlusOne()), {0, 3, 6, 9, 12});
  this->CaptureCopy();
  for (const int32_t length : {-1, 1}) {
    ASSERT_OK(this->manager().BeginStep(kBucket, {2, 2}));
    ASSERT_OK(this->Refill(lengths, {1, length}));
    ASSERT_OK(this->manager().Restore(*this->stream()));
    ASSERT_OK(this->Replay(kBucket, {2, 2}));
    EXPECT_EQ(this->Read(this->seen_), length < 0 ? Ints(5, 0) : (Ints{0, 3, 6, 9, 12}));
  }
  EXPECT_EQ(this->Poll().size(), 1u);
}

TYPED_TEST(PaddingTest, PolicyRecordReportsAndGoesOn) {
  ManagerOptions options;
  options.on_violation = OnViolation::kRecord;
  this->MakeManager(options);
  this->buffer_ = this->Register(this->Refilled(Kind::kLength, Axis::Requests()), Ints(4, 3));
  this->CaptureCopy();
  EXPECT_EQ(this->PlaceAgain({1, 500}, {2, 2}), (Ints{1, 500, 0, 0}));
  this->ExpectInvariant(1, 100, 500);
  EXPECT_EQ(this->manager().stats().neutralised, 0);
}

TYPED_TEST(PaddingTest, PolicyTrapStopsTheStreamAndTheReportSurvives) {
  ManagerOptions options;
  options.on_violation = OnViolation::kTrap;
  this->MakeManager(options);
  this->buffer_ = this->Register(this->Refilled(Kind::kLength, Axis::Requests()), Ints(4, 3));
  this->Capture({kBucket}, kEmptyBody);
  ASSERT_OK(this->manager().BeginStep(kBucket, {2, 2}));
  ASSERT_OK(this->Refill(this->buffer_, {1, 500}));
  if (this->device().backend() == Backend::kHost) {
    ASSERT_OK(this->runner_->Replay(*this->stream(), kBucket, {2, 2}));
    EXPECT_STATUS(this->stream()->Synchronize(), kAborted, "pristine_prologue");
    this->ExpectInvariant(1, 100, 500);
    this->ExpectTrapRecorded();
    return;
  }
  // A trap is sticky for the context: in a process of its own, which starts afresh and comes here again.
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        EXPECT_OK(this->runner_->Replay(*this->stream(), kBucket, {2, 2}));
        EXPECT_STATUS(this->stream()->Synchronize(), kAborted, "lost");
        EXPECT_FALSE(this->device().Allocate(64, "after the trap").ok()) << "the context is still alive";
        this->ExpectInvariant(1, 100, 500);
        this->ExpectTrapRecorded();
        std::_Exit(::testing::Test::HasFailure() ? 1 : 0);
      },
      ::testing::ExitedWithCode(0), "");
}

// --- what Register refuses ---

TYPED_TEST(PaddingTest, EveryKindsOriginalObeysItsOwnRule) {
  this->MakeManager();
  const auto refuse = [this](Kind kind, const Ints& original, const std::string& part) {
    BufferSpec spec = this->Refilled(kind, Axis::Fixed());
    EXPECT_STATUS(this->manager().template Register<int32_t>(spec, original), kInvalidArgument, part);
  };
  refuse(Kind::kIndptr, {0, 66, 49}, "falls from 66 at 1 to 49 at 2");
  refuse(Kind::kIndptr, {0, 50, 101}, "original[2] is 101; it must be in [0, 100]");
  refuse(Kind::kIndptr, {1, 2}, "original[0] is 1; an indptr starts at 0");
  refuse(Kind::kLength, {5, -1}, "original[1] is -1");
  refuse(Kind::kPageTable, {100}, "original[0] is 100; it must be in [0, 99]");
  refuse(Kind::kSlot, {-2}, "original[0] is -2; it must be in [-1, 99]");
  refuse(Kind::kPosition, {-1}, "original[0] is -1");
  refuse(Kind::kSlot, {-1, 7}, "original[1] is 7; every original of a slot must be -1");
  BufferSpec spec = this->Refilled(Kind::kSlot, Axis::Fixed());
  spec.contract.negative_ok = false;
  spec.dummy = 3;
  EXPECT_STATUS(this->manager().template Register<int32_t>(spec, Ints{3, 4}), kInvalidArgument,
                "original[1] is 4; every original of a slot must be 3");
}

TYPED_TEST(PaddingTest, SpecsThatDoNotFitTogetherAreRefused) {
  this->MakeManager();
  const auto refuse = [this](const BufferSpec& spec, const Ints& original, const std::string& part) {
    EXPECT_STATUS(this->manager().template Register<int32_t>(spec, original), kInvalidArgument, part);
  };
  BufferSpec spec = this->Refilled(Kind::kPageTable, Axis::Fixed());
  spec.dummy = 100;
  refuse(spec, {0}, "dummy is 100");
  spec = this->Refilled(Kind::kLength, Axis::Fixed());
  spec.contract.min_length = 101;
  refuse(spec, {0}, "min_length is 101");
  refuse(this->Refilled(Kind::kSlot, Axis::Fixed(), 0), {0}, "limit is 0; at least 1");
  refuse(this->Refilled(Kind::kLength, Axis::Requests(3)), {0, 0}, "multiple of 3");
  refuse(this->Refilled(Kind::kIndptr, Axis::RequestsPlusOne(2)), {0, 0}, "multiple of 2 and one more");
  refuse(this->Refilled(Kind::kLength, Axis::Requests(0)), {0, 0}, "axis counts 0 elements per unit");
  refuse(this->Refilled(Kind::kLength, Axis::Rows(1 << 16, 1 << 15)), {0, 0}, "it must be in [1, 2^31)");
  refuse(this->Refilled(Kind::kLength, Axis::Rows(-2, -1)), {0, 0}, "axis counts 0 elements per unit");
  refuse(this->Refilled(Kind::kLength, Axis::Fixed()), {}, "no elements");
  spec = this->Refilled(Kind::kLength, Axis::Requests());
  spec.only_bucket = Extent{4, 4};
  refuse(spec, {0, 0}, "needs 4");
  spec = this->Refilled(Kind::kLength, Axis::Fixed());
  spec.name = "";
  refuse(spec, {0}, "without a name");
  EXPECT_STATUS(
      this->manager().template Register<float>(this->Refilled(Kind::kLength, Axis::Fixed()), std::vector<float>{1}),
      kInvalidArgument, "needs int32_t");
  spec = this->Refilled(Kind::kLength, Axis::Fixed());
  spec.derived_from = {3};
  EXPECT_STATUS(this->manager().template Register<int32_t>(spec, Ints{1}), kNotFound, "derived_from names 3");
  this->Register(this->Refilled(Kind::kLength, Axis::Fixed()), {1});
  EXPECT_STATUS(this->manager().template Register<int32_t>(this->Refilled(Kind::kLength, Axis::Fixed()), Ints{1}),
                kAlreadyExists, "buffer");
}

TYPED_TEST(PaddingTest, ABucketLargerThanABufferIsRefusedBeforeAnythingRuns) {
  this->MakeManager();
  this->Register(this->Refilled(Kind::kLength, Axis::Requests()), Ints(3, 1));
  bool ran = false;
  RunnerOptions options;
  options.buckets = {kBucket};
  ASSERT_OK_AND_ASSIGN(this->runner_, GraphRunner::Create(options, [&](Stream&, const Extent&) {
                         ran = true;
                         return absl::OkStatus();
                       }));
  ASSERT_OK(this->runner_->AddHook(this->manager()));
  EXPECT_STATUS(this->runner_->CaptureAll(*this->stream()), kOutOfRange,
                "needs 4 elements of buffer buffer, which has 3");
  EXPECT_FALSE(ran);
}

}  // namespace
}  // namespace pristine::testing
