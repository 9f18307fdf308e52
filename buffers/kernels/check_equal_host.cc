#include "buffers/kernels/check_equal.h"

namespace pristine::buffers {

int CheckEqualHost(const CheckEqualParams& params) {
  for (int64_t i = 0; i < params.count; ++i) {
    if (params.expected[i] != params.actual[i]) {
      Report(params.ring, params.report_kind, params.buffer, i, params.expected[i], params.actual[i]);
      break;
    }
  }
  return 0;
}

}  // namespace pristine::buffers
