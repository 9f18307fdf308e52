// Plain data, as .cu files include this.
#ifndef PRISTINE_EXAMPLES_BUCKETS_KERNELS_H_
#define PRISTINE_EXAMPLES_BUCKETS_KERNELS_H_

#include <cstdint>

#include "pristine/graph_runtime/kernel.h"

namespace pristine::examples {

// squares[row] = lengths[row]^2, for all rows of the bucket, real or padding.
struct SquareParams {
  const int32_t* lengths;  // [rows]
  int64_t* squares;        // [rows]
  int32_t rows;            // of the bucket: the shape of a launch is frozen too
};

int CudaSquare(CUstream_st* stream, const SquareParams& params);

}  // namespace pristine::examples

#endif  // PRISTINE_EXAMPLES_BUCKETS_KERNELS_H_
