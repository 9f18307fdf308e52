#include "examples/replay_driver/trace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "tests/support/status_matchers.h"

namespace pristine::replay_driver {
namespace {

constexpr char kHeader[] = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

absl::StatusOr<std::vector<TraceRequest>> Parse(const std::string& text) {
  std::istringstream in(text);
  return ParseAzureCsv(in, "t.csv");
}

TEST(AzureCsv, ArrivalsAreTicksSinceTheFirst) {
  ASSERT_OK_AND_ASSIGN(const std::vector<TraceRequest> trace,
                       Parse(std::string(kHeader) + "2023-12-31 23:59:59.9799600,4808,10\n"
                                                    "2024-01-01 00:00:00.0319601,3180,8\n"
                                                    "2024-03-01 00:00:00,0,0\n"));
  ASSERT_EQ(trace.size(), 3u);
  EXPECT_EQ(trace[0].arrival, 0);
  EXPECT_EQ(trace[0].context, 4808);
  EXPECT_EQ(trace[0].generated, 10);
  EXPECT_EQ(trace[1].arrival, 520001);
  // 2024 has a February 29th: 60 days after new year.
  EXPECT_EQ(trace[2].arrival, 60LL * 86400 * 10'000'000 + 200400);
}

TEST(AzureCsv, AcceptsCrLfAndAMissingLastNewline) {
  ASSERT_OK_AND_ASSIGN(
      const std::vector<TraceRequest> trace,
      Parse("TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9,5,6\r\n2023-11-16 18:17:04.1,7,8"));
  ASSERT_EQ(trace.size(), 2u);
  EXPECT_EQ(trace[1].arrival, 2'000'000);
  EXPECT_EQ(trace[1].generated, 8);
}

TEST(AzureCsv, SortsByArrivalAndKeepsTheOrderOfEqualOnes) {
  ASSERT_OK_AND_ASSIGN(const std::vector<TraceRequest> trace,
                       Parse(std::string(kHeader) + "2023-11-16 18:17:05.0,1,1\n"
                                                    "2023-11-16 18:17:04.0,2,1\n"
                                                    "2023-11-16 18:17:05.0,3,1\n"));
  EXPECT_EQ(trace[0].context, 2);
  EXPECT_EQ(trace[1].context, 1);
  EXPECT_EQ(trace[2].context, 3);
}

TEST(AzureCsv, ErrorsNameFileLineWhatWasExpectedAndFound) {
  const std::string row = "2023-11-16 18:17:03.9799600,4808,10\n";
  const std::string head = kHeader + row;
  EXPECT_STATUS(Parse(""), kInvalidArgument, "t.csv:1: expected the header TIMESTAMP,ContextTokens,GeneratedTokens");
  EXPECT_STATUS(Parse("time,context\n" + row), kInvalidArgument, "t.csv:1: expected the header");
  EXPECT_STATUS(Parse(kHeader), kInvalidArgument, "t.csv:2: expected at least one request, found 'end of file'");
  EXPECT_STATUS(Parse(head + "2023-11-16 18:17:03.9,48\n"), kInvalidArgument, "t.csv:3: expected 3 fields");
  EXPECT_STATUS(Parse(head + "\n"), kInvalidArgument, "t.csv:3: expected 3 fields");
  EXPECT_STATUS(Parse(head + row + "yesterday,1,1\n"), kInvalidArgument,
                "t.csv:4: expected a timestamp like 2023-11-16 18:17:03.9799600, found 'yesterday'");
  EXPECT_STATUS(Parse(head + "2023-02-29 18:17:03.9,1,1\n"), kInvalidArgument, "expected a timestamp");
  EXPECT_STATUS(Parse(head + "2023-11-16 24:17:03.9,1,1\n"), kInvalidArgument, "expected a timestamp");
  EXPECT_STATUS(Parse(head + "2023-11-16 18:17:03.,1,1\n"), kInvalidArgument, "expected a timestamp");
  EXPECT_STATUS(Parse(head + "2023-11-16 18:17:03.12345678,1,1\n"), kInvalidArgument, "expected a timestamp");
  EXPECT_STATUS(Parse(head + "2023-11-16 18:17:03.9,-1,1\n"), kInvalidArgument,
                "t.csv:3: expected context tokens in [0, 10^9], found '-1'");
  EXPECT_STATUS(Parse(head + "2023-11-16 18:17:03.9,1,many\n"), kInvalidArgument,
                "t.csv:3: expected generated tokens in [0, 10^9], found 'many'");
  EXPECT_STATUS(Parse(head + "2023-11-16 18:17:03.9,1,4294967297\n"), kInvalidArgument, "expected generated tokens");
}

TEST(AzureCsv, ABinaryFileIsShownInPrintableCharacters) {
  const absl::Status status = Parse(std::string("\x7f"
                                                "ELF\0\x01\xff",
                                                7))
                                  .status();
  EXPECT_STATUS(status, kInvalidArgument, "found '?ELF");
}

TEST(ReadTrace, AMissingFileIsNotFound) {
  EXPECT_STATUS(ReadTrace("/nowhere/t.csv", TraceFormat::kAzureCsv), kNotFound, "/nowhere/t.csv");
}

TEST(SyntheticTrace, IsTheSameForTheSameSeedOnly) {
  const auto lengths = [](uint64_t seed) {
    std::vector<int32_t> values;
    for (const TraceRequest& request : SyntheticTrace(seed, 45'000 * kTicksPerMs)) values.push_back(request.context);
    return values;
  };
  EXPECT_EQ(lengths(1), lengths(1));
  EXPECT_NE(lengths(1), lengths(2));
}

TEST(SyntheticTrace, HasTheQuantilesOfTheCodeTraceAndFourArrivalsASecond) {
  const int64_t seconds = 10'000;
  const std::vector<TraceRequest> trace = SyntheticTrace(7, seconds * 1000 * kTicksPerMs);
  EXPECT_NEAR(static_cast<double>(trace.size()) / seconds, 4.0, 0.1);
  std::vector<int32_t> context, generated;
  for (const TraceRequest& request : trace) {
    context.push_back(request.context);
    generated.push_back(request.generated);
  }
  std::sort(context.begin(), context.end());
  std::sort(generated.begin(), generated.end());
  const auto at = [](const std::vector<int32_t>& values, double part) {
    return values[static_cast<size_t>(part * static_cast<double>(values.size() - 1))];
  };
  EXPECT_GE(context.front(), 3);
  EXPECT_LE(context.back(), 7437);
  EXPECT_NEAR(at(context, .25), 578, 40);
  EXPECT_NEAR(at(context, .5), 1469, 60);
  EXPECT_NEAR(at(context, .95), 7315, 120);
  EXPECT_GE(generated.front(), 6);
  EXPECT_LE(generated.back(), 1899);
  EXPECT_NEAR(at(generated, .5), 13, 1);
  EXPECT_NEAR(at(generated, .75), 24, 1);
  // The tail is so long that its rank is steadier than its value.
  const auto above = generated.end() - std::upper_bound(generated.begin(), generated.end(), 252);
  EXPECT_NEAR(static_cast<double>(above) / static_cast<double>(generated.size()), 0.01, 0.002);
}

}  // namespace
}  // namespace pristine::replay_driver
