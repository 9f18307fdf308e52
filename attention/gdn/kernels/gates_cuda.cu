#include <cuda_runtime.h>

#include "attention/gdn/kernels/gates_device.cuh"

namespace pristine::attention::gdn {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) GatesKernel(const __grid_constant__ GatesParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.tokens * p.v_heads) return;
  const Gate gate = GateOf(p, i / p.v_heads, static_cast<int32_t>(i % p.v_heads));
  p.g[i] = gate.g;
  p.beta[i] = gate.beta;
}

}  // namespace

int GatesCuda(CUstream_st* stream, const GatesParams& params) {
  const int64_t blocks = (params.tokens * params.v_heads + kThreads - 1) / kThreads;
  GatesKernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pristine::attention::gdn
