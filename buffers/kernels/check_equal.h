// Compares two int32 arrays and reports the first difference as kPlanMismatch. POD only: the .cu file includes this.
#ifndef PRISTINE_BUFFERS_KERNELS_CHECK_EQUAL_H_
#define PRISTINE_BUFFERS_KERNELS_CHECK_EQUAL_H_

#include <cstdint>

#include "pristine/buffers/report.h"
#include "pristine/graph_runtime/kernel.h"

namespace pristine::buffers {

struct CheckEqualParams {
  const int32_t* expected = nullptr;
  const int32_t* actual = nullptr;
  int64_t count = 0;
  int32_t buffer = 0;       // id of `actual`
  int32_t report_kind = 0;  // Violation::Kind::kPlanMismatch
  ReportRing ring;
};

int CheckEqualHost(const CheckEqualParams& params);
int CheckEqualCuda(CUstream_st* stream, const CheckEqualParams& params);

inline constexpr Kernel<CheckEqualParams> kCheckEqual = {
    "pristine_check_equal", CheckEqualHost, PRISTINE_CUDA(CheckEqualCuda), [](const CheckEqualParams&, WriteList&) {}};

}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_KERNELS_CHECK_EQUAL_H_
