#include "tests/kit_test/naive.h"

namespace pristine::testing {

int NaiveAppendHost(const NaiveParams& p) {
  for (int32_t row = 0; row < p.rows; ++row) AppendRow(p, row);
  return 0;
}

int NaiveAttendHost(const NaiveParams& p) {
  for (int32_t row = 0; row < p.rows; ++row) {
    for (int32_t head = 0; head < p.q_heads; ++head) AttendHead(p, row, head);
  }
  return 0;
}

}  // namespace pristine::testing
