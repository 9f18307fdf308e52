#include "buffers/kernels/prologue.h"
#include "pristine/buffers/buffer_spec.h"
#include "pristine/buffers/violation.h"

namespace pristine::buffers {
namespace {

constexpr int kThreads = 256;

// What every block works out for itself from the ring, alike: only the last block to finish changes it.
struct Step {
  uint64_t newest;
  uint64_t consumed;
  uint64_t replay;        // as reports name it
  const std::byte* slot;  // null: nothing to place
  int32_t requests, tokens;
  int32_t other_requests, other_tokens;  // of the step's bucket, where it is not the graph's
  bool check;
  bool not_armed, armed_twice, wrong_bucket;
};

__device__ int32_t KindOf(Violation::Kind kind) { return static_cast<int32_t>(kind); }

// A slot's header. Each is loaded by a thread of its own, so that all of them cost one round trip to memory.
struct Armed {
  uint64_t sequence;
  int32_t bucket_requests, bucket_tokens, requests, tokens;
  uint32_t check;
};

__device__ Armed ReadSlot(const PrologueParams& p, uint32_t slot) {
  const SlotHeader& header = *reinterpret_cast<const SlotHeader*>(p.slots + static_cast<int64_t>(slot) * p.slot_stride);
  return {header.sequence,        header.bucket.requests, header.bucket.tokens,
          header.extent.requests, header.extent.tokens,   header.check};
}

__device__ Step ChooseStep(const PrologueParams& p, const Armed* slots, uint64_t consumed) {
  Step step = {};
  step.requests = p.bucket.requests;
  step.tokens = p.bucket.tokens;
  if (p.mode != PrologueMode::kReplay) return step;
  uint32_t newest = 0;
  for (uint32_t i = 1; i < p.num_slots; ++i) {
    if (slots[i].sequence > slots[newest].sequence) newest = i;
  }
  const Armed& armed = slots[newest];
  step.newest = armed.sequence;
  step.consumed = consumed;
  step.not_armed = step.newest <= consumed;
  step.replay = step.not_armed ? consumed : step.newest;
  if (step.not_armed) return step;
  step.armed_twice = step.newest > consumed + 1;
  step.wrong_bucket = armed.bucket_requests != p.bucket.requests || armed.bucket_tokens != p.bucket.tokens;
  step.other_requests = armed.bucket_requests;
  step.other_tokens = armed.bucket_tokens;
  if (step.wrong_bucket) return step;
  step.requests = armed.requests;
  step.tokens = armed.tokens;
  step.check = armed.check != 0;
  step.slot = p.slots + static_cast<int64_t>(newest) * p.slot_stride;
  return step;
}

__device__ bool Covers(const PrologueParams& p, const BufferRecord& record) {
  if (p.bucket.requests < 0 || record.only_requests < 0) return true;
  return record.only_requests == p.bucket.requests && record.only_tokens == p.bucket.tokens;
}

__device__ int64_t Count(const BufferRecord& record, int32_t requests, int32_t tokens) {
  int64_t count = record.capacity;
  switch (static_cast<Axis::Unit>(record.unit)) {
    case Axis::Unit::kRequests:
      count = int64_t{record.per} * requests;
      break;
    case Axis::Unit::kRequestsPlusOne:
      count = int64_t{record.per} * requests + 1;
      break;
    case Axis::Unit::kTokens:
      count = int64_t{record.per} * tokens;
      break;
    default:
      break;
  }
  return count < 0 ? 0 : count > record.capacity ? record.capacity : count;
}

__device__ int64_t TailEnd(const PrologueParams& p, const BufferRecord& record) {
  return record.tail_to_end ? record.capacity : Count(record, p.bucket.requests, p.bucket.tokens);
}

__device__ bool Aligned16(const void* a, const void* b) {
  return ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) & 15) == 0;
}

// [begin, end) in bytes, by all threads of the block. Returns whether this thread found a byte that differed, where
// `compare`.
__device__ bool CopyBytes(std::byte* to, const std::byte* from, int64_t begin, int64_t end, bool compare) {
  bool differs = false;
  int64_t done = begin;
  if (Aligned16(to + begin, from + begin)) {
    const int64_t words = (end - begin) / 16;
    int4* const wide_to = reinterpret_cast<int4*>(to + begin);
    const int4* const wide_from = reinterpret_cast<const int4*>(from + begin);
    for (int64_t i = threadIdx.x; i < words; i += kThreads) {
      const int4 value = wide_from[i];
      if (compare) {
        const int4 old = wide_to[i];
        differs |= old.x != value.x || old.y != value.y || old.z != value.z || old.w != value.w;
      }
      wide_to[i] = value;
    }
    done += words * 16;
  }
  for (int64_t i = done + threadIdx.x; i < end; i += kThreads) {
    const std::byte value = from[i];
    if (compare) differs |= to[i] != value;
    to[i] = value;
  }
  return differs;
}

__device__ void FillBytes(std::byte* to, int64_t begin, int64_t end, std::byte value) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) to[i] = value;
}

__device__ void NoteBad(const PrologueParams& p, const BufferRecord& record, int64_t index) {
  atomicMin(reinterpret_cast<long long*>(&p.first_bad[record.id]), static_cast<long long>(index));
  atomicOr(&p.control->flawed, 1u);
}

// The first element of the tile that differs from the original, if any.
__device__ void CompareTile(const PrologueParams& p, const BufferRecord& record, int64_t begin, int64_t end) {
  const std::byte* const live = record.live;
  const std::byte* const original = record.original;
  int64_t done = begin;
  if (Aligned16(live + begin, original + begin)) {
    const int64_t words = (end - begin) / 16;
    for (int64_t i = threadIdx.x; i < words; i += kThreads) {
      const int4 a = reinterpret_cast<const int4*>(live + begin)[i];
      const int4 b = reinterpret_cast<const int4*>(original + begin)[i];
      if (a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w) continue;
      int64_t byte = begin + i * 16;
      while (live[byte] == original[byte]) ++byte;
      NoteBad(p, record, byte / record.element_bytes);
      break;
    }
    done += words * 16;
  }
  for (int64_t i = done + threadIdx.x; i < end; i += kThreads) {
    if (live[i] != original[i]) {
      NoteBad(p, record, i / record.element_bytes);
      break;
    }
  }
}

// Pads elements [real, TailEnd) of a tile of an int32 buffer with `value`.
__device__ void PadIntegers(const BufferRecord& record, int64_t begin, int64_t end, int32_t value) {
  int32_t* const live = reinterpret_cast<int32_t*>(record.live);
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
  PadIntegers(record, tail_begin / size, tail_end / size, value);
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

__device__ void PlaceTile(const PrologueParams& p, const Step& step, const BufferRecord& record, int64_t begin,
                          int64_t end) {
  const SlotEntry entry = reinterpret_cast<const SlotEntry*>(step.slot + sizeof(SlotHeader))[record.refilled];
  if (entry.offset == 0) return;
  const std::byte* const values = step.slot + entry.offset;
  const int64_t real = min(entry.count, record.capacity);
  const int64_t placed_end = min(end, real * record.element_bytes);
  if (begin < placed_end) CopyBytes(record.live, values, begin, placed_end, false);
  PadTile(p, record, begin, end, real, values);
  if (!record.integers) return;
  const int32_t* const integers = reinterpret_cast<const int32_t*>(values);
  for (int64_t i = begin / 4 + threadIdx.x; i < placed_end / 4; i += kThreads) {
    if (Bound(record, integers, i, real) != integers[i]) {
      NoteBad(p, record, i);
      break;
    }
  }
}

__device__ void RestoreTile(const PrologueParams& p, const Step& step, const BufferRecord& record, int64_t begin,
                            int64_t end) {
  if (CopyBytes(record.live, record.original, begin, end, step.check)) atomicOr(&p.control->changed, 1u);
  if (p.mode != PrologueMode::kReplay) return;
  __syncthreads();  // the tail overwrites what other threads of this block have just restored
  PadTile(p, record, begin, end, Count(record, step.requests, step.tokens), record.original);
}

__device__ void DoTile(const PrologueParams& p, const Step& step, const BufferRecord& record, int64_t tile) {
  const int64_t bytes = record.capacity * record.element_bytes;
  const int64_t begin = tile * kTileBytes;
  const int64_t end = min(begin + kTileBytes, bytes);
  const Role role = static_cast<Role>(record.role);
  if (p.mode == PrologueMode::kRestoreAll) {
    if (p.compare_constants && role == Role::kConstant) return CompareTile(p, record, begin, end);
    if (role != Role::kRestored || p.restore) CopyBytes(record.live, record.original, begin, end, false);
    return;
  }
  switch (role) {
    case Role::kConstant:
      if (step.check) CompareTile(p, record, begin, end);
      break;
    case Role::kRestored:
      if (p.restore) RestoreTile(p, step, record, begin, end);
      break;
    case Role::kRefilled:
      if (step.slot != nullptr) PlaceTile(p, step, record, begin, end);
      break;
    case Role::kScratch:
      if (p.poison_scratch && p.mode == PrologueMode::kReplay) FillBytes(record.live, begin, end, std::byte{0xFF});
      break;
  }
}

// Finds the buffer that tile `tile` of a chunk belongs to: its index goes to `found`, which is shared. All threads look
// at once: a search would be a chain of loads.
__device__ void FindRecord(const ChunkTable& chunk, int64_t tile, int32_t& found) {
  for (int32_t i = threadIdx.x; i < chunk.count; i += kThreads) {
    const int64_t end = i + 1 < chunk.count ? chunk.records[i + 1].first_tile : chunk.tiles;
    if (chunk.records[i].first_tile <= tile && tile < end) found = i;
  }
}

// --- what the last block does when all others are done ---

template <class Body>
__device__ void ForEachBuffer(const PrologueParams& p, Body body) {
  for (int32_t c = 0; c < p.num_chunks; ++c) {
    for (int32_t i = 0; i < p.chunks[c].count; ++i) {
      const BufferRecord& record = p.chunks[c].records[i];
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

// Reports what tiles noted about one buffer. Returns whether it is an invariant that was broken. Thread 0 only.
__device__ bool ReportBad(const PrologueParams& p, const Step& step, const ReportRing& ring, const BufferRecord& record,
                          int64_t index) {
  const int64_t byte = index * record.element_bytes;
  if (static_cast<Role>(record.role) == Role::kConstant) {
    Report(ring, KindOf(Violation::Kind::kPolluted), record.id, index,
           ElementValue(record.original + byte, record.element_bytes),
           ElementValue(record.live + byte, record.element_bytes));
    ++p.control->healed;
    return false;
  }
  const SlotEntry entry = reinterpret_cast<const SlotEntry*>(step.slot + sizeof(SlotHeader))[record.refilled];
  const int32_t* const values = reinterpret_cast<const int32_t*>(step.slot + entry.offset);
  Report(ring, KindOf(Violation::Kind::kInvariant), record.id, index,
         Bound(record, values, index, min(entry.count, record.capacity)), values[index]);
  return true;
}

// Reports and heals; returns whether the step broke a rule. By all threads of the block.
__device__ bool Resolve(const PrologueParams& p, const Step& step, const ReportRing& ring) {
  __shared__ bool violated;
  __shared__ int64_t index;
  if (threadIdx.x == 0) {
    violated = step.not_armed || step.armed_twice || step.wrong_bucket;
    const int64_t next = static_cast<int64_t>(step.consumed + 1), newest = static_cast<int64_t>(step.newest);
    if (step.not_armed) Report(ring, KindOf(Violation::Kind::kNotArmed), -1, 0, next, newest);
    if (step.armed_twice) Report(ring, KindOf(Violation::Kind::kArmedTwice), -1, 0, next, newest);
    if (step.wrong_bucket) {
      const bool tokens = step.other_requests == p.bucket.requests;
      Report(ring, KindOf(Violation::Kind::kWrongBucket), -1, tokens ? 1 : 0,
             tokens ? p.bucket.tokens : p.bucket.requests, tokens ? step.other_tokens : step.other_requests);
    }
  }
  __syncthreads();
  if (atomicOr(&p.control->flawed, 0u) == 0) return violated;
  __syncthreads();  // all threads have read the flag before it is cleared
  if (threadIdx.x == 0) p.control->flawed = 0;
  ForEachBuffer(p, [&](const BufferRecord& record) {
    if (threadIdx.x == 0) {
      index = static_cast<int64_t>(atomicExch(reinterpret_cast<unsigned long long*>(&p.first_bad[record.id]),
                                              static_cast<unsigned long long>(kNoIndex)));
      if (index != kNoIndex && ReportBad(p, step, ring, record, index)) violated = true;
    }
    __syncthreads();
    if (index != kNoIndex && static_cast<Role>(record.role) == Role::kConstant) {
      CopyBytes(record.live, record.original, 0, record.capacity * record.element_bytes, false);
    }
    __syncthreads();
  });
  return violated;
}

__device__ void Neutralise(const PrologueParams& p) {
  ForEachBuffer(p, [&](const BufferRecord& record) {
    const Role role = static_cast<Role>(record.role);
    if (role != Role::kRefilled && !(role == Role::kRestored && p.neutralise_restored)) return;
    const int64_t end = TailEnd(p, record);
    if (record.integers) {
      PadIntegers(record, 0, end, record.harmless);
    } else {
      FillBytes(record.live, 0, end * record.element_bytes, std::byte{0});
    }
  });
}

// Thread 0 of the last block. No fence: it would cost a round trip over the bus, and the host needs no order here.
__device__ void Publish(const PrologueParams& p, const Step& step) {
  Control& control = *p.control;
  if (p.mode == PrologueMode::kReplay) control.consumed = step.replay;
  if (p.mode != PrologueMode::kRestoreRestored) {
    control.current = step.replay;
    control.graph = p.ring.graph;
  }
  if (p.mode != PrologueMode::kRestoreAll && p.restore) {
    control.restored_bytes += p.restored_bytes;
  }
  if (control.changed != 0) ++control.expected_writes;
  control.changed = 0;
  control.ticket = 0;
  volatile Board& board = *p.board;
  board.restored_bytes = control.restored_bytes;
  board.expected_writes = control.expected_writes;
  board.healed = control.healed;
  board.neutralised = control.neutralised;
  board.consumed = control.consumed;
}

__global__ void __launch_bounds__(kThreads) PrologueKernel(const __grid_constant__ PrologueParams p) {
  __shared__ Armed slots[kMaxSlots];
  __shared__ uint64_t consumed;
  __shared__ Step step;
  __shared__ int32_t found;
  __shared__ bool last;
  if (p.mode == PrologueMode::kReplay) {
    if (threadIdx.x < p.num_slots) slots[threadIdx.x] = ReadSlot(p, threadIdx.x);
    if (threadIdx.x == kThreads - 1) consumed = p.control->consumed;
  }
  __syncthreads();
  if (threadIdx.x == 0) step = ChooseStep(p, slots, consumed);

  int64_t tile = blockIdx.x;
  int64_t first = 0;  // tile number of the chunk's first
  for (int32_t c = 0; c < p.num_chunks; ++c) {
    const ChunkTable& chunk = p.chunks[c];
    for (; tile < first + chunk.tiles; tile += gridDim.x) {
      FindRecord(chunk, tile - first, found);
      __syncthreads();
      const BufferRecord& record = chunk.records[found];
      if (Covers(p, record)) DoTile(p, step, record, tile - first - record.first_tile);
      __syncthreads();  // `found` has been read
    }
    first += chunk.tiles;
  }

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&p.control->ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();

  ReportRing ring = p.ring;
  ring.replay = &step.replay;
  const bool violated = Resolve(p, step, ring);
  if (violated && p.neutralise) {
    Neutralise(p);
    if (threadIdx.x == 0) ++p.control->neutralised;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    Publish(p, step);
    if (violated && p.trap) {
      __threadfence_system();
      __trap();
    }
  }
}

}  // namespace

int PrologueCuda(CUstream_st* stream, const PrologueParams& params) {
  const int64_t blocks = params.tiles < 1 ? 1 : params.tiles < params.blocks ? params.tiles : params.blocks;
  PrologueKernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pristine::buffers
