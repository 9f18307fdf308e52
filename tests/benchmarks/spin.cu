#include "tests/benchmarks/spin.h"

namespace pristine::benchmarks {
namespace {

__global__ void Spin(SpinParams params) {
  const long long begin = clock64();
  while (clock64() - begin < params.cycles) {
  }
  *params.total += *params.input;
}

}  // namespace

int SpinCuda(CUstream_st* stream, const SpinParams& params) {
  Spin<<<1, 1, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pristine::benchmarks
