#include <cstddef>
#include <cstring>

#include "attention/kernels/append_kv.h"

namespace pristine::attention {
namespace {

// Calls write(from, to) with the first elements of each head that has a slot.
template <class Write>
void ForEachHead(const AppendKvParams& p, Write write) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    const int64_t slot = p.slots[token];
    if (slot < 0 || slot >= p.num_slots) continue;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      write((token * p.kv_heads + head) * p.head_dim,
            slot / p.page_size * p.page_stride + slot % p.page_size * p.token_stride + head * p.head_stride);
    }
  }
}

}  // namespace

int AppendKvHost(const AppendKvParams& p) {
  const int64_t size = p.element_bytes;
  ForEachHead(p, [&](int64_t from, int64_t to) {
    std::memcpy(static_cast<std::byte*>(p.k) + to * size, static_cast<const std::byte*>(p.k_new) + from * size,
                p.head_dim * size);
    std::memcpy(static_cast<std::byte*>(p.v) + to * size, static_cast<const std::byte*>(p.v_new) + from * size,
                p.head_dim * size);
  });
  return 0;
}

template <class T>
int AppendKvQuantizeHost(const AppendKvParams& p) {
  const float k_factor = QuantizeFactor(p.k_scale), v_factor = QuantizeFactor(p.v_scale);
  ForEachHead(p, [&](int64_t from, int64_t to) {
    for (int32_t d = 0; d < p.head_dim; ++d) {
      static_cast<Float8E4M3*>(p.k)[to + d] =
          FromFloat<Float8E4M3>(ToFloat(static_cast<const T*>(p.k_new)[from + d]) * k_factor);
      static_cast<Float8E4M3*>(p.v)[to + d] =
          FromFloat<Float8E4M3>(ToFloat(static_cast<const T*>(p.v_new)[from + d]) * v_factor);
    }
  });
  return 0;
}

template int AppendKvQuantizeHost<float>(const AppendKvParams&);
template int AppendKvQuantizeHost<Float16>(const AppendKvParams&);
template int AppendKvQuantizeHost<BFloat16>(const AppendKvParams&);

}  // namespace pristine::attention
