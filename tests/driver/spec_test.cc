// replay_driver --spec=T on every device there is: each step of each round is compared with an eager run of itself, bit
// for bit, and with float64 attention over the tokens that held.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/device.h"
#include "tests/driver/run_driver.h"
#include "tests/driver/traces.h"
#include "tests/support/backends.h"

namespace pristine::testing {
namespace {

struct Served {
  std::string csv = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
  int requests = 0, tokens = 0;
};

// Short requests of all kinds that come one after the other, so that they enter and finish while others run.
Served ShortRequests(int count, uint32_t seed) {
  Served served;
  std::mt19937 random(seed);
  for (int i = 0; i < count; ++i) {
    const int context = i == 1 ? 0 : static_cast<int>(random() % 70);
    const int generated = i == 2 ? 1 : 1 + static_cast<int>(random() % 24);
    absl::StrAppend(&served.csv, "2023-11-16 18:17:", i / 10, i % 10, ".0000000,", context, ",", generated, "\n");
    ++served.requests;
    served.tokens += generated;
  }
  return served;
}

template <class BackendT>
class SpecTest : public DeviceTest<BackendT> {
 protected:
  bool on_host() const { return this->device_->backend() == Backend::kHost; }
  DriverResult Run(const Served& served, const std::vector<std::string>& args) {
    const TemporaryFile trace(".csv", served.csv);
    DriverSetting setting;
    if (std::string(BackendT::kName) == "HostDeferred") setting.host_run = HostOptions::Run::kDeferred;
    return RunDriver(
        std::vector<std::string>{"--max-batch=4", "--kv-tokens=1024", "--window=16", "--step-ms=300",
                                 "--compare-eager=1", "--compare-rows=6", "--check=always",
                                 on_host() ? "--device=host" : "--device=cuda", "--trace=" + trace.path()} +
            args,
        setting);
  }
};
TYPED_TEST_SUITE(SpecTest, AllBackends, BackendNames);

double Count(const DriverResult& result, const char* field) { return result.report["spec"][field].number; }

void ExpectClean(const DriverResult& result) {
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_EQ(result.report["same_mismatches"].number, 0);
  EXPECT_EQ(result.report["truth_mismatches"].number, 0);
  EXPECT_GT(result.report["truth_rows"].number, 0);
  EXPECT_EQ(result.report["pollutions_total"].number, 0);
  EXPECT_EQ(result.report["invariant_violations_total"].number, 0);
}

// What the counts must be, whatever was accepted.
void ExpectRounds(const DriverResult& result, int drafts) {
  const double rounds = Count(result, "rounds");
  const std::vector<Json>& phases = result.report["spec"]["phases"].array;
  ASSERT_EQ(phases.size(), 3u);
  EXPECT_EQ(phases[0]["replays"].number, drafts * rounds);
  EXPECT_EQ(phases[1]["replays"].number, rounds);
  EXPECT_EQ(phases[2]["replays"].number, rounds);
  EXPECT_EQ(result.report["replays"].number, (drafts + 2) * rounds);
  EXPECT_EQ(Count(result, "draft_tokens"), drafts);
  EXPECT_EQ(Count(result, "accepted") + Count(result, "rolled_back"), Count(result, "drafted"));
  EXPECT_EQ(Count(result, "accepted"), result.report["tokens"].number);
  const std::vector<Json>& counts = result.report["spec"]["accepted_counts"].array;
  ASSERT_EQ(counts.size(), static_cast<size_t>(drafts + 1));
  double times = 0, accepted = 0;
  for (int i = 0; i <= drafts; ++i) {
    times += counts[i].number;
    accepted += i * counts[i].number;
  }
  EXPECT_EQ(times * drafts, Count(result, "drafted"));
  EXPECT_EQ(accepted, Count(result, "accepted"));
}

TYPED_TEST(SpecTest, EveryStepOfEveryRoundIsTrueAndEqualsAnEagerRun) {
  for (const int drafts : {2, 4, 8}) {
    SCOPED_TRACE(drafts);
    const Served served = ShortRequests(9, 3);
    const DriverResult result = this->Run(served, {absl::StrCat("--spec=", drafts)});
    ExpectClean(result);
    ExpectRounds(result, drafts);
    EXPECT_EQ(result.report["requests_finished"].number, served.requests);
    EXPECT_EQ(result.report["tokens"].number, served.tokens);
    EXPECT_GT(result.report["bucket_changes"].number, 0);
    for (const Json& count : result.report["spec"]["accepted_counts"].array) EXPECT_GT(count.number, 0);
  }
}

TYPED_TEST(SpecTest, SoItIsInBFloat16WithLargerPagesAndTheMostDrafts) {
  const Served served = ShortRequests(5, 5);
  const DriverResult result =
      this->Run(served, {"--spec=16", "--dtype=bfloat16", "--page-size=8", "--heads=8", "--layers=3"});
  ExpectClean(result);
  ExpectRounds(result, 16);
  EXPECT_EQ(result.report["tokens"].number, served.tokens);
}

// Draft steps and verify planned on the host, whose decode is followed by a merge of its own.
TYPED_TEST(SpecTest, SoItIsWithPlansOfTheHost) {
  const Served served = ShortRequests(5, 7);
  const DriverResult result = this->Run(served, {"--spec=4", "--scheduler=host"});
  ExpectClean(result);
  ExpectRounds(result, 4);
  EXPECT_EQ(result.report["tokens"].number, served.tokens);
  const std::vector<Json>& phases = result.report["spec"]["phases"].array;
  for (size_t i = 0; i < phases.size(); ++i) {
    const std::vector<Json>& kernels = phases[i]["kernels"].array;
    const auto merges = [](const Json& kernel) { return kernel.text.rfind("merge_states", 0) == 0; };
    EXPECT_EQ(std::any_of(kernels.begin(), kernels.end(), merges), i < 2) << "phase " << i;
  }
}

// As many tokens for each request: through either family the same attention.
TYPED_TEST(SpecTest, AFixedDraftExtendTakesEitherFamily) {
  const Served served = ShortRequests(5, 6);
  for (const bool decode : {false, true}) {
    const DriverResult result =
        this->Run(served, {"--spec=3", decode ? "--draft-extend=fixed-decode" : "--draft-extend=fixed"});
    ExpectClean(result);
    ExpectRounds(result, 3);
    EXPECT_EQ(result.report["tokens"].number, served.tokens);
    EXPECT_EQ(result.report["spec"]["phases"].array[2]["family"].text, decode ? "decode" : "context");
  }
}

TYPED_TEST(SpecTest, TheReportNamesEachModesKernels) {
  const DriverResult result = this->Run(ShortRequests(2, 1), {"--spec=4"});
  const std::vector<Json>& phases = result.report["spec"]["phases"].array;
  ASSERT_EQ(phases.size(), 3u) << result.err;
  const char* const expected[3][3] = {{"decode", "decode", "paged_decode_float32_64"},
                                      {"target_verify", "decode", "target_verify_float32_64"},
                                      {"draft_extend", "context", "paged_prefill_float32_64"}};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(phases[i]["mode"].text, expected[i][0]);
    EXPECT_EQ(phases[i]["family"].text, expected[i][1]);
    int attends = 0;
    for (const Json& kernel : phases[i]["kernels"].array) {
      if (kernel.text.find("_float32_64") == std::string::npos) continue;
      ++attends;
      EXPECT_EQ(kernel.text.rfind(expected[i][2], 0), 0u) << kernel.text;
    }
    EXPECT_EQ(attends, 1);
  }
}

// Nobody gets on, and the slots of each round's drafts are those of the next round's.
TYPED_TEST(SpecTest, WhereNoDraftHoldsEveryRoundIsRolledBack) {
  const DriverResult result = this->Run(ShortRequests(4, 2), {"--spec=4", "--accept=none", "--steps=25"});
  ExpectClean(result);
  ExpectRounds(result, 4);
  EXPECT_EQ(Count(result, "accepted"), 0);
  EXPECT_EQ(Count(result, "rolled_back"), Count(result, "drafted"));
  EXPECT_EQ(result.report["tokens"].number, 0);
  EXPECT_EQ(result.report["requests_finished"].number, 0);
}

TYPED_TEST(SpecTest, WhereAllHoldRoundsAreAsFewAsCanBe) {
  Served served;
  absl::StrAppend(&served.csv, "2023-11-16 18:17:00.0000000,20,12\n2023-11-16 18:17:00.0000000,3,9\n");
  const DriverResult result = this->Run(served, {"--spec=4", "--accept=all"});
  ExpectClean(result);
  ExpectRounds(result, 4);
  EXPECT_EQ(result.report["tokens"].number, 21);
  EXPECT_EQ(result.report["requests_finished"].number, 2);
  EXPECT_EQ(Count(result, "rounds"), 3);
  EXPECT_EQ(Count(result, "rolled_back"), 3) << "of the second request's last round, which lacked one token";
}

// Prompts of thousands of tokens, at the sizes of the main job; on Host the trace's beginning.
TYPED_TEST(SpecTest, SoItIsOverTheAzureTrace) {
  const std::string path = TracePath("azure_llm_2023_code.csv");
  if (path.empty()) GTEST_SKIP() << kNoTraces;
  DriverSetting setting;
  if (std::string(TypeParam::kName) == "HostDeferred") setting.host_run = HostOptions::Run::kDeferred;
  const DriverResult result =
      RunDriver({"--trace=" + path, "--spec=4", "--compare-eager=20", "--check=always",
                 this->on_host() ? "--device=host" : "--device=cuda", this->on_host() ? "--steps=12" : "--steps=1500"},
                setting);
  ExpectClean(result);
  ExpectRounds(result, 4);
}

TYPED_TEST(SpecTest, AMisroutedDraftExtendIsRefusedTwiceAndTheRunGoesOn) {
  const Served served = ShortRequests(9, 3);
  const DriverResult result = this->Run(served, {"--spec=4", "--inject=misroute"});
  EXPECT_EQ(result.code, ExitCode::kViolation) << result.err;
  ASSERT_EQ(result.report["invariant_violations_total"].number, 2) << result.err;
  const std::string when_made = result.report["invariant_violations"].array[0].text;
  EXPECT_NE(when_made.find("route of draft_extend: q_len is 0 (requests differ): the decode kernels take"),
            std::string::npos)
      << when_made;
  EXPECT_NE(when_made.find("instead: decode_draft_extend off"), std::string::npos) << when_made;
  const std::string when_replayed = result.report["invariant_violations"].array[1].text;
  EXPECT_NE(when_replayed.find("query tokens; the decode kernels of a target_verify graph run 4 for every request"),
            std::string::npos)
      << when_replayed;
  EXPECT_EQ(result.report["first_failure_step"].kind, Json::Kind::kNumber);
  // All the rest is as if nothing had been.
  EXPECT_EQ(result.report["requests_finished"].number, served.requests);
  EXPECT_EQ(result.report["tokens"].number, served.tokens);
  EXPECT_EQ(result.report["same_mismatches"].number, 0);
  EXPECT_EQ(result.report["truth_mismatches"].number, 0);
  ExpectRounds(result, 4);
}

TYPED_TEST(SpecTest, AMisrouteThatNoRoundAllowsIsAnErrorOfItsOwn) {
  const DriverResult result =
      this->Run(ShortRequests(3, 2), {"--spec=4", "--inject=misroute", "--accept=all", "--steps=3"});
  EXPECT_EQ(result.code, ExitCode::kInternal);
  EXPECT_NE(result.err.find("--inject=misroute: no round of"), std::string::npos) << result.err;
}

TYPED_TEST(SpecTest, ARequestThatThePoolCannotHoldWithItsDraftsIsRefused) {
  Served served;
  absl::StrAppend(&served.csv, "2023-11-16 18:17:00.0000000,1000,24\n2023-11-16 18:17:00.0000000,1000,16\n");
  const DriverResult result = this->Run(served, {"--spec=8", "--compare-eager=50"});
  EXPECT_EQ(result.report["requests_refused"].number, 1) << result.err;
  EXPECT_EQ(result.report["requests_finished"].number, 1);
  EXPECT_EQ(result.report["refused"].array[0].text, "request 0 needs 1032 pages; the pool has 1024");
}

TYPED_TEST(SpecTest, TheSummarySaysWhatCameOfIt) {
  const DriverResult result = this->Run(ShortRequests(2, 1), {"--spec=2"});
  EXPECT_NE(result.out.find("speculation             2 drafts, ragged draft extend; "), std::string::npos)
      << result.out;
  EXPECT_NE(result.out.find("target_verify           "), std::string::npos) << result.out;
}

}  // namespace
}  // namespace pristine::testing
