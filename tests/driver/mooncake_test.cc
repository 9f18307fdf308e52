#include <gtest/gtest.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "examples/replay_driver/trace.h"
#include "tests/driver/run_driver.h"
#include "tests/driver/traces.h"
#include "tests/support/status_matchers.h"

namespace pristine::replay_driver {
namespace {

absl::StatusOr<std::vector<TraceRequest>> Parse(const std::string& text) {
  std::istringstream in(text);
  return ParseMooncakeJsonl(in, "t.jsonl");
}
const std::string kRow = "{\"timestamp\": 3000, \"input_length\": 6758, \"output_length\": 500}\n";

TEST(MooncakeJsonl, MillisecondsBecomeTicksSinceTheFirst) {
  ASSERT_OK_AND_ASSIGN(const std::vector<TraceRequest> trace,
                       Parse(kRow + "{\"timestamp\": 3054, \"input_length\": 7, \"output_length\": 1}\n"));
  ASSERT_EQ(trace.size(), 2u);
  EXPECT_EQ(trace[0].arrival, 0);
  EXPECT_EQ(trace[0].context, 6758);
  EXPECT_EQ(trace[0].generated, 500);
  EXPECT_EQ(trace[1].arrival, 54 * kTicksPerMs);
}

TEST(MooncakeJsonl, FieldsComeInAnyOrderWithAnyBlanksAndOthersAreSkipped) {
  ASSERT_OK_AND_ASSIGN(
      const std::vector<TraceRequest> trace,
      Parse("{\"output_length\":3,\"hash_ids\":[46, 47,48],\"input_length\":2,\"user\":\"a \\\"b\\\\\",\"timestamp\":1}"
            "\r\n\t{ \"timestamp\" : 2 , \"x\": [], \"y\": -1.5e3, \"input_length\" : 4,\"output_length\": 5 } "));
  ASSERT_EQ(trace.size(), 2u);
  EXPECT_EQ(trace[0].context, 2);
  EXPECT_EQ(trace[0].generated, 3);
  EXPECT_EQ(trace[1].arrival, kTicksPerMs);
}

TEST(MooncakeJsonl, SortsByArrivalAndKeepsTheOrderOfEqualOnes) {
  const auto row = [](int time, int input) {
    return absl::StrCat("{\"timestamp\": ", time, ", \"input_length\": ", input, ", \"output_length\": 1}\n");
  };
  ASSERT_OK_AND_ASSIGN(const std::vector<TraceRequest> trace, Parse(row(5, 1) + row(4, 2) + row(5, 3)));
  EXPECT_EQ(trace[0].context, 2);
  EXPECT_EQ(trace[1].context, 1);
  EXPECT_EQ(trace[2].context, 3);
}

TEST(MooncakeJsonl, ErrorsNameFileLineWhatWasExpectedAndFound) {
  EXPECT_STATUS(Parse(""), kInvalidArgument, "t.jsonl:1: expected at least one request, found 'end of file'");
  const struct {
    const char* line;
    const char* message;
  } cases[] = {
      {"", "t.jsonl:2: expected a flat JSON object such as {\"timestamp\": 0, "},
      {"[1, 2]", "expected a flat JSON object"},
      {"{\"timestamp\": 0", "expected a flat JSON object"},
      {"{\"timestamp\" 0}", "expected a flat JSON object"},
      {"{\"timestamp", "expected a flat JSON object"},
      {"{\"timestamp\": 0,}", "expected a flat JSON object"},
      {"{\"timestamp\": 0, \"input_length\": 1, \"output_length\": 1} 2", "expected a flat JSON object"},
      {"{\"timestamp\": 0, \"x\": {\"y\": 1}}", "expected a flat JSON object"},
      {"{\"timestamp\": 0, \"x\": [1, 2}", "expected a flat JSON object"},
      {"{\"timestamp\": 0, \"x\": inf}", "expected a flat JSON object"},
      {"{}", "t.jsonl:2: expected a field \"timestamp\", found '{}'"},
      {"{\"timestamp\": 0, \"input_length\": 1}", "expected a field \"output_length\""},
      {"{\"timestamp\": 0, \"timestamp\": 1}", "expected \"timestamp\" once"},
      {"{\"timestamp\": -1}", "expected \"timestamp\" to be an integer in [0, 1000000000000], found '-1'"},
      {"{\"timestamp\": 1.5}", "expected \"timestamp\" to be an integer in [0, 1000000000000], found '1.5'"},
      {"{\"input_length\": \"7\"}", "expected \"input_length\" to be an integer in [0, 1000000000], found '\"7\"'"},
      {"{\"output_length\": 4294967297}", "expected \"output_length\" to be an integer in [0, 1000000000]"},
      {"{\"output_length\": }", "expected \"output_length\" to be an integer in [0, 1000000000], found ''"},
      {"\x7f\x45LF\x01\xff", "found '?ELF"},
  };
  for (const auto& bad : cases) EXPECT_STATUS(Parse(kRow + bad.line + "\n"), kInvalidArgument, bad.message);
}

TEST(MooncakeJsonl, TheExtensionOrTheOptionChoosesTheFormat) {
  const testing::TemporaryFile named(".jsonl", "{\"timestamp\": 0}\n");
  EXPECT_NE(testing::RunDriver({"--trace=" + named.path()}).err.find(":1: expected a field \"input_length\""),
            std::string::npos);
  const testing::TemporaryFile other(".txt", "{\"timestamp\": 0}\n");
  EXPECT_NE(testing::RunDriver({"--trace=" + other.path(), "--format=mooncake-jsonl"}).err.find(":1: expected a field"),
            std::string::npos);
  EXPECT_NE(testing::RunDriver({"--trace=" + named.path(), "--format=azure-csv"}).err.find(":1: expected the header"),
            std::string::npos);
}

TEST(MooncakeJsonl, TheConversationTraceIsServedCleanly) {
  const std::string path = testing::TracePath("mooncake_conversation.jsonl");
  if (path.empty()) GTEST_SKIP() << testing::kNoTraces;
  ASSERT_OK_AND_ASSIGN(const std::vector<TraceRequest> trace, ReadTrace(path, TraceFormat::kMooncakeJsonl));
  std::ifstream in(path);
  std::string line;
  size_t lines = 0;
  while (std::getline(in, line)) ++lines;
  EXPECT_EQ(trace.size(), lines);
  EXPECT_GT(trace.size(), 10'000u);
  std::vector<std::string> args = testing::SmallModel();
  for (const char* arg : {"--device=host", "--steps=100", "--compare-eager=10"}) args.push_back(arg);
  args.push_back("--trace=" + path);
  const testing::DriverResult result = testing::RunDriver(args);
  EXPECT_EQ(result.code, ExitCode::kOk) << result.err;
  EXPECT_GT(result.report["replays"].number, 0);
}

}  // namespace
}  // namespace pristine::replay_driver
