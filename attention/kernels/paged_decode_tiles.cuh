// One tile in a warp: K and V stream into its ring of cp.async stages, the queries lie beside it, and products on
// tensor cores with an online softmax between them gather what the warp's tokens add.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_TILES_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_TILES_CUH_

#include <cuda_runtime.h>
#include <math_constants.h>

#include <cstdint>
#include <type_traits>

#include "attention/kernels/mma_sm80.cuh"
#include "attention/kernels/paged_decode.h"
#include "attention/kernels/paged_decode_schedule.cuh"

namespace pristine::attention {
namespace decode_mma {

// Rows of 16-byte chunks without bank conflicts for ldmatrix: eight rows at one chunk meet eight different bank groups.
template <int kChunks>
__device__ inline int Swizzle(int row, int chunk) {
  if constexpr (kChunks >= 8) return row * kChunks + (chunk ^ (row & 7));
  return row * kChunks + (chunk ^ ((row >> 1) & 3));
}

// Streams a warp's tokens into its ring, tile after tile, across pieces.
template <class S, class Kv>
class Loader {
 public:
  __device__ Loader(const DecodeLaunch& launch, unsigned ring, unsigned* attended)
      : launch_(launch), p_(launch.p), ring_(ring), attended_(attended) {}
  template <class Read = PlainRead>
  __device__ void Start(const Piece& piece, Read read = {}) {
    row_ = piece.row;
    kv_head_ = piece.kv_head;
    first_m_ = piece.first_m;
    pages_ = piece.pages;
    low_ = piece.low;
    high_ = piece.high;
    position_ = piece.tile * S::kTile + threadIdx.x / 32 * S::kTokens;
    left_ = piece.tiles;
    head_ = piece.kv_head * p_.kv.head_stride;
    page_ = LookUp(position_, read);
    next_page_ = left_ > 1 ? LookUp(position_ + S::kTile, read) : -1;
  }
  // The pages of the first two tiles.
  struct Pages {
    int first, second;
    __device__ bool operator!=(const Pages& other) const { return first != other.first || second != other.second; }
  };
  __device__ Pages first_pages() const { return {page_, next_page_}; }  // as Start found them
  __device__ Pages LookUpAgain() const {
    return {LookUp(position_, FreshRead()), left_ > 1 ? LookUp(position_ + S::kTile, FreshRead()) : -1};
  }
  // Asks for the first tile.
  __device__ void Hint() const {
    constexpr int kLines = (S::kRowBytes + 127) / 128;  // of a token's K or V
    if (page_ < 0 || page_ >= p_.kv.num_pages) return;
    const char* const k = static_cast<const char*>(p_.kv.k) + Own();
    const long long k_to_v = static_cast<const char*>(p_.kv.v) - static_cast<const char*>(p_.kv.k);
#pragma unroll
    for (int line = 0; line < kLines; line += 32 / S::kTokens) {
      const int own = line + threadIdx.x % 32 / S::kTokens;
      if (kLines % (32 / S::kTokens) != 0 && own >= kLines) return;
      PrefetchL2(k + own * 128);
      PrefetchL2(k + k_to_v + own * 128);
    }
  }
  __device__ int left() const { return left_; }
  // What PieceAfter takes of the piece that was started last.
  __device__ Piece piece() const {
    Piece piece;
    piece.row = row_;
    piece.kv_head = kv_head_;
    piece.first_m = first_m_;
    piece.pages = pages_;
    piece.length = high_;
    return piece;
  }

  // Queues the next tile, and looks up the pages of the second after it.
  __device__ void Load(int stage) {
    const int lane = threadIdx.x % 32;
    const bool valid = page_ >= 0 && page_ < p_.kv.num_pages;
    const unsigned attended = __ballot_sync(kAllLanes, valid) & S::kAll;
    if (lane == 0) attended_[stage] = attended;
    const long long own = Own();
    const char* const k = static_cast<const char*>(p_.kv.k);
    const long long k_to_v = static_cast<const char*>(p_.kv.v) - k;
    constexpr int kRowsAtOnce = 32 / S::kChunks;
    const int row = lane / S::kChunks, chunk = lane % S::kChunks;
    const unsigned to = ring_ + stage * 2 * S::kHalfStage + Swizzle<S::kChunks>(row, chunk) * 16;
    const unsigned mine = attended >> row;
    const auto copy = [&](int i, long long from) {  // to row i + `row`; its swizzle differs from row's in constant bits
      const bool takes = mine >> i & 1;
      const char* const at = k + (takes ? from + chunk * 16 : 0);
      const unsigned place = (to ^ (S::kChunks >= 8 ? i % 8 * 16 : 0)) + i * S::kRowBytes;
      CopyAsync(place, at, takes);
      CopyAsync(place + S::kHalfStage, at + k_to_v, takes);
    };
    if (p_.kv.page_size % 16 == 0) {
      // 16 tokens are in one page and a stride apart; any of them tells where.
      const long long stride = p_.kv.token_stride * int{sizeof(Kv)};
#pragma unroll
      for (int half = 0; half < S::kTokens; half += 16) {
        const int known = max(__ffs(attended >> half & 0xffffu) - 1, 0) + half;
        const long long first = __shfl_sync(kAllLanes, own, known) + (row - known) * stride;
#pragma unroll
        for (int i = half; i < half + 16; i += kRowsAtOnce) copy(i, first + i * stride);
      }
    } else {
#pragma unroll
      for (int i = 0; i < S::kTokens; i += kRowsAtOnce) {
        copy(i, __shfl_sync(kAllLanes, own, i + row));
      }
    }
    position_ += S::kTile;
    page_ = next_page_;
    if (--left_ > 1) next_page_ = LookUp(position_ + S::kTile, PlainRead());
  }

 private:
  // The page of this lane's token, of a tile whose share of this warp begins at `first`; -1 where there is none to look
  // at. It is not used before two more tiles are loaded, so nobody waits for it.
  template <class Read>
  __device__ int LookUp(int first, Read read) const {
    const int position = first + threadIdx.x % S::kTokens;
    if (position < low_ || position >= high_) return -1;
    return read(pages_ + launch_.by_page.Quotient(position));
  }
  // Bytes from the start of k to this lane's token of the next tile.
  __device__ long long Own() const {
    const int position = position_ + threadIdx.x % S::kTokens;
    const int in_page = position - launch_.by_page.Quotient(position) * p_.kv.page_size;
    return (page_ * p_.kv.page_stride + in_page * p_.kv.token_stride + head_) * int{sizeof(Kv)};
  }

  const DecodeLaunch& launch_;
  const PagedDecodeParams& p_;
  const unsigned ring_;
  unsigned* const attended_;
  const int32_t* pages_;
  long long head_;
  int row_, kv_head_, first_m_, low_, high_, position_, page_ = -1, next_page_ = -1, left_ = 0;
};

// The queries of a piece, [kRows, kHeadDim] in 16 bit and swizzled. For KV in 8 bits they become float16, each row
// divided by a power of two that keeps it in range, and each 16 elements in the order in which the loads of K bring
// theirs.
//
// Loaded into registers first, so that they are on their way while other things are.
template <int kHeadDim, int kMTiles>
struct Queries {
  uint4 x[kMTiles][kHeadDim / 64];  // 16-byte vectors of a thread; eight threads share a row
};
template <class T, int kHeadDim, int kMTiles>
__device__ inline void LoadQueries(const DecodeLaunch& launch, const Piece& piece,
                                   Queries<kHeadDim, kMTiles>& queries) {
#pragma unroll
  for (int tile = 0; tile < kMTiles; ++tile) {
    const int m = piece.first_m + tile * 16 + threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < kHeadDim / 64; ++i) queries.x[tile][i] = {0, 0, 0, 0};
    if (m >= launch.rows) continue;
    const T* const from = static_cast<const T*>(launch.p.q) + HeadPlace(launch, piece.row, piece.kv_head, m) * kHeadDim;
#pragma unroll
    for (int i = 0; i < kHeadDim / 64; ++i) {
      queries.x[tile][i] = reinterpret_cast<const uint4*>(from)[i * 8 + threadIdx.x % 8];
    }
  }
}
template <class T, class Kv, int kHeadDim, int kMTiles>
__device__ inline void StoreQueries(Queries<kHeadDim, kMTiles>& queries, unsigned char* shared, Small& small) {
  constexpr int kVecs = kHeadDim / 64;
#pragma unroll
  for (int tile = 0; tile < kMTiles; ++tile) {
    const int place = tile * 16 + threadIdx.x / 8;
    uint4(&x)[kVecs] = queries.x[tile];
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
// 16 t + lane / 4 + 8 * (e / 2), and to dimension 8 n + 2 (lane % 4) + e % 2; over KV in 8 bits, whose widening takes
// dimensions apart, to 16 (n / 2) + 4 (lane % 4) + 2 (e % 2) + n % 2.
template <class T, class Kv, int kHeadDim, int kMTiles>
struct State {
  using S = Shape<Kv, kHeadDim, kMTiles>;
  using Math = std::conditional_t<sizeof(Kv) == 1, Float16, T>;  // what is multiplied
  static constexpr int kColumns = kHeadDim / 8;

  float sum[kMTiles][kColumns][4];
  float top[kMTiles][2], mass[kMTiles][2];  // mass: of this lane's columns

  // The sums of a row, [kHeadDim].
  __device__ void Store(int t, int h, float* to) const {
    const int pair = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      const float* const even = sum[t][n] + 2 * h;
      const float* const odd = sum[t][n + 1] + 2 * h;
      if constexpr (sizeof(Kv) == 1) {
        *reinterpret_cast<float4*>(to + n * 8 + pair * 4) = {even[0], odd[0], even[1], odd[1]};
      } else {
        *reinterpret_cast<float2*>(to + n * 8 + pair * 2) = {even[0], even[1]};
        *reinterpret_cast<float2*>(to + n * 8 + 8 + pair * 2) = {odd[0], odd[1]};
      }
    }
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

}  // namespace decode_mma

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_TILES_CUH_
