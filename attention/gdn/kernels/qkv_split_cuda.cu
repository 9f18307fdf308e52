// Two kernels. Where neighbours in memory are tokens, a thread loads the same eight tokens of eight channels, 16 bytes
// each, at whatever address a channel starts (with an odd number of tokens, at every one), and transposes in registers;
// through shared memory threads then get rows of tokens, so that both sides touch whole sectors. (Rows of
// inputs through shared memory, by asynchronous copies, measured 15 % slower.) All else goes as it lies.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/channels_device.cuh"
#include "attention/gdn/kernels/gates_device.cuh"
#include "attention/gdn/kernels/qkv_split.h"
#include "attention/kernels/dependent_launch.cuh"

namespace pristine::attention::gdn {
namespace {

constexpr int kPer = 8;  // channels of a thread

template <class T>
using Eight = Pack<T, kPer>;

// The blocks behind all tiles of channels.
__device__ void StoreGates(const GatesParams& gates, int64_t first_token, int tokens) {
  for (int i = threadIdx.x; i < tokens * gates.v_heads; i += static_cast<int>(blockDim.x)) {
    const int64_t at = first_token * gates.v_heads + i;
    const Gate gate = GateOf(gates, first_token + i / gates.v_heads, i % gates.v_heads);
    gates.g[at] = gate.g;
    gates.beta[at] = gate.beta;
  }
}

constexpr int kThreads = 256;  // of the kernel below
constexpr int kWarps = kThreads / 32;
constexpr int kBatch = 4;  // tokens of a warp
constexpr int kWarpChannels = 32 * kPer;

// Any strides. kVector: a thread's channels follow each other, on both sides, at multiples of 16 bytes.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) QkvSplitTokensKernel(const __grid_constant__ QkvSplitParams p) {
  WaitForStream();
  constexpr int kTileTokens = kWarps * kBatch;
  const int dim = p.dim[0] + p.dim[1] + p.dim[2];
  const int tiles = (dim + kWarpChannels - 1) / kWarpChannels + (p.gates.g == nullptr ? 0 : 1);
  const int64_t block_token = static_cast<int64_t>(blockIdx.x / tiles) * kTileTokens;
  const int first = static_cast<int>(blockIdx.x % tiles) * kWarpChannels + static_cast<int>(threadIdx.x) % 32 * kPer;
  if (first - static_cast<int>(threadIdx.x) % 32 * kPer >= dim) {
    StoreGates(p.gates, block_token, static_cast<int>(min(int64_t{kTileTokens}, p.tokens - block_token)));
    return;
  }
  const int64_t first_token = block_token + static_cast<int>(threadIdx.x) / 32 * kBatch;
  Eight<T> x[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    // What is not there is loaded from the edge, for nothing, and without a branch around the load.
    const int64_t token = min(first_token + i, p.tokens - 1);
    if constexpr (kVector) {
      const int channel = first < dim ? first : 0;
      x[i] = *reinterpret_cast<const Eight<T>*>(static_cast<const T*>(p.mixed) + token * p.stride_t + channel);
    } else {
      x[i] = LoadElements<kPer>(static_cast<const T*>(p.mixed) + token * p.stride_t + first * p.stride_d, p.stride_d,
                                dim - first);
    }
  }
  LetNextBegin();
  const Segments<T, kPer, kVector> segments(p.out, p.dim, first);
  if (p.norm_head_dim != 0) NormaliseHeads(x, first < p.dim[0] + p.dim[1] ? p.norm_head_dim : 0);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (first_token + i < p.tokens) segments.Store(first_token + i, x[i]);
  }
}

constexpr int kTransposedThreads = 256;
constexpr int kTransposedBlocks = 3;  // on a multiprocessor
// The transposing kernel's tile. kLanes: of a warp's threads along the tokens; the others lie along the channels. The
// longer the pieces of channels, the fewer sectors are read twice where channels do not start at one: 32, unless heads
// are normalised, which have to be in one block.
template <class T, int kLanes>
struct TransposedTile {
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // tokens of a thread
  static constexpr int kTokens = kLanes * kVector;
  static constexpr int kChannels = kTransposedThreads / kLanes * kPer;
  static constexpr int kRow = kChannels / kPer;  // threads of a row of outputs
  // Blocks next to each other are the same channels of this many tiles along the tokens, then the next channels: both
  // what is read and what is written at a time lies in long pieces.
  static constexpr int kGroup = 256 / kLanes;
  static __host__ __device__ int64_t Tiles(int64_t tokens) { return (tokens + kTokens - 1) / kTokens; }
  static __host__ __device__ int64_t ChannelTiles(int32_t dim) { return (dim + kChannels - 1) / kChannels; }
};

// The 16 bytes that start `late` bytes behind the first of two vectors. Without a branch.
__device__ uint4 Shifted(const uint4& first, const uint4& second, unsigned late) {
  const uint32_t w[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
  uint32_t a[6], b[5], c[4];
#pragma unroll
  for (int i = 0; i < 6; ++i) a[i] = (late & 8) != 0 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) b[i] = (late & 4) != 0 ? a[i + 1] : a[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = __byte_perm(b[i], b[i + 1], (late & 2) != 0 ? 0x5432 : 0x3210);
  return {c[0], c[1], c[2], c[3]};
}

__device__ uint32_t WordOf(const uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// kAligned: every channel starts at a multiple of 16 bytes.
template <class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kTransposedThreads, kTransposedBlocks)
    QkvSplitTransposedKernel(const __grid_constant__ QkvSplitParams p) {
  using Tile = TransposedTile<T, kLanes>;
  constexpr int kVector = Tile::kVector;
  int64_t channel_tiles = p.gates.g == nullptr ? 0 : 1;
#pragma unroll
  for (int i = 0; i < 3; ++i) channel_tiles += Tile::ChannelTiles(p.dim[i]);
  const int64_t group = blockIdx.x / (Tile::kGroup * channel_tiles);
  const int in_group = static_cast<int>(blockIdx.x - group * Tile::kGroup * channel_tiles);
  const int group_tiles = static_cast<int>(min(int64_t{Tile::kGroup}, Tile::Tiles(p.tokens) - group * Tile::kGroup));
  int64_t place = in_group / group_tiles;
  const int64_t tile_token = (group * Tile::kGroup + in_group % group_tiles) * Tile::kTokens;
  int segment = 0;
  int64_t segment_start = 0;
  while (segment < 3 && place >= Tile::ChannelTiles(p.dim[segment])) {
    place -= Tile::ChannelTiles(p.dim[segment]);
    segment_start += p.dim[segment++];
  }
  if (segment == 3) {
    WaitForStream();
    StoreGates(p.gates, tile_token, static_cast<int>(min(int64_t{Tile::kTokens}, p.tokens - tile_token)));
    return;
  }
  const int along = threadIdx.x % kLanes;
  const int64_t token = tile_token + along * kVector;
  const int dim = p.dim[segment];
  const int channel = static_cast<int>(place) * Tile::kChannels + static_cast<int>(threadIdx.x) / kLanes * kPer;
  const int tokens = static_cast<int>(max(min(int64_t{kVector}, p.tokens - token), int64_t{0}));
  const int channels = max(min(kPer, dim - channel), 0);

  const T* const mixed = static_cast<const T*>(p.mixed);
  const T* const from = mixed + (segment_start + channel) * p.stride_d + token;
  const int64_t all_channels = int64_t{p.dim[0]} + p.dim[1] + p.dim[2];
  const T* const end = mixed + p.tokens + (all_channels - 1) * p.stride_d;
  // Of the first blocks' inputs what is in memory already: they are asked for while the kernel ahead ends.
  if (BeginsEarly(blockIdx.x, kTransposedBlocks) && along % 8 == 0 && tokens == kVector && channels == kPer) {
#pragma unroll
    for (int c = 0; c < kPer; ++c) PrefetchL2(from + c * p.stride_d);
  }
  WaitForStream();
  // The vectors that a channel's tokens lie in may reach kVector - 1 elements beyond them on either side.
  constexpr int kReach = kAligned ? 0 : kVector;
  const bool inside =
      channels == kPer && from - mixed >= kReach && end - from >= (kPer - 1) * p.stride_d + kVector + kReach;
  uint4 in[kPer];  // each the tokens of one channel
  if (kAligned ? inside : __all_sync(0xffffffffu, inside)) {
    const auto vector_at = [](const T* at) {
      return reinterpret_cast<const uint4*>(at - reinterpret_cast<uintptr_t>(at) % 16 / sizeof(T));
    };
    // The second vector of a channel is the first of the next thread's. The last thread's are loaded one by each.
    uint4 behind = {};
    if constexpr (!kAligned) behind = vector_at(from + along % kPer * p.stride_d - along * kVector)[kLanes];
#pragma unroll
    for (int c = 0; c < kPer; ++c) in[c] = *vector_at(from + c * p.stride_d);
    if constexpr (!kAligned) {
      static_assert(kLanes >= kPer);
#pragma unroll
      for (int c = 0; c < kPer; ++c) {
        const auto next = [&](uint32_t word, uint32_t word_behind) {
          const uint32_t of_next = __shfl_down_sync(0xffffffffu, word, 1, kLanes);
          const uint32_t of_last = __shfl_sync(0xffffffffu, word_behind, c, kLanes);
          return along == kLanes - 1 ? of_last : of_next;
        };
        const uint4 second = {next(in[c].x, behind.x), next(in[c].y, behind.y), next(in[c].z, behind.z),
                              next(in[c].w, behind.w)};
        in[c] = Shifted(in[c], second, static_cast<unsigned>(reinterpret_cast<uintptr_t>(from + c * p.stride_d) % 16));
      }
    }
  } else {
#pragma unroll
    for (int c = 0; c < kPer; ++c) {
      const Pack<T, kVector> pack = LoadElements<kVector>(from + c * p.stride_d, 1, c < channels ? tokens : 0);
      in[c] = {pack.words[0], pack.words[1], pack.words[2], pack.words[3]};
    }
  }
  LetNextBegin();

  Eight<T> y[kVector];
#pragma unroll
  for (int t = 0; t < kVector; ++t) {
#pragma unroll
    for (int w = 0; w < Eight<T>::kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        y[t].words[w] = WordOf(in[w], t);
      } else {
        y[t].words[w] =
            __byte_perm(WordOf(in[2 * w], t / 2), WordOf(in[2 * w + 1], t / 2), t % 2 == 0 ? 0x5410 : 0x7632);
      }
    }
  }
  // Which place of a row eight channels have turns with a thread's tokens: they are apart by multiples of all banks.
  __shared__ Eight<T> rows[Tile::kTokens][Tile::kRow];
  const int eight = static_cast<int>(threadIdx.x) / kLanes;
#pragma unroll
  for (int t = 0; t < kVector; ++t) rows[along * kVector + t][eight ^ along % 8] = y[t];
  __syncthreads();
  // Now a row to as many threads that follow each other.
  constexpr int kAtOnce = 4, kRowsBetween = kTransposedThreads / Tile::kRow;
  const int at = static_cast<int>(threadIdx.x) % Tile::kRow, first = static_cast<int>(threadIdx.x) / Tile::kRow;
  const int of_row = min(kPer, dim - static_cast<int>(place) * Tile::kChannels - at * kPer);
  T* const to = static_cast<T*>(p.out[segment]) + static_cast<int>(place) * Tile::kChannels + at * kPer;
  const bool whole =
      of_row == kPer && reinterpret_cast<uintptr_t>(to) % 16 == 0 && dim * static_cast<int64_t>(sizeof(T)) % 16 == 0;
#pragma unroll 1
  for (int row = first; row < Tile::kTokens; row += kAtOnce * kRowsBetween) {
    Eight<T> z[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) z[i] = rows[row + i * kRowsBetween][at ^ (row + i * kRowsBetween) / kVector % 8];
    if (kLanes == 16 && p.norm_head_dim != 0) NormaliseHeads(z, segment < 2 ? p.norm_head_dim : 0);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t of = tile_token + row + i * kRowsBetween;
      if (of >= p.tokens) continue;
      if (whole) {
        *reinterpret_cast<Eight<T>*>(to + of * dim) = z[i];
      } else {
        using Bits = typename BitsOf<T>::Type;
#pragma unroll
        for (int c = 0; c < kPer; ++c) {
          if (c < of_row) reinterpret_cast<Bits*>(to + of * dim)[c] = static_cast<Bits>(z[i].Bits(c));
        }
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

template <class T, int kLanes>
int LaunchTransposed(CUstream_st* stream, const QkvSplitParams& p) {
  using Tile = TransposedTile<T, kLanes>;
  int64_t blocks = p.gates.g == nullptr ? 0 : 1;
  for (const int32_t dim : p.dim) blocks += Tile::ChannelTiles(dim);
  const dim3 grid(static_cast<unsigned>(blocks * Tile::Tiles(p.tokens)));
  const bool aligned = reinterpret_cast<uintptr_t>(p.mixed) % 16 == 0 && p.stride_d * sizeof(T) % 16 == 0;
  const auto kernel = aligned ? QkvSplitTransposedKernel<T, kLanes, true> : QkvSplitTransposedKernel<T, kLanes, false>;
  return LaunchDependent(stream, kernel, grid, dim3(kTransposedThreads), 0, p);
}

template <class T>
int LaunchTokens(CUstream_st* stream, const QkvSplitParams& p) {
  const int64_t dim = int64_t{p.dim[0]} + p.dim[1] + p.dim[2];
  const int64_t tiles = (dim + kWarpChannels - 1) / kWarpChannels + (p.gates.g == nullptr ? 0 : 1);
  const dim3 grid(static_cast<unsigned>((p.tokens + kWarps * kBatch - 1) / (kWarps * kBatch) * tiles));
  if (p.stride_d == 1 && Multiples(p, sizeof(T), kPer * sizeof(T))) {
    return LaunchDependent(stream, QkvSplitTokensKernel<T, true>, grid, dim3(kThreads), 0, p);
  }
  return LaunchDependent(stream, QkvSplitTokensKernel<T, false>, grid, dim3(kThreads), 0, p);
}

template <class T>
int LaunchSplit(CUstream_st* stream, const QkvSplitParams& p) {
  if (p.stride_t != 1 || p.stride_d == 1) return LaunchTokens<T>(stream, p);
  return p.norm_head_dim == 0 ? LaunchTransposed<T, 32>(stream, p) : LaunchTransposed<T, 16>(stream, p);
}

}  // namespace

int QkvSplitCuda(CUstream_st* stream, const QkvSplitParams& params) {
  return params.dtype == DType::kBFloat16 ? LaunchSplit<__nv_bfloat16>(stream, params)
                                          : LaunchSplit<float>(stream, params);
}

}  // namespace pristine::attention::gdn
