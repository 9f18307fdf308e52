// --model=hybrid: states by slot, through arrivals and departures, and what the comparisons see of them.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/gdn_compare.h"
#include "examples/replay_driver/gdn_layers.h"
#include "pristine/graph_runtime/stream.h"
#include "tests/driver/run_driver.h"
#include "tests/support/backends.h"
#include "tests/support/gdn_truth.h"
#include "tests/support/truth.h"

namespace pristine::testing {
namespace {

using replay_driver::DecodeModel;
using replay_driver::GdnConfig;
using replay_driver::GdnElement;
using replay_driver::GdnKey;
using replay_driver::GdnTensor;
using replay_driver::ModelConfig;
using replay_driver::TrueGdn;

// Contexts from none on, one of more than a chunk; more requests than slots.
constexpr char kTrace[] =
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.000,9,10\n"
    "2023-11-16 18:17:03.050,0,8\n"
    "2023-11-16 18:17:03.100,3,4\n"
    "2023-11-16 18:17:03.110,70,5\n"
    "2023-11-16 18:17:03.200,1,5\n"
    "2023-11-16 18:17:03.400,2,3\n"
    "2023-11-16 18:17:03.500,12,6\n";
constexpr int kRequests = 7;

class Hybrid : public ::testing::TestWithParam<HostOptions::Run> {
 protected:
  DriverResult Serve(const std::vector<std::string>& more, DriverSetting setting = {}) {
    setting.host_run = GetParam();
    return RunDriver(Args() + std::vector<std::string>{"--device=host"} + more, setting);
  }
  std::vector<std::string> Args() const {
    return {"--model=hybrid",    "--trace=" + trace_.path(), "--max-batch=3", "--kv-tokens=1024",
            "--sparse-block=32", "--topk-blocks=2",          "--window=64"};
  }
  static void ExpectClean(const DriverResult& result) {
    EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
    EXPECT_EQ(result.report["model"].text, "hybrid");
    EXPECT_EQ(result.report["same_mismatches"].number, 0);
    EXPECT_EQ(result.report["truth_mismatches"].number, 0);
    EXPECT_GT(result.report["truth_rows"].number, 250);
    EXPECT_EQ(result.report["state_slots_handed_out"].number, kRequests);
  }
  const TemporaryFile trace_{".csv", kTrace};
};
INSTANTIATE_TEST_SUITE_P(Table, Hybrid, ::testing::Values(HostOptions::Run::kEager, HostOptions::Run::kDeferred),
                         [](const auto& param_info) {
                           return std::string(param_info.param == HostOptions::Run::kEager ? "Eager" : "Deferred");
                         });

TEST_P(Hybrid, EveryStepIsTrueAndEqualsAnEagerRun) { ExpectClean(Serve({"--compare-eager=1", "--check=always"})); }

TEST_P(Hybrid, InBFloat16WithOtherHeadsToo) {
  ExpectClean(
      Serve({"--compare-eager=2", "--dtype=bfloat16", "--gdn-qk-heads=2", "--gdn-v-heads=2", "--compare-rows=64"}));
}

// The slot of a request that is done goes to the next one while steps of the first are still waiting.
TEST_P(Hybrid, StepsInFlightKeepTheirStates) { ExpectClean(Serve({"--compare-eager=2", "--overlap=on"})); }

// Drafts are verified and leave the states alone; those that hold are committed.
TEST_P(Hybrid, SpeculationToo) {
  for (const char* extend : {"--draft-extend=ragged", "--draft-extend=fixed"}) {
    ExpectClean(Serve({"--spec=3", "--compare-eager=2", "--check=always", extend}));
  }
  ExpectClean(Serve({"--spec=2", "--compare-eager=2", "--dtype=bfloat16", "--accept=all"}));
}

TEST_P(Hybrid, ASecondRoundStartsFromNothing) {
  const DriverResult result = Serve({"--compare-eager=3", "--steps=12", "--repeat=2"});  // the first is cut short
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_GT(result.report["truth_rows"].number, 0);
}

TEST_P(Hybrid, AByteOfALiveStateThatChangesIsFoundByBothComparisons) {
  int replays = 0;
  const auto damage = [&replays](Stream& stream, DecodeModel& model) {
    if (++replays != 4) return absl::OkStatus();
    // The last slot that is handed out: some request has it, in its first layer.
    const attention::gdn::StateView view = model.gdn().pool().view(0);
    const size_t slot_bytes = static_cast<size_t>(view.slot_stride) * sizeof(float);
    return stream.Fill(view.states.Sub(slot_bytes + 3, 1), std::byte{0x41});
  };
  const DriverResult result = Serve({"--compare-eager=1", "--compare-rows=1000"}, {.after_replay = damage});
  EXPECT_EQ(result.code, ExitCode::kMismatch);
  EXPECT_EQ(result.report["same_mismatches"].number, 1) << "the later steps start from the same states";
  EXPECT_GT(result.report["truth_mismatches"].number, 0);
  EXPECT_NE(result.err.find("the states of GDN layer 0 in slot 1 differ"), std::string::npos) << result.err;
}

TEST_P(Hybrid, AWriteToSlotZeroIsReportedByName) {
  const auto damage = [](Stream& stream, DecodeModel& model) {
    return stream.Fill(model.gdn().pool().view(0).states.Sub(8, 1), std::byte{1});
  };
  const DriverResult result = Serve({"--compare-eager=0", "--check=always"}, {.after_replay = damage});
  EXPECT_EQ(result.code, ExitCode::kViolation);
  EXPECT_NE(result.err.find("gdn_states.slot0"), std::string::npos) << result.err;
}

TEST_P(Hybrid, WhatItDoesNotGoWithIsUsage) {
  const DriverResult inject = Serve({"--inject=stale-plan", "--scheduler=host"});
  EXPECT_EQ(inject.code, ExitCode::kUsage);
  EXPECT_NE(inject.err.find("--inject=stale-plan with --model=hybrid: expected none"), std::string::npos) << inject.err;
  const DriverResult heads = Serve({"--gdn-qk-heads=2", "--gdn-v-heads=3"});
  EXPECT_EQ(heads.code, ExitCode::kUsage);
  EXPECT_NE(heads.err.find("--gdn-v-heads=3: expected a multiple of --gdn-qk-heads, which is 2"), std::string::npos)
      << heads.err;
}

TEST_P(Hybrid, ATuningVariableThatNothingIsCompiledForIsUsageWhereItCounts) {
  for (const char* const value : {"7", "many"}) {
    ASSERT_EQ(setenv("PRISTINE_GDN_CHUNK_H_BV", value, 1), 0);
    const DriverResult tuned = Serve({"--dtype=bfloat16"}), other = Serve({});
    ASSERT_EQ(unsetenv("PRISTINE_GDN_CHUNK_H_BV"), 0);
    EXPECT_EQ(tuned.code, ExitCode::kUsage);
    EXPECT_NE(tuned.err.find("PRISTINE_GDN_CHUNK_H_"), std::string::npos) << tuned.err;
    EXPECT_EQ(other.code, ExitCode::kOk) << other.err;  // float32 has no prefill
  }
}

#ifdef PRISTINE_HAS_CUDA
TEST(HybridCuda, EveryStepIsTrueAndEqualsAnEagerRun) {
  if (!GpuRequired()) {
    const absl::Status status = Cuda::Create().status();
    if (absl::IsUnavailable(status)) GTEST_SKIP() << status;
  }
  for (const char* dtype : {"--dtype=float32", "--dtype=bfloat16"}) {
    for (const char* how : {"--overlap=off", "--overlap=on", "--spec=4"}) {
      const DriverResult result = RunDriver(
          {"--device=cuda", "--model=hybrid", "--steps=300", "--compare-eager=20", "--compare-rows=24", dtype, how});
      EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
      EXPECT_EQ(result.report["truth_mismatches"].number, 0);
      EXPECT_GT(result.report["state_slots_handed_out"].number, 0);
      EXPECT_GT(result.report["requests_finished"].number, 0);
    }
  }
}
#endif

// The truth goes back from the last token; here is the definition, which goes forward.
TEST(TrueGdnTest, IsTheRecurrenceOverConvolvedInputs) {
  ModelConfig config;
  config.seed = 9;
  config.gdn = {.layers = 3, .qk_heads = 2, .v_heads = 4};
  const GdnConfig& gdn = config.gdn;
  constexpr int32_t kRequest = 5, kLayer = 2, kLength = 40;
  std::vector<std::vector<double>> convolved;
  const auto number = [&](GdnTensor tensor, int32_t request, int32_t position, int32_t index) {
    return static_cast<double>(GdnElement(GdnKey(config.seed, request, kLayer, position, tensor), tensor, index));
  };
  for (int32_t t = 0; t < kLength; ++t) {
    std::vector<double>& y = convolved.emplace_back();
    for (int32_t c = 0; c < gdn.dim(); ++c) {
      double sum = 0;
      for (int32_t j = 0; j < 4; ++j) {
        const int32_t from = t - 3 + j;
        if (from < 0) continue;
        sum += number(GdnTensor::kWeight, 0, 0, 4 * c + j) * number(GdnTensor::kMixed, kRequest, from, c);
      }
      y.push_back(static_cast<float>(sum / (1 + std::exp(-sum))));
    }
  }
  for (int32_t head = 0; head < gdn.v_heads; ++head) {
    std::vector<double> state(static_cast<size_t>(kGdnDim * kGdnDim)), out(kGdnDim);
    for (int32_t t = 0; t < kLength; ++t) {
      const double* const y = convolved[static_cast<size_t>(t)].data();
      const int32_t qk = head / 2 * kGdnDim;
      GdnStep({y + qk, y + gdn.qk_dim() + qk, y + 2 * gdn.qk_dim() + head * kGdnDim,
               number(GdnTensor::kA, kRequest, t, head), number(GdnTensor::kB, kRequest, t, head),
               number(GdnTensor::kALog, 0, 0, head), number(GdnTensor::kDtBias, 0, 0, head)},
              state, out.data());
      if (t % 13 != 0) continue;
      EXPECT_LT(RelativeRms(out, TrueGdn(config, {kRequest, t + 1}, kLayer, head).out), 1e-12) << "token " << t;
    }
  }
}

}  // namespace
}  // namespace pristine::testing
