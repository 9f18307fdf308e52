// Scheduling (stream-K). The tiles of all rows, times KV heads, times passes over M, form one line; block c takes the
// c-th of `blocks` equal parts of it. A part is cut into pieces where a unit (row, KV head, pass) ends. Here are the
// shape of a tile and of what a block keeps of it, and which pieces are whose.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_SCHEDULE_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_SCHEDULE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "attention/kernels/paged_decode.h"

namespace pristine::attention {
namespace decode_mma {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class Kv, int kHeadDim, int kMTiles>
struct Shape {
  static constexpr int kTile = DecodeTile(sizeof(Kv), kHeadDim, 16 * kMTiles);
  static constexpr int kTokens = kTile / kWarps;  // of a warp
  static constexpr unsigned kAll = kTokens == 32 ? 0xffffffffu : 0xffffu;
  static constexpr int kRowBytes = kHeadDim * sizeof(Kv);
  static constexpr int kChunks = kRowBytes / 16;          // 16-byte chunks of a row of K or V
  static constexpr int kHalfStage = kTokens * kRowBytes;  // K or V of a warp's stage
  static constexpr int kStages = (kHeadDim == 256 ? 48 : 24) * 1024 / (2 * kHalfStage);
  static constexpr int kRing = kStages * 2 * kHalfStage;  // bytes of a warp
  static constexpr int kRows = 16 * kMTiles;              // of M in one pass
  static constexpr int kMergeStride = kHeadDim + 4;       // floats; off the banks' period
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kMergeBytes = 16 * kMergeStride * 4;
  // Queries and the merge of the warps take turns.
  static constexpr int kTurnBytes = kQueryBytes > kMergeBytes ? kQueryBytes : kMergeBytes;
};

struct alignas(16) Small {
  float top[kWarps][32];
  float mass[kWarps][32];
  float query_factor[32];
  unsigned attended[kWarps][12];  // per stage: which of the warp's tokens are
  int scan[kWarps];
  int is_last;
};

// A run of tiles of one unit.
struct Piece {
  int row, kv_head, first_m;  // first_m: of the packed rows, query token * group + head of the group
  const int32_t* pages;       // the row's
  int length;                 // of the row, in tokens
  int low, high;              // tokens [low, high) are looked at
  int tile, tiles;            // the next tile of the row, and how many are left of the piece
  int unit_begin, unit_end;   // the unit's tiles on the line
};

// Tokens of a row; room is left for positions past its end.
__device__ inline int LengthOf(const RowPages& pages) {
  return static_cast<int>(min(static_cast<long long>(pages.length), 0x7fffff00LL));
}
__device__ inline int FirstSeen(const PagedDecodeParams& p, int length) {
  return p.window > 0 ? max(length - p.q_len + 1 - min(p.window, length), 0) : 0;
}
template <int kTile>
__device__ inline int TilesOf(const PagedDecodeParams& p, int length) {
  if (length <= 0) return 0;
  return min((length + kTile - 1) / kTile - FirstSeen(p, length) / kTile, p.most_tiles);
}

// All tiles, and who works on which: the first `longer` blocks take part + 1 of them, the others `part`.
struct Line {
  const int* prefix;  // shared, [rows + 1]: tiles of the rows before
  int units;          // of a row: KV heads * passes
  int passes;
  int total;
  unsigned part, longer;

  __device__ void Divide(int blocks) {
    part = static_cast<unsigned>(total) / blocks;
    longer = static_cast<unsigned>(total) % blocks;
  }
  __device__ int BeginOf(unsigned block) const { return static_cast<int>(block * part + min(block, longer)); }
  __device__ unsigned OwnerOf(int at) const {
    const unsigned before = longer * (part + 1);
    if (static_cast<unsigned>(at) < before) return at / (part + 1);
    return longer + (at - before) / part;
  }
};

template <class S>
__device__ inline Piece PieceAt(const PagedDecodeParams& p, const Line& line, int at, int end) {
  const int tile = static_cast<unsigned>(at) / line.units;
  int low = 0, high = p.rows;  // prefix[low] <= tile < prefix[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (line.prefix[middle] <= tile ? low : high) = middle;
  }
  const int before = line.prefix[low];
  const int tiles = line.prefix[low + 1] - before;
  const unsigned offset = at - before * line.units;
  const int unit = offset / static_cast<unsigned>(tiles);
  const int done = offset - unit * tiles;
  const RowPages pages = PagesOf(p.kv, low);
  Piece piece;
  piece.row = low;
  piece.kv_head = unit / line.passes;
  piece.first_m = unit % line.passes * S::kRows;
  piece.pages = p.kv.pages + pages.first;
  piece.length = LengthOf(pages);
  piece.low = FirstSeen(p, piece.length);
  piece.high = piece.length;
  piece.tile = piece.low / S::kTile + done;
  piece.unit_begin = at - done;
  piece.unit_end = piece.unit_begin + tiles;
  piece.tiles = min(tiles - done, end - at);
  return piece;
}

// prefix[r]: tiles of the rows before r. All threads of the block; ends with a barrier.
template <int kTile>
__device__ inline void ScanRows(const PagedDecodeParams& p, int* prefix, Small& small) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;
  if (threadIdx.x == 0) prefix[0] = 0;
  for (int first = 0; first < p.rows; first += kThreads) {
    const int row = first + threadIdx.x;
    int sum = row < p.rows ? TilesOf<kTile>(p, LengthOf(PagesOf(p.kv, row))) : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) small.scan[warp] = sum;
    __syncthreads();
    int all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) sum += before + all;
      all += small.scan[w];
    }
    if (row < p.rows) prefix[row + 1] = sum;
    before += all;
    __syncthreads();
  }
}

}  // namespace decode_mma

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_SCHEDULE_CUH_
