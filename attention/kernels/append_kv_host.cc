#include <cstddef>
#include <cstring>

#include "attention/kernels/append_kv.h"

namespace pristine::attention {

int AppendKvHost(const AppendKvParams& p) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    const int64_t slot = p.slots[token];
    if (slot < 0 || slot >= p.num_slots) continue;
    const int64_t from = token * p.row_bytes;
    const int64_t to = slot * p.row_bytes;
    std::memcpy(static_cast<std::byte*>(p.k) + to, static_cast<const std::byte*>(p.k_new) + from, p.row_bytes);
    std::memcpy(static_cast<std::byte*>(p.v) + to, static_cast<const std::byte*>(p.v_new) + from, p.row_bytes);
  }
  return 0;
}

}  // namespace pristine::attention
