// Buffers with deltas when a step does not go through: the device's shadow never misses a change without saying so, and
// what the device did not get goes with the next step that takes the buffer.
#include "buffers/deltas.h"
#include "tests/buffers/deltas_rig.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class DeltasFaultTest : public DeltasRig<BackendT> {};
TYPED_TEST_SUITE(DeltasFaultTest, AllBackends, BackendNames);

TYPED_TEST(DeltasFaultTest, UpdatesOfADroppedStepGoWithTheNext) {
  for (const size_t parameter_bytes : this->kTransports) {
    this->CaptureTable(parameter_bytes);
    ASSERT_OK(this->Begin(kLarge, 4));
    ASSERT_OK(this->Refill(this->table_, Ints(12, 1)));
    ASSERT_OK(this->ReplayOf(kLarge, 4));
    ASSERT_OK(this->Begin(kLarge, 4));
    ASSERT_OK(this->Update(0, {2, 3}));
    ASSERT_OK(this->MoveRow(3, 1));
    ASSERT_OK(this->Begin(kLarge, 4));
    ASSERT_OK(this->Update(11, {4}));
    ASSERT_OK(this->ReplayOf(kLarge, 4));
    EXPECT_EQ(this->Table(), (Ints{2, 3, 1, 1, 1, 1, 1, 1, 1, 9, 9, 4}));
    this->ExpectClean();
    // A whole refill that was dropped counts too.
    ASSERT_OK(this->Begin(kLarge, 4));
    ASSERT_OK(this->Refill(this->table_, Ints(12, 5)));
    ASSERT_OK(this->Begin(kLarge, 4));
    ASSERT_OK(this->Update(0, {6}));
    ASSERT_OK(this->ReplayOf(kLarge, 4));
    EXPECT_EQ(this->Table(), (Ints{6, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5}));
    this->ExpectClean();
    this->runner_.reset();
  }
}

TYPED_TEST(DeltasFaultTest, UpdatesOfARefusedReplayGoWithTheNext) {
  for (const size_t parameter_bytes : this->kTransports) {
    this->MakeTable(parameter_bytes);
    const auto other = this->Register(Spec("other", Role::kRefilled), {1});
    this->Capture({kLarge}, kEmptyBody);
    const auto step = [&](int32_t requests, int64_t at, int32_t value, bool whole) {
      ASSERT_OK(this->Begin(kLarge, requests));
      ASSERT_OK(this->Update(at, {value}));
      if (whole) {
        ASSERT_OK(this->Refill(other, {1}));
        ASSERT_OK(this->ReplayOf(kLarge, requests));
      } else {
        EXPECT_STATUS(this->ReplayOf(kLarge, requests), kFailedPrecondition, "other");
      }
    };
    step(4, 0, 1, true);
    step(4, 11, 2, true);
    step(2, 1, 3, false);
    step(4, 2, 4, true);
    EXPECT_EQ(this->Table(), (Ints{1, 3, 4, 9, 9, 9, 9, 9, 9, 9, 9, 2})) << "the short step never was armed";
    this->ExpectClean();
    this->runner_.reset();
  }
}

// The step was handed over, and its launch refused: the device has none of it.
TYPED_TEST(DeltasFaultTest, ARefusedLaunchSendsTheTableInFullAgain) {
  for (const size_t parameter_bytes : this->kTransports) {
    SCOPED_TRACE(parameter_bytes);
    this->MakeTable(parameter_bytes);
    RefusingHook refusing;
    RunnerOptions options;
    options.buckets = {kLarge};
    ASSERT_OK_AND_ASSIGN(this->runner_, GraphRunner::Create(options, kEmptyBody));
    ASSERT_OK(this->runner_->AddHook(this->manager()));
    ASSERT_OK(this->runner_->AddHook(refusing));
    ASSERT_OK(this->runner_->CaptureAll(*this->stream()));
    const auto step = [&](int32_t requests, int64_t at, int32_t value, bool refuse) {
      ASSERT_OK(this->manager().WaitForSlot());
      ASSERT_OK(this->Begin(kLarge, requests));
      ASSERT_OK(this->Update(at, {value}));
      refusing.refuse = refuse;
      const absl::Status status = this->ReplayOf(kLarge, requests);
      EXPECT_EQ(status.ok(), !refuse) << status;
      ASSERT_OK(this->stream()->Synchronize());
    };
    step(4, 0, 1, false);
    step(4, 11, 2, false);
    step(4, 1, 3, true);
    step(4, 2, 4, false);
    EXPECT_EQ(this->Table(), (Ints{1, 3, 4, 9, 9, 9, 9, 9, 9, 9, 9, 2}));
    this->ExpectClean();
    step(2, 3, 5, true);
    step(4, 4, 6, false);
    EXPECT_EQ(this->Table(), (Ints{1, 3, 4, 5, 6, 9, 9, 9, 9, 9, 9, 9})) << "the short step was armed";
    this->ExpectClean();
    EXPECT_EQ(this->manager().stats().neutralised, 0);
    this->runner_.reset();
  }
}

// The host's side alone: a step that was packed, and could not be handed over.
TEST(DeltasHostTest, AStepThatWasNotHandedOverForgetsNothing) {
  buffers::BufferRecord record;
  record.capacity = 6;
  record.element_bytes = 4;
  record.integers = true;
  record.pad = kDummy;
  buffers::Deltas deltas(record);
  std::vector<std::byte> packed(buffers::Deltas::MostBytes(24));
  const auto step = [&](int64_t count) {
    EXPECT_LE(deltas.Settle(count), packed.size());
    deltas.Pack(packed.data());
    return *reinterpret_cast<const buffers::DeltaHeader*>(packed.data());
  };
  const Ints values = {1, 2, 3, 4, 5, 6};
  deltas.Refill({reinterpret_cast<const std::byte*>(values.data()), 24});
  EXPECT_EQ(step(6).changes, buffers::kAllElements);
  deltas.Sent(1);
  const int32_t changed = 7;
  deltas.Write(5, {reinterpret_cast<const std::byte*>(&changed), 4});
  const buffers::DeltaHeader shorter = step(2);  // and is not sent
  EXPECT_EQ(shorter.changes, 0);
  EXPECT_EQ(shorter.padded_to, 6);
  const buffers::DeltaHeader whole = step(6);
  EXPECT_EQ(whole.base, shorter.base);
  EXPECT_NE(whole.version, shorter.version) << "what became of the other is not known";
  ASSERT_EQ(whole.changes, 1);
  deltas.Sent(2);
  EXPECT_EQ(deltas.FirstDifference(reinterpret_cast<const std::byte*>(Ints{1, 2, 3, 4, 5, 7}.data())),
            buffers::kNoIndex);
  // One that is handed over does.
  step(2);
  deltas.Sent(3);
  EXPECT_EQ(deltas.FirstDifference(reinterpret_cast<const std::byte*>(Ints{1, 2, 9, 9, 9, 9}.data())),
            buffers::kNoIndex);
  EXPECT_TRUE(deltas.known());
  deltas.TakeBack(2);
  EXPECT_TRUE(deltas.known()) << "another step";
  deltas.TakeBack(3);
  EXPECT_FALSE(deltas.known());
  EXPECT_EQ(step(2).changes, buffers::kAllElements);
}

TYPED_TEST(DeltasFaultTest, AGraphThatDoesNotTakeTheTableLeavesItsUpdatesForTheNext) {
  this->MakeManager();
  this->Register(Spec("early", Role::kRestored), {1});
  this->Capture({kSmall, kLarge}, kEmptyBody);
  this->table_ = this->Register(this->TableSpec(), Ints(12, 50));
  ASSERT_OK(this->runner_->Recapture(*this->stream(), kLarge));
  const auto step = [&](const Extent& bucket, int64_t at, int32_t value) {
    ASSERT_OK(this->Begin(bucket, 2));
    ASSERT_OK(this->Update(at, {value}));
    ASSERT_OK(this->ReplayOf(bucket, 2));
  };
  step(kSmall, 0, 1);
  EXPECT_EQ(this->Table(), Ints(12, 50)) << "captured before there was a table";
  step(kLarge, 1, 2);
  EXPECT_EQ(this->Table(), (Ints{1, 2, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9}));
  step(kSmall, 2, 3);
  step(kLarge, 3, 4);
  EXPECT_EQ(this->Table(), (Ints{1, 2, 3, 4, 9, 9, 9, 9, 9, 9, 9, 9}));
  this->ExpectClean();
}

TYPED_TEST(DeltasFaultTest, AMissedUpdateIsReportedAndNeutralisedUntilARefill) {
  this->CaptureByEngine();
  const auto arm = [&](int64_t at, int32_t value) {
    ASSERT_OK(this->Begin(kLarge, 4));
    ASSERT_OK(this->Update(at, {value}));
    ASSERT_OK(this->Arm(4));
  };
  const auto launch = [&] {
    EXPECT_OK(this->launch_(*this->stream()));
    return this->Table();
  };
  arm(0, 1);
  EXPECT_EQ(launch(), (Ints{1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9}));
  arm(1, 2);
  arm(2, 3);  // armed twice: what the first of the two changes is lost
  EXPECT_EQ(launch(), Ints(12, kDummy));
  this->ExpectMissed(2, 1);
  arm(3, 4);
  EXPECT_EQ(launch(), Ints(12, kDummy)) << "no guess: neither the old table nor one with a hole";
  this->ExpectMissed(3, 1);
  EXPECT_NE(this->Verified().find("update missed: table: the step changes version 4, the device holds version 1"),
            std::string::npos);
  ASSERT_OK(this->Begin(kLarge, 4));
  ASSERT_OK(this->manager().Keep(this->table_));
  ASSERT_OK(this->Arm(4));
  EXPECT_EQ(launch(), Ints(12, kDummy)) << "there is nothing right to keep";
  this->ExpectMissed(4, 1);
  ASSERT_OK(this->Begin(kLarge, 4));
  ASSERT_OK(this->Refill(this->table_, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
  ASSERT_OK(this->Arm(4));
  EXPECT_EQ(launch(), (Ints{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
  arm(0, 21);
  EXPECT_EQ(launch(), (Ints{21, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
  this->ExpectClean();
  EXPECT_EQ(this->manager().stats().neutralised, 3);
}

TYPED_TEST(DeltasFaultTest, ALaunchForAnotherBucketMissesTheUpdate) {
  this->CaptureByEngine();
  ASSERT_OK(this->Begin(kLarge, 4));
  ASSERT_OK(this->Refill(this->table_, Ints(12, 1)));
  ASSERT_OK(this->Arm(4));
  ASSERT_OK(this->launch_(*this->stream()));
  ASSERT_OK(this->Begin(kSmall, 2));
  ASSERT_OK(this->Update(0, {2}));
  ASSERT_OK(this->manager().BeforeReplay(*this->stream(), kSmall, {2, 2}));
  ASSERT_OK(this->launch_(*this->stream()));
  ASSERT_OK(this->stream()->Synchronize());
  std::vector<Violation> found = this->Poll();
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_EQ(found[0].kind, Violation::Kind::kWrongBucket);
  ASSERT_OK(this->Begin(kLarge, 4));
  ASSERT_OK(this->Update(11, {3}));
  ASSERT_OK(this->Arm(4));
  ASSERT_OK(this->launch_(*this->stream()));
  EXPECT_EQ(this->Table(), Ints(12, kDummy));
  this->ExpectMissed(2, 1);
}

TYPED_TEST(DeltasFaultTest, UnarmedLaunchesCapturesAndRestoresLeaveTheShadowAlone) {
  this->CaptureByEngine();
  const Ints table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  const auto keep = [&] {
    ASSERT_OK(this->Begin(kLarge, 4));
    ASSERT_OK(this->manager().Keep(this->table_));
    ASSERT_OK(this->Arm(4));
    ASSERT_OK(this->launch_(*this->stream()));
    EXPECT_EQ(this->Table(), table);
    EXPECT_EQ(Describe(this->Poll()), "");
  };
  ASSERT_OK(this->Begin(kLarge, 4));
  ASSERT_OK(this->Refill(this->table_, table));
  ASSERT_OK(this->Arm(4));
  ASSERT_OK(this->launch_(*this->stream()));
  keep();
  ASSERT_OK(this->launch_(*this->stream()));
  EXPECT_EQ(this->Table(), Ints(12, kDummy));
  EXPECT_EQ(this->Poll().size(), 1u) << "not armed";
  keep();
  ASSERT_OK(this->manager().RestoreAll(*this->stream(), kLarge));
  EXPECT_EQ(this->Table(), Ints(12, 50));
  keep();
  ASSERT_OK(this->manager().Restore(*this->stream()));
  keep();
  // Warm-ups and the capture of a runner's graph.
  this->Capture({kLarge}, kEmptyBody, 2);
  EXPECT_EQ(this->Table(), Ints(12, 50));
  keep();
  this->ExpectClean();
}

TYPED_TEST(DeltasFaultTest, AnIllegalValueIsReportedUntilItIsMended) {
  for (const size_t parameter_bytes : this->kTransports) {
    this->CaptureTable(parameter_bytes);
    ASSERT_OK(this->Begin(kLarge, 3));
    ASSERT_OK(this->Refill(this->table_, Ints(9, 1)));
    ASSERT_OK(this->ReplayOf(kLarge, 3));
    const auto expect_invalid = [&](int64_t generation) {
      EXPECT_EQ(this->Table(), Ints(12, kDummy));
      const std::vector<Violation> found = this->Poll();
      ASSERT_EQ(found.size(), 1u) << Describe(found) << generation;
      EXPECT_EQ(found[0].kind, Violation::Kind::kInvariant);
      EXPECT_EQ(found[0].index, 4);
      EXPECT_EQ(found[0].expected, 99);
      EXPECT_EQ(found[0].actual, 100);
    };
    ASSERT_OK(this->Begin(kLarge, 3));
    ASSERT_OK(this->Update(4, {100}));
    ASSERT_OK(this->ReplayOf(kLarge, 3));
    expect_invalid(1);
    ASSERT_OK(this->Begin(kLarge, 3));
    ASSERT_OK(this->Update(0, {2}));
    ASSERT_OK(this->ReplayOf(kLarge, 3));
    expect_invalid(2);
    ASSERT_OK(this->Begin(kLarge, 3));
    ASSERT_OK(this->Update(4, {99}));
    ASSERT_OK(this->ReplayOf(kLarge, 3));
    EXPECT_EQ(this->Table(), (Ints{2, 1, 1, 1, 99, 1, 1, 1, 1, 9, 9, 9}));
    this->ExpectClean();
    this->runner_.reset();
  }
}

TYPED_TEST(DeltasFaultTest, VerifyFindsADamagedShadow) {
  this->CaptureTable();
  ASSERT_OK(this->Begin(kLarge, 2));
  ASSERT_OK(this->Refill(this->table_, {1, 2, 3, 4, 5, 6}));
  ASSERT_OK(this->ReplayOf(kLarge, 2));
  this->ExpectClean();
  const DeviceSpan<const std::byte> shadow = this->manager().shadow(this->table_.id);
  ASSERT_EQ(shadow.size(), 48u);
  this->Overwrite(const_cast<std::byte*>(shadow.address()) + 4 * 4, std::byte{77});
  EXPECT_EQ(this->Verified(), "sealed original changed: table[4] is 77, was 5\n");
  // What changes anyway is not compared, and mends it.
  ASSERT_OK(this->Begin(kLarge, 2));
  ASSERT_OK(this->Update(4, {6}));
  this->ExpectClean();
  ASSERT_OK(this->ReplayOf(kLarge, 2));
  this->ExpectClean();
  EXPECT_EQ(this->Table(), (Ints{1, 2, 3, 4, 6, 6, 9, 9, 9, 9, 9, 9}));
  this->Overwrite(const_cast<std::byte*>(shadow.address()) + 11 * 4, std::byte{77});
  EXPECT_EQ(this->Verified(), "sealed original changed: table[11] is 77, was 9\n") << "padding is promised too";
  // Bytes around it belong to nobody.
  this->Overwrite(const_cast<std::byte*>(shadow.address()) - 1, std::byte{1});
  EXPECT_NE(this->Verified().find("written outside the buffer: table, byte -1"), std::string::npos);
  this->Overwrite(const_cast<std::byte*>(shadow.address()) - 1, std::byte{0xA5});
  EXPECT_TRUE(this->manager().shadow(77).empty());
}

TYPED_TEST(DeltasFaultTest, AKernelThatWritesAShadowIsNamed) {
  if (this->device().backend() != Backend::kHost) GTEST_SKIP() << "only Host watches memory";
  this->MakeTable();
  int32_t* const shadow =
      reinterpret_cast<int32_t*>(const_cast<std::byte*>(this->manager().shadow(this->table_.id).address()));
  this->Capture({kLarge}, [shadow](Stream& stream, const Extent&) {
    return stream.capturing() ? Launch(stream, kSetValueUndeclared, SetValueParams{shadow, 2, 5}) : absl::OkStatus();
  });
  ASSERT_OK(this->Begin(kLarge, 2));
  ASSERT_OK(this->Refill(this->table_, {1, 2, 3, 4, 5, 6}));
  ASSERT_OK(this->ReplayOf(kLarge, 2));
  const std::vector<Violation> found = this->Poll();
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_EQ(found[0].kind, Violation::Kind::kUndeclaredWrite);
  EXPECT_STREQ(found[0].buffer, "table (shadow)");
  EXPECT_STREQ(found[0].node, "set_value_undeclared");
}

}  // namespace
}  // namespace pristine::testing
