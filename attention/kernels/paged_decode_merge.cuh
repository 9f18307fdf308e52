// Merging. A unit's blocks leave partial results, and whoever comes last merges them, always in the blocks' order: all
// at once, or, where there is much to merge, those of a group of neighbours, and then those of the groups.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_MERGE_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_MERGE_CUH_

#include <cuda_runtime.h>
#include <math_constants.h>

#include <cstdint>

#include "attention/kernels/mma_sm80.cuh"
#include "attention/kernels/paged_decode.h"
#include "attention/kernels/paged_decode_schedule.cuh"

namespace pristine::attention {
namespace decode_mma {

constexpr float kLog2E = 1.44269504088896340736f;

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

// kIsFull: few registers are left.
template <class T, int kHeadDim, bool kIsFull>
class Merger {
 public:
  static constexpr int kVecs = kHeadDim / 4;  // float4 of a row

  // `is_last`: in shared memory.
  __device__ Merger(const DecodeLaunch& launch, int& is_last) : launch_(launch), p_(launch.p), is_last_(is_last) {}

  // Of a piece's row among the partial results of blocks: first those that begin a unit, then those that go on with
  // one.
  __device__ static long long Place(int block, bool begins, int row) {
    return (begins ? block : static_cast<long long>(gridDim.x) + block) * kDecodeTileRows + row;
  }

  // Four dimensions of a partial result, and its LSE from the thread that has the first ones.
  __device__ void WritePartial(long long place, int dim, float4 sum, Total total, float scale) const {
    const float factor = total.mass != 0.0f ? scale / total.mass : 0.0f;
    *reinterpret_cast<float4*>(p_.partial_out + place * kHeadDim + dim) = Scaled(sum, factor);
    if (dim == 0) p_.partial_lse[place] = total.Lse();
  }

  // A block's part of a split unit is there. Where there is much to merge, the last of a group of neighbours makes one
  // partial result of theirs, in the first one's place, and the last of the groups the result.
  __device__ void Deliver(const Piece& piece, int rows, bool begins) const {
    const int parts = piece.last_block - piece.first_block + 1;
    // Only one split unit begins in a block, and it goes on with only one, so the counters of a block's two places are
    // a unit's own: where groups begin, the group's; in the unit's second block, which begins none, that of groups.
    uint32_t* const going_on = p_.counters + gridDim.x;
    uint32_t* counter = p_.counters + piece.first_block;
    int all = parts;
    Parts some = {piece.first_block, true, piece.first_block + 1, 1, parts};
    bool whole = parts * rows <= kFlatRows;
    const int size = parts <= 16 ? 4 : parts <= 80 ? 8 : 16;  // about the root
    if (!whole) {
      const int group = (static_cast<int>(blockIdx.x) - piece.first_block) / size;
      const int first = piece.first_block + group * size;
      counter = (group == 0 ? p_.counters : going_on) + first;
      all = min(size, piece.last_block - first + 1);
      some = {first, group == 0, first + 1, 1, all};
    }
#pragma unroll 1
    for (;;) {
      if (!ComesLast(counter, all)) return;
      Merge(piece, rows, some, whole);
      if (whole) return;
      __syncthreads();
      counter = going_on + piece.first_block + 1;
      all = (parts + size - 1) / size;
      some = {piece.first_block, true, piece.first_block + size, size, all};
      whole = true;
    }
  }

 private:
  // Whether this block is the last of `all` to count here; the counter is then zero again. All threads; what they
  // wrote before a barrier is seen by the last.
  __device__ bool ComesLast(uint32_t* counter, int all) const {
    if (threadIdx.x == 0) {
      const unsigned others = static_cast<unsigned>(all) - 1;
      is_last_ = IncrementAcqRel(counter, others) == others;
    }
    __syncthreads();
    return is_last_;
  }

  // Partial results of one unit, `count` of them: the first, and others `step` blocks apart, which go on with the unit.
  struct Parts {
    int first;
    bool begins;  // the first
    int next, step, count;
  };
  // In the parts' order, to a result, or to a partial one in the first's place.
  __device__ void Merge(const Piece& piece, int rows, const Parts& parts, bool whole) const {
    if constexpr (kIsFull) {
      MergeFew<4, 2>(piece, rows, parts, whole);
    } else if (rows > 8) {
      MergeFew<4, 4>(piece, rows, parts, whole);
    } else if (parts.count <= 16) {
      MergeFew<1, 16>(piece, rows, parts, whole);
    } else {
      MergeMany<16>(piece, rows, parts, whole);
    }
  }
  // A thread has kItems results in hand, with a load for each of kAtOnce parts under way.
  template <int kItems, int kAtOnce>
  __device__ void MergeFew(const Piece& piece, int rows, const Parts& parts, bool whole) const {
    const int items = rows * kVecs;
    const int step = parts.step * kDecodeTileRows;
    for (int base = 0; base < items; base += kItems * kThreads) {
      Total total[kItems];
      float4 sum[kItems];
      const float* lses[kItems];
      const float* values[kItems];
      const int i = base + threadIdx.x, dim = i % kVecs * 4;
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int row = min(i + k * kThreads, items - 1) / kVecs;
        const long long first = Place(parts.first, parts.begins, row);
        const long long next = Place(parts.next, false, row);
        total[k].top = __ldcg(p_.partial_lse + first);
        sum[k] = __ldcg(reinterpret_cast<const float4*>(p_.partial_out + first * kHeadDim + dim));
        lses[k] = p_.partial_lse + next;
        values[k] = p_.partial_out + next * kHeadDim + dim;
      }
#pragma unroll
      for (int k = 0; k < kItems; ++k) total[k].mass = total[k].top == -CUDART_INF_F ? 0.0f : 1.0f;
      for (int left = parts.count - 1; left > 0; left -= kAtOnce) {
        float lse[kItems][kAtOnce];
        float4 value[kItems][kAtOnce];
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            lse[k][j] = -CUDART_INF_F;
            value[k][j] = {0, 0, 0, 0};
            LoadIf(j < left, lses[k] + j * step, lse[k][j]);
            LoadIf(j < left, values[k] + j * step * kHeadDim, value[k][j]);
          }
          lses[k] += kAtOnce * step;
          values[k] += kAtOnce * step * kHeadDim;
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
            AddScaled(sum[k], value[k][j], weight);
          }
        }
      }
      if (!whole) __syncthreads();  // a row's first LSE is read by others, too
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int item = i + k * kThreads;
        if (item < items) WriteMerged(piece, parts, whole, item / kVecs, dim, sum[k], total[k]);
      }
    }
  }
  // The same for few rows: lanes that share a row have the weight of a part each.
  template <int kAtOnce>
  __device__ void MergeMany(const Piece& piece, int rows, const Parts& parts, bool whole) const {
    constexpr int kTeam = kVecs < 32 ? kVecs : 32;
    const int lane = threadIdx.x % kTeam, dim = threadIdx.x % kVecs * 4;
    const int step = parts.step * kDecodeTileRows;
    for (int base = 0; base < rows; base += kThreads / kVecs) {
      const int row = min(base + static_cast<int>(threadIdx.x) / kVecs, rows - 1);
      const long long first = Place(parts.first, parts.begins, row);
      const long long next = Place(parts.next, false, row) - step;
      Total total = {-CUDART_INF_F, 0.0f};
      float4 sum = {0, 0, 0, 0};
      for (int done = 0; done < parts.count; done += kTeam) {
        const int here = min(kTeam, parts.count - done);
        float weight = -CUDART_INF_F;  // of part done + lane
        LoadIf(lane < here, p_.partial_lse + (done + lane == 0 ? first : next + (done + lane) * step), weight);
        for (int some = 0; some < here; some += kAtOnce) {
          float4 value[kAtOnce];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const int part = done + some + j;
            const long long place = j == 0 && part == 0 ? first : next + part * step;
            value[j] = {0, 0, 0, 0};
            LoadIf(some + j < here, p_.partial_out + place * kHeadDim + dim, value[j]);
          }
          if (some == 0) {
            float top = fmaxf(weight, total.top);
#pragma unroll
            for (int lanes = 1; lanes < kTeam; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
            const float safe = top == -CUDART_INF_F ? 0.0f : top;
            const float decay = Exp2(total.top - safe);
            weight = Exp2(weight - safe);
            float gained = weight;
#pragma unroll
            for (int lanes = 1; lanes < kTeam; lanes *= 2) gained += __shfl_xor_sync(kAllLanes, gained, lanes);
            total = {top, fmaf(total.mass, decay, gained)};
            sum = Scaled(sum, decay);
          }
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            AddScaled(sum, value[j], __shfl_sync(kAllLanes, weight, some + j, kTeam));
          }
        }
      }
      if (!whole) __syncthreads();
      if (base + static_cast<int>(threadIdx.x) / kVecs < rows) {
        WriteMerged(piece, parts, whole, row, dim, sum, total);
      }
    }
  }
  __device__ void WriteMerged(const Piece& piece, const Parts& parts, bool whole, int row, int dim, float4 sum,
                              Total total) const {
    if (whole) {
      WriteResult<T, kHeadDim>(launch_, piece, row, dim, sum, total);
    } else {
      WritePartial(Place(parts.first, parts.begins, row), dim, sum, total, 1.0f);
    }
  }

  const DecodeLaunch& launch_;
  const PagedDecodeParams& p_;
  int& is_last_;
};

}  // namespace decode_mma

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_MERGE_CUH_
