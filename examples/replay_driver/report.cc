#include "examples/replay_driver/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace pristine::replay_driver {
namespace {

struct Percentiles {
  double p50 = 0, p99 = 0, max = 0;
};

Percentiles PercentilesOf(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  // The smallest value that at least this part of all values does not exceed.
  const auto at = [&values](double part) {
    const double rank = std::ceil(part * static_cast<double>(values.size()));
    return values[static_cast<size_t>(std::max(rank, 1.0)) - 1];
  };
  return {at(0.5), at(0.99), values.back()};
}

// Bytes of the UTF-8 character that `text` has at `at`; 0: none, such as an overlong form or half of a surrogate pair.
size_t Utf8Bytes(const std::string& text, size_t at) {
  const auto byte = [&](size_t i) -> uint32_t { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0; };
  const uint32_t lead = byte(at);
  if (lead < 0x80) return 1;
  const size_t bytes = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  uint32_t code = lead & (0xffu >> (bytes + 1));
  for (size_t i = 1; i < bytes; ++i) {
    if ((byte(at + i) & 0xc0) != 0x80) return 0;
    code = code << 6 | (byte(at + i) & 0x3f);
  }
  constexpr uint32_t kLeast[] = {0x80, 0x800, 0x10000};
  const bool exists =
      lead >= 0xc0 && lead < 0xf8 && code >= kLeast[bytes - 2] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff);
  return exists ? bytes : 0;
}

// JSON is UTF-8: a byte that is not becomes the replacement character.
std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (size_t at = 0; at < text.size();) {
    const char c = text[at];
    const size_t bytes = Utf8Bytes(text, at);
    if (bytes == 0) {
      quoted += "\\ufffd";
    } else if (c == '"' || c == '\\') {
      quoted += {'\\', c};
    } else if (bytes == 1 && (c < ' ' || c == '\x7f')) {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\u%04x", static_cast<unsigned>(c));
      quoted += escaped;
    } else {
      quoted.append(text, at, bytes);
    }
    at += std::max<size_t>(bytes, 1);
  }
  return quoted + "\"";
}

std::string NumberText(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  std::snprintf(text, sizeof(text), "%.6g", value);
  return text;
}

std::string ListText(const std::vector<std::string>& entries) {
  return absl::StrCat(
      "[", absl::StrJoin(entries, ", ", [](std::string* out, const std::string& entry) { out->append(Quoted(entry)); }),
      "]");
}

// "" if nothing was served that way.
std::string TimesText(const std::optional<ServeTimes>& times) {
  if (!times.has_value() || times->replays == 0) return "";
  const auto us = [&times](double ms) { return NumberText(1000 * ms / static_cast<double>(times->replays)); };
  return absl::StrCat(NumberText(times->steps_per_second()), " steps/s; us per step: host ", us(times->host_ms()),
                      ", waiting ", us(times->wait_ms), ", comparing ", us(times->compare_ms), "; in flight at most ",
                      times->max_in_flight, ", ring full ", times->ring_full, " times");
}

std::string TimesJson(const std::optional<ServeTimes>& times) {
  if (!times.has_value()) return "null";
  return absl::StrCat("{\"replays\": ", times->replays,
                      ", \"steps_per_second\": ", NumberText(times->steps_per_second()),
                      ", \"host_ms\": ", NumberText(times->host_ms()), ", \"wait_ms\": ", NumberText(times->wait_ms),
                      ", \"compare_ms\": ", NumberText(times->compare_ms),
                      ", \"max_in_flight\": ", times->max_in_flight, ", \"ring_full\": ", times->ring_full, "}");
}

}  // namespace

void RunReport::AddViolation(const Violation& violation) {
  switch (violation.kind) {
    case Violation::Kind::kPolluted:
    case Violation::Kind::kGuardBand:
    case Violation::Kind::kOriginalChanged:
    case Violation::Kind::kUndeclaredWrite:
      return pollutions.Add(violation.ToString());
    default:
      return invariant_violations.Add(violation.ToString());
  }
}

ExitCode RunReport::Outcome() const {
  if (plan_refused || plan_mismatch_steps > 0 || pollutions.total() > 0 || invariant_violations.total() > 0) {
    return ExitCode::kViolation;
  }
  return same_mismatches + truth_mismatches > 0 ? ExitCode::kMismatch : ExitCode::kOk;
}

void PrintSummary(const RunReport& r, std::ostream& out) {
  const auto line = [&out](const char* name, const std::string& value) {
    std::string left = name;
    left.resize(24, ' ');
    out << left << value << "\n";
  };
  const Percentiles us = PercentilesOf(r.us_per_replay);
  std::vector<std::string> buckets;
  for (const auto& [bucket, replays] : r.replays_by_bucket) buckets.push_back(absl::StrCat(bucket, ": ", replays));
  line("device", absl::StrCat(r.device, r.host_emulation ? ", an emulation" : ""));
  line("protection", r.protection_level);
  line("trace", r.trace);
  line("plan from, restore", absl::StrCat(r.plan_from, ", ", r.restore));
  line("steps", absl::StrCat(r.steps));
  line("requests", absl::StrCat(r.requests_finished, " finished, ", r.requests_refused.total(), " refused"));
  line("tokens", absl::StrCat(r.tokens));
  line("captures", absl::StrCat(r.captures, " in ", NumberText(r.capture_ms), " ms"));
  line("replays", absl::StrCat(r.replays, " (", absl::StrJoin(buckets, ", "), ")"));
  line("bucket changes", absl::StrCat(r.bucket_changes));
  line("us per replay",
       absl::StrCat("p50 ", NumberText(us.p50), ", p99 ", NumberText(us.p99), ", max ", NumberText(us.max)));
  const std::string without = TimesText(r.without_overlap), with = TimesText(r.with_overlap);
  if (!without.empty()) line("without overlap", without);
  if (!with.empty()) line("with overlap", with);
  if (!without.empty() && !with.empty()) {
    line("gain", absl::StrCat(NumberText(r.with_overlap->steps_per_second() / r.without_overlap->steps_per_second()),
                              " times the steps per second"));
  }
  line("restored bytes", absl::StrCat(r.restored_bytes));
  line("expected writes", absl::StrCat(r.expected_writes));
  line("pollutions", absl::StrCat(r.pollutions.total()));
  line("invariant violations", absl::StrCat(r.invariant_violations.total()));
  line("plan mismatch steps", absl::StrCat(r.plan_mismatch_steps));
  line("same mismatches", absl::StrCat(r.same_mismatches));
  line("truth mismatches", absl::StrCat(r.truth_mismatches, " of ", r.truth_rows, " rows, largest relative RMS ",
                                        std::isfinite(r.max_rel_rms) ? NumberText(r.max_rel_rms) : "not finite"));
  if (r.first_failure_step >= 0) line("first failure in step", absl::StrCat(r.first_failure_step));
  line("result", absl::StrCat(r.exit_reason, " (exit ", static_cast<int>(r.exit_code), ")"));
}

void WriteJson(const RunReport& r, std::ostream& out) {
  std::vector<std::string> fields;
  const auto field = [&fields](const char* name, const std::string& json) {
    fields.push_back(absl::StrCat("  \"", name, "\": ", json));
  };
  const auto list = [&field](const char* name, const CappedList& values) {
    field(name, ListText(values.entries()));
    field(absl::StrCat(name, "_total").c_str(), absl::StrCat(values.total()));
  };
  std::vector<std::string> buckets;
  for (const auto& [bucket, replays] : r.replays_by_bucket) {
    buckets.push_back(absl::StrCat("\"", bucket, "\": ", replays));
  }
  const Percentiles us = PercentilesOf(r.us_per_replay);

  field("version", Quoted(PRISTINE_VERSION));
  field("command_line", ListText(r.command_line));
  field("device", Quoted(r.device));
  field("protection_level", Quoted(r.protection_level));
  field("trace", Quoted(r.trace));
  field("steps", absl::StrCat(r.steps));
  field("requests_finished", absl::StrCat(r.requests_finished));
  field("requests_refused", absl::StrCat(r.requests_refused.total()));
  field("refused", ListText(r.requests_refused.entries()));
  field("tokens", absl::StrCat(r.tokens));
  field("bucket_changes", absl::StrCat(r.bucket_changes));
  field("captures", absl::StrCat(r.captures));
  field("replays", absl::StrCat(r.replays));
  field("replays_by_bucket", absl::StrCat("{", absl::StrJoin(buckets, ", "), "}"));
  field("restored_bytes", absl::StrCat(r.restored_bytes));
  field("expected_writes", absl::StrCat(r.expected_writes));
  list("pollutions", r.pollutions);
  list("invariant_violations", r.invariant_violations);
  field("plan_mismatch_steps", absl::StrCat(r.plan_mismatch_steps));
  field("first_failure_step", r.first_failure_step < 0 ? "null" : absl::StrCat(r.first_failure_step));
  field("same_mismatches", absl::StrCat(r.same_mismatches));
  field("truth_mismatches", absl::StrCat(r.truth_mismatches));
  field("truth_rows", absl::StrCat(r.truth_rows));
  field("max_rel_rms", NumberText(r.max_rel_rms));
  field("us_per_replay", absl::StrCat("{\"p50\": ", NumberText(us.p50), ", \"p99\": ", NumberText(us.p99),
                                      ", \"max\": ", NumberText(us.max),
                                      ", \"host_emulation\": ", r.host_emulation ? "true" : "false", "}"));
  field("overlap", absl::StrCat("{\"staging_slots\": ", r.staging_slots, ", \"off\": ", TimesJson(r.without_overlap),
                                ", \"on\": ", TimesJson(r.with_overlap), "}"));
  field("capture_ms", NumberText(r.capture_ms));
  field("exit_code", absl::StrCat(static_cast<int>(r.exit_code)));
  field("exit_reason", Quoted(r.exit_reason));
  out << "{\n" << absl::StrJoin(fields, ",\n") << "\n}\n";
}

}  // namespace pristine::replay_driver
