// What ranks of a tensor-parallel engine rely on: they can compare what they captured, a refused replay has launched
// nothing, and a violation that the device finds skips nothing, so that collectives stay in step.
#include <functional>
#include <string>
#include <utility>

#include "tests/buffers/buffer_fixture.h"
#include "tests/buffers/engine.h"

namespace pristine::testing {
namespace {

constexpr Extent kSmall{4, 4};
constexpr Extent kLarge{8, 8};
using Ints = std::vector<int32_t>;

template <class BackendT>
class SignatureHashTest : public BufferTest<BackendT> {
 protected:
  // What a rank registers, and how.
  struct SetUpOf {
    ManagerOptions options;
    std::vector<BufferSpec> specs;
    std::vector<int64_t> sizes;
    int32_t value = 0;    // of originals
    bool adopt = false;   // memory of the engine's own
    bool engine = false;  // which captures by itself
    bool two_seals = false;
  };
  static SetUpOf Usual() {
    SetUpOf rank;
    BufferSpec lengths = Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests());
    lengths.limit = 100;
    BufferSpec plan = Spec("plan", Role::kRefilled);
    plan.derived_from = {0};
    rank.specs = {lengths, plan, Spec("scale", Role::kConstant)};
    rank.sizes = {8, 5, 2};
    return rank;
  }
  uint64_t Hash(const SetUpOf& rank) {
    uint64_t hash = 0;
    Run(rank, hash);
    return hash;
  }

 private:
  void Run(const SetUpOf& rank, uint64_t& hash) {
    this->MakeManager(rank.options);
    for (size_t i = 0; i < rank.specs.size(); ++i) {
      const Ints original(static_cast<size_t>(rank.sizes[i]), rank.value);
      if (rank.adopt) {
        ASSERT_OK(this->manager().template Adopt<int32_t>(rank.specs[i], this->EngineMemory(original), original));
      } else {
        this->Register(rank.specs[i], original);
      }
      if (rank.two_seals) {
        ASSERT_OK(this->manager().Seal());
      }
    }
    if (rank.engine) {
      ASSERT_OK(this->manager().Seal());
      ASSERT_OK(EngineBeginCapture(*this->stream()));
      EXPECT_OK(this->manager().RecordPrologue(*this->stream(), kSmall));
      ASSERT_OK(EngineEndCapture(*this->stream()));
      ASSERT_OK_AND_ASSIGN(hash, this->manager().SignatureHash(kSmall));
    } else {
      this->Capture({kSmall}, kEmptyBody);
      ASSERT_OK_AND_ASSIGN(hash, this->runner_->SignatureHash(kSmall));
    }
    this->runner_.reset();
    this->manager_.reset();
    this->memory_.clear();
  }
};
TYPED_TEST_SUITE(SignatureHashTest, AllBackends, BackendNames);

TYPED_TEST(SignatureHashTest, RanksThatAreSetUpAlikeHaveEqualOnes) {
  for (const bool engine : {false, true}) {
    auto rank = this->Usual();
    rank.engine = engine;
    const uint64_t hash = this->Hash(rank);
    EXPECT_EQ(this->Hash(rank), hash);
    // What follows from a rank's own memory.
    rank.adopt = true;
    rank.value = 3;
    rank.specs[0].limit = 90;
    EXPECT_EQ(this->Hash(rank), hash);
  }
}

// A change of what goes in, or of how, is a change for every user.
TYPED_TEST(SignatureHashTest, TheValuesArePinned) {
  auto rank = this->Usual();
  EXPECT_EQ(this->Hash(rank), 4889194553053591198u);
  rank.engine = true;
  EXPECT_EQ(this->Hash(rank), 545696959449835329u);
}

TYPED_TEST(SignatureHashTest, EachIngredientChangesIt) {
  using Rank = decltype(this->Usual());
  const std::pair<const char*, std::function<void(Rank&)>> changes[] = {
      {"a name", [](Rank& rank) { rank.specs[0].name = "lens"; }},
      {"a role", [](Rank& rank) { rank.specs[2].role = Role::kScratch; }},
      {"a kind", [](Rank& rank) { rank.specs[0].kind = Kind::kPosition; }},
      {"an axis", [](Rank& rank) { rank.specs[0].axis = Axis::Tokens(); }},
      {"elements per unit", [](Rank& rank) { rank.specs[0].axis = Axis::Requests(2); }},
      {"a capacity", [](Rank& rank) { rank.sizes[1] = 6; }},
      {"a contract's least length", [](Rank& rank) { rank.specs[1].contract.min_length = 1; }},
      {"a contract's slots", [](Rank& rank) { rank.specs[1].contract.negative_ok = false; }},
      {"a contract's tail", [](Rank& rank) { rank.specs[1].contract.reads_tail = true; }},
      {"only_bucket", [](Rank& rank) { rank.specs[1].only_bucket = kSmall; }},
      {"only_bucket's tokens",
       [](Rank& rank) {
         rank.specs[1].only_bucket = Extent{4, 8};
       }},
      {"deltas", [](Rank& rank) { rank.specs[1].deltas = true; }},
      {"derived_from", [](Rank& rank) { rank.specs[1].derived_from = {}; }},
      {"another source", [](Rank& rank) { rank.specs[2].derived_from = {0}; }},
      {"the order",
       [](Rank& rank) {
         std::swap(rank.specs[1], rank.specs[2]);
         std::swap(rank.sizes[1], rank.sizes[2]);
       }},
      {"one buffer less", [](Rank& rank) { rank.specs.pop_back(); }},
      {"chunks", [](Rank& rank) { rank.two_seals = true; }},
      {"check", [](Rank& rank) { rank.options.check = ManagerOptions::Check::kAlways; }},
      {"sample_every", [](Rank& rank) { rank.options.sample_every = 17; }},
      {"restore", [](Rank& rank) { rank.options.restore = ManagerOptions::Restore::kStream; }},
      {"on_violation", [](Rank& rank) { rank.options.on_violation = OnViolation::kTrap; }},
      {"parameter_bytes", [](Rank& rank) { rank.options.parameter_bytes = 0; }},
      {"staging_slots", [](Rank& rank) { rank.options.staging_slots = 5; }},
      {"late_refill_bytes", [](Rank& rank) { rank.options.late_refill_bytes = 5; }},
      {"poison_scratch", [](Rank& rank) { rank.options.poison_scratch = true; }},
  };
  for (const bool engine : {false, true}) {
    std::vector<std::pair<std::string, uint64_t>> seen;
    auto usual = this->Usual();
    usual.engine = engine;
    seen.emplace_back("as usual", this->Hash(usual));
    for (const auto& [what, change] : changes) {
      auto rank = usual;
      change(rank);
      const uint64_t hash = this->Hash(rank);
      for (const auto& [other, its] : seen) EXPECT_NE(hash, its) << what << " and " << other;
      seen.emplace_back(what, hash);
    }
  }
}

TYPED_TEST(SignatureHashTest, IsThatOfTheCaptureWhateverIsRegisteredLater) {
  this->MakeManager();
  this->Register(Spec("early", Role::kConstant), {1});
  this->Capture({kSmall}, kEmptyBody);
  ASSERT_OK_AND_ASSIGN(const uint64_t early, this->runner_->SignatureHash(kSmall));
  EXPECT_STATUS(this->manager().SignatureHash(kSmall), kNotFound, "no prologue was recorded");
  this->Register(Spec("late", Role::kConstant), {1});
  ASSERT_OK(this->manager().Seal());
  EXPECT_EQ(*this->runner_->SignatureHash(kSmall), early);
  ASSERT_OK(this->runner_->Recapture(*this->stream(), kSmall));
  EXPECT_NE(*this->runner_->SignatureHash(kSmall), early);
}

// Counts launches: the body's kernels add 1, the second after the first.
template <class BackendT>
class RankTest : public BufferTest<BackendT> {
 protected:
  void TearDown() override {
    if (this->stream() != nullptr) this->stream()->Synchronize().IgnoreError();
    launch_ = nullptr;
    BufferTest<BackendT>::TearDown();
  }
  GraphRunner::Body Body() {
    counts_ = this->EngineMemory({0, 0});
    return [this](Stream& stream, const Extent&) -> absl::Status {
      PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, AddOneParams{counts_.address(), 1}));
      return Launch(stream, kAddOne, AddOneParams{counts_.address() + 1, 1});
    };
  }
  void RegisterThree() {
    BufferSpec lengths = Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests());
    lengths.limit = 100;
    lengths_ = this->Register(lengths, Ints(8, 1));
    BufferSpec plan = Spec("plan", Role::kRefilled);
    plan.derived_from = {lengths_.id};
    plan_ = this->Register(plan, {1, 2, 3});
    constant_ = this->Register(Spec("constant", Role::kConstant), {16});
  }
  absl::Status Fill(const Extent& bucket, const Extent& extent, int32_t length = 5) {
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(bucket, extent));
    PRISTINE_RETURN_IF_ERROR(this->Refill(lengths_, Ints(static_cast<size_t>(extent.requests), length)));
    return this->Refill(plan_, {6, 6, 6});
  }
  absl::Status ArmByEngine(const Extent& bucket, int32_t length = 5) {
    PRISTINE_RETURN_IF_ERROR(Fill(bucket, {2, 2}, length));
    return this->manager().BeforeReplay(*this->stream(), bucket, {2, 2});
  }
  Buffer<int32_t> lengths_, plan_, constant_;
  DeviceSpan<int32_t> counts_;
  EngineLaunch launch_;
};
TYPED_TEST_SUITE(RankTest, AllBackends, BackendNames);

TYPED_TEST(RankTest, ARefusedReplayHasLaunchedNothing) {
  for (const size_t parameter_bytes : {size_t{0}, ManagerOptions::kMaxParameterBytes}) {
    SCOPED_TRACE(parameter_bytes);
    ManagerOptions options;
    options.parameter_bytes = parameter_bytes;
    options.staging_slots = 2;
    this->MakeManager(options);
    this->RegisterThree();
    RefusingHook first, last;
    RunnerOptions runner;
    runner.buckets = {kSmall, kLarge};
    runner.warmups = 0;
    ASSERT_OK_AND_ASSIGN(this->runner_, GraphRunner::Create(runner, this->Body()));
    ASSERT_OK(this->runner_->AddHook(first));
    ASSERT_OK(this->runner_->AddHook(this->manager()));
    ASSERT_OK(this->runner_->AddHook(last));
    ASSERT_OK(this->runner_->CaptureAll(*this->stream()));
    ASSERT_OK(this->runner_->Release(kLarge));
    ASSERT_OK(this->stream()->Synchronize());
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> other, this->device().CreateStream());
    const auto replay = [&](const Extent& bucket = kSmall, const Extent& extent = {2, 2}) {
      return this->runner_->Replay(*this->stream(), bucket, extent);
    };
    const auto fill = [&] { ASSERT_OK(this->Fill(kSmall, {2, 2})); };

    EXPECT_STATUS(replay(), kFailedPrecondition, "no step is open");
    fill();
    EXPECT_STATUS(replay(kLarge), kNotFound, "not captured");
    EXPECT_STATUS(replay({5, 5}), kNotFound, "no bucket");
    EXPECT_STATUS(replay(kSmall, {5, 5}), kOutOfRange, "does not fit");
    EXPECT_STATUS(replay(kSmall, {-1, 0}), kInvalidArgument, "must not be negative");
    EXPECT_STATUS(replay(kSmall, {1, 1}), kFailedPrecondition, "the open step");
    ASSERT_OK(this->manager().BeginStep(kLarge, {2, 2}));
    EXPECT_STATUS(replay(), kFailedPrecondition, "the open step");
    ASSERT_OK(this->manager().BeginStep(kSmall, {2, 2}));
    EXPECT_STATUS(replay(), kFailedPrecondition, "Refill or Keep it");
    fill();
    ASSERT_OK(this->Refill(this->lengths_, {7, 7}));
    EXPECT_STATUS(replay(), kFailedPrecondition, "was made from lengths");
    fill();
    ASSERT_OK(EngineBeginCapture(*this->stream()));
    EXPECT_STATUS(replay(), kFailedPrecondition, "capturing");
    EngineEndCapture(*this->stream()).status().IgnoreError();
    fill();
    first.refuse = true;
    EXPECT_STATUS(replay(), kUnavailable, "not now");
    first.refuse = false;
    // Not even a copy is queued: where nothing runs before a synchronization, no slot is in flight.
    for (int i = 0; i < 4; ++i) fill();
    last.refuse = true;
    EXPECT_STATUS(replay(), kUnavailable, "not now");
    last.refuse = false;
    ASSERT_OK(this->stream()->Synchronize());
    EXPECT_EQ(this->Read(this->counts_), (Ints{0, 0}));
    EXPECT_EQ(this->runner_->stats().replays, 0);

    fill();
    ASSERT_OK(replay());
    fill();
    const absl::Status elsewhere = this->runner_->Replay(*other, kSmall, {2, 2});
    if (!elsewhere.ok()) {
      EXPECT_STATUS(elsewhere, kFailedPrecondition, "still runs on another stream");
    }
    ASSERT_OK(this->stream()->Synchronize());
    ASSERT_OK(other->Synchronize());
    const int32_t launched = elsewhere.ok() ? 2 : 1;
    EXPECT_EQ(this->Read(this->counts_), (Ints{launched, launched}));
    EXPECT_EQ(this->runner_->stats().replays, launched);
    EXPECT_EQ(Describe(this->Poll()), "");
    this->runner_.reset();
  }
}

// Each violation that the prologue can find, in one graph that the engine launches: as many launches as asked for, each
// of its kernels once per launch.
TYPED_TEST(RankTest, AViolationOnTheDeviceSkipsNoLaunch) {
  for (const OnViolation on_violation : {OnViolation::kNeutralise, OnViolation::kRecord}) {
    SCOPED_TRACE(static_cast<int>(on_violation));
    ManagerOptions options;
    options.on_violation = on_violation;
    options.check = ManagerOptions::Check::kAlways;
    this->MakeManager(options);
    this->RegisterThree();
    ASSERT_OK(this->manager().Seal());
    const GraphRunner::Body body = this->Body();
    ASSERT_OK(EngineBeginCapture(*this->stream()));
    EXPECT_OK(this->manager().RecordPrologue(*this->stream(), kSmall));
    EXPECT_OK(body(*this->stream(), kSmall));
    ASSERT_OK_AND_ASSIGN(this->launch_, EngineEndCapture(*this->stream()));
    const auto arm = [&](const Extent& bucket = kSmall, int32_t length = 5) {
      ASSERT_OK(this->ArmByEngine(bucket, length));
    };
    const std::pair<Violation::Kind, std::function<void()>> cases[] = {
        {Violation::Kind::kNotArmed, [] {}},
        {Violation::Kind::kArmedTwice, [&] { arm(), arm(); }},
        {Violation::Kind::kWrongBucket, [&] { arm(kLarge); }},
        {Violation::Kind::kInvariant, [&] { arm(kSmall, 101); }},
        {Violation::Kind::kPolluted,
         [&] {
           this->Overwrite(AsWritableBytes(this->constant_.live).address(), std::byte{9});
           arm();
         }},
    };
    int32_t launches = 0;
    for (const auto& [kind, provoke] : cases) {
      SCOPED_TRACE(ToString(kind));
      provoke();
      ASSERT_OK(this->launch_(*this->stream()));
      ++launches;
      EXPECT_EQ(this->Read(this->counts_), (Ints{launches, launches}));
      const std::vector<Violation> found = this->Poll();
      ASSERT_EQ(found.size(), 1u) << Describe(found);
      EXPECT_EQ(found[0].kind, kind) << Describe(found);
    }
    EXPECT_EQ(this->manager().stats().neutralised, on_violation == OnViolation::kNeutralise ? 4 : 0);
    this->launch_ = nullptr;
  }
}

// Two ranks make the same calls, good and bad; one waits for its device after each, the other only where it must.
TYPED_TEST(RankTest, TheSameCallsGetTheSameAnswersWhateverTheDevicesProgress) {
  struct Outcome {
    std::vector<std::string> answers;
    Ints counts, lengths;
    std::vector<int64_t> replays;
    int64_t expected_writes = 0, neutralised = 0;
    std::string reports;
  };
  const auto run = [this](bool waits, Outcome& outcome) {
    ManagerOptions options;
    options.sample_every = 3;
    options.staging_slots = 2;
    options.parameter_bytes = 64;  // the plan of a large step goes through a slot, that of a small one does not
    this->MakeManager(options);
    this->RegisterThree();
    const auto pages = this->Register(Spec("pages", Role::kRefilled, Kind::kPageTable, Axis::Pages()), Ints(64, 0));
    const auto restored = this->Register(Spec("restored", Role::kRestored), {1});
    const GraphRunner::Body count = this->Body();
    this->Capture({kSmall, kLarge}, [&](Stream& stream, const Extent& bucket) -> absl::Status {
      PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, AddOneParams{restored.live.address(), 1}));
      return count(stream, bucket);
    });
    const auto note = [&](const absl::Status& status) {
      outcome.answers.push_back(status.ToString());
      if (waits) {
        EXPECT_OK(this->stream()->Synchronize());
      }
    };
    for (int32_t step = 0; step < 60; ++step) {
      const Extent extent{step % 7, step % 7};
      const Extent bucket = step % 7 > 4 || step % 4 == 0 ? kLarge : kSmall;
      EXPECT_OK(this->manager().WaitForSlot());
      note(this->manager().BeginStep(bucket, extent));
      note(this->Refill(this->lengths_, Ints(static_cast<size_t>(step % 11 == 0 ? 9 : extent.requests), step % 105)));
      note(this->Refill(this->plan_, {step, step, step}));
      if (step % 13 != 0) note(this->Refill(pages, Ints(static_cast<size_t>(step) % 40, 1)));
      note(this->runner_->Replay(*this->stream(), step % 17 == 0 ? kSmall : bucket, extent));
    }
    outcome.counts = this->Read(this->counts_);
    outcome.lengths = this->Read(this->lengths_);
    outcome.replays = this->runner_->stats().replays_by_bucket;
    outcome.expected_writes = this->manager().stats().expected_writes;
    outcome.neutralised = this->manager().stats().neutralised;
    outcome.reports = Describe(this->Poll());
    this->runner_.reset();
  };
  Outcome patient, hasty;
  run(true, patient);
  run(false, hasty);
  EXPECT_EQ(patient.answers, hasty.answers);
  EXPECT_EQ(patient.counts, hasty.counts);
  EXPECT_EQ(patient.lengths, hasty.lengths);
  EXPECT_EQ(patient.replays, hasty.replays);
  EXPECT_EQ(patient.expected_writes, hasty.expected_writes);
  EXPECT_EQ(patient.neutralised, hasty.neutralised);
  EXPECT_EQ(patient.reports, hasty.reports);
  EXPECT_GT(patient.replays[0] * patient.replays[1], 0);
  EXPECT_GT(patient.expected_writes, 0);
}

TYPED_TEST(RankTest, ANeutralisedReplayOfARunnerRunsEachKernelOnce) {
  for (const size_t parameter_bytes : {size_t{0}, ManagerOptions::kMaxParameterBytes}) {
    ManagerOptions options;
    options.parameter_bytes = parameter_bytes;
    this->MakeManager(options);
    this->RegisterThree();
    this->Capture({kSmall}, this->Body(), 0);
    for (int32_t step = 1; step <= 6; ++step) {
      ASSERT_OK(this->Fill(kSmall, {2, 2}, step % 2 == 0 ? 101 : 5));
      ASSERT_OK(this->Replay(kSmall, {2, 2}));
      EXPECT_EQ(this->Read(this->counts_), (Ints{step, step}));
    }
    EXPECT_EQ(this->manager().stats().neutralised, 3);
    EXPECT_EQ(this->runner_->stats().replays, 6);
    EXPECT_EQ(this->Poll().size(), 3u);
    this->runner_.reset();
  }
}

}  // namespace
}  // namespace pristine::testing
