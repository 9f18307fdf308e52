// The flight recorder: one record per replay, in order, readable whatever became of the device, and never a torn one.
#include "pristine/buffers/flight_recorder.h"

#include <atomic>
#include <thread>

#include "absl/strings/str_cat.h"
#include "buffers/flight_log.h"
#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

constexpr Extent kSmall{2, 2};
constexpr Extent kLarge{4, 4};
using Ints = std::vector<int32_t>;
using Status = FlightRecord::Status;

template <class BackendT>
class FlightRecorderTest : public BufferTest<BackendT> {
 protected:
  // A length per request, two indptrs and a constant, captured for both buckets.
  void Make(const ManagerOptions& options = {}) {
    this->runner_.reset();
    indptrs_.clear();
    this->MakeManager(options);
    BufferSpec lengths = Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests());
    lengths.limit = 100;
    lengths_ = this->Register(lengths, Ints(4, 9));
    for (const char* name : {"qo_indptr", "kv_indptr"}) {
      BufferSpec indptr = Spec(name, Role::kRefilled, Kind::kIndptr, Axis::RequestsPlusOne());
      indptr.limit = 1000;
      indptrs_.push_back(this->Register(indptr, Ints(5, 0)));
    }
    constant_ = this->Register(Spec("constant", Role::kConstant), {7, 8});
    this->Capture({kSmall, kLarge}, kEmptyBody);
  }
  void Open(const Extent& bucket, int32_t requests, int32_t length) {
    ASSERT_OK(this->manager().BeginStep(bucket, {requests, requests}));
    Ints qo{0}, kv{0};
    for (int32_t i = 1; i <= requests; ++i) {
      qo.push_back(i);
      kv.push_back(10 * i);
    }
    ASSERT_OK(this->Refill(lengths_, Ints(static_cast<size_t>(requests), length)));
    ASSERT_OK(this->Refill(indptrs_[0], qo));
    ASSERT_OK(this->Refill(indptrs_[1], kv));
  }
  void RunStep(const Extent& bucket, int32_t requests, int32_t length = 5) {
    Open(bucket, requests, length);
    ASSERT_OK(this->Replay(bucket, {requests, requests}));
  }
  std::vector<FlightRecord> Records(size_t most = 64) {
    std::vector<FlightRecord> records(most);
    records.resize(this->manager().FlightRecords(absl::MakeSpan(records)));
    return records;
  }
  // A step's values in the parameters of the prologue and in a slot, each judged by its block and by the last one.
  static std::vector<ManagerOptions> Ways() {
    std::vector<ManagerOptions> ways;
    for (const size_t parameter_bytes : {size_t{0}, ManagerOptions::kMaxParameterBytes}) {
      for (const auto check : {ManagerOptions::Check::kOff, ManagerOptions::Check::kAlways}) {
        ways.push_back({.check = check, .parameter_bytes = parameter_bytes});
      }
    }
    return ways;
  }
  void ExpectLast(Status status, std::optional<Violation::Kind> violation) {
    const std::vector<FlightRecord> records = Records();
    ASSERT_FALSE(records.empty());
    EXPECT_EQ(records.back().status, status) << ToString(records.back().status);
    EXPECT_EQ(records.back().violation, violation);
  }
  Buffer<int32_t> lengths_, constant_;
  std::vector<Buffer<int32_t>> indptrs_;
};
TYPED_TEST_SUITE(FlightRecorderTest, AllBackends, BackendNames);

TYPED_TEST(FlightRecorderTest, RecordsAreInOrderWithTheFieldsOfTheirStepsOverBucketChanges) {
  this->Make();
  EXPECT_TRUE(this->Records().empty()) << "captures and warm-ups are not replays";
  const struct {
    Extent bucket;
    int32_t requests;
  } steps[] = {{kSmall, 1}, {kLarge, 3}, {kSmall, 2}, {kLarge, 4}, {kLarge, 0}};
  for (const auto& step : steps) this->RunStep(step.bucket, step.requests);
  const std::vector<FlightRecord> records = this->Records();
  ASSERT_EQ(records.size(), std::size(steps));
  for (size_t i = 0; i < records.size(); ++i) {
    const FlightRecord& record = records[i];
    const Extent extent{steps[i].requests, steps[i].requests};
    EXPECT_EQ(record.sequence, static_cast<int64_t>(i) + 1);
    EXPECT_EQ(record.replay, static_cast<int64_t>(i) + 1);
    EXPECT_STREQ(record.graph, "decode");
    EXPECT_EQ(record.bucket, steps[i].bucket);
    EXPECT_EQ(record.extent, extent);
    EXPECT_STREQ(record.indptr_tails[0].buffer, "qo_indptr");
    EXPECT_EQ(record.indptr_tails[0].value, steps[i].requests);
    EXPECT_STREQ(record.indptr_tails[1].buffer, "kv_indptr");
    EXPECT_EQ(record.indptr_tails[1].value, 10 * steps[i].requests);
    EXPECT_EQ(record.status, Status::kClean);
    EXPECT_EQ(record.violation, std::nullopt);
  }
}

TYPED_TEST(FlightRecorderTest, AFullRingKeepsTheNewestAndRoundsItsSizeUp) {
  ManagerOptions options;
  options.flight_records = 3;
  this->Make(options);
  for (int i = 1; i <= 11; ++i) {
    this->RunStep(kLarge, i % 4);
    const std::vector<FlightRecord> records = this->Records();
    ASSERT_EQ(records.size(), static_cast<size_t>(std::min(i, 4)));
    for (size_t r = 0; r < records.size(); ++r) {
      EXPECT_EQ(records[r].sequence, i - static_cast<int64_t>(records.size()) + 1 + static_cast<int64_t>(r));
    }
    EXPECT_EQ(records.back().extent.requests, i % 4);
  }
  const std::vector<FlightRecord> newest = this->Records(2);
  ASSERT_EQ(newest.size(), 2u);
  EXPECT_EQ(newest[0].sequence, 10);
  EXPECT_EQ(newest[1].sequence, 11);
  EXPECT_TRUE(this->Records(0).empty());
}

TYPED_TEST(FlightRecorderTest, StepsInFlightLeaveARecordEach) {
  this->Make();
  for (int32_t i = 0; i < 3; ++i) {
    this->Open(kLarge, i + 1, 5);
    ASSERT_OK(this->runner_->Replay(*this->stream(), kLarge, {i + 1, i + 1}));
  }
  ASSERT_OK(this->stream()->Synchronize());
  const std::vector<FlightRecord> records = this->Records();
  ASSERT_EQ(records.size(), 3u);
  for (int32_t i = 0; i < 3; ++i) EXPECT_EQ(records[static_cast<size_t>(i)].extent.requests, i + 1);
}

TYPED_TEST(FlightRecorderTest, ARefusedStepIsRecordedAsNeutralisedWithWhatWasWrong) {
  for (const ManagerOptions& options : this->Ways()) {
    SCOPED_TRACE(
        absl::StrCat(options.parameter_bytes, " bytes in parameters, check ", static_cast<int>(options.check)));
    this->Make(options);
    this->RunStep(kSmall, 1);
    this->ExpectLast(Status::kClean, std::nullopt);
    this->RunStep(kSmall, 2, 500);
    this->ExpectLast(Status::kNeutralised, Violation::Kind::kInvariant);
    const FlightRecord refused = this->Records().back();
    EXPECT_EQ(refused.sequence, 2);
    EXPECT_EQ(refused.extent, (Extent{2, 2})) << "what the step asked for, not what was run";
    EXPECT_EQ(refused.indptr_tails[1].value, 20);
    const std::vector<Violation> found = this->Poll();
    ASSERT_EQ(found.size(), 1u) << Describe(found);
    EXPECT_EQ(found[0].replay, refused.replay) << "how a violation finds its record";
    this->RunStep(kLarge, 2);
    this->ExpectLast(Status::kClean, std::nullopt);
    EXPECT_EQ(this->Records().back().sequence, 3);
    EXPECT_EQ(this->Records().size(), 3u) << "one each";
  }
}

TYPED_TEST(FlightRecorderTest, ADecreasingIndptrIsRecordedWithItsTail) {
  this->Make();
  this->Open(kSmall, 2, 5);
  ASSERT_OK(this->Refill(this->indptrs_[1], {0, 66, 49}));
  ASSERT_OK(this->Replay(kSmall, {2, 2}));
  this->ExpectLast(Status::kNeutralised, Violation::Kind::kInvariant);
  EXPECT_EQ(this->Records().back().indptr_tails[1].value, 49);
}

TYPED_TEST(FlightRecorderTest, AHealedConstantIsRecordedAndABrokenRuleOutranksIt) {
  this->Make({.check = ManagerOptions::Check::kAlways});
  this->Overwrite(AsWritableBytes(this->constant_.live).address(), std::byte{99});
  this->RunStep(kSmall, 1);
  this->ExpectLast(Status::kHealed, Violation::Kind::kPolluted);
  this->Overwrite(AsWritableBytes(this->constant_.live).address(), std::byte{99});
  this->RunStep(kSmall, 1, 500);
  this->ExpectLast(Status::kNeutralised, Violation::Kind::kInvariant);
}

TYPED_TEST(FlightRecorderTest, PolicyRecordIsToldFromPolicyNeutralise) {
  ManagerOptions options;
  options.on_violation = OnViolation::kRecord;
  this->Make(options);
  this->RunStep(kSmall, 1, 500);
  this->ExpectLast(Status::kRecorded, Violation::Kind::kInvariant);
}

TYPED_TEST(FlightRecorderTest, LaunchesThatNobodyOrTheWrongBucketArmedAreRecorded) {
  this->Make();
  ASSERT_OK(this->manager().RecordPrologue(*this->stream(), kLarge));
  ASSERT_OK(this->stream()->Synchronize());
  this->ExpectLast(Status::kNeutralised, Violation::Kind::kNotArmed);
  FlightRecord record = this->Records().back();
  EXPECT_STREQ(record.graph, "") << "the engine's own";
  EXPECT_EQ(record.bucket, kLarge);
  EXPECT_EQ(record.extent, (Extent{-1, -1}));
  EXPECT_EQ(record.indptr_tails[0].buffer, nullptr);

  this->Open(kSmall, 1, 5);
  ASSERT_OK(this->manager().BeforeReplay(*this->stream(), kSmall, {1, 1}));
  ASSERT_OK(this->manager().RecordPrologue(*this->stream(), kLarge));
  ASSERT_OK(this->stream()->Synchronize());
  this->ExpectLast(Status::kNeutralised, Violation::Kind::kWrongBucket);
  record = this->Records().back();
  EXPECT_EQ(record.sequence, 2);
  EXPECT_EQ(record.bucket, kLarge);
  EXPECT_EQ(record.extent, (Extent{1, 1})) << "of the step that was armed";

  this->Open(kLarge, 1, 5);
  ASSERT_OK(this->manager().BeforeReplay(*this->stream(), kLarge, {1, 1}));
  this->Open(kLarge, 2, 5);
  ASSERT_OK(this->manager().BeforeReplay(*this->stream(), kLarge, {2, 2}));
  ASSERT_OK(this->manager().RecordPrologue(*this->stream(), kLarge));
  ASSERT_OK(this->stream()->Synchronize());
  this->ExpectLast(Status::kNeutralised, Violation::Kind::kArmedTwice);
}

// On CUDA a stream that failed takes the context along: PaddingTest.PolicyTrapStopsTheStreamAndTheReportSurvives.
TYPED_TEST(FlightRecorderTest, TheRecordOfAStreamThatWasStoppedIsThere) {
  if (this->device().backend() == Backend::kCuda) GTEST_SKIP() << "a trap is sticky: shown in a process of its own";
  ManagerOptions options;
  options.on_violation = OnViolation::kTrap;
  this->Make(options);
  this->RunStep(kSmall, 1);
  this->Open(kSmall, 2, 500);
  ASSERT_OK(this->runner_->Replay(*this->stream(), kSmall, {2, 2}));
  EXPECT_STATUS(this->stream()->Synchronize(), kAborted, "pristine_prologue trapped");
  this->ExpectLast(Status::kTrapped, Violation::Kind::kInvariant);
  EXPECT_EQ(this->Records().size(), 2u);
}

TYPED_TEST(FlightRecorderTest, OffKeepsNothingAndTakesNoMemory) {
  ManagerOptions options;
  options.flight_records = 0;
  this->Make(options);
  this->RunStep(kSmall, 1);
  EXPECT_TRUE(this->Records().empty());
  EXPECT_EQ(this->manager().stats().replays, 1);
  ASSERT_OK_AND_ASSIGN(const buffers::FlightLog log, buffers::FlightLog::Create(this->device(), 0));
  EXPECT_EQ(log.capacity(), 0u);
  EXPECT_EQ(log.ring().entries, nullptr);
}

TYPED_TEST(FlightRecorderTest, ASizeOutOfRangeIsRefused) {
  for (const int records : {-1, ManagerOptions::kMaxFlightRecords + 1}) {
    ManagerOptions options;
    options.flight_records = records;
    EXPECT_STATUS(BufferManager::Create(this->device(), options), kInvalidArgument,
                  absl::StrCat("flight_records is ", records, "; it must be in [0, 1048576]"));
  }
}

TYPED_TEST(FlightRecorderTest, TheJsonDumpHoldsEveryField) {
  this->Make();
  this->RunStep(kLarge, 3);
  this->RunStep(kSmall, 1, 500);
  EXPECT_EQ(ToJson(this->Records()),
            "[\n {\"sequence\": 1, \"key\": {\"graph\": \"decode\", \"requests\": 4, \"tokens\": 4}, "
            "\"extent\": {\"requests\": 3, \"tokens\": 3}, \"indptr_tails\": [{\"buffer\": \"qo_indptr\", "
            "\"value\": 3}, {\"buffer\": \"kv_indptr\", \"value\": 30}], \"replay\": 1, \"status\": \"clean\", "
            "\"violation\": null},\n {\"sequence\": 2, \"key\": {\"graph\": \"decode\", \"requests\": 2, "
            "\"tokens\": 2}, \"extent\": {\"requests\": 1, \"tokens\": 1}, \"indptr_tails\": [{\"buffer\": "
            "\"qo_indptr\", \"value\": 1}, {\"buffer\": \"kv_indptr\", \"value\": 10}], \"replay\": 2, "
            "\"status\": \"neutralised\", \"violation\": \"invalid value\"}\n]\n");
}

TEST(FlightRecordJson, EscapesNamesAndSaysNullWhereThereIsNothing) {
  FlightRecord record;
  record.graph = "a\"b\\c\n";
  record.extent = {-1, -1};
  EXPECT_EQ(ToJson(absl::MakeConstSpan(&record, 1)),
            "[\n {\"sequence\": 0, \"key\": {\"graph\": \"a\\\"b\\\\c\\u000a\", \"requests\": 0, \"tokens\": 0}, "
            "\"extent\": null, \"indptr_tails\": [], \"replay\": 0, \"status\": \"clean\", \"violation\": null}\n]\n");
  EXPECT_EQ(ToJson({}), "[\n]\n");
}

// --- torn records ---

buffers::FlightEntry EntryOf(uint64_t sequence) {
  const auto small = static_cast<int32_t>(sequence);
  buffers::FlightEntry entry;
  entry.sequence = sequence;
  entry.replay = sequence;
  entry.bucket = {small, small};
  entry.extent = {small - 1, small - 1};
  entry.tails[0] = small;
  entry.tails[1] = 10 * small;
  entry.graph = small;
  entry.status = sequence % 2 == 0 ? buffers::FlightStatus::kClean : buffers::FlightStatus::kNeutralised;
  entry.violation = static_cast<int16_t>(sequence % 2 == 0 ? -1 : 1);
  return entry;
}

TEST(FlightEntryTest, AnyMixOfTheWordsOfTwoEntriesIsNotBelieved) {
  for (uint64_t sequence = 1; sequence < 50; ++sequence) {
    for (const uint64_t later : {sequence + 1, sequence + 8, sequence + 1024}) {
      const buffers::FlightWords before = buffers::Seal(EntryOf(sequence)), after = buffers::Seal(EntryOf(later));
      for (unsigned mask = 0; mask < 256; ++mask) {
        buffers::FlightWords mixed;
        bool is_before = true, is_after = true;
        for (int i = 0; i < buffers::kFlightWords; ++i) {
          mixed.word[i] = (mask >> i & 1) != 0 ? after.word[i] : before.word[i];
          is_before = is_before && mixed.word[i] == before.word[i];
          is_after = is_after && mixed.word[i] == after.word[i];
        }
        const auto torn = __builtin_bit_cast(buffers::FlightEntry, mixed);
        buffers::FlightEntry read;
        ASSERT_EQ(buffers::ReadWhole(torn, read), is_before || is_after) << sequence << ", " << later << ", " << mask;
      }
    }
  }
}

TEST(FlightEntryTest, AnEmptyOrHalfWrittenEntryIsNotBelieved) {
  const buffers::FlightWords whole = buffers::Seal(EntryOf(3));
  for (unsigned mask = 0; mask < 255; ++mask) {
    buffers::FlightWords half = {};
    for (int i = 0; i < buffers::kFlightWords; ++i) half.word[i] = (mask >> i & 1) != 0 ? whole.word[i] : 0;
    if (__builtin_memcmp(&half, &whole, sizeof(half)) == 0) continue;  // only the unused word is missing
    const auto torn = __builtin_bit_cast(buffers::FlightEntry, half);
    buffers::FlightEntry read;
    EXPECT_FALSE(buffers::ReadWhole(torn, read)) << mask;
  }
}

TYPED_TEST(FlightRecorderTest, AReaderWhoIsOvertakenSeesWholeRecordsOnly) {
  ASSERT_OK_AND_ASSIGN(const buffers::FlightLog log, buffers::FlightLog::Create(this->device(), 4));
  ASSERT_EQ(log.capacity(), 4u);
  auto* const words =
      reinterpret_cast<uint64_t*>(this->device().backend() == Backend::kHost ? log.ring().entries : nullptr);
  if (words == nullptr) GTEST_SKIP() << "the test writes through the device's address";
  constexpr uint64_t kLast = 200000;
  std::jthread writer([words] {
    for (uint64_t sequence = 1; sequence <= kLast; ++sequence) {
      const buffers::FlightWords entry = buffers::Seal(EntryOf(sequence));
      for (int i = 0; i < buffers::kFlightWords; ++i) {
        // The sequence first: no order is relied on.
        std::atomic_ref(words[(sequence - 1) % 4 * 8 + static_cast<uint64_t>(i)])
            .store(entry.word[i], std::memory_order_relaxed);
      }
    }
  });
  uint64_t newest = 0;
  int64_t read = 0;
  while (newest < kLast) {
    newest = log.Newest();
    for (uint64_t sequence = newest > 3 ? newest - 3 : 1; sequence <= newest; ++sequence) {
      buffers::FlightEntry entry;
      if (!log.Read(sequence, entry)) continue;
      ++read;
      const buffers::FlightWords expected = buffers::Seal(EntryOf(sequence)), found = buffers::Seal(entry);
      ASSERT_EQ(__builtin_memcmp(&expected, &found, sizeof(found)), 0) << "torn record " << sequence;
    }
  }
  EXPECT_GT(read, 0);
}

}  // namespace
}  // namespace pristine::testing
