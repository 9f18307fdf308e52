// Steps that are prepared while earlier ones run: how many, what a full ring says, what blocks, and that nothing which
// is refilled for one step reaches another. Steps travel in parameters or through slots by their size; both are tried.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <random>
#include <thread>

#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

constexpr Extent kBucket{4, 4};
constexpr Extent kReal{1, 1};
constexpr int kSmall = 8;         // ints that ride in parameters
constexpr int kLarge = 16 << 10;  // ints that need a slot
constexpr int kMostSteps = 512;
constexpr int kGates = 64;
using Ints = std::vector<int32_t>;

template <class BackendT>
class OverlapTest : public BufferTest<BackendT> {
 protected:
  void SetUp() override {
    BufferTest<BackendT>::SetUp();
    if (this->IsSkipped() || this->HasFatalFailure()) return;
    ASSERT_OK_AND_ASSIGN(gates_, this->device().AllocatePinned(kGates * sizeof(int), "gates"));
    log_ = this->EngineMemory(Ints(2 * kMostSteps, -7));
  }
  void TearDown() override {
    if (gates_.bytes() > 0) OpenGates();
    if (this->stream() != nullptr) this->stream()->Synchronize().IgnoreError();
    gates_ = PinnedBuffer();
    BufferTest<BackendT>::TearDown();
  }

  // A graph that reads `values`; with `gate_in_body` its body waits for gate 0.
  void MakeSteps(int slots, bool gate_in_body = false) {
    if (this->stream() != nullptr) this->stream()->Synchronize().IgnoreError();
    this->runner_.reset();
    ManagerOptions options;
    options.staging_slots = slots;
    this->MakeManager(options);
    values_ = this->Register(Spec("values", Role::kRefilled, Kind::kOpaque, Axis::Pages()), Ints(kLarge, -1));
    OpenGates();  // for the warm-up
    this->Capture({kBucket}, [this, gate_in_body](Stream& stream, const Extent&) {
      return gate_in_body ? Launch(stream, kSpin, SpinParams{GateAddress(0)}) : absl::OkStatus();
    });
    for (int& gate : gates_.As<int>()) gate = 0;
    next_gate_ = 0;
  }

  // The stream stops at a gate until OpenGates.
  void CloseGate() {
    ASSERT_LT(next_gate_, kGates);
    ASSERT_OK(Launch(*this->stream(), kSpin, SpinParams{GateAddress(next_gate_++)}));
  }
  void OpenGates() {
    for (int& gate : gates_.As<int>()) std::atomic_ref<int>(gate).store(1);
  }
  bool GatesAreClosed() { return std::atomic_ref<int>(gates_.As<int>()[0]).load() == 0; }

  absl::Status Begin() { return this->manager().BeginStep(kBucket, kReal); }
  absl::Status Fill(int count, int value) { return this->Refill(values_, Ints(static_cast<size_t>(count), value)); }
  // Replays the open step and writes down the first and last value that its graph saw.
  absl::Status Launched(int step, int count) {
    PRISTINE_RETURN_IF_ERROR(this->runner_->Replay(*this->stream(), kBucket, kReal));
    const size_t at = 2 * static_cast<size_t>(step);
    PRISTINE_RETURN_IF_ERROR(this->stream()->Copy(AsWritableBytes(log_.Sub(at, 1)), AsBytes(values_.live.Sub(0, 1))));
    const size_t last = static_cast<size_t>(count) - 1;
    return this->stream()->Copy(AsWritableBytes(log_.Sub(at + 1, 1)), AsBytes(values_.live.Sub(last, 1)));
  }
  absl::Status QueueStep(int step, int count) {
    PRISTINE_RETURN_IF_ERROR(Begin());
    PRISTINE_RETURN_IF_ERROR(Fill(count, step));
    return Launched(step, count);
  }
  void ExpectEachSawItsOwn(int steps) {
    const Ints log = this->Read(log_);
    for (int step = 0; step < steps; ++step) {
      EXPECT_EQ(log[2 * step], step) << "first value of step " << step;
      EXPECT_EQ(log[2 * step + 1], step) << "last value of step " << step;
    }
    EXPECT_EQ(Describe(this->Poll()), "");
  }

  void RunRandomly(uint32_t seed);

  int* GateAddress(int gate) { return static_cast<int*>(gates_.device_address()) + gate; }
  PinnedBuffer gates_;
  int next_gate_ = 0;
  Buffer<int32_t> values_;
  DeviceSpan<int32_t> log_;  // two per step
};
TYPED_TEST_SUITE(OverlapTest, AllBackends, BackendNames);

TYPED_TEST(OverlapTest, ExactlyAsManyStepsWaitAsThereAreSlots) {
  for (const int slots : {2, 3, 4, 7, 64}) {
    SCOPED_TRACE(slots);
    this->MakeSteps(slots);
    this->CloseGate();
    int step = 0;
    for (; step < slots; ++step) ASSERT_OK(this->QueueStep(step, kLarge));
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 100; ++i) EXPECT_STATUS(this->Begin(), kResourceExhausted, "staging slots are in flight");
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
    EXPECT_TRUE(this->GatesAreClosed()) << "refused while nothing moved";
    this->OpenGates();
    for (; step < 2 * slots; ++step) {
      ASSERT_OK(this->manager().WaitForSlot());
      ASSERT_OK(this->QueueStep(step, kLarge));
    }
    this->ExpectEachSawItsOwn(step);
  }
}

TYPED_TEST(OverlapTest, AFullRingFitsBehindAReplayThatRuns) {
  if (this->device().deferred()) GTEST_SKIP() << "what is deferred does not run a graph in part";
  for (const int slots : {2, 5}) {
    SCOPED_TRACE(slots);
    this->MakeSteps(slots, /*gate_in_body=*/true);
    ASSERT_OK(this->QueueStep(0, kLarge));
    int step = 1;
    for (; step < slots; ++step) ASSERT_OK(this->QueueStep(step, kLarge));
    ASSERT_OK(this->manager().WaitForSlot()) << "the first step's values are taken, although its body does not end";
    ASSERT_OK(this->QueueStep(step++, kLarge));
    EXPECT_STATUS(this->Begin(), kResourceExhausted, "staging slots are in flight");
    EXPECT_TRUE(this->GatesAreClosed());
    this->OpenGates();
    this->ExpectEachSawItsOwn(step);
  }
}

TYPED_TEST(OverlapTest, DepthsFrom2To64AreLegalAndNoOthers) {
  for (const int slots : {2, 64}) EXPECT_OK(BufferManager::Create(this->device(), {.staging_slots = slots}));
  for (const int slots : {-1, 0, 1, 65}) {
    EXPECT_STATUS(BufferManager::Create(this->device(), {.staging_slots = slots}), kInvalidArgument, "staging_slots");
  }
}

TYPED_TEST(OverlapTest, WaitForSlotIsTheOnlyCallThatBlocks) {
  for (const int count : {kSmall, kLarge}) {
    SCOPED_TRACE(count);
    this->MakeSteps(2);
    this->CloseGate();
    ASSERT_OK(this->QueueStep(0, count));
    ASSERT_OK(this->Begin());
    ASSERT_OK(this->Fill(count, 1));
    ASSERT_OK(this->manager().template Keep<int32_t>(this->values_));
    ASSERT_OK(this->Launched(1, count));
    EXPECT_STATUS(this->Begin(), kResourceExhausted, "staging slots are in flight");
    EXPECT_STATUS(this->Fill(count, 2), kFailedPrecondition, "no step is open");
    EXPECT_STATUS(this->manager().template Keep<int32_t>(this->values_), kFailedPrecondition, "no step is open");
    EXPECT_STATUS(this->runner_->Replay(*this->stream(), kBucket, kReal), kFailedPrecondition, "no step is open");
    EXPECT_EQ(Describe(this->Poll()), "");
    EXPECT_EQ(this->manager().stats().replays, 2);
    EXPECT_GT(this->manager().generation(this->values_.id), 0);
    EXPECT_TRUE(this->GatesAreClosed()) << "nothing waited for the device";
    ASSERT_OK_AND_ASSIGN(const bool idle, this->stream()->IsIdle());
    EXPECT_FALSE(idle);

    std::thread opens([this] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      this->OpenGates();
    });
    const absl::Status waited = this->manager().WaitForSlot();
    EXPECT_FALSE(this->GatesAreClosed()) << "it did not wait";
    opens.join();
    ASSERT_OK(waited);
    ASSERT_OK(this->QueueStep(2, count));
    this->ExpectEachSawItsOwn(3);
  }
}

TYPED_TEST(OverlapTest, WhatIsRefilledForTheNextStepLeavesTheOneInFlightAlone) {
  for (const int count : {kSmall, kLarge}) {
    SCOPED_TRACE(count);
    this->MakeSteps(2);
    this->CloseGate();
    ASSERT_OK(this->QueueStep(0, count));
    for (int attempt = 0; attempt < 5; ++attempt) {  // dropped each time but the last
      ASSERT_OK(this->Begin());
      ASSERT_OK(this->Fill(count, 100 + attempt));
      ASSERT_OK(this->Fill(kLarge, 200 + attempt));
      ASSERT_OK(this->Fill(count, 1));
      ASSERT_OK(this->manager().template Keep<int32_t>(this->values_));
    }
    EXPECT_TRUE(this->GatesAreClosed());
    this->OpenGates();
    ASSERT_OK(this->stream()->Synchronize());
    ASSERT_OK(this->Launched(1, count));
    this->ExpectEachSawItsOwn(2);
  }
}

TYPED_TEST(OverlapTest, AnOpenStepOutlivesAWait) {
  this->MakeSteps(2);
  ASSERT_OK(this->QueueStep(0, kLarge));
  ASSERT_OK(this->Begin());
  ASSERT_OK(this->Fill(kLarge, 1));
  ASSERT_OK(this->manager().WaitForSlot());
  ASSERT_OK(this->Launched(1, kLarge));
  this->ExpectEachSawItsOwn(2);
}

template <class BackendT>
void OverlapTest<BackendT>::RunRandomly(uint32_t seed) {
  SCOPED_TRACE(seed);
  std::mt19937 engine(seed);
  const auto in = [&engine](int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); };
  constexpr int kSteps = 60;
  const int slots = in(0, 9) == 0 ? 64 : in(2, 8);
  MakeSteps(slots);
  int step = 0;
  int idle_at = 0;    // so many had run when the device was last known to be idle
  int closed_at = 0;  // so many were ahead of the gate
  bool closed = false;
  const auto open_gates = [&] {
    OpenGates();
    for (int gate = next_gate_; gate < kGates; ++gate) gates_.As<int>()[gate] = 0;  // those are not on the stream yet
    closed = false;
  };
  while (step < kSteps) {
    if (!closed && in(0, 9) == 0) {
      CloseGate();
      closed = true;
      closed_at = step;
    }
    if (closed && in(0, 19) == 0) open_gates();
    if (!closed && in(0, 29) == 0) {
      ASSERT_OK(this->stream()->Synchronize());
      idle_at = step;
    }
    const int holder = step - slots;  // the step that must have begun, whether it took a slot or not
    const bool may_wait = holder >= idle_at;
    const absl::Status begun = Begin();
    if (!begun.ok()) {
      EXPECT_STATUS(begun, kResourceExhausted, "staging slots are in flight");
      ASSERT_TRUE(may_wait) << "step " << step << " was refused a slot that nobody can hold";
      open_gates();
      ASSERT_OK(this->manager().WaitForSlot());
      ASSERT_OK(Begin()) << "after WaitForSlot, in step " << step;
    } else {
      ASSERT_FALSE(may_wait && closed && holder >= closed_at) << "step " << step << " was given a slot in use";
    }
    const auto any_count = [&in] { return in(0, 2) == 0 ? in(1, 500) : in(4096, kLarge); };  // parameters take 2048
    int count = any_count();
    for (; in(0, 4) == 0; count = any_count()) ASSERT_OK(Fill(count, -1 - step));
    ASSERT_OK(Fill(count, step));
    if (in(0, 9) == 0) continue;  // dropped: the step begins again
    ASSERT_OK(Launched(step, count));
    ++step;
  }
  OpenGates();
  ExpectEachSawItsOwn(kSteps);
}

TYPED_TEST(OverlapTest, RandomDepthsSizesAndGatesNeverMixSteps) {
  const char* const given = std::getenv("PRISTINE_SEED");
  const uint32_t seed = given != nullptr ? static_cast<uint32_t>(std::strtoul(given, nullptr, 10)) : 20240817;
  std::printf("PRISTINE_SEED=%u\n", seed);
  for (uint32_t i = 0; i < 12 && !this->HasFailure(); ++i) this->RunRandomly(seed + i);
}

}  // namespace
}  // namespace pristine::testing
