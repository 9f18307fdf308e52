// A block at work, from pieces to results. It runs through the tiles of its pieces, then merges its warps' shares. Each
// piece becomes either the result of a whole unit, or a partial result, which the last of a unit's blocks to arrive
// merges, always in the blocks' order.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_BLOCK_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_BLOCK_CUH_

#include <cuda_runtime.h>
#include <math_constants.h>

#include <cstdint>

#include "attention/kernels/mma_sm80.cuh"
#include "attention/kernels/paged_decode.h"
#include "attention/kernels/paged_decode_schedule.cuh"
#include "attention/kernels/paged_decode_tiles.cuh"
#include "attention/kernels/plan_layout.h"

namespace pristine::attention {
namespace decode_mma {

constexpr float kLog2E = 1.44269504088896340736f;

template <class S>
constexpr int SharedBytes(int rows) {
  return kWarps * S::kRing + S::kTurnBytes + static_cast<int>(sizeof(Small)) + 4 * (rows + 1);
}

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

}  // namespace decode_mma

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_BLOCK_CUH_
