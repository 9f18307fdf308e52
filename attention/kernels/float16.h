// float16 storage, bit-exact on host and device: round to nearest even, NaN stays NaN. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_FLOAT16_H_
#define PRISTINE_ATTENTION_KERNELS_FLOAT16_H_

#include <cstdint>
#include <cstring>

#include "attention/kernels/bfloat16.h"
#include "attention/kernels/host_device.h"

namespace pristine::attention {

struct Float16 {
  uint16_t bits;
};

PRISTINE_HOST_DEVICE inline float ToFloat(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {  // a multiple of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign == 0 ? magnitude : -magnitude;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

template <>
PRISTINE_HOST_DEVICE inline Float16 FromFloat<Float16>(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t magnitude;
  if (bits > 0x7f800000u) {
    magnitude = 0x7e00u | ((bits >> 13) & 0x3ffu);  // quiet, so that cutting the mantissa leaves no infinity
  } else if (bits >= 0x477ff000u) {
    magnitude = 0x7c00u;  // 65520 and above round to infinity
  } else if (bits < 0x38800000u) {
    // Below 2^-14 the result is a multiple of 2^-24, which is how far neighbours of 0.5 are apart: adding rounds.
    float shifted;
    memcpy(&shifted, &bits, sizeof(shifted));
    shifted += 0.5f;
    memcpy(&magnitude, &shifted, sizeof(magnitude));
    magnitude -= 0x3f000000u;
  } else {
    magnitude = ((bits + 0xfffu + ((bits >> 13) & 1u)) >> 13) - (112u << 10);
  }
  return {static_cast<uint16_t>(sign | magnitude)};
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_FLOAT16_H_
