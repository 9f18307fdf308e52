// What a run amounts to: counted by the driver, written as a table and as JSON.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_REPORT_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_REPORT_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "examples/replay_driver/run_log.h"
#include "pristine/buffers/violation.h"

namespace pristine::replay_driver {

enum class ExitCode : int {
  kOk = 0,
  kUsage = 1,
  kInput = 2,
  kViolation = 3,
  kMismatch = 4,
  kDevice = 5,
  kInternal = 6,
};

// The first 100 of what happened, and how often it did.
class CappedList {
 public:
  void Add(std::string entry) {
    if (++total_ <= 100) entries_.push_back(std::move(entry));
  }
  const std::vector<std::string>& entries() const { return entries_; }
  int64_t total() const { return total_; }

 private:
  std::vector<std::string> entries_;
  int64_t total_ = 0;
};

// Where the time of rounds served with, or without, overlap went.
struct ServeTimes {
  int64_t replays = 0;
  double ms = 0;              // wall time
  double wait_ms = 0;         // of it: blocked until the device had come far enough
  double compare_ms = 0;      // of it: comparing with eager runs and the truth
  int64_t max_in_flight = 0;  // steps launched and not yet seen to be done
  int64_t ring_full = 0;      // steps that found every staging slot in flight
  double host_ms() const { return ms - wait_ms - compare_ms; }
  double steps_per_second() const { return ms > 0 ? 1000 * static_cast<double>(replays) / ms : 0; }
};

// What --spec=T came to.
struct SpecReport {
  struct Phase {
    std::string mode, family;          // what Route was asked, and what it answered
    std::vector<std::string> kernels;  // names of the captured nodes, each once, in order
    int64_t replays = 0;
  };
  int32_t draft_tokens = 0;  // T
  std::string draft_extend;
  int64_t rounds = 0;                    // with somebody active
  int64_t drafted = 0;                   // tokens
  int64_t accepted = 0;                  // of them
  int64_t rolled_back = 0;               // KV slots given back, of each layer: those of drafts that were not
  std::vector<int64_t> accepted_counts;  // [T + 1] how often 0, 1, … T of a request's drafts held
  std::vector<Phase> phases;
};

struct RunReport {
  std::vector<std::string> command_line;
  std::string device;
  bool host_emulation = false;
  std::string protection_level;
  std::string trace;
  std::string model;
  std::string plan_from, restore;
  int64_t steps = 0;
  int64_t requests_finished = 0;
  CappedList requests_refused;
  int64_t tokens = 0;
  int64_t bucket_changes = 0;
  int64_t captures = 0;
  int64_t replays = 0;
  std::vector<std::pair<int32_t, int64_t>> replays_by_bucket;  // requests, replays
  int64_t state_slots_handed_out = 0;                          // of a hybrid model
  int64_t restored_bytes = 0;
  int64_t expected_writes = 0;
  CappedList pollutions;            // memory that was written by who must not
  CappedList invariant_violations;  // values that break a rule, and misuses of a graph
  int64_t plan_mismatch_steps = 0;
  std::string first_plan_mismatch, first_mismatch;  // in words; "" if there was none
  bool plan_refused = false;                        // exit_reason says why
  int64_t first_failure_step = -1;                  // -1: none
  int64_t same_mismatches = 0;
  int64_t truth_mismatches = 0;
  int64_t truth_rows = 0;
  double max_rel_rms = 0;
  std::vector<double> us_per_replay;
  int32_t staging_slots = 0;
  std::optional<SpecReport> spec;                           // none: no speculation
  std::optional<ServeTimes> without_overlap, with_overlap;  // none: nothing was served that way
  double capture_ms = 0;
  std::string exit_reason = "ok";
  ExitCode exit_code = ExitCode::kOk;
  RunLog log;               // for the page
  std::string flight_json;  // what the flight recorder held at the end; "" if it never came to that

  void AddViolation(const Violation& violation);
  void FailAt(int64_t step) {
    if (first_failure_step < 0 || step < first_failure_step) first_failure_step = step;
  }
  // Of what was counted: kViolation before kMismatch before kOk.
  ExitCode Outcome() const;
};

struct Percentiles {
  double p50 = 0, p99 = 0, max = 0;
};
// All are values that are there; 0 if none is.
Percentiles PercentilesOf(std::vector<double> values);

// Name and value of each row of the summary, the device first.
std::vector<std::pair<std::string, std::string>> SummaryLines(const RunReport& report);
void PrintSummary(const RunReport& report, std::ostream& out);
void WriteJson(const RunReport& report, std::ostream& out);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_REPORT_H_
