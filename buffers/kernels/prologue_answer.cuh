// What one block of the prologue tells: reports of what was wrong, the counters that the host sees, the flight
// recorder.
#ifndef PRISTINE_BUFFERS_KERNELS_PROLOGUE_ANSWER_CUH_
#define PRISTINE_BUFFERS_KERNELS_PROLOGUE_ANSWER_CUH_

#include <cstdint>

#include "buffers/kernels/flight.h"
#include "buffers/kernels/prologue_tiles.cuh"

namespace pristine::buffers {
namespace {

template <class Body>
__device__ void ForEachBuffer(const PrologueParams& p, Body body) {
  for (int32_t c = 0; c < p.num_chunks; ++c) {
    const ChunkTable& table = TableOf(p, c);
    for (int32_t i = 0; i < table.count; ++i) {
      const BufferRecord& record = table.records[i];
      if (Covers(p, record)) body(record);
    }
  }
}

__device__ int64_t ElementValue(const std::byte* address, int64_t element_bytes) {
  uint64_t value = 0;
  const int64_t count = element_bytes < 8 ? element_bytes : 8;
  for (int64_t i = 0; i < count; ++i) value |= static_cast<uint64_t>(address[i]) << (8 * i);
  if (element_bytes == 4) return static_cast<int32_t>(value);
  return static_cast<int64_t>(value);
}

// Reports what tiles noted about one buffer, and returns its kind. Thread 0 only.
__device__ Violation::Kind ReportBad(const PrologueParams& p, const Step& step, const ReportRing& ring,
                                     const BufferRecord& record, int64_t index) {
  const int64_t byte = index * record.element_bytes;
  if (static_cast<Role>(record.role) == Role::kConstant) {
    Report(ring, KindOf(Violation::Kind::kPolluted), record.id, index,
           ElementValue(record.original + byte, record.element_bytes),
           ElementValue(record.live + byte, record.element_bytes));
    ++p.control->healed;
    return Violation::Kind::kPolluted;
  }
  const SlotEntry entry = step.entries[record.refilled];
  const std::byte* given = step.values + entry.offset;
  if (record.shadow != nullptr) {
    const DeltaHeader& delta = *reinterpret_cast<const DeltaHeader*>(given);
    const uint64_t version = ShadowVersions(record)[byte / kTileBytes];
    if (version != delta.version) {
      Report(ring, KindOf(Violation::Kind::kMissedUpdate), record.id, index, static_cast<int64_t>(delta.base),
             static_cast<int64_t>(version));
      return Violation::Kind::kMissedUpdate;
    }
    given = record.shadow;
  }
  const int32_t* const values = reinterpret_cast<const int32_t*>(given);
  Report(ring, KindOf(Violation::Kind::kInvariant), record.id, index,
         Bound(record, values, index, min(entry.count, record.capacity)), values[index]);
  return Violation::Kind::kInvariant;
}

// What was wrong with a replay.
struct Outcome {
  bool violated;  // a rule was broken
  int32_t first;  // Violation::Kind of the first rule that was, or else of the first constant healed; -1: none
};

// Reports and heals. By all threads of the block.
__device__ Outcome Resolve(const PrologueParams& p, const Step& step, const ReportRing& ring, bool flawed) {
  __shared__ Outcome outcome;
  __shared__ int64_t index;
  if (threadIdx.x == 0) {
    outcome = {step.not_armed || step.armed_twice || step.wrong_bucket, -1};
    if (outcome.violated) {
      outcome.first = KindOf(step.not_armed     ? Violation::Kind::kNotArmed
                             : step.armed_twice ? Violation::Kind::kArmedTwice
                                                : Violation::Kind::kWrongBucket);
    }
    const int64_t next = static_cast<int64_t>(step.consumed + 1), newest = static_cast<int64_t>(step.newest);
    if (step.not_armed)
      Report(ring, KindOf(Violation::Kind::kNotArmed), -1, 0, next, static_cast<int64_t>(step.replay));
    if (step.armed_twice) Report(ring, KindOf(Violation::Kind::kArmedTwice), -1, 0, next, newest);
    if (step.wrong_bucket) {
      const Extent other = step.header->bucket;
      const bool tokens = other.requests == p.bucket.requests;
      Report(ring, KindOf(Violation::Kind::kWrongBucket), -1, tokens ? 1 : 0,
             tokens ? p.bucket.tokens : p.bucket.requests, tokens ? other.tokens : other.requests);
    }
  }
  __syncthreads();
  if (!flawed) return outcome;
  ForEachBuffer(p, [&](const BufferRecord& record) {
    if (threadIdx.x == 0) {
      index = static_cast<int64_t>(atomicExch(reinterpret_cast<unsigned long long*>(&p.first_bad[record.id]),
                                              static_cast<unsigned long long>(kNoIndex)));
      if (index != kNoIndex) {
        const Violation::Kind kind = ReportBad(p, step, ring, record, index);
        const bool violates = kind != Violation::Kind::kPolluted;
        if (outcome.first < 0 || (violates && !outcome.violated)) outcome.first = KindOf(kind);
        outcome.violated = outcome.violated || violates;
      }
    }
    __syncthreads();
    if (index != kNoIndex && static_cast<Role>(record.role) == Role::kConstant) {
      const int64_t bytes = record.capacity * record.element_bytes;
      for (int64_t begin = 0; begin < bytes; begin += kTileBytes) {
        CopyTile(record.live, record.original, begin, min(begin + kTileBytes, bytes), false);
      }
    }
    __syncthreads();
  });
  return outcome;
}

__device__ __noinline__ void Neutralise(const PrologueParams& p) {
  ForEachBuffer(
      p, [&](const BufferRecord& record) { MakeHarmless(p, record, 0, record.capacity * record.element_bytes); });
}

// Thread 0 of the block that began last: no other block reads these any more. Early in the kernel, so that what goes to
// the host has arrived when the kernel ends, which waits for it. No fence: the host needs no order here.
__device__ void Publish(const PrologueParams& p, const Step& step, int64_t restored_bytes) {
  Control& control = *p.control;
  const uint64_t consumed = p.mode == PrologueMode::kReplay ? step.replay : step.consumed;
  control.turn = consumed << kTurnBits;
  if (p.mode != PrologueMode::kRestoreRestored) {
    control.current = step.replay;
    control.graph = p.ring.graph;
  }
  volatile Board& board = *p.board;
  if (p.mode != PrologueMode::kRestoreAll && p.restore && p.restored_bytes > 0) {
    restored_bytes += p.restored_bytes;
    control.restored_bytes = restored_bytes;
    board.restored_bytes = restored_bytes;
  }
  board.consumed = consumed;
}

// The warp that writes the flight recorder's entry, beside thread 0, which publishes.
__device__ bool RecordsFlight(const PrologueParams& p) {
  return threadIdx.x / 32 == 1 && p.mode == PrologueMode::kReplay && p.flights.entries != nullptr;
}

// By that warp of one block, `before` being the entries that there are: a lane for each word, so that the entry leaves
// in one transaction. No fence, see FlightWords.
__device__ __noinline__ void RecordFlight(const PrologueParams& p, const SlotHeader* header, uint64_t replay,
                                          uint64_t before, Outcome outcome) {
  FlightEntry entry;
  entry.sequence = before + 1;
  entry.replay = replay;
  entry.bucket = p.bucket;
  entry.extent = {-1, -1};
  if (header != nullptr) {
    entry.extent = header->extent;
    for (int i = 0; i < kFlightTails; ++i) entry.tails[i] = header->indptr_tails[i];
  }
  entry.graph = p.ring.graph;
  entry.status = StatusOf(p, outcome.first >= 0, outcome.violated);
  entry.violation = static_cast<int16_t>(outcome.first);
  const FlightWords words = Seal(entry);
  const int lane = threadIdx.x % 32;
  uint64_t word = 0;
#pragma unroll
  for (int i = 0; i < kFlightWords; ++i) {
    if (lane == i) word = words.word[i];
  }
  volatile uint64_t* const to = reinterpret_cast<volatile uint64_t*>(&p.flights.At(before));
  if (lane < kFlightWords) to[lane] = word;
  if (lane == 0) p.control->flights = before + 1;
}

// What Tell goes on from: thread 0 knows the bytes restored so far, the warp that records the entries so far.
__device__ int64_t ToldBefore(const PrologueParams& p) {
  if (threadIdx.x == 0) return p.control->restored_bytes;
  return RecordsFlight(p) ? static_cast<int64_t>(p.control->flights) : 0;
}

// By all threads of the block that began last. A step that is `wrong` already is recorded by who answers it.
__device__ void Tell(const PrologueParams& p, const Step& step, int64_t before, bool wrong) {
  if (threadIdx.x == 0) Publish(p, step, before);
  if (!wrong && RecordsFlight(p)) {
    RecordFlight(p, step.header, step.replay, static_cast<uint64_t>(before), {false, -1});
  }
}

// Something was wrong: reports it, heals, and records it. `recorded`: in place of the clean entry of the block that
// began last. Returns whether a rule was broken. By all threads of one block, which sees what the others noted.
__device__ __noinline__ bool Answer(const PrologueParams& p, Step step, bool flawed, bool recorded) {
  ReportRing ring = p.ring;
  ring.replay = &step.replay;
  const Outcome outcome = Resolve(p, step, ring, flawed);
  if (threadIdx.x == 0) {
    if (outcome.violated && p.neutralise) ++p.control->neutralised;
    volatile Board& board = *p.board;
    board.healed = p.control->healed;
    board.neutralised = p.control->neutralised;
  }
  if (RecordsFlight(p)) {
    const uint64_t flights = *const_cast<const volatile uint64_t*>(&p.control->flights);
    RecordFlight(p, step.header, step.replay, recorded ? flights - 1 : flights, outcome);
  }
  if (outcome.violated && p.trap) {
    __threadfence_system();
    __syncthreads();
    __trap();
  }
  return outcome.violated;
}

}  // namespace
}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_KERNELS_PROLOGUE_ANSWER_CUH_
