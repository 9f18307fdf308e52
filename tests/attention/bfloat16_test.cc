#include "attention/kernels/bfloat16.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace pristine::attention {
namespace {

uint16_t Narrow(float value) { return FromFloat<BFloat16>(value).bits; }

TEST(BFloat16, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const float value = ToFloat(BFloat16{static_cast<uint16_t>(bits)});
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(ToFloat(FromFloat<BFloat16>(value)))) << bits;
    } else {
      EXPECT_EQ(Narrow(value), bits);
    }
  }
}

TEST(BFloat16, RoundsToTheNearerNeighbourAndTiesToEven) {
  // Between each finite value and the next larger magnitude: just below the middle, the middle, just above.
  for (uint32_t bits = 0; bits < 0x7f7f; ++bits) {
    const uint32_t middle = (bits << 16) + 0x8000;
    const auto rounded = [](uint32_t word) {
      float value;
      std::memcpy(&value, &word, sizeof(value));
      return Narrow(value);
    };
    EXPECT_EQ(rounded(middle - 1), bits);
    EXPECT_EQ(rounded(middle), bits % 2 == 0 ? bits : bits + 1);
    EXPECT_EQ(rounded(middle + 1), bits + 1);
    EXPECT_EQ(rounded((middle + 1) | 0x80000000u), (bits + 1) | 0x8000u);
  }
}

TEST(BFloat16, InfinitiesOverflowAndNanKeepTheirMeaning) {
  EXPECT_EQ(Narrow(std::numeric_limits<float>::infinity()), 0x7f80);
  EXPECT_EQ(Narrow(-std::numeric_limits<float>::infinity()), 0xff80);
  EXPECT_EQ(Narrow(std::numeric_limits<float>::max()), 0x7f80);
  uint32_t smallest_nan = 0x7f800001;  // its mantissa is lost when it is cut
  float nan;
  std::memcpy(&nan, &smallest_nan, sizeof(nan));
  EXPECT_TRUE(std::isnan(ToFloat(FromFloat<BFloat16>(nan))));
}

}  // namespace
}  // namespace pristine::attention
