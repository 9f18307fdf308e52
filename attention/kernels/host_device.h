// PRISTINE_HOST_DEVICE marks what both kernels and host code call. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_HOST_DEVICE_H_
#define PRISTINE_ATTENTION_KERNELS_HOST_DEVICE_H_

#ifdef __CUDACC__
#define PRISTINE_HOST_DEVICE __host__ __device__
#else
#define PRISTINE_HOST_DEVICE
#endif

#endif  // PRISTINE_ATTENTION_KERNELS_HOST_DEVICE_H_
