// Programmatic dependent launch: a kernel's blocks are set up while the kernel before in the stream drains. They wait
// for its end, and for all memory it wrote, before they read or write anything, so that the stream's order holds as
// ever. A build for devices before sm_90 overlaps nothing. A captured launch becomes a programmatic edge of the graph.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_OVERLAP_CUH_
#define PRISTINE_ATTENTION_GDN_KERNELS_OVERLAP_CUH_

#include <cuda_runtime.h>

#include <initializer_list>

struct CUstream_st;

namespace pristine::attention::gdn {

// Each thread of a kernel that LaunchOverlapped launches calls it, before its first access to memory.
__device__ inline void AwaitKernelBefore() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The next kernel's blocks may take what multiprocessors have left, once each block of this one has called it or ended.
// Best called behind the loads: called first, the next kernel's blocks were in the way of short kernels (measured).
__device__ inline void AllowNextKernel() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Whether each architecture that is compiled waits: code of one that does not, translated for a newer device, must not
// be launched early.
constexpr bool EveryArchitectureWaits() {
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    if (architecture < 900) return false;
  }
  return true;
}

template <class... Args>
int LaunchOverlapped(CUstream_st* stream, void (*kernel)(Args...), dim3 grid, int threads, const Args&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = EveryArchitectureWaits() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_OVERLAP_CUH_
