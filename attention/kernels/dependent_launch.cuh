// Launches that are on the device before the kernel ahead of them has ended, and wait there: 0.5 to 1 us of each small
// kernel is spent on being launched. Captured, they become programmatic edges.
//
// The order of the stream holds only if every thread of such a kernel calls WaitForStream before it touches memory,
// also where it then has nothing to do: a kernel that ended without waiting could end before the one ahead of it, and
// the next one would wait for the wrong end. Hints may come before: what they read is a guess, read again afterwards,
// and what they fetch goes to L2, where the kernel ahead writes. (CUDA C++ Programming Guide, "Programmatic Dependent
// Launch and Synchronization".)
#ifndef PRISTINE_ATTENTION_KERNELS_DEPENDENT_LAUNCH_CUH_
#define PRISTINE_ATTENTION_KERNELS_DEPENDENT_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <initializer_list>

namespace pristine::attention {

// Waits for all that the stream held before.
__device__ inline void WaitForStream() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Lets the next kernel of the stream come to the device, if it waits like this one, once all blocks have been here or
// have ended. Its blocks take room: in kernels that fill the device call it behind the loads (measured).
__device__ inline void LetNextBegin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Whether what runs on the current device waits: code for its own generation does from sm_90 on. A device without such
// code translates what was written for an older one, which may not wait.
inline bool CodeWaits() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    if (architecture >= 900 && architecture / 100 == major) return true;
  }
  return false;
}

// Returns a cudaError_t.
template <class... Params>
int LaunchDependent(CUstream_st* stream, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                    const Params&... params) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = CodeWaits() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_DEPENDENT_LAUNCH_CUH_
