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

__device__ inline void AddScaled(float4& sum, float4 x, float factor) {
  sum = {fmaf(x.x, factor, sum.x), fmaf(x.y, factor, sum.y), fmaf(x.z, factor, sum.z), fmaf(x.w, factor, sum.w)};
}

// Where a piece's rows go: to the result, to the partial results of an item of a plan, or to a slot of partial results.
struct Target {
  bool is_result;
  int slot;     // or -1
  int row;      // if so: of the result, or the item
  float scale;  // of the values
};

template <class T, int kHeadDim>
class Merger {
 public:
  static constexpr int kVecs = kHeadDim / 4;                // float4 of a row
  static constexpr int kSlot = kDecodeTileRows * kHeadDim;  // floats of a slot
  static constexpr int kTableBytes = 4 * kDecodeTileRows * 36;

  // `table`: kTableBytes of shared memory.
  __device__ Merger(const DecodeLaunch& launch, Small& small, float* table)
      : launch_(launch), p_(launch.p), small_(small), table_(table) {}

  // Where a split unit's part of this block goes. First come the slots of blocks that begin a unit, then those of
  // blocks that go on with one.
  __device__ static int SlotOf(bool begins) { return begins ? blockIdx.x : gridDim.x + blockIdx.x; }

  // What the parts of a row come to: where it is written, and by what the sum of what they have is multiplied. One
  // thread writes the LSE. The top of scores that are all NaN is -inf, too: only the mass tells them from nothing to
  // attend.
  struct Settled {
    long long place;
    float factor;
  };
  __device__ Settled Settle(const Piece& piece, const Target& target, int row, float top, float mass,
                            bool writes) const {
    const long long place = PlaceOf(piece, target, row);
    float factor = target.scale;
    if (target.is_result && p_.sinks != nullptr && mass != 0.0f) {
      const int m = piece.first_m + row;
      const int head = piece.kv_head * launch_.group + m - launch_.by_group.Quotient(m) * launch_.group;
      const float sink = p_.sinks[head] * kLog2E;
      const float decay = Exp2(top - fmaxf(top, sink));
      top = fmaxf(top, sink);
      mass = fmaf(mass, decay, Exp2(sink - top));
      factor *= decay;
    }
    factor = mass != 0.0f ? __fdividef(factor, mass) : 0.0f;
    if (writes) {
      const float lse = mass == 0.0f ? -CUDART_INF_F : top + __log2f(mass);
      if (!target.is_result) {
        p_.partial_lse[place] = lse;
      } else if (p_.lse != nullptr) {
        p_.lse[place].value = lse;
      }
    }
    return {place, factor};
  }
  // Four dimensions of a row.
  __device__ void Write(bool is_result, long long place, int dim, float4 x) const {
    const long long at = place * kHeadDim + dim;
    if (is_result) {
      *reinterpret_cast<uint2*>(static_cast<T*>(p_.out) + at) = {PackPair(T{}, x.x, x.y), PackPair(T{}, x.z, x.w)};
    } else {
      *reinterpret_cast<float4*>(p_.partial_out + at) = x;
    }
  }

  // A block's part of a split unit is in its slot. Where there is much to merge, the last of a group of neighbours
  // makes one partial result of theirs, and the last of the groups the result. The groups' slots are those of blocks
  // that begin a unit, from the first block on: the unit's other blocks begin none, but the last, and groups are fewer.
  __device__ void Deliver(const Piece& piece, int rows, float v_scale) const {
    const int parts = piece.last_block - piece.first_block + 1;
    // Only one split unit begins in a block, and it goes on with only one, so the counters of a block's two slots are
    // a unit's own: where groups begin, the group's; in the unit's second block, which begins none, that of groups.
    const int going_on = gridDim.x;
    const Target result = {.is_result = true, .slot = -1, .row = piece.row, .scale = v_scale};
    Target target = result;
    int counter = piece.first_block;
    Parts some = {piece.first_block, going_on + piece.first_block + 1, parts};
    const int size = parts <= 16 ? 4 : parts <= 80 ? 8 : max(16, (parts + 31) / 32);  // about the root
    static_assert(kDecodeMaxBlocks <= 32 * 32, "as many groups, and parts of a group, as Merge takes");
    if (parts * rows > kFlatRows || parts > kMostParts) {
      const int group = (static_cast<int>(blockIdx.x) - piece.first_block) / size;
      const int first = piece.first_block + group * size;
      counter = group == 0 ? first : going_on + first;
      some = {counter, going_on + first + 1, min(size, piece.last_block - first + 1)};
      target = {.is_result = false, .slot = piece.first_block + group, .row = 0, .scale = 1.0f};
    }
#pragma unroll 1
    for (;;) {
      if (!ComesLast(p_.counters + counter, some.count)) return;
      if (rows <= 8) {
        Merge<8, 1, 16>(piece, rows, some, target);
      } else {
        Merge<32, 4, 4>(piece, rows, some, target);
      }
      if (target.is_result) return;
      __syncthreads();
      counter = going_on + piece.first_block + 1;
      some = {piece.first_block, piece.first_block + 1, (parts + size - 1) / size};
      target = result;
    }
  }

 private:
  __device__ long long PlaceOf(const Piece& piece, const Target& target, int row) const {
    if (target.slot >= 0) return static_cast<long long>(target.slot) * kDecodeTileRows + row;
    return HeadPlace(launch_, target.row, piece.kv_head, piece.first_m + row);
  }

  // Whether this block is the last of `all` to count here; the counter is then zero again. All threads; what they
  // wrote before a barrier is seen by the last.
  __device__ bool ComesLast(uint32_t* counter, int all) const {
    if (threadIdx.x == 0) {
      const unsigned others = static_cast<unsigned>(all) - 1;
      small_.is_last = IncrementAcqRel(counter, others) == others;
    }
    __syncthreads();
    return small_.is_last;
  }

  // Slots of partial results of one unit: the first, and count - 1 more from `next` on.
  struct Parts {
    int first, next, count;
  };
  // Merges parts in their order, up to 64 of up to 8 rows (kRows), or 32 of up to 32. A thread has kItems vectors in
  // hand, with a load for each of kAtOnce parts under way. Meanwhile a team of lanes makes weights of a row's LSEs.
  template <int kRows, int kItems, int kAtOnce>
  __device__ void Merge(const Piece& piece, int rows, const Parts& parts, const Target& target) const {
    constexpr int kParts = kRows == 8 ? kMostParts : 32;
    constexpr int kStride = kParts + 4;
    static_assert(kRows * kStride * 4 <= kTableBytes && kAtOnce % 4 == 0 && kParts % kAtOnce == 0);
    const int items = rows * kVecs, dim = threadIdx.x % kVecs * 4;
    const int rest = parts.next - 1;  // the slot of part i > 0 is rest + i
    const int to_first = parts.first - rest;
    bool is_weighed = false;
#pragma unroll 1
    for (int base = 0; base < items; base += kItems * kThreads) {
      float4 sum[kItems];
      int row[kItems];
      const float* from[kItems];
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        row[k] = min(base + static_cast<int>(threadIdx.x) + k * kThreads, items - 1) / kVecs;
        from[k] = p_.partial_out + (static_cast<long long>(rest) * kSlot + row[k] * kHeadDim + dim);
        sum[k] = {0, 0, 0, 0};
      }
#pragma unroll 1
      for (int done = 0; done < parts.count; done += kAtOnce) {
        float weight[kParts * kRows / kThreads];
        if (!is_weighed) LoadLses<kRows>(rows, parts, weight);
        float4 value[kItems][kAtOnce];
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
          LoadParts<kAtOnce>(parts.count - done, done == 0 ? to_first * kSlot : 0, from[k], value[k]);
          from[k] += kAtOnce * kSlot;
        }
        if (!is_weighed) Weigh<kRows, kStride>(piece, rows, target, weight);
        is_weighed = true;
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
#pragma unroll
          for (int j = 0; j < kAtOnce; j += 4) {
            const float4 x = *reinterpret_cast<const float4*>(table_ + row[k] * kStride + done + j);
            AddScaled(sum[k], value[k][j], x.x);
            AddScaled(sum[k], value[k][j + 1], x.y);
            AddScaled(sum[k], value[k][j + 2], x.z);
            AddScaled(sum[k], value[k][j + 3], x.w);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const bool is_there = base + static_cast<int>(threadIdx.x) + k * kThreads < items;
        if (is_there) Write(target.is_result, small_.merged[row[k]].place, dim, sum[k]);
      }
    }
  }
  // A team of kThreads / kRows lanes has a row, a lane every so many-th of its parts. -inf where there is none.
  template <int kRows, int kEach>
  __device__ void LoadLses(int rows, const Parts& parts, float (&lse)[kEach]) const {
    constexpr int kTeam = kThreads / kRows;
    const int row = threadIdx.x / kTeam;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int part = threadIdx.x % kTeam + i * kTeam;
      const int slot = part == 0 ? parts.first : parts.next - 1 + part;
      lse[i] = -CUDART_INF_F;
      LoadIf<0>(part < parts.count && row < rows, p_.partial_lse + slot * kDecodeTileRows + row, lse[i]);
    }
  }
  // Puts weights into the table, [kRows, kStride], and the rows' places beside it. All threads; ends with a barrier.
  template <int kRows, int kStride, int kEach>
  __device__ void Weigh(const Piece& piece, int rows, const Target& target, float (&lse)[kEach]) const {
    constexpr int kTeam = kThreads / kRows;
    const int row = threadIdx.x / kTeam, first = threadIdx.x % kTeam;
    float top = lse[0], mass = 0.0f, weight[kEach];
#pragma unroll
    for (int i = 1; i < kEach; ++i) top = fmaxf(top, lse[i]);
#pragma unroll
    for (int step = 1; step < kTeam; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
    const float safe = top == -CUDART_INF_F ? 0.0f : top;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      weight[i] = Exp2(lse[i] - safe);  // 0 of a part that attends nothing; its values are 0, too
      mass += weight[i];
    }
#pragma unroll
    for (int step = 1; step < kTeam; step *= 2) mass += __shfl_xor_sync(kAllLanes, mass, step);
    const bool writes = first == 0 && row < rows;
    const Settled settled = Settle(piece, target, min(row, rows - 1), top, mass, writes);
    if (writes) small_.merged[row].place = settled.place;
#pragma unroll
    for (int i = 0; i < kEach; ++i) table_[row * kStride + first + i * kTeam] = weight[i] * settled.factor;
    __syncthreads();
  }
  // Those of the first `left` of kCount neighbouring slots; zeros for others. The first lies `to_first` away.
  template <int kCount, int kPart = 0>
  __device__ static void LoadParts(int left, int to_first, const float* from, float4* value) {
    if constexpr (kPart < kCount) {
      value[kPart] = {0, 0, 0, 0};
      LoadIf<kPart * kSlot * 4>(kPart < left, kPart == 0 ? from + to_first : from, value[kPart]);
      LoadParts<kCount, kPart + 1>(left, to_first, from, value);
    }
  }

  const DecodeLaunch& launch_;
  const PagedDecodeParams& p_;
  Small& small_;
  float* const table_;
};

}  // namespace decode_mma

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_MERGE_CUH_
