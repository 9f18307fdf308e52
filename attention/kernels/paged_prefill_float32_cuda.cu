// A warp per (query, head). Lanes share the head's dimensions.
#include <cuda_runtime.h>

#include "attention/kernels/paged_prefill_find.cuh"

namespace pristine::attention {
namespace {

constexpr int kThreads = 128;
constexpr float kLog2E = 1.44269504088896340736f;

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) PagedPrefillFloat32Kernel(const PagedPrefillParams p) {
  constexpr int kEach = kHeadDim / 32;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t count = TileCount(p.tokens, p.requests, 1, 1);
  if (number >= count * p.q_heads) return;
  const int32_t head = static_cast<int32_t>(number / count);
  const PrefillTile tile = FindTile(p, number % count, 1, 1);
  if (tile.tile >= tile.qo_len) return;
  const int32_t lane = static_cast<int32_t>(threadIdx.x & 31u);
  const int32_t kv_head = head / (p.q_heads / p.kv.kv_heads);
  const int64_t place = static_cast<int64_t>(tile.first + tile.tile) * p.q_heads + head;

  float q[kEach], sum[kEach] = {}, top = -INFINITY, mass = 0;
  int64_t begin = 0, end = 0;
  RowPages pages = {0, 0};
  if (tile.request < p.requests) {
    pages = PagesOf(p.kv, tile.request);
    end = pages.length - tile.qo_len + tile.tile + 1;
    if (p.window > 0 && end > p.window) begin = end - p.window;
    const float* const query = static_cast<const float*>(p.q) + place * kHeadDim;
#pragma unroll
    for (int i = 0; i < kEach; ++i) q[i] = query[lane + 32 * i];
  }
  const float scale = p.kv.k_scale == nullptr ? p.scale : p.scale * *p.kv.k_scale;
  for (int64_t position = begin; position < end; ++position) {
    const int64_t offset = KvOffset(p.kv, pages, position, kv_head);
    if (offset < 0) continue;
    const float* const k = static_cast<const float*>(p.kv.k) + offset;
    const float* const v = static_cast<const float*>(p.kv.v) + offset;
    float score = 0, value[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      score += q[i] * k[lane + 32 * i];
      value[i] = v[lane + 32 * i];
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) score += __shfl_xor_sync(0xffffffffu, score, mask);
    score *= scale;
    if (p.soft_cap > 0) score = p.soft_cap * tanhf(score / p.soft_cap);
    score *= kLog2E;
    const float new_top = fmaxf(top, score);
    const float shift = new_top == -INFINITY ? 0.0f : new_top;
    const float decay = exp2f(top - shift), weight = exp2f(score - shift);
    top = new_top;
    mass = mass * decay + weight;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum[i] = sum[i] * decay + weight * value[i];
  }
  const bool empty = mass == 0;
  if (!empty && p.sinks != nullptr) {
    const float sink = p.sinks[head] * kLog2E, new_top = fmaxf(top, sink), decay = exp2f(top - new_top);
    mass = mass * decay + exp2f(sink - new_top);
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum[i] *= decay;
    top = new_top;
  }
  const float factor = empty ? 0.0f : (p.kv.v_scale == nullptr ? 1.0f : *p.kv.v_scale) / mass;
  float* const out = static_cast<float*>(p.out) + place * kHeadDim;
#pragma unroll
  for (int i = 0; i < kEach; ++i) out[lane + 32 * i] = sum[i] * factor;
  if (p.lse != nullptr && lane == 0) p.lse[place] = empty ? -INFINITY : top + log2f(mass);
}

}  // namespace

template <int kHeadDim>
int PagedPrefillFloat32Cuda(CUstream_st* stream, const PagedPrefillParams& params) {
  void* arguments[] = {const_cast<PagedPrefillParams*>(&params)};
  const int64_t warps = TileCount(params.tokens, params.requests, 1, 1) * params.q_heads;
  return cudaLaunchKernel(reinterpret_cast<const void*>(&PagedPrefillFloat32Kernel<kHeadDim>),
                          dim3(static_cast<unsigned>((warps + kThreads / 32 - 1) / (kThreads / 32))), dim3(kThreads),
                          arguments, 0, stream);
}

template int PagedPrefillFloat32Cuda<64>(CUstream_st*, const PagedPrefillParams&);
template int PagedPrefillFloat32Cuda<128>(CUstream_st*, const PagedPrefillParams&);
template int PagedPrefillFloat32Cuda<256>(CUstream_st*, const PagedPrefillParams&);

}  // namespace pristine::attention
