// float8 e4m3 storage (OCP "fn": no infinities, NaN is 0x7f or 0xff, the largest is 448), bit-exact on host and device.
// Rounds to nearest even and saturates, as cvt.rn.satfinite.e4m3x2.f32 does. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_FLOAT8_H_
#define PRISTINE_ATTENTION_KERNELS_FLOAT8_H_

#include <cstdint>
#include <cstring>

#include "attention/kernels/bfloat16.h"
#include "attention/kernels/host_device.h"

namespace pristine::attention {

struct Float8E4M3 {
  uint8_t bits;
};

PRISTINE_HOST_DEVICE inline float ToFloat(Float8E4M3 value) {
  const uint32_t sign = (value.bits & 0x80u) << 24;
  const uint32_t exponent = (value.bits >> 3) & 0xfu;
  const uint32_t mantissa = value.bits & 7u;
  if (exponent == 0) {  // a multiple of 2^-9
    const float magnitude = static_cast<float>(mantissa) * 1.953125e-3f;
    return sign == 0 ? magnitude : -magnitude;
  }
  const bool nan = exponent == 15 && mantissa == 7;
  const uint32_t bits = sign | (nan ? 0x7fc00000u : (exponent + 120) << 23 | mantissa << 20);
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

template <>
PRISTINE_HOST_DEVICE inline Float8E4M3 FromFloat<Float8E4M3>(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 24) & 0x80u;
  bits &= 0x7fffffffu;
  uint32_t magnitude;
  if (bits > 0x7f800000u) {
    magnitude = 0x7fu;
  } else if (bits > 0x43e00000u) {
    magnitude = 0x7eu;  // above 448, infinity included
  } else if (bits < 0x3c800000u) {
    // Below 2^-6 the result is a multiple of 2^-9, which is how far neighbours of 2^14 are apart: adding rounds.
    float shifted;
    memcpy(&shifted, &bits, sizeof(shifted));
    shifted += 16384.0f;
    memcpy(&magnitude, &shifted, sizeof(magnitude));
    magnitude -= 0x46800000u;
  } else {
    magnitude = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
  }
  return {static_cast<uint8_t>(sign | magnitude)};
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_FLOAT8_H_
