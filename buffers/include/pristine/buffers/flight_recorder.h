// The flight recorder: what the last replays were, in host-visible memory that outlives the device context.
// BufferManager::FlightRecords reads it.
#ifndef PRISTINE_BUFFERS_FLIGHT_RECORDER_H_
#define PRISTINE_BUFFERS_FLIGHT_RECORDER_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/types/span.h"
#include "pristine/buffers/violation.h"
#include "pristine/graph_runtime/extent.h"

namespace pristine {

// One run of a prologue at the head of a graph (or of an eager step). Trivially copyable; strings belong to the
// manager.
struct FlightRecord {
  enum class Status : int32_t {
    kClean,        // the prologue found nothing wrong
    kHealed,       // a constant was polluted; it was put back, and the step ran
    kRecorded,     // a rule was broken; the step ran with it (OnViolation::kRecord)
    kNeutralised,  // a rule was broken; the step was refused: the replay was made harmless
    kTrapped,      // a rule was broken; the stream was stopped (OnViolation::kTrap)
  };
  // The last real value of a kIndptr buffer as the step gave it, legal or not.
  struct IndptrTail {
    const char* buffer = nullptr;  // its name; null: there is none
    int32_t value = 0;
  };

  int64_t sequence = 0;    // 1, 2, …: its place among the manager's records
  const char* graph = "";  // with `bucket` the key of the graph; "" if the engine captured it
  Extent bucket;
  Extent extent;  // the real requests and tokens of the step; {-1, -1}: nobody had armed one
  // Of the first two kRefilled kIndptr buffers, by registration, that the bucket uses.
  std::array<IndptrTail, 2> indptr_tails;
  int64_t replay = 0;  // Violation::replay of what the replay reported, by kernels of its body too
  Status status = Status::kClean;
  // What decided the status. What kernels of the body report later changes neither.
  std::optional<Violation::Kind> violation;
};

const char* ToString(FlightRecord::Status status);

// A JSON array, one record a line:
// {"sequence": 7, "key": {"graph": "decode", "requests": 8, "tokens": 8}, "extent": {"requests": 5, "tokens": 5},
//  "indptr_tails": [{"buffer": "kv_indptr", "value": 90}], "replay": 7, "status": "clean", "violation": null}
std::string ToJson(absl::Span<const FlightRecord> records);

}  // namespace pristine

#endif  // PRISTINE_BUFFERS_FLIGHT_RECORDER_H_
