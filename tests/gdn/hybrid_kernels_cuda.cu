#include "tests/gdn/hybrid_kernels.h"

namespace pristine::testing {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) Embed(EmbedParams p) {
  for (int32_t i = threadIdx.x; i < p.width; i += kThreads) EmbedElement(p, blockIdx.x, i);
}
__global__ void __launch_bounds__(kThreads) Dense(DenseParams p) {
  const int32_t o = blockIdx.y * kThreads + threadIdx.x;
  if (o < p.out) DenseElement(p, blockIdx.x, o);
}
__global__ void Argmax(ArgmaxParams p) { ArgmaxRow(p, blockIdx.x); }

}  // namespace

int EmbedCuda(CUstream_st* stream, const EmbedParams& p) {
  Embed<<<p.rows, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}
int DenseCuda(CUstream_st* stream, const DenseParams& p) {
  Dense<<<dim3(p.rows, (p.out + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}
int ArgmaxCuda(CUstream_st* stream, const ArgmaxParams& p) {
  Argmax<<<p.rows, 1, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace pristine::testing
