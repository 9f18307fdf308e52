// Both prefill kernels in one, for buckets with enough states to fill the device: what a chunk needs whatever the state
// is never leaves the multiprocessor, and q and k are read once.
//
// A block is one (sequence, value head): two consumer warpgroups keep the state (prefill_states_device.cuh); a third
// computes T and P of the next chunk (prefill_inverse_device.cuh); a fourth loads the chunk after that and stores the
// output of the one before.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/prefill.h"
#include "attention/gdn/kernels/prefill_device.cuh"
#include "attention/gdn/kernels/prefill_inverse_device.cuh"
#include "attention/gdn/kernels/prefill_states_device.cuh"

namespace pristine::attention::gdn {
namespace {

constexpr int kConsumers = 2;
constexpr int kThreads = (kConsumers + 2) * kGroup;

struct FusedShared {
  static constexpr int kRecords = kPrefillRecords;
  Tiles<kConsumers> tiles[kStages];
  RecordTile records[kRecords];
  Matrices m[2];                    // of a chunk and the next
  float gates[kStages][2][kChunk];  // g and beta of the tokens
  float sums[4][kChunk];            // G, times log2 e; one copy for each warp
  uint64_t loaded[kStages], full[kStages], empty[kStages];
};
constexpr int kSharedBytes = PrefillStatesSharedBytes(kDim, kStages);
static_assert(sizeof(FusedShared) == kSharedBytes && kSharedBytes <= 232448);
static_assert(PrefillStatesWarps(kDim) * 32 == kThreads);
static_assert(2 * sizeof(Matrices) + (4 + 2 * kStages) * kChunk * sizeof(float) + (kStages + 1) * sizeof(uint64_t) ==
              kPrefillInverseBytes);

#ifdef PRISTINE_GDN_PREFILL

__device__ void PreparersMeet() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

// The thread and the head, read anew: what follows from them is not kept in registers that there are not.
__device__ __forceinline__ int ThreadOfGroup() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread % kGroup;
}
__device__ __forceinline__ int HeadOfBlock() {
  int head;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(head));
  return head;
}

// 64 rows of 128 elements, `stride` elements apart, to two tiles; those behind `valid` are zeros.
__device__ __forceinline__ void LoadRows(unsigned char (&to)[2][kTile], const void* from, int64_t stride, int valid,
                                         int tid) {
  const uint32_t at = SharedAddress(to) + tid % 16 / 8 * kTile + tid / 16 * 128 + ((tid % 8 ^ tid / 16) << 4);
  const __nv_bfloat16* const column = static_cast<const __nv_bfloat16*>(from) + tid % 16 * 8;
  if (valid == kChunk) {
    const __nv_bfloat16* row = column + tid / 16 * stride;
#pragma unroll 2
    for (int i = 0; i < 8; ++i, row += 8 * stride) CopyAsync(at + i * 1024, row, true);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const int row = i * 8 + tid / 16;
    CopyAsync(at + i * 1024, column + min(row, valid - 1) * stride, row < valid);
  }
}

// q, k, v and gates, chunk after chunk; tokens behind the sequence's last are zeros. And the output: out of V's place,
// before the same threads fill it again.
__device__ void LoadChunks(const PrefillParams& p, FusedShared& shared, const PrefillSpan& span) {
#pragma unroll 1
  for (int c = 0; c < span.chunks + kStages; ++c) {
    const int s = c % kStages, tid = ThreadOfGroup(), head = HeadOfBlock();
    Tiles<kConsumers>& tiles = shared.tiles[s];
    const int valid = min(span.length - c * kChunk, kChunk);
    const int64_t token = span.begin + c * kChunk;
    if (c >= kStages) Wait(&shared.empty[s], c / kStages - 1 & 1);
    if (c < span.chunks) {
      const int column = head / (p.v_heads / p.qk_heads) * kDim;
      LoadRows(tiles.k, static_cast<const __nv_bfloat16*>(p.k) + token * p.k_stride + column, p.k_stride, valid, tid);
      LoadRows(tiles.q, static_cast<const __nv_bfloat16*>(p.q) + token * p.q_stride + column, p.q_stride, valid, tid);
      const int t = tid % kChunk;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(SharedAddress(shared.gates[s][0] + tid)),
                   "l"((tid < kChunk ? p.g : p.beta) + (token + min(t, valid - 1)) * p.v_heads + head),
                   "r"(t < valid ? 4 : 0)
                   : "memory");
      ArriveWithCopies(&shared.loaded[s]);
    }
    if (c >= kStages) {
      StoreOutput<kConsumers>(p, tiles, token - kStages * kChunk, min(valid + kStages * kChunk, kChunk), head, 0, tid);
    }
    if (c < span.chunks) {
      LoadRows(tiles.v, static_cast<const __nv_bfloat16*>(p.v) + token * p.v_stride + head * kDim, p.v_stride, valid,
               tid);
      ArriveWithCopies(&shared.full[s]);
    }
  }
}

// x K^T of a chunk, begun: x is k or q.
__device__ __forceinline__ void BeginScores(const unsigned char (&x)[2][kTile], const unsigned char (&k)[2][kTile],
                                            float (&scores)[32]) {
  const uint64_t x_tile = Descriptor(x), k_tile = Descriptor(k);
  FenceRegisters();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = i / 4 * kTile + i % 4 * 32;
    Multiply64Shared(scores, Advance(x_tile, at), Advance(k_tile, at), i > 0);
  }
  CommitProducts();
}

__device__ void PrepareChunks(const PrefillParams& p, FusedShared& shared, const PrefillSpan& span, int head) {
  const int tid = static_cast<int>(threadIdx.x) % kGroup, warp = tid / 32;
  int lane = tid % 32;
  for (RecordTile& record : shared.records) {  // above the diagonal blocks T and P stay zero
    for (int i = tid; i < 3 * kChunk * kChunk / 8; i += kGroup) {
      reinterpret_cast<uint4*>(&record)[i] = make_uint4(0, 0, 0, 0);
    }
  }
  if (span.chunks == 0) return;
  PreparersMeet();
  Wait(&shared.loaded[0], 0);
  FenceProxies();
  float kk[32];
  BeginScores(shared.tiles[0].k, shared.tiles[0].k, kk);
  for (int c = 0; c < span.chunks; ++c) {
    // Not known to be the same in each round: addresses would be kept in registers that there are not.
    asm volatile("" : "+r"(lane));
    RecordTile& record = shared.records[c % kPrefillRecords];
    Matrices& m = shared.m[c % 2];
    const float* const beta = shared.gates[c % kStages][1];
    if (c >= kPrefillRecords) {  // whose place this record takes
      Wait(&shared.empty[(c - kPrefillRecords) % kStages], (c - kPrefillRecords) / kStages & 1);
    }
    const Tiles<kConsumers>& tiles = shared.tiles[c % kStages];
    float qk[32];
    BeginScores(tiles.q, tiles.k, qk);
    const float3 sum =
        SumGates(reinterpret_cast<const float2*>(shared.gates[c % kStages][0])[lane], shared.sums[warp], lane);
    if (warp == 0) reinterpret_cast<float2*>(record.exp_g)[lane] = make_float2(Exp2(sum.x), Exp2(sum.y));
    if (warp == 1) {
      reinterpret_cast<float2*>(record.exp_rest)[lane] = make_float2(Exp2(sum.z - sum.x), Exp2(sum.z - sum.y));
    }
    __syncwarp();
    WaitForProducts<0>();
    FillScores(
        m, record.p, shared.sums[warp], beta, p.scale, warp, lane,
        [&](int n, int half) { return make_float2(kk[n * 4 + half * 2], kk[n * 4 + half * 2 + 1]); },
        [&](int n, int half) { return make_float2(qk[n * 4 + half * 2], qk[n * 4 + half * 2 + 1]); });
    __syncwarp();
    InvertDiagonal(m, warp, lane);
    PreparersMeet();
    // Behind the last chunk, of anything.
    const Tiles<kConsumers>& next = shared.tiles[(c + 1) % kStages];
    if (c + 1 < span.chunks) {
      Wait(&shared.loaded[(c + 1) % kStages], (c + 1) / kStages & 1);
      FenceProxies();
    }
    BeginScores(next.k, next.k, kk);
    InvertColumn(m, record.t, record.t_low, beta, warp, lane);
    FenceProxies();
    Arrive(&shared.full[c % kStages]);
  }
  WaitForProducts<0>();
}

#endif  // PRISTINE_GDN_PREFILL

// grid: x = v_heads, y = sequences.
template <class State>
__global__ void __launch_bounds__(kThreads, 1) GdnPrefillKernel(const __grid_constant__ PrefillParams p) {
#ifdef PRISTINE_GDN_PREFILL
  if (!Runs(p, 1)) return;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<FusedShared*>(memory);
  const int head = static_cast<int>(blockIdx.x);
  const int32_t sequence = static_cast<int32_t>(blockIdx.y);
  const PrefillSpan span = SpanOf(p, sequence);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(&shared.loaded[i], kGroup);
      InitBarrier(&shared.full[i], 2 * kGroup);  // T and P, and the copies of v
      InitBarrier(&shared.empty[i], kConsumers * kGroup);
    }
    FenceProxies();
  }
  __syncthreads();
  if (threadIdx.x >= (kConsumers + 1) * kGroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    LoadChunks(p, shared, span);
  } else if (threadIdx.x >= kConsumers * kGroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 96;");
    PrepareChunks(p, shared, span, head);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");
    Consume<kConsumers, State>(p, shared, span, sequence, head, 0);
    // Rows of `out` behind the last sequence.
    const int end = min(max(p.cu_seqlens[p.sequences], 0), p.tokens);
    constexpr int kRows = kConsumers * kGroup / 16;
    for (int64_t t = end + sequence * kRows + static_cast<int>(threadIdx.x) / 16; t < p.tokens;
         t += int64_t{p.sequences} * kRows) {
      reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + (t * p.v_heads + head) * kDim)[threadIdx.x % 16] =
          make_uint4(0, 0, 0, 0);
    }
  }
#endif
}

template <class State>
int SetUp() {
  return cudaFuncSetAttribute(GdnPrefillKernel<State>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

template <class State>
int LaunchFused(CUstream_st* stream, const PrefillParams& params) {
  const dim3 grid(static_cast<unsigned>(params.v_heads), static_cast<unsigned>(params.sequences));
  GdnPrefillKernel<State><<<grid, kThreads, kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

int PrefillSetUpCuda() {
  const int error = SetUp<float>();
  return error != cudaSuccess ? error : SetUp<__nv_bfloat16>();
}

int PrefillCuda(CUstream_st* stream, const PrefillParams& params) {
  return params.state_dtype == DType::kFloat32 ? LaunchFused<float>(stream, params)
                                               : LaunchFused<__nv_bfloat16>(stream, params);
}

}  // namespace pristine::attention::gdn
