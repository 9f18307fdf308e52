#include "tests/benchmarks/spin.h"

namespace pristine::benchmarks {
namespace {

__device__ void SpinAndAdd(const SpinParams& params) {
  const long long begin = clock64();
  while (clock64() - begin < params.cycles) {
  }
  *params.total += *params.input;
}

__global__ void Spin(SpinParams params) { SpinAndAdd(params); }

__global__ void SpinEarly(SpinParams params) {
#if __CUDA_ARCH__ >= 900  // before it, programmatic edges are plain ones
  cudaGridDependencySynchronize();
#endif
  SpinAndAdd(params);
}

}  // namespace

int SpinCuda(CUstream_st* stream, const SpinParams& params) {
  Spin<<<1, 1, 0, stream>>>(params);
  return cudaGetLastError();
}

int SpinEarlyCuda(CUstream_st* stream, const SpinParams& params) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = config.blockDim = dim3(1);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, SpinEarly, params);
}

}  // namespace pristine::benchmarks
