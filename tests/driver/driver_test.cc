#include "examples/replay_driver/driver.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <new>
#include <ostream>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "pristine/graph_runtime/stream.h"
#include "tests/driver/run_driver.h"
#include "tests/driver/traces.h"
#include "tests/support/backends.h"

namespace pristine::testing {
namespace {

std::vector<std::string> SmallRun() {
  return SmallModel() + std::vector<std::string>{"--device=host", "--steps=120", "--compare-eager=20"};
}

absl::Status DamageFirstOutput(Stream& stream, replay_driver::DecodeModel& model) {
  return stream.Fill(model.out(0).Sub(0, 4), std::byte{0x3f});
}

constexpr char kHeader[] = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

// --- exit codes ---

TEST(ExitCodes, HelpIs0) {
  std::ostringstream out, err;
  EXPECT_EQ(replay_driver::RunDriver({"--help", "--report=/nowhere/r.json"}, {.out = out, .err = err}), ExitCode::kOk);
  EXPECT_NE(out.str().find("--plan-from=lengths|live"), std::string::npos);
  EXPECT_EQ(err.str(), "");
}

TEST(ExitCodes, ACleanRunIs0) {
  const DriverResult result = RunDriver(SmallRun());
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_EQ(result.err, "");
  EXPECT_EQ(result.out.rfind("device                  host", 0), 0u) << result.out;
  EXPECT_EQ(result.report["exit_reason"].text, "ok");
  EXPECT_GT(result.report["truth_rows"].number, 0);
  EXPECT_EQ(result.report["first_failure_step"].kind, Json::Kind::kNull);
}

TEST(ExitCodes, UsageIs1AndNothingRuns) {
  const DriverResult result = RunDriver({"--steps=many"});
  EXPECT_EQ(result.code, ExitCode::kUsage);
  EXPECT_EQ(result.err, "replay_driver: --steps=many: expected an integer in [1, 1099511627776]\n");
  EXPECT_EQ(result.report.kind, Json::Kind::kNull);
}

TEST(ExitCodes, AnUnwritableReportIs1AndFoundBeforeTheRun) {
  std::ostringstream out, err;
  EXPECT_EQ(replay_driver::RunDriver({"--trace=/nowhere/t.csv", "--report=/nowhere/r.json"}, {.out = out, .err = err}),
            ExitCode::kUsage);
  EXPECT_EQ(err.str(), "replay_driver: --report=/nowhere/r.json: expected a file that can be written\n");
}

TEST(ExitCodes, AReportOverTheTraceIs1AndTheTraceIsStillThere) {
  const std::string text = std::string(kHeader) + "2023-11-16 18:17:03.00,50,3\n";
  const TemporaryFile trace(".csv", text);
  const std::string other_name = UniquePath(".csv");
  std::filesystem::create_symlink(trace.path(), other_name);
  for (const std::string& report : {trace.path(), other_name}) {
    std::ostringstream out, err;
    EXPECT_EQ(replay_driver::RunDriver({"--trace=" + trace.path(), "--report=" + report}, {.out = out, .err = err}),
              ExitCode::kUsage);
    EXPECT_EQ(err.str(), "replay_driver: --report=" + report + ": is the trace; expected another file\n");
  }
  std::filesystem::remove(other_name);
  std::stringstream left;
  left << std::ifstream(trace.path()).rdbuf();
  EXPECT_EQ(left.str(), text);
}

TEST(ExitCodes, AReportThatCannotBeWrittenInFullIs6) {
  std::ostringstream out, err;
  EXPECT_EQ(replay_driver::RunDriver(SmallRun() + std::vector<std::string>{"--steps=2", "--report=/dev/full"},
                                     {.out = out, .err = err}),
            ExitCode::kInternal);
  EXPECT_NE(err.str().find("--report=/dev/full: could not be written in full"), std::string::npos) << err.str();
}

TEST(ExitCodes, AMissingTraceIs2) {
  const DriverResult result = RunDriver({"--trace=/nowhere/t.csv", "--quiet"});
  EXPECT_EQ(result.code, ExitCode::kInput);
  EXPECT_EQ(result.err, "replay_driver: /nowhere/t.csv: cannot be opened; expected a readable trace file\n");
  EXPECT_EQ(result.out, "");
}

TEST(ExitCodes, AMalformedTraceIs2WithFileAndLine) {
  const TemporaryFile trace(".csv", std::string(kHeader) + "2023-11-16 18:17:03.9,5\n");
  const DriverResult result = RunDriver({"--trace=" + trace.path()});
  EXPECT_EQ(result.code, ExitCode::kInput);
  EXPECT_EQ(result.err, "replay_driver: " + trace.path() +
                            ":2: expected 3 fields: a timestamp, context tokens, generated tokens, found "
                            "'2023-11-16 18:17:03.9,5'\n");
  EXPECT_NE(result.report["exit_reason"].text.find(":2: expected"), std::string::npos);
}

TEST(ExitCodes, APlannerRefusalIs3EvenWithQuiet) {
  const DriverResult result =
      RunDriver(SmallRun() + std::vector<std::string>{"--steps=400", "--plan-from=live", "--restore=off", "--quiet"});
  EXPECT_EQ(result.code, ExitCode::kViolation);
  EXPECT_EQ(result.out, "");
  EXPECT_NE(result.err.find("the planner refused"), std::string::npos);
}

TEST(ExitCodes, ADamagedOutputIs4) {
  const DriverResult result = RunDriver(SmallRun(), {.after_replay = DamageFirstOutput});
  EXPECT_EQ(result.code, ExitCode::kMismatch);
  EXPECT_GT(result.report["same_mismatches"].number, 0);
  EXPECT_EQ(result.report["first_failure_step"].kind, Json::Kind::kNumber);
  EXPECT_NE(result.err.find("row 0 of layer 0 differs from an eager run"), std::string::npos) << result.err;
}

TEST(ExitCodes, AViolationOutranksAMismatch) {
  const DriverResult result = RunDriver(SmallRun() + std::vector<std::string>{"--plan-from=live", "--restore=graph"},
                                        {.after_replay = DamageFirstOutput});
  EXPECT_EQ(result.code, ExitCode::kViolation);
  EXPECT_GT(result.report["same_mismatches"].number, 0);
  EXPECT_GT(result.report["plan_mismatch_steps"].number, 0);
}

TEST(ExitCodes, AMissingGpuIs5AndCudaNeverFallsBack) {
  const DriverResult result = RunDriver(SmallRun() + std::vector<std::string>{"--device=cuda:99"});
  EXPECT_EQ(result.code, ExitCode::kDevice);
  EXPECT_EQ(result.report["replays"].number, 0);
  EXPECT_EQ(result.report["device"].text, "") << "no device was opened, the host's least of all";
  EXPECT_EQ(result.out, "");
}

TEST(ExitCodes, MemoryThatTheMachineHasNotIs5) {
  const DriverResult result = RunDriver({"--device=host", "--kv-tokens=268435456", "--layers=1000"});
  EXPECT_EQ(result.code, ExitCode::kDevice);
  EXPECT_NE(result.err.find("this machine has"), std::string::npos) << result.err;
}

TEST(ExitCodes, MemoryForPartialResultsCountsToo) {
  const DriverResult result =
      RunDriver({"--device=host", "--max-batch=4096", "--heads=1024", "--kv-heads=1024", "--kv-groups=1",
                 "--layers=1000", "--head-dim=128", "--kv-tokens=16", "--sparse-block=1", "--topk-blocks=1"});
  EXPECT_EQ(result.code, ExitCode::kDevice);
  EXPECT_NE(result.err.find("partial results need"), std::string::npos) << result.err;
  EXPECT_EQ(result.report["exit_code"].number, 5);
}

TEST(ExitCodes, AnAllocationThatFailsIs5AndTheReportIsWritten) {
  const auto exhausted = [](Stream&, replay_driver::DecodeModel&) -> absl::Status { throw std::bad_alloc(); };
  const DriverResult result = RunDriver(SmallRun(), {.after_replay = exhausted});
  EXPECT_EQ(result.code, ExitCode::kDevice);
  EXPECT_NE(result.err.find("no memory left"), std::string::npos) << result.err;
  EXPECT_EQ(result.report["exit_code"].number, 5);
}

TEST(ExitCodes, AFailureOfTheDeviceIs5) {
  const auto fail = [](Stream&, replay_driver::DecodeModel&) { return absl::InternalError("a kernel failed"); };
  const DriverResult result = RunDriver(SmallRun(), {.after_replay = fail});
  EXPECT_EQ(result.code, ExitCode::kDevice);
  EXPECT_EQ(result.err, "replay_driver: a kernel failed\n");
}

TEST(ExitCodes, AnythingElseIs6AndTheReportIsWritten) {
  int replays = 0;
  const auto fail_later = [&replays](Stream&, replay_driver::DecodeModel&) {
    return ++replays == 10 ? absl::FailedPreconditionError("not today") : absl::OkStatus();
  };
  const DriverResult result = RunDriver(SmallRun(), {.after_replay = fail_later});
  EXPECT_EQ(result.code, ExitCode::kInternal);
  EXPECT_EQ(result.err, "replay_driver: not today\n");
  EXPECT_EQ(result.report["exit_reason"].text, "not today");
  EXPECT_EQ(result.report["replays"].number, 9);
}

// --- what a run does ---

TEST(Driver, TheReportHasEveryField) {
  const DriverResult result = RunDriver(SmallRun());
  for (const char* name : {"version",
                           "command_line",
                           "device",
                           "protection_level",
                           "trace",
                           "steps",
                           "requests_finished",
                           "requests_refused",
                           "tokens",
                           "bucket_changes",
                           "captures",
                           "replays",
                           "replays_by_bucket",
                           "restored_bytes",
                           "expected_writes",
                           "pollutions",
                           "invariant_violations",
                           "plan_mismatch_steps",
                           "first_failure_step",
                           "same_mismatches",
                           "truth_mismatches",
                           "truth_rows",
                           "max_rel_rms",
                           "us_per_replay",
                           "overlap",
                           "capture_ms",
                           "exit_reason"}) {
    EXPECT_TRUE(result.report.has(name)) << name;
  }
  for (const char* name : {"p50", "p99", "max", "host_emulation"}) {
    EXPECT_TRUE(result.report["us_per_replay"].has(name)) << name;
  }
  EXPECT_EQ(result.report["us_per_replay"]["host_emulation"].number, 1);
  EXPECT_GT(result.report["us_per_replay"]["p50"].number, 0);
  EXPECT_EQ(result.report["command_line"].array[0].text, "replay_driver");
  EXPECT_EQ(result.report["captures"].number, 4);
  EXPECT_GT(result.report["restored_bytes"].number, 0);
  double replays = 0;
  for (const auto& [bucket, count] : result.report["replays_by_bucket"].object) replays += count.number;
  EXPECT_EQ(replays, result.report["replays"].number);
  EXPECT_EQ(result.report["replays_by_bucket"].object.size(), 4u);
}

TEST(Driver, StepsWithNobodyActiveCountAndReplayNothing) {
  // Alone for 3 steps, nobody for 7, alone for 2.
  const TemporaryFile trace(".csv", std::string(kHeader) +
                                        "2023-11-16 18:17:03.00,50,3\n"
                                        "2023-11-16 18:17:03.30,100,2\n");
  const DriverResult result = RunDriver(
      SmallModel() + std::vector<std::string>{"--device=host", "--trace=" + trace.path(), "--compare-eager=1"});
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_EQ(result.report["steps"].number, 12);
  EXPECT_EQ(result.report["replays"].number, 5);
  EXPECT_EQ(result.report["tokens"].number, 5);
  EXPECT_EQ(result.report["bucket_changes"].number, 0);
  EXPECT_EQ(result.report["requests_finished"].number, 2);
}

TEST(Driver, LongerStepsLetMoreRequestsIn) {
  // The second arrives when the first has long left, or in the step after the first's, as long as a step is.
  const TemporaryFile trace(".csv", std::string(kHeader) +
                                        "2023-11-16 18:17:03.00,50,3\n"
                                        "2023-11-16 18:17:03.30,100,2\n");
  const DriverResult result =
      RunDriver(SmallModel() + std::vector<std::string>{"--device=host", "--trace=" + trace.path(), "--step-ms=300"});
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_EQ(result.report["steps"].number, 3);
  EXPECT_EQ(result.report["replays"].number, 3);
  EXPECT_EQ(result.report["tokens"].number, 5);
  EXPECT_EQ(result.report["bucket_changes"].number, 1);
}

TEST(Driver, ComparesInTheStepsThatNDivides) {
  // Alone in steps 0 to 2 and 10 to 11: of the even ones, 0, 2 and 10 replay; 2 layers of 4 heads each.
  const TemporaryFile trace(".csv", std::string(kHeader) +
                                        "2023-11-16 18:17:03.00,50,3\n"
                                        "2023-11-16 18:17:03.30,100,2\n");
  const std::vector<std::string> args =
      SmallModel() + std::vector<std::string>{"--device=host", "--trace=" + trace.path()};
  EXPECT_EQ(RunDriver(args + std::vector<std::string>{"--compare-eager=2"}).report["truth_rows"].number, 3 * 8);
  EXPECT_EQ(RunDriver(args + std::vector<std::string>{"--compare-eager=11"}).report["truth_rows"].number, 2 * 8);
  EXPECT_EQ(RunDriver(args + std::vector<std::string>{"--compare-eager=0"}).report["truth_rows"].number, 0);
}

TEST(Driver, ShowsProgressOnATerminalAndClearsIt) {
  const DriverResult result = RunDriver(SmallRun(), {.terminal = true});
  EXPECT_EQ(result.code, ExitCode::kOk);
  EXPECT_EQ(result.err.rfind("\rstep 50, ", 0), 0u) << result.err;
  EXPECT_NE(result.err.find("\rstep 100, "), std::string::npos) << result.err;
  EXPECT_EQ(result.err.substr(result.err.size() - 4), "\r\x1b[K");
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 0);
  EXPECT_EQ(RunDriver(SmallRun() + std::vector<std::string>{"--quiet"}, {.terminal = true}).err, "");
}

// Only a GPU that is not there is a reason to run elsewhere, and the reason is given.
TEST(Driver, AutoTakesTheHostWhereThereIsNoGpuAndSaysWhy) {
  const DriverResult result = RunDriver(SmallRun() + std::vector<std::string>{"--device=auto"});
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  if (result.report["device"].text.rfind("host", 0) != 0) GTEST_SKIP() << "there is a GPU";
  EXPECT_EQ(result.err.rfind("replay_driver: --device=auto takes the host: ", 0), 0u) << result.err;
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  EXPECT_EQ(RunDriver(SmallRun() + std::vector<std::string>{"--device=auto", "--quiet"}).err, "");
}

TEST(Driver, ARequestThatCouldNeverFitIsRefusedCountedAndNamed) {
  const TemporaryFile trace(".csv", std::string(kHeader) +
                                        "2023-11-16 18:17:03.00,32768,1\n"
                                        "2023-11-16 18:17:03.30,0,2\n");
  const DriverResult result =
      RunDriver(SmallModel() + std::vector<std::string>{"--device=host", "--trace=" + trace.path()});
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_EQ(result.report["requests_refused"].number, 1);
  EXPECT_EQ(result.err, "replay_driver: refused: request 0 needs 32769 pages; the pool has 32768\n");
  EXPECT_EQ(result.report["requests_finished"].number, 1);
}

TEST(Driver, TheSameSeedGivesTheSameRun) {
  const auto facts = [](const std::string& seed) {
    const DriverResult result = RunDriver(SmallRun() + std::vector<std::string>{"--seed=" + seed});
    EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
    std::vector<double> values;
    for (const char* name : {"tokens", "bucket_changes", "replays", "truth_rows", "max_rel_rms", "restored_bytes"}) {
      values.push_back(result.report[name].number);
    }
    return values;
  };
  EXPECT_EQ(facts("11"), facts("11"));
  EXPECT_NE(facts("11"), facts("12"));
}

TEST(Driver, RepeatServesTheRequestsAgainWithTheSameGraphs) {
  const DriverResult once = RunDriver(SmallRun());
  const DriverResult thrice = RunDriver(SmallRun() + std::vector<std::string>{"--repeat=3"});
  EXPECT_EQ(thrice.code, ExitCode::kOk) << thrice.err;
  for (const char* name : {"steps", "replays", "tokens", "requests_finished"}) {
    EXPECT_EQ(thrice.report[name].number, 3 * once.report[name].number) << name;
  }
  EXPECT_EQ(thrice.report["captures"].number, once.report["captures"].number);
}

// What an engine's next plan would trip over: kv_indptr_ws[2] is 0 once the replay is done.
absl::Status DamageConvertedIndptr(Stream& stream, replay_driver::DecodeModel& model) {
  return stream.Fill(AsWritableBytes(model.kv_indptr_ws().live.Sub(2, 1)), std::byte{0});
}

TEST(Driver, ALivePlanReadsTheConversionsBuffer) {
  const DriverResult result = RunDriver(SmallRun() + std::vector<std::string>{"--plan-from=live", "--restore=off"},
                                        {.after_replay = DamageConvertedIndptr});
  EXPECT_EQ(result.code, ExitCode::kViolation);
  EXPECT_NE(result.err.find("step 1: the planner refused"), std::string::npos) << result.err;
  EXPECT_NE(result.err.find(" to 0 at index 2 (last written by graph decode"), std::string::npos) << result.err;
}

TEST(Driver, ARestoreOnTheStreamComesBeforeTheLivePlan) {
  const DriverResult result = RunDriver(SmallRun() + std::vector<std::string>{"--plan-from=live", "--restore=stream"},
                                        {.after_replay = DamageConvertedIndptr});
  EXPECT_NE(result.err.find("plan and conversion disagree"), std::string::npos) << result.err;
  EXPECT_EQ(result.report["steps"].number, 120);
}

TEST(Driver, APlanFromLengthsNeverReadsTheConversionsBuffer) {
  const DriverResult result = RunDriver(SmallRun() + std::vector<std::string>{"--restore=off", "--compare-eager=0"},
                                        {.after_replay = DamageConvertedIndptr});
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
}

// Every comparison of every kind of model: sizes that share nothing with the defaults.
struct Shape {
  const char* name;
  std::vector<std::string> args;
};
void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.name; }

class Shapes : public ::testing::TestWithParam<std::tuple<const char*, Shape>> {};
TEST_P(Shapes, AreCleanAndTrue) {
  const auto& [device, shape] = GetParam();
  if (std::string(device) == "cuda" && !GpuRequired()) {
    const absl::Status status = Cuda::Create().status();
    if (absl::IsUnavailable(status)) GTEST_SKIP() << status;
  }
  const DriverResult result =
      RunDriver(SmallRun() + shape.args + std::vector<std::string>{absl::StrCat("--device=", device)});
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_GT(result.report["truth_rows"].number, 0);
}
#ifdef PRISTINE_HAS_CUDA
const auto kDevices = ::testing::Values("host", "cuda");
#else
const auto kDevices = ::testing::Values("host");
#endif
INSTANTIATE_TEST_SUITE_P(
    Table, Shapes,
    ::testing::Combine(
        kDevices, ::testing::Values(Shape{"BFloat16", {"--dtype=bfloat16"}}, Shape{"PagesOf16", {"--page-size=16"}},
                                    Shape{"PagesOf7AndBFloat16", {"--page-size=7", "--dtype=bfloat16"}},
                                    Shape{"HeadDim128", {"--head-dim=128"}}, Shape{"ThreeSparseLayers", {"--layers=4"}},
                                    Shape{"OneGroup", {"--kv-groups=1"}},
                                    Shape{"FourGroups", {"--heads=8", "--kv-heads=4", "--kv-groups=4"}},
                                    Shape{"DenseLen", {"--dense-len=200"}},
                                    Shape{"OddBuckets", {"--max-batch=7", "--buckets=3,7"}},
                                    Shape{"OneAtATime", {"--max-batch=1"}}, Shape{"CheckAlways", {"--check=always"}},
                                    Shape{"CheckOff", {"--check=off"}}, Shape{"PlannedByTheHost", {"--scheduler=host"}},
                                    Shape{"PlannedByTheHostInBFloat16", {"--scheduler=host", "--dtype=bfloat16"}},
                                    Shape{"WindowOf1", {"--window=1"}}, Shape{"TightPool", {"--kv-tokens=8192"}})),
    [](const auto& param_info) {
      return std::string(std::get<1>(param_info.param).name) + "_" + std::get<0>(param_info.param);
    });

TEST(Driver, RunsOnADeviceThatStartsNothingBeforeSomebodyWaits) {
  const DriverResult result = RunDriver(SmallRun(), {.host_run = HostOptions::Run::kDeferred});
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
}

TEST(Driver, TwoDevicesOnTwoThreadsShareNothing) {
  std::vector<DriverResult> results(2);
  std::vector<std::thread> threads;
  for (DriverResult& result : results) {
    threads.emplace_back([&result] { result = RunDriver(SmallRun() + std::vector<std::string>{"--check=always"}); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const DriverResult& result : results) EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_EQ(results[0].report["max_rel_rms"].number, results[1].report["max_rel_rms"].number);
}

TEST(Driver, TheDefaultRunChangesBucketsAHundredTimes) {
  const DriverResult result =
      RunDriver(SmallModel() + std::vector<std::string>{"--device=host", "--max-batch=32", "--kv-tokens=131072"});
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_EQ(result.report["steps"].number, 1500);
  EXPECT_GE(result.report["bucket_changes"].number, 100);
}

}  // namespace
}  // namespace pristine::testing
