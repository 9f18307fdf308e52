// What a chunk needs whatever the state is, from its K K^T and Q K^T, by four warps of 16 rows each: P, and T by blocks
// of 16 rows. Each warp inverts one diagonal block by substitution, then takes one block column, from the diagonal
// down:
//   T_ij = T_ii N_ij,   N_ij = -sum over k from j to i - 1 of A_ik T_kj
// Products take half precision: no entry of T exceeds 1, since with keys of length 1 and beta at most 1 each token's
// step shrinks the state. All of a column is computed transposed: one product's accumulators are the next one's left
// operand.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_INVERSE_DEVICE_CUH_
#define PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_INVERSE_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/prefill.h"
#include "attention/gdn/kernels/prefill_device.cuh"

namespace pristine::attention::gdn {

// Of the rows of a 16 x 16 block in different banks: half precision, float32.
inline constexpr int kBlockPitch = 16 + 8, kFloatPitch = 16 + 4;

struct alignas(16) Matrices {
  __half minus_a[6][16 * kBlockPitch];        // the blocks below the diagonal, row after row
  __half inverse[4][16 * kBlockPitch];        // T's diagonal blocks
  float minus_diagonal[4][16 * kFloatPitch];  // A's
};

PRISTINE_HOST_DEVICE constexpr int BlockBelow(int i, int j) { return i * (i - 1) / 2 + j; }

#ifdef PRISTINE_GDN_PREFILL

inline constexpr float kLog2E = 1.44269504088896340736f;
// In float32 2^-180 is 0 beside anything; a sum of 64 keeps its digits.
inline constexpr float kSmallestLog2 = -180.f;

__device__ inline float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ inline uint32_t PackHalf(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// acc (16 x 16) += a b, with b^T at `b`.
__device__ inline void MultiplyHalf(float (&acc)[2][4], const uint32_t (&a)[4], const __half* b) {
  uint32_t columns[4];
  LoadMatrices(columns, SharedAddress(b));
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(columns[2 * n]), "r"(columns[2 * n + 1]));
  }
}
// Accumulators (16 x 16) as a left operand.
__device__ inline void PackOperand(const float (&acc)[2][4], uint32_t (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = PackHalf(acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]);
}

// G of 64 tokens, times log2 e, to `sums`, from each lane's two steps; returns this lane's two of them and the last.
__device__ inline float3 SumGates(float2 g, float* sums, int lane) {
  const float x = g.x * kLog2E, y = g.y * kLog2E;
  const float step[2] = {x < kSmallestLog2 ? kSmallestLog2 : x, y < kSmallestLog2 ? kSmallestLog2 : y};  // NaN stays
  float sum = step[0] + step[1];
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float below = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += below;
  }
  const float before = sum - step[1];
  reinterpret_cast<float2*>(sums)[lane] = make_float2(before, sum);
  return make_float3(before, sum, __shfl_sync(0xffffffffu, sum, 31));
}

// This warp's 16 rows of P into the image `p_image`, and of -A, from the sums of its gates and its rows of K K^T and
// Q K^T, which kk(n, half) and qk(n, half) return as the pairs that the tensor cores' accumulators are.
template <int warp, class KK, class QK>
__device__ __forceinline__ void FillScoresOf(Matrices& m, uint16_t* p_image, const float* sums, const float* beta,
                                             float scale, int lane, const KK& kk, const QK& qk) {
  const int group = lane / 4, pair = lane % 4 * 2;  // of the accumulators: row of eight, and column
  const float row_sum[2] = {sums[warp * 16 + group], sums[warp * 16 + group + 8]};
  const float row_beta[2] = {-beta[warp * 16 + group], -beta[warp * 16 + group + 8]};
  uint32_t* const p_row = reinterpret_cast<uint32_t*>(p_image) + (warp * 16 + group) * 32 + lane % 4;
  __half* const a_row = m.minus_a[BlockBelow(warp, 0)] + group * kBlockPitch + pair;
  float* const diagonal_row = m.minus_diagonal[warp] + group * kFloatPitch + pair;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    if (n / 2 > warp) continue;
    const float2 column_sums = *reinterpret_cast<const float2*>(&sums[n * 8 + pair]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float decay[2] = {Exp2(row_sum[half] - column_sums.x), Exp2(row_sum[half] - column_sums.y)};
      if (n / 2 == warp) {  // above the diagonal it is a growth, up to infinity
        if (n % 2 * 8 + pair > half * 8 + group) decay[0] = 0;
        if (n % 2 * 8 + pair >= half * 8 + group) decay[1] = 0;
      }
      const float2 scores = qk(n, half), keys = kk(n, half);
      p_row[half * 256 + (n ^ group) * 4] = Pack(scale * decay[0] * scores.x, scale * decay[1] * scores.y);
      const float x = row_beta[half] * decay[0] * keys.x, y = row_beta[half] * decay[1] * keys.y;
      if (n / 2 == warp) {
        *reinterpret_cast<float2*>(diagonal_row + half * 8 * kFloatPitch + n % 2 * 8) = make_float2(x, y);
      } else {
        *reinterpret_cast<uint32_t*>(a_row + n / 2 * 16 * kBlockPitch + half * 8 * kBlockPitch + n % 2 * 8) =
            PackHalf(x, y);
      }
    }
  }
}

// One code for each warp: without branches, many elements are on their way at a time.
template <class KK, class QK>
__device__ __forceinline__ void FillScores(Matrices& m, uint16_t* p_image, const float* sums, const float* beta,
                                           float scale, int warp, int lane, const KK& kk, const QK& qk) {
  switch (warp) {
    case 0:
      return FillScoresOf<0>(m, p_image, sums, beta, scale, lane, kk, qk);
    case 1:
      return FillScoresOf<1>(m, p_image, sums, beta, scale, lane, kk, qk);
    case 2:
      return FillScoresOf<2>(m, p_image, sums, beta, scale, lane, kk, qk);
    default:
      return FillScoresOf<3>(m, p_image, sums, beta, scale, lane, kk, qk);
  }
}

// This warp's diagonal block of T, for the other warps.
__device__ inline void InvertDiagonal(Matrices& m, int warp, int lane) {
  const float* const a = m.minus_diagonal[warp];
  const int column = lane % 16;  // both halves of the warp compute all of it
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float sum[2] = {i == column ? 1.f : 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < i; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(a + i * kFloatPitch + j);
      const float row[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        if (j + l < i) sum[l % 2] += row[l] * x[j + l];
      }
    }
    x[i] = sum[0] + sum[1];
  }
  __half* const to = m.inverse[warp] + lane / 16 * 8 * kBlockPitch + column;
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i * kBlockPitch] = __float2half_rn(lane < 16 ? x[i] : x[i + 8]);
}

// Four 8 x 8 matrices of accumulators, transposed, to `to`.
__device__ inline void StoreMatricesTransposed(const uint16_t* to, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(SharedAddress(to)),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

// A block of T, transposed, two numbers to each of four, times `scale`, to the images of its high and low parts.
__device__ inline void StoreBlock(uint16_t* image, uint16_t* low_image, int at, const float2 (&block)[4],
                                  const float (&scale)[2]) {
  uint32_t high[4], low[4];
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    const float x = block[l].x * scale[l % 2], y = block[l].y * scale[l % 2];
    high[l] = Pack(x, y);
    low[l] = Pack(x - __uint_as_float(high[l] << 16), y - __uint_as_float(high[l] & 0xffff0000u));
  }
  StoreMatricesTransposed(image + at, high);
  StoreMatricesTransposed(low_image + at, low);
}

// Block column `j` of T, times beta, into the images.
__device__ inline void InvertColumn(const Matrices& m, uint16_t* image, uint16_t* low_image, const float* beta, int j,
                                    int lane) {
  const int row = lane / 16 * 8 + lane % 8, word = lane / 8 % 2;  // of this lane's part of a 16 x 16 block
  const int block_offset = row * kBlockPitch + word * 8, word_offset = ((j * 2 + word) ^ (row & 7)) * 8;
  uint32_t column[3][4];  // T_jj to T_2j, transposed
  LoadMatricesTransposed(column[0], SharedAddress(m.inverse[j] + block_offset));
  const float scale[2] = {beta[j * 16 + lane / 4], beta[j * 16 + lane / 4 + 8]};
  {
    float2 block[4];
#pragma unroll
    for (int l = 0; l < 4; ++l) block[l] = __half22float2(reinterpret_cast<const __half2&>(column[0][l]));
    StoreBlock(image, low_image, (j * 16 + row) * kChunk + word_offset, block, scale);
  }
#pragma unroll
  for (int d = 1; d < 4; ++d) {
    const int i = j + d;
    if (i > 3) break;
    float n[2][4] = {}, t[2][4] = {};
#pragma unroll
    for (int e = 0; e < d; ++e) {
      MultiplyHalf(n, column[e], m.minus_a[BlockBelow(i, j + e)] + block_offset);
    }
    uint32_t left[4];
    PackOperand(n, left);
    MultiplyHalf(t, left, m.inverse[i] + block_offset);
    if (d < 3) PackOperand(t, column[d]);
    const float2 block[4] = {make_float2(t[0][0], t[0][1]), make_float2(t[0][2], t[0][3]),
                             make_float2(t[1][0], t[1][1]), make_float2(t[1][2], t[1][3])};
    StoreBlock(image, low_image, (i * 16 + row) * kChunk + word_offset, block, scale);
  }
}

#endif  // PRISTINE_GDN_PREFILL

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_INVERSE_DEVICE_CUH_
