// The prologue on CUDA: two ways through a step, and the launches.
#include "buffers/kernels/prologue.h"
#include "buffers/kernels/prologue_answer.cuh"

namespace pristine::buffers {
namespace {

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

// Who waits for this grid may begin, and waits. From sm_90 on; before it, programmatic edges are plain ones.
__device__ inline void LetDependentsBegin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) PrologueKernel(const __grid_constant__ PrologueParams p) {
  LetDependentsBegin();
  RunJudged(p, nullptr);
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    InlinePrologueKernel(const __grid_constant__ InlinePrologueParams<kBytes> p) {
  LetDependentsBegin();
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
