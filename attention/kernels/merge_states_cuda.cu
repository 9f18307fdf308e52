// One block per (row, query head, query token), one thread per output element. Items are merged in order, so that the
// result is the same every time.
#include <cuda_runtime.h>
#include <math_constants.h>

#include "attention/kernels/merge_states.h"
#include "attention/kernels/plan_layout.h"

namespace pristine::attention {
namespace {

template <class T>
__global__ void MergeStates(const MergeStatesParams p) {
  const int row = blockIdx.x;
  const int head = blockIdx.y;
  const long long item_heads = static_cast<long long>(p.q_len) * p.q_heads;
  const long long from = static_cast<long long>(blockIdx.z) * p.q_heads + head;
  const int d = threadIdx.x;
  const int count = min(max(p.plan[kPlanCount], 0), p.max_items);
  const int begin = min(max(p.plan[kPlanItemIndptr + row], 0), count);
  const int end = min(max(p.plan[kPlanItemIndptr + row + 1], 0), count);
  float top = -CUDART_INF_F;
  for (int i = begin; i < end; ++i) top = fmaxf(top, p.partial_lse[i * item_heads + from]);
  float mass = 0.0f, sum = 0.0f;
  if (top != -CUDART_INF_F && p.sinks != nullptr) {
    constexpr float kLog2E = 1.44269504088896340736f;
    const float sink = p.sinks[head] * kLog2E;
    top = fmaxf(top, sink);
    mass = exp2f(sink - top);
  }
  for (int i = begin; i < end; ++i) {
    const long long place = i * item_heads + from;
    const float lse = p.partial_lse[place];
    if (lse == -CUDART_INF_F) continue;  // its partial result was never written
    const float weight = exp2f(lse - top);
    mass += weight;
    sum = fmaf(weight, p.partial_out[place * p.head_dim + d], sum);
  }
  const long long place = row * item_heads + from;
  static_cast<T*>(p.out)[place * p.head_dim + d] = FromFloat<T>(mass == 0.0f ? 0.0f : sum / mass);
  if (p.lse != nullptr && d == 0) p.lse[place].value = mass == 0.0f ? -CUDART_INF_F : top + log2f(mass);
}

}  // namespace

template <class T>
int MergeStatesCuda(CUstream_st* stream, const MergeStatesParams& params) {
  void* arguments[] = {const_cast<MergeStatesParams*>(&params)};
  const dim3 grid(static_cast<unsigned>(params.rows), static_cast<unsigned>(params.q_heads),
                  static_cast<unsigned>(params.q_len));
  return cudaLaunchKernel(reinterpret_cast<const void*>(&MergeStates<T>), grid,
                          dim3(static_cast<unsigned>(params.head_dim)), arguments, 0, stream);
}

template int MergeStatesCuda<float>(CUstream_st*, const MergeStatesParams&);
template int MergeStatesCuda<BFloat16>(CUstream_st*, const MergeStatesParams&);
template int MergeStatesCuda<Float16>(CUstream_st*, const MergeStatesParams&);

}  // namespace pristine::attention
