// Steps that travel in the parameters of the prologue's node, in a GraphRunner's graph and in an engine's that is
// attached.
#include <algorithm>
#include <numeric>

#include "tests/buffers/buffer_fixture.h"
#include "tests/buffers/engine.h"

namespace pristine::testing {
namespace {

constexpr Extent kBucket{4, 4};
using Ints = std::vector<int32_t>;

// Launches by itself what the runner would launch.
class ExecFinder final : public GraphHook {
 public:
  GraphExec* exec = nullptr;
  absl::Status BeforeCapture(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  absl::Status RecordPrologue(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  void AfterCapture(const RunInfo& info, const absl::Status&) override { exec = info.exec; }
  absl::Status BeforeReplay(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  void AfterReplay(Stream&, const RunInfo&, const absl::Status&) override {}
};

template <class BackendT>
class ParametersTest : public BufferTest<BackendT> {
 protected:
  void TearDown() override {
    if (this->stream() != nullptr) this->stream()->Synchronize().IgnoreError();
    if (attached_) {
      EXPECT_OK(this->manager().DetachExec(kBucket));
    }
    launch_ = nullptr;
    handles_ = {};
    BufferTest<BackendT>::TearDown();
  }
  // `pages`, up to 5000 of them; the engine's graph copies them to `seen_`.
  void CaptureByEngine(ManagerOptions options = {}) {
    this->MakeManager(options);
    BufferSpec spec = Spec("pages", Role::kRefilled, Kind::kPageTable, Axis::Pages());
    spec.limit = 100000;
    pages_ = this->Register(spec, Ints(5000, 0));
    ASSERT_OK(this->manager().Seal());
    seen_ = this->EngineMemory(Ints(5000, 0));
    Record();
  }
  void Record() {
    ASSERT_OK(EngineBeginCapture(*this->stream()));
    EXPECT_OK(this->manager().RecordPrologue(*this->stream(), kBucket));
    EXPECT_OK(Launch(*this->stream(), kCopyInts, CopyIntsParams{seen_.address(), pages_.live.address(), 5000}));
    ASSERT_OK_AND_ASSIGN(launch_, EngineEndCapture(*this->stream(), &handles_));
  }
  absl::Status Attach() {
    const absl::Status status = this->manager().AttachExec(kBucket, handles_.graph, handles_.exec);
    attached_ |= status.ok();
    return status;
  }
  absl::Status Detach() {
    attached_ = false;
    return this->manager().DetachExec(kBucket);
  }
  absl::Status Arm(const Ints& values) {
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kBucket, {1, 1}));
    PRISTINE_RETURN_IF_ERROR(this->Refill(pages_, values));
    return this->manager().BeforeReplay(*this->stream(), kBucket, {1, 1});
  }
  void ExpectStep(size_t size, int32_t value) {
    SCOPED_TRACE(size);
    ASSERT_OK(Arm(Ints(size, value)));
    ASSERT_OK(launch_(*this->stream()));
    Ints expected(5000, 0);
    std::fill_n(expected.begin(), size, value);
    EXPECT_EQ(this->Read(seen_), expected);
    EXPECT_EQ(Describe(this->Poll()), "");
  }
  Buffer<int32_t> pages_;
  DeviceSpan<int32_t> seen_;
  EngineLaunch launch_;
  EngineHandles handles_;
  bool attached_ = false;
};
TYPED_TEST_SUITE(ParametersTest, AllBackends, BackendNames);

TYPED_TEST(ParametersTest, AnAttachedExecTakesStepsOfEverySize) {
  this->CaptureByEngine();
  ASSERT_OK(this->Attach());
  int32_t value = 1;
  for (const size_t size : {1, 3000, 100, 2048, 2049, 0, 5000, 7}) this->ExpectStep(size, value++);
  ASSERT_OK(this->Detach());
  for (const size_t size : {4, 3000, 9}) this->ExpectStep(size, value++);  // through slots again
  ASSERT_OK(this->Attach());
  for (const size_t size : {6, 3000}) this->ExpectStep(size, value++);
}

TYPED_TEST(ParametersTest, StepsOfAnAttachedExecInFlightKeepTheirOwnParameters) {
  this->CaptureByEngine();
  ASSERT_OK(this->Attach());
  constexpr int kSteps = 3;
  const DeviceSpan<int32_t> log = this->EngineMemory(Ints(kSteps * 4, 0));
  for (int step = 0; step < kSteps; ++step) {
    ASSERT_OK(this->Arm(Ints(static_cast<size_t>(step) + 1, step + 1)));
    ASSERT_OK(this->launch_(*this->stream()));
    ASSERT_OK(this->stream()->Copy(AsWritableBytes(log.Sub(static_cast<size_t>(step) * 4, 4)),
                                   AsBytes(this->seen_.Sub(0, 4))));
  }
  EXPECT_EQ(this->Read(log), (Ints{1, 0, 0, 0, 2, 2, 0, 0, 3, 3, 3, 0}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

// The update puts the captured parameters back: the step after it must not depend on what was set before.
TYPED_TEST(ParametersTest, AfterAnExecUpdateTheParametersAreSetAgain) {
  this->CaptureByEngine();
  ASSERT_OK(this->Attach());
  this->ExpectStep(5, 1);
  ASSERT_OK(EngineUpdateExec(this->device(), this->handles_));
  this->ExpectStep(5, 2);
  ASSERT_OK(EngineUpdateExec(this->device(), this->handles_));
  this->ExpectStep(3000, 3);
  ASSERT_OK(EngineUpdateExec(this->device(), this->handles_));
  this->ExpectStep(3000, 4);
}

TYPED_TEST(ParametersTest, AttachAndDetachRefuseWhatDoesNotFit) {
  this->CaptureByEngine();
  BufferManager& manager = this->manager();
  const EngineHandles& handles = this->handles_;
  EXPECT_EQ(manager.AttachExec(kBucket, nullptr, handles.exec).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(manager.AttachExec(kBucket, handles.graph, nullptr).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(manager.AttachExec({2, 2}, handles.graph, handles.exec).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(manager.DetachExec(kBucket).code(), absl::StatusCode::kNotFound);
  ASSERT_OK(this->Attach());
  EXPECT_EQ(manager.AttachExec(kBucket, handles.graph, handles.exec).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(manager.RecordPrologue(*this->stream(), kBucket).code(), absl::StatusCode::kFailedPrecondition);
  this->ExpectStep(3, 3);
  ASSERT_OK(this->Detach());
  // A graph without the prologue.
  ASSERT_OK(EngineBeginCapture(*this->stream()));
  EXPECT_OK(Launch(*this->stream(), kAddOne, AddOneParams{this->seen_.address(), 1}));
  EngineHandles other;
  ASSERT_OK_AND_ASSIGN(EngineLaunch launch, EngineEndCapture(*this->stream(), &other));
  EXPECT_EQ(manager.AttachExec(kBucket, other.graph, other.exec).code(), absl::StatusCode::kNotFound);
  launch = nullptr;
  other = {};
  this->ExpectStep(4, 4);
}

TYPED_TEST(ParametersTest, AStepAllocatesNoDeviceMemoryAndAGraphChangesItsSizeOfParameters) {
  this->MakeManager();
  BufferSpec spec = Spec("pages", Role::kRefilled, Kind::kPageTable, Axis::Pages());
  spec.limit = 1000;
  const auto pages = this->Register(spec, Ints(2048, 0));
  this->Capture({kBucket}, kEmptyBody);
  for (int step = 0; step < 300; ++step) {
    const int size = step < 5 ? step * 500 : step < 150 ? 100 : step < 160 ? 2048 : 200 + step % 7;
    ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
    ASSERT_OK(this->Refill(pages, Ints(static_cast<size_t>(size), step)));
    ASSERT_OK(this->Replay(kBucket, {1, 1}));
    if (step % 10 > 1 && step > 5) continue;
    Ints expected(2048, 0);
    std::fill_n(expected.begin(), size, step);
    EXPECT_EQ(this->Read(pages), expected) << "step " << step;
  }
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(ParametersTest, EveryBadValueIsFoundWhereverItLies) {
  this->MakeManager();
  BufferSpec pages_spec = Spec("pages", Role::kRefilled, Kind::kPageTable, Axis::Pages());
  pages_spec.limit = 100;
  const auto pages = this->Register(pages_spec, Ints(1600, 0));
  BufferSpec indptr_spec = Spec("indptr", Role::kRefilled, Kind::kIndptr, Axis::RequestsPlusOne());
  indptr_spec.limit = 100;
  const auto indptr = this->Register(indptr_spec, {0, 1, 2, 3, 4});
  this->Capture({kBucket}, kEmptyBody);
  const auto step = [&](const Ints& page_values, const Ints& indptr_values) -> std::string {
    EXPECT_OK(this->manager().BeginStep(kBucket, kBucket));
    EXPECT_OK(this->Refill(pages, page_values));
    EXPECT_OK(this->Refill(indptr, indptr_values));
    EXPECT_OK(this->Replay(kBucket, kBucket));
    EXPECT_OK(this->stream()->Synchronize());
    const std::vector<Violation> found = this->Poll();
    std::string text;
    for (const Violation& violation : found) {
      EXPECT_EQ(violation.kind, Violation::Kind::kInvariant);
      text += std::string(violation.buffer) + "[" + std::to_string(violation.index) + "]";
    }
    return text;
  };
  const Ints good = {0, 0, 2, 2, 5};
  for (const int at : {0, 1, 3, 4, 127, 128, 511, 1000, 1599}) {
    Ints values(1600, 1);
    values[static_cast<size_t>(at)] = 100;
    EXPECT_EQ(step(values, good), "pages[" + std::to_string(at) + "]");
    EXPECT_EQ(this->Read(pages), Ints(1600, 0)) << "made harmless";
  }
  Ints two(1600, 1);
  two[900] = two[40] = -1;
  EXPECT_EQ(step(two, good), "pages[40]");
  EXPECT_EQ(step({}, {1, 1, 2, 2, 5}), "indptr[0]");
  EXPECT_EQ(step({}, {-1, 1, 2, 2, 5}), "indptr[0]");
  EXPECT_EQ(step({}, {0, 1, 2, 1, 5}), "indptr[3]");
  EXPECT_EQ(step({}, {0, 1, 2, 3, 2}), "indptr[4]");
  EXPECT_EQ(step({}, {0, 1, 2, 3, 101}), "indptr[4]");
  EXPECT_EQ(step({}, {0, 0, 0, 100, 100}), "");
  EXPECT_EQ(step(Ints(1600, 99), good), "");
}

TYPED_TEST(ParametersTest, AnUnarmedLaunchAfterABadStepReportsOnlyThatItWasNotArmed) {
  this->MakeManager();
  BufferSpec spec = Spec("pages", Role::kRefilled, Kind::kPageTable, Axis::Pages());
  spec.limit = 10;
  const auto pages = this->Register(spec, Ints(8, 0));
  ExecFinder finder;
  RunnerOptions options;
  options.buckets = {kBucket};
  ASSERT_OK_AND_ASSIGN(this->runner_, GraphRunner::Create(options, kEmptyBody));
  ASSERT_OK(this->runner_->AddHook(this->manager()));
  ASSERT_OK(this->runner_->AddHook(finder));
  ASSERT_OK(this->runner_->CaptureAll(*this->stream()));
  ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
  ASSERT_OK(this->Refill(pages, {3, 10}));
  ASSERT_OK(this->Replay(kBucket, {1, 1}));
  ASSERT_OK(this->stream()->Synchronize());
  std::vector<Violation> found = this->Poll();
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_EQ(found[0].kind, Violation::Kind::kInvariant);
  ASSERT_NE(finder.exec, nullptr);
  ASSERT_OK(finder.exec->Launch(*this->stream()));
  ASSERT_OK(this->stream()->Synchronize());
  found = this->Poll();
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_EQ(found[0].kind, Violation::Kind::kNotArmed);
  ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
  ASSERT_OK(this->Refill(pages, {3, 4}));
  ASSERT_OK(this->Replay(kBucket, {1, 1}));
  EXPECT_EQ(this->Read(pages), (Ints{3, 4, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(ParametersTest, AGraphDoesNotJudgeValuesOfABufferThatItDoesNotCover) {
  this->MakeManager();
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 9));
  this->Capture({{2, 2}, kBucket}, kEmptyBody);
  BufferSpec spec = Spec("late", Role::kRefilled, Kind::kPageTable, Axis::Pages());
  spec.limit = 100;
  const auto late = this->Register(spec, Ints(4, 0));
  ASSERT_OK(this->runner_->Recapture(*this->stream(), {2, 2}));
  ASSERT_OK(this->manager().BeginStep(kBucket, {2, 2}));
  ASSERT_OK(this->Refill(lengths, {5, 6}));
  ASSERT_OK(this->Refill(late, {101}));
  ASSERT_OK(this->Replay(kBucket, {2, 2}));  // captured before `late` was registered
  EXPECT_EQ(this->Read(lengths), (Ints{5, 6, 0, 0}));
  EXPECT_EQ(Describe(this->Poll()), "");
  ASSERT_OK(this->manager().BeginStep({2, 2}, {1, 1}));
  ASSERT_OK(this->Refill(lengths, {7}));
  ASSERT_OK(this->Refill(late, {99}));
  ASSERT_OK(this->Replay({2, 2}, {1, 1}));
  EXPECT_EQ(this->Read(late)[0], 99);
  EXPECT_EQ(Describe(this->Poll()), "");
  EXPECT_EQ(this->manager().stats().neutralised, 0);
}

TYPED_TEST(ParametersTest, TwoRunnersOfOneNameAreRefused) {
  this->MakeManager();
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 9));
  this->Capture({kBucket}, kEmptyBody);
  RunnerOptions options;
  options.buckets = {kBucket};
  ASSERT_OK_AND_ASSIGN(auto second, GraphRunner::Create(options, kEmptyBody));
  ASSERT_OK(second->AddHook(this->manager()));
  ASSERT_OK(second->CaptureAll(*this->stream()));
  ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
  ASSERT_OK(this->Refill(lengths, {5}));
  const absl::Status first = this->Replay(kBucket, {1, 1});
  EXPECT_EQ(first.code(), absl::StatusCode::kFailedPrecondition) << first;
  ASSERT_OK(second->Replay(*this->stream(), kBucket, {1, 1}));  // the step is still open
  EXPECT_EQ(this->Read(lengths)[0], 5);
  EXPECT_EQ(Describe(this->Poll()), "");
  second.reset();
}

}  // namespace
}  // namespace pristine::testing
