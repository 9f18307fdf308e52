// Decode on tensor cores. The query heads of a KV head, times the query tokens, are the rows of the products ("GQA
// packed on M"), so K and V are read once for all of them. Each of a block's four warps streams 16 tokens of every
// 64-token tile through its own ring of cp.async stages: no barrier but a warp's own while a piece is worked on.
//
// Scheduling (stream-K). The tiles of all rows, times KV heads, times passes over M, form one line; block c takes the
// c-th of `blocks` equal parts of it. A part is cut where a unit (row, KV head, pass) ends; each piece becomes either
// the result of a whole unit, or a partial result, which the last of a unit's blocks to arrive merges, always in the
// blocks' order.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_MMA_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_MMA_CUH_

#include <cuda_runtime.h>
#include <math_constants.h>

#include <type_traits>

#include "attention/kernels/mma_sm80.cuh"
#include "attention/kernels/paged_decode.h"
#include "attention/kernels/plan_layout.h"

namespace pristine::attention {
namespace decode_mma {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896340736f;

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

template <class S>
constexpr int SharedBytes(int rows) {
  return kWarps * S::kRing + S::kTurnBytes + static_cast<int>(sizeof(Small)) + 4 * (rows + 1);
}

// Rows of 16-byte chunks without bank conflicts for ldmatrix: eight rows at one chunk meet eight different bank groups.
template <int kChunks>
__device__ inline int Swizzle(int row, int chunk) {
  if constexpr (kChunks >= 8) return row * kChunks + (chunk ^ (row & 7));
  return row * kChunks + (chunk ^ ((row >> 1) & 3));
}

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

// Streams a warp's tokens into its ring, tile after tile, across pieces.
template <class S, class Kv>
class Loader {
 public:
  __device__ Loader(const PagedDecodeParams& p, unsigned ring, unsigned* attended)
      : p_(p), ring_(ring), attended_(attended) {
    page_shift_ = (p.kv.page_size & (p.kv.page_size - 1)) == 0 ? 31 - __clz(p.kv.page_size) : -1;
  }
  __device__ void Start(const Piece& piece) {
    pages_ = piece.pages;
    low_ = piece.low;
    high_ = piece.high;
    position_ = piece.tile * S::kTile + threadIdx.x / 32 * S::kTokens;
    left_ = piece.tiles;
    head_ = piece.kv_head * p_.kv.head_stride;
    LookUp();
  }
  __device__ int left() const { return left_; }

  // Queues the tile whose pages were looked up, and looks up the next one's.
  __device__ void Load(int stage) {
    const int lane = threadIdx.x % 32;
    const bool valid = page_ >= 0 && page_ < p_.kv.num_pages;
    const unsigned attended = __ballot_sync(kAllLanes, valid) & S::kAll;
    if (lane == 0) attended_[stage] = attended;
    const long long own = (page_ * p_.kv.page_stride + in_page_ * p_.kv.token_stride + head_) * int{sizeof(Kv)};
    const char* const k = static_cast<const char*>(p_.kv.k);
    const long long k_to_v = static_cast<const char*>(p_.kv.v) - k;
    constexpr int kRowsAtOnce = 32 / S::kChunks;
    const int chunk = lane % S::kChunks;
    const unsigned to = ring_ + stage * 2 * S::kHalfStage;
    const bool one_page = p_.kv.page_size % 16 == 0;
    const long long stride = p_.kv.token_stride * int{sizeof(Kv)};
#pragma unroll
    for (int half = 0; half < S::kTokens; half += 16) {
      // Where pages are multiples of 16 tokens, 16 tokens are in one page and a stride apart; any of them tells where.
      const int known = max(__ffs(attended >> half & 0xffffu) - 1, 0) + half;
      const long long anchor = one_page ? __shfl_sync(kAllLanes, own, known) - known * stride : 0;
#pragma unroll
      for (int i = half; i < half + 16; i += kRowsAtOnce) {
        const int row = i + lane / S::kChunks;
        const bool takes = attended >> row & 1;
        const long long from = one_page ? anchor + row * stride : __shfl_sync(kAllLanes, own, row);
        const char* const at = k + (takes ? from + chunk * 16 : 0);
        const unsigned place = to + Swizzle<S::kChunks>(row, chunk) * 16;
        CopyAsync(place, at, takes);
        CopyAsync(place + S::kHalfStage, at + k_to_v, takes);
      }
    }
    position_ += S::kTile;
    if (--left_ > 0) LookUp();
  }

 private:
  // The page of this lane's token of the next tile; -1 where there is none to look at. It is not used before the next
  // tile is loaded, so nobody waits for it.
  __device__ void LookUp() {
    const int position = position_ + threadIdx.x % S::kTokens;
    page_ = -1;
    if (position < low_ || position >= high_) return;
    if (page_shift_ >= 0) {
      page_ = pages_[position >> page_shift_];
      in_page_ = position & (p_.kv.page_size - 1);
    } else {
      const int page = position / p_.kv.page_size;
      page_ = pages_[page];
      in_page_ = position - page * p_.kv.page_size;
    }
  }

  const PagedDecodeParams& p_;
  const unsigned ring_;
  unsigned* const attended_;
  int page_shift_;
  const int32_t* pages_;
  long long head_;
  int low_, high_, position_, page_ = -1, in_page_ = 0, left_ = 0;
};

// The queries of a piece, [kRows, kHeadDim] in 16 bit and swizzled. For KV in 8 bits they become float16, each row
// divided by a power of two that keeps it in range, and each 16 elements in the order in which the loads of K bring
// theirs.
template <class T, class Kv, int kHeadDim, int kMTiles>
__device__ inline void LoadQueries(const PagedDecodeParams& p, const Piece& piece, unsigned char* shared,
                                   Small& small) {
  constexpr int kVecs = kHeadDim / 64;  // 16-byte vectors of a thread; eight threads share a row
  const int group = p.q_heads / p.kv.kv_heads;
  const int rows = group * p.q_len;
#pragma unroll
  for (int tile = 0; tile < kMTiles; ++tile) {
    const int place = tile * 16 + threadIdx.x / 8;
    const int m = piece.first_m + place;
    uint4 x[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) x[i] = {0, 0, 0, 0};
    if (m < rows) {
      const long long head =
          (static_cast<long long>(piece.row) * p.q_len + m / group) * p.q_heads + piece.kv_head * group + m % group;
      const uint4* const from = reinterpret_cast<const uint4*>(static_cast<const T*>(p.q) + head * kHeadDim);
#pragma unroll
      for (int i = 0; i < kVecs; ++i) x[i] = from[i * 8 + threadIdx.x % 8];
    }
    if constexpr (sizeof(Kv) == 1) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < kVecs; ++i) {
          for (const unsigned pair : {x[i].x, x[i].y, x[i].z, x[i].w}) {
            const float2 both = UnpackPair(T{}, pair);
            most = fmaxf(most, fmaxf(fabsf(both.x), fabsf(both.y)));
          }
        }
#pragma unroll
        for (int step = 1; step < 8; step *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
        // 2^e <= most < 2^(e + 1)
        const unsigned exponent = min(max(__float_as_uint(most) >> 23, 1u), 253u);
        const float factor = __uint_as_float(exponent << 23);
        const float inverse = __uint_as_float((254u - exponent) << 23);
#pragma unroll
        for (int i = 0; i < kVecs; ++i) {
          const auto convert = [inverse](unsigned& pair) {
            const float2 both = UnpackPair(T{}, pair);
            pair = PackPair(Float16{}, both.x * inverse, both.y * inverse);
          };
          convert(x[i].x), convert(x[i].y), convert(x[i].z), convert(x[i].w);
        }
        if (threadIdx.x % 8 == 0) small.query_factor[place] = factor;
      } else {
        if (threadIdx.x % 8 == 0) small.query_factor[place] = 1.0f;
      }
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int vec = i * 8 + threadIdx.x % 8;
        const int block = vec / 2 * 2, at = vec % 2 * 8;
        *reinterpret_cast<uint2*>(shared + Swizzle<kHeadDim / 8>(place, block) * 16 + at) = {x[i].x, x[i].z};
        *reinterpret_cast<uint2*>(shared + Swizzle<kHeadDim / 8>(place, block + 1) * 16 + at) = {x[i].y, x[i].w};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        *reinterpret_cast<uint4*>(shared + Swizzle<kHeadDim / 8>(place, i * 8 + threadIdx.x % 8) * 16) = x[i];
      }
    }
  }
}

// What a warp has gathered of a piece: m16n8 accumulators. Element e of accumulator n, m-tile t, belongs to row
// 16 t + lane / 4 + 8 * (e / 2) and dimension DimOf(n, e).
template <class T, class Kv, int kHeadDim, int kMTiles>
struct State {
  using S = Shape<Kv, kHeadDim, kMTiles>;
  using Math = std::conditional_t<sizeof(Kv) == 1, Float16, T>;  // what is multiplied
  static constexpr int kColumns = kHeadDim / 8;

  float sum[kMTiles][kColumns][4];
  float top[kMTiles][2], mass[kMTiles][2];  // mass: of this lane's columns

  __device__ static int DimOf(int n, int e) {
    const int pair = threadIdx.x % 4;
    if constexpr (sizeof(Kv) == 1) return n / 2 * 16 + pair * 4 + e % 2 * 2 + n % 2;
    return n * 8 + pair * 2 + e % 2;
  }

  __device__ void Clear() {
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) top[t][h] = -CUDART_INF_F, mass[t][h] = 0.0f;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[t][n][e] = 0.0f;
      }
    }
  }

  __device__ static void Scores(unsigned queries, unsigned k, float (&score)[kMTiles][S::kTokens / 8][4]) {
    const int lane = threadIdx.x % 32;
    const int matrix = lane / 8;
    const int query_row = matrix % 2 * 8 + lane % 8;
    const int token = matrix / 2 * 8 + lane % 8;
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
      for (int n = 0; n < S::kTokens / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) score[t][n][e] = 0.0f;
      }
    }
    // Sixteen dimensions of all tokens: b[i] are tokens 16 i … 16 i + 15.
    const auto multiply = [&](int step, const auto& b) {
#pragma unroll
      for (int t = 0; t < kMTiles; ++t) {
        unsigned a[4];
        LoadMatrices(queries + Swizzle<kHeadDim / 8>(t * 16 + query_row, 2 * step + matrix / 2) * 16, a);
#pragma unroll
        for (int i = 0; i < S::kTokens / 16; ++i) {
          Multiply(Math{}, score[t][2 * i], a, b[i][0], b[i][1]);
          Multiply(Math{}, score[t][2 * i + 1], a, b[i][2], b[i][3]);
        }
      }
    };
    if constexpr (sizeof(Kv) == 1) {
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; step += 2) {
        unsigned even[S::kTokens / 16][4], odd[S::kTokens / 16][4];
#pragma unroll
        for (int i = 0; i < S::kTokens / 16; ++i) {
          unsigned b[4];
          LoadMatrices(k + Swizzle<S::kChunks>(16 * i + token, step + matrix % 2) * 16, b);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            even[i][2 * j] = WidenPair(b[2 * j]);
            even[i][2 * j + 1] = WidenPair(b[2 * j] >> 16);
            odd[i][2 * j] = WidenPair(b[2 * j + 1]);
            odd[i][2 * j + 1] = WidenPair(b[2 * j + 1] >> 16);
          }
        }
        multiply(step, even);
        multiply(step + 1, odd);
      }
    } else {
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        unsigned b[S::kTokens / 16][4];
#pragma unroll
        for (int i = 0; i < S::kTokens / 16; ++i) {
          LoadMatrices(k + Swizzle<S::kChunks>(16 * i + token, 2 * step + matrix % 2) * 16, b[i]);
        }
        multiply(step, b);
      }
    }
  }

  // Scores become weights relative to the top so far, which may rise.
  __device__ void Soften(float (&score)[kMTiles][S::kTokens / 8][4]) {
    float decay[kMTiles][2];
    bool rises = false;
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = fmaxf(score[t][0][2 * h], score[t][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < S::kTokens / 8; ++n) {
          most = fmaxf(most, fmaxf(score[t][n][2 * h], score[t][n][2 * h + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        most = fmaxf(most, top[t][h]);
        const float safe = most == -CUDART_INF_F ? 0.0f : most;
        rises |= most > top[t][h];
        decay[t][h] = Exp2(top[t][h] - safe);
        top[t][h] = most;
        float gained = 0.0f;
#pragma unroll
        for (int n = 0; n < S::kTokens / 8; ++n) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            score[t][n][e] = Exp2(score[t][n][e] - safe);
            gained += score[t][n][e];
          }
        }
        mass[t][h] = fmaf(mass[t][h], decay[t][h], gained);
      }
    }
    if (!__any_sync(kAllLanes, rises)) return;  // tops settle soon
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[t][n][e] *= decay[t][e / 2];
      }
    }
  }

  __device__ void AddValues(const float (&weight)[kMTiles][S::kTokens / 8][4], unsigned v) {
    const int lane = threadIdx.x % 32;
    const int matrix = lane / 8;
#pragma unroll
    for (int i = 0; i < S::kTokens / 16; ++i) {
      unsigned a[kMTiles][4];
#pragma unroll
      for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* const pair = &weight[t][2 * i + j / 2][j % 2 * 2];
          a[t][j] = PackPair(Math{}, pair[0], pair[1]);
        }
      }
      const auto multiply = [&](int n, unsigned b0, unsigned b1) {
#pragma unroll
        for (int t = 0; t < kMTiles; ++t) Multiply(Math{}, sum[t][n], a[t], b0, b1);
      };
      const int token = 16 * i + matrix % 2 * 8 + lane % 8;
      unsigned b[4];
#pragma unroll
      for (int step = 0; step < S::kChunks / 2; ++step) {
        LoadTransposed(v + Swizzle<S::kChunks>(token, 2 * step + matrix / 2) * 16, b);
        if constexpr (sizeof(Kv) == 1) {
          // A transposed pair is two tokens times two dimensions: the even ones make one column block, the odd the
          // next.
#pragma unroll
          for (int j = 0; j < 4; ++j) b[j] = __byte_perm(b[j], 0, 0x3120);
          multiply(4 * step, WidenPair(b[0]), WidenPair(b[1]));
          multiply(4 * step + 1, WidenPair(b[0] >> 16), WidenPair(b[1] >> 16));
          multiply(4 * step + 2, WidenPair(b[2]), WidenPair(b[3]));
          multiply(4 * step + 3, WidenPair(b[2] >> 16), WidenPair(b[3] >> 16));
        } else {
          multiply(2 * step, b[0], b[1]);
          multiply(2 * step + 1, b[2], b[3]);
        }
      }
    }
  }
};

// What became of one row of a piece, over all warps. The top of scores that are all NaN is -inf, too: only the mass
// tells them from nothing to attend.
struct Total {
  float top, mass;
  __device__ float Lse() const { return mass == 0.0f ? -CUDART_INF_F : top + log2f(mass); }
};
__device__ inline Total TotalOf(const Small& small, int row) {
  Total total = {-CUDART_INF_F, 0.0f};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total.top = fmaxf(total.top, small.top[w][row]);
  const float safe = total.top == -CUDART_INF_F ? 0.0f : total.top;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total.mass = fmaf(small.mass[w][row], Exp2(small.top[w][row] - safe), total.mass);
  return total;
}

__device__ inline float4 Scaled(float4 x, float factor) {
  return {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
}

// One head's result: four dimensions of it, and its LSE from the thread that has the first ones. `sum` is over
// total.mass at total.top.
template <class T, int kHeadDim>
__device__ inline void WriteResult(const PagedDecodeParams& p, const Piece& piece, int row, int dim, float4 sum,
                                   Total total) {
  const int group = p.q_heads / p.kv.kv_heads;
  const int m = piece.first_m + row;
  const int head = piece.kv_head * group + m % group;
  float factor = 0.0f;
  if (total.mass != 0.0f) {
    factor = p.kv.v_scale == nullptr ? 1.0f : *p.kv.v_scale;
    if (p.sinks != nullptr) {
      const float sink = p.sinks[head] * kLog2E;
      const float top = fmaxf(total.top, sink);
      const float decay = Exp2(total.top - top);
      total = {top, fmaf(total.mass, decay, Exp2(sink - top))};
      factor *= decay;
    }
    factor /= total.mass;
  }
  const long long place = (static_cast<long long>(piece.row) * p.q_len + m / group) * p.q_heads + head;
  const float4 x = Scaled(sum, factor);
  *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + place * kHeadDim + dim) = {PackPair(T{}, x.x, x.y),
                                                                                PackPair(T{}, x.z, x.w)};
  if (dim == 0 && p.lse != nullptr) p.lse[place].value = total.Lse();
}

template <class T, class Kv, int kHeadDim, int kMTiles>
class Block {
 public:
  using S = Shape<Kv, kHeadDim, kMTiles>;
  using WarpState = State<T, Kv, kHeadDim, kMTiles>;
  static constexpr int kVecs = kHeadDim / 4;  // float4 of a row

  __device__ Block(const PagedDecodeParams& p, unsigned char* shared)
      : p_(p),
        turn_(shared + kWarps * S::kRing),
        small_(*reinterpret_cast<Small*>(turn_ + S::kTurnBytes)),
        prefix_(reinterpret_cast<int*>(&small_ + 1)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        ring_(SharedAddress(shared) + warp_ * S::kRing),
        loader_(p, ring_, small_.attended[warp_]) {}

  __device__ void Run() {
    const int group = p_.q_heads / p_.kv.kv_heads;
    line_.passes = (group * p_.q_len + S::kRows - 1) / S::kRows;
    line_.units = p_.kv.kv_heads * line_.passes;
    line_.prefix = prefix_;
    if (p_.plan != nullptr) {
      RunItem();
      return;
    }
    ScanRows<S::kTile>(p_, prefix_, small_);
    line_.total = prefix_[p_.rows] * line_.units;
    const int blocks = min(static_cast<int>(gridDim.x), line_.total);
    if (blockIdx.x < blocks) {
      line_.Divide(blocks);
      const int begin = line_.BeginOf(blockIdx.x);
      end_ = line_.BeginOf(blockIdx.x + 1);
      RunPieces(begin, PieceAt<S>(p_, line_, begin, end_));
    }
    ClearEmptyRows();
  }

 private:
  __device__ void RunItem() {
    const int item = blockIdx.x;
    if (item >= min(p_.plan[kPlanCount], p_.max_items)) return;
    const int32_t* const work = p_.plan + PlanItemsAt(p_.rows) + 3LL * item;
    Piece piece = {};
    piece.row = work[0];
    piece.kv_head = blockIdx.y / line_.passes;
    piece.first_m = blockIdx.y % line_.passes * S::kRows;
    if (piece.row >= 0 && piece.row < p_.rows) {
      const RowPages pages = PagesOf(p_.kv, piece.row);
      piece.pages = p_.kv.pages + pages.first;
      piece.length = LengthOf(pages);
      piece.low = max(work[1], FirstSeen(p_, piece.length));
      piece.high = min(work[2], piece.length);
    }
    if (piece.low >= piece.high) {
      const int rows = RowsOf(piece);
      for (int row = threadIdx.x; row < rows; row += kThreads) p_.partial_lse[ItemPlace(piece, row)] = -CUDART_INF_F;
      return;
    }
    piece.tile = piece.low / S::kTile;
    piece.tiles = (piece.high + S::kTile - 1) / S::kTile - piece.tile;
    end_ = piece.tiles;
    RunPieces(0, piece);
  }

  // Loads run ahead of the work by stages - 1 tiles, into the next pieces too.
  __device__ void LoadNext(int stage) {
    if (__builtin_expect(loader_.left() == 0 && ahead_ < end_, 0)) {
      const Piece piece = PieceAt<S>(p_, line_, ahead_, end_);
      ahead_ += piece.tiles;
      loader_.Start(piece);
    }
    if (loader_.left() > 0) loader_.Load(stage);
    CommitAsync();  // an empty group, too, counts
  }

  __device__ void RunPieces(int begin, Piece piece) {
    loader_.Start(piece);
    ahead_ = begin + piece.tiles;
    for (int stage = 0; stage < S::kStages - 1; ++stage) LoadNext(stage);
    const ScoreScale scale = ScoreScaleOf(p_);
    WarpState state;
    int stage = 0;
    for (int at = begin;;) {
      LoadQueries<T, Kv, kHeadDim, kMTiles>(p_, piece, turn_, small_);
      __syncthreads();
      float inner[kMTiles][2];
#pragma unroll
      for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          inner[t][h] = scale.inner * (sizeof(Kv) == 1 ? small_.query_factor[16 * t + 8 * h + lane_ / 4] : 1.0f);
        }
      }
      state.Clear();
      at += piece.tiles;
      for (int left = piece.tiles; left > 0; --left) {
        WaitAsync<S::kStages - 2>();
        __syncwarp();
        LoadNext(stage == 0 ? S::kStages - 1 : stage - 1);
        float score[kMTiles][S::kTokens / 8][4];
        const unsigned k = ring_ + stage * 2 * S::kHalfStage;
        WarpState::Scores(SharedAddress(turn_), k, score);
#pragma unroll
        for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
          for (int n = 0; n < S::kTokens / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) score[t][n][e] *= inner[t][e / 2];
          }
        }
        if (__builtin_expect(scale.outer != 0.0f, 0)) Cap(scale.outer, score);
        const unsigned attended = small_.attended[warp_][stage];
        const int position = piece.tile * S::kTile + warp_ * S::kTokens;
        const bool all = attended == S::kAll && position + S::kTokens <= piece.length - p_.q_len + 1 &&
                         (p_.window == 0 || position >= piece.length - p_.window);
        if (__builtin_expect(!all, 0)) Hide(piece, attended, position, score);
        state.Soften(score);
        state.AddValues(score, k + S::kHalfStage);
        ++piece.tile;
        stage = stage == S::kStages - 1 ? 0 : stage + 1;
      }
      Finish(piece, state);
      if (at >= end_) return;
      piece = PieceAt<S>(p_, line_, at, end_);
    }
  }

  __device__ static void Cap(float outer, float (&score)[kMTiles][S::kTokens / 8][4]) {
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
      for (int n = 0; n < S::kTokens / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) score[t][n][e] = outer * tanhf(score[t][n][e]);
      }
    }
  }
  // The scores of tokens that a query does not see, of the 16 from `position` on.
  __device__ void Hide(const Piece& piece, unsigned attended, int position,
                       float (&score)[kMTiles][S::kTokens / 8][4]) const {
    const int group = p_.q_heads / p_.kv.kv_heads;
    const int window = p_.window == 0 ? 0x7fffffff : p_.window;
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int query = (piece.first_m + 16 * t + 8 * h + lane_ / 4) / group;
        const int at = piece.length - p_.q_len + query - position;  // the query's own place from here
#pragma unroll
        for (int n = 0; n < S::kTokens / 8; ++n) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            const int token = n * 8 + lane_ % 4 * 2 + e % 2;
            const bool sees = (attended >> token & 1) != 0 && token <= at && at - token < window;
            if (!sees) score[t][n][e] = -CUDART_INF_F;
          }
        }
      }
    }
  }

  __device__ int RowsOf(const Piece& piece) const {
    return min(S::kRows, p_.q_heads / p_.kv.kv_heads * p_.q_len - piece.first_m);
  }
  // Of a piece's row among an item's partial results.
  __device__ long long ItemPlace(const Piece& piece, int row) const {
    const int group = p_.q_heads / p_.kv.kv_heads;
    const int m = piece.first_m + row;
    return (static_cast<long long>(blockIdx.x) * p_.q_len + m / group) * p_.q_heads + piece.kv_head * group + m % group;
  }
  // Of a piece's row among the partial results of blocks: the first piece of a block, and the last if it is another.
  __device__ static long long BlockPlace(int block, bool last, int row) {
    return (2LL * block + last) * kDecodeTileRows + row;
  }
  // Makes a result, or a partial one, of what the warps have. All threads; ends with a barrier.
  __device__ void Finish(const Piece& piece, WarpState& state) {
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float mass = state.mass[t][h];
        mass += __shfl_xor_sync(kAllLanes, mass, 1);
        mass += __shfl_xor_sync(kAllLanes, mass, 2);
        if (lane_ % 4 == 0) {
          small_.top[warp_][16 * t + 8 * h + lane_ / 4] = state.top[t][h];
          small_.mass[warp_][16 * t + 8 * h + lane_ / 4] = mass;
        }
      }
    }
    __syncthreads();
    const bool planned = p_.plan != nullptr;
    const int first = planned ? 0 : line_.OwnerOf(piece.unit_begin);
    const int last = planned ? 0 : line_.OwnerOf(piece.unit_end - 1);
    const bool whole = !planned && first == last;
    const bool starts =
        first == static_cast<int>(blockIdx.x);  // a split unit that starts here is the block's last piece
    const int rows = RowsOf(piece);
    float* const merge = reinterpret_cast<float*>(turn_);
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
      const int tile_rows = min(16, rows - 16 * t);
      if (tile_rows <= 0) break;
      // As many warps at once as have room, in a fixed order.
      const int at_once = tile_rows <= 4 ? 4 : tile_rows <= 8 ? 2 : 1;
      for (int turn = 0; turn < kWarps / at_once; ++turn) {
        if (warp_ / at_once == turn) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = 8 * h + lane_ / 4;
            if (row >= tile_rows) continue;
            const float top = TotalOf(small_, 16 * t + row).top;
            const float factor = top == -CUDART_INF_F ? 0.0f : Exp2(state.top[t][h] - top);
            float* const to = merge + (warp_ % at_once * (16 / at_once) + row) * S::kMergeStride;
#pragma unroll
            for (int n = 0; n < WarpState::kColumns; ++n) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float* const x = to + WarpState::DimOf(n, e);
                *x = fmaf(state.sum[t][n][2 * h + e], factor, turn == 0 ? 0.0f : *x);
              }
            }
          }
        }
        __syncthreads();
      }
      for (int i = threadIdx.x; i < tile_rows * kVecs; i += kThreads) {
        const int row = i / kVecs, dim = i % kVecs * 4;
        float4 sum = {0, 0, 0, 0};
        for (int w = 0; w < at_once; ++w) {
          const float4 x = *reinterpret_cast<const float4*>(merge + (w * (16 / at_once) + row) * S::kMergeStride + dim);
          sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
        }
        const Total total = TotalOf(small_, 16 * t + row);
        if (whole) {
          WriteResult<T, kHeadDim>(p_, piece, 16 * t + row, dim, sum, total);
          continue;
        }
        const long long place = planned ? ItemPlace(piece, 16 * t + row) : BlockPlace(blockIdx.x, starts, 16 * t + row);
        float factor = total.mass != 0.0f ? 1.0f / total.mass : 0.0f;
        if (planned && p_.kv.v_scale != nullptr) factor *= *p_.kv.v_scale;
        *reinterpret_cast<float4*>(p_.partial_out + place * kHeadDim + dim) = Scaled(sum, factor);
        if (dim == 0) p_.partial_lse[place] = total.Lse();
      }
      __syncthreads();
    }
    if (planned || whole) return;
    if (threadIdx.x == 0) {
      __threadfence();
      const unsigned others = static_cast<unsigned>(last - first);
      // Wraps to zero with the last one. Only one split unit starts in a block, so the block's counter is the unit's.
      small_.is_last = atomicInc(p_.counters + first, others) == others;
      __threadfence();
    }
    __syncthreads();
    if (small_.is_last) Merge(piece, rows, first, last);
    __syncthreads();
  }

  // The partial results of blocks first … last, in that order.
  __device__ void Merge(const Piece& piece, int rows, int first, int last) {
    constexpr int kAtOnce = kMTiles == 1 ? 16 : 8;
    for (int i = threadIdx.x; i < rows * kVecs; i += kThreads) {
      const int row = i / kVecs, dim = i % kVecs * 4;
      Total total = {-CUDART_INF_F, 0.0f};
      float4 sum = {0, 0, 0, 0};
      for (int block = first; block <= last; block += kAtOnce) {
        float lse[kAtOnce];
        float4 part[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int from = min(block + j, last);  // no branch, so that all loads are under way at once
          const long long place = BlockPlace(from, from == first, row);
          lse[j] = __ldcg(p_.partial_lse + place);
          part[j] = __ldcg(reinterpret_cast<const float4*>(p_.partial_out + place * kHeadDim + dim));
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) lse[j] = block + j > last ? -CUDART_INF_F : lse[j];
        float top = total.top;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) top = fmaxf(top, lse[j]);
        const float safe = top == -CUDART_INF_F ? 0.0f : top;
        const float decay = Exp2(total.top - safe);
        total = {top, total.mass * decay};
        sum = Scaled(sum, decay);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const float weight = Exp2(lse[j] - safe);  // 0 of a part that attends nothing, and its values are 0 too
          total.mass += weight;
          sum = {fmaf(part[j].x, weight, sum.x), fmaf(part[j].y, weight, sum.y), fmaf(part[j].z, weight, sum.z),
                 fmaf(part[j].w, weight, sum.w)};
        }
      }
      WriteResult<T, kHeadDim>(p_, piece, row, dim, sum, total);
    }
  }

  // Rows without tiles are on nobody's part of the line.
  __device__ void ClearEmptyRows() {
    const long long heads = static_cast<long long>(p_.q_len) * p_.q_heads;
    for (int row = blockIdx.x; row < p_.rows; row += gridDim.x) {
      if (prefix_[row + 1] != prefix_[row]) continue;
      uint2* const out = reinterpret_cast<uint2*>(static_cast<T*>(p_.out) + row * heads * kHeadDim);
      for (long long i = threadIdx.x; i < heads * kVecs; i += kThreads) out[i] = {0, 0};
      if (p_.lse == nullptr) continue;
      for (long long i = threadIdx.x; i < heads; i += kThreads) p_.lse[row * heads + i].value = -CUDART_INF_F;
    }
  }

  const PagedDecodeParams& p_;
  unsigned char* const turn_;
  Small& small_;
  int* const prefix_;
  const int warp_, lane_;
  const unsigned ring_;
  Loader<S, Kv> loader_;
  Line line_;
  int end_ = 0, ahead_ = 0;
};

// Must not spill (cmake/hot_kernels.txt).
template <class T, class Kv, int kHeadDim, int kMTiles>
__global__ void __launch_bounds__(kThreads, DecodeBlocksPerMultiprocessor(kHeadDim))
    PagedDecodeMma(const __grid_constant__ PagedDecodeParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Block<T, Kv, kHeadDim, kMTiles>(p, shared).Run();
}

template <class T, class Kv, int kHeadDim, int kMTiles>
int LaunchMma(CUstream_st* stream, const PagedDecodeParams& params) {
  using S = Shape<Kv, kHeadDim, kMTiles>;
  void* arguments[] = {const_cast<PagedDecodeParams*>(&params)};
  const bool planned = params.plan != nullptr;
  const int group = params.q_heads / params.kv.kv_heads;
  const int units = params.kv.kv_heads * ((group * params.q_len + S::kRows - 1) / S::kRows);
  const dim3 grid(static_cast<unsigned>(planned ? params.max_items : params.blocks),
                  static_cast<unsigned>(planned ? units : 1));
  return cudaLaunchKernel(reinterpret_cast<const void*>(&PagedDecodeMma<T, Kv, kHeadDim, kMTiles>), grid,
                          dim3(kThreads), arguments, SharedBytes<S>(planned ? 0 : params.rows), stream);
}

template <class T, class Kv, int kHeadDim, int kMTiles>
int PrepareMma() {
  static_assert(SharedBytes<Shape<Kv, kHeadDim, kMTiles>>(512) * DecodeBlocksPerMultiprocessor(kHeadDim) <= 227 * 1024,
                "what a multiprocessor of sm_90 has");
  static_assert(SharedBytes<Shape<Kv, kHeadDim, kMTiles>>(DecodeMaxRows(kHeadDim)) <= DecodeMmaSharedBytes(kHeadDim));
  const auto kernel = PagedDecodeMma<T, Kv, kHeadDim, kMTiles>;
  const int error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, DecodeMmaSharedBytes(kHeadDim));
}

}  // namespace decode_mma

// Two m-tiles where a pass has more rows than one, and registers for them.
template <class T, class Kv, int kHeadDim>
int PagedDecodeCuda(CUstream_st* stream, const PagedDecodeParams& params) {
  if constexpr (kHeadDim <= 128) {
    if (params.q_heads / params.kv.kv_heads * params.q_len > 16) {
      return decode_mma::LaunchMma<T, Kv, kHeadDim, 2>(stream, params);
    }
  }
  return decode_mma::LaunchMma<T, Kv, kHeadDim, 1>(stream, params);
}

template <class T, class Kv, int kHeadDim>
int PagedDecodePrepare() {
  if constexpr (kHeadDim <= 128) {
    if (const int error = decode_mma::PrepareMma<T, Kv, kHeadDim, 2>(); error != cudaSuccess) return error;
  }
  return decode_mma::PrepareMma<T, Kv, kHeadDim, 1>();
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_MMA_CUH_
