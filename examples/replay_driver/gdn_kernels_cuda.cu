#include "examples/replay_driver/gdn_kernels.h"

namespace pristine::replay_driver {
namespace {

constexpr int kThreads = 256;

// A block per row.
__global__ void __launch_bounds__(kThreads) GdnInputs(GdnInputsParams p) {
  for (int32_t i = threadIdx.x; i < p.dim + 2 * p.v_heads; i += kThreads) WriteGdnInput(p, blockIdx.x, i);
}

// A block per slot and layer.
__global__ void __launch_bounds__(kThreads) StateDifferences(StateDifferencesParams p) {
  const int64_t words = p.layer_bytes / 4, begin = blockIdx.x * words;
  const uint32_t* const one = reinterpret_cast<const uint32_t*>(p.one) + begin;
  const uint32_t* const other = reinterpret_cast<const uint32_t*>(p.other) + begin;
  bool differs = false;
  for (int64_t i = threadIdx.x; i < words; i += kThreads) differs |= one[i] != other[i];
  if (__syncthreads_or(differs) != 0 && threadIdx.x == 0) p.differences[blockIdx.x] = 1;
}

}  // namespace

int LaunchGdnInputs(CUstream_st* stream, const GdnInputsParams& params) {
  GdnInputs<<<params.rows, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

int LaunchStateDifferences(CUstream_st* stream, const StateDifferencesParams& params) {
  StateDifferences<<<params.slots * params.layers, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pristine::replay_driver
