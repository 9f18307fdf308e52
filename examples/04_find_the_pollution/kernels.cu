#include "examples/04_find_the_pollution/kernels.h"

namespace pristine::examples {
namespace {

__global__ void ScaleRows(ScaleRowsParams p) {
  const int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.count) p.rows[i] *= p.factor;
}

__global__ void CountBlocks(CountBlocksParams p) {
  const int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.rows) p.blocks[i] = (p.lengths[i] + *p.block_size - 1) / *p.block_size;
}

}  // namespace

int CudaScaleRows(CUstream_st* stream, const ScaleRowsParams& params) {
  ScaleRows<<<(params.count + 127) / 128, 128, 0, stream>>>(params);
  return cudaGetLastError();
}

int CudaCountBlocks(CUstream_st* stream, const CountBlocksParams& params) {
  CountBlocks<<<(params.rows + 127) / 128, 128, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pristine::examples
