#include "examples/replay_driver/driver.h"

#include <filesystem>
#include <fstream>
#include <new>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/options.h"
#include "examples/replay_driver/session.h"
#include "examples/replay_driver/trace.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {
namespace {

// Of a run that could not go on.
ExitCode ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    // What devices and streams say of themselves; a broken rule of this program has other codes.
    case absl::StatusCode::kAborted:            // the device is lost
    case absl::StatusCode::kInternal:           // a driver call or a kernel failed
    case absl::StatusCode::kResourceExhausted:  // no memory
    case absl::StatusCode::kUnavailable:        // no such GPU, or a driver that is too old
    case absl::StatusCode::kUnimplemented:      // built without CUDA
      return ExitCode::kDevice;
    case absl::StatusCode::kDataLoss:
      return ExitCode::kViolation;
    default:
      return ExitCode::kInternal;
  }
}

absl::Status Serve(const Options& options, const Environment& environment, const std::vector<TraceRequest>& trace,
                   RunReport& report) {
  Session session(options, environment, report);
  PRISTINE_RETURN_IF_ERROR(session.SetUp());
  absl::Status status;
  for (int32_t round = 0; round < options.repeat && status.ok() && !report.plan_refused; ++round) {
    status = session.Serve(trace);
  }
  status.Update(session.Finish());
  return status;
}

void Conclude(const absl::Status& status, RunReport& report) {
  if (!status.ok()) {
    report.exit_code = ExitCodeOf(status);
    report.exit_reason = std::string(status.message());
    return;
  }
  report.exit_code = report.Outcome();
  if (report.exit_code == ExitCode::kOk || report.plan_refused) return;
  std::string reason;
  const auto add = [&reason](int64_t count, const char* what, const std::string& first) {
    if (count > 0) absl::StrAppend(&reason, reason.empty() ? "" : "; ", count, " ", what, ", the first: ", first);
  };
  const auto first = [](const CappedList& list) { return list.total() > 0 ? list.entries().front() : ""; };
  add(report.plan_mismatch_steps, "steps in which plan and conversion disagree", report.first_plan_mismatch);
  add(report.pollutions.total(), "pollutions", first(report.pollutions));
  add(report.invariant_violations.total(), "invariant violations", first(report.invariant_violations));
  add(report.same_mismatches + report.truth_mismatches, "mismatches", report.first_mismatch);
  report.exit_reason = reason;
}

// Leaves the outcome in `report`, whatever it is.
void Run(const Options& options, const Environment& environment, RunReport& report) {
  try {
    const absl::StatusOr<std::vector<TraceRequest>> trace =
        options.synthetic() ? SyntheticTrace(options.seed, options.step_limit() * options.step_ms * kTicksPerMs)
                            : ReadTrace(options.trace, options.format);
    if (trace.ok()) return Conclude(Serve(options, environment, *trace, report), report);
    report.exit_code = ExitCode::kInput;
    report.exit_reason = std::string(trace.status().message());
  } catch (const std::bad_alloc&) {  // the one thing that containers can say in no other way
    Conclude(absl::ResourceExhaustedError("this machine has no memory left for the run's host arrays"), report);
  }
}

// Opening it for writing would empty the trace before it is read.
bool ReportIsTheTrace(const Options& options) {
  std::error_code error;
  return !options.synthetic() && std::filesystem::equivalent(options.report, options.trace, error) && !error;
}

}  // namespace

ExitCode RunDriver(const std::vector<std::string>& args, const Environment& environment) {
  const auto fail = [&environment](ExitCode code, const std::string& message) {
    environment.err << "replay_driver: " << message << std::endl;
    return code;
  };
  const absl::StatusOr<Options> options = ParseOptions(args);
  if (!options.ok()) return fail(ExitCode::kUsage, std::string(options.status().message()));
  if (options->help) {
    environment.out << HelpText();
    return ExitCode::kOk;
  }
  std::ofstream report_file;
  if (!options->report.empty()) {
    if (ReportIsTheTrace(*options)) {
      return fail(ExitCode::kUsage,
                  absl::StrCat("--report=", options->report, ": is the trace; expected another file"));
    }
    report_file.open(options->report);
    if (!report_file) {
      return fail(ExitCode::kUsage,
                  absl::StrCat("--report=", options->report, ": expected a file that can be written"));
    }
  }

  RunReport report;
  report.command_line = {"replay_driver"};
  report.command_line.insert(report.command_line.end(), args.begin(), args.end());
  report.trace = options->trace;
  report.plan_from = ToString(options->plan_from);
  report.restore = ToString(options->restore);
  Run(*options, environment, report);

  if (environment.terminal && !options->quiet) environment.err << "\r\x1b[K";  // the progress line
  if (!options->report.empty()) {
    WriteJson(report, report_file);
    report_file.close();
    if (!report_file && report.exit_code == ExitCode::kOk) {
      report.exit_code = ExitCode::kInternal;
      report.exit_reason = absl::StrCat("--report=", options->report, ": could not be written in full");
    }
  }
  if (!options->quiet && !report.device.empty()) PrintSummary(report, environment.out);
  if (!options->quiet) {
    for (const std::string& refused : report.requests_refused.entries()) {
      environment.err << "replay_driver: refused: " << refused << "\n";
    }
  }
  return report.exit_code == ExitCode::kOk ? ExitCode::kOk : fail(report.exit_code, report.exit_reason);
}

}  // namespace pristine::replay_driver
