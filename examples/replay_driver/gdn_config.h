// The gated delta net layers of a hybrid model: their shape, and their numbers, which are pure functions of what they
// belong to, as those of kv_hash.h. No Abseil, no CUDA headers.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_CONFIG_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_CONFIG_H_

#include <cstdint>

#include "examples/replay_driver/kv_hash.h"

namespace pristine::replay_driver {

inline constexpr int32_t kGdnPerAttention = 3;  // layers in front of each attention layer
inline constexpr int32_t kGdnHeadDim = 128;

struct GdnConfig {
  int32_t layers = 0;  // 0: the model has attention only
  int32_t qk_heads = 1, v_heads = 2;
  int32_t draft_tokens = 0;  // of a request that a step verifies; 0: steps take one token each

  int32_t step_tokens() const { return draft_tokens == 0 ? 1 : draft_tokens; }  // of a request
  int32_t qk_dim() const { return qk_heads * kGdnHeadDim; }
  int32_t v_dim() const { return v_heads * kGdnHeadDim; }
  int32_t dim() const { return 2 * qk_dim() + v_dim(); }  // channels of the convolution: q, k, v
};

enum class GdnTensor : uint32_t { kMixed, kA, kB, kWeight, kALog, kDtBias };

// Of a request's row at one position, or (request and position 0) of a layer's parameters.
PRISTINE_HOST_DEVICE constexpr uint64_t GdnKey(uint64_t seed, int32_t request, int32_t layer, int32_t position,
                                               GdnTensor tensor) {
  const uint64_t where =
      (static_cast<uint64_t>(static_cast<uint32_t>(request)) << 32) | static_cast<uint32_t>(position);
  const uint64_t what = (static_cast<uint64_t>(static_cast<uint32_t>(layer)) << 32) | static_cast<uint32_t>(tensor);
  return Combine(Combine(~seed, what), where);
}

// Per token, so that some heads forget within a few tokens and others hold on to thousands: with these ranges the decay
// exp(-exp(a_log) softplus(a + dt_bias)) lies between 0.16 and 0.99988.
PRISTINE_HOST_DEVICE constexpr float GdnElement(uint64_t key, GdnTensor tensor, int32_t index) {
  const float x = Element(key, index);
  switch (tensor) {
    case GdnTensor::kA:
    case GdnTensor::kDtBias:
      return 2 * x - 2;
    case GdnTensor::kB:
      return 3 * x;
    default:
      return x;
  }
}

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_CONFIG_H_
