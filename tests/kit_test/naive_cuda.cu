#include "tests/kit_test/naive.h"

namespace pristine::testing {
namespace {

// One block more than rows: a fault may ask for no rows, and a launch needs a block.
__global__ void Append(NaiveParams p) {
  if (static_cast<int32_t>(blockIdx.x) < p.rows) AppendRow(p, blockIdx.x);
}
__global__ void Attend(NaiveParams p) {
  if (static_cast<int32_t>(blockIdx.x) < p.rows) AttendHead(p, blockIdx.x, threadIdx.x);
}

}  // namespace

int NaiveAppendCuda(CUstream_st* stream, const NaiveParams& p) {
  Append<<<p.rows + 1, 1, 0, stream>>>(p);
  return cudaGetLastError();
}

int NaiveAttendCuda(CUstream_st* stream, const NaiveParams& p) {
  Attend<<<p.rows + 1, p.q_heads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace pristine::testing
