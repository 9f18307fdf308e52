#include "buffers/kernels/check_equal.h"

namespace pristine::buffers {
namespace {

constexpr int kThreads = 512;

// One block: a few thousand elements, and the first difference falls out of one reduction.
__global__ void __launch_bounds__(kThreads) CheckEqualKernel(CheckEqualParams params) {
  __shared__ unsigned long long first;
  if (threadIdx.x == 0) first = ~0ULL;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < params.count; i += kThreads) {
    if (params.expected[i] != params.actual[i]) {
      atomicMin(&first, static_cast<unsigned long long>(i));
      break;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && first != ~0ULL) {
    const int64_t index = static_cast<int64_t>(first);
    Report(params.ring, params.report_kind, params.buffer, index, params.expected[index], params.actual[index]);
  }
}

}  // namespace

int CheckEqualCuda(CUstream_st* stream, const CheckEqualParams& params) {
  CheckEqualKernel<<<1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pristine::buffers
