// The made-up model's numbers: every element of Q, K and V is a pure function of what it belongs to, so that the
// device, an eager run and the float64 truth all agree on them without sharing any memory. No Abseil, no CUDA headers.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_KV_HASH_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_KV_HASH_H_

#include <cstdint>

#ifdef __CUDACC__
#define PRISTINE_HOST_DEVICE __host__ __device__
#else
#define PRISTINE_HOST_DEVICE
#endif

namespace pristine::replay_driver {

enum class Tensor : uint32_t { kQuery, kKey, kValue };

// A bijection of 64 bits whose every output bit depends on every input bit (the finalizer of SplitMix64).
PRISTINE_HOST_DEVICE constexpr uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}
PRISTINE_HOST_DEVICE constexpr uint64_t Combine(uint64_t key, uint64_t value) {
  return Mix(key + 0x9e3779b97f4a7c15ULL + Mix(value));
}

// Of one head's row at one position.
PRISTINE_HOST_DEVICE constexpr uint64_t RowKey(uint64_t seed, int32_t request, int32_t layer, int32_t position,
                                               int32_t head, Tensor tensor) {
  const uint64_t where =
      (static_cast<uint64_t>(static_cast<uint32_t>(request)) << 32) | static_cast<uint32_t>(position);
  const uint64_t what = (static_cast<uint64_t>(static_cast<uint32_t>(layer)) << 32) |
                        (static_cast<uint64_t>(static_cast<uint32_t>(head)) << 2) | static_cast<uint32_t>(tensor);
  return Combine(Combine(seed, where), what);
}

// The seed of a token's rows: 0 is the request's own token at its position, anything else one that was guessed there.
PRISTINE_HOST_DEVICE constexpr uint64_t TokenSeed(uint64_t seed, int32_t draft) {
  return draft == 0 ? seed : Combine(seed, static_cast<uint64_t>(static_cast<uint32_t>(draft)));
}

// In [-1, 1): 24 bits, so exact in float.
PRISTINE_HOST_DEVICE constexpr float Element(uint64_t row_key, int32_t dim) {
  const uint64_t bits = Mix(row_key + static_cast<uint64_t>(dim + 1) * 0x9e3779b97f4a7c15ULL) >> 40;
  return static_cast<float>(static_cast<int32_t>(bits) - (1 << 23)) * (1.0f / (1 << 23));
}

// The nearest bfloat16, ties to even, as its 16 bits; and back. NaN stays NaN: CUDA's own, 0x7fffffff, would round up
// to -0.
PRISTINE_HOST_DEVICE inline uint16_t ToBFloat16(float value) {
  union {
    float number;
    uint32_t bits;
  } u = {value};
  if ((u.bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u.bits >> 16) | 0x40u);
  return static_cast<uint16_t>((u.bits + 0x7fffu + ((u.bits >> 16) & 1u)) >> 16);
}
PRISTINE_HOST_DEVICE inline float FromBFloat16(uint16_t bits) {
  union {
    uint32_t bits;
    float number;
  } u = {static_cast<uint32_t>(bits) << 16};
  return u.number;
}

// Where a request longer than K attends a sparse layer: its last, possibly partial, block and `topk` - 1 others, drawn
// in ascending order. `blocks` = ceil(length / block) >= topk. Calls add(block) topk times, ascending.
template <class Add>
void SelectBlocks(uint64_t seed, int32_t request, int32_t layer, int32_t group, int32_t blocks, int32_t topk, Add add) {
  const uint64_t where = (static_cast<uint64_t>(static_cast<uint32_t>(request)) << 32) | static_cast<uint32_t>(blocks);
  const uint64_t what = (static_cast<uint64_t>(static_cast<uint32_t>(layer)) << 32) | static_cast<uint32_t>(group);
  const uint64_t key = Combine(Combine(~seed, where), what);
  int32_t needed = topk - 1;
  // Each block in turn is taken with probability needed / left, which draws every subset equally often.
  for (int32_t block = 0; needed > 0; ++block) {
    const uint64_t left = static_cast<uint64_t>(blocks - 1 - block);
    if (Combine(key, static_cast<uint64_t>(block)) % left < static_cast<uint64_t>(needed)) {
      add(block);
      --needed;
    }
  }
  add(blocks - 1);
}

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_KV_HASH_H_
