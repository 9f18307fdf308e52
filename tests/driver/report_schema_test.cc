// Every report that the driver writes is what docs/replay_report.schema.json says, and the schema says no less.
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_join.h"
#include "tests/driver/json_schema.h"
#include "tests/driver/run_driver.h"

namespace pristine::testing {
namespace {

class ReportSchema : public ::testing::Test {
 protected:
  void SetUp() override {
    std::stringstream text;
    std::ifstream file(PRISTINE_REPORT_SCHEMA);
    if (!file) file.open("docs/replay_report.schema.json");  // run on another machine, in a copy of the tree
    text << file.rdbuf();
    ASSERT_TRUE(ParseJson(text.str(), schema_)) << PRISTINE_REPORT_SCHEMA;
    ASSERT_TRUE(schema_.has("properties"));
  }
  std::string Errors(const Json& report) { return absl::StrJoin(JsonSchema(schema_).Check(report), "\n"); }
  Json CleanReport() {
    return RunDriver(SmallModel() + std::vector<std::string>{"--device=host", "--steps=20", "--compare-eager=5"})
        .report;
  }
  Json schema_;
};

TEST_F(ReportSchema, HoldsForEveryKindOfOutcome) {
  const std::vector<std::string> small =
      SmallModel() + std::vector<std::string>{"--device=host", "--steps=60", "--compare-eager=10"};
  const struct {
    ExitCode code;
    std::vector<std::string> args;
  } runs[] = {
      {ExitCode::kOk, small},
      {ExitCode::kOk, small + std::vector<std::string>{"--spec=4", "--steps=5"}},
      {ExitCode::kViolation, small + std::vector<std::string>{"--spec=2", "--inject=misroute", "--compare-eager=0"}},
      {ExitCode::kInput, {"--trace=/nowhere/t.jsonl"}},
      {ExitCode::kViolation, small + std::vector<std::string>{"--plan-from=live", "--restore=graph"}},
      {ExitCode::kViolation, small + std::vector<std::string>{"--inject=write-constant"}},
      {ExitCode::kViolation, small + std::vector<std::string>{"--inject=stale-plan", "--scheduler=host"}},
      {ExitCode::kMismatch, small + std::vector<std::string>{"--inject=leaky-kernel"}},  // max_rel_rms is not finite
      {ExitCode::kDevice, small + std::vector<std::string>{"--device=cuda:99"}},
      {ExitCode::kInternal, small + std::vector<std::string>{"--steps=5", "--inject=unarmed"}},
  };
  for (const auto& run : runs) {
    const DriverResult result = RunDriver(run.args);
    EXPECT_EQ(result.code, run.code) << result.err;
    EXPECT_EQ(Errors(result.report), "") << result.err;
  }
}

TEST_F(ReportSchema, AsksForEveryFieldAndAllowsNoOther) {
  const Json report = CleanReport();
  EXPECT_EQ(report.object.size(), schema_["properties"].object.size());
  for (const auto& [name, field] : report.object) {
    Json without = report;
    without.object.erase(name);
    EXPECT_EQ(Errors(without), "report: has no " + name);
  }
  Json more = report;
  more.object["more"] = {};
  EXPECT_EQ(Errors(more), "report.more: is not in the schema");
}

TEST_F(ReportSchema, RefusesWrongTypesRangesAndChoices) {
  const Json report = CleanReport();
  const auto with = [&report](const char* name, const std::string& json) {
    Json changed = report;
    changed.object.erase(name);
    EXPECT_TRUE(ParseJson(json, changed.object[name])) << json;
    return changed;
  };
  EXPECT_EQ(Errors(with("steps", "20")), "");
  EXPECT_EQ(Errors(with("steps", "\"20\"")), "report.steps: is of another type");
  EXPECT_EQ(Errors(with("steps", "1.5")), "report.steps: is of another type");
  EXPECT_EQ(Errors(with("steps", "-1")), "report.steps: is less than minimum");
  EXPECT_EQ(Errors(with("exit_code", "7")), "report.exit_code: is none of enum");
  EXPECT_EQ(Errors(with("protection_level", "\"some\"")), "report.protection_level: is none of enum");
  EXPECT_EQ(Errors(with("pollutions", "[1]")), "report.pollutions[0]: is of another type");
  EXPECT_EQ(Errors(with("command_line", "[]")), "report.command_line: breaks minItems");
  EXPECT_EQ(Errors(with("replays_by_bucket", "{\"8\": -1}")), "report.replays_by_bucket.8: is less than minimum");
  EXPECT_EQ(Errors(with("first_failure_step", "null")), "");
  EXPECT_EQ(Errors(with("us_per_replay", "{\"p50\": 1, \"p99\": 2, \"max\": 3}")),
            "report.us_per_replay: has no host_emulation");
}

TEST_F(ReportSchema, AKeywordThatNobodyChecksIsAnError) {
  Json schema;
  ASSERT_TRUE(ParseJson("{\"type\": \"integer\", \"multipleOf\": 2}", schema));
  Json value;
  ASSERT_TRUE(ParseJson("3", value));
  EXPECT_EQ(absl::StrJoin(JsonSchema(schema).Check(value), "\n"),
            "report: the schema has an unknown keyword multipleOf");
}

}  // namespace
}  // namespace pristine::testing
