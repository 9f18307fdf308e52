// How a prologue leaves a record of its replay in the flight recorder's ring. POD only: the .cu file includes this.
#ifndef PRISTINE_BUFFERS_KERNELS_FLIGHT_H_
#define PRISTINE_BUFFERS_KERNELS_FLIGHT_H_

#include <cstdint>

#include "pristine/graph_runtime/extent.h"

#ifdef __CUDACC__
#define PRISTINE_FLIGHT_HD __host__ __device__
#else
#define PRISTINE_FLIGHT_HD
#endif

namespace pristine::buffers {

inline constexpr int kFlightTails = 2;
inline constexpr int kFlightWords = 8;

enum class FlightStatus : int16_t { kClean, kHealed, kRecorded, kNeutralised, kTrapped };  // FlightRecord::Status

struct alignas(64) FlightEntry {
  uint64_t sequence = 0;  // 1 + its place in the order of records; 0: none yet
  uint64_t replay = 0;
  Extent bucket;
  Extent extent;
  int32_t tails[kFlightTails] = {};
  int32_t graph = -1;
  FlightStatus status = FlightStatus::kClean;
  int16_t violation = -1;  // Violation::Kind; -1: none
  uint64_t unused = 0;
  uint64_t check = 0;  // CheckOf the rest
};

// The entry as it is stored: a word at a time, in no order that anyone may rely on. Fences would cost each replay a
// round trip over the bus; instead a reader believes an entry only if its check word fits the others.
struct FlightWords {
  uint64_t word[kFlightWords];
};
static_assert(sizeof(FlightWords) == sizeof(FlightEntry));

// Words of two entries do not fit together: each word counts with a factor of its own.
PRISTINE_FLIGHT_HD inline uint64_t CheckOf(const FlightWords& words) {
  uint64_t sum = 0x9E3779B97F4A7C15u;
  for (int i = 0; i < kFlightWords - 1; ++i) {
    const uint64_t mixed =
        (words.word[i] ^ (words.word[i] >> 29)) * (0xBF58476D1CE4E5B9u + 2 * uint64_t(i) * 0x94D049BBu);
    sum += mixed ^ (mixed >> 32);
  }
  return sum;
}

PRISTINE_FLIGHT_HD inline FlightWords Seal(const FlightEntry& entry) {
  FlightWords words = __builtin_bit_cast(FlightWords, entry);
  words.word[kFlightWords - 1] = CheckOf(words);
  return words;
}

// Where the entry with the sequence 1 + `before` lies.
struct FlightRing {
  FlightEntry* entries = nullptr;  // host-visible; null: the recorder is off
  uint32_t mask = 0;               // how many there are, a power of two, less 1
  PRISTINE_FLIGHT_HD FlightEntry& At(uint64_t before) const { return entries[before & mask]; }
};

}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_KERNELS_FLIGHT_H_
