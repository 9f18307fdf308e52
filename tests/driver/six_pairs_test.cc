// The bug and its cure: every way to plan with every way to restore, on every device there is.
#include <gtest/gtest.h>

#include <algorithm>
#include <regex>
#include <string>
#include <vector>

#include "pristine/graph_runtime/device.h"
#include "tests/driver/run_driver.h"
#include "tests/driver/traces.h"
#include "tests/support/backends.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class SixPairs : public DeviceTest<BackendT> {
 protected:
  // 1,000 steps that replay, of the small model or with `more`.
  DriverResult Run(const std::string& plan_from, const std::string& restore,
                   const std::vector<std::string>& more = {}) {
    DriverSetting setting;
    if (std::string(BackendT::kName) == "HostDeferred") setting.host_run = HostOptions::Run::kDeferred;
    const std::string device = this->device_->backend() == Backend::kHost ? "host" : "cuda";
    return RunDriver(SmallModel() +
                         std::vector<std::string>{"--steps=1001", "--device=" + device, "--plan-from=" + plan_from,
                                                  "--restore=" + restore} +
                         more,
                     setting);
  }
  void ExpectClean(const DriverResult& result) {
    EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
    EXPECT_GE(result.report["replays"].number, 1000);
    EXPECT_EQ(result.report["plan_mismatch_steps"].number, 0);
    EXPECT_EQ(result.report["same_mismatches"].number, 0);
    EXPECT_EQ(result.report["truth_mismatches"].number, 0);
    EXPECT_GT(result.report["truth_rows"].number, 0);
    EXPECT_EQ(result.report["pollutions_total"].number, 0);
    EXPECT_EQ(result.report["invariant_violations_total"].number, 0);
  }
  // The plan never falls, but it is not the one that the kernels' lengths ask for.
  void ExpectDisagreement(const DriverResult& result) {
    EXPECT_EQ(result.code, ExitCode::kViolation) << result.err;
    EXPECT_GE(result.report["replays"].number, 1000);
    EXPECT_GT(result.report["plan_mismatch_steps"].number, 0);
    EXPECT_EQ(result.report["same_mismatches"].number, 0) << "an eager run of the same plan is wrong alike";
    EXPECT_EQ(result.report["pollutions_total"].number, 0);
    EXPECT_EQ(result.report["invariant_violations_total"].number, 0);
    EXPECT_NE(result.err.find("plan and conversion disagree"), std::string::npos) << result.err;
  }
  void ExpectRefusal(const DriverResult& result) {
    EXPECT_EQ(result.code, ExitCode::kViolation);
    const std::regex line(
        "replay_driver: step (\\d+): the planner refused (\\S*)kv_indptr_ws, which falls from (\\d+) at index (\\d+) "
        "\\(last written by graph decode \\{(\\d+) requests, \\d+ tokens\\} in replay (\\d+)\\) to (\\d+) at index "
        "(\\d+) \\(last written by graph decode \\{(\\d+) requests, \\d+ tokens\\} in replay (\\d+)\\): .*kv_indptr "
        "falls from (\\d+) at (\\d+) to (\\d+) at (\\d+).*\n");
    std::smatch match;
    ASSERT_TRUE(std::regex_match(result.err, match, line)) << result.err;  // one line
    const auto number = [&match](int group) { return std::stol(match[group]); };
    EXPECT_GT(number(3), number(7));
    EXPECT_EQ(number(4) + 1, number(8));
    EXPECT_LT(number(5), number(9)) << "a smaller batch wrote over a larger one's values";
    EXPECT_GT(number(6), number(10));
    // The planner's own words.
    EXPECT_EQ(number(3), number(11));
    EXPECT_EQ(number(4), number(12));
    EXPECT_EQ(number(7), number(13));
    EXPECT_EQ(number(8), number(14));
    EXPECT_EQ(result.report["first_failure_step"].number, number(1));
    EXPECT_LT(number(1), 500);
  }
};
TYPED_TEST_SUITE(SixPairs, AllBackends, BackendNames);

TYPED_TEST(SixPairs, LengthsAndGraphIsClean) { this->ExpectClean(this->Run("lengths", "graph")); }
TYPED_TEST(SixPairs, LengthsAndStreamIsClean) { this->ExpectClean(this->Run("lengths", "stream")); }
TYPED_TEST(SixPairs, LengthsAndOffIsClean) { this->ExpectClean(this->Run("lengths", "off")); }
TYPED_TEST(SixPairs, LiveAndGraphDisagrees) { this->ExpectDisagreement(this->Run("live", "graph")); }
TYPED_TEST(SixPairs, LiveAndStreamDisagrees) { this->ExpectDisagreement(this->Run("live", "stream")); }
TYPED_TEST(SixPairs, LiveAndOffIsRefusedByThePlanner) { this->ExpectRefusal(this->Run("live", "off")); }

// A trace from production, at the sizes of the main job.
TYPED_TEST(SixPairs, LiveAndOffIsRefusedWithin500StepsOfTheAzureTrace) {
  const std::string path = TracePath("azure_llm_2023_code.csv");
  if (path.empty()) GTEST_SKIP() << kNoTraces;
  this->ExpectRefusal(this->Run("live", "off",
                                {"--trace=" + path, "--max-batch=32", "--kv-tokens=131072", "--sparse-block=64",
                                 "--topk-blocks=96", "--window=512", "--compare-eager=0"}));
}

// Minutes on Host: only where there is a GPU.
TYPED_TEST(SixPairs, TheWholeAzureTraceOnAGpu) {
  if (this->device_->backend() == Backend::kHost) GTEST_SKIP() << "minutes on Host";
  const std::string path = TracePath("azure_llm_2023_code.csv");
  if (path.empty()) GTEST_SKIP() << kNoTraces;
  const std::vector<std::string> whole = {"--trace=" + path,    "--steps=1000000",    "--max-batch=32",
                                          "--kv-tokens=131072", "--sparse-block=64",  "--topk-blocks=96",
                                          "--window=512",       "--compare-eager=500"};
  for (const char* restore : {"graph", "stream", "off"}) {
    const DriverResult clean = this->Run("lengths", restore, whole);
    this->ExpectClean(clean);
    EXPECT_GT(clean.report["bucket_changes"].number, 1000);
    EXPECT_EQ(clean.report["requests_finished"].number, 8819);
  }
  this->ExpectDisagreement(this->Run("live", "graph", whole));
  this->ExpectDisagreement(this->Run("live", "stream", whole));
  this->ExpectRefusal(this->Run("live", "off", whole));
}

}  // namespace
}  // namespace pristine::testing
