// The second of two prefill kernels: the states, chunk after chunk, and with them the output.
//
// A block is half of one (sequence, value head)'s V: 64 columns. A consumer warpgroup keeps the state
// (prefill_states_device.cuh), a producer warpgroup kStages chunks on their way; it stores the output too.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/prefill.h"
#include "attention/gdn/kernels/prefill_device.cuh"
#include "attention/gdn/kernels/prefill_states_device.cuh"

namespace pristine::attention::gdn {
namespace {

struct StatesShared {
  static constexpr int kRecords = kStages;
  Tiles<1> tiles[kStages];
  RecordTile records[kRecords];
  uint64_t full[kStages], empty[kStages];
};
constexpr int kV = 64;                // columns of a block
constexpr int kThreads = 2 * kGroup;  // a consumer, the producer
constexpr int kSharedBytes = PrefillStatesSharedBytes(kV, kStages);
static_assert(sizeof(StatesShared) == kSharedBytes && kSharedBytes <= 232448);
static_assert(PrefillStatesWarps(kV) * 32 == kThreads);

#ifdef PRISTINE_GDN_PREFILL

__device__ void Produce(const PrefillParams& p, StatesShared& shared, const PrefillSpan& span, int head, int first_v) {
  const int tid = static_cast<int>(threadIdx.x) % kGroup;
  const int qk_head = head / (p.v_heads / p.qk_heads);
  const auto* const q = static_cast<const __nv_bfloat16*>(p.q) + qk_head * kDim + tid % 16 * 8;
  const auto* const k = static_cast<const __nv_bfloat16*>(p.k) + qk_head * kDim + tid % 16 * 8;
  constexpr int kVWords = kV / 8, kVRows = kGroup / kVWords;
  const auto* const v = static_cast<const __nv_bfloat16*>(p.v) + head * kDim + first_v + tid % kVWords * 8;
  const int qk_offset = tid % 16 / 8 * kTile + tid / 16 * 128 + ((tid % 8 ^ tid / 16) << 4);
  for (int c = 0; c < span.chunks + kStages; ++c) {  // a chunk comes, and the output of that in its place goes
    const int s = c % kStages;
    Tiles<1>& tiles = shared.tiles[s];
    const int64_t token = span.begin + c * kChunk;
    const int valid = min(span.length - c * kChunk, kChunk);
    if (c >= kStages) Wait(&shared.empty[s], c / kStages - 1 & 1);
    if (c < span.chunks) {
      if (tid == 0) {
        ArriveExpecting(&shared.full[s], sizeof(ChunkRecord));
        const auto* const records = static_cast<const ChunkRecord*>(p.workspace);
        CopyBulk(&shared.records[s], records + int64_t{span.first_chunk + c} * p.v_heads + head, sizeof(ChunkRecord),
                 &shared.full[s]);
      }
      const uint32_t k_to = SharedAddress(tiles.k) + qk_offset, q_to = SharedAddress(tiles.q) + qk_offset;
#pragma unroll 2
      for (int i = 0; i < 8; ++i) {
        const int row = i * 8 + tid / 16;
        const int64_t at = token + min(row, valid - 1);
        CopyAsync(k_to + i * 1024, k + at * p.k_stride, row < valid);
        CopyAsync(q_to + i * 1024, q + at * p.q_stride, row < valid);
      }
    }
    if (c >= kStages) {
      StoreOutput<1>(p, tiles, token - kStages * kChunk, min(valid + kStages * kChunk, kChunk), head, first_v, tid);
    }
    if (c < span.chunks) {
#pragma unroll 2
      for (int i = 0; i < kChunk / kVRows; ++i) {
        const int row = i * kVRows + tid / kVWords, word = tid % 8;
        const int64_t at = token + min(row, valid - 1);
        CopyAsync(SharedAddress(tiles.v[0]) + row * 128 + ((word ^ (row & 7)) << 4), v + at * p.v_stride, row < valid);
      }
      ArriveWithCopies(&shared.full[s]);
    }
  }
}

#endif  // PRISTINE_GDN_PREFILL

// grid: x = v_heads * 2, y = sequences.
template <class State>
__global__ void __launch_bounds__(kThreads, 1) GdnPrefillStatesKernel(const __grid_constant__ PrefillParams p) {
#ifdef PRISTINE_GDN_PREFILL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<StatesShared*>(memory);
  const int head = static_cast<int>(blockIdx.x) / 2, first_v = static_cast<int>(blockIdx.x) % 2 * kV;
  int32_t sequence = static_cast<int32_t>(blockIdx.y);
  if (p.v_parts == kByLengths) {
    const PrefillChoice choice = ChooseByLengths(p);
    if (choice.v_parts != 2) return;
    sequence = sequence == 0 ? choice.longest : sequence - (sequence <= choice.longest);  // what takes longest first
  }
  const PrefillSpan span = SpanOf(p, sequence);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(&shared.full[i], kGroup + 1);  // each producer thread, and the copy that one of them expects
      InitBarrier(&shared.empty[i], kGroup);
    }
    FenceProxies();
  }
  __syncthreads();
  if (threadIdx.x >= kGroup) {
    Produce(p, shared, span, head, first_v);
  } else {
    Consume<1, State>(p, shared, span, sequence, head, first_v);
  }
#endif
}

template <class State>
int SetUp() {
  return cudaFuncSetAttribute(GdnPrefillStatesKernel<State>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

template <class State>
int LaunchStates(CUstream_st* stream, const PrefillParams& params) {
  const dim3 grid(static_cast<unsigned>(params.v_heads * 2), static_cast<unsigned>(params.sequences));
  GdnPrefillStatesKernel<State><<<grid, kThreads, kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

int PrefillSetUpStatesCuda() {
  const int error = SetUp<float>();
  return error != cudaSuccess ? error : SetUp<__nv_bfloat16>();
}

int PrefillStatesCuda(CUstream_st* stream, const PrefillParams& params) {
  return params.state_dtype == DType::kFloat32 ? LaunchStates<float>(stream, params)
                                               : LaunchStates<__nv_bfloat16>(stream, params);
}

}  // namespace pristine::attention::gdn
