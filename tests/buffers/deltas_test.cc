// Buffers with deltas: a step sends what changed, and the graph sees the whole table. The device's shadow never misses
// a change without saying so.
#include "buffers/deltas.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <random>

#include "tests/buffers/buffer_fixture.h"
#include "tests/buffers/engine.h"

namespace pristine::testing {
namespace {

constexpr Extent kSmall{2, 2};
constexpr Extent kLarge{4, 4};
constexpr int32_t kDummy = 9;
using Ints = std::vector<int32_t>;

template <class BackendT>
class DeltasTest : public BufferTest<BackendT> {
 protected:
  static constexpr size_t kTransports[] = {0, ManagerOptions::kMaxParameterBytes};

  void TearDown() override {
    if (this->stream() != nullptr) this->stream()->Synchronize().IgnoreError();
    launch_ = nullptr;
    BufferTest<BackendT>::TearDown();
  }
  static BufferSpec TableSpec(int32_t columns = 3) {
    BufferSpec spec = Spec("table", Role::kRefilled, Kind::kPageTable, Axis::Rows(columns));
    spec.limit = 100;
    spec.dummy = kDummy;
    spec.deltas = true;
    return spec;
  }
  // A table of 4 rows of 3.
  void MakeTable(size_t parameter_bytes = ManagerOptions::kMaxParameterBytes) {
    ManagerOptions options;
    options.parameter_bytes = parameter_bytes;
    this->MakeManager(options);
    table_ = this->Register(TableSpec(), Ints(12, 50));
  }
  void CaptureTable(size_t parameter_bytes = ManagerOptions::kMaxParameterBytes) {
    MakeTable(parameter_bytes);
    this->Capture({kSmall, kLarge}, kEmptyBody);
  }
  // The engine's own graph of kLarge.
  void CaptureByEngine() {
    MakeTable();
    ASSERT_OK(this->manager().Seal());
    ASSERT_OK(EngineBeginCapture(*this->stream()));
    EXPECT_OK(this->manager().RecordPrologue(*this->stream(), kLarge));
    ASSERT_OK_AND_ASSIGN(launch_, EngineEndCapture(*this->stream()));
  }
  absl::Status Update(int64_t first, const Ints& values) {
    return this->manager().template Update<int32_t>(table_, first, values);
  }
  absl::Status MoveRow(int64_t from, int64_t to) { return this->manager().MoveRow(table_, from, to); }
  absl::Status Begin(const Extent& bucket, int32_t requests) {
    return this->manager().BeginStep(bucket, {requests, requests});
  }
  absl::Status ReplayOf(const Extent& bucket, int32_t requests) { return this->Replay(bucket, {requests, requests}); }
  absl::Status Arm(int32_t requests) {
    return this->manager().BeforeReplay(*this->stream(), kLarge, {requests, requests});
  }
  Ints Table() { return this->Read(table_); }
  std::string Verified() {
    absl::StatusOr<std::vector<Violation>> found = this->manager().Verify(*this->stream());
    EXPECT_OK(found);
    return found.ok() ? Describe(*found) : "";
  }
  void ExpectClean() { EXPECT_EQ(Verified(), ""); }
  void ExpectMissed(int64_t expected, int64_t actual) {
    const std::vector<Violation> found = this->Poll();
    ASSERT_EQ(std::count_if(found.begin(), found.end(),
                            [](const Violation& v) { return v.kind == Violation::Kind::kMissedUpdate; }),
              1)
        << Describe(found);
    const Violation& missed = found.back();
    ASSERT_EQ(missed.kind, Violation::Kind::kMissedUpdate) << Describe(found);
    EXPECT_STREQ(missed.buffer, "table");
    EXPECT_EQ(missed.expected, expected);
    EXPECT_EQ(missed.actual, actual);
  }
  Buffer<int32_t> table_;
  EngineLaunch launch_;
};
TYPED_TEST_SUITE(DeltasTest, AllBackends, BackendNames);

TYPED_TEST(DeltasTest, AStepSendsWhatChangedAndTheGraphSeesTheWholeTable) {
  for (const size_t parameter_bytes : this->kTransports) {
    SCOPED_TRACE(parameter_bytes);
    this->CaptureTable(parameter_bytes);
    ASSERT_OK(this->Begin(kSmall, 2));
    ASSERT_OK(this->Refill(this->table_, {1, 2, 3, 4, 5, 6}));
    ASSERT_OK(this->ReplayOf(kSmall, 2));
    EXPECT_EQ(this->Table(), (Ints{1, 2, 3, 4, 5, 6, 50, 50, 50, 50, 50, 50})) << "beyond the bucket: the original";
    ASSERT_OK(this->Begin(kLarge, 3));
    ASSERT_OK(this->Update(6, {7, 8}));
    ASSERT_OK(this->Update(2, {33}));
    ASSERT_OK(this->ReplayOf(kLarge, 3));
    EXPECT_EQ(this->Table(), (Ints{1, 2, 33, 4, 5, 6, 7, 8, 9, 9, 9, 9}));
    // What the graph, or anyone, did to the live buffer is of no account.
    this->Overwrite(AsWritableBytes(this->table_.live).address(), std::byte{77});
    ASSERT_OK(this->Begin(kLarge, 3));
    ASSERT_OK(this->manager().Keep(this->table_));
    ASSERT_OK(this->ReplayOf(kLarge, 3));
    EXPECT_EQ(this->Table(), (Ints{1, 2, 33, 4, 5, 6, 7, 8, 9, 9, 9, 9}));
    // The first request is done: the last one takes its row.
    ASSERT_OK(this->Begin(kSmall, 2));
    ASSERT_OK(this->MoveRow(2, 0));
    ASSERT_OK(this->ReplayOf(kSmall, 2));
    EXPECT_EQ(this->Table(), (Ints{7, 8, 9, 4, 5, 6, 7, 8, 9, 9, 9, 9})) << "the third row is not this bucket's";
    this->ExpectClean();
    EXPECT_EQ(this->manager().stats().neutralised, 0);
    this->runner_.reset();
  }
}

TYPED_TEST(DeltasTest, RangesAreWrittenInOrder) {
  this->CaptureTable();
  const std::vector<BufferManager::Range> ranges = {{0, 2}, {5, 0}, {1, 3}, {8, 1}};
  const Ints values = {1, 2, 3, 4, 5, 6};
  ASSERT_OK(this->Begin(kLarge, 3));
  ASSERT_OK(this->manager().template Update<int32_t>(this->table_, ranges, values));
  ASSERT_OK(this->ReplayOf(kLarge, 3));
  EXPECT_EQ(this->Table(), (Ints{1, 3, 4, 5, 9, 9, 9, 9, 6, 9, 9, 9})) << "never given: padding";
  ASSERT_OK(this->Begin(kLarge, 3));
  ASSERT_OK(this->manager().template Update<int32_t>(this->table_, {}, {}));
  ASSERT_OK(this->ReplayOf(kLarge, 3));
  EXPECT_EQ(this->Table(), (Ints{1, 3, 4, 5, 9, 9, 9, 9, 6, 9, 9, 9})) << "no range, no change";
  // Moves read what the calls before them wrote.
  ASSERT_OK(this->Begin(kLarge, 3));
  ASSERT_OK(this->Update(6, {21, 22, 23}));
  ASSERT_OK(this->MoveRow(2, 1));
  ASSERT_OK(this->Update(6, {31}));
  ASSERT_OK(this->MoveRow(0, 0));
  ASSERT_OK(this->ReplayOf(kLarge, 3));
  EXPECT_EQ(this->Table(), (Ints{1, 3, 4, 21, 22, 23, 31, 9, 9, 9, 9, 9}));
  this->ExpectClean();
}

TYPED_TEST(DeltasTest, RowsThatTheExtentLeftAreForgotten) {
  for (const size_t parameter_bytes : this->kTransports) {
    this->CaptureTable(parameter_bytes);
    ASSERT_OK(this->Begin(kLarge, 4));
    ASSERT_OK(this->Refill(this->table_, Ints(12, 7)));
    ASSERT_OK(this->ReplayOf(kLarge, 4));
    ASSERT_OK(this->Begin(kLarge, 1));
    ASSERT_OK(this->Update(0, {8}));
    ASSERT_OK(this->ReplayOf(kLarge, 1));
    EXPECT_EQ(this->Table(), (Ints{8, 7, 7, 9, 9, 9, 9, 9, 9, 9, 9, 9}));
    this->ExpectClean();
    ASSERT_OK(this->Begin(kLarge, 3));
    ASSERT_OK(this->Update(3, {6}));
    ASSERT_OK(this->ReplayOf(kLarge, 3));
    EXPECT_EQ(this->Table(), (Ints{8, 7, 7, 6, 9, 9, 9, 9, 9, 9, 9, 9})) << "pages of a request that is done";
    this->ExpectClean();
    this->runner_.reset();
  }
}

TYPED_TEST(DeltasTest, BadUpdatesAreRefusedAndWriteNothing) {
  this->MakeTable();
  const auto plain = this->Register(Spec("plain", Role::kRefilled), {1, 2});
  BufferSpec fixed = Spec("fixed", Role::kRefilled);
  fixed.deltas = true;
  const auto whole = this->Register(fixed, {1, 2, 3});
  BufferManager& manager = this->manager();
  this->Capture({kSmall, kLarge}, kEmptyBody);
  EXPECT_STATUS(this->Update(0, {1}), kFailedPrecondition, "update of table: no step is open");
  EXPECT_STATUS(this->MoveRow(0, 1), kFailedPrecondition, "move of table: no step is open");
  ASSERT_OK(this->Begin(kLarge, 2));
  EXPECT_STATUS(manager.Keep(this->table_), kFailedPrecondition, "never refilled");
  ASSERT_OK(this->Update(0, {1, 2, 3, 4, 5, 6}));
  ASSERT_OK(this->Refill(plain, {1, 2}));
  ASSERT_OK(this->Refill(whole, {1, 2, 3}));
  const int64_t generation = manager.generation(this->table_.id);
  EXPECT_STATUS(this->Update(6, {1}), kOutOfRange, "update of table at [6, +1); extent {2 requests, 2 tokens} has 6");
  EXPECT_STATUS(this->Update(-1, {1}), kOutOfRange, "[-1, +1)");
  EXPECT_STATUS(this->Update(INT64_MAX, {1}), kOutOfRange, "table");
  const std::vector<BufferManager::Range> ranges[] = {{{0, 1}, {6, 1}}, {{0, 1}, {1, 2}}, {{0, 1}}, {{0, -1}, {0, 3}}};
  const Ints values = {70, 70};
  EXPECT_STATUS(manager.Update<int32_t>(this->table_, ranges[0], values), kOutOfRange, "[6, +1)");
  EXPECT_STATUS(manager.Update<int32_t>(this->table_, ranges[1], values), kInvalidArgument,
                "a range of 2 elements where 1 of 2 values are left");
  EXPECT_STATUS(manager.Update<int32_t>(this->table_, ranges[2], values), kInvalidArgument,
                "2 values, and ranges of 1");
  EXPECT_STATUS(manager.Update<int32_t>(this->table_, ranges[3], values), kInvalidArgument, "a range of -1");
  EXPECT_STATUS(this->MoveRow(0, 2), kOutOfRange, "move of row 0 of table to row 2; there are 4, and extent");
  EXPECT_STATUS(this->MoveRow(4, 0), kOutOfRange, "move of row 4");
  EXPECT_STATUS(this->MoveRow(-1, 0), kOutOfRange, "move of row -1");
  EXPECT_STATUS(this->MoveRow(0, -1), kOutOfRange, "to row -1");
  EXPECT_STATUS(manager.MoveRow(whole, 0, 1), kInvalidArgument, "its axis counts neither requests nor tokens");
  EXPECT_STATUS(manager.Update<int32_t>(plain, 0, values), kInvalidArgument, "whole refills only");
  EXPECT_STATUS(manager.MoveRow(plain, 0, 1), kInvalidArgument, "whole refills only");
  EXPECT_STATUS(manager.Update<int32_t>({77, {}}, 0, values), kInvalidArgument, "there is no buffer 77");
  const std::vector<int64_t> wide = {1};
  EXPECT_STATUS(manager.template Update<int64_t>({this->table_.id, {}}, 0, wide), kInvalidArgument,
                "elements of 4 bytes; those of the update have 8");
  EXPECT_EQ(manager.generation(this->table_.id), generation);
  ASSERT_OK(this->ReplayOf(kLarge, 2));
  EXPECT_EQ(this->Table(), (Ints{1, 2, 3, 4, 5, 6, 9, 9, 9, 9, 9, 9}));
  this->ExpectClean();
}

TYPED_TEST(DeltasTest, BuffersThatDoNotSuitDeltasAreRefused) {
  this->MakeManager();
  const auto refused = [this](Role role, Kind kind, Axis axis, const char* why) {
    BufferSpec spec = Spec("buffer", role, kind, axis);
    spec.deltas = true;
    EXPECT_STATUS(this->manager().template Register<int32_t>(spec, Ints(3, 0)), kInvalidArgument, why);
  };
  refused(Role::kConstant, Kind::kOpaque, Axis::Fixed(), "deltas are for refilled buffers; this one is constant");
  refused(Role::kRestored, Kind::kOpaque, Axis::Fixed(), "this one is restored");
  refused(Role::kRefilled, Kind::kIndptr, Axis::RequestsPlusOne(), "one change moves all that follows");
  refused(Role::kRefilled, Kind::kPageTable, Axis::Pages(), "one change moves all that follows");
  struct Huge {
    std::byte bytes[(16 << 10) + 1];
  };
  BufferSpec spec = Spec("huge", Role::kRefilled);
  spec.deltas = true;
  EXPECT_STATUS(this->manager().template Register<Huge>(spec, std::vector<Huge>(1)), kInvalidArgument, "with deltas");
}

TYPED_TEST(DeltasTest, AnUpdateIsARefillToWhatIsDerivedFromIt) {
  this->MakeTable();
  BufferSpec spec = Spec("plan", Role::kRefilled);
  spec.derived_from = {this->table_.id};
  const auto plan = this->Register(spec, {0});
  this->Capture({kLarge}, kEmptyBody);
  const auto step = [&](auto give) {
    ASSERT_OK(this->Begin(kLarge, 2));
    ASSERT_OK(this->Refill(plan, {1}));
    ASSERT_OK(give());
    EXPECT_STATUS(this->ReplayOf(kLarge, 2), kFailedPrecondition, "plan was made from table");
    ASSERT_OK(this->Refill(plan, {2}));
    ASSERT_OK(this->ReplayOf(kLarge, 2));
  };
  step([&] { return this->Update(0, {1}); });
  step([&] { return this->MoveRow(0, 1); });
  ASSERT_OK(this->Begin(kLarge, 2));
  ASSERT_OK(this->manager().Keep(plan));
  ASSERT_OK(this->manager().Keep(this->table_));
  ASSERT_OK(this->ReplayOf(kLarge, 2));
  EXPECT_EQ(this->Table(), (Ints{9, 9, 9, 1, 9, 9, 9, 9, 9, 9, 9, 9}));
}

// --- the shadow never misses a change without saying so ---

TYPED_TEST(DeltasTest, UpdatesOfADroppedStepGoWithTheNext) {
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

TYPED_TEST(DeltasTest, UpdatesOfARefusedReplayGoWithTheNext) {
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

class Refusing final : public GraphHook {
 public:
  bool refuse = false;
  absl::Status BeforeCapture(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  absl::Status RecordPrologue(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  void AfterCapture(const RunInfo&, const absl::Status&) override {}
  absl::Status BeforeReplay(Stream&, const RunInfo&) override {
    return refuse ? absl::UnavailableError("not now") : absl::OkStatus();
  }
  void AfterReplay(Stream&, const RunInfo&, const absl::Status&) override {}
};

// The step was handed over, and its launch refused: the device has none of it.
TYPED_TEST(DeltasTest, ARefusedLaunchSendsTheTableInFullAgain) {
  for (const size_t parameter_bytes : this->kTransports) {
    SCOPED_TRACE(parameter_bytes);
    this->MakeTable(parameter_bytes);
    Refusing refusing;
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

TYPED_TEST(DeltasTest, AGraphThatDoesNotTakeTheTableLeavesItsUpdatesForTheNext) {
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

TYPED_TEST(DeltasTest, TheTableOfOneBucketIsLeftAloneByOthers) {
  this->MakeManager();
  BufferSpec spec = this->TableSpec();
  spec.only_bucket = kLarge;
  this->table_ = this->Register(spec, Ints(12, 50));
  this->Capture({kSmall, kLarge}, kEmptyBody);
  for (int32_t round = 1; round <= 3; ++round) {
    ASSERT_OK(this->Begin(kLarge, 2));
    ASSERT_OK(this->Update(round, {round}));
    ASSERT_OK(this->ReplayOf(kLarge, 2));
    ASSERT_OK(this->Begin(kSmall, 1));
    EXPECT_STATUS(this->Update(0, {1}), kFailedPrecondition, "buffer table belongs to bucket {4 requests");
    ASSERT_OK(this->ReplayOf(kSmall, 1));
  }
  EXPECT_EQ(this->Table(), (Ints{9, 1, 2, 3, 9, 9, 9, 9, 9, 9, 9, 9}));
  this->ExpectClean();
}

TYPED_TEST(DeltasTest, AMissedUpdateIsReportedAndNeutralisedUntilARefill) {
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

TYPED_TEST(DeltasTest, ALaunchForAnotherBucketMissesTheUpdate) {
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

TYPED_TEST(DeltasTest, UnarmedLaunchesCapturesAndRestoresLeaveTheShadowAlone) {
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

TYPED_TEST(DeltasTest, AnIllegalValueIsReportedUntilItIsMended) {
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

TYPED_TEST(DeltasTest, VerifyFindsADamagedShadow) {
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

TYPED_TEST(DeltasTest, AKernelThatWritesAShadowIsNamed) {
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

// A table of 128 KB: its updates ride in parameters, a whole refill does not fit there.
TYPED_TEST(DeltasTest, UpdatesOfALargeTableInFlightEachTakeTheirOwn) {
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
TYPED_TEST(DeltasTest, WhatIsWrongInOneTileMakesTheWholeTableHarmless) {
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

TYPED_TEST(DeltasTest, ALargeTableMissesAnUpdateAsAWhole) {
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

TYPED_TEST(DeltasTest, AdoptedTablesTakeDeltasToo) {
  this->MakeManager();
  const DeviceSpan<int32_t> memory = this->EngineMemory(Ints(13, 50));
  ASSERT_OK_AND_ASSIGN(this->table_,
                       this->manager().template Adopt<int32_t>(this->TableSpec(), memory.Sub(1, 12), Ints(12, 50)));
  this->Capture({kLarge}, kEmptyBody);
  for (int32_t step = 0; step < 3; ++step) {
    ASSERT_OK(this->Begin(kLarge, 3));
    ASSERT_OK(this->Update(3 * step, {step + 1}));
    ASSERT_OK(this->ReplayOf(kLarge, 3));
  }
  EXPECT_EQ(this->Read(memory), (Ints{50, 1, 9, 9, 2, 9, 9, 3, 9, 9, 9, 9, 9}));
  this->ExpectClean();
}

}  // namespace
}  // namespace pristine::testing
