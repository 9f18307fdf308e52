// A block at work, from pieces to results. It runs through the tiles of its pieces, then merges its warps' shares. Each
// piece becomes either the result of a whole unit, or a partial result (paged_decode_merge.cuh). What it does before
// the kernel ahead of it has ended, and how that is checked, is in Run and Prepare.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_BLOCK_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_BLOCK_CUH_

#include <cuda_runtime.h>
#include <math_constants.h>

#include <cstdint>

#include "attention/kernels/dependent_launch.cuh"
#include "attention/kernels/mma_sm80.cuh"
#include "attention/kernels/paged_decode.h"
#include "attention/kernels/paged_decode_merge.cuh"
#include "attention/kernels/paged_decode_schedule.cuh"
#include "attention/kernels/paged_decode_tiles.cuh"
#include "attention/kernels/plan_layout.h"
#include "attention/kernels/soft_cap.cuh"

namespace pristine::attention {
namespace decode_mma {

template <class S>
constexpr int SharedBytes(int rows) {
  return kWarps * S::kRing + S::kTurnBytes + static_cast<int>(sizeof(Small)) +
         S::kKept * static_cast<int>(sizeof(KeptRow)) + 4 * (rows + 1);
}

template <class T, class Kv, int kHeadDim, int kMTiles>
class Block {
 public:
  using S = Shape<Kv, kHeadDim, kMTiles>;
  using WarpState = State<T, Kv, kHeadDim, kMTiles>;
  static constexpr int kVecs = kHeadDim / 4;                 // float4 of a row
  static constexpr bool kIsFull = kMTiles * kHeadDim > 128;  // of registers, by the sums alone
  using MergerOf = Merger<T, kHeadDim>;

  __device__ Block(const DecodeLaunch& launch, unsigned char* shared)
      : launch_(launch),
        p_(launch.p),
        shared_(shared),
        turn_(shared + kWarps * S::kRing),
        small_(*reinterpret_cast<Small*>(turn_ + S::kTurnBytes)),
        kept_(reinterpret_cast<KeptRow*>(&small_ + 1)),
        prefix_(reinterpret_cast<int*>(kept_ + S::kKept)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        ring_(SharedAddress(shared) + warp_ * S::kRing),
        loader_(launch, ring_, small_.attended[warp_]),
        merger_(launch, small_, reinterpret_cast<float*>(turn_)) {}

  // Where the code waits, the block's part, its first piece and that one's pages are a guess, made while the kernel
  // ahead may still write the page table; once more where the guess was wrong. Queries, keys, values and scales are
  // read behind the wait alone.
  __device__ void Run() {
    LetNextBegin();  // all blocks fit on the device: what comes next takes none of their places
    line_.prefix = prefix_;
    line_.kept = kept_;
    const bool planned = p_.plan != nullptr;
    bool guesses = !planned && p_.begins_early;
    if (!guesses) WaitForStream();
    Piece piece;
    if (planned) BeginItem(piece);
#pragma unroll 1
    for (;;) {
      if (!planned) Begin(piece);
      loader_.Start(piece, FreshRead());
      if (guesses) {
        loader_.Hint();
        WaitForStream();
      }
      if (!Prepare(piece, guesses)) break;
      guesses = false;
    }
    if (piece.tiles > 0) RunPieces(piece);  // here alone: code that is there twice takes longer to be fetched
    if (!planned) ClearEmptyRows();
  }

 private:
  // Where there is nothing to do.
  __device__ Piece NoPiece() const {
    Piece piece = {};
    piece.row = -1;
    piece.first_m = launch_.rows;
    return piece;
  }
  // Finds the block's part of the line and its first piece.
  __device__ void Begin(Piece& piece) {
    const int like = ScanRows<S>(p_, prefix_, kept_, small_);
    line_.Divide(launch_, like, blockIdx.x, gridDim.x);
    piece = line_.begin < line_.end ? PieceAt<S>(launch_, line_, line_.begin) : NoPiece();
  }
  // Whether the page table is not what the guess was made of, as far as it matters to this block. `words`: of this
  // thread's first row, read again.
  __device__ bool Changed(const Piece& piece, RowWords words) const {
    bool changed = false;
#pragma unroll 1
    for (int row = threadIdx.x; row < p_.rows;) {
      const RowPages pages = Clipped(p_.kv, row, words);
      const int length = LengthOf(pages);
      if (row < S::kKept) {
        changed |= kept_[row] != KeptRow{static_cast<int>(pages.first), length};
      } else {
        changed |= TilesOf<S::kTile>(p_, length) != prefix_[row + 1] - prefix_[row];
        if (row == piece.row) changed |= length != piece.length || p_.kv.pages + pages.first != piece.pages;
      }
      row += kThreads;
      if (row < p_.rows) words = ReadRow(p_.kv, row, FreshRead());
    }
    return changed;
  }

  // The plan's item instead.
  __device__ void BeginItem(Piece& piece) {
    line_.begin = line_.end = 0;
    piece = NoPiece();
    const int item = blockIdx.x;
    if (item >= min(p_.plan[kPlanCount], p_.max_items)) return;
    const int32_t* const work = p_.plan + PlanItemsAt(p_.rows) + 3LL * item;
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
      piece = NoPiece();
      return;
    }
    piece.tile = piece.low / S::kTile;
    piece.tiles = (piece.high + S::kTile - 1) / S::kTile - piece.tile;
    line_.end = piece.tiles;
  }

  // Loads run ahead of the work by stages - 1 tiles, into the next pieces too.
  __device__ void LoadNext(int stage) {
    if (loader_.left() > 0) loader_.Load(stage);
    CommitAsync();  // an empty group, too, counts
    // The next piece a tile early, so that nobody waits for its first look-ups.
    if (__builtin_expect(loader_.left() == 0 && ahead_ < line_.end, 0)) {
      const Piece piece = PieceAfter<S>(launch_, line_, loader_.piece(), ahead_);
      ahead_ += piece.tiles;
      loader_.Start(piece);
    }
  }

  // Has the first tiles on their way and the queries in shared memory. The loader is at the first piece's start. Where
  // that was `guessed`, what the guess was made of is read again ahead of all else, and compared behind all that need
  // not wait for it: what was loaded by a wrong guess is in the pool, too. True if it has changed; nothing was used or
  // written.
  __device__ bool Prepare(const Piece& piece, bool guessed) {
    RowWords words = {};
    const typename Loader<S, Kv>::Pages pages = loader_.first_pages();
    typename Loader<S, Kv>::Pages again = pages;
    if (guessed) {
      if (threadIdx.x < p_.rows) words = ReadRow(p_.kv, threadIdx.x, FreshRead());
      again = loader_.LookUpAgain();
    }
    Queries<kHeadDim, kMTiles> queries;
    LoadQueries<T>(launch_, piece, queries);
    ahead_ = line_.begin + piece.tiles;
#pragma unroll 1
    for (int stage = 0; stage < S::kStages - 1; ++stage) LoadNext(stage);
    const bool changed = guessed && (pages != again || Changed(piece, words));
    StoreQueries<T, Kv>(queries, turn_, small_);
    // All threads have the same answer. Only of a warp's reduction does the compiler know that: else it takes what
    // follows for divergent, in half as much code again.
    if (__reduce_or_sync(kAllLanes, __syncthreads_or(changed)) == 0) return false;
    WaitAsync<0>();
    return true;
  }

  // From the first piece on.
  __device__ void RunPieces(Piece piece) {
    const ScoreScale scale = ScoreScaleOf(p_);
    WarpState state;
    int stage = 0;
    for (int at = line_.begin;;) {
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
      // The next queries are on their way meanwhile, where there are registers for them.
      Queries<kHeadDim, kMTiles> queries;
      Piece next;
      if (!kIsFull && at < line_.end) {
        next = PieceAfter<S>(launch_, line_, piece, at);
        LoadQueries<T>(launch_, next, queries);
      }
      Finish(piece, state, at >= line_.end);
      if (at >= line_.end) return;
      if (kIsFull) {
        next = PieceAfter<S>(launch_, line_, piece, at);
        LoadQueries<T>(launch_, next, queries);
      }
      piece = next;
      StoreQueries<T, Kv>(queries, turn_, small_);
      __syncthreads();
    }
  }

  __device__ static void Cap(float outer, float (&score)[kMTiles][S::kTokens / 8][4]) {
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
      for (int n = 0; n < S::kTokens / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) score[t][n][e] = SoftCap(score[t][n][e], outer, kTanhRate);
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
  // Makes a result, or a partial one, of what the warps have. All threads; ends with a barrier. The last piece's warps
  // leave their sums in their rings, which are empty by then, others a few rows at a time.
  __device__ void Finish(const Piece& piece, WarpState& state, bool is_last) {
    const int rows = RowsOf(piece);
    const int at_once = is_last ? S::kRows : 4;
    const int share = !is_last || rows <= 4 ? 32 : rows <= 8 ? 16 : 8;  // threads of a row
    float* const sums = reinterpret_cast<float*>(is_last ? shared_ : turn_);
    const int warp_stride = is_last ? S::kRing / 4 : 4 * S::kMergeStride;
    const bool planned = p_.plan != nullptr;
    const bool whole = piece.first_block == piece.last_block;
    const float v_scale = p_.kv.v_scale == nullptr ? 1.0f : *p_.kv.v_scale;
    // A split unit that begins here is the block's last piece.
    const int slot = planned || whole ? -1 : MergerOf::SlotOf(piece.first_block == static_cast<int>(blockIdx.x));
    const int target_row = planned ? static_cast<int>(blockIdx.x) : piece.row;
    const Target target = {
        .is_result = !planned && whole, .slot = slot, .row = target_row, .scale = slot < 0 ? v_scale : 1.0f};
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float mass = state.mass[t][h];
        mass += __shfl_xor_sync(kAllLanes, mass, 1);
        mass += __shfl_xor_sync(kAllLanes, mass, 2);
        if (lane_ % 4 == 0) {
          small_.top[16 * t + 8 * h + lane_ / 4][warp_] = state.top[t][h];
          small_.merged[16 * t + 8 * h + lane_ / 4].mass[warp_] = mass;
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < rows) {
      // They become the weights of the warps' sums.
      float(&tops)[kWarps] = small_.top[threadIdx.x];
      float top = tops[0], mass = 0.0f, weight[kWarps];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w]);
      const float safe = top == -CUDART_INF_F ? 0.0f : top;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        weight[w] = Exp2(tops[w] - safe);
        mass = fmaf(small_.merged[threadIdx.x].mass[w], weight[w], mass);
      }
      const auto settled = merger_.Settle(piece, target, threadIdx.x, top, mass, true);
      small_.merged[threadIdx.x].place = settled.place;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) tops[w] = weight[w] * settled.factor;
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
#pragma unroll 1
      for (int row = first + threadIdx.x / share; row < min(first + at_once, rows); row += kThreads / share) {
#pragma unroll 1
        for (int dim = threadIdx.x % share * 4; dim < kHeadDim; dim += share * 4) {
          float4 sum = {0, 0, 0, 0};
#pragma unroll
          for (int w = 0; w < kWarps; ++w) {
            const float* const from = sums + w * warp_stride + (row - first) * S::kMergeStride + dim;
            AddScaled(sum, *reinterpret_cast<const float4*>(from), small_.top[row][w]);
          }
          merger_.Write(target.is_result, small_.merged[row].place, dim, sum);
        }
      }
      __syncthreads();
    }
    if (slot < 0) return;
    merger_.Deliver(piece, rows, v_scale);
    __syncthreads();
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
  KeptRow* const kept_;
  int* const prefix_;
  const int warp_, lane_;
  const unsigned ring_;
  Loader<S, Kv> loader_;
  const MergerOf merger_;
  Line line_;
  int ahead_ = 0;
};

}  // namespace decode_mma

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_BLOCK_CUH_
