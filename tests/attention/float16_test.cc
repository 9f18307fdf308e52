#include "attention/kernels/float16.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace pristine::attention {
namespace {

uint16_t Narrow(float value) { return FromFloat<Float16>(value).bits; }
float Widen(uint32_t bits) { return ToFloat(Float16{static_cast<uint16_t>(bits)}); }

TEST(Float16, EveryValueIsWhatItsFieldsSay) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 0x1f), mantissa = static_cast<int>(bits & 0x3ff);
    const double sign = bits >> 15 == 0 ? 1 : -1;
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(Widen(bits)), mantissa != 0) << bits;
      EXPECT_EQ(std::isinf(Widen(bits)), mantissa == 0) << bits;
    } else {
      const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      EXPECT_EQ(Widen(bits), sign * magnitude) << bits;
    }
    EXPECT_EQ(std::signbit(Widen(bits)), sign < 0) << bits;
  }
}

TEST(Float16, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    if (std::isnan(Widen(bits))) {
      EXPECT_TRUE(std::isnan(Widen(Narrow(Widen(bits))))) << bits;
    } else {
      EXPECT_EQ(Narrow(Widen(bits)), bits);
    }
  }
}

TEST(Float16, RoundsToTheNearerNeighbourAndTiesToEven) {
  // Between each finite value and the next larger magnitude: just below the middle, the middle, just above. The last
  // middle is 65520, from which on all is infinity.
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const double next = bits + 1 < 0x7c00 ? Widen(bits + 1) : 65536.0;
    const float middle = static_cast<float>((Widen(bits) + next) / 2);
    const float below = std::nextafterf(middle, 0), above = std::nextafterf(middle, 1e9f);
    EXPECT_EQ(Narrow(below), bits);
    EXPECT_EQ(Narrow(middle), bits % 2 == 0 ? bits : bits + 1);
    EXPECT_EQ(Narrow(above), bits + 1);
    EXPECT_EQ(Narrow(-above), (bits + 1) | 0x8000u);
  }
}

TEST(Float16, InfinitiesOverflowAndNanKeepTheirMeaning) {
  EXPECT_EQ(Narrow(std::numeric_limits<float>::infinity()), 0x7c00);
  EXPECT_EQ(Narrow(-std::numeric_limits<float>::infinity()), 0xfc00);
  EXPECT_EQ(Narrow(std::numeric_limits<float>::max()), 0x7c00);
  EXPECT_EQ(Narrow(std::numeric_limits<float>::denorm_min()), 0);
  const uint32_t smallest_nan = 0x7f800001;  // its mantissa is lost when it is cut
  float nan;
  std::memcpy(&nan, &smallest_nan, sizeof(nan));
  EXPECT_TRUE(std::isnan(Widen(Narrow(nan))));
}

}  // namespace
}  // namespace pristine::attention
