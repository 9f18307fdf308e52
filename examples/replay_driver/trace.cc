#include "examples/replay_driver/trace.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <fstream>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/types/span.h"
#include "examples/replay_driver/kv_hash.h"
#include "examples/replay_driver/trace_line.h"

namespace pristine::replay_driver {
namespace {

constexpr char kHeader[] = "TIMESTAMP,ContextTokens,GeneratedTokens";

// Days since 1970-01-01 in the Gregorian calendar; years start in March, so that the leap day is the last.
int64_t DaysSinceEpoch(int64_t year, int64_t month, int64_t day) {
  year -= month <= 2;
  const int64_t era = year / 400;
  const int64_t year_of_era = year - era * 400;
  const int64_t day_of_year = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1;
  return era * 146097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719468;
}

int DaysIn(int year, int month) {
  constexpr int kDays[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
  const bool leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
  return kDays[month - 1] + (month == 2 && leap ? 1 : 0);
}

// "2023-11-16 18:17:03.9799600", with 0 to 7 digits of a fraction. False: not of that form.
bool ParseTimestamp(const std::string& text, int64_t& ticks) {
  const std::string form = "dddd-dd-dd dd:dd:dd";
  if (text.size() < form.size() || text.size() > form.size() + 8 || text.size() == form.size() + 1) return false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char expected = i < form.size() ? form[i] : i == form.size() ? '.' : 'd';
    const bool digit = text[i] >= '0' && text[i] <= '9';
    if (expected == 'd' ? !digit : text[i] != expected) return false;
  }
  const auto number = [&text](size_t begin, size_t digits) {
    int value = 0;
    for (size_t i = begin; i < begin + digits; ++i) value = value * 10 + (text[i] - '0');
    return value;
  };
  const int year = number(0, 4), month = number(5, 2), day = number(8, 2);
  const int hour = number(11, 2), minute = number(14, 2), second = number(17, 2);
  if (month < 1 || month > 12 || day < 1 || day > DaysIn(year, month)) return false;
  if (hour > 23 || minute > 59 || second > 60) return false;
  int64_t fraction = 0;
  for (size_t i = 0; i < 7; ++i) {
    const size_t at = form.size() + 1 + i;
    fraction = fraction * 10 + (at < text.size() ? text[at] - '0' : 0);
  }
  const int64_t seconds = ((DaysSinceEpoch(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
  ticks = seconds * 1000 * kTicksPerMs + fraction;
  return true;
}

bool ParseTokens(const std::string& text, int32_t& tokens) {
  return absl::SimpleAtoi(text, &tokens) && tokens >= 0 && tokens <= kMostTokens;
}

// A quantile function, linear between its points.
struct QuantilePoint {
  double at, value;
};
constexpr QuantilePoint kContext[] = {{0, 3},      {.05, 75},   {.25, 578},  {.5, 1469},
                                      {.75, 2745}, {.95, 7315}, {.99, 7436}, {1, 7437}};
constexpr QuantilePoint kGenerated[] = {{0, 6},    {.05, 6},  {.25, 9},   {.5, 13},
                                        {.75, 24}, {.95, 90}, {.99, 252}, {1, 1899}};

int32_t Quantile(absl::Span<const QuantilePoint> points, double uniform) {
  size_t next = 1;
  while (next + 1 < points.size() && points[next].at < uniform) ++next;
  const QuantilePoint &low = points[next - 1], &high = points[next];
  return static_cast<int32_t>(
      std::lround(low.value + (high.value - low.value) * (uniform - low.at) / (high.at - low.at)));
}

}  // namespace

absl::Status RefuseLine(const std::string& file, int64_t line, const std::string& expected, const std::string& found) {
  // A binary file's "line" can be anything: show a piece of it, printable.
  std::string shown = found.substr(0, 60);
  for (char& c : shown) c = c >= ' ' && c <= '~' ? c : '?';
  return absl::InvalidArgumentError(absl::StrCat(file, ":", line, ": expected ", expected, ", found '", shown, "'"));
}

void SortByArrival(std::vector<TraceRequest>& requests) {
  std::stable_sort(requests.begin(), requests.end(),
                   [](const TraceRequest& a, const TraceRequest& b) { return a.arrival < b.arrival; });
  if (requests.empty()) return;
  const int64_t first = requests.front().arrival;
  for (TraceRequest& request : requests) request.arrival -= first;
}

absl::StatusOr<std::vector<TraceRequest>> ParseAzureCsv(std::istream& in, const std::string& name) {
  std::vector<TraceRequest> requests;
  std::string line;
  int64_t number = 0;
  const auto refuse = [&](const std::string& expected, const std::string& found) {
    return RefuseLine(name, number, expected, found);
  };
  while (std::getline(in, line)) {
    ++number;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (number == 1) {
      if (line != kHeader) return refuse(absl::StrCat("the header ", kHeader), line);
      continue;
    }
    const std::vector<std::string> fields = absl::StrSplit(line, ',');
    if (fields.size() != 3) return refuse("3 fields: a timestamp, context tokens, generated tokens", line);
    TraceRequest request;
    if (!ParseTimestamp(fields[0], request.arrival))
      return refuse("a timestamp like 2023-11-16 18:17:03.9799600", fields[0]);
    if (!ParseTokens(fields[1], request.context)) return refuse("context tokens in [0, 10^9]", fields[1]);
    if (!ParseTokens(fields[2], request.generated)) return refuse("generated tokens in [0, 10^9]", fields[2]);
    requests.push_back(request);
  }
  if (in.bad()) return absl::InvalidArgumentError(absl::StrCat(name, ":", number + 1, ": cannot be read"));
  if (requests.empty()) {
    ++number;
    return refuse(number == 1 ? absl::StrCat("the header ", kHeader) : "at least one request", "end of file");
  }
  SortByArrival(requests);
  return requests;
}

absl::StatusOr<std::vector<TraceRequest>> ReadTrace(const std::string& path, TraceFormat format) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened; expected a readable trace file"));
  return format == TraceFormat::kMooncakeJsonl ? ParseMooncakeJsonl(in, path) : ParseAzureCsv(in, path);
}

std::vector<TraceRequest> SyntheticTrace(uint64_t seed, int64_t duration) {
  constexpr double kMeanTicks = 250.0 * kTicksPerMs;
  std::vector<TraceRequest> requests;
  uint64_t draws = 0;
  // In (0, 1): 53 bits, never 0, whose logarithm is taken.
  const auto uniform = [&] { return (static_cast<double>(Combine(seed, draws++) >> 11) + 0.5) * 0x1p-53; };
  double arrival = 0;
  do {
    TraceRequest request;
    request.arrival = static_cast<int64_t>(arrival);
    request.context = Quantile(kContext, uniform());
    request.generated = Quantile(kGenerated, uniform());
    requests.push_back(request);
    arrival -= kMeanTicks * std::log(uniform());
  } while (arrival < static_cast<double>(duration));
  return requests;
}

}  // namespace pristine::replay_driver
