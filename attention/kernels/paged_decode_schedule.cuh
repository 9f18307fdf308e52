// Scheduling (stream-K). The tiles of all rows, times KV heads, times passes over M, form one line; block c takes the
// c-th of `blocks` equal parts of it. A part is cut into pieces where a unit (row, KV head, pass) ends. Here are the
// shape of a tile and of what a block keeps of it, which pieces are whose, and how a block begins before the kernel
// ahead of it has ended.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_SCHEDULE_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_SCHEDULE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "attention/kernels/dependent_launch.cuh"
#include "attention/kernels/divider.h"
#include "attention/kernels/paged_decode.h"

namespace pristine::attention {
namespace decode_mma {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

// How work is cut up (Line::Divide), by what was fastest.
constexpr int kMostParts = 64;       // of a unit
constexpr int kMostShortParts = 32;  // of fewer tiles than
constexpr int kManyTiles = 4;
constexpr int kFlatRows = 256;      // of partial results that one block merges at once
constexpr int kMostLike = 1 << 18;  // tiles of a unit, and units, that are looked at as alike
constexpr int kMostWhole = 200;     // tiles of a block that are several whole units
constexpr int kFewTiles = 8;        // of a block: up to so many, passes of one m-tile

template <class Kv, int kHeadDim, int kMTiles>
struct Shape {
  static constexpr int kTile = DecodeTile(sizeof(Kv), kHeadDim, 16 * kMTiles);
  static constexpr int kTokens = kTile / kWarps;  // of a warp
  static constexpr unsigned kAll = kTokens == 32 ? 0xffffffffu : 0xffffu;
  static constexpr int kRowBytes = kHeadDim * sizeof(Kv);
  static constexpr int kChunks = kRowBytes / 16;          // 16-byte chunks of a row of K or V
  static constexpr int kHalfStage = kTokens * kRowBytes;  // K or V of a warp's stage
  static constexpr int kStages = (kHeadDim == 256 ? 48 : 24) * 1024 / (2 * kHalfStage);
  static constexpr int kRing = kStages * 2 * kHalfStage;    // bytes of a warp
  static constexpr int kRows = 16 * kMTiles;                // of M in one pass
  static constexpr int kKept = kHeadDim == 256 ? 64 : 256;  // rows whose places are kept from the scan
  // Floats of a row where warps merge: a quarter, or with 16-byte stores an eighth, of a warp's lanes meet all banks.
  static constexpr int kMergeStride = kHeadDim + (sizeof(Kv) == 1 ? 16 : 8);
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kMergeBytes = 16 * kMergeStride * 4;
  // Queries and the merge of the warps take turns.
  static constexpr int kTurnBytes = kQueryBytes > kMergeBytes ? kQueryBytes : kMergeBytes;
};

// Where a row's pages begin, if that is in kv_indptr, and its length in tokens.
struct KeptRow {
  int first, length;
  __device__ bool operator!=(const KeptRow& other) const { return first != other.first || length != other.length; }
};
// A row where parts are merged: the warps' masses, and after them where it is written.
union MergedRow {
  float mass[kWarps];
  long long place;
};
struct alignas(16) Small {
  float top[32][kWarps];  // then the weights of the warps' sums
  MergedRow merged[32];
  float query_factor[32];
  unsigned attended[kWarps][12];  // per stage: which of the warp's tokens are
  int scan[kWarps];
  int first_tiles;  // of the first row
  int is_last;
};

// The launch, with what the launcher knows of its divisors.
struct DecodeLaunch {
  PagedDecodeParams p;
  int group;   // query heads of a KV head
  int rows;    // of M, over all passes: group * q_len
  int passes;  // over them
  int units;   // of a row: KV heads * passes
  Divider by_group, by_passes, by_units, by_page;
};

// The place of packed row `m` among [rows, q_len, q_heads].
__device__ inline long long HeadPlace(const DecodeLaunch& launch, int row, int kv_head, int m) {
  const int query = launch.by_group.Quotient(m);
  return (static_cast<long long>(row) * launch.p.q_len + query) * launch.p.q_heads + kv_head * launch.group + m -
         query * launch.group;
}

// Where the code waits (dependent_launch.cuh), a block begins with guesses: it reads page tables that may yet change,
// past the L1 cache, and asks for what they name. Behind the wait for the end of the kernel ahead it reads them again,
// and what they name meanwhile; before it uses or writes anything it knows whether they are as they were.
//
// Of what may be read while it is written; two reads are never made one.
struct FreshRead {
  __device__ int32_t operator()(const int32_t* at) const {
    int32_t value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];\n" : "=r"(value) : "l"(at));
    return value;
  }
};

// A run of tiles of one unit.
struct Piece {
  int row, kv_head, first_m;    // first_m: of the packed rows, query token * group + head of the group
  const int32_t* pages;         // the row's
  int length;                   // of the row, in tokens
  int low, high;                // tokens [low, high) are looked at
  int tile, tiles;              // the next tile of the row, and how many are left of the piece
  int first_block, last_block;  // that work on the unit
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

// floor(a / b) for a < 2^20: half a unit away from a multiple of b is then farther than the quotient's error of 2 ulp.
__device__ inline int Quotient(int a, int b) { return static_cast<int>(__fdividef(a + 0.5f, b)); }
__device__ inline int CeilQuotient(int a, int b) { return Quotient(a + b - 1, b); }

// All tiles, and who works on which: this block on [begin, end).
struct Line {
  const int* prefix;    // shared, [rows + 1]: tiles of the rows before
  const KeptRow* kept;  // shared, of the first S::kKept rows
  int begin, end;
  int first_block, last_block;  // that work on this block's units; or first_block is -1, and it is as OwnerOf says
  unsigned part, longer;        // of all blocks the first `longer` take part + 1 tiles, the others `part`

  // Where rows are alike, and blocks have not many tiles of several units, they end where units do, even if a few have
  // nothing to do: then units are whole, or in as many parts each. `like`: how many rows are as the first is.
  __device__ void Divide(const DecodeLaunch& launch, int like, int block, int grid) {
    const int tiles = prefix[launch.p.rows];
    const int total = tiles * launch.units;
    begin = end = 0;
    if (total == 0) return;
    const bool is_dear = launch.rows > 8;  // to merge parts of so many packed rows
    const int blocks = min(grid, max(1, is_dear ? total / 2 : total));
    if (prefix[1] * like == tiles && max(prefix[1], like * launch.units) < kMostLike) {  // no others
      const int all = like * launch.units;
      const int each = prefix[1];
      if (all < blocks) {
        int most = min(Quotient(blocks, all), kMostParts);
        // Short parts cost more to merge than they save.
        if (CeilQuotient(each, most) < kManyTiles) most = min(most, kMostShortParts);
        const int longest = CeilQuotient(each, most);
        const int parts = CeilQuotient(each, longest);
        const int unit = Quotient(block, parts);
        if (unit >= all) return;
        first_block = unit * parts;
        last_block = first_block + parts - 1;
        begin = unit * each + (block - first_block) * longest;
        end = min(begin + longest, (unit + 1) * each);
        return;
      }
      const int units = CeilQuotient(all, blocks);  // of a block
      const bool fits = CeilQuotient(all, units) > blocks - blocks / 8;
      // Where a block has many tiles, equal shares are worth a cut unit.
      if (fits && (units == 1 || units * each <= kMostWhole || is_dear)) {
        first_block = last_block = block;
        begin = min(block * units, all) * each;
        end = min((block + 1) * units, all) * each;
        return;
      }
    }
    first_block = -1;
    part = static_cast<unsigned>(total) / blocks;
    longer = static_cast<unsigned>(total) % blocks;
    if (block >= blocks) return;
    begin = static_cast<int>(block * part + min(static_cast<unsigned>(block), longer));
    end = static_cast<int>(begin + part + (static_cast<unsigned>(block) < longer ? 1 : 0));
  }
  __device__ int OwnerOf(int at) const {
    const unsigned before = longer * (part + 1);
    if (static_cast<unsigned>(at) < before) return at / (part + 1);
    return longer + (at - before) / part;
  }
};

// Where a piece's row has its pages, and how long it is.
template <class S>
__device__ inline void FindRow(const DecodeLaunch& launch, const Line& line, Piece& piece) {
  const PagedKvView& kv = launch.p.kv;
  RowPages pages;
  if (piece.row < S::kKept) {
    const KeptRow kept = line.kept[piece.row];
    pages = {kv.kv_indptr != nullptr ? kept.first : piece.row * kv.table_stride, kept.length};
  } else {
    pages = PagesOf(kv, piece.row, FreshRead());
  }
  piece.pages = kv.pages + pages.first;
  piece.length = LengthOf(pages);
}
// The piece at a place of the line.
template <class S>
__device__ inline Piece PieceAt(const DecodeLaunch& launch, const Line& line, int at) {
  const PagedDecodeParams& p = launch.p;
  const int tile = launch.by_units.Quotient(at);
  Piece piece;
  piece.row = 0;  // prefix[row] <= tile < prefix[row + 1]
  for (int end = p.rows; end - piece.row > 1;) {
    const int middle = (piece.row + end) / 2;
    (line.prefix[middle] <= tile ? piece.row : end) = middle;
  }
  FindRow<S>(launch, line, piece);
  const int before = line.prefix[piece.row];
  const int tiles = line.prefix[piece.row + 1] - before;
  const unsigned offset = at - before * launch.units;
  const int unit = offset / static_cast<unsigned>(tiles);
  const int done = offset - unit * tiles;
  piece.kv_head = launch.by_passes.Quotient(unit);
  piece.first_m = (unit - piece.kv_head * launch.passes) * S::kRows;
  piece.low = FirstSeen(p, piece.length);
  piece.high = piece.length;
  piece.tile = piece.low / S::kTile + done;
  piece.tiles = min(tiles - done, line.end - at);
  const bool alike = line.first_block >= 0;
  piece.first_block = alike ? line.first_block : line.OwnerOf(at - done);
  piece.last_block = alike ? line.last_block : line.OwnerOf(at - done + tiles - 1);
  return piece;
}
// The block's next piece, which begins a unit at `at`. Of the last one its place and its row's pages and length matter.
template <class S>
__device__ inline Piece PieceAfter(const DecodeLaunch& launch, const Line& line, Piece piece, int at) {
  const PagedDecodeParams& p = launch.p;
  piece.first_m += S::kRows;
  if (piece.first_m >= launch.rows) {
    piece.first_m = 0;
    if (++piece.kv_head == p.kv.kv_heads) {
      piece.kv_head = 0;
      do {
        ++piece.row;
      } while (line.prefix[piece.row + 1] == line.prefix[piece.row]);
      FindRow<S>(launch, line, piece);
    }
  }
  const int tiles = line.prefix[piece.row + 1] - line.prefix[piece.row];
  piece.low = FirstSeen(p, piece.length);
  piece.high = piece.length;
  piece.tile = piece.low / S::kTile;
  piece.tiles = min(tiles, line.end - at);
  piece.first_block = piece.last_block = blockIdx.x;
  if (piece.tiles < tiles) piece.last_block = line.OwnerOf(at + tiles - 1);
  return piece;
}

// prefix[r]: tiles of the rows before r. Returns how many rows have as many as the first, if it has any. All threads of
// the block; ends with a barrier.
template <class S>
__device__ inline int ScanRows(const PagedDecodeParams& p, int* prefix, KeptRow* kept, Small& small) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0, like = 0;
  if (threadIdx.x == 0) prefix[0] = 0;
  for (int first = 0; first < p.rows; first += kThreads) {
    const int row = first + threadIdx.x;
    int tiles = 0;
    if (row < p.rows) {
      const RowPages pages = PagesOf(p.kv, row, FreshRead());
      tiles = TilesOf<S::kTile>(p, LengthOf(pages));
      if (row < S::kKept) kept[row] = {static_cast<int>(pages.first), LengthOf(pages)};
    }
    int sum = tiles;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) small.scan[warp] = sum;
    if (row == 0) small.first_tiles = tiles;
    __syncthreads();
    int all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) sum += before + all;
      all += small.scan[w];
    }
    if (row < p.rows) prefix[row + 1] = sum;
    before += all;
    like += __syncthreads_count(tiles > 0 && tiles == small.first_tiles);
  }
  return like;
}

}  // namespace decode_mma

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_SCHEDULE_CUH_
