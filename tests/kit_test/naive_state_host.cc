#include "tests/kit_test/naive_state.h"

namespace pristine::testing {

int NaiveStateHost(const NaiveStateParams& p) {
  for (int32_t row = 0; row < p.rows; ++row) {
    for (int32_t i = 0; i < p.width; ++i) StepState(p, row, i);
  }
  return 0;
}

}  // namespace pristine::testing
