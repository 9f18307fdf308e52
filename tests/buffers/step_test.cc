// A step is refused, before anything is launched, unless it is complete: naming the buffer and both numbers.
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "pristine/graph_runtime/graph.h"
#include "tests/buffers/append_kernel.h"
#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

constexpr Extent kSmall{4, 4};
constexpr Extent kLarge{8, 8};
using Ints = std::vector<int32_t>;

template <class BackendT>
class StepTest : public BufferTest<BackendT> {
 protected:
  // lengths and a plan made from them, captured for both buckets.
  void MakeTwo() {
    this->MakeManager();
    lengths_ = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(8, 1));
    BufferSpec plan = Spec("plan", Role::kRefilled);
    plan.derived_from = {lengths_.id};
    plan_ = this->Register(plan, {1, 2, 3});
    this->Capture({kSmall, kLarge}, kEmptyBody);
  }
  Buffer<int32_t> lengths_, plan_;
};
TYPED_TEST_SUITE(StepTest, AllBackends, BackendNames);

TYPED_TEST(StepTest, AMissingRefillIsRefusedAndCanBeMended) {
  this->MakeTwo();
  ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
  ASSERT_OK(this->Refill(this->lengths_, {5}));
  ASSERT_OK(this->Refill(this->plan_, {6, 6, 6}));
  ASSERT_OK(this->Replay(kSmall, {1, 1}));
  ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
  ASSERT_OK(this->Refill(this->lengths_, {7}));
  EXPECT_STATUS(this->Replay(kSmall, {1, 1}), kFailedPrecondition,
                "buffer plan was last refilled in step 1 (generation 1); this is step 2: Refill or Keep it");
  EXPECT_EQ(this->Read(this->lengths_)[0], 5) << "nothing was launched";
  ASSERT_OK(this->Refill(this->plan_, {7, 7, 7}));
  ASSERT_OK(this->Replay(kSmall, {1, 1}));
  EXPECT_EQ(this->Read(this->lengths_)[0], 7);
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(StepTest, AStalePlanIsRefusedWithBothGenerations) {
  this->MakeTwo();
  ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
  ASSERT_OK(this->Refill(this->lengths_, {5}));
  ASSERT_OK(this->Refill(this->plan_, {6, 6, 6}));
  ASSERT_OK(this->Refill(this->lengths_, {6}));
  EXPECT_STATUS(this->Replay(kSmall, {1, 1}), kFailedPrecondition,
                "buffer plan was made from lengths generation 1, which is now 2");
  ASSERT_OK(this->Refill(this->plan_, {7, 7, 7}));
  ASSERT_OK(this->Replay(kSmall, {1, 1}));
  EXPECT_EQ(this->manager().generation(this->lengths_.id), 2);
  EXPECT_EQ(this->manager().generation(this->plan_.id), 2);
  // A kept plan is as stale as it was.
  ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
  ASSERT_OK(this->Refill(this->lengths_, {7}));
  ASSERT_OK(this->manager().Keep(this->plan_));
  EXPECT_STATUS(this->Replay(kSmall, {1, 1}), kFailedPrecondition, "lengths generation 2, which is now 3");
}

TYPED_TEST(StepTest, KeepSendsTheLastValuesAgainAndStalesNothing) {
  this->MakeTwo();
  ASSERT_OK(this->manager().BeginStep(kSmall, {2, 2}));
  EXPECT_STATUS(this->manager().Keep(this->lengths_), kFailedPrecondition, "never refilled");
  ASSERT_OK(this->Refill(this->lengths_, {5, 6}));
  ASSERT_OK(this->Refill(this->plan_, {6, 6, 6}));
  ASSERT_OK(this->Replay(kSmall, {2, 2}));
  // Larger bucket, same extent: the tail must be padded further.
  this->Overwrite(AsWritableBytes(this->lengths_.live).address(), std::byte{99});
  ASSERT_OK(this->manager().BeginStep(kLarge, {2, 2}));
  ASSERT_OK(this->manager().Keep(this->lengths_));
  ASSERT_OK(this->manager().Keep(this->plan_));
  ASSERT_OK(this->Replay(kLarge, {2, 2}));
  EXPECT_EQ(this->Read(this->lengths_), (Ints{5, 6, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(this->manager().generation(this->lengths_.id), 2);
  ASSERT_OK(this->manager().BeginStep(kLarge, {3, 3}));
  EXPECT_STATUS(this->manager().Keep(this->lengths_), kFailedPrecondition, "{2 requests, 2 tokens}");
}

TYPED_TEST(StepTest, AStepForAnotherBucketOrExtentIsRefusedNamingBoth) {
  this->MakeTwo();
  ASSERT_OK(this->manager().BeginStep(kSmall, {2, 2}));
  ASSERT_OK(this->Refill(this->lengths_, {5, 6}));
  ASSERT_OK(this->Refill(this->plan_, {6, 6, 6}));
  EXPECT_STATUS(
      this->Replay(kLarge, {2, 2}), kFailedPrecondition,
      "replay of bucket {8 requests, 8 tokens} with extent {2 requests, 2 tokens}, but the open step 1 is for "
      "bucket {4 requests, 4 tokens}");
  EXPECT_STATUS(this->Replay(kSmall, {1, 1}), kFailedPrecondition, "with extent {1 requests, 1 tokens}, but");
  ASSERT_OK(this->Replay(kSmall, {2, 2}));
  EXPECT_STATUS(this->Replay(kSmall, {2, 2}), kFailedPrecondition, "no step is open");
}

TYPED_TEST(StepTest, BadStepsAndRefillsAreRefused) {
  this->MakeTwo();
  const auto constant = this->Register(Spec("constant", Role::kConstant), {1});
  EXPECT_STATUS(this->Refill(this->lengths_, {1}), kFailedPrecondition, "no step is open");
  EXPECT_STATUS(this->manager().BeginStep(kSmall, kLarge), kOutOfRange, "does not fit in bucket");
  EXPECT_STATUS(this->manager().BeginStep(kSmall, {-1, 0}), kInvalidArgument, "-1 requests");
  EXPECT_STATUS(this->manager().BeginStep({0, 0}, {0, 0}), kInvalidArgument, "buckets at least 1");
  ASSERT_OK(this->manager().BeginStep(kSmall, {2, 2}));
  EXPECT_STATUS(this->Refill(this->lengths_, {1}), kInvalidArgument, "refill of lengths with 1 elements");
  EXPECT_STATUS(this->Refill(this->lengths_, Ints(9, 1)), kOutOfRange, "the buffer holds 8");
  EXPECT_STATUS(this->Refill(constant, {1}), kInvalidArgument, "buffer constant is constant");
  EXPECT_STATUS(this->Refill({77, {}}, {1}), kInvalidArgument, "there is no buffer 77");
  EXPECT_STATUS(this->Refill({-1, {}}, {1}), kInvalidArgument, "there is no buffer -1");
  const std::vector<int64_t> wide = {1, 2};
  EXPECT_STATUS(this->manager().template Refill<int64_t>({this->lengths_.id, {}}, wide), kInvalidArgument,
                "elements of 4 bytes");
  EXPECT_EQ(this->manager().generation(77), -1);
  EXPECT_STREQ(this->manager().name(77), "");
}

TYPED_TEST(StepTest, NothingSealedNoStep) {
  this->MakeManager();
  this->Register(Spec("lengths", Role::kRefilled), {1});
  EXPECT_FALSE(this->manager().sealed());
  EXPECT_STATUS(this->manager().BeginStep(kSmall, {1, 1}), kFailedPrecondition, "nothing is sealed yet");
  ASSERT_OK(this->manager().Seal());
  EXPECT_TRUE(this->manager().sealed());
  EXPECT_OK(this->manager().BeginStep(kSmall, {1, 1}));
}

TYPED_TEST(StepTest, OptionsOutOfRangeAreRefused) {
  EXPECT_STATUS(BufferManager::Create(this->device(), {.staging_slots = 1}), kInvalidArgument, "staging_slots is 1");
  EXPECT_STATUS(BufferManager::Create(this->device(), {.sample_every = 0}), kInvalidArgument, "sample_every is 0");
}

TYPED_TEST(StepTest, ASecondRefillInAStepReplacesTheFirst) {
  this->MakeManager();
  BufferSpec spec = Spec("pages", Role::kRefilled, Kind::kPageTable, Axis::Pages());
  const auto pages = this->Register(spec, Ints(64, 0));
  const auto after = this->Register(Spec("after", Role::kRefilled), {0, 0});
  this->Capture({kSmall}, kEmptyBody);
  for (const size_t second : {size_t{2}, size_t{40}}) {  // fits where the first is; does not
    ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
    ASSERT_OK(this->Refill(pages, Ints(10, 5)));
    ASSERT_OK(this->Refill(after, {8, 9}));
    ASSERT_OK(this->Refill(pages, Ints(second, 6)));
    ASSERT_OK(this->Replay(kSmall, {1, 1}));
    Ints expected(64, 0);
    std::fill(expected.begin(), expected.begin() + static_cast<int64_t>(second), 6);
    EXPECT_EQ(this->Read(pages), expected);
    EXPECT_EQ(this->Read(after), (Ints{8, 9}));
  }
}

TYPED_TEST(StepTest, OnlyItsOwnBucketAsksForAPlansWorkspaceAndTouchesIt) {
  this->MakeManager();
  BufferSpec small = Spec("plan.4", Role::kRefilled), large = Spec("plan.8", Role::kRefilled);
  small.only_bucket = kSmall;
  large.only_bucket = kLarge;
  const auto small_plan = this->Register(small, {1, 1});
  const auto large_plan = this->Register(large, {2, 2});
  this->Capture({kSmall, kLarge}, kEmptyBody);
  ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
  EXPECT_STATUS(this->Refill(large_plan, {9, 9}), kFailedPrecondition,
                "buffer plan.8 belongs to bucket {8 requests, 8 tokens}; the open step is for {4 requests, 4 tokens}");
  ASSERT_OK(this->Refill(small_plan, {3, 3}));
  ASSERT_OK(this->Replay(kSmall, {1, 1}));
  EXPECT_EQ(this->Read(small_plan), (Ints{3, 3}));
  EXPECT_EQ(this->Read(large_plan), (Ints{2, 2}));
}

TYPED_TEST(StepTest, ADroppedStepLeavesNothingBehind) {
  this->MakeTwo();
  ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
  ASSERT_OK(this->Refill(this->lengths_, {5}));
  ASSERT_OK(this->manager().BeginStep(kSmall, {2, 2}));
  ASSERT_OK(this->Refill(this->plan_, {6, 6, 6}));
  EXPECT_STATUS(this->Replay(kSmall, {2, 2}), kFailedPrecondition, "buffer lengths was last refilled in step 1");
  ASSERT_OK(this->Refill(this->lengths_, {1, 2}));
  ASSERT_OK(this->Refill(this->plan_, {6, 6, 6}));
  ASSERT_OK(this->Replay(kSmall, {2, 2}));
  EXPECT_EQ(this->Read(this->lengths_), (Ints{1, 2, 0, 0, 1, 1, 1, 1}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(StepTest, ReplayingANamedBucketWithNothingIsAllPadding) {
  this->MakeTwo();
  ASSERT_OK(this->manager().BeginStep(kSmall, {0, 0}));
  ASSERT_OK(this->Refill(this->lengths_, {}));
  ASSERT_OK(this->Refill(this->plan_, {0, 0, 0}));
  ASSERT_OK(this->Replay(kSmall, {0, 0}));
  EXPECT_EQ(this->Read(this->lengths_), (Ints{0, 0, 0, 0, 1, 1, 1, 1}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(StepTest, ARefusedLaunchDoesNotCountAsArmed) {
  this->MakeManager();
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(8, 1));
  RefusingHook refusing;
  RunnerOptions options;
  options.buckets = {kSmall};
  ASSERT_OK_AND_ASSIGN(this->runner_, GraphRunner::Create(options, kEmptyBody));
  ASSERT_OK(this->runner_->AddHook(this->manager()));
  ASSERT_OK(this->runner_->AddHook(refusing));
  ASSERT_OK(this->runner_->CaptureAll(*this->stream()));
  for (int step = 1; step <= 9; ++step) {
    refusing.refuse = step % 3 != 0;
    ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
    ASSERT_OK(this->Refill(lengths, {step}));
    const absl::Status status = this->Replay(kSmall, {1, 1});
    if (refusing.refuse) {
      EXPECT_STATUS(status, kUnavailable, "not now");
    } else {
      EXPECT_OK(status);
      EXPECT_EQ(this->Read(lengths)[0], step);
    }
    ASSERT_OK(this->stream()->Synchronize());
  }
  EXPECT_EQ(Describe(this->Poll()), "");
  EXPECT_EQ(this->manager().stats().replays, 3);
}

// --- later registrations ---

TYPED_TEST(StepTest, LaterRegistrationsFormNewChunksAndNothingMoves) {
  this->MakeManager();
  const auto first = this->Register(Spec("first", Role::kRestored), {1, 2});
  this->Capture({kSmall, kLarge}, [&](Stream& stream, const Extent&) {
    return Launch(stream, kAddOne, AddOneParams{first.live.address(), 2});
  });
  const int32_t* const live = first.live.address();
  const std::byte* const original = this->manager().original(first.id).address();
  ASSERT_NE(original, nullptr);
  const auto second = this->Register(Spec("second", Role::kRefilled), {3, 4});
  EXPECT_FALSE(this->manager().sealed());
  ASSERT_OK(this->Step(kSmall, {1, 1})) << "a graph asks only for what existed when it was captured";
  ASSERT_OK(this->runner_->Recapture(*this->stream(), kLarge));
  EXPECT_TRUE(this->manager().sealed());
  EXPECT_EQ(first.live.address(), live);
  EXPECT_EQ(this->manager().original(first.id).address(), original);
  ASSERT_OK(this->Step(kSmall, {1, 1}));
  EXPECT_STATUS(this->Step(kLarge, {1, 1}), kFailedPrecondition, "buffer second");
  ASSERT_OK(this->manager().BeginStep(kLarge, {1, 1}));
  ASSERT_OK(this->Refill(second, {7, 8}));
  ASSERT_OK(this->Replay(kLarge, {1, 1}));
  EXPECT_EQ(this->Read(first), (Ints{2, 3}));
  EXPECT_EQ(this->Read(second), (Ints{7, 8}));
  EXPECT_EQ(Describe(this->Poll()), "");
  ASSERT_OK_AND_ASSIGN(const std::vector<Violation> found, this->manager().Verify(*this->stream()));
  EXPECT_EQ(Describe(found), "");
}

TYPED_TEST(StepTest, LateRefilledBuffersShareLateRefillBytes) {
  ManagerOptions options;
  options.late_refill_bytes = 64;
  this->MakeManager(options);
  this->Register(Spec("early", Role::kRefilled), Ints(1000, 1));
  ASSERT_OK(this->manager().Seal());
  const auto late = this->Register(Spec("late", Role::kRefilled), Ints(12, 1));
  EXPECT_STATUS(this->manager().template Register<int32_t>(Spec("too late", Role::kRefilled), Ints(8, 1)),
                kResourceExhausted, "of late_refill_bytes 64 there are 16 left");
  EXPECT_OK(this->manager().template Register<int32_t>(Spec("constant", Role::kConstant), Ints(1000, 1)));
  ASSERT_OK(this->manager().Seal());
  EXPECT_EQ(this->Read(late), Ints(12, 1));
}

TYPED_TEST(StepTest, TooManyChunksAreRefusedAndTheOldOnesWork) {
  this->MakeManager();
  for (int chunk = 0; chunk < 16; ++chunk) {
    this->Register(Spec("buffer " + std::to_string(chunk), Role::kConstant), {chunk});
    ASSERT_OK(this->manager().Seal());
  }
  this->Register(Spec("one more", Role::kConstant), {1});
  EXPECT_STATUS(this->manager().Seal(), kResourceExhausted, "16 times");
  ASSERT_OK_AND_ASSIGN(const std::vector<Violation> found, this->manager().Verify(*this->stream()));
  EXPECT_EQ(Describe(found), "");
}

TYPED_TEST(StepTest, RecapturingMidRunLeavesEveryOtherLiveByteUnchanged) {
  this->MakeManager();
  const auto slots = this->Register(Spec("slots", Role::kRefilled, Kind::kSlot, Axis::Tokens()), Ints(8, -1));
  const auto pool = this->EngineMemory(Ints(256, 0));
  int32_t value = 1;
  this->Capture({kSmall, kLarge}, [&](Stream& stream, const Extent& bucket) {
    return Launch(stream, kAppend, AppendParams{pool.address(), 256, slots.live.address(), bucket.tokens, value});
  });
  EXPECT_EQ(this->Read(pool), Ints(256, 0)) << "warm-ups write nothing: every original slot is -1";
  ASSERT_OK(this->manager().BeginStep(kLarge, {3, 3}));
  ASSERT_OK(this->Refill(slots, {10, 20, 30}));
  ASSERT_OK(this->Replay(kLarge, {3, 3}));
  const Ints before = this->Read(pool);
  EXPECT_EQ(before[10] + before[20] + before[30], 3);
  value = 2;
  ASSERT_OK(this->runner_->Recapture(*this->stream(), kLarge));
  ASSERT_OK(this->runner_->Recapture(*this->stream(), kSmall));
  EXPECT_EQ(this->Read(pool), before);
}

TYPED_TEST(StepTest, ARecaptureThatFailsInItsWarmUpLeavesTheChecksOn) {
  this->MakeManager();
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(8, 1));
  bool fail = false;
  this->Capture({kSmall}, [&](Stream&, const Extent&) {
    return fail ? absl::UnavailableError("no warm-up today") : absl::OkStatus();
  });
  for (int again = 0; again < 2; ++again) {
    fail = true;
    EXPECT_STATUS(this->runner_->Recapture(*this->stream(), kSmall), kUnavailable, "no warm-up today");
    EXPECT_STATUS(this->Step(kSmall, {1, 1}), kFailedPrecondition, "buffer lengths was last refilled");
    fail = false;
    ASSERT_OK(this->runner_->Recapture(*this->stream(), kSmall));
  }
  ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
  ASSERT_OK(this->Refill(lengths, {5}));
  ASSERT_OK(this->Replay(kSmall, {1, 1}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

// --- order and threads ---

TYPED_TEST(StepTest, AnotherStreamIsRefusedWhileARestoreStillRuns) {
  this->MakeManager();
  ASSERT_OK_AND_ASSIGN(const PinnedBuffer flag, this->device().AllocatePinned(sizeof(int), "flag"));
  const auto latch = [&flag] { return std::atomic_ref<int>(*flag.template As<int>().data()); };
  this->Register(Spec("restored", Role::kRestored), {1});
  this->Capture({kSmall}, kEmptyBody);
  ASSERT_OK_AND_ASSIGN(const auto other, this->device().CreateStream());
  for (const bool all : {false, true}) {
    latch().store(0);
    ASSERT_OK(Launch(*this->stream(), kSpin, SpinParams{static_cast<int*>(flag.device_address())}));
    ASSERT_OK(all ? this->manager().RestoreAll(*this->stream(), kSmall) : this->manager().Restore(*this->stream()));
    ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
    const absl::Status refused = this->runner_->Replay(*other, kSmall, {1, 1});
    latch().store(1);
    EXPECT_STATUS(refused, kFailedPrecondition, "still runs on another stream");
    ASSERT_OK(this->stream()->Synchronize());
    EXPECT_OK(this->runner_->Replay(*other, kSmall, {1, 1}));
    ASSERT_OK(other->Synchronize());
  }
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(StepTest, AManagerThatDiesDuringACaptureWaitsForWhatItQueued) {
  this->MakeManager();
  ASSERT_OK_AND_ASSIGN(const PinnedBuffer flag, this->device().AllocatePinned(sizeof(int), "flag"));
  const auto latch = [&flag] { return std::atomic_ref<int>(*flag.template As<int>().data()); };
  this->Register(Spec("restored", Role::kRestored), {1});
  ASSERT_OK(this->manager().Seal());
  ASSERT_OK(Launch(*this->stream(), kSpin, SpinParams{static_cast<int*>(flag.device_address())}));
  ASSERT_OK(this->manager().Restore(*this->stream()));
  ASSERT_OK_AND_ASSIGN(const auto other, this->device().CreateStream());
  std::thread releaser([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    latch().store(1);
  });
  bool released = false;
  pristine::Capture(*other,
                    [&](Stream&) {
                      this->manager_.reset();
                      released = latch().load() == 1;
                      return absl::OkStatus();
                    })
      .status()
      .IgnoreError();
  releaser.join();
  EXPECT_TRUE(released);
}

TYPED_TEST(StepTest, AnotherStreamIsRefusedWhileTheLastReplayStillRuns) {
  this->MakeManager();
  ASSERT_OK_AND_ASSIGN(const PinnedBuffer flag, this->device().AllocatePinned(sizeof(int), "flag"));
  int* const address = static_cast<int*>(flag.device_address());
  this->Register(Spec("constant", Role::kConstant), {1});
  this->Capture(
      {kSmall}, [&](Stream& stream, const Extent&) { return Launch(stream, kSpin, SpinParams{address}); }, 0);
  ASSERT_OK_AND_ASSIGN(const auto other, this->device().CreateStream());
  ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
  ASSERT_OK(this->runner_->Replay(*this->stream(), kSmall, {1, 1}));
  ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
  EXPECT_STATUS(this->runner_->Replay(*other, kSmall, {1, 1}), kFailedPrecondition,
                "step 1 or a restore after it still runs on another stream (the last step that began is");
  std::atomic_ref<int>(*flag.template As<int>().data()).store(1);
  ASSERT_OK(this->stream()->Synchronize());
  EXPECT_OK(this->runner_->Replay(*other, kSmall, {1, 1}));
  ASSERT_OK(other->Synchronize());
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(StepTest, ASecondThreadInsideACallIsRefused) {
  ManagerOptions options;
  options.staging_slots = 2;
  options.parameter_bytes = 0;
  this->MakeManager(options);
  ASSERT_OK_AND_ASSIGN(const PinnedBuffer flag, this->device().AllocatePinned(sizeof(int), "flag"));
  this->Register(Spec("constant", Role::kConstant), {1});
  this->Capture({kSmall}, kEmptyBody);
  ASSERT_OK(Launch(*this->stream(), kSpin, SpinParams{static_cast<int*>(flag.device_address())}));
  for (int step = 0; step < 2; ++step) {
    ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
    ASSERT_OK(this->runner_->Replay(*this->stream(), kSmall, {1, 1}));
  }
  std::thread waiter([&] {  // may itself find this thread inside a call, and tries again
    absl::Status status;
    do {
      status = this->manager().WaitForSlot();
    } while (absl::IsFailedPrecondition(status));
    EXPECT_OK(status);
  });
  absl::Status status = absl::ResourceExhaustedError("");
  while (absl::IsResourceExhausted(status)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    status = this->manager().BeginStep(kSmall, {1, 1});
  }
  EXPECT_STATUS(status, kFailedPrecondition, "another thread is inside a call of this BufferManager");
  std::atomic_ref<int>(*flag.template As<int>().data()).store(1);
  waiter.join();
  EXPECT_OK(this->manager().BeginStep(kSmall, {1, 1}));
}

}  // namespace
}  // namespace pristine::testing
