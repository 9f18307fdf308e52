// Kernels that the suites launch, each for Host and CUDA. No Abseil: test_kernels_cuda.cu includes this.
#ifndef PRISTINE_TESTS_SUPPORT_TEST_KERNELS_H_
#define PRISTINE_TESTS_SUPPORT_TEST_KERNELS_H_

#include <cstdint>

#include "pristine/graph_runtime/kernel.h"

namespace pristine::testing {

// values[i] += 1 for i < count.
struct AddOneParams {
  int* values;
  int64_t count;
};
int AddOneHost(const AddOneParams& p);
int AddOneCuda(CUstream_st* stream, const AddOneParams& p);

// values[index] = value.
struct SetValueParams {
  int* values;
  int64_t index;
  int value;
};
int SetValueHost(const SetValueParams& p);
int SetValueCuda(CUstream_st* stream, const SetValueParams& p);
CudaLaunch SetValueCudaLaunch(const SetValueParams& p);

// to[i] = from[i] for i < count.
struct CopyIntsParams {
  int* to;
  const int* from;
  int64_t count;
};
int CopyIntsHost(const CopyIntsParams& p);
int CopyIntsCuda(CUstream_st* stream, const CopyIntsParams& p);

// The same, but late: at its beginning it lets a kernel begin that was launched over a programmatic edge, then takes
// its time, and then copies. Who does not wait for it sees what was there before.
struct LateCopyParams {
  int* to;
  const int* from;
  int64_t count;
  int64_t nanoseconds;
};
int LateCopyHost(const LateCopyParams& p);
int LateCopyCuda(CUstream_st* stream, const LateCopyParams& p);

// The same as CopyInts, but launched over a programmatic edge: it begins early where the kernel ahead of it lets it,
// and copies once that one has ended.
int NextCopyCuda(CUstream_st* stream, const CopyIntsParams& p);

// Returns once *flag != 0, or after 20 s: a test that forgets the flag fails instead of hanging.
struct SpinParams {
  int* flag;  // pinned memory
};
int SpinHost(const SpinParams& p);
int SpinCuda(CUstream_st* stream, const SpinParams& p);

// Host: returns 7. CUDA: an invalid launch.
struct FailParams {
  int unused;
};
int FailHost(const FailParams& p);
int FailCuda(CUstream_st* stream, const FailParams& p);

// Host: returns kKernelTrap. CUDA: traps.
struct TrapParams {
  int unused;
};
int TrapHost(const TrapParams& p);
int TrapCuda(CUstream_st* stream, const TrapParams& p);

// Keeps the stream busy for about `nanoseconds`.
struct DelayParams {
  int64_t nanoseconds;
};
int DelayHost(const DelayParams& p);
int DelayCuda(CUstream_st* stream, const DelayParams& p);

template <class Params>
void WritesNothing(const Params&, WriteList&) {}

inline constexpr Kernel<AddOneParams> kAddOne{
    "add_one", AddOneHost, PRISTINE_CUDA(AddOneCuda),
    [](const AddOneParams& p, WriteList& writes) { writes.Add(p.values, p.count * sizeof(int)); }};
inline constexpr Kernel<SetValueParams> kSetValue{
    "set_value", SetValueHost, PRISTINE_CUDA(SetValueCuda),
    [](const SetValueParams& p, WriteList& writes) { writes.Add(p.values + p.index, sizeof(int)); },
    PRISTINE_CUDA(SetValueCudaLaunch)};
// The polluter: writes what it does not declare.
inline constexpr Kernel<SetValueParams> kSetValueUndeclared{"set_value_undeclared", SetValueHost,
                                                            PRISTINE_CUDA(SetValueCuda), WritesNothing<SetValueParams>};
inline constexpr Kernel<CopyIntsParams> kCopyInts{
    "copy_ints", CopyIntsHost, PRISTINE_CUDA(CopyIntsCuda),
    [](const CopyIntsParams& p, WriteList& writes) { writes.Add(p.to, p.count * sizeof(int)); }};
inline constexpr Kernel<LateCopyParams> kLateCopy{
    "late_copy", LateCopyHost, PRISTINE_CUDA(LateCopyCuda),
    [](const LateCopyParams& p, WriteList& writes) { writes.Add(p.to, p.count * sizeof(int)); }};
inline constexpr Kernel<CopyIntsParams> kNextCopy{
    "next_copy", CopyIntsHost, PRISTINE_CUDA(NextCopyCuda),
    [](const CopyIntsParams& p, WriteList& writes) { writes.Add(p.to, p.count * sizeof(int)); }};
inline constexpr Kernel<SpinParams> kSpin{"spin", SpinHost, PRISTINE_CUDA(SpinCuda), WritesNothing<SpinParams>};
inline constexpr Kernel<FailParams> kFail{"fail", FailHost, PRISTINE_CUDA(FailCuda), WritesNothing<FailParams>};
inline constexpr Kernel<TrapParams> kTrap{"trap", TrapHost, PRISTINE_CUDA(TrapCuda), WritesNothing<TrapParams>};
inline constexpr Kernel<DelayParams> kDelay{"delay", DelayHost, PRISTINE_CUDA(DelayCuda), WritesNothing<DelayParams>};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_SUPPORT_TEST_KERNELS_H_
