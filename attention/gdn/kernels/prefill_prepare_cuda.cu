// The first of two prefill kernels: for each chunk and value head, what does not depend on the state (ChunkRecord).
//
// One block per chunk and q/k head, or value head: the products K K^T and Q K^T on the tensor cores, once for all value
// heads of the block; then per value head the gates, P and T (prefill_inverse_device.cuh).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/prefill.h"
#include "attention/gdn/kernels/prefill_device.cuh"
#include "attention/gdn/kernels/prefill_inverse_device.cuh"

namespace pristine::attention::gdn {
namespace {

constexpr int kThreads = 128;

struct PrepareShared {
  union {
    uint4 qk[2][kChunk * kDim / 8];  // k, q: rows of 16 words, word w of row r at w ^ (r % 8)
    struct {
      Matrices m;
      alignas(16) uint16_t t_low[kChunk * kChunk];  // as in ChunkRecord
    } later;
  };
  alignas(16) uint16_t t[kChunk * kChunk];
  alignas(16) uint16_t p[kChunk * kChunk];
  float sums[kMaxHeadsPerBlock][kChunk];  // G, times log2 e
  float beta[kMaxHeadsPerBlock][kChunk];
  int32_t sequence;
};
constexpr int kSharedBytes = sizeof(PrepareShared);
constexpr int kBlocks = 4;  // on a multiprocessor
static_assert(kBlocks * (kSharedBytes + 1024) <= 233472);

#ifdef PRISTINE_GDN_PREFILL

constexpr int kImageWords = kChunk * kChunk / 8;

__device__ void Multiply16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ uint32_t SwizzledRow(const uint4* tile, int row, int word) {
  return SharedAddress(tile + row * (kDim / 8) + (word ^ (row & 7)));
}

// Of one value head: G of the valid tokens, the last of them for those behind; beta 0 there.
__device__ void LoadGates(const PrefillParams& p, PrepareShared& shared, ChunkRecord& record, int64_t token, int valid,
                          int head, int place, int lane) {
  const auto load = [&](const float* from, int t) { return t < valid ? from[(token + t) * p.v_heads + head] : 0.f; };
  const float2 g = make_float2(load(p.g, 2 * lane), load(p.g, 2 * lane + 1));
  shared.beta[place][2 * lane] = load(p.beta, 2 * lane);
  shared.beta[place][2 * lane + 1] = load(p.beta, 2 * lane + 1);
  const float3 sum = SumGates(g, shared.sums[place], lane);
  reinterpret_cast<float2*>(record.exp_g)[lane] = make_float2(Exp2(sum.x), Exp2(sum.y));
  reinterpret_cast<float2*>(record.exp_rest)[lane] = make_float2(Exp2(sum.z - sum.x), Exp2(sum.z - sum.y));
}

// Rows of `out` behind the last sequence, of this block's 64 tokens and heads.
__device__ void ZeroTail(const PrefillParams& p, int first_head, int heads) {
  const int64_t end = min(max(p.cu_seqlens[p.sequences], 0), p.tokens);
  const int64_t first = int64_t{blockIdx.x} * kChunk, last = min(first + kChunk, static_cast<int64_t>(p.tokens));
  const int words = heads * kDim / 8;
  for (int64_t t = max(first, end); t < last; ++t) {
    uint4* const row =
        reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + (t * p.v_heads + first_head) * kDim);
    for (int w = threadIdx.x; w < words; w += kThreads) row[w] = make_uint4(0, 0, 0, 0);
  }
}

#endif  // PRISTINE_GDN_PREFILL

__global__ void __launch_bounds__(kThreads, kBlocks) GdnPrefillPrepareKernel(const __grid_constant__ PrefillParams p) {
#ifdef PRISTINE_GDN_PREFILL
  if (!Runs(p, 2)) return;
  extern __shared__ __align__(128) unsigned char memory[];
  PrepareShared& shared = *reinterpret_cast<PrepareShared*>(memory);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32;
  int lane = tid % 32;
  const int heads = p.heads_per_block, first_head = static_cast<int>(blockIdx.y) * heads;
  const int qk_head = first_head / (p.v_heads / p.qk_heads);
  const int32_t place = static_cast<int32_t>(blockIdx.x);

  ZeroTail(p, first_head, heads);
  if (tid == 0) shared.sequence = -1;
  __syncthreads();
  for (int32_t i = tid; i < p.sequences; i += kThreads) {
    const PrefillSpan span = SpanOf(p, i);
    // One, but where cu_seqlens decrease.
    if (place >= span.first_chunk && place < span.first_chunk + span.chunks) atomicMax(&shared.sequence, i);
  }
  __syncthreads();
  if (shared.sequence < 0) return;
  const PrefillSpan span = SpanOf(p, shared.sequence);
  const int32_t first = (place - span.first_chunk) * kChunk;
  const int valid = min(span.length - first, kChunk);
  const int64_t token = span.begin + first;

#pragma unroll
  for (int i = 0; i < kChunk * kDim / 8 / kThreads; ++i) {
    const int row = i * (kThreads / 16) + tid / 16, word = tid % 16;
    const int64_t at = token + min(row, valid - 1), column = qk_head * kDim + word * 8;
    CopyAsync(SwizzledRow(shared.qk[0], row, word), static_cast<const __nv_bfloat16*>(p.k) + at * p.k_stride + column,
              row < valid);
    CopyAsync(SwizzledRow(shared.qk[1], row, word), static_cast<const __nv_bfloat16*>(p.q) + at * p.q_stride + column,
              row < valid);
  }
  CommitCopies();
  ChunkRecord* const records = static_cast<ChunkRecord*>(p.workspace) + int64_t{place} * p.v_heads + first_head;
  for (int h = warp; h < heads; h += kThreads / 32) {
    LoadGates(p, shared, records[h], token, valid, first_head + h, h, lane);
  }
  WaitForCopies<0>();
  __syncthreads();

  // This warp's 16 rows of K K^T and Q K^T, up to the diagonal. The latter are at most 1 and go into P's bfloat16: half
  // precision keeps what counts in half the registers.
  float kk[8][4] = {};
  __half2 qk[8][2];
  {
    float acc[8][4] = {};
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t k_rows[4], q_rows[4];
      LoadMatrices(k_rows, SwizzledRow(shared.qk[0], warp * 16 + lane % 16, step * 2 + lane / 16));
      LoadMatrices(q_rows, SwizzledRow(shared.qk[1], warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i > warp) break;
        uint32_t columns[4];
        LoadMatrices(columns, SwizzledRow(shared.qk[0], i * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
        Multiply16(kk[2 * i], k_rows, columns[0], columns[1]);
        Multiply16(kk[2 * i + 1], k_rows, columns[2], columns[3]);
        Multiply16(acc[2 * i], q_rows, columns[0], columns[1]);
        Multiply16(acc[2 * i + 1], q_rows, columns[2], columns[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      qk[n][0] = __floats2half2_rn(acc[n][0], acc[n][1]);
      qk[n][1] = __floats2half2_rn(acc[n][2], acc[n][3]);
    }
  }
  __syncthreads();                                                          // k and q make room for the matrices
  for (uint16_t* const image : {shared.t, shared.later.t_low, shared.p}) {  // above the diagonal blocks they stay zero
#pragma unroll
    for (int i = 0; i < kImageWords / kThreads; ++i) {
      reinterpret_cast<uint4*>(image)[i * kThreads + tid] = make_uint4(0, 0, 0, 0);
    }
  }
  __syncthreads();

  for (int h = 0; h < heads; ++h) {
    // Not known to be the same in each round: some fifty addresses would be kept in registers that there are not.
    asm volatile("" : "+r"(lane));
    const float* const beta = shared.beta[h];
    FillScores(
        shared.later.m, shared.p, shared.sums[h], beta, p.scale, warp, lane,
        [&](int n, int half) { return make_float2(kk[n][half * 2], kk[n][half * 2 + 1]); },
        [&](int n, int half) { return __half22float2(qk[n][half]); });
    __syncwarp();
    InvertDiagonal(shared.later.m, warp, lane);
    __syncthreads();
    InvertColumn(shared.later.m, shared.t, shared.later.t_low, beta, warp, lane);
    __syncthreads();
    const auto copy = [&](uint16_t* to, const uint16_t* from) {
#pragma unroll
      for (int i = 0; i < kImageWords / kThreads; ++i) {
        reinterpret_cast<uint4*>(to)[i * kThreads + tid] = reinterpret_cast<const uint4*>(from)[i * kThreads + tid];
      }
    };
    copy(records[h].t, shared.t);
    copy(records[h].t_low, shared.later.t_low);
    copy(records[h].p, shared.p);
    __syncthreads();
  }
#endif
}

}  // namespace

int PrefillSetUpPrepareCuda() {
  return cudaFuncSetAttribute(GdnPrefillPrepareKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

int PrefillPrepareCuda(CUstream_st* stream, const PrefillParams& params) {
  const dim3 grid(static_cast<unsigned>(ChunkBound(params.sequences, params.tokens)),
                  static_cast<unsigned>(params.v_heads / params.heads_per_block));
  GdnPrefillPrepareKernel<<<grid, kThreads, kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pristine::attention::gdn
