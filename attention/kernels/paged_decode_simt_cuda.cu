// float32, without tensor cores: for checking, not for speed. One block per (work item, or row where there is no plan;
// KV head; query token). Four warps, each with its own query heads and its own part of every tile of tokens: for up to
// 8 query heads all warps take the same heads and a quarter of the tokens each.
#include <cuda_runtime.h>
#include <math_constants.h>

#include "attention/kernels/paged_decode.h"
#include "attention/kernels/plan_layout.h"

namespace pristine::attention {
namespace {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeTile = 64;  // tokens staged in shared memory at a time
constexpr int kWarps = kDecodeThreads / 32;
constexpr int kTokensPerWarp = 16;  // of a tile: two lanes score one token, each half of its elements
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kDecodeTile == kWarps * kTokensPerWarp);

// 32 bytes more than a row of K or V, so that the eight lanes of a 16-byte access phase meet eight different banks.
PRISTINE_HOST_DEVICE constexpr int RowStride(int element_bytes, int head_dim) { return element_bytes * head_dim + 32; }
// Dynamic shared memory of a block: K and V tile, queries as float, one pool offset per token of the tile.
PRISTINE_HOST_DEVICE constexpr int SharedBytes(int element_bytes, int head_dim) {
  return 2 * kDecodeTile * RowStride(element_bytes, head_dim) + kDecodeMaxGroup * head_dim * 4 + kDecodeTile * 8;
}

// The elements of 16 bytes (or of 4 or 8) of K or V.
template <int kCount>
__device__ inline void Unpack(const unsigned char* from, float, float (&to)[kCount]) {
  if constexpr (kCount == 4) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
    static_assert(kCount == 2);
    const float2 x = *reinterpret_cast<const float2*>(from);
    to[0] = x.x, to[1] = x.y;
  }
}

// kHeads: query heads of one warp. Must not spill (cmake/hot_kernels.txt).
template <class T, int kHeadDim, int kHeads>
__global__ void __launch_bounds__(kDecodeThreads) PagedDecodeSimt(const PagedDecodeParams p) {
  constexpr int kVec = 16 / sizeof(T);
  constexpr int kVecs = kHeadDim / kVec;
  constexpr int kStride = RowStride(sizeof(T), kHeadDim);
  constexpr int kOwned = kHeadDim / 32;  // output elements of one lane
  static_assert(kWarps * kHeads * (kHeadDim + 2) * sizeof(float) <= 2 * kDecodeTile * kStride,
                "the merge of the warps reuses the tile");
  extern __shared__ __align__(16) unsigned char shared[];
  unsigned char* const k_tile = shared;
  unsigned char* const v_tile = shared + kDecodeTile * kStride;
  float* const q_shared = reinterpret_cast<float*>(shared + 2 * kDecodeTile * kStride);
  long long* const offsets = reinterpret_cast<long long*>(q_shared + kDecodeMaxGroup * kHeadDim);

  const int item = blockIdx.x;
  const int kv_head = blockIdx.y;
  const int query = blockIdx.z;
  const int group = p.q_heads / p.kv.kv_heads;
  if (p.plan != nullptr && item >= min(p.plan[kPlanCount], p.max_items)) return;

  const int32_t* const work = p.plan == nullptr ? nullptr : p.plan + PlanItemsAt(p.rows) + 3LL * item;
  const int row = work == nullptr ? item : work[0];
  RowPages pages = {0, 0};
  if (row >= 0 && row < p.rows) pages = PagesOf(p.kv, row);
  const Visible visible = VisibleTo(pages.length, p.q_len, p.window, query);
  long long begin = visible.begin, end = visible.end;
  if (work != nullptr) {
    begin = max(begin, static_cast<long long>(work[1]));
    end = min(end, static_cast<long long>(work[2]));
  }
  const long long first_head = (static_cast<long long>(item) * p.q_len + query) * p.q_heads + kv_head * group;
  if (begin >= end && p.plan != nullptr) {
    for (int h = threadIdx.x; h < group; h += kDecodeThreads) p.partial_lse[first_head + h] = -CUDART_INF_F;
    return;
  }

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int head_warps = kHeads < 8 || group <= 8 ? 1 : group <= 16 ? 2 : 4;
  const int token_warps = kWarps / head_warps;
  const int token_warp = warp % token_warps;
  const int head_warp = warp / token_warps;
  const int tile = token_warps * kTokensPerWarp;

  const T* const q = static_cast<const T*>(p.q) +
                     ((static_cast<long long>(row) * p.q_len + query) * p.q_heads + kv_head * group) * kHeadDim;
  const ScoreScale scale = ScoreScaleOf(p);
  for (int i = threadIdx.x; i < head_warps * kHeads * kHeadDim; i += kDecodeThreads) {
    q_shared[i] = i < group * kHeadDim ? ToFloat(q[i]) * scale.inner : 0.0f;
  }

  float top[kHeads], mass[kHeads], sum[kHeads][kOwned];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    top[h] = -CUDART_INF_F;
    mass[h] = 0.0f;
#pragma unroll
    for (int d = 0; d < kOwned; ++d) sum[h][d] = 0.0f;
  }

  const unsigned char* const k_pool = static_cast<const unsigned char*>(p.kv.k);
  const unsigned char* const v_pool = static_cast<const unsigned char*>(p.kv.v);
  const float* const q_warp = q_shared + head_warp * kHeads * kHeadDim;
  const int token = token_warp * kTokensPerWarp + lane / 2;
  const int half = lane % 2;

  for (long long start = begin; start < end; start += tile) {
    __syncthreads();  // the tile before is used up
    if (threadIdx.x < tile) {
      const long long position = start + threadIdx.x;
      long long offset = position < end ? KvOffset(p.kv, pages, position, kv_head) : -1;
      if (offset >= 0) offset *= sizeof(T);
      offsets[threadIdx.x] = offset;
    }
    __syncthreads();
    // Tokens that are not attended become zeros: a weight of 0 times whatever lies there could be NaN.
    for (int i = threadIdx.x; i < tile * kVecs; i += kDecodeThreads) {
      const int t = i / kVecs;
      const int column = i % kVecs * 16;
      const long long offset = offsets[t];
      uint4 k = {0, 0, 0, 0}, v = {0, 0, 0, 0};
      if (offset >= 0) {
        k = *reinterpret_cast<const uint4*>(k_pool + offset + column);
        v = *reinterpret_cast<const uint4*>(v_pool + offset + column);
      }
      *reinterpret_cast<uint4*>(k_tile + t * kStride + column) = k;
      *reinterpret_cast<uint4*>(v_tile + t * kStride + column) = v;
    }
    __syncthreads();

    float weight[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) weight[h] = 0.0f;
#pragma unroll 2
    for (int i = 0; i < kVecs / 2; ++i) {
      const int vec = 2 * i + half;
      float x[kVec];
      Unpack<kVec>(k_tile + token * kStride + vec * 16, T{}, x);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int j = 0; j < kVec; j += 4) {
          const float4 y = *reinterpret_cast<const float4*>(q_warp + h * kHeadDim + vec * kVec + j);
          weight[h] = fmaf(x[j], y.x, weight[h]);
          weight[h] = fmaf(x[j + 1], y.y, weight[h]);
          weight[h] = fmaf(x[j + 2], y.z, weight[h]);
          weight[h] = fmaf(x[j + 3], y.w, weight[h]);
        }
      }
    }
    const bool attended = offsets[token] >= 0;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float score = weight[h] + __shfl_xor_sync(kAllLanes, weight[h], 1);
      if (scale.outer != 0.0f) score = scale.outer * tanhf(score);
      float new_top = attended ? score : -CUDART_INF_F;
#pragma unroll
      for (int step = 2; step < 32; step *= 2) new_top = fmaxf(new_top, __shfl_xor_sync(kAllLanes, new_top, step));
      new_top = fmaxf(new_top, top[h]);
      const float safe_top = new_top == -CUDART_INF_F ? 0.0f : new_top;
      const float decay = exp2f(top[h] - safe_top);
      weight[h] = attended ? exp2f(score - safe_top) : 0.0f;
      mass[h] = mass[h] * decay + (half == 0 ? weight[h] : 0.0f);
      top[h] = new_top;
#pragma unroll
      for (int d = 0; d < kOwned; ++d) sum[h][d] *= decay;
    }
#pragma unroll 2
    for (int t = 0; t < kTokensPerWarp; ++t) {
      float x[kOwned];
      Unpack<kOwned>(v_tile + (token_warp * kTokensPerWarp + t) * kStride + lane * (kOwned * sizeof(T)), T{}, x);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float w = __shfl_sync(kAllLanes, weight[h], 2 * t);
#pragma unroll
        for (int d = 0; d < kOwned; ++d) sum[h][d] = fmaf(w, x[d], sum[h][d]);
      }
    }
  }

  // The warps that share heads are merged in a fixed order.
  __syncthreads();
  float* const merge = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) mass[h] += __shfl_xor_sync(kAllLanes, mass[h], step);
    float* const state = merge + (warp * kHeads + h) * (kHeadDim + 2);
#pragma unroll
    for (int d = 0; d < kOwned; ++d) state[lane * kOwned + d] = sum[h][d];
    if (lane == 0) {
      state[kHeadDim] = top[h];
      state[kHeadDim + 1] = mass[h];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group * kHeadDim; i += kDecodeThreads) {
    const int h = i / kHeadDim;
    const int d = i % kHeadDim;
    const float* const state = merge + (h / kHeads * token_warps * kHeads + h % kHeads) * (kHeadDim + 2);
    float all_top = -CUDART_INF_F;
    for (int w = 0; w < token_warps; ++w) all_top = fmaxf(all_top, state[w * kHeads * (kHeadDim + 2) + kHeadDim]);
    float safe_top = all_top == -CUDART_INF_F ? 0.0f : all_top;
    float all_mass = 0.0f, out = 0.0f;
    for (int w = 0; w < token_warps; ++w) {
      const float* const part = state + w * kHeads * (kHeadDim + 2);
      const float factor = exp2f(part[kHeadDim] - safe_top);
      all_mass = fmaf(part[kHeadDim + 1], factor, all_mass);
      out = fmaf(part[d], factor, out);
    }
    if (p.kv.v_scale != nullptr) out *= *p.kv.v_scale;
    if (p.plan != nullptr) {
      p.partial_out[first_head * kHeadDim + i] = all_mass == 0.0f ? 0.0f : out / all_mass;
      if (d == 0) p.partial_lse[first_head + h] = all_mass == 0.0f ? -CUDART_INF_F : safe_top + log2f(all_mass);
      continue;
    }
    if (all_mass != 0.0f && p.sinks != nullptr) {
      constexpr float kLog2E = 1.44269504088896340736f;
      const float sink = p.sinks[kv_head * group + h] * kLog2E;
      const float top_of_both = fmaxf(safe_top, sink);
      const float decay = exp2f(safe_top - top_of_both);
      all_mass = fmaf(all_mass, decay, exp2f(sink - top_of_both));
      out *= decay;
      safe_top = top_of_both;
    }
    static_cast<T*>(p.out)[first_head * kHeadDim + i] = FromFloat<T>(all_mass == 0.0f ? 0.0f : out / all_mass);
    if (d == 0 && p.lse != nullptr) {
      p.lse[first_head + h].value = all_mass == 0.0f ? -CUDART_INF_F : safe_top + log2f(all_mass);
    }
  }
}

template <class T, int kHeadDim, int kHeads>
int LaunchDecode(CUstream_st* stream, const PagedDecodeParams& params) {
  void* arguments[] = {const_cast<PagedDecodeParams*>(&params)};
  const dim3 grid(static_cast<unsigned>(params.plan != nullptr ? params.max_items : params.rows),
                  static_cast<unsigned>(params.kv.kv_heads), static_cast<unsigned>(params.q_len));
  return cudaLaunchKernel(reinterpret_cast<const void*>(&PagedDecodeSimt<T, kHeadDim, kHeads>), grid,
                          dim3(kDecodeThreads), arguments, SharedBytes(sizeof(T), kHeadDim), stream);
}

template <class T, int kHeadDim, int kHeads>
int SetSharedLimit() {
  return cudaFuncSetAttribute(PagedDecodeSimt<T, kHeadDim, kHeads>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              SharedBytes(sizeof(T), kHeadDim));
}

template <class T, int kHeadDim>
int Prepare() {
  static_assert(SharedBytes(sizeof(T), kHeadDim) <= 227 * 1024, "a block of sm_90 has 227 KiB");
  for (const int error : {SetSharedLimit<T, kHeadDim, 1>(), SetSharedLimit<T, kHeadDim, 2>(),
                          SetSharedLimit<T, kHeadDim, 4>(), SetSharedLimit<T, kHeadDim, 8>()}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T, int kHeadDim>
int LaunchGroup(CUstream_st* stream, const PagedDecodeParams& params) {
  const int group = params.q_heads / params.kv.kv_heads;
  if (group <= 1) return LaunchDecode<T, kHeadDim, 1>(stream, params);
  if (group <= 2) return LaunchDecode<T, kHeadDim, 2>(stream, params);
  if (group <= 4) return LaunchDecode<T, kHeadDim, 4>(stream, params);
  return LaunchDecode<T, kHeadDim, 8>(stream, params);
}

}  // namespace

template <>
int PagedDecodeCuda<float, float, 64>(CUstream_st* stream, const PagedDecodeParams& params) {
  return LaunchGroup<float, 64>(stream, params);
}
template <>
int PagedDecodeCuda<float, float, 128>(CUstream_st* stream, const PagedDecodeParams& params) {
  return LaunchGroup<float, 128>(stream, params);
}
template <>
int PagedDecodePrepare<float, float, 64>(bool*) {
  return Prepare<float, 64>();
}
template <>
int PagedDecodePrepare<float, float, 128>(bool*) {
  return Prepare<float, 128>();
}

}  // namespace pristine::attention
