// Two kernels. Rows whose elements follow each other, copied as they are, go in 16-byte words, one row per block. All
// else goes through tiles of 64 tokens x 128 channels in shared memory: read along whichever axis is next to each
// other in memory, written along the channels, so that both sides touch whole sectors. A (1, tokens) input read along
// the channels would touch a sector of 32 bytes for each element of 2.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/gates_device.cuh"
#include "attention/gdn/kernels/qkv_split.h"

namespace pristine::attention::gdn {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileTokens = 64;
constexpr int kTileChannels = 128;

__device__ float AsFloat(float value) { return value; }
__device__ float AsFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void Assign(float& to, float value) { to = value; }
__device__ void Assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

template <class Word>
__global__ void __launch_bounds__(kThreads)
    QkvSplitRowsKernel(const __grid_constant__ QkvSplitParams p, int32_t element_bytes) {
  constexpr int kBatch = 4;  // loads in flight per thread
  const int64_t token = blockIdx.x;
  const auto* from =
      reinterpret_cast<const Word*>(static_cast<const char*>(p.mixed) + token * p.stride_t * element_bytes);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int words = p.dim[i] * element_bytes / static_cast<int>(sizeof(Word));
    Word* const to = static_cast<Word*>(p.out[i]) + token * words;
    for (int first = threadIdx.x; first < words; first += kBatch * kThreads) {
      Word values[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * kThreads < words) values[b] = from[first + b * kThreads];
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * kThreads < words) to[first + b * kThreads] = values[b];
      }
    }
    from += words;
  }
}

__device__ int TilesOf(int32_t dim) { return (dim + kTileChannels - 1) / kTileChannels; }

template <class T>
__global__ void __launch_bounds__(kThreads) QkvSplitTilesKernel(const __grid_constant__ QkvSplitParams p) {
  // A row of 128 and a pad: threads next to each other in tokens then meet different banks.
  constexpr int kPitch = kTileChannels + 4 / static_cast<int>(sizeof(T));
  __shared__ T tile[kTileTokens * kPitch];
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTileTokens;
  const int tokens = static_cast<int>(min(int64_t{kTileTokens}, p.tokens - first_token));

  int segment = 0, place = blockIdx.y;
  int64_t segment_start = 0;
  while (segment < 3 && place >= TilesOf(p.dim[segment])) {
    place -= TilesOf(p.dim[segment]);
    segment_start += p.dim[segment++];
  }
  if (segment == 3) {  // the blocks behind all tiles
    for (int i = threadIdx.x; i < tokens * p.gates.v_heads; i += kThreads) {
      const int64_t at = first_token * p.gates.v_heads + i;
      const Gate gate = GateOf(p.gates, first_token + i / p.gates.v_heads, i % p.gates.v_heads);
      p.gates.g[at] = gate.g;
      p.gates.beta[at] = gate.beta;
    }
    return;
  }
  const int first_channel = place * kTileChannels;
  const int channels = min(kTileChannels, p.dim[segment] - first_channel);
  const T* const from =
      static_cast<const T*>(p.mixed) + first_token * p.stride_t + (segment_start + first_channel) * p.stride_d;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (p.stride_t < p.stride_d) {  // neighbours in memory are tokens
    constexpr int kBatch = 8;     // channels in flight per warp
    for (int c0 = warp; c0 < channels; c0 += kBatch * kWarps) {
      T values[kBatch][2];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int c = c0 + b * kWarps;
        if (c >= channels) continue;
        if (lane < tokens) values[b][0] = from[c * p.stride_d + lane * p.stride_t];
        if (lane + 32 < tokens) values[b][1] = from[c * p.stride_d + (lane + 32) * p.stride_t];
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int c = c0 + b * kWarps;
        if (c >= channels) continue;
        tile[lane * kPitch + c] = values[b][0];
        tile[(lane + 32) * kPitch + c] = values[b][1];
      }
    }
  } else {
    constexpr int kBatch = 4;  // tokens in flight per warp
    for (int t0 = warp; t0 < tokens; t0 += kBatch * kWarps) {
      T values[kBatch][4];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int t = t0 + b * kWarps;
        if (t >= tokens) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (lane + 32 * j < channels) values[b][j] = from[t * p.stride_t + (lane + 32 * j) * p.stride_d];
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int t = t0 + b * kWarps;
        if (t >= tokens) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) tile[t * kPitch + lane + 32 * j] = values[b][j];
      }
    }
  }
  __syncthreads();

  // A warp writes a token's channels, each thread four that follow each other.
  const bool normalise = segment < 2 && p.norm_head_dim > 0;
  const int dim = p.dim[segment];
  T* const to = static_cast<T*>(p.out[segment]) + first_token * dim + first_channel;
  const bool wide = (reinterpret_cast<uintptr_t>(to) % (4 * sizeof(T))) == 0 && dim % 4 == 0 && channels % 4 == 0;
  struct alignas(4 * sizeof(T)) Four {
    T values[4];
  };
  for (int t = warp; t < tokens; t += kWarps) {
    Four four;
#pragma unroll
    for (int j = 0; j < 4; ++j) four.values[j] = tile[t * kPitch + lane * 4 + j];
    if (normalise) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += AsFloat(four.values[j]) * AsFloat(four.values[j]);
      for (int step = 1; step < p.norm_head_dim / 4; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      const float scale = 1.f / sqrtf(sum + kNormEpsilon);
#pragma unroll
      for (int j = 0; j < 4; ++j) Assign(four.values[j], AsFloat(four.values[j]) * scale);
    }
    T* const row = to + static_cast<int64_t>(t) * dim + lane * 4;
    if (wide) {
      if (lane * 4 < channels) *reinterpret_cast<Four*>(row) = four;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (lane * 4 + j < channels) row[j] = four.values[j];
      }
    }
  }
}

// Whether rows, segments and pointers are all multiples of `bytes`.
bool Multiples(const QkvSplitParams& p, int32_t element_bytes, uintptr_t bytes) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.mixed) | static_cast<uintptr_t>(p.stride_t * element_bytes);
  for (int i = 0; i < 3; ++i) {
    bits |= reinterpret_cast<uintptr_t>(p.out[i]) | static_cast<uintptr_t>(p.dim[i] * element_bytes);
  }
  return bits % bytes == 0;
}

}  // namespace

int QkvSplitCuda(CUstream_st* stream, const QkvSplitParams& params) {
  const int32_t element_bytes = static_cast<int32_t>(SizeOf(params.dtype));
  const bool plain = params.stride_d == 1 && params.norm_head_dim == 0 && params.gates.g == nullptr;
  if (plain && Multiples(params, element_bytes, 16)) {
    QkvSplitRowsKernel<uint4><<<static_cast<unsigned>(params.tokens), kThreads, 0, stream>>>(params, element_bytes);
    return cudaGetLastError();
  }
  unsigned tiles = params.gates.g == nullptr ? 0 : 1;
  for (const int32_t dim : params.dim) tiles += static_cast<unsigned>((dim + kTileChannels - 1) / kTileChannels);
  const dim3 grid(static_cast<unsigned>((params.tokens + kTileTokens - 1) / kTileTokens), tiles);
  if (params.dtype == DType::kBFloat16) {
    QkvSplitTilesKernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(params);
  } else {
    QkvSplitTilesKernel<float><<<grid, kThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace pristine::attention::gdn
