// The bug and its cure: every way to plan with every way to restore, on every device there is.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "examples/replay_driver/options.h"
#include "examples/replay_driver/scheduler.h"
#include "examples/replay_driver/trace.h"
#include "pristine/attention/sparse_page_table.h"
#include "pristine/graph_runtime/device.h"
#include "tests/driver/run_driver.h"
#include "tests/driver/traces.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using Args = std::vector<std::string>;

// The steps that replay with a plan that is not the one of its lengths, found without a device, a plan or a buffer:
// what kv_indptr_ws holds after each replay follows from who was active.
int64_t StepsThatDisagree(const Args& args, bool restored_before_the_read) {
  const absl::StatusOr<replay_driver::Options> options = replay_driver::ParseOptions(args);
  EXPECT_TRUE(options.ok()) << options.status();
  absl::StatusOr<std::vector<replay_driver::TraceRequest>> trace =
      options->synthetic() ? replay_driver::SyntheticTrace(
                                 options->seed, options->step_limit() * options->step_ms * replay_driver::kTicksPerMs)
                           : replay_driver::ReadTrace(options->trace, options->format);
  EXPECT_TRUE(trace.ok()) << trace.status();
  replay_driver::Scheduler scheduler(*trace, {.step_ticks = options->step_ms * replay_driver::kTicksPerMs,
                                              .step_limit = options->step_limit(),
                                              .max_batch = options->max_batch,
                                              .page_size = options->page_size,
                                              .pool_pages = options->kv_tokens / options->page_size,
                                              .seed = options->seed});
  const attention::SparseConfig sparse = {.groups = options->kv_groups,
                                          .block = options->sparse_block,
                                          .topk = options->topk_blocks,
                                          .dense_len = options->dense_len};
  std::vector<int64_t> original(static_cast<size_t>(options->max_batch) * sparse.groups + 1);
  for (size_t i = 0; i < original.size(); ++i) original[i] = static_cast<int64_t>(i) * SparseRowBound(sparse);
  std::vector<int64_t> live = original;
  int64_t steps = 0;
  while (scheduler.NextStep()) {
    const auto active = scheduler.active();
    if (active.empty()) continue;
    bool disagrees = false;
    std::vector<int64_t> converted = original;
    const int32_t bucket =
        *std::lower_bound(options->buckets.begin(), options->buckets.end(), static_cast<int32_t>(active.size()));
    for (int32_t row = 0; row < bucket * sparse.groups; ++row) {
      const size_t request = row / sparse.groups;
      const int64_t length = request < active.size() ? SparseRowLength(sparse, active[request].length) : 0;
      converted[row + 1] = row == 0 ? length : converted[row] + length;
      disagrees = disagrees || (request < active.size() && live[row + 1] - live[row] != length);
    }
    steps += disagrees;
    if (!restored_before_the_read) live = converted;
  }
  return steps;
}

template <class BackendT>
class SixPairs : public DeviceTest<BackendT> {
 protected:
  // 1,000 steps that replay, of the small model.
  static Args Small() { return SmallModel() + Args{"--steps=1001"}; }

  DriverResult Run(const std::string& plan_from, const std::string& restore, const Args& args = Small()) {
    DriverSetting setting;
    if (std::string(BackendT::kName) == "HostDeferred") setting.host_run = HostOptions::Run::kDeferred;
    const std::string device = this->device_->backend() == Backend::kHost ? "host" : "cuda";
    return RunDriver(args + Args{"--device=" + device, "--plan-from=" + plan_from, "--restore=" + restore}, setting);
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
  // The plan never falls, but it is not the one that the kernels' lengths ask for: each step in which it is not counts.
  DriverResult ExpectDisagreement(const std::string& restore, const Args& args = Small()) {
    const DriverResult result = Run("live", restore, args);
    EXPECT_EQ(result.code, ExitCode::kViolation) << result.err;
    EXPECT_GE(result.report["replays"].number, 1000);
    const int64_t expected = StepsThatDisagree(args, restore == "stream");
    EXPECT_GT(expected, 500);
    EXPECT_EQ(result.report["plan_mismatch_steps"].number, expected);
    EXPECT_EQ(result.report["same_mismatches"].number, 0) << "an eager run of the same plan is wrong alike";
    EXPECT_EQ(result.report["pollutions_total"].number, 0);
    EXPECT_EQ(result.report["invariant_violations_total"].number, 0);
    EXPECT_NE(result.err.find("plan and conversion disagree"), std::string::npos) << result.err;
    return result;
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
TYPED_TEST(SixPairs, LiveAndGraphDisagrees) { this->ExpectDisagreement("graph"); }
TYPED_TEST(SixPairs, LiveAndStreamDisagrees) { this->ExpectDisagreement("stream"); }
TYPED_TEST(SixPairs, LiveAndOffIsRefusedByThePlanner) { this->ExpectRefusal(this->Run("live", "off")); }

// Seconds where the host's kernels are optimised, else minutes.
TYPED_TEST(SixPairs, LiveAndOffIsRefusedWithin500StepsOfTheDefaultRun) {
#if !defined(__OPTIMIZE__) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  this->ExpectRefusal(this->Run("live", "off", SmallModel()));
#else
  this->ExpectRefusal(this->Run("live", "off", {}));
#endif
}

// A trace from production, at the sizes of the main job.
TYPED_TEST(SixPairs, LiveAndOffIsRefusedWithin500StepsOfTheAzureTrace) {
  const std::string path = TracePath("azure_llm_2023_code.csv");
  if (path.empty()) GTEST_SKIP() << kNoTraces;
  this->ExpectRefusal(this->Run("live", "off", {"--trace=" + path, "--compare-eager=0"}));
}

// Minutes on Host: only where there is a GPU.
TYPED_TEST(SixPairs, TheWholeAzureTraceOnAGpu) {
  if (this->device_->backend() == Backend::kHost) GTEST_SKIP() << "minutes on Host";
  const std::string path = TracePath("azure_llm_2023_code.csv");
  if (path.empty()) GTEST_SKIP() << kNoTraces;
  const Args whole = {"--trace=" + path, "--compare-eager=500"};
  ASSERT_OK_AND_ASSIGN(const auto trace, replay_driver::ReadTrace(path, replay_driver::TraceFormat::kAzureCsv));
  const double requests = static_cast<double>(trace.size());
  for (const char* restore : {"graph", "stream", "off"}) {
    const DriverResult clean = this->Run("lengths", restore, whole);
    this->ExpectClean(clean);
    EXPECT_GT(clean.report["bucket_changes"].number, 1000);
    EXPECT_EQ(clean.report["requests_finished"].number, requests);
    EXPECT_EQ(clean.report["requests_refused"].number, 0);
  }
  for (const char* restore : {"graph", "stream"}) {
    const DriverResult wrong = this->ExpectDisagreement(restore, whole);
    EXPECT_EQ(wrong.report["requests_finished"].number, requests) << "the run did not reach its end";
  }
  this->ExpectRefusal(this->Run("live", "off", whole));
}

}  // namespace
}  // namespace pristine::testing
