#include "tests/kit_test/naive.h"

namespace pristine::testing {
namespace {

__global__ void Append(NaiveParams p) { AppendRow(p, blockIdx.x); }
__global__ void Attend(NaiveParams p) { AttendHead(p, blockIdx.x, threadIdx.x); }

}  // namespace

int NaiveAppendCuda(CUstream_st* stream, const NaiveParams& p) {
  if (p.rows == 0) return cudaSuccess;  // a fault may ask for no rows
  Append<<<p.rows, 1, 0, stream>>>(p);
  return cudaGetLastError();
}

int NaiveAttendCuda(CUstream_st* stream, const NaiveParams& p) {
  if (p.rows == 0) return cudaSuccess;
  Attend<<<p.rows, p.q_heads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace pristine::testing
