#include "buffers/flight_log.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <utility>

#include "pristine/graph_runtime/status.h"

namespace pristine::buffers {

absl::StatusOr<FlightLog> FlightLog::Create(Device& device, int records) {
  FlightLog log;
  if (records == 0) return log;
  const size_t capacity = std::bit_ceil(static_cast<size_t>(records));
  PRISTINE_ASSIGN_OR_RETURN(log.pinned_, device.AllocatePinned(capacity * sizeof(FlightEntry), "flight recorder"));
  return log;
}

FlightRing FlightLog::ring() const {
  if (capacity() == 0) return {};
  return {static_cast<FlightEntry*>(pinned_.device_address()), static_cast<uint32_t>(capacity() - 1)};
}

bool ReadWhole(const FlightEntry& from, FlightEntry& entry) {
  // Alignment and size are those of the words.
  auto* const source = reinterpret_cast<uint64_t*>(const_cast<FlightEntry*>(&from));
  FlightWords words;
  for (int i = 0; i < kFlightWords; ++i) {
    words.word[i] = std::atomic_ref(source[i]).load(std::memory_order_relaxed);
  }
  entry = std::bit_cast<FlightEntry>(words);
  return entry.sequence != 0 && entry.check == CheckOf(words);
}

bool FlightLog::Read(uint64_t sequence, FlightEntry& entry) const {
  if (capacity() == 0 || sequence == 0) return false;
  const auto* const entries = reinterpret_cast<const FlightEntry*>(pinned_.host());
  return ReadWhole(entries[(sequence - 1) & (capacity() - 1)], entry) && entry.sequence == sequence;
}

uint64_t FlightLog::Newest() const {
  const auto* const entries = reinterpret_cast<const FlightEntry*>(pinned_.host());
  uint64_t newest = 0;
  FlightEntry entry;
  for (size_t i = 0; i < capacity(); ++i) {
    if (ReadWhole(entries[i], entry)) newest = std::max(newest, entry.sequence);
  }
  return newest;
}

}  // namespace pristine::buffers
