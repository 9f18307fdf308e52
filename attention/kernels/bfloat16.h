// bfloat16 storage, bit-exact on host and device: round to nearest even, NaN stays NaN. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_BFLOAT16_H_
#define PRISTINE_ATTENTION_KERNELS_BFLOAT16_H_

#include <cstdint>
#include <cstring>

#include "attention/kernels/host_device.h"

namespace pristine::attention {

struct BFloat16 {
  uint16_t bits;
};

PRISTINE_HOST_DEVICE inline float ToFloat(float value) { return value; }
PRISTINE_HOST_DEVICE inline float ToFloat(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

template <class T>
PRISTINE_HOST_DEVICE inline T FromFloat(float value);
template <>
PRISTINE_HOST_DEVICE inline float FromFloat<float>(float value) {
  return value;
}
template <>
PRISTINE_HOST_DEVICE inline BFloat16 FromFloat<BFloat16>(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // quiet, so that cutting the mantissa leaves no infinity
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_BFLOAT16_H_
