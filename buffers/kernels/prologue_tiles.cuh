// What the prologue does with one tile of a buffer: compare, restore, place, pad, validate, make harmless.
#ifndef PRISTINE_BUFFERS_KERNELS_PROLOGUE_TILES_CUH_
#define PRISTINE_BUFFERS_KERNELS_PROLOGUE_TILES_CUH_

#include <cstdint>

#include "buffers/kernels/prologue_step.cuh"

namespace pristine::buffers {
namespace {

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

}  // namespace
}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_KERNELS_PROLOGUE_TILES_CUH_
