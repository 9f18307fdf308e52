#include "buffers/kernels/prologue.h"
#include "pristine/buffers/buffer_spec.h"
#include "pristine/buffers/violation.h"

namespace pristine::buffers {
namespace {

constexpr int kThreads = 256;

// What every thread works out for itself, alike: only the last block to finish changes what it reads.
struct Step {
  uint64_t newest;
  uint64_t consumed;
  uint64_t replay;           // as reports name it
  const SlotEntry* entries;  // null: nothing to place
  const std::byte* values;
  const SlotHeader* header;  // null: nobody armed it
  int32_t requests, tokens;
  bool check;
  bool not_armed, armed_twice, wrong_bucket;
};

// What the blocks that are done have found, in one number, so that the last of them knows after its one atomic: how
// many blocks, how many of them found something wrong, how many a changed kRestored buffer.
constexpr uint64_t kTurnMask = (uint64_t{1} << kTurnBits) - 1;
constexpr int kTicketBits = 20;
constexpr uint64_t kTicketMask = (uint64_t{1} << kTicketBits) - 1;
constexpr uint64_t kBlockDone = 1;
constexpr uint64_t kBlockFlawed = uint64_t{1} << kTicketBits;
constexpr uint64_t kBlockChanged = uint64_t{1} << (2 * kTicketBits);

// What one thread found in its block's tiles.
enum Found : int { kNothing = 0, kFlawed = 1, kChanged = 2 };

__device__ int32_t KindOf(Violation::Kind kind) { return static_cast<int32_t>(kind); }

// What a step's header says.
struct Armed {
  uint64_t sequence;
  int32_t bucket_requests, bucket_tokens, requests, tokens;
  uint32_t check;
  uint32_t values;
};

__device__ Armed ReadHeader(const SlotHeader& header) {
  return {header.sequence,      header.bucket.requests, header.bucket.tokens, header.extent.requests,
          header.extent.tokens, header.check,           header.values};
}

__device__ Step TakeStep(const PrologueParams& p, const SlotHeader* header, const std::byte* image, const Armed& armed,
                         uint64_t consumed) {
  Step step = {};
  step.requests = p.bucket.requests;
  step.tokens = p.bucket.tokens;
  step.newest = armed.sequence;
  step.consumed = consumed;
  step.not_armed = step.newest <= consumed;
  step.replay = step.not_armed ? consumed : step.newest;
  if (step.not_armed) return step;
  step.header = header;
  step.armed_twice = step.newest > consumed + 1;
  step.wrong_bucket = armed.bucket_requests != p.bucket.requests || armed.bucket_tokens != p.bucket.tokens;
  if (step.wrong_bucket) return step;
  step.requests = armed.requests;
  step.tokens = armed.tokens;
  step.check = armed.check != 0;
  step.entries = reinterpret_cast<const SlotEntry*>(image + kSlotTable);
  step.values = image + armed.values;
  return step;
}

// The step of a captured replay is `carried`, or that of the newest slot if that is null. By all threads.
__device__ Step FindStep(const PrologueParams& p, const std::byte* carried, uint64_t consumed) {
  if (p.mode != PrologueMode::kReplay) {
    Step step = {};
    step.requests = p.bucket.requests;
    step.tokens = p.bucket.tokens;
    step.consumed = consumed;
    return step;
  }
  const auto image = [&](int64_t slot) { return p.slots + slot * p.slot_stride; };
  if (carried != nullptr) {
    const auto& header = *reinterpret_cast<const SlotHeader*>(carried);
    return TakeStep(p, &header, header.slot < 0 ? carried : image(header.slot), ReadHeader(header), consumed);
  }
  __shared__ Armed slots[kMaxSlots];  // each loaded by a thread of its own: one round trip to memory
  if (threadIdx.x < p.num_slots) {
    slots[threadIdx.x] = ReadHeader(*reinterpret_cast<const SlotHeader*>(image(threadIdx.x)));
  }
  __syncthreads();
  uint32_t newest = 0;
  for (uint32_t i = 1; i < p.num_slots; ++i) {
    if (slots[i].sequence > slots[newest].sequence) newest = i;
  }
  return TakeStep(p, reinterpret_cast<const SlotHeader*>(image(newest)), image(newest), slots[newest], consumed);
}

__device__ bool Covers(const PrologueParams& p, const BufferRecord& record) {
  if (p.bucket.requests < 0 || record.only_requests < 0) return true;
  return record.only_requests == p.bucket.requests && record.only_tokens == p.bucket.tokens;
}

__device__ int64_t Count(const BufferRecord& record, int32_t requests, int32_t tokens) {
  const Axis::Unit unit = static_cast<Axis::Unit>(record.unit);
  if (unit == Axis::Unit::kFixed || unit == Axis::Unit::kPages) return record.capacity;
  const int64_t count = int64_t{record.per} * (unit == Axis::Unit::kTokens ? tokens : requests) +
                        (unit == Axis::Unit::kRequestsPlusOne ? 1 : 0);
  return count < 0 ? 0 : count > record.capacity ? record.capacity : count;
}

__device__ int64_t TailEnd(const PrologueParams& p, const BufferRecord& record) {
  return record.tail_to_end ? record.capacity : Count(record, p.bucket.requests, p.bucket.tokens);
}

__device__ bool Aligned16(const void* a, const void* b) {
  return ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) & 15) == 0;
}

__device__ bool Differ(const int4& a, const int4& b) {
  return ((a.x ^ b.x) | (a.y ^ b.y) | (a.z ^ b.z) | (a.w ^ b.w)) != 0;
}

// [begin, end) in bytes, by all threads of the block. Returns whether this thread found a byte that differed, where
// `compare`. What the kernel needs rarely is out of line: each SM loads the kernel anew for every replay.
__device__ __noinline__ bool CopyBytes(std::byte* to, const std::byte* from, int64_t begin, int64_t end, bool compare) {
  bool differs = false;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const std::byte value = from[i];
    if (compare) differs |= to[i] != value;
    to[i] = value;
  }
  return differs;
}

// What each thread holds of a tile: all its loads are in flight at once.
struct Batch {
  static constexpr int kWords = kTileBytes / 16 / kThreads;
  int4 words[kWords];
};

// [begin, end): bytes of one tile. By all threads of the block.
__device__ void LoadBatch(const std::byte* from, int64_t begin, int64_t end, Batch& batch) {
  const int words = static_cast<int>((end - begin) / 16);
  const int4* const wide = reinterpret_cast<const int4*>(from + begin);
#pragma unroll
  for (int k = 0; k < Batch::kWords; ++k) {
    const int i = static_cast<int>(threadIdx.x) + k * kThreads;
    if (i < words) batch.words[k] = wide[i];
  }
}

// Stores what LoadBatch loaded, and copies the rest. Returns whether this thread found a byte that differed, where
// `compare`.
__device__ bool StoreBatch(std::byte* to, const std::byte* from, int64_t begin, int64_t end, bool compare,
                           const Batch& batch) {
  const int words = static_cast<int>((end - begin) / 16);
  int4* const wide = reinterpret_cast<int4*>(to + begin);
  bool differs = false;
#pragma unroll
  for (int k = 0; k < Batch::kWords; ++k) {
    const int i = static_cast<int>(threadIdx.x) + k * kThreads;
    if (i >= words) continue;
    if (compare) differs |= Differ(batch.words[k], wide[i]);
    wide[i] = batch.words[k];
  }
  if (const int64_t i = begin + words * 16 + threadIdx.x; i < end) {  // less than 16 bytes
    const std::byte value = from[i];
    if (compare) differs |= to[i] != value;
    to[i] = value;
  }
  return differs;
}

// [begin, end): bytes of one tile.
__device__ bool CopyTile(std::byte* to, const std::byte* from, int64_t begin, int64_t end, bool compare) {
  if (Aligned16(to + begin, from + begin)) {
    Batch batch;
    LoadBatch(from, begin, end, batch);
    return StoreBatch(to, from, begin, end, compare, batch);
  }
  return CopyBytes(to, from, begin, end, compare);
}

__device__ void FillBytes(std::byte* to, int64_t begin, int64_t end, std::byte value) {
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) to[i] = value;
}

__device__ int NoteBad(const PrologueParams& p, const BufferRecord& record, int64_t index) {
  atomicMin(reinterpret_cast<long long*>(&p.first_bad[record.id]), static_cast<long long>(index));
  return kFlawed;
}

// The first element of the tile that differs from the original, if any.
__device__ __noinline__ int CompareTile(const PrologueParams& p, const BufferRecord& record, int64_t begin,
                                        int64_t end) {
  const std::byte* const live = record.live;
  const std::byte* const original = record.original;
  int64_t done = begin;
  if (Aligned16(live + begin, original + begin)) {
    const int64_t words = (end - begin) / 16;
    for (int64_t i = threadIdx.x; i < words; i += kThreads) {
      const int4 a = reinterpret_cast<const int4*>(live + begin)[i];
      const int4 b = reinterpret_cast<const int4*>(original + begin)[i];
      if (!Differ(a, b)) continue;
      int64_t byte = begin + i * 16;
      while (live[byte] == original[byte]) ++byte;
      return NoteBad(p, record, byte / record.element_bytes);
    }
    done += words * 16;
  }
  for (int64_t i = done + threadIdx.x; i < end; i += kThreads) {
    if (live[i] != original[i]) return NoteBad(p, record, i / record.element_bytes);
  }
  return kNothing;
}

// Pads elements [real, TailEnd) of a tile of an int32 buffer with `value`.
__device__ void PadIntegers(const BufferRecord& record, int64_t begin, int64_t end, int32_t value) {
  int32_t* const live = reinterpret_cast<int32_t*>(record.live);
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) live[i] = value;
}

// The part of [begin, end) (bytes of a tile) that lies in the padded tail of a buffer with `real` elements.
// An indptr's tail continues its real part, `values`: not the array's last element, which belongs to another bucket.
__device__ void PadTile(const PrologueParams& p, const BufferRecord& record, int64_t begin, int64_t end, int64_t real,
                        const std::byte* values) {
  const int64_t size = record.element_bytes;
  const int64_t tail_begin = max(begin, real * size);
  const int64_t tail_end = min(end, TailEnd(p, record) * size);
  if (tail_begin >= tail_end) return;
  if (!record.integers) {
    FillBytes(record.live, tail_begin, tail_end, std::byte{0});
    return;
  }
  int32_t value = record.pad;
  if (record.indptr) value = real > 0 ? reinterpret_cast<const int32_t*>(values)[real - 1] : 0;
  PadIntegers(record, tail_begin / 4, tail_end / 4, value);
}

// What a value should have been; the value itself if it is legal.
__device__ int32_t Bound(const BufferRecord& record, const int32_t* values, int64_t i, int64_t real) {
  const int32_t value = values[i];
  if (!record.indptr) return value < record.lower ? record.lower : value > record.upper ? record.upper : value;
  if (i == 0 && value != 0) return 0;
  if (i > 0 && value < values[i - 1]) return values[i - 1];
  if (i == real - 1 && value > record.upper) return record.upper;
  return value;
}

// The same place, but loaded from memory: a thread's own index into parameters would be served one thread at a time.
__device__ const std::byte* InMemory(const std::byte* parameters) {
  asm("" : "+l"(parameters));
  return parameters;
}

// Whether the values of a carried step obey their rules: each warp looks at every eighth entry. `note`: what does not
// is noted, for the report.
template <bool kNote>
__device__ int CheckCarried(const PrologueParams& p, const SlotEntry* entries, uint32_t count,
                            const std::byte* values) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int found = kNothing;
#pragma unroll 1
  for (uint32_t e = __shfl_sync(~0u, threadIdx.x / 32, 0); e < count; e += kThreads / 32) {
    const SlotEntry& entry = entries[e];
    if (entry.offset < 0 || !entry.integers) continue;
    const int real = static_cast<int>(entry.count);
    const int32_t* const integers = reinterpret_cast<const int32_t*>(values + entry.offset);
    const bool indptr = entry.indptr;
#pragma unroll 1
    for (int first = lane * 4; first < real; first += 128) {
      const int4 four = *reinterpret_cast<const int4*>(integers + first);
      const int32_t is[4] = {four.x, four.y, four.z, four.w};
      // Before the first of an indptr nothing may come but 0.
      int32_t lower = indptr ? (first > 0 ? integers[first - 1] : 0) : entry.lower;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int32_t upper = !indptr || first + k == real - 1 ? entry.upper : first + k == 0 ? 0 : INT32_MAX;
        const bool starts = !indptr || first + k > 0 || is[k] == 0;
        if (first + k < real && (is[k] < lower || is[k] > upper || !starts)) {
          found = kFlawed;
          if (kNote) {
            atomicMin(reinterpret_cast<long long*>(&p.first_bad[entry.buffer]), static_cast<long long>(first + k));
          }
        }
        if (indptr) lower = is[k];
      }
    }
  }
  return found;
}

__device__ int PlaceTile(const PrologueParams& p, const Step& step, const BufferRecord& record, int64_t begin,
                         int64_t end) {
  const SlotEntry& entry = step.entries[record.refilled];
  if (entry.offset < 0) return kNothing;
  const std::byte* const values = InMemory(step.values) + entry.offset;
  const int64_t real = min(entry.count, record.capacity);
  const int64_t placed_end = min(end, real * record.element_bytes);
  if (begin < placed_end) CopyTile(record.live, values, begin, placed_end, false);
  PadTile(p, record, begin, end, real, values);
  if (!record.integers) return kNothing;
  const int32_t* const integers = reinterpret_cast<const int32_t*>(values);
  for (int64_t i = begin / 4 + threadIdx.x; i < placed_end / 4; i += kThreads) {
    if (Bound(record, integers, i, real) != integers[i]) return NoteBad(p, record, i);
  }
  return kNothing;
}

// A tile, and as much of it as can be known before the step is.
struct Work {
  const BufferRecord* record;
  Role role;
  bool covered;
  bool loaded;  // `original` holds the tile's
  int64_t begin, end;
  std::byte* live;
  Batch original;
};

// In one round trip to memory, whatever is needed of it.
__device__ BufferRecord LoadRecord(const BufferRecord* from) {
  static_assert(sizeof(BufferRecord) % sizeof(int4) == 0);
  BufferRecord record;
#pragma unroll
  for (size_t i = 0; i < sizeof(record) / sizeof(int4); ++i) {
    reinterpret_cast<int4*>(&record)[i] = reinterpret_cast<const int4*>(from)[i];
  }
  return record;
}

__device__ void LoadWork(const PrologueParams& p, const BufferRecord* from, Work& work) {
  const BufferRecord record = LoadRecord(from);
  work.record = from;
  work.role = static_cast<Role>(record.role);
  work.covered = Covers(p, record);
  work.live = record.live;
  work.begin = record.tile * kTileBytes;
  work.end = min(work.begin + kTileBytes, record.capacity * record.element_bytes);
  work.loaded = work.role == Role::kRestored && p.restore && p.mode != PrologueMode::kRestoreAll &&
                Aligned16(record.live + work.begin, record.original + work.begin);
  if (work.loaded) LoadBatch(record.original, work.begin, work.end, work.original);
}

__device__ int RestoreTile(const PrologueParams& p, const Step& step, const Work& work) {
  const BufferRecord& record = *work.record;
  const bool differs = work.loaded
                           ? StoreBatch(work.live, record.original, work.begin, work.end, step.check, work.original)
                           : CopyTile(record.live, record.original, work.begin, work.end, step.check);
  const int found = differs ? kChanged : kNothing;
  if (p.mode != PrologueMode::kReplay) return found;
  const int64_t real = Count(record, step.requests, step.tokens);
  if (real * record.element_bytes < work.end && real < TailEnd(p, record)) {
    __syncthreads();  // the tail overwrites what other threads of this block have just restored
    PadTile(p, record, work.begin, work.end, real, record.original);
  }
  return found;
}

__device__ int DoTile(const PrologueParams& p, const Step& step, const Work& work) {
  const BufferRecord& record = *work.record;
  const Role role = work.role;
  if (p.mode == PrologueMode::kRestoreAll) {
    if (p.compare_constants && role == Role::kConstant) return CompareTile(p, record, work.begin, work.end);
    if (role != Role::kRestored || p.restore) CopyTile(record.live, record.original, work.begin, work.end, false);
    return kNothing;
  }
  switch (role) {
    case Role::kConstant:
      return step.check ? CompareTile(p, record, work.begin, work.end) : kNothing;
    case Role::kRestored:
      return p.restore ? RestoreTile(p, step, work) : kNothing;
    case Role::kRefilled:
      if (step.entries == nullptr || (p.shadows && record.shadow != nullptr)) return kNothing;  // PlaceShadows
      return PlaceTile(p, step, record, work.begin, work.end);
    case Role::kScratch:
      if (p.poison_scratch && p.mode == PrologueMode::kReplay) {
        FillBytes(record.live, work.begin, work.end, std::byte{0xFF});
      }
      return kNothing;
  }
  return kNothing;
}

// What `delta` changes in bytes [begin, end) of a shadow.
__device__ void ChangeTile(const BufferRecord& record, const DeltaHeader& delta, const std::byte* given, int64_t begin,
                           int64_t end) {
  const int32_t* const elements = reinterpret_cast<const int32_t*>(given);
  const std::byte* const values = given + DeltaIndexBytes(delta.changes);
  const int64_t size = record.element_bytes;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < delta.changes; i += kThreads) {
    const int64_t at = elements[i] * size;
    if (size == 4) {  // aligned, as tiles are
      if (at >= begin && at < end) {
        *reinterpret_cast<int32_t*>(record.shadow + at) = reinterpret_cast<const int32_t*>(values)[i];
      }
      continue;
    }
#pragma unroll 1
    for (int64_t byte = max(at, begin); byte < min(at + size, end); ++byte) {
      record.shadow[byte] = values[i * size + byte - at];
    }
  }
}

// Brings the tile of a shadow up to date, unless it missed an update, and places it. Only this block touches it.
__device__ int PlaceShadowTile(const PrologueParams& p, const SlotEntry& entry, const std::byte* values,
                               const BufferRecord& record) {
  const int64_t begin = record.tile * kTileBytes;
  const int64_t end = min(begin + kTileBytes, record.capacity * record.element_bytes);
  if (entry.offset < 0) return kNothing;
  const DeltaHeader delta = *reinterpret_cast<const DeltaHeader*>(values + entry.offset);
  const std::byte* const given = values + entry.offset + sizeof(delta);
  uint64_t* const version = &ShadowVersions(record)[record.tile];
  const int64_t size = record.element_bytes;
  const int64_t real = min(entry.count, record.capacity);
  const int64_t placed_end = min(end, real * size);
  if (delta.changes != kAllElements) {
    if (*version != delta.base) return NoteBad(p, record, (begin + size - 1) / size);
    ChangeTile(record, delta, given, begin, end);
  } else if (begin < placed_end) {
    CopyTile(record.shadow, given, begin, placed_end, false);
  }
  const int64_t pad_begin = max(begin, real * size);
  const int64_t pad_end = min(end, delta.padded_to * size);
  if (!record.integers) {
    FillBytes(record.shadow, pad_begin, pad_end, std::byte{0});
  } else {
    int32_t* const shadow = reinterpret_cast<int32_t*>(record.shadow);
#pragma unroll 1
    for (int64_t i = pad_begin / 4 + threadIdx.x; i < pad_end / 4; i += kThreads) shadow[i] = record.pad;
  }
  __syncthreads();  // what follows reads what other threads of this block wrote; all have read the version
  if (threadIdx.x == 0) *version = delta.version;
  if (begin < placed_end) CopyTile(record.live, record.shadow, begin, placed_end, false);
  PadTile(p, record, begin, end, real, record.shadow);
  if (!record.integers) return kNothing;
  const int32_t* const integers = reinterpret_cast<const int32_t*>(record.shadow);
#pragma unroll 1
  for (int64_t i = begin / 4 + threadIdx.x; i < placed_end / 4; i += kThreads) {
    if (Bound(record, integers, i, real) != integers[i]) return NoteBad(p, record, i);
  }
  return kNothing;
}

// The tiles of buffers with deltas that this block has: apart from others, which must not wait for what these need.
__device__ __noinline__ int PlaceShadows(const PrologueParams& p, const SlotEntry* entries, const std::byte* values) {
  int found = kNothing;
  int64_t tile = blockIdx.x;
  int64_t first = 0;
  for (int32_t c = 0; c < p.num_chunks; ++c) {
    const ChunkTable& chunk = TableOf(p, c);
    for (; tile < first + chunk.busy_tiles; tile += gridDim.x) {
      const BufferRecord& record = chunk.by_tile[tile - first];
      if (record.shadow == nullptr || !Covers(p, record)) continue;
      found |= PlaceShadowTile(p, entries[record.refilled], values, record);
    }
    first += chunk.busy_tiles;
  }
  return found;
}

// The part of [begin, end) (bytes) that the bucket's graph reads, in a replay that must do nothing.
__device__ __noinline__ void MakeHarmless(const PrologueParams& p, const BufferRecord& record, int64_t begin,
                                          int64_t end) {
  const Role role = static_cast<Role>(record.role);
  if (role != Role::kRefilled && !(role == Role::kRestored && p.neutralise_restored)) return;
  const int64_t size = record.element_bytes;
  end = min(end, TailEnd(p, record) * size);
  if (record.integers) {
    PadIntegers(record, begin / 4, end / 4, record.harmless);
  } else {
    FillBytes(record.live, begin, end, std::byte{0});
  }
}

// --- what the last block does when all others are done ---

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

// Counts this block as done, and what it found. The last of them answers for all. By all threads.
__device__ void Finish(const PrologueParams& p, const Step& step, int found) {
  __shared__ uint64_t before;
  const bool flawed = __syncthreads_or(found & kFlawed) != 0;
  const bool changed = step.check && __syncthreads_or(found & kChanged) != 0;
  const uint64_t mine = kBlockDone + (flawed ? kBlockFlawed : 0) + (changed ? kBlockChanged : 0);
  if (threadIdx.x == 0) {
    __threadfence();
    before =
        atomicAdd(reinterpret_cast<unsigned long long*>(&p.control->ticket), static_cast<unsigned long long>(mine));
  }
  __syncthreads();
  const uint64_t ticket = before + mine;
  if ((ticket & kTicketMask) != gridDim.x) return;
  const bool any_flawed = ((ticket >> kTicketBits) & kTicketMask) != 0;
  if (threadIdx.x == 0) {
    p.control->ticket = 0;
    if ((ticket >> (2 * kTicketBits)) != 0) {
      const int64_t writes = ++p.control->expected_writes;
      static_cast<volatile Board*>(p.board)->expected_writes = writes;
    }
  }
  const bool wrong = step.not_armed || step.armed_twice || step.wrong_bucket;
  if (!any_flawed && !wrong) return;
  __threadfence();  // what is reported, healed or made harmless was written by other blocks
  if (Answer(p, step, any_flawed, !wrong) && p.neutralise) Neutralise(p);
}

// A step that is large, comes from a slot, changes shadows, or is compared with the originals: the last block to finish
// judges it.
__device__ void RunJudged(const PrologueParams& p, const std::byte* carried) {
  // All that does not depend on each other is in flight at once: the turn, the first tile.
  __shared__ uint64_t turn;
  if (threadIdx.x == 0) turn = atomicAdd(reinterpret_cast<unsigned long long*>(&p.control->turn), 1ull);
  const int64_t told = ToldBefore(p);
  Work work;
  const bool early = p.mode == PrologueMode::kReplay && blockIdx.x < p.first.busy_tiles;
  if (early) LoadWork(p, &p.first.by_tile[blockIdx.x], work);
  __syncthreads();
  const Step step = FindStep(p, carried, turn >> kTurnBits);
  if ((turn & kTurnMask) + 1 == gridDim.x) Tell(p, step, told, step.not_armed || step.armed_twice || step.wrong_bucket);

  int found = kNothing;
  const bool all = step.check || p.poison_scratch || p.mode != PrologueMode::kReplay;
  int64_t tile = blockIdx.x;
  int64_t first = 0;  // number of the chunk's first tile
  for (int32_t c = 0; c < p.num_chunks; ++c) {
    const ChunkTable& chunk = TableOf(p, c);
    const int64_t tiles = all ? chunk.tiles : chunk.busy_tiles;
    for (; tile < first + tiles; tile += gridDim.x) {
      if (!early || tile != blockIdx.x) LoadWork(p, &chunk.by_tile[tile - first], work);
      if (work.covered) found |= DoTile(p, step, work);
    }
    first += tiles;
  }
  if (p.shadows && step.entries != nullptr) found |= PlaceShadows(p, step.entries, InMemory(step.values));
  Finish(p, step, found);
}

// Tile number `tile` of those that every replay writes, past the first chunk's.
__device__ __noinline__ const BufferRecord* LaterTile(const PrologueParams& p, int64_t tile) {
  tile -= p.first.busy_tiles;
  int32_t c = 1;
  while (tile >= TableOf(p, c).busy_tiles) tile -= TableOf(p, c++).busy_tiles;
  return &TableOf(p, c).by_tile[tile];
}

// What went wrong with a carried step, by block 0.
__device__ __noinline__ void AnswerCarried(const PrologueParams& p, const std::byte* carried, Step step) {
  const bool taken = step.entries != nullptr;
  if (taken) {
    const SlotHeader& header = *reinterpret_cast<const SlotHeader*>(carried);
    CheckCarried<true>(p, step.entries, header.entries, step.values);
  }
  __syncthreads();
  Answer(p, step, taken, false);
}

// Bytes [begin, end), which are not whole words.
__device__ __noinline__ void PadOddly(std::byte* live, int begin, int end) {
  FillBytes(live, begin, end, std::byte{0});
}

// A small step in the parameters. Every block checks all its values for itself, so that no word between blocks is
// needed: all come to the same conclusion, each makes its own tiles harmless, and block 0 reports. Short, and each part
// at one place only: fetching code is most of what a small prologue costs.
__device__ void RunChecked(const PrologueParams& p, const std::byte* carried) {
  const SlotHeader& header = *reinterpret_cast<const SlotHeader*>(carried);
  const SlotEntry* const entries = reinterpret_cast<const SlotEntry*>(carried + kSlotTable);
  const std::byte* const values = InMemory(carried) + header.values;
  __shared__ uint64_t turn;
  if (threadIdx.x == 0) turn = atomicAdd(reinterpret_cast<unsigned long long*>(&p.control->turn), 1ull);
  const int64_t told = ToldBefore(p);
  bool known = false, wrong = false, flawed = false;
  Step step = {};
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < p.busy_tiles || !known; tile += gridDim.x) {
    // What does not depend on the step's turn is loaded before it is known.
    const BufferRecord* const from = tile < p.first.busy_tiles ? &p.first.by_tile[tile]
                                     : tile < p.busy_tiles     ? LaterTile(p, tile)
                                                               : p.first.by_tile;
    const BufferRecord record = LoadRecord(from);
    const bool restored = static_cast<Role>(record.role) == Role::kRestored;
    const int64_t begin = record.tile * kTileBytes;
    const int length = static_cast<int>(min(kTileBytes, record.capacity * record.element_bytes - begin));
    std::byte* const live = record.live + begin;
    const std::byte* source = nullptr;  // of the buffer; null: it stays as it is
    int64_t real = record.capacity;
    if (restored) {
      if (p.restore) source = record.original;
    } else if (const SlotEntry& entry = entries[record.refilled]; entry.offset >= 0) {
      source = values + entry.offset;
      real = entry.count;
    }
    const bool covered = Covers(p, record) && tile < p.busy_tiles;
    if (!covered) source = nullptr;
    const auto within = [&](int64_t elements) {  // of the tile, in bytes
      return static_cast<int>(max(int64_t{0}, min(int64_t{length}, elements * record.element_bytes - begin)));
    };
    const int copied = source == nullptr ? 0 : within(real);
    const bool wide = Aligned16(live, source + begin);
    Batch batch;
    if (wide) LoadBatch(source + begin, 0, copied, batch);
    if (!known) {
      flawed = __syncthreads_or(CheckCarried<false>(p, entries, header.entries, values)) != 0;
      step = TakeStep(p, &header, carried, ReadHeader(header), turn >> kTurnBits);
      flawed = flawed && step.entries != nullptr;  // of a step that is not taken, the values do not matter
      wrong = step.not_armed || step.armed_twice || step.wrong_bucket || flawed;
      if ((turn & kTurnMask) + 1 == gridDim.x) Tell(p, step, told, wrong);
      known = true;
    }
    if (source != nullptr && (restored || step.entries != nullptr)) {
      if (wide) {
        StoreBatch(live, source + begin, 0, copied, false, batch);
      } else {
        CopyBytes(live, source + begin, 0, copied, false);
      }
      if (restored) real = Count(record, step.requests, step.tokens);
      const int pad_begin = within(real), pad_end = within(TailEnd(p, record));
      if (pad_begin < pad_end) {
        if (restored) __syncthreads();  // it overwrites what other threads of this block have just restored
        if (((reinterpret_cast<uintptr_t>(live) | static_cast<uintptr_t>(record.element_bytes)) & 3) != 0) {
          PadOddly(live, pad_begin, pad_end);
        } else {
          int32_t value = record.integers ? record.pad : 0;
          if (record.indptr) value = real > 0 ? reinterpret_cast<const int32_t*>(source)[real - 1] : 0;
#pragma unroll 1
          for (int i = pad_begin / 4 + static_cast<int>(threadIdx.x); i < pad_end / 4; i += kThreads) {
            reinterpret_cast<int32_t*>(live)[i] = value;
          }
        }
      }
    }
    if (wrong && p.neutralise && covered) {
      __syncthreads();
      MakeHarmless(p, *from, begin, begin + length);
    }
  }
  if (wrong && blockIdx.x == 0) AnswerCarried(p, carried, step);
}

// Out of line: most replays do not need it.
__device__ __noinline__ void RunCarriedJudged(const PrologueParams& p, const std::byte* carried) {
  RunJudged(p, carried);
}

__global__ void __launch_bounds__(kThreads) PrologueKernel(const __grid_constant__ PrologueParams p) {
  cudaTriggerProgrammaticLaunchCompletion();  // who waits for this grid may begin, and waits
  RunJudged(p, nullptr);
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    InlinePrologueKernel(const __grid_constant__ InlinePrologueParams<kBytes> p) {
  cudaTriggerProgrammaticLaunchCompletion();
  const SlotHeader& header = *reinterpret_cast<const SlotHeader*>(p.step);
  // Asked at once, and not one after the other: each may be a line of parameters that has to be fetched.
  const bool judged = (header.check != 0) | (header.slot >= 0) | p.base.judged;
  if (!judged) {
    RunChecked(p.base, p.step);
  } else {
    RunCarriedJudged(p.base, p.step);
  }
}

CudaLaunch LaunchOf(const void* function, const PrologueParams& params, int64_t tiles) {
  const int64_t blocks = tiles < 1 ? 1 : tiles < params.blocks ? tiles : params.blocks;
  return {function, static_cast<unsigned>(blocks), kThreads, 0};
}

}  // namespace

CudaLaunch PrologueCudaLaunch(const PrologueParams& params) {
  return LaunchOf(reinterpret_cast<const void*>(PrologueKernel), params, params.tiles);
}

int PrologueCuda(CUstream_st* stream, const PrologueParams& params) {
  const CudaLaunch launch = PrologueCudaLaunch(params);
  PrologueKernel<<<launch.grid, launch.block, 0, stream>>>(params);
  return cudaGetLastError();
}

// The host knows the step: no more blocks than it needs.
template <int kBytes>
CudaLaunch InlinePrologueCudaLaunch(const InlinePrologueParams<kBytes>& params) {
  const auto& header = *reinterpret_cast<const SlotHeader*>(params.step);
  const bool all = header.check != 0 || params.base.poison_scratch;
  return LaunchOf(reinterpret_cast<const void*>(InlinePrologueKernel<kBytes>), params.base,
                  all ? params.base.tiles : params.base.busy_tiles);
}

template <int kBytes>
int InlinePrologueCuda(CUstream_st* stream, const InlinePrologueParams<kBytes>& params) {
  const CudaLaunch launch = InlinePrologueCudaLaunch(params);
  InlinePrologueKernel<kBytes><<<launch.grid, launch.block, 0, stream>>>(params);
  return cudaGetLastError();
}

template int InlinePrologueCuda(CUstream_st*, const InlinePrologueParams<kInlineBytes[0]>&);
template CudaLaunch InlinePrologueCudaLaunch(const InlinePrologueParams<kInlineBytes[0]>&);
template int InlinePrologueCuda(CUstream_st*, const InlinePrologueParams<kInlineBytes[1]>&);
template CudaLaunch InlinePrologueCudaLaunch(const InlinePrologueParams<kInlineBytes[1]>&);
template int InlinePrologueCuda(CUstream_st*, const InlinePrologueParams<kInlineBytes[2]>&);
template CudaLaunch InlinePrologueCudaLaunch(const InlinePrologueParams<kInlineBytes[2]>&);
template int InlinePrologueCuda(CUstream_st*, const InlinePrologueParams<kInlineBytes[3]>&);
template CudaLaunch InlinePrologueCudaLaunch(const InlinePrologueParams<kInlineBytes[3]>&);
template int InlinePrologueCuda(CUstream_st*, const InlinePrologueParams<kInlineBytes[4]>&);
template CudaLaunch InlinePrologueCudaLaunch(const InlinePrologueParams<kInlineBytes[4]>&);
template int InlinePrologueCuda(CUstream_st*, const InlinePrologueParams<kInlineBytes[5]>&);
template CudaLaunch InlinePrologueCudaLaunch(const InlinePrologueParams<kInlineBytes[5]>&);
template int InlinePrologueCuda(CUstream_st*, const InlinePrologueParams<kInlineBytes[6]>&);
template CudaLaunch InlinePrologueCudaLaunch(const InlinePrologueParams<kInlineBytes[6]>&);
static_assert(kInlineSizes == 7);

}  // namespace pristine::buffers
