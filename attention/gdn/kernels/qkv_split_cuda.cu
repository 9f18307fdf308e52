// Two kernels. Rows whose elements follow each other, copied as they are, go in 16-byte words. All else goes in tiles
// of 64 tokens x 128 channels; where neighbours in memory are tokens, through shared memory: read along the tokens,
// written along the channels, so that both sides touch whole sectors. A (1, tokens) input read along the channels would
// touch a sector of 32 bytes for each element of 2.
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

constexpr int kRowsPerBlock = 2;

template <class Word>
__global__ void __launch_bounds__(kThreads)
    QkvSplitRowsKernel(const __grid_constant__ QkvSplitParams p, int32_t element_bytes) {
  constexpr int kBatch = 8;  // loads in flight per thread
  const auto words_of = [&](int32_t dim) { return dim * element_bytes / static_cast<int>(sizeof(Word)); };
  const int q_words = words_of(p.dim[0]), k_words = words_of(p.dim[1]), v_words = words_of(p.dim[2]);
  const int row_words = q_words + k_words + v_words;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock;
  const int rows = static_cast<int>(min(int64_t{kRowsPerBlock}, p.tokens - first_token));
  const char* const from = static_cast<const char*>(p.mixed) + first_token * p.stride_t * element_bytes;
  for (int first = threadIdx.x; first < rows * row_words; first += kBatch * kThreads) {
    Word values[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kThreads;
      if (i >= rows * row_words) continue;
      const Word* const row = reinterpret_cast<const Word*>(from + i / row_words * p.stride_t * element_bytes);
      values[b] = row[i % row_words];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kThreads;
      if (i >= rows * row_words) continue;
      const int64_t token = first_token + i / row_words;
      const int w = i % row_words;
      if (w < q_words) {
        static_cast<Word*>(p.out[0])[token * q_words + w] = values[b];
      } else if (w < q_words + k_words) {
        static_cast<Word*>(p.out[1])[token * k_words + w - q_words] = values[b];
      } else {
        static_cast<Word*>(p.out[2])[token * v_words + w - q_words - k_words] = values[b];
      }
    }
  }
}

__device__ int TilesOf(int32_t dim) { return (dim + kTileChannels - 1) / kTileChannels; }

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

// One block's part of the work.
template <class T>
struct Tile {
  const T* from;
  T* to;
  int64_t stride_t, stride_d;  // of `from`
  int dim;                     // stride of `to`
  int tokens, channels;
};

// Odd, so that the threads of a warp, one or two tokens apart, meet different banks.
constexpr int kPitch = kTileChannels + 1;

// Fills shared[token][channel] from memory where a channel's tokens follow each other. kFull: the tile is.
template <bool kFull, class T>
__device__ void LoadTransposed(const Tile<T>& tile, T* shared) {
  constexpr int kPerWarp = kTileChannels / kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if constexpr (kFull && sizeof(T) == 2) {
    // Words of two tokens. With an odd number of tokens every other channel starts between two words: its words start
    // one token early, thread 0 takes the last token instead, and the first token of each channel comes by itself. No
    // branch between the loads: they would wait for each other.
    const auto* const from = reinterpret_cast<const unsigned short*>(tile.from);
    auto* const to = reinterpret_cast<unsigned short*>(shared);
    const auto late = [&](int b) {
      return static_cast<int>(reinterpret_cast<uintptr_t>(from + (warp + b * kWarps) * tile.stride_d) / 2 % 2);
    };
    ushort2 values[kPerWarp];
#pragma unroll
    for (int b = 0; b < kPerWarp; ++b) {
      const int token = late(b) == 0 ? 2 * lane : lane == 0 ? kTileTokens - 1 : 2 * lane - 1;
      values[b] = *reinterpret_cast<const ushort2*>(from + (warp + b * kWarps) * tile.stride_d + token);
    }
    const int own = warp + lane % kPerWarp * kWarps;
    const unsigned short first = from[own * tile.stride_d];
#pragma unroll
    for (int b = 0; b < kPerWarp; ++b) {
      const int c = warp + b * kWarps;
      if (late(b) == 0) {
        to[2 * lane * kPitch + c] = values[b].x;
        to[(2 * lane + 1) * kPitch + c] = values[b].y;
      } else {
        to[(lane == 0 ? kTileTokens - 1 : 2 * lane - 1) * kPitch + c] = values[b].x;
        if (lane != 0) to[2 * lane * kPitch + c] = values[b].y;
      }
    }
    __syncwarp();
    if (lane < kPerWarp) to[own] = first;
  } else {
    for (int c = warp; c < tile.channels; c += kWarps) {
      for (int t = lane; t < tile.tokens; t += 32) shared[t * kPitch + c] = tile.from[c * tile.stride_d + t];
    }
  }
}

template <class T>
__device__ void Normalise(Four<T>& four, int head_dim) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) sum += AsFloat(four.values[j]) * AsFloat(four.values[j]);
  for (int step = 1; step < head_dim / 4; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  const float scale = 1.f / sqrtf(sum + kNormEpsilon);
#pragma unroll
  for (int j = 0; j < 4; ++j) Assign(four.values[j], AsFloat(four.values[j]) * scale);
}

// A warp moves a token's channels, each thread four that follow each other, and normalises heads of `norm` where that
// is not 0. From `shared` if that is not null. kFull: the tile is, and both sides take four elements in one word.
template <bool kFull, class T>
__device__ void Move(const Tile<T>& tile, const T* shared, int norm) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if constexpr (kFull) {
    constexpr int kBatch = kTileTokens / kWarps;
    Four<T> fours[kBatch];
    if (shared == nullptr) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        fours[b] = *reinterpret_cast<const Four<T>*>(tile.from + (warp + b * kWarps) * tile.stride_t + lane * 4);
      }
    } else {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int j = 0; j < 4; ++j) fours[b].values[j] = shared[(warp + b * kWarps) * kPitch + lane * 4 + j];
      }
    }
    if (norm != 0) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) Normalise(fours[b], norm);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      *reinterpret_cast<Four<T>*>(tile.to + static_cast<int64_t>(warp + b * kWarps) * tile.dim + lane * 4) = fours[b];
    }
  } else {
    for (int t = warp; t < tile.tokens; t += kWarps) {
      Four<T> four = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = lane * 4 + j;
        if (c >= tile.channels) continue;
        four.values[j] = shared != nullptr ? shared[t * kPitch + c] : tile.from[t * tile.stride_t + c * tile.stride_d];
      }
      if (norm != 0) Normalise(four, norm);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (lane * 4 + j < tile.channels) tile.to[static_cast<int64_t>(t) * tile.dim + lane * 4 + j] = four.values[j];
      }
    }
  }
}

template <class T>
__device__ bool TakesFours(const T* at, int64_t stride) {
  return reinterpret_cast<uintptr_t>(at) % sizeof(Four<T>) == 0 && stride % 4 == 0;
}

template <class T, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 4) QkvSplitTilesKernel(const __grid_constant__ QkvSplitParams p) {
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTileTokens;
  int segment = 0, place = blockIdx.y;
  int64_t segment_start = 0;
  while (segment < 3 && place >= TilesOf(p.dim[segment])) {
    place -= TilesOf(p.dim[segment]);
    segment_start += p.dim[segment++];
  }
  const int tokens = static_cast<int>(min(int64_t{kTileTokens}, p.tokens - first_token));
  if (segment == 3) {  // the blocks behind all tiles
    for (int i = threadIdx.x; i < tokens * p.gates.v_heads; i += kThreads) {
      const int64_t at = first_token * p.gates.v_heads + i;
      const Gate gate = GateOf(p.gates, first_token + i / p.gates.v_heads, i % p.gates.v_heads);
      p.gates.g[at] = gate.g;
      p.gates.beta[at] = gate.beta;
    }
    return;
  }
  Tile<T> tile;
  const int first_channel = place * kTileChannels;
  tile.dim = p.dim[segment];
  tile.tokens = tokens;
  tile.channels = min(kTileChannels, tile.dim - first_channel);
  tile.stride_t = p.stride_t;
  tile.stride_d = p.stride_d;
  tile.from = static_cast<const T*>(p.mixed) + first_token * p.stride_t + (segment_start + first_channel) * p.stride_d;
  tile.to = static_cast<T*>(p.out[segment]) + first_token * tile.dim + first_channel;
  const int norm = segment < 2 ? p.norm_head_dim : 0;
  const bool full = tokens == kTileTokens && tile.channels == kTileChannels && TakesFours(tile.to, tile.dim);
  if constexpr (kTransposed) {
    // The word of the last token of a late channel holds the token behind it too.
    const bool never_late = reinterpret_cast<uintptr_t>(p.mixed) % 4 == 0 && p.stride_d % 2 == 0;
    const bool behind = p.tokens > first_token + kTileTokens || never_late;
    __shared__ T shared[kTileTokens * kPitch];
    if (full && behind) {
      LoadTransposed<true>(tile, shared);
      __syncthreads();
      Move<true>(tile, shared, norm);
    } else {
      LoadTransposed<false>(tile, shared);
      __syncthreads();
      Move<false>(tile, shared, norm);
    }
  } else if (full && p.stride_d == 1 && TakesFours(tile.from, tile.stride_t)) {
    Move<true>(tile, static_cast<const T*>(nullptr), norm);
  } else {
    Move<false>(tile, static_cast<const T*>(nullptr), norm);
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
    const int64_t blocks = (params.tokens + kRowsPerBlock - 1) / kRowsPerBlock;
    QkvSplitRowsKernel<uint4><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params, element_bytes);
    return cudaGetLastError();
  }
  unsigned tiles = params.gates.g == nullptr ? 0 : 1;
  for (const int32_t dim : params.dim) tiles += static_cast<unsigned>((dim + kTileChannels - 1) / kTileChannels);
  const dim3 grid(static_cast<unsigned>((params.tokens + kTileTokens - 1) / kTileTokens), tiles);
  const bool transposed = params.stride_t == 1 && params.stride_d != 1;
  const auto launch = [&](auto* kernel) {
    kernel<<<grid, kThreads, 0, stream>>>(params);
    return static_cast<int>(cudaGetLastError());
  };
  if (params.dtype == DType::kBFloat16) {
    return transposed ? launch(QkvSplitTilesKernel<__nv_bfloat16, true>)
                      : launch(QkvSplitTilesKernel<__nv_bfloat16, false>);
  }
  return transposed ? launch(QkvSplitTilesKernel<float, true>) : launch(QkvSplitTilesKernel<float, false>);
}

}  // namespace pristine::attention::gdn
