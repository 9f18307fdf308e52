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
  int32_t requests, tokens;
  int32_t other_requests, other_tokens;  // of the step's bucket, where it is not the graph's
  bool check;
  bool not_armed, armed_twice, wrong_bucket;
};

// What the blocks that are done have found, in one number, so that the last of them knows after its one atomic: how
// many blocks, how many of them found something wrong, how many a changed kRestored buffer.
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

__device__ Step TakeStep(const PrologueParams& p, const std::byte* image, const Armed& armed, uint64_t consumed) {
  Step step = {};
  step.requests = p.bucket.requests;
  step.tokens = p.bucket.tokens;
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
  step.entries = reinterpret_cast<const SlotEntry*>(image + sizeof(SlotHeader));
  step.values = image + armed.values;
  return step;
}

// The step of a captured replay is `carried`, or that of the newest slot if that is null. By all threads.
__device__ Step FindStep(const PrologueParams& p, const std::byte* carried) {
  if (p.mode != PrologueMode::kReplay) {
    Step step = {};
    step.requests = p.bucket.requests;
    step.tokens = p.bucket.tokens;
    return step;
  }
  const uint64_t consumed = p.control->consumed;
  if (carried != nullptr) {
    return TakeStep(p, carried, ReadHeader(*reinterpret_cast<const SlotHeader*>(carried)), consumed);
  }
  __shared__ Armed slots[kMaxSlots];  // each loaded by a thread of its own: one round trip to memory
  const auto image = [&](uint32_t slot) { return p.slots + static_cast<int64_t>(slot) * p.slot_stride; };
  if (threadIdx.x < p.num_slots) {
    slots[threadIdx.x] = ReadHeader(*reinterpret_cast<const SlotHeader*>(image(threadIdx.x)));
  }
  __syncthreads();
  uint32_t newest = 0;
  for (uint32_t i = 1; i < p.num_slots; ++i) {
    if (slots[i].sequence > slots[newest].sequence) newest = i;
  }
  return TakeStep(p, image(newest), slots[newest], consumed);
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

__device__ bool Differ(const int4& a, const int4& b) {
  return ((a.x ^ b.x) | (a.y ^ b.y) | (a.z ^ b.z) | (a.w ^ b.w)) != 0;
}

// [begin, end) in bytes, by all threads of the block. Returns whether this thread found a byte that differed, where
// `compare`.
__device__ bool CopyBytes(std::byte* to, const std::byte* from, int64_t begin, int64_t end, bool compare) {
  bool differs = false;
  int64_t done = begin;
  if (Aligned16(to + begin, from + begin)) {
    constexpr int kBatch = 4;  // loads in flight per thread: a tile in one go
    const int64_t words = (end - begin) / 16;
    int4* const wide_to = reinterpret_cast<int4*>(to + begin);
    const int4* const wide_from = reinterpret_cast<const int4*>(from + begin);
    for (int64_t first = threadIdx.x; first < words; first += kBatch * kThreads) {
      int4 values[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (first + k * kThreads < words) values[k] = wide_from[first + k * kThreads];
      }
      if (compare) {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (first + k * kThreads < words) differs |= Differ(values[k], wide_to[first + k * kThreads]);
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (first + k * kThreads < words) wide_to[first + k * kThreads] = values[k];
      }
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

__device__ int NoteBad(const PrologueParams& p, const BufferRecord& record, int64_t index) {
  atomicMin(reinterpret_cast<long long*>(&p.first_bad[record.id]), static_cast<long long>(index));
  return kFlawed;
}

// The first element of the tile that differs from the original, if any.
__device__ int CompareTile(const PrologueParams& p, const BufferRecord& record, int64_t begin, int64_t end) {
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

__device__ int PlaceTile(const PrologueParams& p, const Step& step, const BufferRecord& record, int64_t begin,
                         int64_t end) {
  const SlotEntry entry = step.entries[record.refilled];
  if (entry.offset < 0) return kNothing;
  const std::byte* const values = step.values + entry.offset;
  const int64_t real = min(entry.count, record.capacity);
  const int64_t placed_end = min(end, real * record.element_bytes);
  if (begin < placed_end) CopyBytes(record.live, values, begin, placed_end, false);
  PadTile(p, record, begin, end, real, values);
  if (!record.integers) return kNothing;
  const int32_t* const integers = reinterpret_cast<const int32_t*>(values);
  for (int64_t i = begin / 4 + threadIdx.x; i < placed_end / 4; i += kThreads) {
    if (Bound(record, integers, i, real) != integers[i]) return NoteBad(p, record, i);
  }
  return kNothing;
}

__device__ int RestoreTile(const PrologueParams& p, const Step& step, const BufferRecord& record, int64_t begin,
                           int64_t end) {
  const int found = CopyBytes(record.live, record.original, begin, end, step.check) ? kChanged : kNothing;
  if (p.mode != PrologueMode::kReplay) return found;
  const int64_t real = Count(record, step.requests, step.tokens);
  if (real * record.element_bytes < end && real < TailEnd(p, record)) {
    __syncthreads();  // the tail overwrites what other threads of this block have just restored
    PadTile(p, record, begin, end, real, record.original);
  }
  return found;
}

__device__ int DoTile(const PrologueParams& p, const Step& step, const BufferRecord& record) {
  const int64_t bytes = record.capacity * record.element_bytes;
  const int64_t begin = record.tile * kTileBytes;
  const int64_t end = min(begin + kTileBytes, bytes);
  const Role role = static_cast<Role>(record.role);
  if (p.mode == PrologueMode::kRestoreAll) {
    if (p.compare_constants && role == Role::kConstant) return CompareTile(p, record, begin, end);
    if (role != Role::kRestored || p.restore) CopyBytes(record.live, record.original, begin, end, false);
    return kNothing;
  }
  switch (role) {
    case Role::kConstant:
      return step.check ? CompareTile(p, record, begin, end) : kNothing;
    case Role::kRestored:
      return p.restore ? RestoreTile(p, step, record, begin, end) : kNothing;
    case Role::kRefilled:
      return step.entries != nullptr ? PlaceTile(p, step, record, begin, end) : kNothing;
    case Role::kScratch:
      if (p.poison_scratch && p.mode == PrologueMode::kReplay) FillBytes(record.live, begin, end, std::byte{0xFF});
      return kNothing;
  }
  return kNothing;
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
  const SlotEntry entry = step.entries[record.refilled];
  const int32_t* const values = reinterpret_cast<const int32_t*>(step.values + entry.offset);
  Report(ring, KindOf(Violation::Kind::kInvariant), record.id, index,
         Bound(record, values, index, min(entry.count, record.capacity)), values[index]);
  return true;
}

// Reports and heals; returns whether the step broke a rule. By all threads of the block.
__device__ bool Resolve(const PrologueParams& p, const Step& step, const ReportRing& ring, bool flawed) {
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
  if (!flawed) return violated;
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
__device__ void Publish(const PrologueParams& p, const Step& step, Board totals, bool changed) {
  Control& control = *p.control;
  if (p.mode == PrologueMode::kReplay) control.consumed = step.replay;
  if (p.mode != PrologueMode::kRestoreRestored) {
    control.current = step.replay;
    control.graph = p.ring.graph;
  }
  control.ticket = 0;
  volatile Board& board = *p.board;
  if (p.mode != PrologueMode::kRestoreAll && p.restore && p.restored_bytes > 0) {
    control.restored_bytes = totals.restored_bytes += p.restored_bytes;
    board.restored_bytes = totals.restored_bytes;
  }
  if (changed) {
    control.expected_writes = ++totals.expected_writes;
    board.expected_writes = totals.expected_writes;
  }
  board.consumed = p.mode == PrologueMode::kReplay ? step.replay : totals.consumed;
}

// Something was wrong. By all threads of the last block.
__device__ void Answer(const PrologueParams& p, const Step& step, bool flawed) {
  __threadfence();  // what is reported, healed or made harmless was written by other blocks
  ReportRing ring = p.ring;
  ring.replay = &step.replay;
  const bool violated = Resolve(p, step, ring, flawed);
  if (violated && p.neutralise) {
    Neutralise(p);
    if (threadIdx.x == 0) ++p.control->neutralised;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  volatile Board& board = *p.board;
  board.healed = p.control->healed;
  board.neutralised = p.control->neutralised;
  if (violated && p.trap) {
    __threadfence_system();
    __trap();
  }
}

__device__ void Run(const PrologueParams& p, const std::byte* carried) {
  // Loaded ahead of use, beside the first tile's record: only the last block to finish changes them.
  Board totals = {};
  if (threadIdx.x == 0) {
    totals = {p.control->consumed, p.control->restored_bytes, p.control->expected_writes, 0, 0};
  }
  const Step step = FindStep(p, carried);
  const bool all = step.check || p.poison_scratch || p.mode != PrologueMode::kReplay;

  int found = kNothing;
  int64_t tile = blockIdx.x;
  int64_t first = 0;  // number of the chunk's first tile
  for (int32_t c = 0; c < p.num_chunks; ++c) {
    const ChunkTable& chunk = p.chunks[c];
    const int64_t tiles = all ? chunk.tiles : chunk.busy_tiles;
    for (; tile < first + tiles; tile += gridDim.x) {
      const BufferRecord record = chunk.by_tile[tile - first];
      if (Covers(p, record)) found |= DoTile(p, step, record);
    }
    first += tiles;
  }

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
  if (threadIdx.x == 0) Publish(p, step, totals, (ticket >> (2 * kTicketBits)) != 0);
  if (any_flawed || step.not_armed || step.armed_twice || step.wrong_bucket) Answer(p, step, any_flawed);
}

__global__ void __launch_bounds__(kThreads) PrologueKernel(const __grid_constant__ PrologueParams p) {
  Run(p, nullptr);
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    InlinePrologueKernel(const __grid_constant__ InlinePrologueParams<kBytes> p) {
  Run(p.base, p.step);
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

}  // namespace pristine::buffers
