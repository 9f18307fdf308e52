// Both prefill kernels in one, for buckets with enough states to fill the device: what a chunk needs whatever the state
// is never leaves the multiprocessor, and q and k are read once.
//
// A block is one (sequence, value head): two consumer warpgroups keep the state (prefill_states_device.cuh); a third
// computes T and P of the next chunk (prefill_inverse_device.cuh); a fourth loads the chunk after that.
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

// q, k, v and gates, chunk after chunk; tokens behind the sequence's last are zeros.
__device__ void LoadChunks(const PrefillParams& p, FusedShared& shared, const PrefillSpan& span, int head) {
  const int tid = static_cast<int>(threadIdx.x) % kGroup;
  const int column = head / (p.v_heads / p.qk_heads) * kDim + tid % 16 * 8, v_column = head * kDim + tid % 16 * 8;
  const uint32_t offset = tid % 16 / 8 * kTile + tid / 16 * 128 + ((tid % 8 ^ tid / 16) << 4);
  for (int c = 0; c < span.chunks; ++c) {
    const int s = c % kStages;
    if (c >= kStages) Wait(&shared.empty[s], c / kStages - 1 & 1);
    const int valid = span.length - c * kChunk;
    const int64_t token = span.begin + c * kChunk;
    const uint32_t to = SharedAddress(&shared.tiles[s]) + offset;
#pragma unroll 2  // few registers: the others have them
    for (int i = 0; i < 8; ++i) {
      const int row = i * 8 + tid / 16;
      const int64_t at = token + min(row, valid - 1);
      CopyAsync(to + i * 1024, static_cast<const __nv_bfloat16*>(p.k) + at * p.k_stride + column, row < valid);
      CopyAsync(to + 2 * kTile + i * 1024, static_cast<const __nv_bfloat16*>(p.q) + at * p.q_stride + column,
                row < valid);
      CopyAsync(to + 4 * kTile + i * 1024, static_cast<const __nv_bfloat16*>(p.v) + at * p.v_stride + v_column,
                row < valid);
    }
    const int t = tid % kChunk;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(SharedAddress(shared.gates[s][0] + tid)),
                 "l"((tid < kChunk ? p.g : p.beta) + (token + min(t, valid - 1)) * p.v_heads + head),
                 "r"(t < valid ? 4 : 0)
                 : "memory");
    CommitCopies();
    if (c > 0) {
      WaitForCopies<1>();
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      Arrive(&shared.loaded[(c - 1) % kStages]);
    }
  }
  if (span.chunks == 0) return;
  WaitForCopies<0>();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  Arrive(&shared.loaded[(span.chunks - 1) % kStages]);
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
    if (c + 1 < span.chunks) Wait(&shared.loaded[(c + 1) % kStages], (c + 1) / kStages & 1);
    BeginScores(next.k, next.k, kk);
    InvertColumn(m, record.t, record.t_low, beta, warp, lane);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    Arrive(&shared.full[c % kStages]);
  }
  WaitForProducts<0>();
}

#endif  // PRISTINE_GDN_PREFILL

// grid: x = v_heads, y = sequences.
template <class State>
__global__ void __launch_bounds__(kThreads, 1) GdnPrefillKernel(const __grid_constant__ PrefillParams p) {
#ifdef PRISTINE_GDN_PREFILL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<FusedShared*>(memory);
  const int head = static_cast<int>(blockIdx.x);
  const int32_t sequence = static_cast<int32_t>(blockIdx.y);
  const PrefillSpan span = SpanOf(p, sequence);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(&shared.loaded[i], kGroup);
      InitBarrier(&shared.full[i], kGroup);
      InitBarrier(&shared.empty[i], kConsumers * kGroup);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= (kConsumers + 1) * kGroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    LoadChunks(p, shared, span, head);
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
