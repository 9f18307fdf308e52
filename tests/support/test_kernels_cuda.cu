#include <cuda_runtime.h>

#include "attention/kernels/dependent_launch.cuh"
#include "tests/support/test_kernels.h"

namespace pristine::testing {
namespace {

constexpr int kThreads = 128;

__device__ unsigned long long Now() {
  unsigned long long nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
}

__global__ void AddOneKernel(AddOneParams p) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += stride) ++p.values[i];
}

__global__ void SetValueKernel(SetValueParams p) { p.values[p.index] = p.value; }

__device__ void CopyAll(int* to, const int* from, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) to[i] = from[i];
}

__global__ void CopyIntsKernel(CopyIntsParams p) { CopyAll(p.to, p.from, p.count); }

// Waits by itself: what shows that others wait must not rest on how they do it.
__global__ void NextCopyKernel(CopyIntsParams p) {
#if __CUDA_ARCH__ >= 900  // before it, programmatic edges are plain ones
  cudaGridDependencySynchronize();
#endif
  CopyAll(p.to, p.from, p.count);
}

__global__ void LateCopyKernel(LateCopyParams p) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
  const unsigned long long end = Now() + static_cast<unsigned long long>(p.nanoseconds);
  while (Now() < end) {
  }
  CopyAll(p.to, p.from, p.count);
}

__global__ void SpinKernel(SpinParams p) {
  const unsigned long long deadline = Now() + 20'000'000'000ull;
  while (*static_cast<volatile int*>(p.flag) == 0 && Now() < deadline) __nanosleep(1000);
}

__global__ void DelayKernel(DelayParams p) {
  const unsigned long long end = Now() + static_cast<unsigned long long>(p.nanoseconds);
  while (Now() < end) {
  }
}

__global__ void NothingKernel() {}

__global__ void TrapKernel() { __trap(); }

}  // namespace

int AddOneCuda(CUstream_st* stream, const AddOneParams& p) {
  AddOneKernel<<<4, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

CudaLaunch SetValueCudaLaunch(const SetValueParams&) {
  return {reinterpret_cast<const void*>(SetValueKernel), 1, 1, 0};
}

int SetValueCuda(CUstream_st* stream, const SetValueParams& p) {
  SetValueKernel<<<1, 1, 0, stream>>>(p);
  return cudaGetLastError();
}

int CopyIntsCuda(CUstream_st* stream, const CopyIntsParams& p) {
  CopyIntsKernel<<<4, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

int LateCopyCuda(CUstream_st* stream, const LateCopyParams& p) {
  LateCopyKernel<<<4, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

int NextCopyCuda(CUstream_st* stream, const CopyIntsParams& p) {
  return attention::LaunchDependent(stream, NextCopyKernel, dim3(4), dim3(kThreads), 0, p);
}

int SpinCuda(CUstream_st* stream, const SpinParams& p) {
  SpinKernel<<<1, 1, 0, stream>>>(p);
  return cudaGetLastError();
}

int FailCuda(CUstream_st* stream, const FailParams&) {
  NothingKernel<<<1, 4096, 0, stream>>>();  // more threads than a block can have
  return cudaGetLastError();
}

int TrapCuda(CUstream_st* stream, const TrapParams&) {
  TrapKernel<<<1, 1, 0, stream>>>();
  return cudaGetLastError();
}

int DelayCuda(CUstream_st* stream, const DelayParams& p) {
  DelayKernel<<<1, 1, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace pristine::testing
