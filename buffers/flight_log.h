// The host's side of the flight recorder: the ring, and how it is read while prologues write.
#ifndef PRISTINE_BUFFERS_FLIGHT_LOG_H_
#define PRISTINE_BUFFERS_FLIGHT_LOG_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "buffers/kernels/flight.h"
#include "pristine/graph_runtime/device.h"

namespace pristine::buffers {

class FlightLog {
 public:
  FlightLog() = default;  // keeps nothing
  // Room for at least `records`; none if 0.
  static absl::StatusOr<FlightLog> Create(Device& device, int records);

  // For kernels.
  FlightRing ring() const;
  size_t capacity() const { return pinned_.bytes() / sizeof(FlightEntry); }

  // The entry with that sequence; false: it is not there, not yet, no more, or torn.
  bool Read(uint64_t sequence, FlightEntry& entry) const;
  // The sequence of the newest entry that is whole; 0: there is none.
  uint64_t Newest() const;

 private:
  PinnedBuffer pinned_;
};

// Reads the entry at `from`, which may be written meanwhile. False: empty or torn.
bool ReadWhole(const FlightEntry& from, FlightEntry& entry);

}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_FLIGHT_LOG_H_
