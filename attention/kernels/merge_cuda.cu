// A head of a row is merged by MergeLanes threads of one warp, each with MergeVec elements in 16-byte loads.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include "attention/kernels/dependent_launch.cuh"
#include "attention/kernels/merge.h"
#include "pristine/buffers/violation.h"

namespace pristine::attention {
namespace {

constexpr int kPairThreads = 256;  // of a block per token with few heads
constexpr int kHeadGridThreads = 128;
constexpr int kSetsThreads = 128;
constexpr int kSetsUnroll = 4;  // states whose loads are in flight together
// Blocks per multiprocessor: with more there are too few registers for the loads to stay together.
template <class T, int kHeadDim>
constexpr int kSetsBlocks = MergeVec(sizeof(T), kHeadDim) * sizeof(T) > 16 ? 6 : 8;
constexpr int kConvertThreads = 256;
constexpr unsigned kMaxGridX = 0x7fffffffu;

// 16 bytes of T as floats, and back.
__device__ inline void Unpack(uint4 bits, float, float* to) {
  to[0] = __uint_as_float(bits.x);
  to[1] = __uint_as_float(bits.y);
  to[2] = __uint_as_float(bits.z);
  to[3] = __uint_as_float(bits.w);
}
__device__ inline uint4 Pack(float, const float* from) {
  return {__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]), __float_as_uint(from[3])};
}
__device__ inline void UnpackPair(unsigned pair, BFloat16, float* to) {
  to[0] = __uint_as_float(pair << 16);
  to[1] = __uint_as_float(pair & 0xffff0000u);
}
__device__ inline unsigned PackPair(BFloat16, const float* from) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
  unsigned bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ inline void UnpackPair(unsigned pair, Float16, float* to) {
  __half2 halves;
  memcpy(&halves, &pair, sizeof(halves));
  const float2 floats = __half22float2(halves);
  to[0] = floats.x;
  to[1] = floats.y;
}
__device__ inline unsigned PackPair(Float16, const float* from) {
  const __half2 pair = __floats2half2_rn(from[0], from[1]);
  unsigned bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
template <class T>
__device__ inline void Unpack(uint4 bits, T type, float* to) {
  UnpackPair(bits.x, type, to);
  UnpackPair(bits.y, type, to + 2);
  UnpackPair(bits.z, type, to + 4);
  UnpackPair(bits.w, type, to + 6);
}
template <class T>
__device__ inline uint4 Pack(T type, const float* from) {
  return {PackPair(type, from), PackPair(type, from + 2), PackPair(type, from + 4), PackPair(type, from + 6)};
}

// One instruction each, to 2 units in the last place and exact at powers of two. A merge of few rows is as long as its
// chain of instructions: with exp2f, log2f and a division it takes 0.1 us more. Results below 2^-126 are 0.
__device__ inline float FastExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float FastLog2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float FastReciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One store of 16 bytes; nvcc makes four of an assignment.
__device__ inline void StoreVector(uint4* to, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// The elements of one thread.
template <class T, int kHeadDim>
struct Part {
  static constexpr int kVec = MergeVec(sizeof(T), kHeadDim);
  static constexpr int kLanes = MergeLanes(sizeof(T), kHeadDim);
  static constexpr int kPerChunk = 16 / sizeof(T);
  static constexpr int kChunks = kVec / kPerChunk;
  static_assert(kVec % kPerChunk == 0 && kLanes <= 32 && 32 % kLanes == 0, "a head is a part of one warp");

  __device__ static long long Offset(long long row, long long stride, int head) {
    return row * stride + static_cast<long long>(head) * kHeadDim + static_cast<int>(threadIdx.x) * kVec;
  }
  __device__ void Load(const void* v, long long offset) {
    const uint4* const from = reinterpret_cast<const uint4*>(static_cast<const T*>(v) + offset);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) bits[i] = from[i];
  }
  __device__ void Clear() {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) bits[i] = {0, 0, 0, 0};
  }
  __device__ void AddTo(float (&sum)[kVec], float weight) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      float x[kPerChunk];
      Unpack(bits[i], T{}, x);
#pragma unroll
      for (int j = 0; j < kPerChunk; ++j) sum[i * kPerChunk + j] = fmaf(weight, x[j], sum[i * kPerChunk + j]);
    }
  }
  __device__ static void Store(void* v, long long offset, const float (&sum)[kVec], float factor) {
    uint4* const to = reinterpret_cast<uint4*>(static_cast<T*>(v) + offset);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      float x[kPerChunk];
#pragma unroll
      for (int j = 0; j < kPerChunk; ++j) x[j] = sum[i * kPerChunk + j] * factor;
      StoreVector(to + i, Pack(T{}, x));
    }
  }

  uint4 bits[kChunks];
};

__device__ inline const float* LseAt(const MergeInput& input, long long row, int head) {
  return input.lse + row * input.lse_stride + head * input.lse_head_stride;
}

// An lse as merged: +inf is taken as empty.
__device__ inline float Finite(float lse) { return lse == CUDART_INF_F ? -CUDART_INF_F : lse; }

// Called by all threads of a head, reported by its first.
__device__ inline void ReportIfInfinite(float lse, long long row, int head, int which, const ReportRing& reports) {
  if (lse != CUDART_INF_F || threadIdx.x != 0) return;
  Report(reports, static_cast<int32_t>(Violation::Kind::kInfiniteLse), -1, row, which, head);
}

// The threads of this thread's head, in its warp.
template <int kLanes>
__device__ inline unsigned HeadMask() {
  const unsigned lane = ((threadIdx.z * blockDim.y + threadIdx.y) * kLanes + threadIdx.x) % 32;
  return (0xffffffffu >> (32 - kLanes)) << (lane / kLanes * kLanes);
}

// Divides by `mass` and writes v and lse. Every thread of the head must come here: `out` may be an input, so nobody
// writes an lse before all of them have read it.
template <class T, int kHeadDim>
__device__ inline void WriteMerged(const MergeOutput& out, long long row, int head,
                                   const float (&sum)[Part<T, kHeadDim>::kVec], float top, float mass) {
  using P = Part<T, kHeadDim>;
  P::Store(out.v, P::Offset(row, out.v_stride, head), sum, mass == 0.0f ? 0.0f : FastReciprocal(mass));
  __syncwarp(HeadMask<P::kLanes>());
  if (out.lse != nullptr && threadIdx.x == 0) {
    out.lse[row * out.lse_stride + head * out.lse_head_stride] = mass == 0.0f ? -CUDART_INF_F : top + FastLog2(mass);
  }
}

// One kernel in two shapes. Block per token: block (lanes, heads, tokens), grid (rows / tokens), with more than one
// token only where heads are few. Token and head: block (lanes, 128 / lanes), grid (rows, groups of heads).
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kMergeMaxThreads) MergePairKernel(const MergePairParams p) {
  using P = Part<T, kHeadDim>;
  LetNextBegin();
  WaitForStream();
  const long long row = static_cast<long long>(blockIdx.x) * blockDim.z + threadIdx.z;
  const int head = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);
  if (head >= p.heads || row >= p.rows) return;
  if (p.mask != nullptr && p.mask[row] == 0) return;
  // All loads go out together: waiting for an lse before loading its v would double the latency of a small merge. An
  // empty side's values are dropped below.
  const float raw_a = *LseAt(p.a, row, head);
  const float raw_b = *LseAt(p.b, row, head);
  P a, b;
  a.Load(p.a.v, P::Offset(row, p.a.v_stride, head));
  b.Load(p.b.v, P::Offset(row, p.b.v_stride, head));
  const float lse_a = Finite(raw_a);
  const float lse_b = Finite(raw_b);
  const float top = fmaxf(lse_a, lse_b);
  const float safe_top = top == -CUDART_INF_F ? 0.0f : top;  // -inf - -inf is NaN
  const float weight_a = FastExp2(lse_a - safe_top);
  const float weight_b = FastExp2(lse_b - safe_top);
  // 0 * NaN is NaN, so a weight of 0 is not enough.
  if (lse_a == -CUDART_INF_F) a.Clear();
  if (lse_b == -CUDART_INF_F) b.Clear();
  float sum[P::kVec] = {};
  a.AddTo(sum, weight_a);
  b.AddTo(sum, weight_b);
  WriteMerged<T, kHeadDim>(p.out, row, head, sum, top, weight_a + weight_b);
  ReportIfInfinite(raw_a, row, head, 0, p.reports);
  ReportIfInfinite(raw_b, row, head, 1, p.reports);
}

// Grid (rows, groups of heads): a function of the shape alone. One pass over the row's states, kSetsUnroll at a time,
// rescaled when the largest lse grows. Values go out together with their lse, as in a pair, so that a ragged row waits
// twice for memory, and not three times; those of empty states are dropped.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kSetsThreads, kSetsBlocks<T, kHeadDim>) MergeSetsKernel(const MergeSetsParams p) {
  using P = Part<T, kHeadDim>;
  LetNextBegin();
  WaitForStream();
  const long long row = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);
  if (head >= p.heads) return;
  long long begin = row * p.states_per_row, end = begin + p.states_per_row;
  if (p.indptr != nullptr) {
    const long long limit = p.num_states;
    begin = min(max(static_cast<long long>(p.indptr[row]), 0LL), limit);
    end = min(max(static_cast<long long>(p.indptr[row + 1]), 0LL), limit);
  }
  float top = -CUDART_INF_F, mass = 0.0f;
  float sum[P::kVec] = {};
  bool infinite = false;
  for (long long i = begin; i < end; i += kSetsUnroll) {
    float lse[kSetsUnroll];
    P values[kSetsUnroll];
#pragma unroll
    for (int u = 0; u < kSetsUnroll; ++u) {
      lse[u] = -CUDART_INF_F;
      values[u].Clear();
      if (i + u >= end) continue;
      lse[u] = *LseAt(p.states, i + u, head);
      values[u].Load(p.states.v, P::Offset(i + u, p.states.v_stride, head));
    }
    float new_top = top;
#pragma unroll
    for (int u = 0; u < kSetsUnroll; ++u) {
      infinite |= lse[u] == CUDART_INF_F;
      lse[u] = Finite(lse[u]);
      new_top = fmaxf(new_top, lse[u]);
      if (lse[u] == -CUDART_INF_F) values[u].Clear();
    }
    const float safe_top = new_top == -CUDART_INF_F ? 0.0f : new_top;
    const float decay = FastExp2(top - safe_top);
    mass *= decay;
#pragma unroll
    for (int j = 0; j < P::kVec; ++j) sum[j] *= decay;
#pragma unroll
    for (int u = 0; u < kSetsUnroll; ++u) {
      const float weight = FastExp2(lse[u] - safe_top);
      mass += weight;
      values[u].AddTo(sum, weight);
    }
    top = new_top;
  }
  WriteMerged<T, kHeadDim>(p.out, row, head, sum, top, mass);
  if (infinite) {
    for (long long i = begin; i < end; ++i) ReportIfInfinite(*LseAt(p.states, i, head), i, head, 0, p.reports);
  }
}

__global__ void __launch_bounds__(kConvertThreads) ConvertLseKernel(const ConvertLseParams p) {
  const long long stride = static_cast<long long>(gridDim.x) * kConvertThreads;
  for (long long i = static_cast<long long>(blockIdx.x) * kConvertThreads + threadIdx.x; i < p.count; i += stride) {
    const float lse = p.from[i];
    const bool empty = lse == -CUDART_INF_F || lse == p.empty_from;
    p.to[i] = empty ? p.empty_to : lse * p.factor;
  }
}

template <class Params>
int LaunchOverHeads(void (*kernel)(Params), CUstream_st* stream, const Params& params, int lanes, int threads) {
  // As few blocks as there must be, and the heads evenly over them.
  const int most = threads / lanes;
  const int blocks = (params.heads + most - 1) / most;
  const int heads = (params.heads + blocks - 1) / blocks;
  const dim3 grid(static_cast<unsigned>(params.rows), static_cast<unsigned>(blocks));
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(heads));
  return LaunchDependent(stream, kernel, grid, block, 0, params);
}

}  // namespace

template <class T, int kHeadDim>
int MergePairBlockPerTokenCuda(CUstream_st* stream, const MergePairParams& params) {
  const int threads = Part<T, kHeadDim>::kLanes * params.heads;
  const int tokens = threads * 2 <= kPairThreads && kPairThreads % threads == 0 ? kPairThreads / threads : 1;
  const dim3 block(Part<T, kHeadDim>::kLanes, static_cast<unsigned>(params.heads), static_cast<unsigned>(tokens));
  const dim3 grid(static_cast<unsigned>((params.rows - 1) / tokens + 1));
  return LaunchDependent(stream, MergePairKernel<T, kHeadDim>, grid, block, 0, params);
}

template <class T, int kHeadDim>
int MergePairTokenHeadCuda(CUstream_st* stream, const MergePairParams& params) {
  return LaunchOverHeads(&MergePairKernel<T, kHeadDim>, stream, params, Part<T, kHeadDim>::kLanes, kHeadGridThreads);
}

template <class T, int kHeadDim>
int MergeSetsCuda(CUstream_st* stream, const MergeSetsParams& params) {
  return LaunchOverHeads(&MergeSetsKernel<T, kHeadDim>, stream, params, Part<T, kHeadDim>::kLanes, kSetsThreads);
}

int ConvertLseCuda(CUstream_st* stream, const ConvertLseParams& params) {
  void* arguments[] = {const_cast<ConvertLseParams*>(&params)};
  const long long blocks = (params.count + kConvertThreads - 1) / kConvertThreads;
  const dim3 grid(blocks < static_cast<long long>(kMaxGridX) ? static_cast<unsigned>(blocks) : kMaxGridX);
  return cudaLaunchKernel(reinterpret_cast<const void*>(&ConvertLseKernel), grid, dim3(kConvertThreads), arguments, 0,
                          stream);
}

#define PRISTINE_MERGE_INSTANCE(T, head_dim)                                                  \
  template int MergePairBlockPerTokenCuda<T, head_dim>(CUstream_st*, const MergePairParams&); \
  template int MergePairTokenHeadCuda<T, head_dim>(CUstream_st*, const MergePairParams&);     \
  template int MergeSetsCuda<T, head_dim>(CUstream_st*, const MergeSetsParams&);
PRISTINE_MERGE_INSTANCE(float, 64)
PRISTINE_MERGE_INSTANCE(float, 128)
PRISTINE_MERGE_INSTANCE(float, 256)
PRISTINE_MERGE_INSTANCE(Float16, 64)
PRISTINE_MERGE_INSTANCE(Float16, 128)
PRISTINE_MERGE_INSTANCE(Float16, 256)
PRISTINE_MERGE_INSTANCE(BFloat16, 64)
PRISTINE_MERGE_INSTANCE(BFloat16, 128)
PRISTINE_MERGE_INSTANCE(BFloat16, 256)
#undef PRISTINE_MERGE_INSTANCE

}  // namespace pristine::attention
