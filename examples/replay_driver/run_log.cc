#include "examples/replay_driver/run_log.h"

#include <algorithm>
#include <optional>

namespace pristine::replay_driver {

std::vector<FlightRecord> FlightRecordsOf(const BufferManager& manager) {
  std::vector<FlightRecord> records(static_cast<size_t>(ManagerOptions().flight_records));
  records.resize(manager.FlightRecords(absl::MakeSpan(records)));
  return records;
}

LoggedRecord::LoggedRecord(const FlightRecord& record, bool of_shadow)
    : shadow(of_shadow),
      sequence(record.sequence),
      replay(record.replay),
      graph(record.graph),
      bucket(record.bucket),
      extent(record.extent),
      status(record.status),
      violation(record.violation.has_value() ? ToString(*record.violation) : "") {
  for (const FlightRecord::IndptrTail& tail : record.indptr_tails) {
    if (tail.buffer != nullptr) indptr_tails.emplace_back(tail.buffer, tail.value);
  }
}

void RunLog::AddViolation(int64_t step, const std::string& kind, const std::string& message,
                          const LoggedRecord* record) {
  if (!enabled_) return;
  ++total_violations_;
  ++by_step_[step];
  ++by_kind_[kind];
  if (violations_.size() == kListed) return;
  LoggedViolation violation{step, kind, message};
  if (record != nullptr) {
    const auto same = [record](const LoggedRecord& other) {
      return other.sequence == record->sequence && other.shadow == record->shadow;
    };
    auto found = std::find_if(records_.begin(), records_.end(), same);
    if (found == records_.end()) found = records_.insert(records_.end(), *record);
    violation.record = static_cast<int>(found - records_.begin());
  }
  violations_.push_back(std::move(violation));
}

void RunLog::AddViolation(int64_t step, const Violation& violation, const BufferManager& manager, bool shadow) {
  if (!enabled_) return;
  std::optional<LoggedRecord> found;
  if (violations_.size() < kListed && violation.replay > 0) {  // else its record would not be kept
    const std::vector<FlightRecord> records = FlightRecordsOf(manager);
    const auto record = std::find_if(records.rbegin(), records.rend(), [&violation](const FlightRecord& candidate) {
      return candidate.replay == violation.replay;
    });
    if (record != records.rend()) found.emplace(*record, shadow);
  }
  AddViolation(step, ToString(violation.kind), violation.ToString(), found.has_value() ? &*found : nullptr);
}

void RunLog::SetLastRecords(absl::Span<const FlightRecord> records) {
  if (!enabled_) return;
  last_records_.clear();
  for (const FlightRecord& record : records.last(std::min(records.size(), kLastRecords))) {
    last_records_.emplace_back(record, false);
  }
}

}  // namespace pristine::replay_driver
