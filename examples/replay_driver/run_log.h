// What the page of a run (--html) is made from: every replay, the first violations, and what the flight recorder had of
// them.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_RUN_LOG_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_RUN_LOG_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/buffers/flight_recorder.h"
#include "pristine/buffers/violation.h"

namespace pristine::replay_driver {

struct LoggedReplay {
  int64_t step = 0;
  int32_t requests = 0;  // real ones; the bucket's others are padding
  int32_t bucket = 0;    // requests of the graph that ran
  float us = 0;
};

// All that the flight recorder of `manager` holds, oldest first.
std::vector<FlightRecord> FlightRecordsOf(const BufferManager& manager);

// A flight record that outlives its manager.
struct LoggedRecord {
  LoggedRecord() = default;
  LoggedRecord(const FlightRecord& record, bool shadow);

  bool shadow = false;  // of the eager run that the replay is compared with
  int64_t sequence = 0, replay = 0;
  std::string graph;
  Extent bucket, extent;
  std::vector<std::pair<std::string, int32_t>> indptr_tails;
  FlightRecord::Status status = FlightRecord::Status::kClean;
  std::string violation;  // its kind; "" if there was none
};

struct LoggedViolation {
  int64_t step = 0;
  std::string kind, message;
  int record = -1;  // in RunLog::records; -1: it has none
};

class RunLog {
 public:
  static constexpr size_t kListed = 300;      // violations that are kept in full
  static constexpr size_t kLastRecords = 32;  // of the flight recorder, at the end

  // Keeps nothing before this.
  void Enable() { enabled_ = true; }

  void AddReplay(const LoggedReplay& replay) {
    if (enabled_) replays_.push_back(replay);
  }
  // `record`: of the replay that reported it; null: there is none.
  void AddViolation(int64_t step, const std::string& kind, const std::string& message, const LoggedRecord* record);
  // What `manager` reported, with the flight record of its replay if that is still there. `shadow`: it is the shadow's.
  void AddViolation(int64_t step, const Violation& violation, const BufferManager& manager, bool shadow);
  void SetLastRecords(absl::Span<const FlightRecord> records);

  const std::vector<LoggedReplay>& replays() const { return replays_; }
  const std::vector<LoggedViolation>& violations() const { return violations_; }
  const std::vector<LoggedRecord>& records() const { return records_; }  // of the violations
  const std::vector<LoggedRecord>& last_records() const { return last_records_; }
  // Of all violations: those of each step, of each kind.
  const std::map<int64_t, int64_t>& violations_by_step() const { return by_step_; }
  const std::map<std::string, int64_t>& violations_by_kind() const { return by_kind_; }
  int64_t total_violations() const { return total_violations_; }

 private:
  bool enabled_ = false;
  std::vector<LoggedReplay> replays_;
  std::vector<LoggedViolation> violations_;
  std::vector<LoggedRecord> records_, last_records_;
  std::map<int64_t, int64_t> by_step_;
  std::map<std::string, int64_t> by_kind_;
  int64_t total_violations_ = 0;
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_RUN_LOG_H_
