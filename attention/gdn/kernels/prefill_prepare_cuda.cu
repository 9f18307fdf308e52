// The first prefill kernel: for each chunk and value head, what does not depend on the state (ChunkRecord).
//
// One block per chunk and q/k head, or value head: the products K K^T and Q K^T on the tensor cores, once for all value
// heads of the block; then per value head the gates, P, and T by blocks of 16 rows: each warp inverts one diagonal
// block by substitution, and two rounds of products put them together,
//   (A 0; B C)^-1 = (A^-1 0; -C^-1 B A^-1  C^-1).
// T is a difference of large numbers where keys repeat: its products take each float32 factor as two of tf32.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/prefill.h"
#include "attention/gdn/kernels/prefill_device.cuh"

namespace pristine::attention::gdn {
namespace {

constexpr int kThreads = 128;
constexpr int kPitch = kChunk + 4;  // floats: rows in different banks
constexpr float kLog2E = 1.44269504088896340736f;
// In float32 2^-180 is 0 beside anything; a sum of 64 keeps its digits.
constexpr float kSmallestLog2 = -180.f;

struct Matrices {
  float a[kChunk * kPitch];  // strictly lower
  float t[kChunk * kPitch];
};
struct PrepareShared {
  union {
    uint4 qk[2][kChunk * kDim / 8];  // k, q: rows of 16 words, word w of row r at w ^ (r % 8)
    Matrices m;
  };
  uint4 p[kChunk * kChunk / 8];           // as in ChunkRecord
  float sums[kMaxHeadsPerBlock][kChunk];  // G, times log2 e
  float beta[kMaxHeadsPerBlock][kChunk];
  int32_t sequence;
};
constexpr int kSharedBytes = sizeof(PrepareShared);
static_assert(4 * (kSharedBytes + 1024) <= 233472, "four blocks on a multiprocessor");

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

// x = high + low, both tf32.
__device__ void SplitTf32(float x, uint32_t& high, uint32_t& low) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(x));
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(x - __uint_as_float(high)));
}
__device__ void Multiply8(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// acc (16 x 8) += a (16 x steps * 8) b (steps * 8 x 8), both with rows of kPitch floats.
template <int kSteps>
__device__ void MultiplyTile(float (&acc)[4], const float* a, const float* b, int lane) {
  const int row = lane / 4, column = lane % 4;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      SplitTf32(a[(row + i % 2 * 8) * kPitch + s * 8 + column + i / 2 * 4], a_high[i], a_low[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) SplitTf32(b[(s * 8 + column + i * 4) * kPitch + row], b_high[i], b_low[i]);
    Multiply8(acc, a_high, b_low);
    Multiply8(acc, a_low, b_high);
    Multiply8(acc, a_high, b_high);
  }
}
__device__ void StoreTile(float* to, const float (&acc)[4], float sign, int lane) {
  float* const at = to + lane / 4 * kPitch + lane % 4 * 2;
  *reinterpret_cast<float2*>(at) = make_float2(sign * acc[0], sign * acc[1]);
  *reinterpret_cast<float2*>(at + 8 * kPitch) = make_float2(sign * acc[2], sign * acc[3]);
}

// t = (I + a)^-1, lower blocks of 16 alone; all warps of the block. Begins with a barrier's work done, ends with one.
__device__ void Invert(Matrices& m, int warp, int lane) {
  {
    const float* const a = m.a + warp * 16 * (kPitch + 1);
    const int column = lane % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum[2] = {i == column ? 1.f : 0.f, 0.f};
#pragma unroll
      for (int j = 0; j < i; ++j) sum[j % 2] -= a[i * kPitch + j] * x[j];
      x[i] = sum[0] + sum[1];
    }
    float* const t = m.t + warp * 16 * (kPitch + 1) + column;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i / 8 == lane / 16) t[i * kPitch] = x[i];
    }
  }
  __syncthreads();
  {  // Blocks (1, 0) and (3, 2); each warp takes eight of the columns.
    const int first = warp / 2 * 32, columns = first + warp % 2 * 8;
    const float* const a = m.a + (first + 16) * kPitch + first;
    const float* const t = m.t + (first + 16) * (kPitch + 1);
    float* const to = m.t + (first + 16) * kPitch + columns;
    float product[4] = {}, result[4] = {};
    MultiplyTile<2>(product, a, m.t + first * kPitch + columns, lane);
    StoreTile(to, product, 1.f, lane);
    __syncwarp();
    MultiplyTile<2>(result, t, to, lane);
    __syncwarp();
    StoreTile(to, result, -1.f, lane);
  }
  __syncthreads();
  {  // Rows 32 to 63 of columns 0 to 31. Blocks above the diagonal are zeros that nobody wrote.
    const int columns = warp * 8;
    float* const to = m.t + 32 * kPitch + columns;
    float product[2][4] = {}, result[2][4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* const a = m.a + (32 + i * 16) * kPitch;
      if (warp < 2) MultiplyTile<2>(product[i], a, m.t + columns, lane);
      MultiplyTile<2>(product[i], a + 16, m.t + 16 * kPitch + columns, lane);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) StoreTile(to + i * 16 * kPitch, product[i], 1.f, lane);
    __syncwarp();
    const float* const t = m.t + 32 * (kPitch + 1);
    MultiplyTile<2>(result[0], t, to, lane);
    MultiplyTile<4>(result[1], t + 16 * kPitch, to, lane);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) StoreTile(to + i * 16 * kPitch, result[i], -1.f, lane);
  }
  __syncthreads();
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

__global__ void __launch_bounds__(kThreads, 4) GdnPrefillPrepareKernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(128) unsigned char memory[];
  PrepareShared& shared = *reinterpret_cast<PrepareShared*>(memory);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
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
  const PrefillSpan span = SpanOf(p, shared.sequence);
  const int32_t first = (place - span.first_chunk) * kChunk;
  const int valid = min(span.length - first, kChunk);
  const int64_t token = span.begin + first;

#pragma unroll
  for (int i = 0; i < kChunk * kDim / 8 / kThreads; ++i) {
    const int row = i * 8 + tid / 16, word = tid % 16;
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

  // This warp's 16 rows of K K^T and Q K^T, up to the diagonal.
  float kk[8][4] = {}, qk[8][4] = {};
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
      Multiply16(qk[2 * i], q_rows, columns[0], columns[1]);
      Multiply16(qk[2 * i + 1], q_rows, columns[2], columns[3]);
    }
  }
  __syncthreads();  // k and q make room for the matrices

  for (int h = 0; h < heads; ++h) {
    const float* const sums = shared.sums[h];
    const float* const beta = shared.beta[h];
    uint32_t* const p_words = reinterpret_cast<uint32_t*>(shared.p);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + half * 8 + lane / 4;
      const float row_sum = sums[row], row_beta = beta[row];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int column = n * 8 + lane % 4 * 2;
        float a[2] = {}, scores[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (column + i > row) continue;  // its decay would be a growth, up to infinity
          const float decay = exp2f(row_sum - sums[column + i]);
          scores[i] = p.scale * decay * qk[n][half * 2 + i];
          if (column + i < row) a[i] = row_beta * decay * kk[n][half * 2 + i];
        }
        p_words[row * 32 + (n ^ (row & 7)) * 4 + lane % 4] = Pack(scores[0], scores[1]);
        *reinterpret_cast<float2*>(&shared.m.a[row * kPitch + column]) = make_float2(a[0], a[1]);
      }
    }
    __syncthreads();
    uint4* const p_out = reinterpret_cast<uint4*>(records[h].p);
#pragma unroll
    for (int i = 0; i < kChunk * kChunk / 8 / kThreads; ++i) p_out[i * kThreads + tid] = shared.p[i * kThreads + tid];
    Invert(shared.m, warp, lane);
    uint4* const t_out = reinterpret_cast<uint4*>(records[h].t);
#pragma unroll
    for (int i = 0; i < kChunk * kChunk / 8 / kThreads; ++i) {
      const int row = i * 16 + tid / 8, word = tid % 8;
      uint4 values = make_uint4(0, 0, 0, 0);
      if (word / 2 <= row / 16) {
        const float* const t = &shared.m.t[row * kPitch + word * 8];
        const float* const b = &beta[word * 8];
        values = make_uint4(Pack(t[0] * b[0], t[1] * b[1]), Pack(t[2] * b[2], t[3] * b[3]),
                            Pack(t[4] * b[4], t[5] * b[5]), Pack(t[6] * b[6], t[7] * b[7]));
      }
      t_out[row * 8 + (word ^ (row & 7))] = values;
    }
    __syncthreads();
  }
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
