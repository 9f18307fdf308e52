// What a failed call leaves as it was, one promise per test; injection_test.cc fails every call there is.
#include <memory>
#include <string>
#include <vector>

#include "pristine/attention/step_metadata.h"
#include "tests/buffers/buffer_fixture.h"
#include "tests/buffers/engine.h"
#include "tests/recovery/nth_fault.h"

namespace pristine::testing {
namespace {

constexpr Extent kBucket{4, 4};
using Ints = std::vector<int32_t>;

template <class BackendT>
class TransactionTest : public BufferTest<BackendT> {
 protected:
  void TearDown() override {
    if (this->device_ != nullptr) this->device_->SetFaultInjector(nullptr);
    if (this->stream() != nullptr) this->stream()->Synchronize().IgnoreError();
    launch_ = nullptr;
    BufferTest<BackendT>::TearDown();
  }
  // Runs `call` with the n-th `operation` failing, and expects that very failure.
  template <class Call>
  void ExpectFault(Operation operation, int n, Call call) {
    NthFault fault(operation, n);
    const Injecting injecting(this->device(), &fault);
    const absl::Status status = ToStatus(call());
    EXPECT_TRUE(fault.hit()) << ToString(operation) << " " << n << " was not reached";
    EXPECT_STATUS(status, kUnavailable, fault.Text());
  }
  Buffer<int32_t> RegisterRefilled(const std::string& name, size_t size = 4) {
    return this->Register(Spec(name, Role::kRefilled, Kind::kOpaque, Axis::Requests(static_cast<int32_t>(size) / 4)),
                          Ints(size, 3));
  }
  EngineLaunch launch_;
};
TYPED_TEST_SUITE(TransactionTest, AllBackends, BackendNames);

TYPED_TEST(TransactionTest, AFaultInACaptureFailsItEvenIfTheBodyIgnoresIt) {
  const DeviceSpan<int32_t> ints = this->EngineMemory({0});
  this->ExpectFault(Operation::kLaunch, 2, [&] {
    return Capture(*this->stream(), [&](Stream& stream) {
      for (int i = 0; i < 3; ++i) Launch(stream, kAddOne, {ints.address(), 1}).IgnoreError();
      return absl::OkStatus();
    });
  });
  EXPECT_FALSE(this->stream()->capturing());
  EXPECT_OK(Launch(*this->stream(), kAddOne, {ints.address(), 1}));
  EXPECT_EQ(this->Read(ints), Ints{1});
}

TYPED_TEST(TransactionTest, AFaultInAnEnginesCaptureFailsItToo) {
  const DeviceSpan<int32_t> ints = this->EngineMemory({0});
  ASSERT_OK(EngineBeginCapture(*this->stream()));
  this->ExpectFault(Operation::kLaunch, 1, [&] { return Launch(*this->stream(), kAddOne, {ints.address(), 1}); });
  EXPECT_FALSE(EngineEndCapture(*this->stream()).ok());
  EXPECT_FALSE(this->stream()->capturing());
  EXPECT_OK(Launch(*this->stream(), kAddOne, {ints.address(), 1}));
  EXPECT_EQ(this->Read(ints), Ints{1});
}

TYPED_TEST(TransactionTest, WithoutAnInjectorNobodyIsAsked) {
  NthFault counter;
  { const Injecting injecting(this->device(), &counter); }
  ASSERT_OK(this->stream()->Synchronize());
  for (int i = 0; i < kOperations; ++i) EXPECT_EQ(counter.reached(static_cast<Operation>(i)), 0);
}

TYPED_TEST(TransactionTest, AFailedFirstSealLeavesTheManagerRegistering) {
  ManagerOptions options;
  options.late_refill_bytes = 64;
  this->MakeManager(options);
  this->RegisterRefilled("early");
  for (const Operation operation :
       {Operation::kAllocate, Operation::kWrite, Operation::kSeal, Operation::kLaunch, Operation::kSynchronize}) {
    this->ExpectFault(operation, 1, [&] { return this->manager().Seal(); });
    EXPECT_FALSE(this->manager().sealed());
    EXPECT_STATUS(this->manager().BeginStep(kBucket, {1, 1}), kFailedPrecondition, "nothing is sealed");
  }
  this->RegisterRefilled("large", 400);  // more than late_refill_bytes, and not late
  ASSERT_OK(this->manager().Seal());
  EXPECT_STATUS(this->manager().template Register<int32_t>(Spec("late", Role::kRefilled), Ints(100)),
                kResourceExhausted, "late");
}

TYPED_TEST(TransactionTest, AFailedRecaptureKeepsTheGraphAndWhatItsReplaysNeed) {
  this->MakeManager();
  const Buffer<int32_t> early = this->RegisterRefilled("early");
  const Buffer<int32_t> restored = this->Register(Spec("restored", Role::kRestored), {1, 2});
  this->Capture({kBucket}, [&](Stream& stream, const Extent&) {
    return Launch(stream, kAddOne, {restored.live.address(), 2});
  });
  const Graph* const before = *this->runner_->graph(kBucket);
  const Buffer<int32_t> late = this->RegisterRefilled("late");
  for (const Operation operation :
       {Operation::kInstantiate, Operation::kUpload, Operation::kLaunch, Operation::kCapture, Operation::kCopy}) {
    SCOPED_TRACE(ToString(operation));
    if (operation == Operation::kCopy && this->manager().sealed()) continue;  // only sealing copies
    this->ExpectFault(operation, 1, [&] { return this->runner_->Recapture(*this->stream(), kBucket); });
    ASSERT_OK_AND_ASSIGN(const Graph* const after, this->runner_->graph(kBucket));
    EXPECT_EQ(after, before);
    ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
    ASSERT_OK(this->Refill(early, {7}));
    ASSERT_OK(this->Replay(kBucket, {1, 1})) << "asks for a buffer that its graph does not know";
    EXPECT_EQ(this->Read(restored), (Ints{2, 3}));
    EXPECT_EQ(this->Read(early)[0], 7);
  }
  ASSERT_OK(this->runner_->Recapture(*this->stream(), kBucket));
  ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
  ASSERT_OK(this->Refill(early, {8}));
  EXPECT_STATUS(this->Replay(kBucket, {1, 1}), kFailedPrecondition, "late");
  ASSERT_OK(this->Refill(late, {9}));
  ASSERT_OK(this->Replay(kBucket, {1, 1}));
  EXPECT_EQ(this->Read(late)[0], 9);
  EXPECT_EQ(this->runner_->stats().captures, 2);
}

TYPED_TEST(TransactionTest, AFailedPrologueOfAnEngineKeepsWhatItsOldGraphNeeds) {
  this->MakeManager();
  const Buffer<int32_t> early = this->RegisterRefilled("early");
  ASSERT_OK(this->manager().Seal());
  ASSERT_OK(EngineBeginCapture(*this->stream()));
  EXPECT_OK(this->manager().RecordPrologue(*this->stream(), kBucket));
  ASSERT_OK_AND_ASSIGN(this->launch_, EngineEndCapture(*this->stream()));

  this->RegisterRefilled("late");
  ASSERT_OK(this->manager().Seal());
  ASSERT_OK(EngineBeginCapture(*this->stream()));
  this->ExpectFault(Operation::kLaunch, 1, [&] { return this->manager().RecordPrologue(*this->stream(), kBucket); });
  EXPECT_FALSE(EngineEndCapture(*this->stream()).ok());

  ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
  ASSERT_OK(this->Refill(early, {7}));
  ASSERT_OK(this->manager().BeforeReplay(*this->stream(), kBucket, {1, 1})) << "asks for what the old graph lacks";
  ASSERT_OK(this->launch_(*this->stream()));
  EXPECT_EQ(this->Read(early)[0], 7);
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(TransactionTest, ACaptureThatFailsBeforeItRanAnythingIsNobodysLastWriter) {
  this->MakeManager();
  const Buffer<int32_t> restored = this->Register(Spec("restored", Role::kRestored), {1, 2});
  ASSERT_OK(this->manager().Seal());
  ASSERT_OK_AND_ASSIGN(this->runner_, GraphRunner::Create({.buckets = {kBucket}, .warmups = 0}, kEmptyBody));
  ASSERT_OK(this->runner_->AddHook(this->manager()));
  this->ExpectFault(Operation::kLaunch, 1, [&] { return this->runner_->CaptureAll(*this->stream()); });
  EXPECT_STATUS(this->manager().LastWriter(restored.id, 0), kNotFound, "ran yet");
}

TYPED_TEST(TransactionTest, AVerifyThatFailsTakesNoReports) {
  this->MakeManager();
  BufferSpec spec = Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests());
  spec.limit = 100;
  const Buffer<int32_t> lengths = this->Register(spec, Ints(4, 3));
  this->Capture({kBucket}, kEmptyBody);
  ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
  ASSERT_OK(this->Refill(lengths, {500}));
  ASSERT_OK(this->Replay(kBucket, {1, 1}));
  int points = 0;
  for (bool failed = true; failed; ++points) {
    NthFault fault(Operation::kCopy, points + 1);
    const Injecting injecting(this->device(), &fault);
    const absl::StatusOr<std::vector<Violation>> found = this->manager().Verify(*this->stream());
    failed = !found.ok();
    EXPECT_EQ(failed, fault.hit());
    if (!failed) {
      EXPECT_EQ(found->size(), 1u) << Describe(*found);
    }
  }
  EXPECT_GT(points, 3) << "Verify copies guard bands and originals back";
}

TYPED_TEST(TransactionTest, UnregisterGivesNamesAndMemoryBackUntilTheyAreSealed) {
  this->MakeManager();
  const Buffer<int32_t> kept = this->Register(Spec("kept", Role::kRestored), {1, 2});
  const size_t memory = this->device().live_allocations();
  for (int round = 0; round < 3; ++round) {
    const Buffer<int32_t> a = this->Register(Spec("a", Role::kRestored), {3});
    const Buffer<int32_t> large = this->Register(Spec("large", Role::kRestored), Ints(1 << 20));  // a block of its own
    const Buffer<int32_t> refilled = this->RegisterRefilled("refilled");
    EXPECT_EQ(a.id, 1);
    EXPECT_EQ(this->manager().registered(), 4);
    EXPECT_GT(this->device().live_allocations(), memory);
    ASSERT_OK(this->manager().Unregister(a.id));
    EXPECT_EQ(this->manager().registered(), 1);
    EXPECT_EQ(this->device().live_allocations(), memory);
    EXPECT_EQ(this->manager().generation(refilled.id), -1);
    EXPECT_STREQ(this->manager().name(large.id), "");
  }
  EXPECT_STATUS(this->manager().Unregister(2), kInvalidArgument, "[0, 1]");
  EXPECT_STATUS(this->manager().Unregister(-1), kInvalidArgument, "[0, 1]");
  const Buffer<int32_t> last = this->Register(Spec("a", Role::kRestored), {4});
  ASSERT_OK(this->manager().Seal());
  EXPECT_STATUS(this->manager().Unregister(0), kFailedPrecondition, "kept");
  EXPECT_OK(this->manager().Unregister(2));
  EXPECT_EQ(this->Read(kept), (Ints{1, 2}));
  EXPECT_EQ(this->Read(last), (Ints{4}));
  // The bands are those of what stayed.
  this->Overwrite(AsWritableBytes(last.live).address() + 4, std::byte{0});
  ASSERT_OK_AND_ASSIGN(const std::vector<Violation> found, this->manager().Verify(*this->stream()));
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_STREQ(found[0].buffer, "a");
}

TYPED_TEST(TransactionTest, AfterASealThatFailedLateMemoryThatIsGivenBackHasNoGuardBandInIt) {
  for (const auto& [operation, n] :
       std::vector<std::pair<Operation, int>>{{Operation::kLaunch, 1}, {Operation::kSynchronize, 3}}) {
    SCOPED_TRACE(ToString(operation));
    this->MakeManager();
    const Buffer<int32_t> a = this->Register(Spec("a", Role::kRestored), {3});
    this->Register(Spec("b", Role::kRestored), {3});
    this->ExpectFault(operation, n, [&] { return this->manager().Seal(); });
    ASSERT_OK(this->manager().Unregister(1));
    const Ints values(2000, 7);
    const Buffer<int32_t> c = this->Register(Spec("c", Role::kRestored), values);
    ASSERT_OK(this->manager().Seal());
    ASSERT_OK_AND_ASSIGN(const std::vector<Violation> found, this->manager().Verify(*this->stream()));
    EXPECT_EQ(Describe(found), "");
    EXPECT_EQ(this->Read(a), Ints{3});
    EXPECT_EQ(this->Read(c), values);
    this->manager_ = nullptr;
  }
}

TYPED_TEST(TransactionTest, AWrapperThatFailedHalfWayCanBeMadeAgain) {
  this->MakeManager();
  const attention::StepMetadataConfig config = {
      .max_requests = 4, .max_tokens = 4, .num_pages = 8, .max_step_pages = 8, .max_length = 2};
  for (int n = 1; n <= 5; ++n) {
    this->ExpectFault(Operation::kWatch, n,
                      [&] { return attention::StepMetadata::Create(this->manager(), config).status(); });
    EXPECT_EQ(this->manager().registered(), 0);
  }
  ASSERT_OK(attention::StepMetadata::Create(this->manager(), config));
  EXPECT_EQ(this->manager().registered(), 5);
}

TYPED_TEST(TransactionTest, ASlotWhoseMarkWasRefusedIsWaitedForBeforeItIsUsedAgain) {
  ManagerOptions options;
  options.staging_slots = 2;
  options.parameter_bytes = 0;
  this->MakeManager(options);
  const Buffer<int32_t> values = this->RegisterRefilled("values");
  const DeviceSpan<int32_t> log = this->EngineMemory(Ints(3, 0));
  this->Capture({kBucket}, kEmptyBody);
  const auto step = [&](int32_t value, Operation operation, int n) -> absl::Status {
    NthFault fault(operation, n);
    const Injecting injecting(this->device(), &fault);
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kBucket, {1, 1}));
    PRISTINE_RETURN_IF_ERROR(this->Refill(values, {value}));
    PRISTINE_RETURN_IF_ERROR(this->runner_->Replay(*this->stream(), kBucket, {1, 1}));
    EXPECT_EQ(fault.hit(), n > 0);
    return this->stream()->Copy(AsWritableBytes(log.Sub(static_cast<size_t>(value) - 1, 1)),
                                AsBytes(values.live.Sub(0, 1)));
  };
  ASSERT_OK(step(1, Operation::kEvent, 1)) << "the copy is queued, whatever becomes of its mark";
  ASSERT_OK(step(2, Operation::kEvent, 0));
  EXPECT_STATUS(this->manager().BeginStep(kBucket, {1, 1}), kResourceExhausted, "WaitForSlot");
  ASSERT_OK(this->manager().WaitForSlot());
  ASSERT_OK(step(3, Operation::kEvent, 0));
  EXPECT_EQ(this->Read(log), (Ints{1, 2, 3}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(TransactionTest, AReplayWhoseEndWasNotMarkedKeepsOtherStreamsOut) {
  this->MakeManager();
  this->Register(Spec("restored", Role::kRestored), {1, 2});
  this->Capture({kBucket}, kEmptyBody);
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> other, this->device().CreateStream());
  ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
  {
    NthFault fault(Operation::kEvent, 1);
    const Injecting injecting(this->device(), &fault);
    ASSERT_OK(this->Replay(kBucket, {1, 1}));
    EXPECT_TRUE(fault.hit());
  }
  EXPECT_STATUS(this->manager().Restore(*other), kFailedPrecondition, "could not be marked");
  ASSERT_OK(this->manager().Restore(*this->stream()));
  ASSERT_OK(this->stream()->Synchronize());
  EXPECT_OK(this->manager().Restore(*other));
  ASSERT_OK(other->Synchronize());
}

TYPED_TEST(TransactionTest, AFailedLaunchTakesItsStepBack) {
  for (const int64_t parameter_bytes : {0, 4096}) {
    ManagerOptions options;
    options.parameter_bytes = static_cast<size_t>(parameter_bytes);
    this->MakeManager(options);
    const Buffer<int32_t> values = this->RegisterRefilled("values");
    this->Capture({kBucket}, kEmptyBody);
    ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
    ASSERT_OK(this->Refill(values, {7}));
    this->ExpectFault(Operation::kGraphLaunch, 1, [&] {
      return this->runner_->Replay(*this->stream(), kBucket, {1, 1});
    });
    EXPECT_EQ(this->manager().stats().replays, 0);
    EXPECT_EQ(this->runner_->stats().replays, 0);
    ASSERT_OK(this->manager().WaitForSlot());
    ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
    ASSERT_OK(this->manager().Keep(values)) << "the values are still there";
    ASSERT_OK(this->Replay(kBucket, {1, 1}));
    EXPECT_EQ(this->Read(values)[0], 7);
    EXPECT_EQ(Describe(this->Poll()), "") << "armed twice?";
    this->runner_ = nullptr;
    this->manager_ = nullptr;
  }
}

TYPED_TEST(TransactionTest, AnUploadFollowsTheRulesOfALaunch) {
  const DeviceSpan<int32_t> ints = this->EngineMemory({0});
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, Capture(*this->stream(), [&](Stream& stream) {
                         return Launch(stream, kAddOne, {ints.address(), 1});
                       }));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
  ASSERT_OK(exec->Upload(*this->stream()));
  ASSERT_OK(exec->Upload(*this->stream()));
  EXPECT_EQ(this->Read(ints), Ints{0}) << "an upload runs nothing";
  ASSERT_OK(exec->Launch(*this->stream()));
  EXPECT_EQ(this->Read(ints), Ints{1});
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> host, HostEager::Create());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> elsewhere, host->CreateStream());
  EXPECT_STATUS(exec->Upload(*elsewhere), kInvalidArgument, "another device");
  EXPECT_STATUS(Capture(*this->stream(), [&](Stream& stream) { return exec->Upload(stream); }), kFailedPrecondition,
                "GraphExec::Upload: the stream is capturing");
}

}  // namespace
}  // namespace pristine::testing
