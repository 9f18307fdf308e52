// Buffers with deltas: a step sends what changed, and the graph sees the whole table.
#include "tests/buffers/deltas_rig.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class DeltasTest : public DeltasRig<BackendT> {};
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
