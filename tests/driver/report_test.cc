#include "examples/replay_driver/report.h"

#include <gtest/gtest.h>

#include <limits>
#include <sstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/driver/json.h"

namespace pristine::replay_driver {
namespace {

testing::Json Written(const RunReport& report) {
  std::ostringstream out;
  WriteJson(report, out);
  testing::Json json;
  EXPECT_TRUE(testing::ParseJson(out.str(), json)) << out.str();
  return json;
}

TEST(Report, ListsHoldTheFirstHundredAndATotal) {
  RunReport report;
  for (int i = 0; i < 250; ++i) {
    Violation violation;
    violation.kind = i % 2 == 0 ? Violation::Kind::kPolluted : Violation::Kind::kInvariant;
    violation.buffer = "page_size";
    violation.index = i;
    report.AddViolation(violation);
  }
  for (int i = 0; i < 7; ++i) report.requests_refused.Add(absl::StrCat("request ", i));
  const testing::Json json = Written(report);
  EXPECT_EQ(json["pollutions"].array.size(), 100u);
  EXPECT_EQ(json["pollutions_total"].number, 125);
  EXPECT_NE(json["pollutions"].array[1].text.find("page_size[2]"), std::string::npos);
  EXPECT_EQ(json["invariant_violations"].array.size(), 100u);
  EXPECT_EQ(json["invariant_violations_total"].number, 125);
  EXPECT_EQ(json["requests_refused"].number, 7);
  EXPECT_EQ(json["refused"].array.size(), 7u);
}

TEST(Report, IsJsonWhateverTheStringsHold) {
  RunReport report;
  report.trace = "a\"b\\c\n\t\x01\x7f.csv";
  report.exit_reason = "\xe2\x82\xac \xf0\x9f\x90\xa7 \xc3\xbc";  // UTF-8 of 3, 4 and 2 bytes
  report.max_rel_rms = std::numeric_limits<double>::infinity();
  const testing::Json json = Written(report);
  EXPECT_EQ(json["trace"].text, report.trace);
  EXPECT_EQ(json["exit_reason"].text, report.exit_reason);
  EXPECT_EQ(json["max_rel_rms"].kind, testing::Json::Kind::kNull);
  EXPECT_EQ(json["first_failure_step"].kind, testing::Json::Kind::kNull);
}

TEST(Report, ValidUtf8IsWrittenAsItIs) {
  RunReport report;
  report.trace = "/tr\xc3\xa4ume/\xe2\x82\xac.csv";
  std::ostringstream out;
  WriteJson(report, out);
  EXPECT_NE(out.str().find(absl::StrCat("\"trace\": \"", report.trace, "\"")), std::string::npos) << out.str();
}

TEST(Report, BytesThatAreNotUtf8BecomeTheReplacementCharacter) {
  const std::string replacement = "\xef\xbf\xbd";
  for (const char* bad : {"\xff", "\x80", "\xc0\xaf", "\xe0\x80\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82"}) {
    RunReport report;
    report.trace = absl::StrCat("a", bad, "b");
    std::string expected = "a";
    for (const char* byte = bad; *byte != '\0'; ++byte) expected += replacement;
    EXPECT_EQ(Written(report)["trace"].text, expected + "b");
  }
}

TEST(Report, PercentilesAreValuesThatWereMeasured) {
  RunReport report;
  for (int i = 100; i > 0; --i) report.us_per_replay.push_back(i);
  const testing::Json json = Written(report);
  EXPECT_EQ(json["us_per_replay"]["p50"].number, 50);
  EXPECT_EQ(json["us_per_replay"]["p99"].number, 99);
  EXPECT_EQ(json["us_per_replay"]["max"].number, 100);
  EXPECT_EQ(Written(RunReport{})["us_per_replay"]["max"].number, 0);
}

TEST(Report, AViolationOutranksAMismatchInTheOutcome) {
  RunReport report;
  EXPECT_EQ(report.Outcome(), ExitCode::kOk);
  report.truth_mismatches = 1;
  EXPECT_EQ(report.Outcome(), ExitCode::kMismatch);
  report.plan_mismatch_steps = 1;
  EXPECT_EQ(report.Outcome(), ExitCode::kViolation);
}

TEST(Report, SummaryIsAlignedAndBeginsWithTheDevice) {
  RunReport report;
  report.device = "cuda:0 (NVIDIA H200)";
  std::ostringstream out;
  PrintSummary(report, out);
  std::istringstream lines(out.str());
  std::string line;
  std::getline(lines, line);
  EXPECT_EQ(line, "device                  cuda:0 (NVIDIA H200)");
  while (std::getline(lines, line)) EXPECT_EQ(line[23], ' ') << line;
}

}  // namespace
}  // namespace pristine::replay_driver
