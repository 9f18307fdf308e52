// The bug and its cure: every way to plan with every way to restore, on every device there is.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
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
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
    EXPECT_NE(result.err.find("kv_indptr_ws"), std::string::npos) << result.err;
    long step, before, before_at, before_bucket, before_replay, after, after_at, after_bucket, after_replay;
    long planner_before, planner_before_at, planner_after, planner_after_at;
    ASSERT_EQ(
        std::sscanf(result.err.c_str(),
                    "replay_driver: step %ld: the planner refused %*[^,], which falls from %ld at index %ld (last "
                    "written by graph decode {%ld requests, %*d tokens} in replay %ld) to %ld at index %ld (last "
                    "written by graph decode {%ld requests, %*d tokens} in replay %ld)",
                    &step, &before, &before_at, &before_bucket, &before_replay, &after, &after_at, &after_bucket,
                    &after_replay),
        9)
        << result.err;
    EXPECT_GT(before, after);
    EXPECT_EQ(before_at + 1, after_at);
    EXPECT_LT(before_bucket, after_bucket) << "a smaller batch wrote over a larger one's values";
    EXPECT_GT(before_replay, after_replay);
    EXPECT_LT(step, 500);
    EXPECT_EQ(result.report["steps"].number, step + 1);
    EXPECT_LE(result.report["first_failure_step"].number, step);
    // The planner's own words.
    const size_t words = result.err.find("kv_indptr falls from");
    ASSERT_NE(words, std::string::npos) << result.err;
    ASSERT_EQ(std::sscanf(result.err.c_str() + words, "kv_indptr falls from %ld at %ld to %ld at %ld", &planner_before,
                          &planner_before_at, &planner_after, &planner_after_at),
              4)
        << result.err;
    EXPECT_EQ(planner_before, before);
    EXPECT_EQ(planner_before_at, before_at);
    EXPECT_EQ(planner_after, after);
    EXPECT_EQ(planner_after_at, after_at);
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
