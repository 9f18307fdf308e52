#include "tests/buffers/append_kernel.h"

namespace pristine::testing {
namespace {

__global__ void AppendKernel(AppendParams p) {
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) {
    if (p.slots[i] >= 0) p.pool[p.slots[i]] = p.value;
  }
}

}  // namespace

int AppendCuda(CUstream_st* stream, const AppendParams& p) {
  AppendKernel<<<1, 128, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace pristine::testing
