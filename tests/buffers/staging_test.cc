// Steps in flight: each takes its own values, a full ring is refused at once, and the hot path neither waits nor
// allocates.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>

#include "pristine/attention/decode_plan.h"
#include "tests/buffers/buffer_fixture.h"
#include "tests/buffers/engine.h"

namespace {
thread_local int64_t allocations = 0;  // of this thread, by operator new
}  // namespace

// Not inlined: GCC takes a free that it sees and a new that it does not for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  ++allocations;
  void* const address = std::malloc(bytes == 0 ? 1 : bytes);
  if (address == nullptr) std::abort();
  return address;
}
[[gnu::noinline]] void operator delete(void* address) noexcept { std::free(address); }
[[gnu::noinline]] void operator delete(void* address, std::size_t) noexcept { std::free(address); }

namespace pristine::testing {
namespace {

constexpr Extent kBucket{4, 4};
using Ints = std::vector<int32_t>;

template <class BackendT>
class StagingTest : public BufferTest<BackendT> {
 protected:
  void SetUp() override {
    BufferTest<BackendT>::SetUp();
    if (this->IsSkipped() || this->HasFatalFailure()) return;
    ASSERT_OK_AND_ASSIGN(flag_, this->device().AllocatePinned(sizeof(int), "latch"));
  }
  void TearDown() override {
    if (flag_.bytes() > 0) Release();
    if (this->stream() != nullptr) this->stream()->Synchronize().IgnoreError();
    flag_ = PinnedBuffer();
    BufferTest<BackendT>::TearDown();
  }
  // A kernel that blocks the stream until Release.
  void Block() { ASSERT_OK(Launch(*this->stream(), kSpin, SpinParams{static_cast<int*>(flag_.device_address())})); }
  void Release() { std::atomic_ref<int>(*flag_.As<int>().data()).store(1); }

  void MakeSteps(int slots, size_t parameter_bytes) {
    ManagerOptions options;
    options.staging_slots = slots;
    options.parameter_bytes = parameter_bytes;
    this->MakeManager(options);
    lengths_ = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 9));
    log_ = this->EngineMemory(Ints(64, -7));
    this->Capture({kBucket}, kEmptyBody);
  }
  absl::Status QueueStep(int step) {
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kBucket, {1, 1}));
    PRISTINE_RETURN_IF_ERROR(this->Refill(lengths_, {step}));
    PRISTINE_RETURN_IF_ERROR(this->runner_->Replay(*this->stream(), kBucket, {1, 1}));
    return this->stream()->Copy(AsWritableBytes(log_.Sub(static_cast<size_t>(step), 1)),
                                AsBytes(lengths_.live.Sub(0, 1)));
  }
  void ExpectNoAllocations(size_t parameter_bytes) {
    ManagerOptions options;
    options.parameter_bytes = parameter_bytes;
    this->MakeManager(options);
    const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 9));
    BufferSpec plan_spec = Spec("plan", Role::kRefilled);
    plan_spec.derived_from = {lengths.id};
    const auto plan = this->Register(plan_spec, Ints(1000, 1));
    BufferSpec table_spec = Spec("table", Role::kRefilled, Kind::kPageTable, Axis::Rows(100));
    table_spec.deltas = true;
    const auto table = this->Register(table_spec, Ints(400, 1));
    this->Register(Spec("constant", Role::kConstant), {1});
    this->Capture({{2, 2}, kBucket}, kEmptyBody);
    const Ints values(1000, 5);
    // The table's new values: more of them at each step, until they are too many to go as changes.
    Ints pages(200);
    int32_t steps = 0;
    constexpr Extent kReal{2, 2};
    std::vector<Violation> violations(8);
    const auto step = [&](bool keep) -> absl::Status {
      PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kBucket, kReal));
      PRISTINE_RETURN_IF_ERROR(
          keep ? this->manager().Keep(lengths)
               : this->manager().template Refill<int32_t>(lengths, absl::MakeConstSpan(values).first(2)));
      PRISTINE_RETURN_IF_ERROR(keep ? this->manager().Keep(plan)
                                    : this->manager().template Refill<int32_t>(plan, values));
      std::fill(pages.begin(), pages.end(), ++steps);
      const size_t changed = static_cast<size_t>(steps) * 25 % 200;
      PRISTINE_RETURN_IF_ERROR(
          keep ? this->manager().Keep(table)
               : this->manager().template Update<int32_t>(table, 0, absl::MakeConstSpan(pages).first(changed)));
      if (!keep) {
        PRISTINE_RETURN_IF_ERROR(this->manager().MoveRow(table, 1, 0));
      }
      PRISTINE_RETURN_IF_ERROR(this->runner_->Replay(*this->stream(), kBucket, kReal));
      this->manager().Poll(absl::MakeSpan(violations));
      return this->stream()->Synchronize();
    };
    for (int i = 0; i < 3; ++i) ASSERT_OK(step(false));  // queues have grown by now
    const size_t device_allocations = this->device().total_allocations();
    const int64_t before = allocations;
    for (int i = 0; i < 16; ++i) {
      if (!step(i % 2 == 1).ok()) FAIL();
    }
    EXPECT_EQ(allocations - before, 0);
    EXPECT_EQ(this->device().total_allocations(), device_allocations);
  }
  PinnedBuffer flag_;
  Buffer<int32_t> lengths_;
  DeviceSpan<int32_t> log_;
};
TYPED_TEST_SUITE(StagingTest, AllBackends, BackendNames);

TYPED_TEST(StagingTest, EachStepInFlightTakesItsOwnValues) {
  for (const size_t parameter_bytes : {size_t{0}, ManagerOptions::kMaxParameterBytes}) {
    SCOPED_TRACE(parameter_bytes);
    this->MakeSteps(4, parameter_bytes);
    for (int round = 0; round < 3; ++round) {
      std::atomic_ref<int>(*this->flag_.template As<int>().data()).store(0);
      this->Block();
      for (int i = 0; i < 4; ++i) ASSERT_OK(this->QueueStep(round * 4 + i)) << "returned while the kernel blocks";
      this->Release();
      ASSERT_OK(this->stream()->Synchronize());
    }
    const Ints log = this->Read(this->log_);
    for (int step = 0; step < 12; ++step) EXPECT_EQ(log[step], step);
    EXPECT_EQ(Describe(this->Poll()), "");
    this->runner_.reset();
  }
}

TYPED_TEST(StagingTest, TheDepthBoundsStepsInParametersToo) {
  this->MakeSteps(5, ManagerOptions::kMaxParameterBytes);
  this->Block();
  int step = 0;
  for (; step < 5; ++step) ASSERT_OK(this->QueueStep(step));
  EXPECT_EQ(this->QueueStep(step).code(), absl::StatusCode::kResourceExhausted);
  this->Release();
  for (; step < 20; ++step) {
    ASSERT_OK(this->manager().WaitForSlot());
    ASSERT_OK(this->QueueStep(step));
  }
  const Ints log = this->Read(this->log_);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(log[i], i);
  EXPECT_EQ(Describe(this->Poll()), "");
}

// Whether a step travels in parameters or through a slot, what its graph does with it is the same; both kinds may be in
// flight at once, and after a recapture too.
TYPED_TEST(StagingTest, SmallAndLargeStepsTakeTurnsInFlight) {
  constexpr int kSteps = 8;
  constexpr int kSizes[] = {1, 3000, 200, 2049, 2048, 5000, 700, 0};  // 2048 ints just fit in parameters
  ManagerOptions options;
  options.staging_slots = kSteps;
  this->MakeManager(options);
  const auto pages = this->Register(Spec("pages", Role::kRefilled, Kind::kOpaque, Axis::Pages()), Ints(5000, -1));
  const DeviceSpan<int32_t> log = this->EngineMemory(Ints(kSteps * 5000, -7));
  this->Capture({kBucket}, kEmptyBody);
  for (int round = 0; round < 3; ++round) {
    SCOPED_TRACE(round);
    std::atomic_ref<int>(*this->flag_.template As<int>().data()).store(0);
    this->Block();
    for (int step = 0; step < kSteps; ++step) {
      ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
      ASSERT_OK(this->Refill(pages, Ints(kSizes[step], round * 100 + step)));
      ASSERT_OK(this->runner_->Replay(*this->stream(), kBucket, {1, 1}));
      ASSERT_OK(
          this->stream()->Copy(AsWritableBytes(log.Sub(static_cast<size_t>(step) * 5000, 5000)), AsBytes(pages.live)));
    }
    this->Release();
    const Ints seen = this->Read(log);
    for (int step = 0; step < kSteps; ++step) {
      Ints expected(5000, 0);
      std::fill_n(expected.begin(), kSizes[step], round * 100 + step);
      EXPECT_EQ(Ints(seen.begin() + step * 5000, seen.begin() + (step + 1) * 5000), expected) << "step " << step;
    }
    EXPECT_EQ(Describe(this->Poll()), "");
    ASSERT_OK(this->runner_->Recapture(*this->stream(), kBucket));
  }
}

// Launches by itself what the runner would launch.
class Launcher final : public GraphHook {
 public:
  GraphExec* exec = nullptr;
  absl::Status BeforeCapture(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  absl::Status RecordPrologue(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  void AfterCapture(const RunInfo& info, const absl::Status&) override { exec = info.exec; }
  absl::Status BeforeReplay(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  void AfterReplay(Stream&, const RunInfo&, const absl::Status&) override {}
};

TYPED_TEST(StagingTest, ALaunchThatWasNotArmedIsFoundWhereverItsStepCameFrom) {
  for (const size_t parameter_bytes : {size_t{0}, ManagerOptions::kMaxParameterBytes}) {
    SCOPED_TRACE(parameter_bytes);
    ManagerOptions options;
    options.parameter_bytes = parameter_bytes;
    this->MakeManager(options);
    const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 9));
    Launcher launcher;
    RunnerOptions runner;
    runner.buckets = {kBucket};
    ASSERT_OK_AND_ASSIGN(this->runner_, GraphRunner::Create(runner, kEmptyBody));
    ASSERT_OK(this->runner_->AddHook(this->manager()));
    ASSERT_OK(this->runner_->AddHook(launcher));
    ASSERT_OK(this->runner_->CaptureAll(*this->stream()));
    const auto step = [&](int value) {
      ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
      ASSERT_OK(this->Refill(lengths, {value}));
      ASSERT_OK(this->Replay(kBucket, {1, 1}));
      EXPECT_EQ(this->Read(lengths)[0], value);
      EXPECT_EQ(Describe(this->Poll()), "");
    };
    step(5);
    ASSERT_NE(launcher.exec, nullptr);
    ASSERT_OK(launcher.exec->Launch(*this->stream()));
    ASSERT_OK(this->stream()->Synchronize());
    const std::vector<Violation> found = this->Poll();
    ASSERT_EQ(found.size(), 1u) << Describe(found);
    EXPECT_EQ(found[0].kind, Violation::Kind::kNotArmed);
    EXPECT_EQ(this->Read(lengths)[0], 0) << "made harmless";
    step(6);
    // Armed for an engine's launch that never came, then again by the runner.
    ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
    ASSERT_OK(this->Refill(lengths, {7}));
    ASSERT_OK(this->manager().BeforeReplay(*this->stream(), kBucket, {1, 1}));
    ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
    ASSERT_OK(this->Refill(lengths, {8}));
    ASSERT_OK(this->Replay(kBucket, {1, 1}));
    const std::vector<Violation> twice = this->Poll();
    ASSERT_EQ(twice.size(), 1u) << Describe(twice);
    EXPECT_EQ(twice[0].kind, Violation::Kind::kArmedTwice);
    step(9);
    this->runner_.reset();
  }
}

TYPED_TEST(StagingTest, AFullRingIsRefusedAtOnceAndWaitForSlotWaits) {
  this->MakeSteps(2, 0);
  this->Block();
  ASSERT_OK(this->QueueStep(0));
  ASSERT_OK(this->QueueStep(1));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_STATUS(this->manager().BeginStep(kBucket, {1, 1}), kResourceExhausted, "all 2 staging slots are in flight");
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  this->Release();
  ASSERT_OK(this->manager().WaitForSlot());
  ASSERT_OK(this->QueueStep(2));
  const Ints log = this->Read(this->log_);
  EXPECT_EQ((Ints{log[0], log[1], log[2]}), (Ints{0, 1, 2}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(StagingTest, RefillReplayAndPollReturnWhileAKernelBlocks) {
  this->MakeSteps(2, ManagerOptions::kMaxParameterBytes);
  this->Block();
  ASSERT_OK(this->QueueStep(1));
  EXPECT_EQ(this->Poll().size(), 0u);
  this->manager().stats();
  EXPECT_EQ(std::atomic_ref<int>(*this->flag_.template As<int>().data()).load(), 0) << "nothing waited for the latch";
  ASSERT_OK_AND_ASSIGN(const bool idle, this->stream()->IsIdle());
  EXPECT_FALSE(idle);
}

TYPED_TEST(StagingTest, ALargerRefillLaterInAStepAlwaysFits) {
  ManagerOptions options;
  options.late_refill_bytes = 0;
  this->MakeManager(options);
  const auto pages = this->Register(Spec("pages", Role::kRefilled, Kind::kPageTable, Axis::Pages()), Ints(1000, 0));
  const auto more = this->Register(Spec("more", Role::kRefilled, Kind::kPageTable, Axis::Pages()), Ints(1000, 0));
  const auto last = this->Register(Spec("last", Role::kRefilled), Ints(3, 0));
  this->Capture({kBucket}, kEmptyBody);
  ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
  ASSERT_OK(this->Refill(pages, {}));
  ASSERT_OK(this->Refill(more, Ints(900, 1)));
  ASSERT_OK(this->Refill(last, {7, 8, 9}));
  for (const size_t size : {700, 900, 10, 1000}) {
    ASSERT_OK(this->Refill(pages, Ints(size, static_cast<int32_t>(size)))) << size;
    ASSERT_OK(this->Refill(more, Ints(1000, 2)));
  }
  ASSERT_OK(this->Replay(kBucket, {1, 1}));
  EXPECT_EQ(this->Read(pages), Ints(1000, 1000));
  EXPECT_EQ(this->Read(more), Ints(1000, 2));
  EXPECT_EQ(this->Read(last), (Ints{7, 8, 9}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(StagingTest, AStepOfAGraphThatTheEngineLaunchesAllocatesNothing) {
  this->MakeManager();
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 9));
  ASSERT_OK(this->manager().Seal());
  ASSERT_OK(EngineBeginCapture(*this->stream()));
  EXPECT_OK(this->manager().RecordPrologue(*this->stream(), kBucket));
  ASSERT_OK_AND_ASSIGN(EngineLaunch launch, EngineEndCapture(*this->stream()));
  const Ints values = {5, 6};
  const auto step = [&]() -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kBucket, {2, 2}));
    PRISTINE_RETURN_IF_ERROR(this->manager().template Refill<int32_t>(lengths, values));
    PRISTINE_RETURN_IF_ERROR(this->manager().BeforeReplay(*this->stream(), kBucket, {2, 2}));
    PRISTINE_RETURN_IF_ERROR(launch(*this->stream()));
    return this->stream()->Synchronize();
  };
  for (int i = 0; i < 3; ++i) ASSERT_OK(step());
  const size_t device_allocations = this->device().total_allocations();
  const int64_t before = allocations;
  for (int i = 0; i < 6; ++i) {
    if (!step().ok()) FAIL();
  }
  EXPECT_EQ(allocations - before, 0);
  EXPECT_EQ(this->device().total_allocations(), device_allocations);
  launch = nullptr;
}

TYPED_TEST(StagingTest, APlanAllocatesNothing) {
  this->MakeManager();
  attention::DecodePlanConfig config;
  config.buckets = {kBucket};
  config.q_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 64;
  config.max_row_tokens = 1 << 16;
  config.scheduler = attention::DecodeScheduler::kHost;
  ASSERT_OK_AND_ASSIGN(const auto plan, attention::DecodePlan::Create(this->manager(), config));
  this->Capture({kBucket}, kEmptyBody);
  int64_t during = 0;
  for (int i = 0; i < 6; ++i) {
    ASSERT_OK(this->manager().BeginStep(kBucket, kBucket));
    const Ints lengths = {1 + i, 300 * i, 40000, 1 << 16};
    const int64_t before = allocations;
    const absl::Status status = plan->Plan(kBucket, lengths);
    during += allocations - before;
    ASSERT_OK(status);
    ASSERT_OK(this->Replay(kBucket, kBucket));
  }
  EXPECT_EQ(during, 0);
  EXPECT_EQ(Describe(this->Poll()), "");
}

TYPED_TEST(StagingTest, AStepAllocatesNothing) { this->ExpectNoAllocations(ManagerOptions::kMaxParameterBytes); }
TYPED_TEST(StagingTest, AStepThroughASlotAllocatesNothing) { this->ExpectNoAllocations(0); }

}  // namespace
}  // namespace pristine::testing
