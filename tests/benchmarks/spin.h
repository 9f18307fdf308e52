// The body of the benchmark's graph: kernels that take a given time and depend on each other. Plain data, as .cu files
// include this.
#ifndef PRISTINE_TESTS_BENCHMARKS_SPIN_H_
#define PRISTINE_TESTS_BENCHMARKS_SPIN_H_

#include <cstdint>

#include "pristine/graph_runtime/kernel.h"

namespace pristine::benchmarks {

// Adds input[0] to *total, `cycles` clock cycles after it began.
struct SpinParams {
  const int32_t* input;
  int64_t* total;
  int64_t cycles;
};

int SpinHost(const SpinParams& params);
int SpinCuda(CUstream_st* stream, const SpinParams& params);

inline constexpr Kernel<SpinParams> kSpin = {
    "spin", SpinHost, PRISTINE_CUDA(SpinCuda),
    [](const SpinParams& params, WriteList& writes) { writes.Add(params.total, sizeof(*params.total)); }};

}  // namespace pristine::benchmarks

#endif  // PRISTINE_TESTS_BENCHMARKS_SPIN_H_
