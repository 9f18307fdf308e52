// The first prefill kernel: for each chunk and value head, what does not depend on the state (ChunkRecord).
//
// One block per chunk and q/k head, or value head: the products K K^T and Q K^T on the tensor cores, once for all value
// heads of the block; then per value head the gates, P, and T by blocks of 16 rows. Each warp inverts one diagonal
// block by substitution, then takes one block column, from the diagonal down:
//   T_ij = T_ii N_ij,   N_ij = -sum over k from j to i - 1 of A_ik T_kj
// T is a difference of large numbers where keys repeat, so products take each float32 factor as the sum of two
// bfloat16. All of a column is computed transposed: one product's accumulators are the next one's left operand.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/prefill.h"
#include "attention/gdn/kernels/prefill_device.cuh"

namespace pristine::attention::gdn {
namespace {

constexpr int kThreads = 128;
constexpr int kPitch = kChunk + 8;   // of rows in different banks, bfloat16
constexpr int kBlockPitch = 16 + 8;  // the same, of a diagonal block
constexpr int kFloatPitch = 16 + 4;  // the same in float32

// high + low is a float32 number to 16 bits.
template <int kSize>
struct Split {
  __nv_bfloat16 high[kSize], low[kSize];
};
struct Matrices {
  Split<kChunk * kPitch> minus_a;             // below the diagonal blocks
  Split<16 * kBlockPitch> inverse[4];         // T's diagonal blocks
  float minus_diagonal[4][16 * kFloatPitch];  // A's
};
struct PrepareShared {
  union {
    uint4 qk[2][kChunk * kDim / 8];  // k, q: rows of 16 words, word w of row r at w ^ (r % 8)
    Matrices m;
  };
  uint4 t[kChunk * kChunk / 8];  // t and p as in ChunkRecord, one behind the other
  uint4 p[kChunk * kChunk / 8];
  float sums[kMaxHeadsPerBlock][kChunk];  // G, times log2 e
  float beta[kMaxHeadsPerBlock][kChunk];
  int32_t sequence;
};
constexpr int kSharedBytes = sizeof(PrepareShared);
constexpr int kBlocks = 4;  // on a multiprocessor
static_assert(kBlocks * (kSharedBytes + 1024) <= 233472);

#ifdef PRISTINE_GDN_PREFILL

constexpr int kImageWords = 2 * kChunk * kChunk / 8;
constexpr float kLog2E = 1.44269504088896340736f;
// In float32 2^-180 is 0 beside anything; a sum of 64 keeps its digits.
constexpr float kSmallestLog2 = -180.f;

__device__ uint32_t SwizzledRow(const uint4* tile, int row, int word) {
  return SharedAddress(tile + row * (kDim / 8) + (word ^ (row & 7)));
}

__device__ void Multiply16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ float LowFloat(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float HighFloat(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
// Two float32 numbers, each as high + low.
__device__ void SplitPair(float x, float y, uint32_t& high, uint32_t& low) {
  high = Pack(x, y);
  low = Pack(x - LowFloat(high), y - HighFloat(high));
}
// Accumulators (16 x 16) as a left operand.
__device__ void SplitOperand(const float (&acc)[2][4], uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) SplitPair(acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1], high[i], low[i]);
}
// acc (16 x 16) += a b, with b^T at `high` and `low`; the small parts go into `rest`, for a shorter chain.
__device__ void MultiplySplit(float (&acc)[2][4], float (&rest)[2][4], const uint32_t (&a_high)[4],
                              const uint32_t (&a_low)[4], const __nv_bfloat16* high, const __nv_bfloat16* low,
                              int offset) {
  uint32_t b_high[4], b_low[4];
  LoadMatrices(b_high, SharedAddress(high + offset));
  LoadMatrices(b_low, SharedAddress(low + offset));
#pragma unroll
  for (int n = 0; n < 2; ++n) Multiply16(acc[n], a_high, b_high[2 * n], b_high[2 * n + 1]);
#pragma unroll
  for (int n = 0; n < 2; ++n) Multiply16(rest[n], a_low, b_high[2 * n], b_high[2 * n + 1]);
#pragma unroll
  for (int n = 0; n < 2; ++n) Multiply16(rest[n], a_high, b_low[2 * n], b_low[2 * n + 1]);
}
__device__ void AddRest(float (&acc)[2][4], const float (&rest)[2][4]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] += rest[i / 4][i % 4];
}

// This warp's diagonal block of T, for the other warps and, times beta, in the image.
__device__ void InvertDiagonal(PrepareShared& shared, const float* beta, int warp, int lane) {
  const float* const a = shared.m.minus_diagonal[warp];
  const int column = lane % 16;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float sum[2] = {i == column ? 1.f : 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < i; ++j) sum[j % 2] += a[i * kFloatPitch + j] * x[j];
    x[i] = sum[0] + sum[1];
  }
  const float scale = beta[warp * 16 + column];
  auto* const image = reinterpret_cast<__nv_bfloat16*>(shared.t);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const __nv_bfloat16 high = __float2bfloat16_rn(x[i]);
    if (lane < 16) {
      shared.m.inverse[warp].high[i * kBlockPitch + column] = high;
    } else {
      shared.m.inverse[warp].low[i * kBlockPitch + column] = __float2bfloat16_rn(x[i] - __bfloat162float(high));
    }
    if (i / 8 == lane / 16) {
      const int row = warp * 16 + i, word = warp * 2 + column / 8;
      image[row * kChunk + (word ^ (i & 7)) * 8 + column % 8] = __float2bfloat16_rn(x[i] * scale);
    }
  }
}

// Block column `j` of T below the diagonal, times beta, into the image.
__device__ void InvertColumn(PrepareShared& shared, const float* beta, int j, int lane) {
  const Matrices& m = shared.m;
  const int row = lane / 16 * 8 + lane % 8, word = lane / 8 % 2;  // of this lane's part of a 16 x 16 block
  const int block_offset = row * kBlockPitch + word * 8;
  uint32_t high[3][4], low[3][4];  // T_jj to T_2j, transposed
  LoadMatricesTransposed(high[0], SharedAddress(m.inverse[j].high + block_offset));
  LoadMatricesTransposed(low[0], SharedAddress(m.inverse[j].low + block_offset));
  const float scale[2] = {beta[j * 16 + lane / 4], beta[j * 16 + lane / 4 + 8]};
#pragma unroll
  for (int d = 1; d < 4; ++d) {
    const int i = j + d;
    if (i > 3) break;
    float n[2][4] = {}, n_rest[2][4] = {}, t[2][4] = {}, t_rest[2][4] = {};
#pragma unroll
    for (int e = 0; e < d; ++e) {
      MultiplySplit(n, n_rest, high[e], low[e], m.minus_a.high, m.minus_a.low,
                    (i * 16 + row) * kPitch + (j + e) * 16 + word * 8);
    }
    AddRest(n, n_rest);
    uint32_t n_high[4], n_low[4];
    SplitOperand(n, n_high, n_low);
    MultiplySplit(t, t_rest, n_high, n_low, m.inverse[i].high, m.inverse[i].low, block_offset);
    AddRest(t, t_rest);
    if (d < 3) SplitOperand(t, high[d], low[d]);
    const uint32_t to = SharedAddress(shared.t + (i * 16 + row) * 8 + ((j * 2 + word) ^ (row & 7)));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(Pack(t[0][0] * scale[0], t[0][1] * scale[0])), "r"(Pack(t[0][2] * scale[1], t[0][3] * scale[1])),
                 "r"(Pack(t[1][0] * scale[0], t[1][1] * scale[0])), "r"(Pack(t[1][2] * scale[1], t[1][3] * scale[1]))
                 : "memory");
  }
}

// Of one value head: G of the valid tokens, the last of them for those behind; beta 0 there.
__device__ void LoadGates(const PrefillParams& p, PrepareShared& shared, ChunkRecord& record, int64_t token, int valid,
                          int head, int place, int lane) {
  const auto load = [&](const float* from, int t) { return t < valid ? from[(token + t) * p.v_heads + head] : 0.f; };
  float step[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float value = load(p.g, 2 * lane + i) * kLog2E;
    step[i] = value < kSmallestLog2 ? kSmallestLog2 : value;  // NaN stays
    shared.beta[place][2 * lane + i] = load(p.beta, 2 * lane + i);
  }
  float sum = step[0] + step[1];
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float below = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += below;
  }
  const float last = __shfl_sync(0xffffffffu, sum, 31), before = sum - step[1];
  shared.sums[place][2 * lane] = before;
  shared.sums[place][2 * lane + 1] = sum;
  reinterpret_cast<float2*>(record.exp_g)[lane] = make_float2(exp2f(before), exp2f(sum));
  reinterpret_cast<float2*>(record.exp_rest)[lane] = make_float2(exp2f(last - before), exp2f(last - sum));
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
    if (place >= span.first_chunk && place < span.first_chunk + span.chunks) shared.sequence = i;
  }
  __syncthreads();
  if (shared.sequence < 0) return;
    // Above the diagonal blocks the images stay zero.
#pragma unroll
  for (int i = 0; i < kChunk * kChunk / 8 / kThreads; ++i) {
    shared.t[i * kThreads + tid] = shared.p[i * kThreads + tid] = make_uint4(0, 0, 0, 0);
  }
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
  __syncthreads();  // k and q make room for the matrices

  for (int h = 0; h < heads; ++h) {
    // Not known to be the same in each round: some fifty addresses would be kept in registers that there are not.
    asm volatile("" : "+r"(lane));
    const float* const sums = shared.sums[h];
    const float* const beta = shared.beta[h];
    const int group = lane / 4, pair = lane % 4 * 2;  // of the accumulators: row of eight, and column
    const float row_sum[2] = {sums[warp * 16 + group], sums[warp * 16 + group + 8]};
    const float row_beta[2] = {-beta[warp * 16 + group], -beta[warp * 16 + group + 8]};
    uint32_t* const p_row = reinterpret_cast<uint32_t*>(shared.p) + (warp * 16 + group) * 32 + lane % 4;
    const int a_row = (warp * 16 + group) * kPitch + pair;
    float* const diagonal_row = shared.m.minus_diagonal[warp] + group * kFloatPitch + pair;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (n / 2 > warp) break;
      const float2 column_sums = *reinterpret_cast<const float2*>(&sums[n * 8 + pair]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float decay[2] = {exp2f(row_sum[half] - column_sums.x), exp2f(row_sum[half] - column_sums.y)};
        if (n / 2 == warp) {  // above the diagonal it is a growth, up to infinity
          if (n % 2 * 8 + pair > half * 8 + group) decay[0] = 0;
          if (n % 2 * 8 + pair >= half * 8 + group) decay[1] = 0;
        }
        const float2 scores = __half22float2(qk[n][half]);
        p_row[half * 256 + (n ^ group) * 4] = Pack(p.scale * decay[0] * scores.x, p.scale * decay[1] * scores.y);
        const float x = row_beta[half] * decay[0] * kk[n][half * 2];
        const float y = row_beta[half] * decay[1] * kk[n][half * 2 + 1];
        if (n / 2 == warp) {
          *reinterpret_cast<float2*>(diagonal_row + half * 8 * kFloatPitch + n % 2 * 8) = make_float2(x, y);
        } else {
          uint32_t high, low;
          SplitPair(x, y, high, low);
          *reinterpret_cast<uint32_t*>(&shared.m.minus_a.high[a_row + half * 8 * kPitch + n * 8]) = high;
          *reinterpret_cast<uint32_t*>(&shared.m.minus_a.low[a_row + half * 8 * kPitch + n * 8]) = low;
        }
      }
    }
    __syncwarp();
    InvertDiagonal(shared, beta, warp, lane);
    __syncthreads();
    InvertColumn(shared, beta, warp, lane);
    __syncthreads();
    const uint4* const images = shared.t;
    uint4* const to = reinterpret_cast<uint4*>(records[h].t);
#pragma unroll
    for (int i = 0; i < kImageWords / kThreads; ++i) to[i * kThreads + tid] = images[i * kThreads + tid];
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
