// A block copies part of one state; eight elements to a thread and step, four steps in flight.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/channels_device.cuh"
#include "attention/gdn/kernels/state_copy.h"

namespace pristine::attention::gdn {
namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 4;
constexpr int kPer = 8;
constexpr int kBlockElements = kThreads * kSteps * kPer;

template <class To, class From>
__device__ Pack<To, kPer> Converted(const Pack<From, kPer>& from) {
  if constexpr (sizeof(To) == sizeof(From)) {
    return from;
  } else {
    float values[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) values[i] = from.Float(i);
    Pack<To, kPer> to;
    to.Set(values);
    return to;
  }
}

template <class From, class To>
__device__ void Copy(const From* from, To* to, int64_t elements) {
  const int64_t first = int64_t{blockIdx.x} * kBlockElements + int64_t{threadIdx.x} * kPer;
  Pack<From, kPer> values[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t at = first + s * kThreads * kPer;
    values[s] = *reinterpret_cast<const Pack<From, kPer>*>(from + (at < elements ? at : 0));
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t at = first + s * kThreads * kPer;
    if (at < elements) *reinterpret_cast<Pack<To, kPer>*>(to + at) = Converted<To>(values[s]);
  }
}

template <class Pool, class Gathered>
__global__ void __launch_bounds__(kThreads) GdnStateCopyKernel(const __grid_constant__ StateCopyParams p) {
  const int row = blockIdx.y;
  const int index = p.cache_indices[row];
  const bool gather = p.gathered_indices != nullptr;
  const bool padded = index < 0 || index >= p.slots;
  const bool copied = !padded || (gather && p.clamp_to_zero);
  if (gather && blockIdx.x == 0 && threadIdx.x == 0) p.gathered_indices[row] = copied ? row : -1;
  if (!copied) return;
  Pool* const state = static_cast<Pool*>(p.pool) + (padded ? 0 : index) * p.pool_stride;
  Gathered* const own = static_cast<Gathered*>(p.gathered) + row * p.gathered_stride;
  if (gather) {
    Copy(state, own, p.elements);
  } else {
    Copy(own, state, p.elements);
  }
}

template <class Pool, class Gathered>
int LaunchCopy(CUstream_st* stream, const StateCopyParams& p) {
  const dim3 grid(static_cast<unsigned>((p.elements + kBlockElements - 1) / kBlockElements),
                  static_cast<unsigned>(p.rows));
  GdnStateCopyKernel<Pool, Gathered><<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int StateCopyCuda(CUstream_st* stream, const StateCopyParams& params) {
  const bool wide = params.pool_dtype == DType::kFloat32;
  if (params.gathered_dtype == DType::kFloat32) {
    return wide ? LaunchCopy<float, float>(stream, params) : LaunchCopy<__nv_bfloat16, float>(stream, params);
  }
  return wide ? LaunchCopy<float, __nv_bfloat16>(stream, params)
              : LaunchCopy<__nv_bfloat16, __nv_bfloat16>(stream, params);
}

}  // namespace pristine::attention::gdn
