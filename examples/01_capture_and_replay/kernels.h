// Plain data, as .cu files include this.
#ifndef PRISTINE_EXAMPLES_CAPTURE_AND_REPLAY_KERNELS_H_
#define PRISTINE_EXAMPLES_CAPTURE_AND_REPLAY_KERNELS_H_

#include <cstdint>

#include "pristine/graph_runtime/kernel.h"

namespace pristine::examples {

// y[i] = a * x[i] + b
struct AffineParams {
  const float* x;  // [count]
  float* y;        // [count]
  int32_t count;
  float a, b;
};

int CudaAffine(CUstream_st* stream, const AffineParams& params);

}  // namespace pristine::examples

#endif  // PRISTINE_EXAMPLES_CAPTURE_AND_REPLAY_KERNELS_H_
