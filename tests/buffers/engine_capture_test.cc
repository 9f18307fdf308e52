// Graphs that the engine captures and launches by itself: the prologue is the first node, and every launch is armed by
// exactly one BeforeReplay. Misuse is found on the device, reported and made harmless.
#include "tests/buffers/buffer_fixture.h"
#include "tests/buffers/engine.h"

namespace pristine::testing {
namespace {

constexpr Extent kBucket{4, 4};
using Ints = std::vector<int32_t>;

template <class BackendT>
class EngineCaptureTest : public BufferTest<BackendT> {
 protected:
  void TearDown() override {
    if (this->stream() != nullptr) this->stream()->Synchronize().IgnoreError();
    launch_ = nullptr;
    BufferTest<BackendT>::TearDown();
  }
  // lengths and slots; the engine's graph copies lengths to `seen_`.
  void CaptureByEngine(ManagerOptions options = {}) {
    this->MakeManager(options);
    lengths_ = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 9));
    restored_ = this->Register(Spec("restored", Role::kRestored), {1, 2});
    ASSERT_OK(this->manager().Seal());
    seen_ = this->EngineMemory(Ints(4, 0));
    ASSERT_OK(EngineBeginCapture(*this->stream()));
    EXPECT_TRUE(this->stream()->capturing());
    EXPECT_OK(this->manager().RecordPrologue(*this->stream(), kBucket));
    EXPECT_OK(Launch(*this->stream(), kCopyInts, CopyIntsParams{seen_.address(), lengths_.live.address(), 4}));
    EXPECT_OK(Launch(*this->stream(), kAddOne, AddOneParams{restored_.live.address(), 2}));
    ASSERT_OK_AND_ASSIGN(launch_, EngineEndCapture(*this->stream()));
  }
  absl::Status Arm(const Ints& lengths) {
    const Extent extent{static_cast<int32_t>(lengths.size()), static_cast<int32_t>(lengths.size())};
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kBucket, extent));
    PRISTINE_RETURN_IF_ERROR(this->Refill(lengths_, lengths));
    return this->manager().BeforeReplay(*this->stream(), kBucket, extent);
  }
  Ints Run() {
    EXPECT_OK(launch_(*this->stream()));
    return this->Read(seen_);
  }
  void ExpectOne(Violation::Kind kind, int64_t expected, int64_t actual) {
    const std::vector<Violation> found = this->Poll();
    ASSERT_EQ(found.size(), 1u) << Describe(found);
    EXPECT_EQ(found[0].kind, kind) << Describe(found);
    EXPECT_EQ(found[0].expected, expected);
    EXPECT_EQ(found[0].actual, actual);
    EXPECT_EQ(found[0].bucket, kBucket);
  }
  Buffer<int32_t> lengths_, restored_;
  DeviceSpan<int32_t> seen_;
  EngineLaunch launch_;
};
TYPED_TEST_SUITE(EngineCaptureTest, AllBackends, BackendNames);

TYPED_TEST(EngineCaptureTest, OneBeforeReplayPerLaunchWorks) {
  this->CaptureByEngine();
  for (int step = 1; step <= 10; ++step) {
    ASSERT_OK(this->Arm({step, step + 1}));
    EXPECT_EQ(this->Run(), (Ints{step, step + 1, 0, 0}));
    EXPECT_EQ(this->Read(this->restored_), (Ints{2, 3}));
  }
  EXPECT_EQ(Describe(this->Poll()), "");
  EXPECT_EQ(this->manager().stats().replays, 10);
  EXPECT_EQ(this->manager().stats().neutralised, 0);
}

TYPED_TEST(EngineCaptureTest, SeveralArmedLaunchesInFlightEachTakeTheirOwnStep) {
  this->CaptureByEngine();
  const DeviceSpan<int32_t> log = this->EngineMemory(Ints(12, 0));
  for (int step = 0; step < 3; ++step) {
    ASSERT_OK(this->Arm({step + 1}));
    ASSERT_OK(this->launch_(*this->stream()));
    ASSERT_OK(this->stream()->Copy(AsWritableBytes(log.Sub(static_cast<size_t>(step) * 4, 4)), AsBytes(this->seen_)));
  }
  EXPECT_EQ(this->Read(log), (Ints{1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(EngineCaptureTest, ALaunchWithoutBeforeReplayIsNeutralisedAndReported) {
  this->CaptureByEngine();
  EXPECT_EQ(this->Run(), Ints(4, 0)) << "the very first one";
  this->ExpectOne(Violation::Kind::kNotArmed, 1, 0);
  ASSERT_OK(this->Arm({5}));
  EXPECT_EQ(this->Run(), (Ints{5, 0, 0, 0}));
  EXPECT_EQ(this->Run(), Ints(4, 0)) << "the step's values must not be used twice";
  this->ExpectOne(Violation::Kind::kNotArmed, 2, 1);
  ASSERT_OK(this->Arm({6}));
  EXPECT_EQ(this->Run(), (Ints{6, 0, 0, 0}));
  EXPECT_EQ(Describe(this->Poll()), "");
  EXPECT_EQ(this->manager().stats().neutralised, 2);
}

TYPED_TEST(EngineCaptureTest, ADoublyArmedLaunchIsNeutralisedAndReported) {
  this->CaptureByEngine();
  ASSERT_OK(this->Arm({5}));
  ASSERT_OK(this->Arm({6}));
  EXPECT_EQ(this->Run(), Ints(4, 0));
  this->ExpectOne(Violation::Kind::kArmedTwice, 1, 2);
  EXPECT_EQ(this->Run(), Ints(4, 0)) << "the second launch has no step of its own left";
  this->ExpectOne(Violation::Kind::kNotArmed, 3, 2);
  ASSERT_OK(this->Arm({7}));
  EXPECT_EQ(this->Run(), (Ints{7, 0, 0, 0}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(EngineCaptureTest, MoreArmsThanSlotsAreFoundToo) {
  ManagerOptions options;
  options.staging_slots = 2;
  this->CaptureByEngine(options);
  for (int step = 1; step <= 5; ++step) {
    ASSERT_OK(this->Arm({step}));
    ASSERT_OK(this->stream()->Synchronize());
  }
  EXPECT_EQ(this->Run(), Ints(4, 0));
  this->ExpectOne(Violation::Kind::kArmedTwice, 1, 5);
  ASSERT_OK(this->Arm({7}));
  EXPECT_EQ(this->Run(), (Ints{7, 0, 0, 0}));
}

TYPED_TEST(EngineCaptureTest, BeforeReplayTwiceForOneStepIsRefused) {
  this->CaptureByEngine();
  ASSERT_OK(this->Arm({5}));
  EXPECT_STATUS(this->manager().BeforeReplay(*this->stream(), kBucket, {1, 1}), kFailedPrecondition, "no step is open");
  EXPECT_EQ(this->Run(), (Ints{5, 0, 0, 0}));
}

TYPED_TEST(EngineCaptureTest, AStepArmedForAnotherBucketIsNeutralisedAndReported) {
  this->CaptureByEngine();
  ASSERT_OK(this->manager().BeginStep({2, 2}, {1, 1}));
  ASSERT_OK(this->Refill(this->lengths_, {5}));
  ASSERT_OK(this->manager().BeforeReplay(*this->stream(), {2, 2}, {1, 1}));
  EXPECT_EQ(this->Run(), Ints(4, 0));
  this->ExpectOne(Violation::Kind::kWrongBucket, 4, 2);
  // As many requests: the tokens tell.
  ASSERT_OK(this->manager().BeginStep({4, 8}, {1, 1}));
  ASSERT_OK(this->Refill(this->lengths_, {5}));
  ASSERT_OK(this->manager().BeforeReplay(*this->stream(), {4, 8}, {1, 1}));
  EXPECT_EQ(this->Run(), Ints(4, 0));
  const std::vector<Violation> found = this->Poll();
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_NE(found[0].ToString().find("the step is for 8 tokens, the graph for 4"), std::string::npos)
      << Describe(found);
  ASSERT_OK(this->Arm({7}));
  EXPECT_EQ(this->Run(), (Ints{7, 0, 0, 0}));
}

TYPED_TEST(EngineCaptureTest, ThePrologueMustBeTheFirstNode) {
  this->MakeManager();
  const auto restored = this->Register(Spec("restored", Role::kRestored), {1, 2});
  ASSERT_OK(this->manager().Seal());
  ASSERT_OK(EngineBeginCapture(*this->stream()));
  EXPECT_OK(Launch(*this->stream(), kAddOne, AddOneParams{restored.live.address(), 2}));
  EXPECT_STATUS(this->manager().RecordPrologue(*this->stream(), kBucket), kFailedPrecondition, "it must be the first");
  EXPECT_OK(EngineEndCapture(*this->stream()));
}

TYPED_TEST(EngineCaptureTest, BuffersMustBeSealedBeforeTheCaptureBegins) {
  this->MakeManager();
  this->Register(Spec("restored", Role::kRestored), {1, 2});
  ASSERT_OK(EngineBeginCapture(*this->stream()));
  EXPECT_STATUS(this->manager().RecordPrologue(*this->stream(), kBucket), kFailedPrecondition, "call Seal() before");
  EXPECT_STATUS(this->manager().BeforeReplay(*this->stream(), kBucket, kBucket), kFailedPrecondition, "capturing");
  EngineEndCapture(*this->stream()).status().IgnoreError();
}

TYPED_TEST(EngineCaptureTest, AnEagerPrologueServesAnArmedStep) {
  this->MakeManager();
  this->lengths_ = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 9));
  ASSERT_OK(this->manager().Seal());
  ASSERT_OK(this->Arm({3}));
  ASSERT_OK(this->manager().RecordPrologue(*this->stream(), kBucket));
  EXPECT_EQ(this->Read(this->lengths_), (Ints{3, 0, 0, 0}));
  ASSERT_OK(this->manager().RecordPrologue(*this->stream(), kBucket));
  EXPECT_EQ(this->Read(this->lengths_), Ints(4, 0));
  this->ExpectOne(Violation::Kind::kNotArmed, 2, 1);
}

}  // namespace
}  // namespace pristine::testing
