// The page of a run: one small file whatever it shows, in which every link leads somewhere and no text is markup.
#include "examples/replay_driver/html_report.h"

#include <gtest/gtest.h>

#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/driver/run_driver.h"

namespace pristine::testing {
namespace {

using replay_driver::LoggedRecord;
using replay_driver::RunLog;
using replay_driver::RunReport;

constexpr size_t kMostBytes = 2'000'000;
const std::string kHostile = "</script><script>alert(\"x\")</script><img src=x onerror=y>&amp;'\xff\x01";

std::string PageOf(const RunReport& report) {
  std::ostringstream out;
  WriteHtml(report, out);
  return out.str();
}

size_t CountOf(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size())) ++count;
  return count;
}

// What stands between `before` and the next `after`, for each `before`.
std::vector<std::string> Between(const std::string& text, const std::string& before, const std::string& after) {
  std::vector<std::string> found;
  for (size_t at = text.find(before); at != std::string::npos; at = text.find(before, at)) {
    at += before.size();
    found.push_back(text.substr(at, text.find(after, at) - at));
  }
  return found;
}

Json DataOf(const std::string& page) {
  const std::vector<std::string> data = Between(page, "id=\"data\">", "</script>");
  Json json;
  EXPECT_EQ(data.size(), 1u);
  EXPECT_TRUE(!data.empty() && ParseJson(data[0], json));
  return json;
}

// What holds for every page.
void ExpectSound(const std::string& page) {
  EXPECT_LT(page.size(), kMostBytes);
  std::set<std::string> ids;
  for (const std::string& id : Between(page, " id=\"", "\"")) EXPECT_TRUE(ids.insert(id).second) << "twice: " << id;
  for (const std::string& link : Between(page, "href=\"#", "\"")) EXPECT_EQ(ids.count(link), 1u) << link;
  EXPECT_EQ(CountOf(page, "href="), CountOf(page, "href=\"#"));
  for (const char* reference : {"http:", "https:", "<link", "<img", "<iframe", "@import", "url(", "src=\"", "fetch("}) {
    EXPECT_EQ(CountOf(page, reference), 0u) << "the page needs nothing else: " << reference;
  }
  EXPECT_EQ(CountOf(page, "<script"), 2u);
  for (const char* tag : {"main",   "section", "table", "thead", "tbody", "tfoot", "figure", "ol", "dl", "a",  "style",
                          "script", "head",    "body",  "html",  "h2",    "h3",    "p",      "td", "tr", "li", "b"}) {
    const size_t open = CountOf(page, absl::StrCat("<", tag, ">")) + CountOf(page, absl::StrCat("<", tag, " "));
    EXPECT_EQ(open, CountOf(page, absl::StrCat("</", tag, ">"))) << tag;
  }
}

LoggedRecord RecordOf(int64_t sequence, const std::string& name) {
  LoggedRecord record;
  record.sequence = record.replay = sequence;
  record.graph = name;
  record.bucket = {8, 8};
  record.extent = {5, 5};
  record.indptr_tails = {{name, 77}, {name, 78}};
  record.status = FlightRecord::Status::kNeutralised;
  return record;
}

// `steps` replays in buckets 4 and 8, 3 or 6 requests of them real, of 100 to 199 us.
RunReport Synthetic(int64_t steps) {
  RunReport report;
  report.log.Enable();
  report.steps = report.replays = steps;
  for (int64_t step = 0; step < steps; ++step) {
    const bool large = step / 100 % 2 == 1;
    const auto us = static_cast<float>(100 + step % 100);
    report.log.AddReplay({step, large ? 6 : 3, large ? 8 : 4, us});
    report.us_per_replay.push_back(us);
  }
  return report;
}

TEST(HtmlReport, StaysBelowTwoMegabytesAtAHundredThousandStepsWhateverItsTextsHold) {
  std::string name;
  while (name.size() < 5000) name += kHostile;
  RunReport report = Synthetic(100'000);
  for (int64_t step = 0; step < 100'000; ++step) {
    const LoggedRecord record = RecordOf(step + 1, name);
    report.log.AddViolation(step, "invalid value", name, &record);
  }
  report.exit_code = ExitCode::kViolation;
  report.exit_reason = report.device = report.trace = report.protection_level = name;
  report.command_line.assign(1000, name);
  const std::string page = PageOf(report);
  ExpectSound(page);
  EXPECT_NE(page.find("The first 300 of 100,000 are listed"), std::string::npos);
  EXPECT_EQ(CountOf(page, "<li id=\"v"), RunLog::kListed);
}

TEST(HtmlReport, NoTextBecomesMarkup) {
  RunReport report = Synthetic(10);
  const LoggedRecord record = RecordOf(3, kHostile);
  report.log.AddViolation(3, kHostile, kHostile, &record);
  report.log.AddViolation(4, "refused", kHostile, nullptr);
  report.exit_code = ExitCode::kViolation;
  report.exit_reason = report.device = report.trace = report.protection_level = kHostile;
  report.command_line = {"replay_driver", kHostile};
  const std::string page = PageOf(report);
  ExpectSound(page);
  EXPECT_EQ(CountOf(page, "<script>alert"), 0u);
  EXPECT_GE(CountOf(page, "&lt;/script&gt;&lt;script&gt;alert(&quot;x&quot;)"), 8u);
  EXPECT_EQ(page.find('\xff'), std::string::npos);
  EXPECT_EQ(page.find('\x01'), std::string::npos);
}

TEST(HtmlReport, ColumnsHoldEveryReplayAndEveryViolation) {
  for (const int64_t steps : {1, 3, 240, 241, 1500, 3840, 3841, 50'000}) {
    SCOPED_TRACE(steps);
    RunReport report = Synthetic(steps);
    for (int64_t step = 0; step < steps; step += 7) report.log.AddViolation(step, "clamped", "m", nullptr);
    const std::string page = PageOf(report);
    ExpectSound(page);
    const Json data = DataOf(page);
    const std::vector<Json>& columns = data["columns"].array;
    EXPECT_LE(columns.size(), 480u);
    EXPECT_GE(static_cast<int64_t>(columns.size()) * static_cast<int64_t>(data["width"].number), steps);
    EXPECT_EQ(data["first"].number, 0);
    EXPECT_EQ(data["last"].number, static_cast<double>(steps - 1));
    double replays = 0, requests = 0, rows = 0, violations = 0, by_bucket = 0;
    for (const Json& column : columns) {
      const std::vector<Json>& c = column.array;
      ASSERT_EQ(c.size(), 11u);
      replays += c[0].number;
      requests += c[1].number;
      rows += c[2].number;
      EXPECT_LE(c[3].number, c[4].number);
      EXPECT_LE(c[5].number, c[6].number) << "median, p99";
      EXPECT_LE(c[6].number, c[7].number) << "p99, slowest";
      EXPECT_GE(c[5].number, 100);
      EXPECT_LE(c[7].number, 199);
      violations += c[8].number;
      for (size_t i = 1; i < c[10].array.size(); i += 2) by_bucket += c[10].array[i].number;
    }
    EXPECT_EQ(replays, static_cast<double>(steps));
    EXPECT_EQ(by_bucket, replays);
    EXPECT_EQ(4 * requests, 3 * rows) << "a quarter of all rows is padding";
    EXPECT_EQ(violations, static_cast<double>((steps + 6) / 7));
    EXPECT_NE(page.find("25.0\u00a0%"), std::string::npos);
  }
}

TEST(HtmlReport, AColumnKeepsItsSlowestReplay) {
  RunReport report = Synthetic(100'000);
  report.log.AddReplay({99'999, 6, 8, 12345.5f});
  const Json data = DataOf(PageOf(report));
  EXPECT_EQ(data["columns"].array.back().array[7].number, 12345.5);
}

TEST(HtmlReport, ManyBucketsShareSixteenRows) {
  RunReport report;
  report.log.Enable();
  for (int32_t bucket = 1; bucket <= 100; ++bucket) report.log.AddReplay({bucket, bucket, bucket, 1});
  const std::string page = PageOf(report);
  ExpectSound(page);
  const Json data = DataOf(page);
  ASSERT_EQ(data["buckets"].array.size(), 16u);
  EXPECT_EQ(data["buckets"].array[0].text, "1\u20136");
  EXPECT_EQ(data["buckets"].array[15].text, "94\u2013100");
}

TEST(HtmlReport, ARunWithoutReplaysIsAPageToo) {
  RunReport report;
  report.exit_code = ExitCode::kInput;
  report.exit_reason = "no such file";
  const std::string page = PageOf(report);
  ExpectSound(page);
  EXPECT_NE(page.find("Nothing was replayed."), std::string::npos);
  EXPECT_NE(page.find("no such file"), std::string::npos);
  EXPECT_NE(page.find("stopped"), std::string::npos);
}

TEST(HtmlReport, ViolationsOfOneReplayShareItsRecord) {
  RunReport report = Synthetic(10);
  const LoggedRecord record = RecordOf(4, "decode");
  LoggedRecord shadow = record;
  shadow.shadow = true;
  report.log.AddViolation(3, "invalid value", "first", &record);
  report.log.AddViolation(3, "clamped", "second", &record);
  report.log.AddViolation(3, "clamped", "third", &shadow);
  report.log.AddViolation(9, "polluted", "fourth", nullptr);
  const std::string page = PageOf(report);
  ExpectSound(page);
  EXPECT_EQ(CountOf(page, "href=\"#record-4\""), 2u);
  EXPECT_EQ(CountOf(page, "href=\"#record-s4\""), 1u);
  EXPECT_EQ(CountOf(page, "href=\"#record-none\""), 1u);
  EXPECT_EQ(CountOf(page, "id=\"record-4\""), 1u);
}

// --- the option ---

struct PageRun {
  DriverResult result;
  std::string page;
  Json flight;
};

PageRun RunForPage(const std::vector<std::string>& more, DriverSetting setting = {}) {
  const TemporaryFile html(".html", ""), flight(".json", "");
  PageRun run;
  run.result = RunDriver(SmallModel() +
                             std::vector<std::string>{"--device=host", "--steps=60", "--compare-eager=10",
                                                      absl::StrCat("--html=", html.path()),
                                                      absl::StrCat("--flight-json=", flight.path())} +
                             more,
                         setting);
  std::stringstream page, json;
  page << std::ifstream(html.path()).rdbuf();
  json << std::ifstream(flight.path()).rdbuf();
  run.page = page.str();
  EXPECT_TRUE(ParseJson(json.str(), run.flight)) << json.str();
  return run;
}

TEST(HtmlOption, ACleanRunIsShownWhole) {
  const PageRun run = RunForPage({});
  EXPECT_EQ(run.result.code, ExitCode::kOk) << run.result.err;
  ExpectSound(run.page);
  EXPECT_EQ(CountOf(run.page, "href=\"#record"), 0u);
  for (const char* part : {"clean</span>", "data-chart=\"buckets\"", "data-chart=\"padding\"", "data-chart=\"latency\"",
                           "<h2>By bucket</h2>", "<h2>Flight records</h2>", "sparse.kv_indptr = "}) {
    EXPECT_NE(run.page.find(part), std::string::npos) << part;
  }
  EXPECT_EQ(run.page.find("data-chart=\"violations\""), std::string::npos);
  double replays = 0;
  const Json data = DataOf(run.page);
  for (const Json& column : data["columns"].array) replays += column.array[0].number;
  EXPECT_EQ(replays, run.result.report["replays"].number);
}

TEST(HtmlOption, AViolationLinksToTheRecordOfItsReplay) {
  for (const char* inject : {"page-out-of-range", "decreasing-indptr"}) {
    SCOPED_TRACE(inject);
    const PageRun run = RunForPage({absl::StrCat("--inject=", inject)});
    EXPECT_EQ(run.result.code, ExitCode::kViolation);
    ExpectSound(run.page);
    EXPECT_NE(run.page.find("data-chart=\"violations\""), std::string::npos);
    const std::vector<std::string> listed = Between(run.page, "<li id=\"v", "</li>");
    ASSERT_EQ(listed.size(), 1u);
    const std::vector<std::string> link = Between(listed[0], "href=\"#", "\"");
    ASSERT_EQ(link.size(), 1u);
    const std::vector<std::string> record = Between(run.page, absl::StrCat("<tr id=\"", link[0], "\">"), "</tr>");
    ASSERT_EQ(record.size(), 1u) << link[0];
    for (const char* part : {"decode ", "step.kv_indptr = ", "sparse.kv_indptr = ", "neutralised", "invalid value"}) {
      EXPECT_NE(record[0].find(part), std::string::npos) << part << " in " << record[0];
    }
    EXPECT_NE(run.page.find(absl::StrCat("href=\"#", link[0])), std::string::npos);
  }
}

TEST(HtmlOption, ARefusedCallIsListedWithoutARecord) {
  const PageRun run = RunForPage({"--inject=stale-plan", "--scheduler=host"});
  ExpectSound(run.page);
  EXPECT_EQ(CountOf(run.page, "href=\"#record-none\""), 1u);
  EXPECT_NE(run.page.find("refused <b>1</b>"), std::string::npos);
}

TEST(FlightJsonOption, HoldsTheLastReplaysInOrder) {
  const PageRun run = RunForPage({});
  const std::vector<Json>& records = run.flight.array;
  ASSERT_EQ(static_cast<double>(records.size()), run.result.report["replays"].number);
  for (size_t i = 0; i < records.size(); ++i) {
    EXPECT_EQ(records[i]["sequence"].number, static_cast<double>(i + 1));
    EXPECT_EQ(records[i]["key"]["graph"].text, "decode");
    EXPECT_EQ(records[i]["status"].text, "clean");
    EXPECT_EQ(records[i]["indptr_tails"].array.size(), 2u);
    EXPECT_LE(records[i]["extent"]["requests"].number, records[i]["key"]["requests"].number);
  }
}

TEST(FlightJsonOption, IsWrittenAfterADeviceFailureToo) {
  int replays = 0;
  const PageRun run = RunForPage({}, {.after_replay = [&replays](Stream&, replay_driver::DecodeModel&) {
                                   return ++replays == 5 ? absl::InternalError("the device died") : absl::OkStatus();
                                 }});
  EXPECT_EQ(run.result.code, ExitCode::kDevice);
  EXPECT_EQ(run.flight.array.size(), 5u);
  ExpectSound(run.page);
  EXPECT_NE(run.page.find("the device died"), std::string::npos);
}

TEST(HtmlOption, EachFileNeedsAPathOfItsOwnThatCanBeWritten) {
  const TemporaryFile file(".html", "");
  const std::string html = absl::StrCat("--html=", file.path());
  const DriverResult same = RunDriver({html, absl::StrCat("--flight-json=", file.path())});
  EXPECT_EQ(same.code, ExitCode::kUsage);
  EXPECT_NE(same.err.find("is the file of --html; expected another file"), std::string::npos) << same.err;
  const DriverResult nowhere = RunDriver({"--html=/nowhere/page.html"});
  EXPECT_EQ(nowhere.code, ExitCode::kUsage);
  EXPECT_NE(nowhere.err.find("--html=/nowhere/page.html: expected a file that can be written"), std::string::npos);
  const TemporaryFile trace(".csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n");
  const DriverResult over = RunDriver({absl::StrCat("--trace=", trace.path()), absl::StrCat("--html=", trace.path())});
  EXPECT_EQ(over.code, ExitCode::kUsage);
  EXPECT_NE(over.err.find("is the trace"), std::string::npos) << over.err;
}

}  // namespace
}  // namespace pristine::testing
