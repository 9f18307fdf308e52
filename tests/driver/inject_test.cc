// Every mistake that --inject makes is caught: exit code, entry of the report and message, on every device there is.
// What stays clean stays silent.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/injection.h"
#include "pristine/graph_runtime/device.h"
#include "tests/driver/run_driver.h"
#include "tests/support/backends.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class InjectTest : public DeviceTest<BackendT> {
 protected:
  bool on_host() const { return this->device_->backend() == Backend::kHost; }
  DriverResult Run(const std::vector<std::string>& args) {
    DriverSetting setting;
    if (std::string(BackendT::kName) == "HostDeferred") setting.host_run = HostOptions::Run::kDeferred;
    return RunDriver(SmallModel() + std::vector<std::string>{on_host() ? "--device=host" : "--device=cuda"} + args,
                     setting);
  }
  DriverResult Inject(const std::string& injection, const std::vector<std::string>& more = {}) {
    return Run(
        std::vector<std::string>{"--kv-tokens=8192", "--steps=120", "--compare-eager=5", "--inject=" + injection} +
        more);
  }
};
TYPED_TEST_SUITE(InjectTest, AllBackends, BackendNames);

struct Expected {
  ExitCode code = ExitCode::kViolation;
  const char* list = "";  // of the report: holds `entry`, and nothing else if `total` is not 0
  int total = 0;
  std::string entry;  // a part of the list's first, or of the message
};

void Expect(const DriverResult& result, const Expected& expected) {
  EXPECT_EQ(result.code, expected.code) << result.err;
  EXPECT_EQ(result.report["exit_code"].number, static_cast<int>(expected.code));
  EXPECT_EQ(result.report["exit_reason"].text, result.err.substr(15, result.err.size() - 16));
  EXPECT_NE(result.err.find(expected.entry), std::string::npos) << result.err << "\nexpected: " << expected.entry;
  EXPECT_EQ(result.report["first_failure_step"].kind, Json::Kind::kNumber);
  if (*expected.list == '\0') return;
  ASSERT_FALSE(result.report[expected.list].array.empty()) << result.err;
  EXPECT_NE(result.report[expected.list].array[0].text.find(expected.entry), std::string::npos)
      << result.report[expected.list].array[0].text;
  if (expected.total > 0) {
    EXPECT_EQ(result.report[absl::StrCat(expected.list, "_total")].number, expected.total);
  }
}

// The bad attempt of a misuse changes nothing for the steps that follow, the one it preceded included.
void ExpectRecovered(const DriverResult& result) {
  EXPECT_EQ(result.report["steps"].number, 120);
  EXPECT_EQ(result.report["same_mismatches"].number, 0) << result.err;
  EXPECT_EQ(result.report["truth_mismatches"].number, 0) << result.err;
  EXPECT_GT(result.report["truth_rows"].number, 0);
  EXPECT_EQ(result.report["pollutions_total"].number, 0);
}

// --- nodes in the graph ---

TYPED_TEST(InjectTest, AWritePastTheEndIsFoundInTheGuardBandAndNamesTheBufferBefore) {
  Expect(this->Inject("write-past-end"),
         {.list = "pollutions",
          .total = 1,
          .entry = "written outside the buffer: sparse.kv_indptr_ws, byte 68 from its start, is 7"});
}

TYPED_TEST(InjectTest, AConstantThatANodeWritesIsPollutedAndHealed) {
  const DriverResult result = this->Inject("write-constant", {"--check=always"});
  Expect(result, {.list = "pollutions", .entry = "polluted: rope_table[3] is 7, was 16 (graph decode"});
  EXPECT_EQ(result.report["pollutions_total"].number,
            result.report["replays"].number + 2 * result.report["captures"].number)
      << "each replay but the first finds the write before it, and Verify the last; and both warm-ups of each capture";
  EXPECT_EQ(result.report["truth_mismatches"].number, 0);
}

TYPED_TEST(InjectTest, ASampledCheckFindsAPollutedConstantTooInFewerReplays) {
  const DriverResult result = this->Inject("write-constant");
  // The warm-ups of each capture are always compared; of the replays one in sixteen, and Verify finds the last write.
  Expect(result,
         {.list = "pollutions", .entry = "polluted: rope_table[3] is 7, was 16 (graph decode {8 requests, 8 tokens})"});
  EXPECT_EQ(result.report["pollutions_total"].number,
            std::floor(result.report["replays"].number / 16) + 1 + 2 * result.report["captures"].number)
      << result.err;
}

TYPED_TEST(InjectTest, AnUndeclaredWriteNamesTheNodeWhereAccessesAreEnforcedAndThePollutionElsewhere) {
  const DriverResult result = this->Inject("undeclared-write", {"--check=always"});
  if (!this->on_host()) {
    return Expect(result, {.list = "pollutions", .entry = "polluted: rope_table[3] is 7, was 16"});
  }
  Expect(result, {.list = "pollutions",
                  .entry = "undeclared write: rope_table[3] (graph decode {8 requests, 8 tokens}, "
                           "node undeclared_write)"});
  EXPECT_EQ(result.report["first_failure_step"].number, 0) << "at once: in the warm-up of the first capture";
}

TYPED_TEST(InjectTest, ALiveRequestsSlotInAPaddedRowIsSeenByTheTruth) {
  const DriverResult result = this->Inject("live-slot-in-padding");
  Expect(result, {.code = ExitCode::kMismatch,
                  .entry = "step 15: request 0 of 1825 tokens, layer 1, head 0: relative RMS 0.2938"});
  EXPECT_GT(result.report["truth_mismatches"].number, 0);
  EXPECT_EQ(result.report["same_mismatches"].number, 0) << "an eager run reads the same damaged cache";
}

TYPED_TEST(InjectTest, NanInEveryUnusedPageAndPaddedRowChangesNothing) {
  const DriverResult clean = this->Inject("none");
  EXPECT_EQ(clean.code, ExitCode::kOk) << clean.err;
  for (const char* shape : {"--page-size=1", "--page-size=16", "--dtype=bfloat16"}) {
    const DriverResult poisoned = this->Inject("poison-unused", {shape, "--compare-eager=1"});
    EXPECT_EQ(poisoned.code, ExitCode::kOk) << poisoned.err;
    EXPECT_EQ(poisoned.report["first_failure_step"].kind, Json::Kind::kNull);
    EXPECT_GT(poisoned.report["truth_rows"].number, 0);
    EXPECT_EQ(poisoned.report["tokens"].number, clean.report["tokens"].number);
  }
}

TYPED_TEST(InjectTest, ThePoisonRunNamesTheLeakyKernelAndTheRow) {
  for (const char* dtype : {"--dtype=float32", "--dtype=bfloat16"}) {
    const DriverResult result = this->Inject("leaky-kernel", {dtype});
    Expect(result, {.code = ExitCode::kMismatch,
                    .entry = "; the poison run finds NaN in row 0 of layer 0 after node leaky_scale"});
    EXPECT_NE(result.err.find("row 0 of layer 0 differs from an eager run of the same step in bucket {"),
              std::string::npos)
        << result.err;
    EXPECT_GT(result.report["same_mismatches"].number, 0);
  }
}

// --- misuses of a call ---

struct Misuse {
  const char* injection;
  int total;
  const char* entry;
};

TYPED_TEST(InjectTest, ARefusedReplayNamesBothNumbersAndTheRunGoesOn) {
  const Misuse misuses[] = {
      {"stale-plan", 1,
       "refused in step 10: buffer sparse_plan.items_2_2 was made from step.lengths generation 11, which is now 12"},
      {"missing-refill", 1,
       "refused in step 10: buffer step.lengths was last refilled in step 10 (generation 10); this is step 11"},
      {"other-bucket", 1,
       "refused in step 10: replay of bucket {8 requests, 8 tokens} with extent {2 requests, 2 tokens}, but the open "
       "step 11 is for bucket {2 requests, 2 tokens}"},
      {"reused-slot", 2, "refused in step 10: all 4 staging slots are in flight: step 11 has not begun"},
  };
  for (const Misuse& misuse : misuses) {
    SCOPED_TRACE(misuse.injection);
    const DriverResult result = this->Inject(misuse.injection, {"--scheduler=host"});
    Expect(result, {.list = "invariant_violations", .total = misuse.total, .entry = misuse.entry});
    EXPECT_EQ(result.report["first_failure_step"].number, 10);
    ExpectRecovered(result);
  }
}

TYPED_TEST(InjectTest, ARefillOfASlotThatWasNotGrantedIsRefusedToo) {
  const DriverResult result = this->Inject("reused-slot");
  ASSERT_EQ(result.report["invariant_violations"].array.size(), 2u);
  EXPECT_EQ(result.report["invariant_violations"].array[1].text,
            "refused in step 10: refill of step.lengths: no step is open; call BeginStep first");
}

TYPED_TEST(InjectTest, AValueThatTheDeviceRefusesIsNamedAndTheReplayHarmless) {
  const Misuse misuses[] = {
      {"decreasing-indptr", 1,
       "invalid value: step.kv_indptr[2] is 3250, bound 3251 (graph decode {2 requests, 2 tokens}, replay 11)"},
      {"page-out-of-range", 1,
       "invalid value: step.kv_indices[0] is 8193, bound 8192 (graph decode {2 requests, 2 tokens}, replay 11)"},
      {"unarmed", 1,
       "launched without BeforeReplay: expected step 11, found 10 (graph decode {2 requests, 2 tokens}, replay 10)"},
      {"armed-twice", 1,
       "armed more than once for one launch: expected step 11, found 12 (graph decode {2 requests, 2 tokens}, replay "
       "12)"},
  };
  for (const Misuse& misuse : misuses) {
    SCOPED_TRACE(misuse.injection);
    const DriverResult result = this->Inject(misuse.injection);
    Expect(result, {.list = "invariant_violations", .total = misuse.total, .entry = misuse.entry});
    EXPECT_EQ(result.report["first_failure_step"].number, 10);
    ExpectRecovered(result);
  }
}

TYPED_TEST(InjectTest, APlanThatIsOneTokenShortDisagreesWithTheConversion) {
  const DriverResult result = this->Inject("plan-mismatch");
  Expect(result, {.entry = "1 steps in which plan and conversion disagree, the first: step 10: plan and conversion "
                           "disagree: sparse.kv_indptr_ws[1]: planned 59, converted 60 (graph decode {2 requests, 2 "
                           "tokens}, replay 11)"});
  EXPECT_EQ(result.report["plan_mismatch_steps"].number, 1);
  ExpectRecovered(result);
}

// --- and nothing else ---

TEST(Inject, EveryClassIsInTheHelp) {
  std::ostringstream out, err;
  EXPECT_EQ(replay_driver::RunDriver({"--help"}, {.out = out, .err = err}), ExitCode::kOk);
  EXPECT_EQ(replay_driver::InjectionChoices().size(), 17u) << "a new class needs a test here";
  for (const auto& [name, injection] : replay_driver::InjectionChoices()) {
    EXPECT_EQ(std::string(replay_driver::ToString(injection)), name);
    if (injection == replay_driver::Injection::kNone) continue;
    EXPECT_NE(out.str().find(absl::StrCat("\n  ", name, " ")), std::string::npos) << name;
  }
}

TEST(Inject, AnUnknownClassIsAUsageError) {
  const DriverResult result = RunDriver({"--inject=rowhammer"});
  EXPECT_EQ(result.code, ExitCode::kUsage);
  EXPECT_NE(result.err.find("--inject=rowhammer: expected one of none, write-past-end"), std::string::npos)
      << result.err;
}

TEST(Inject, AMistakeThatCouldNotBeMadeIsNotTakenForOneThatWasMissed) {
  const DriverResult result =
      RunDriver(SmallModel() + std::vector<std::string>{"--device=host", "--steps=5", "--inject=unarmed"});
  EXPECT_EQ(result.code, ExitCode::kInternal);
  EXPECT_NE(result.err.find("--inject=unarmed: no step of 5 was one"), std::string::npos) << result.err;
}

// Requests of 1 to 30 tokens that come and go, so that buckets change all the time and some steps are empty.
std::string BusyTrace(int steps) {
  std::string text;
  for (int step = 0, i = 0; step < steps; step += 3 + i % 5, ++i) {
    absl::StrAppend(&text, "{\"timestamp\": ", 30 * step, ", \"input_length\": ", i * 7 % 31,
                    ", \"output_length\": ", 1 + i * 5 % 11, "}\n");
  }
  return text;
}

TYPED_TEST(InjectTest, TenThousandCleanStepsReportNothingWithEveryCheckOn) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr int kSteps = 1'000;
#else
  constexpr int kSteps = 10'000;
#endif
  const TemporaryFile trace(".jsonl", BusyTrace(kSteps));
  const DriverResult result =
      this->Run({"--trace=" + trace.path(), absl::StrCat("--steps=", kSteps), "--check=always", "--max-batch=4",
                 "--kv-tokens=512", "--sparse-block=4", "--window=8", "--heads=2", "--compare-eager=50"});
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_GE(result.report["steps"].number, kSteps - 10);
  EXPECT_GT(result.report["bucket_changes"].number, kSteps / 10);
  EXPECT_GT(result.report["truth_rows"].number, 0);
  for (const char* name : {"pollutions_total", "invariant_violations_total", "plan_mismatch_steps", "same_mismatches",
                           "truth_mismatches"}) {
    EXPECT_EQ(result.report[name].number, 0) << name;
  }
}

}  // namespace
}  // namespace pristine::testing
