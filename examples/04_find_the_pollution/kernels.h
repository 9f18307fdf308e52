// The kernels of an imaginary engine. Plain data, as .cu files include this.
#ifndef PRISTINE_EXAMPLES_FIND_THE_POLLUTION_KERNELS_H_
#define PRISTINE_EXAMPLES_FIND_THE_POLLUTION_KERNELS_H_

#include <cstdint>

#include "pristine/graph_runtime/kernel.h"

namespace pristine::examples {

struct ScaleRowsParams {
  float* rows;  // [count]
  int32_t count;
  float factor;
};

// Writes the length of each row in blocks.
struct CountBlocksParams {
  const int32_t* lengths;     // [rows]
  const int32_t* block_size;  // [1]
  int32_t* blocks;            // [rows]; but the kernel was given room for one row too many
  int32_t rows;
};

int CudaScaleRows(CUstream_st* stream, const ScaleRowsParams& params);
int CudaCountBlocks(CUstream_st* stream, const CountBlocksParams& params);

}  // namespace pristine::examples

#endif  // PRISTINE_EXAMPLES_FIND_THE_POLLUTION_KERNELS_H_
