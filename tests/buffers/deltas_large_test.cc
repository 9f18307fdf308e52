// Buffers with deltas that take several blocks of the prologue: a tile has its version, and what is wrong in one holds
// for all.
#include <atomic>

#include "tests/buffers/deltas_rig.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class LargeDeltasTest : public DeltasRig<BackendT> {};
TYPED_TEST_SUITE(LargeDeltasTest, AllBackends, BackendNames);

// A table of 128 KB: its updates ride in parameters, a whole refill does not fit there.
TYPED_TEST(LargeDeltasTest, UpdatesOfALargeTableInFlightEachTakeTheirOwn) {
  constexpr int32_t kColumns = 128, kRows = 256;
  constexpr Extent kBatch{kRows, kRows};
  ManagerOptions options;
  options.staging_slots = 32;  // more than are in flight below
  this->MakeManager(options);
  this->table_ = this->Register(this->TableSpec(kColumns), Ints(kColumns * kRows, 50));
  const DeviceSpan<int32_t> log = this->EngineMemory(Ints(20, -1));
  this->Capture({kBatch}, kEmptyBody);
  ASSERT_OK(this->Begin(kBatch, kRows));
  ASSERT_OK(this->Refill(this->table_, Ints(kColumns * kRows, 1)));
  ASSERT_OK(this->ReplayOf(kBatch, kRows));
  ASSERT_OK_AND_ASSIGN(PinnedBuffer flag, this->device().AllocatePinned(sizeof(int), "latch"));
  ASSERT_OK(Launch(*this->stream(), kSpin, SpinParams{static_cast<int*>(flag.device_address())}));
  Ints expected(kColumns * kRows, 1);
  absl::Status status;
  for (int32_t step = 0; step < 20 && status.ok(); ++step) {
    status.Update(this->Begin(kBatch, kRows));
    if (step % 5 == 4) {
      status.Update(this->manager().Keep(this->table_));
    } else {
      std::vector<BufferManager::Range> ranges;
      Ints pages;
      for (int32_t row = 0; row < kRows; ++row) {
        ranges.push_back({row * kColumns + step, 1});
        pages.push_back((row + step) % 100);
        expected[static_cast<size_t>(row * kColumns + step)] = pages.back();
      }
      status.Update(this->manager().template Update<int32_t>(this->table_, ranges, pages));
    }
    status.Update(this->runner_->Replay(*this->stream(), kBatch, kBatch));
    status.Update(this->stream()->Copy(AsWritableBytes(log.Sub(static_cast<size_t>(step), 1)),
                                       AsBytes(this->table_.live.Sub(static_cast<size_t>(7 * kColumns + step), 1))));
  }
  std::atomic_ref<int>(*flag.As<int>().data()).store(1);
  ASSERT_OK(status) << "returned while the kernel blocks";
  ASSERT_OK(this->stream()->Synchronize());
  const Ints seen = this->Read(log);
  for (int32_t step = 0; step < 20; ++step) {
    EXPECT_EQ(seen[static_cast<size_t>(step)], step % 5 == 4 ? 1 : (7 + step) % 100) << step;
  }
  EXPECT_EQ(this->Table(), expected);
  this->ExpectClean();
}

// Several of the kernel's blocks take part: what one of them finds, all must heed.
TYPED_TEST(LargeDeltasTest, WhatIsWrongInOneTileMakesTheWholeTableHarmless) {
  constexpr int32_t kColumns = 5000, kSize = 4 * kColumns;  // 80 KB
  for (const size_t parameter_bytes : this->kTransports) {
    SCOPED_TRACE(parameter_bytes);
    ManagerOptions options;
    options.parameter_bytes = parameter_bytes;
    options.check = ManagerOptions::Check::kOff;
    this->MakeManager(options);
    this->table_ = this->Register(this->TableSpec(kColumns), Ints(kSize, 50));
    const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 1));
    const auto restored =
        this->Register(Spec("restored", Role::kRestored, Kind::kLength, Axis::Requests()), Ints(4, 1));
    this->Capture({kLarge}, kEmptyBody);
    Ints table(kSize, 1);
    const auto step = [&](int64_t at, int32_t value) {
      table[static_cast<size_t>(at)] = value;
      ASSERT_OK(this->Begin(kLarge, 4));
      ASSERT_OK(this->Refill(lengths, Ints(4, 3)));
      ASSERT_OK(this->Update(at, {value}));
      ASSERT_OK(this->ReplayOf(kLarge, 4));
    };
    const auto expect_harmless = [&](int64_t at) {
      EXPECT_EQ(this->Table(), Ints(kSize, kDummy));
      EXPECT_EQ(this->Read(lengths), Ints(4, 0));
      EXPECT_EQ(this->Read(restored), Ints(4, 0));
      const std::vector<Violation> found = this->Poll();
      ASSERT_EQ(found.size(), 1u) << Describe(found);
      EXPECT_EQ(found[0].kind, Violation::Kind::kInvariant);
      EXPECT_EQ(found[0].index, at);
      EXPECT_EQ(found[0].actual, 100);
    };
    ASSERT_OK(this->Begin(kLarge, 4));
    ASSERT_OK(this->Refill(lengths, Ints(4, 3)));
    ASSERT_OK(this->Refill(this->table_, table));
    ASSERT_OK(this->ReplayOf(kLarge, 4));
    EXPECT_EQ(this->Table(), table);
    step(17000, 100);
    expect_harmless(17000);
    step(0, 2);  // a change elsewhere: the value is wrong all the same
    expect_harmless(17000);
    step(17000, 99);
    EXPECT_EQ(this->Table(), table);
    EXPECT_EQ(this->Read(lengths), Ints(4, 3));
    this->ExpectClean();
    this->runner_.reset();
  }
}

TYPED_TEST(LargeDeltasTest, ALargeTableMissesAnUpdateAsAWhole) {
  constexpr int32_t kColumns = 5000, kSize = 4 * kColumns;
  this->MakeManager();
  this->table_ = this->Register(this->TableSpec(kColumns), Ints(kSize, 50));
  this->Capture({kLarge}, kEmptyBody);  // the runner's graph, with an exec of the engine's beside it
  ASSERT_OK(EngineBeginCapture(*this->stream()));
  EXPECT_OK(this->manager().RecordPrologue(*this->stream(), kLarge));
  ASSERT_OK_AND_ASSIGN(this->launch_, EngineEndCapture(*this->stream()));
  const auto begin = [&](int64_t at) {
    ASSERT_OK(this->Begin(kLarge, 4));
    ASSERT_OK(this->Update(at, {1}));
  };
  begin(0);
  ASSERT_OK(this->ReplayOf(kLarge, 4));
  begin(19999);
  ASSERT_OK(this->Arm(4));  // and is never launched
  begin(9000);
  ASSERT_OK(this->ReplayOf(kLarge, 4));
  EXPECT_EQ(this->Table(), Ints(kSize, kDummy));
  this->ExpectMissed(2, 1);
  ASSERT_OK(this->Begin(kLarge, 4));
  ASSERT_OK(this->Refill(this->table_, Ints(kSize, 3)));
  ASSERT_OK(this->ReplayOf(kLarge, 4));
  EXPECT_EQ(this->Table(), Ints(kSize, 3));
  this->ExpectClean();
}

}  // namespace
}  // namespace pristine::testing
