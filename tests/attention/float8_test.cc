#include "attention/kernels/float8.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace pristine::attention {
namespace {

uint8_t Narrow(float value) { return FromFloat<Float8E4M3>(value).bits; }
float Widen(uint32_t bits) { return ToFloat(Float8E4M3{static_cast<uint8_t>(bits)}); }

TEST(Float8E4M3, EveryValueIsWhatItsFieldsSay) {
  for (uint32_t bits = 0; bits <= 0xff; ++bits) {
    const int exponent = static_cast<int>(bits >> 3 & 0xf), mantissa = static_cast<int>(bits & 7);
    const double sign = bits >> 7 == 0 ? 1 : -1;
    if (exponent == 15 && mantissa == 7) {
      EXPECT_TRUE(std::isnan(Widen(bits))) << bits;
    } else {
      const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
      EXPECT_EQ(Widen(bits), sign * magnitude) << bits;
      EXPECT_EQ(Narrow(Widen(bits)), bits);
    }
    EXPECT_EQ(std::signbit(Widen(bits)), sign < 0) << bits;
  }
}

TEST(Float8E4M3, RoundsToTheNearerNeighbourAndTiesToEven) {
  for (uint32_t bits = 0; bits < 0x7e; ++bits) {
    const float middle = (Widen(bits) + Widen(bits + 1)) / 2;
    EXPECT_EQ(Narrow(std::nextafterf(middle, 0)), bits);
    EXPECT_EQ(Narrow(middle), bits % 2 == 0 ? bits : bits + 1);
    EXPECT_EQ(Narrow(std::nextafterf(middle, 1e9f)), bits + 1);
    EXPECT_EQ(Narrow(-std::nextafterf(middle, 1e9f)), (bits + 1) | 0x80u);
  }
}

TEST(Float8E4M3, SaturatesAndKeepsNan) {
  EXPECT_EQ(Narrow(449.0f), 0x7e);
  EXPECT_EQ(Narrow(-1e30f), 0xfe);
  EXPECT_EQ(Narrow(std::numeric_limits<float>::infinity()), 0x7e);
  EXPECT_EQ(Narrow(std::numeric_limits<float>::denorm_min()), 0);
  EXPECT_TRUE(std::isnan(Widen(Narrow(std::numeric_limits<float>::quiet_NaN()))));
}

}  // namespace
}  // namespace pristine::attention
