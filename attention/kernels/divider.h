// Quotients of a divisor that is known at launch, without a division. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_DIVIDER_H_
#define PRISTINE_ATTENTION_KERNELS_DIVIDER_H_

#include <cstdint>

#include "attention/kernels/host_device.h"

namespace pristine::attention {

// floor(n / divisor) for n < 2^31 is the high part of n times ceil(2^(31 + shift) / divisor), with the shift that makes
// this factor a number of 32 bits (Granlund and Montgomery, "Division by invariant integers using multiplication").
struct Divider {
  uint32_t divisor, factor, shift;

  PRISTINE_HOST_DEVICE uint32_t Quotient(uint32_t n) const {
    return static_cast<uint32_t>((uint64_t{2 * n} * factor) >> 32) >> shift;
  }
};

// `divisor` in [1, 2^31).
constexpr Divider MakeDivider(int64_t divisor) {
  const uint64_t d = static_cast<uint64_t>(divisor);
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < d) ++shift;
  return {static_cast<uint32_t>(d), static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d), shift};
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_DIVIDER_H_
