#include "examples/replay_driver/report.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "examples/replay_driver/text.h"

namespace pristine::replay_driver {
namespace {

std::string ListText(const std::vector<std::string>& entries) {
  return absl::StrCat(
      "[",
      absl::StrJoin(entries, ", ", [](std::string* out, const std::string& entry) { out->append(JsonText(entry)); }),
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

std::string SpecText(const SpecReport& spec) {
  const double rounds = static_cast<double>(std::max<int64_t>(spec.drafted, 1)) / spec.draft_tokens;
  return absl::StrCat(spec.draft_tokens, " drafts, ", spec.draft_extend, " draft extend; ", spec.rounds, " rounds, ",
                      spec.accepted, " of ", spec.drafted, " drafts accepted, ",
                      NumberText(static_cast<double>(spec.accepted) / rounds), " each time; ", spec.rolled_back,
                      " slots rolled back");
}

std::string SpecJson(const std::optional<SpecReport>& spec) {
  if (!spec.has_value()) return "null";
  std::vector<std::string> phases;
  for (const SpecReport::Phase& phase : spec->phases) {
    phases.push_back(absl::StrCat("{\"mode\": ", JsonText(phase.mode), ", \"family\": ", JsonText(phase.family),
                                  ", \"replays\": ", phase.replays, ", \"kernels\": ", ListText(phase.kernels), "}"));
  }
  return absl::StrCat("{\"draft_tokens\": ", spec->draft_tokens, ", \"draft_extend\": ", JsonText(spec->draft_extend),
                      ", \"rounds\": ", spec->rounds, ", \"drafted\": ", spec->drafted,
                      ", \"accepted\": ", spec->accepted, ", \"rolled_back\": ", spec->rolled_back,
                      ", \"accepted_counts\": [", absl::StrJoin(spec->accepted_counts, ", "), "], \"phases\": [",
                      absl::StrJoin(phases, ", "), "]}");
}

}  // namespace

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

std::vector<std::pair<std::string, std::string>> SummaryLines(const RunReport& r) {
  std::vector<std::pair<std::string, std::string>> lines;
  const auto line = [&lines](const char* name, const std::string& value) { lines.emplace_back(name, value); };
  const Percentiles us = PercentilesOf(r.us_per_replay);
  std::vector<std::string> buckets;
  for (const auto& [bucket, replays] : r.replays_by_bucket) buckets.push_back(absl::StrCat(bucket, ": ", replays));
  line("device", absl::StrCat(r.device, r.host_emulation ? ", an emulation" : ""));
  line("protection", r.protection_level);
  line("trace", r.trace);
  line("model", r.model);
  line("plan from, restore", absl::StrCat(r.plan_from, ", ", r.restore));
  line("steps", absl::StrCat(r.steps));
  line("requests", absl::StrCat(r.requests_finished, " finished, ", r.requests_refused.total(), " refused"));
  line("tokens", absl::StrCat(r.tokens));
  line("captures", absl::StrCat(r.captures, " in ", NumberText(r.capture_ms), " ms"));
  line("replays", absl::StrCat(r.replays, " (", absl::StrJoin(buckets, ", "), ")"));
  if (r.spec.has_value()) {
    line("speculation", SpecText(*r.spec));
    for (const SpecReport::Phase& phase : r.spec->phases) {
      line(phase.mode.c_str(), absl::StrCat(phase.replays, " replays of ", phase.family, " kernels"));
    }
  }
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
  if (r.state_slots_handed_out > 0) line("state slots", absl::StrCat(r.state_slots_handed_out, " handed out"));
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
  return lines;
}

void PrintSummary(const RunReport& report, std::ostream& out) {
  for (const auto& [name, value] : SummaryLines(report)) {
    out << name << std::string(24 - name.size(), ' ') << value << "\n";
  }
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

  field("version", JsonText(PRISTINE_VERSION));
  field("command_line", ListText(r.command_line));
  field("device", JsonText(r.device));
  field("protection_level", JsonText(r.protection_level));
  field("trace", JsonText(r.trace));
  field("model", JsonText(r.model));
  field("steps", absl::StrCat(r.steps));
  field("requests_finished", absl::StrCat(r.requests_finished));
  field("requests_refused", absl::StrCat(r.requests_refused.total()));
  field("refused", ListText(r.requests_refused.entries()));
  field("tokens", absl::StrCat(r.tokens));
  field("bucket_changes", absl::StrCat(r.bucket_changes));
  field("captures", absl::StrCat(r.captures));
  field("replays", absl::StrCat(r.replays));
  field("replays_by_bucket", absl::StrCat("{", absl::StrJoin(buckets, ", "), "}"));
  field("state_slots_handed_out", absl::StrCat(r.state_slots_handed_out));
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
  field("spec", SpecJson(r.spec));
  field("capture_ms", NumberText(r.capture_ms));
  field("exit_code", absl::StrCat(static_cast<int>(r.exit_code)));
  field("exit_reason", JsonText(r.exit_reason));
  out << "{\n" << absl::StrJoin(fields, ",\n") << "\n}\n";
}

}  // namespace pristine::replay_driver
