// One block per (row, query head), one thread per output element. Items are merged in order, so that the result is the
// same every time.
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
  const int d = threadIdx.x;
  const int count = min(max(p.plan[kPlanCount], 0), p.max_items);
  const int begin = min(max(p.plan[kPlanItemIndptr + row], 0), count);
  const int end = min(max(p.plan[kPlanItemIndptr + row + 1], 0), count);
  float top = -CUDART_INF_F;
  for (int i = begin; i < end; ++i) top = fmaxf(top, p.partial_lse[static_cast<long long>(i) * p.q_heads + head]);
  float mass = 0.0f, sum = 0.0f;
  for (int i = begin; i < end; ++i) {
    const long long place = static_cast<long long>(i) * p.q_heads + head;
    const float lse = p.partial_lse[place];
    if (lse == -CUDART_INF_F) continue;  // its partial result was never written
    const float weight = exp2f(lse - top);
    mass += weight;
    sum = fmaf(weight, p.partial_out[place * p.head_dim + d], sum);
  }
  const long long place = static_cast<long long>(row) * p.q_heads + head;
  static_cast<T*>(p.out)[place * p.head_dim + d] = FromFloat<T>(mass == 0.0f ? 0.0f : sum / mass);
  if (p.lse != nullptr && d == 0) p.lse[place].value = mass == 0.0f ? -CUDART_INF_F : top + log2f(mass);
}

}  // namespace

template <class T>
int MergeStatesCuda(CUstream_st* stream, const MergeStatesParams& params) {
  void* arguments[] = {const_cast<MergeStatesParams*>(&params)};
  const dim3 grid(static_cast<unsigned>(params.rows), static_cast<unsigned>(params.q_heads));
  return cudaLaunchKernel(reinterpret_cast<const void*>(&MergeStates<T>), grid,
                          dim3(static_cast<unsigned>(params.head_dim)), arguments, 0, stream);
}

template int MergeStatesCuda<float>(CUstream_st*, const MergeStatesParams&);
template int MergeStatesCuda<BFloat16>(CUstream_st*, const MergeStatesParams&);

}  // namespace pristine::attention
