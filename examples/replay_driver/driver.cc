#include "examples/replay_driver/driver.h"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <new>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "examples/replay_driver/html_report.h"
#include "examples/replay_driver/options.h"
#include "examples/replay_driver/session.h"
#include "examples/replay_driver/spec_session.h"
#include "examples/replay_driver/trace.h"
#include "pristine/attention/gdn/prefill.h"
#include "pristine/attention/gdn/tuning.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {
namespace {

// What the environment asks of kernels is known before anything runs, as an option is.
absl::Status CheckEnvironment(const Options& options) {
  namespace gdn = attention::gdn;
  if (options.model != ModelKind::kHybrid || options.dtype != attention::DType::kBFloat16) return absl::OkStatus();
  const gdn::TunableKernel kernel = gdn::PrefillStateKernel();
  PRISTINE_ASSIGN_OR_RETURN(const gdn::GdnTuning tuning, gdn::GdnTuningFromEnvironment(kernel.compiled));
  return gdn::CheckTuning(tuning, kernel, std::numeric_limits<int64_t>::max());
}

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

template <class Session>
absl::Status Serve(const Options& options, const Environment& environment, const std::vector<TraceRequest>& trace,
                   RunReport& report) {
  Session session(options, environment, report);
  PRISTINE_RETURN_IF_ERROR(session.SetUp());
  absl::Status status;
  for (int32_t round = 0; round < options.repeat && status.ok() && !report.plan_refused; ++round) {
    status = session.Serve(trace);
  }
  status.Update(session.Finish());
  session.KeepFlightRecords();
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
    if (trace.ok()) {
      const auto serve = options.spec > 0 ? Serve<SpecSession> : Serve<Session>;
      return Conclude(serve(options, environment, *trace, report), report);
    }
    report.exit_code = ExitCode::kInput;
    report.exit_reason = std::string(trace.status().message());
  } catch (const std::bad_alloc&) {  // the one thing that containers can say in no other way
    Conclude(absl::ResourceExhaustedError("this machine has no memory left for the run's host arrays"), report);
  }
}

bool SameFile(const std::string& a, const std::string& b) {
  std::error_code error;
  return std::filesystem::equivalent(a, b, error) && !error;
}

// A file that an option names. Opened before the run: whether it can be written is known at once.
class OutputFile {
 public:
  OutputFile(const char* option, const std::string& path) : option_(option), path_(path) {}
  bool wanted() const { return !path_.empty(); }
  std::string name() const { return absl::StrCat("--", option_, "=", path_); }

  // In words, what is wrong with it; "": nothing. Opening it would empty the trace before it is read.
  std::string Open(const Options& options, absl::Span<OutputFile> before) {
    if (!wanted()) return "";
    if (!options.synthetic() && SameFile(path_, options.trace)) {
      return absl::StrCat(name(), ": is the trace; expected another file");
    }
    for (const OutputFile& other : before) {
      if (other.wanted() && SameFile(path_, other.path_)) {
        return absl::StrCat(name(), ": is the file of --", other.option_, "; expected another file");
      }
    }
    file_.open(path_);
    return file_ ? "" : absl::StrCat(name(), ": expected a file that can be written");
  }
  template <class Write>
  void Finish(Write write, RunReport& report) {
    if (!wanted()) return;
    write(file_);
    file_.close();
    if (file_ || report.exit_code != ExitCode::kOk) return;
    report.exit_code = ExitCode::kInternal;
    report.exit_reason = absl::StrCat(name(), ": could not be written in full");
  }

 private:
  const char* const option_;
  const std::string path_;
  std::ofstream file_;
};

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
  const absl::Status environment_status = CheckEnvironment(*options);
  if (!environment_status.ok()) return fail(ExitCode::kUsage, std::string(environment_status.message()));
  OutputFile files[] = {{"report", options->report}, {"html", options->html}, {"flight-json", options->flight_json}};
  auto& [report_file, html_file, flight_file] = files;
  for (OutputFile& file : files) {
    const std::string wrong = file.Open(*options, absl::MakeSpan(files, static_cast<size_t>(&file - files)));
    if (!wrong.empty()) return fail(ExitCode::kUsage, wrong);
  }

  RunReport report;
  report.command_line = {"replay_driver"};
  report.command_line.insert(report.command_line.end(), args.begin(), args.end());
  report.trace = options->trace;
  report.model = ToString(options->model);
  report.plan_from = ToString(options->plan_from);
  report.restore = ToString(options->restore);
  if (html_file.wanted()) report.log.Enable();
  Run(*options, environment, report);

  if (environment.terminal && !options->quiet) environment.err << "\r\x1b[K";  // the progress line
  flight_file.Finish([&](std::ostream& out) { out << (report.flight_json.empty() ? "[]\n" : report.flight_json); },
                     report);
  html_file.Finish([&](std::ostream& out) { WriteHtml(report, out); }, report);
  report_file.Finish([&](std::ostream& out) { WriteJson(report, out); }, report);
  if (!options->quiet && !report.device.empty()) PrintSummary(report, environment.out);
  if (!options->quiet) {
    for (const std::string& refused : report.requests_refused.entries()) {
      environment.err << "replay_driver: refused: " << refused << "\n";
    }
  }
  return report.exit_code == ExitCode::kOk ? ExitCode::kOk : fail(report.exit_code, report.exit_reason);
}

}  // namespace pristine::replay_driver
