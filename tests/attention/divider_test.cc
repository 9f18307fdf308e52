#include "attention/kernels/divider.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>

namespace pristine::attention {
namespace {

constexpr int64_t kEnd = int64_t{1} << 31;

TEST(Divider, DividesAtTheEdgesOfEveryQuotient) {
  constexpr uint64_t kSeed = 7;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  const auto check = [&](int64_t divisor) {
    const Divider divider = MakeDivider(divisor);
    EXPECT_EQ(divider.divisor, divisor);
    for (int i = 0; i < 40; ++i) {
      const int64_t quotient = i == 0   ? 0
                               : i == 1 ? (kEnd - 1) / divisor
                                        : static_cast<int64_t>(random() % (kEnd / divisor + 1));
      for (const int64_t n : {quotient * divisor - 1, quotient * divisor, quotient * divisor + divisor - 1, kEnd - 1}) {
        if (n < 0 || n >= kEnd) continue;
        ASSERT_EQ(divider.Quotient(static_cast<uint32_t>(n)), n / divisor) << n << " / " << divisor;
      }
    }
  };
  for (int64_t divisor = 1; divisor <= 300; ++divisor) check(divisor);
  for (int bit = 1; bit < 31; ++bit) {
    for (const int64_t near : {-1, 0, 1}) check((int64_t{1} << bit) + near);
  }
  check(kEnd - 1);
  for (int i = 0; i < 2000; ++i) check(1 + static_cast<int64_t>(random() % (kEnd - 1)));
}

}  // namespace
}  // namespace pristine::attention
