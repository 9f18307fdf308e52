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
// Launched over a programmatic edge: it begins while the kernel before it runs, and waits for it before it reads.
int SpinEarlyCuda(CUstream_st* stream, const SpinParams& params);

inline void SpinWrites(const SpinParams& params, WriteList& writes) {
  writes.Add(params.total, sizeof(*params.total));
}
inline constexpr Kernel<SpinParams> kSpin = {"spin", SpinHost, PRISTINE_CUDA(SpinCuda), SpinWrites};
inline constexpr Kernel<SpinParams> kSpinEarly = {"spin_early", SpinHost, PRISTINE_CUDA(SpinEarlyCuda), SpinWrites};

}  // namespace pristine::benchmarks

#endif  // PRISTINE_TESTS_BENCHMARKS_SPIN_H_
