// A block at work, from pieces to results. It runs through the tiles of its pieces, then merges its warps' shares. Each
// piece becomes either the result of a whole unit, or a partial result, which the last of a unit's blocks to arrive
// merges, always in the blocks' order. What it does before the kernel ahead of it has ended is in Begin and Hint.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_BLOCK_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_BLOCK_CUH_

#include <cuda_runtime.h>
#include <math_constants.h>

#include <cstdint>

#include "attention/kernels/dependent_launch.cuh"
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

// What became of one row of a piece. The top of scores that are all NaN is -inf, too: only the mass tells them from
// nothing to attend.
struct Total {
  float top, mass;
  __device__ float Lse() const { return mass == 0.0f ? -CUDART_INF_F : top + log2f(mass); }
};

__device__ inline void AddScaled(float4& sum, float4 x, float factor) {
  sum = {fmaf(x.x, factor, sum.x), fmaf(x.y, factor, sum.y), fmaf(x.z, factor, sum.z), fmaf(x.w, factor, sum.w)};
}
__device__ inline float4 Scaled(float4 x, float factor) {
  return {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
}

// One head's result: four dimensions of it, and its LSE from the thread that has the first ones. `sum` is over
// total.mass at total.top.
template <class T, int kHeadDim>
__device__ inline void WriteResult(const DecodeLaunch& launch, const Piece& piece, int row, int dim, float4 sum,
                                   Total total) {
  const PagedDecodeParams& p = launch.p;
  const long long place = HeadPlace(launch, piece.row, piece.kv_head, piece.first_m + row);
  float factor = 0.0f;
  if (total.mass != 0.0f) {
    factor = p.kv.v_scale == nullptr ? 1.0f : *p.kv.v_scale;
    if (p.sinks != nullptr) {
      const float sink = p.sinks[place % p.q_heads] * kLog2E;
      const float top = fmaxf(total.top, sink);
      const float decay = Exp2(total.top - top);
      total = {top, fmaf(total.mass, decay, Exp2(sink - top))};
      factor *= decay;
    }
    factor /= total.mass;
  }
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

  __device__ Block(const DecodeLaunch& launch, unsigned char* shared)
      : launch_(launch),
        p_(launch.p),
        shared_(shared),
        turn_(shared + kWarps * S::kRing),
        small_(*reinterpret_cast<Small*>(turn_ + S::kTurnBytes)),
        prefix_(reinterpret_cast<int*>(&small_ + 1)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        ring_(SharedAddress(shared) + warp_ * S::kRing),
        loader_(launch, ring_, small_.attended[warp_]) {}

  __device__ void Run() {
    LetNextBegin();  // all blocks fit on the device: what comes next takes none of their places
    line_.prefix = prefix_;
    if (p_.plan != nullptr) {
      WaitForStream();
      RunItem();
      return;
    }
    int begin;
    Piece piece;
    Begin(begin, piece);
    if (begin < end_) RunPieces(begin, piece);
    ClearEmptyRows();
  }

 private:
  // Finds the block's part of the line and its first piece, and has the loader at its start. Early it is a guess,
  // which is checked after the wait, together with the first look-ups, and made anew where it was wrong.
  __device__ void Begin(int& begin, Piece& piece) {
    bool waited = !p_.begins_early;
    if (waited) WaitForStream();
#pragma unroll 1
    for (;;) {
      const int filled = ScanRows<S::kTile>(p_, prefix_, small_);
      line_.Divide(launch_, filled, gridDim.x);
      const bool works = static_cast<int>(blockIdx.x) < line_.blocks;
      begin = end_ = 0;
      piece.row = -1;
      if (works) {
        begin = line_.BeginOf(blockIdx.x);
        end_ = line_.BeginOf(blockIdx.x + 1);
        piece = PieceAt<S>(launch_, line_, begin, end_);
      }
      if (!waited && works) Hint(piece);
      if (!waited) WaitForStream();
      if (works) loader_.Start(piece);
      if (waited || !__syncthreads_or(Changed(piece))) return;
      waited = true;
    }
  }
  // Asks for a piece's first tiles. A guess may name anything: what is asked for is in the pool.
  __device__ void Hint(const Piece& piece) const {
    constexpr int kLines = (S::kRowBytes + 127) / 128;                    // of a token's K or V
    constexpr int kEach = (S::kTile * kLines + kThreads - 1) / kThreads;  // of a thread and tile
    int page[kHintTiles * kEach];
    const auto position_of = [&](int i) {
      return (piece.tile + i / kEach) * S::kTile + (threadIdx.x + i % kEach * kThreads) / kLines;
    };
#pragma unroll
    for (int i = 0; i < kHintTiles * kEach; ++i) {
      const int position = position_of(i);
      const bool is_there = i / kEach < piece.tiles && position >= piece.low && position < piece.high;
      page[i] = is_there ? FreshRead()(piece.pages + launch_.by_page.Quotient(position)) : -1;
    }
#pragma unroll
    for (int i = 0; i < kHintTiles * kEach; ++i) {
      if (page[i] < 0 || page[i] >= p_.kv.num_pages) continue;
      const int position = position_of(i);
      const int in_page = position - launch_.by_page.Quotient(position) * p_.kv.page_size;
      const long long at =
          (page[i] * p_.kv.page_stride + in_page * p_.kv.token_stride + piece.kv_head * p_.kv.head_stride) *
              int{sizeof(Kv)} +
          threadIdx.x % kLines * 128;
      PrefetchL2(static_cast<const char*>(p_.kv.k) + at);
      PrefetchL2(static_cast<const char*>(p_.kv.v) + at);
    }
  }
  // Whether the page table is not what the guess was made of, as far as it matters to this block.
  __device__ bool Changed(const Piece& piece) const {
    bool changed = false;
    for (int row = threadIdx.x; row < p_.rows; row += kThreads) {
      const RowPages pages = PagesOf(p_.kv, row, FreshRead());
      const int length = LengthOf(pages);
      changed |= TilesOf<S::kTile>(p_, length) != prefix_[row + 1] - prefix_[row];
      if (row == piece.row) changed |= length != piece.length || p_.kv.pages + pages.first != piece.pages;
    }
    return changed;
  }

  __device__ void RunItem() {
    const int item = blockIdx.x;
    if (item >= min(p_.plan[kPlanCount], p_.max_items)) return;
    const int32_t* const work = p_.plan + PlanItemsAt(p_.rows) + 3LL * item;
    Piece piece = {};
    piece.row = work[0];
    piece.kv_head = launch_.by_passes.Quotient(blockIdx.y);
    piece.first_m = (blockIdx.y - piece.kv_head * launch_.passes) * S::kRows;
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
    loader_.Start(piece);
    RunPieces(0, piece);
  }

  // Loads run ahead of the work by stages - 1 tiles, into the next pieces too.
  __device__ void LoadNext(int stage) {
    if (__builtin_expect(loader_.left() == 0 && ahead_ < end_, 0)) {
      const Piece piece = PieceAt<S>(launch_, line_, ahead_, end_);
      ahead_ += piece.tiles;
      loader_.Start(piece);
    }
    if (loader_.left() > 0) loader_.Load(stage);
    CommitAsync();  // an empty group, too, counts
  }

  // The loader is at the first piece's start.
  __device__ void RunPieces(int begin, Piece piece) {
    Queries<kHeadDim, kMTiles> queries;
    LoadQueries<T>(launch_, piece, queries);
    ahead_ = begin + piece.tiles;
    for (int stage = 0; stage < S::kStages - 1; ++stage) LoadNext(stage);
    const ScoreScale scale = ScoreScaleOf(p_);
    WarpState state;
    int stage = 0;
    for (int at = begin;;) {
      StoreQueries<T, Kv>(queries, turn_, small_);
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
      Finish(piece, state, at >= end_);
      if (at >= end_) return;
      piece = PieceAt<S>(launch_, line_, at, end_);
      LoadQueries<T>(launch_, piece, queries);
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
    const int window = p_.window == 0 ? 0x7fffffff : p_.window;
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int query = launch_.by_group.Quotient(piece.first_m + 16 * t + 8 * h + lane_ / 4);
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

  __device__ int RowsOf(const Piece& piece) const { return min(S::kRows, launch_.rows - piece.first_m); }
  // Of a piece's row among an item's partial results.
  __device__ long long ItemPlace(const Piece& piece, int row) const {
    return HeadPlace(launch_, blockIdx.x, piece.kv_head, piece.first_m + row);
  }
  // Of a piece's row among the partial results of blocks: first those that begin a unit, then those that go on with
  // one.
  __device__ long long BlockPlace(int block, bool begins, int row) const {
    return (begins ? block : static_cast<long long>(gridDim.x) + block) * kDecodeTileRows + row;
  }

  // Makes a result, or a partial one, of what the warps have. All threads; ends with a barrier. The last piece's warps
  // leave their sums in their rings, which are empty by then, others a few rows at a time.
  __device__ void Finish(const Piece& piece, WarpState& state, bool is_last) {
    const int rows = RowsOf(piece);
    const int at_once = is_last ? S::kRows : 4;
    const int share = !is_last || rows <= 4 ? 32 : rows <= 8 ? 16 : 8;  // threads of a row
    float* const sums = reinterpret_cast<float*>(is_last ? shared_ : turn_);
    const int warp_stride = is_last ? S::kRing / 4 : 4 * S::kMergeStride;
    const bool planned = p_.plan != nullptr;
    const bool whole = !planned && piece.first_block == piece.last_block;
    // A split unit that begins here is the block's last piece.
    const bool begins = piece.first_block == static_cast<int>(blockIdx.x);
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
    if (is_last) {
      __syncwarp();
    } else {
      __syncthreads();  // the queries lie where the sums go
    }
    for (int first = 0; first < rows; first += at_once) {
#pragma unroll
      for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = 16 * t + 8 * h + lane_ / 4;
          if (row < first || row >= min(first + at_once, rows)) continue;
          state.Store(t, h, sums + warp_ * warp_stride + (row - first) * S::kMergeStride);
        }
      }
      __syncthreads();
      for (int row = first + threadIdx.x / share; row < min(first + at_once, rows); row += kThreads / share) {
        Total total = {-CUDART_INF_F, 0.0f};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total.top = fmaxf(total.top, small_.top[w][row]);
        const float safe = total.top == -CUDART_INF_F ? 0.0f : total.top;
        float weight[kWarps];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          weight[w] = Exp2(small_.top[w][row] - safe);
          total.mass = fmaf(small_.mass[w][row], weight[w], total.mass);
        }
        for (int dim = threadIdx.x % share * 4; dim < kHeadDim; dim += share * 4) {
          float4 sum = {0, 0, 0, 0};
#pragma unroll
          for (int w = 0; w < kWarps; ++w) {
            const float* const from = sums + w * warp_stride + (row - first) * S::kMergeStride + dim;
            AddScaled(sum, *reinterpret_cast<const float4*>(from), weight[w]);
          }
          if (whole) {
            WriteResult<T, kHeadDim>(launch_, piece, row, dim, sum, total);
          } else {
            const long long place = planned ? ItemPlace(piece, row) : BlockPlace(blockIdx.x, begins, row);
            float factor = total.mass != 0.0f ? 1.0f / total.mass : 0.0f;
            if (planned && p_.kv.v_scale != nullptr) factor *= *p_.kv.v_scale;
            *reinterpret_cast<float4*>(p_.partial_out + place * kHeadDim + dim) = Scaled(sum, factor);
            if (dim == 0) p_.partial_lse[place] = total.Lse();
          }
        }
      }
      __syncthreads();
    }
    if (planned || whole) return;
    if (threadIdx.x == 0) {
      // Wraps to zero with the last one. Only one split unit begins in a block, so the block's counter is the unit's.
      const unsigned others = static_cast<unsigned>(piece.last_block - piece.first_block);
      small_.is_last = IncrementAcqRel(p_.counters + piece.first_block, others) == others;
    }
    __syncthreads();
    if (small_.is_last) {
      if (rows <= 8) {
        Merge<1>(piece, rows);
      } else {
        Merge<4>(piece, rows);
      }
    }
    __syncthreads();
  }

  // The partial results of a unit's blocks, in their order. A thread has kItems results in hand, with a load for each
  // of kAtOnce blocks under way.
  template <int kItems>
  __device__ void Merge(const Piece& piece, int rows) {
    constexpr int kAtOnce = 16 / kItems / kMTiles;
    const int items = rows * kVecs;
    for (int i = threadIdx.x; i < items; i += kItems * kThreads) {
      // The first block's part lies apart, the others' one after the other.
      Total total[kItems];
      float4 sum[kItems];
      const float* lses[kItems];
      const float* parts[kItems];
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int row = min(i + k * kThreads, items - 1) / kVecs, dim = i % kVecs * 4;
        const long long first = BlockPlace(piece.first_block, true, row);
        const long long next = BlockPlace(piece.first_block + 1, false, row);
        total[k].top = __ldcg(p_.partial_lse + first);
        sum[k] = __ldcg(reinterpret_cast<const float4*>(p_.partial_out + first * kHeadDim + dim));
        lses[k] = p_.partial_lse + next;
        parts[k] = p_.partial_out + next * kHeadDim + dim;
      }
#pragma unroll
      for (int k = 0; k < kItems; ++k) total[k].mass = total[k].top == -CUDART_INF_F ? 0.0f : 1.0f;
      for (int left = piece.last_block - piece.first_block; left > 0; left -= kAtOnce) {
        float lse[kItems][kAtOnce];
        float4 part[kItems][kAtOnce];
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            lse[k][j] = -CUDART_INF_F;
            part[k][j] = {0, 0, 0, 0};
            LoadIf(j < left, lses[k] + j * kDecodeTileRows, lse[k][j]);
            LoadIf(j < left, parts[k] + j * kDecodeTileRows * kHeadDim, part[k][j]);
          }
          lses[k] += kAtOnce * kDecodeTileRows;
          parts[k] += kAtOnce * kDecodeTileRows * kHeadDim;
        }
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
          float top = total[k].top;
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) top = fmaxf(top, lse[k][j]);
          const float safe = top == -CUDART_INF_F ? 0.0f : top;
          const float decay = Exp2(total[k].top - safe);
          total[k] = {top, total[k].mass * decay};
          sum[k] = Scaled(sum[k], decay);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const float weight = Exp2(lse[k][j] - safe);  // 0 of a part that attends nothing; its values are 0, too
            total[k].mass += weight;
            AddScaled(sum[k], part[k][j], weight);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int item = i + k * kThreads;
        if (item < items) WriteResult<T, kHeadDim>(launch_, piece, item / kVecs, item % kVecs * 4, sum[k], total[k]);
      }
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

  const DecodeLaunch& launch_;
  const PagedDecodeParams& p_;
  unsigned char* const shared_;  // the warps' rings
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
