#include "examples/replay_driver/html_report.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "examples/replay_driver/html_page.h"
#include "examples/replay_driver/text.h"

namespace pristine::replay_driver {
namespace {

constexpr int64_t kColumns = 480;   // of the charts
constexpr size_t kBucketRows = 16;  // more buckets than this share rows
constexpr size_t kMessage = 300;    // characters that are shown of a message or name
constexpr size_t kLongText = 2000;  // of a command line

// Buckets that are shown as one, from the smallest to the largest.
struct BucketRow {
  int32_t from = 0, to = 0;
  int64_t replays = 0, requests = 0, rows = 0;
  std::vector<double> us;

  std::string label() const { return from == to ? absl::StrCat(from) : absl::StrCat(from, "\u2013", to); }
};

// Steps that share a pixel column.
struct Column {
  int64_t replays = 0, requests = 0, rows = 0, violations = 0;
  double least_waste = 1, most_waste = 0;  // parts of a replay's rows
  std::vector<double> us;
  std::vector<int64_t> by_row;  // replays
  int64_t first_listed = -1;    // violation
};

struct Timeline {
  int64_t first = 0, last = -1;  // steps
  int64_t width = 1;             // steps of a column
  std::vector<BucketRow> rows;
  std::vector<Column> columns;
};

double WasteOf(int64_t requests, int64_t rows) {
  return rows == 0 ? 0 : 1 - static_cast<double>(requests) / static_cast<double>(rows);
}

// Thousands apart, as the script writes them.
std::string CountText(int64_t count) {
  std::string digits = absl::StrCat(count);
  for (int64_t at = static_cast<int64_t>(digits.size()) - 3; at > (count < 0 ? 1 : 0); at -= 3) {
    digits.insert(static_cast<size_t>(at), 1, ',');
  }
  return digits;
}

std::string FixedText(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

std::string PercentText(double part) { return absl::StrCat(FixedText(100 * part, 1), "\u00a0%"); }

std::string TimeText(double us) {
  const bool ms = us >= 1000;
  const double value = ms ? us / 1000 : us;
  return absl::StrCat(FixedText(value, value < 10 ? 2 : value < 100 ? 1 : 0), ms ? "\u00a0ms" : "\u00a0\u00b5s");
}

std::string Plural(int64_t count, const char* one, const char* many) {
  return absl::StrCat(CountText(count), " ", count == 1 ? one : many);
}

std::vector<BucketRow> RowsOf(const std::vector<LoggedReplay>& replays) {
  std::vector<int32_t> buckets;
  for (const LoggedReplay& replay : replays) {
    const auto at = std::lower_bound(buckets.begin(), buckets.end(), replay.bucket);
    if (at == buckets.end() || *at != replay.bucket) buckets.insert(at, replay.bucket);
  }
  const size_t count = std::min(buckets.size(), kBucketRows);
  std::vector<BucketRow> rows(count);
  for (size_t i = 0; i < count; ++i) {
    rows[i].from = buckets[i * buckets.size() / count];
    rows[i].to = buckets[(i + 1) * buckets.size() / count - 1];
  }
  return rows;
}

Timeline TimelineOf(const RunLog& log) {
  Timeline timeline;
  timeline.rows = RowsOf(log.replays());
  std::vector<int64_t> steps;
  if (!log.replays().empty()) steps = {log.replays().front().step, log.replays().back().step};
  if (!log.violations_by_step().empty()) {
    steps.push_back(log.violations_by_step().begin()->first);
    steps.push_back(log.violations_by_step().rbegin()->first);
  }
  if (steps.empty()) return timeline;
  timeline.first = *std::min_element(steps.begin(), steps.end());
  timeline.last = *std::max_element(steps.begin(), steps.end());
  const int64_t span = timeline.last - timeline.first + 1;
  // Some steps to a column where there are many, for percentiles that say something.
  const int64_t wanted = std::clamp(span / 8, std::min(span, kColumns / 2), kColumns);
  timeline.width = (span + wanted - 1) / wanted;
  timeline.columns.resize(static_cast<size_t>((span + timeline.width - 1) / timeline.width));
  const auto column_of = [&timeline](int64_t step) -> Column& {
    return timeline.columns[static_cast<size_t>((step - timeline.first) / timeline.width)];
  };
  for (const LoggedReplay& replay : log.replays()) {
    const auto row = std::find_if(timeline.rows.begin(), timeline.rows.end(),
                                  [&replay](const BucketRow& of) { return replay.bucket <= of.to; });
    Column& column = column_of(replay.step);
    column.by_row.resize(timeline.rows.size());
    ++column.by_row[static_cast<size_t>(row - timeline.rows.begin())];
    for (auto count : {&column.replays, &row->replays}) ++*count;
    for (auto count : {&column.requests, &row->requests}) *count += replay.requests;
    for (auto count : {&column.rows, &row->rows}) *count += replay.bucket;
    const double waste = WasteOf(replay.requests, replay.bucket);
    column.least_waste = std::min(column.least_waste, waste);
    column.most_waste = std::max(column.most_waste, waste);
    column.us.push_back(replay.us);
    row->us.push_back(replay.us);
  }
  for (const auto& [step, count] : log.violations_by_step()) column_of(step).violations += count;
  for (size_t i = log.violations().size(); i-- > 0;) {
    column_of(log.violations()[i].step).first_listed = static_cast<int64_t>(i);
  }
  return timeline;
}

std::string DataJson(const Timeline& timeline) {
  std::vector<std::string> labels, columns;
  for (const BucketRow& row : timeline.rows) labels.push_back(JsonText(row.label()));
  for (const Column& column : timeline.columns) {
    const Percentiles us = PercentilesOf(column.us);
    std::vector<std::string> rows;
    for (size_t i = 0; i < column.by_row.size(); ++i) {
      if (column.by_row[i] > 0) rows.push_back(absl::StrCat(i, ",", column.by_row[i]));
    }
    columns.push_back(
        absl::StrCat(absl::StrCat("[", column.replays, ",", column.requests, ",", column.rows, ",",
                                  FixedText(column.replays > 0 ? column.least_waste : 0, 3), ","),
                     absl::StrCat(FixedText(column.most_waste, 3), ",", FixedText(us.p50, 1), ",", FixedText(us.p99, 1),
                                  ",", FixedText(us.max, 1), ","),
                     absl::StrCat(column.violations, ",", column.first_listed, ",[", absl::StrJoin(rows, ","), "]]")));
  }
  return absl::StrCat("{\"first\":", timeline.first, ",\"last\":", timeline.last, ",\"width\":", timeline.width,
                      ",\"buckets\":[", absl::StrJoin(labels, ","), "],\"columns\":[\n", absl::StrJoin(columns, ",\n"),
                      "]}");
}

class Page {
 public:
  Page(const RunReport& report, std::ostream& out) : report_(report), log_(report.log), out_(out) {}

  void Write() {
    const Timeline timeline = TimelineOf(log_);
    out_ << "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
            "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n"
            "<meta name=\"color-scheme\" content=\"light dark\">\n<title>"
         << HtmlText(absl::StrCat("Replay report: ", Verdict()), kMessage) << "</title>\n<style>" << kPageStyle
         << "</style></head>\n<body><main>\n";
    Header(timeline);
    Charts(timeline);
    ByBucket(timeline);
    Violations();
    Records();
    Details();
    out_ << "</main>\n<div id=\"tip\" role=\"status\" hidden></div>\n<script type=\"application/json\" id=\"data\">"
         << DataJson(timeline) << "</script>\n<script>" << kPageScript << "</script>\n</body></html>\n";
  }

 private:
  bool ok() const { return report_.exit_code == ExitCode::kOk; }
  std::string Verdict() const {
    switch (report_.exit_code) {
      case ExitCode::kOk:
        return "clean";
      case ExitCode::kViolation:
        return "violation";
      case ExitCode::kMismatch:
        return "mismatch";
      default:
        return "stopped";
    }
  }

  void Tile(const char* name, const std::string& value, const std::string& note = "", bool bad = false) {
    out_ << "<div class=\"tile" << (bad ? " bad" : "") << "\"><span>" << name << "</span><b>" << value << "</b><small>"
         << note << "</small></div>\n";
  }

  void Header(const Timeline& timeline) {
    int64_t requests = 0, rows = 0;
    for (const BucketRow& row : timeline.rows) {
      requests += row.requests;
      rows += row.rows;
    }
    const Percentiles us = PercentilesOf(report_.us_per_replay);
    out_ << "<header><h1>Replay report</h1><span class=\"pill " << (ok() ? "good" : "bad") << "\">"
         << (ok() ? "\u2713 " : "\u2715 ") << Verdict() << "</span>\n<p>"
         << HtmlText(report_.device.empty() ? "no device" : report_.device, kMessage) << " \u00b7 trace "
         << HtmlText(report_.trace, kMessage) << " \u00b7 Pristine " << PRISTINE_VERSION << "</p></header>\n";
    if (!ok()) out_ << "<p class=\"reason\">" << HtmlText(report_.exit_reason, kLongText) << "</p>\n";
    out_ << "<section class=\"tiles\">\n";
    Tile("Steps", CountText(report_.steps), Plural(report_.replays, "replay", "replays"));
    Tile("Tokens", CountText(report_.tokens),
         Plural(report_.requests_finished, "request finished", "requests finished"));
    Tile("Padding", PercentText(WasteOf(requests, rows)),
         absl::StrCat(CountText(rows - requests), " of ", CountText(rows), " rows"));
    Tile("Latency, median", TimeText(us.p50),
         absl::StrCat("p99 ", TimeText(us.p99), report_.host_emulation ? " \u00b7 emulated" : ""));
    Tile("Bucket changes", CountText(report_.bucket_changes),
         Plural(static_cast<int64_t>(timeline.rows.size()), "bucket used", "buckets used"));
    Tile("Violations", CountText(log_.total_violations()),
         log_.total_violations() == 0 ? "none" : "<a href=\"#violations\">see below</a>", log_.total_violations() > 0);
    out_ << "</section>\n";
  }

  void Chart(const char* kind, const char* title, const std::string& legend) {
    out_ << "<figure><figcaption><b>" << title << "</b><span class=\"legend\">" << legend
         << "</span></figcaption><div class=\"plot\" data-chart=\"" << kind << "\"></div></figure>\n";
  }

  void Charts(const Timeline& timeline) {
    out_ << "<section class=\"charts\"><h2>Over steps</h2>\n";
    if (log_.replays().empty()) {
      out_ << "<p class=\"empty\">Nothing was replayed.</p></section>\n";
      return;
    }
    out_ << "<p class=\"note\">"
         << (timeline.width == 1 ? "Each column is a step."
                                 : absl::StrCat("Each column is ", CountText(timeline.width), " steps."))
         << " Point at a chart for the numbers, or focus it and use the arrow keys.</p>\n<noscript><p "
            "class=\"note\">The charts need JavaScript; the tables below do not.</p></noscript>\n";
    const auto key = [](const char* style, const char* text) {
      return absl::StrCat("<span><i class=\"", style, "\"></i>", text, "</span>");
    };
    if (log_.total_violations() > 0) {
      Chart("violations", "Violations", key("k-bad", "steps with one; click for the first"));
    }
    Chart("buckets", "Bucket that ran <em>requests of its graph</em>",
          absl::StrCat("<span>share of the column\u2019s replays</span>",
                       "<span>few<i class=\"k-share\"></i>all</span>"));
    Chart("padding", "Padding <em>rows per replay, mean</em>",
          absl::StrCat(key("k-real", "requests"), key("k-pad", "padded rows")));
    Chart("latency", "Latency of a replay <em></em>",
          absl::StrCat(key("k-line", "median"), key("k-band", "up to p99"), key("k-clip", "p99 beyond the axis")));
    out_ << "</section>\n";
  }

  void ByBucket(const Timeline& timeline) {
    if (timeline.rows.empty()) return;
    out_ << "<section><h2>By bucket</h2>\n<div class=\"scroll\"><table class=\"numbers\"><thead><tr><th>Bucket</th>"
            "<th>Replays</th><th class=\"share\">Share</th><th>Requests</th><th>Padded rows</th><th>Padding</th>"
            "<th>Median</th><th>p99</th></tr></thead>\n<tbody>\n";
    BucketRow total;
    const auto row = [this](const std::string& label, const BucketRow& of, double share) {
      const Percentiles us = PercentilesOf(of.us);
      out_ << "<tr><th>" << label << "</th><td>" << CountText(of.replays)
           << "</td><td class=\"share\"><i style=\"width:" << FixedText(60 * share, 1) << "%\"></i>"
           << PercentText(share) << "</td><td>" << CountText(of.requests) << "</td><td>"
           << CountText(of.rows - of.requests) << "</td><td>" << PercentText(WasteOf(of.requests, of.rows))
           << "</td><td>" << TimeText(us.p50) << "</td><td>" << TimeText(us.p99) << "</td></tr>\n";
    };
    for (const BucketRow& of : timeline.rows) {
      total.replays += of.replays;
      total.requests += of.requests;
      total.rows += of.rows;
      total.us.insert(total.us.end(), of.us.begin(), of.us.end());
    }
    for (const BucketRow& of : timeline.rows) {
      row(of.label(), of, static_cast<double>(of.replays) / static_cast<double>(total.replays));
    }
    out_ << "</tbody><tfoot>\n";
    row("all", total, 1);
    out_ << "</tfoot></table></div></section>\n";
  }

  static std::string RecordId(const LoggedRecord& record) {
    return absl::StrCat("record-", record.shadow ? "s" : "", record.sequence);
  }

  void Violations() {
    out_ << "<section id=\"violations\"><h2>Violations</h2>\n";
    if (log_.total_violations() == 0) {
      out_ << "<p class=\"empty\">None"
           << (ok() ? "" : " that a replay reported; the reason of the outcome is at the top") << ".</p></section>\n";
      return;
    }
    std::vector<std::string> kinds;
    for (const auto& [kind, count] : log_.violations_by_kind()) {
      kinds.push_back(absl::StrCat("<span>", HtmlText(kind, kMessage), " <b>", CountText(count), "</b></span>"));
    }
    out_ << "<p class=\"kinds\">" << absl::StrJoin(kinds, " ") << "</p>\n";
    const int64_t listed = static_cast<int64_t>(log_.violations().size());
    if (listed < log_.total_violations()) {
      out_ << "<p class=\"note\">The first " << CountText(listed) << " of " << CountText(log_.total_violations())
           << " are listed; the chart and the counts above hold all.</p>\n";
    }
    out_ << "<ol class=\"violations\">\n";
    for (size_t i = 0; i < log_.violations().size(); ++i) {
      const LoggedViolation& violation = log_.violations()[i];
      const bool has_record = violation.record >= 0;
      out_ << "<li id=\"v" << i << "\"><span class=\"step\">step " << CountText(violation.step)
           << "</span><span class=\"message\">" << HtmlText(violation.message, kMessage) << "</span>";
      if (has_record) {
        const LoggedRecord& record = log_.records()[static_cast<size_t>(violation.record)];
        out_ << "<a href=\"#" << RecordId(record) << "\">record " << (record.shadow ? "s" : "") << record.sequence
             << "</a>";
      } else {
        out_ << "<a href=\"#record-none\">no record</a>";
      }
      out_ << "</li>\n";
    }
    out_ << "</ol></section>\n";
  }

  static const char* StatusClass(FlightRecord::Status status) {
    if (status == FlightRecord::Status::kClean) return "good";
    return status == FlightRecord::Status::kHealed ? "warn" : "bad";
  }
  static std::string StatusBadge(const LoggedRecord& record) {
    const bool clean = record.status == FlightRecord::Status::kClean;
    return absl::StrCat("<span class=\"status ", StatusClass(record.status), "\">", clean ? "\u2713 " : "\u25b2 ",
                        ToString(record.status), "</span>");
  }
  static std::string KeyText(const LoggedRecord& record) {
    return absl::StrCat(record.graph.empty() ? "" : absl::StrCat(HtmlText(record.graph, 60), " "),
                        record.bucket.requests, "\u202f\u00d7\u202f", record.bucket.tokens);
  }
  static std::string ExtentText(const LoggedRecord& record) {
    return record.extent.requests < 0 ? "not armed" : absl::StrCat(record.extent.requests);
  }
  static std::string TokensText(const LoggedRecord& record) {
    return record.extent.requests < 0 ? "\u2013" : absl::StrCat(record.extent.tokens);
  }
  static std::string TailsText(const LoggedRecord& record) {
    std::vector<std::string> tails;
    for (const auto& [buffer, value] : record.indptr_tails) {
      tails.push_back(absl::StrCat("<span>", HtmlText(buffer, 60), " = ", value, "</span>"));
    }
    return tails.empty() ? "\u2013" : absl::StrJoin(tails, " ");
  }

  void Records() {
    out_
        << "<section id=\"records\"><h2>Flight records</h2>\n<p class=\"note\">What the prologue wrote to pinned host "
           "memory, readable after the device context has died. Key: the graph and its bucket, requests \u00d7 tokens. "
           "Extent, tokens: the real requests and tokens of the step. Indptr tail: the last real value that the step "
           "gave. Status: of the prologue; what kernels of the body report is in the list above only.</p>\n";
    if (!log_.records().empty()) {
      out_ << "<h3>Of the violations</h3>\n";
      RecordTable(log_.records(), true);
    }
    const bool without = std::any_of(log_.violations().begin(), log_.violations().end(),
                                     [](const LoggedViolation& violation) { return violation.record < 0; });
    if (without) {
      out_ << "<p class=\"note target\" id=\"record-none\">No record: nothing was launched (the call was refused), it "
              "happened in a capture or warm-up, or it was found by the comparison after the last replay.</p>\n";
    }
    out_ << "<h3>The last " << log_.last_records().size() << "</h3>\n";
    RecordTable(log_.last_records(), false);
    out_ << "</section>\n";
  }

  // `targets`: links lead here.
  void RecordTable(const std::vector<LoggedRecord>& records, bool targets) {
    if (records.empty()) {
      out_ << "<p class=\"empty\">None.</p>\n";
      return;
    }
    std::vector<std::vector<size_t>> violations(targets ? records.size() : 0);
    for (size_t i = 0; targets && i < log_.violations().size(); ++i) {
      if (const int record = log_.violations()[i].record; record >= 0)
        violations[static_cast<size_t>(record)].push_back(i);
    }
    out_ << "<div class=\"scroll tall\"><table "
            "class=\"records\"><thead><tr><th>Record</th><th>Status</th><th>Replay</th>"
            "<th>Key</th><th>Extent</th><th>Tokens</th><th>Indptr tail</th>"
         << (targets ? "<th>Message</th>" : "") << "</tr></thead>\n<tbody>\n";
    for (size_t i = 0; i < records.size(); ++i) {
      const LoggedRecord& record = records[i];
      out_ << "<tr" << (targets ? absl::StrCat(" id=\"", RecordId(record), "\"") : "") << "><th>"
           << (record.shadow ? "s" : "") << record.sequence << "</th><td>" << StatusBadge(record) << "</td><td>"
           << record.replay << (record.shadow ? " <small>eager</small>" : "") << "</td><td>" << KeyText(record)
           << "</td><td>" << ExtentText(record) << "</td><td>" << TokensText(record) << "</td><td class=\"tails\">"
           << TailsText(record) << "</td>";
      if (targets) {
        const std::vector<size_t>& of = violations[i];
        out_ << "<td class=\"message\">" << HtmlText(log_.violations()[of.front()].message, kMessage) << " <a href=\"#v"
             << of.front() << "\">step " << CountText(log_.violations()[of.front()].step) << "</a>"
             << (of.size() > 1 ? absl::StrCat(" and ", of.size() - 1, " more") : "") << "</td>";
      }
      out_ << "</tr>\n";
    }
    out_ << "</tbody></table></div>\n";
  }

  void Details() {
    out_ << "<section><h2>The run</h2>\n<dl>\n";
    for (const auto& [name, value] : SummaryLines(report_)) {
      out_ << "<dt>" << HtmlText(name, kMessage) << "</dt><dd>" << HtmlText(value, kLongText) << "</dd>\n";
    }
    out_ << "<dt>command line</dt><dd><code>" << HtmlText(absl::StrJoin(report_.command_line, " "), kLongText)
         << "</code></dd>\n</dl></section>\n";
  }

  const RunReport& report_;
  const RunLog& log_;
  std::ostream& out_;
};

}  // namespace

void WriteHtml(const RunReport& report, std::ostream& out) { Page(report, out).Write(); }

}  // namespace pristine::replay_driver
