// AppendKv: writes the new K and V rows of a step into their pages, and quantizes them on the way to a float8 pool.
#ifndef PRISTINE_ATTENTION_APPEND_KV_H_
#define PRISTINE_ATTENTION_APPEND_KV_H_

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention {

struct AppendKvTensors {
  DType dtype = DType::kFloat32;     // of k_new and v_new
  std::optional<DType> kv_dtype{};   // of k and v: `dtype`, which is what unset means, or kFloat8E4M3
  KvLayout layout = KvLayout::kNHD;  // of k and v
  int32_t page_size = 0;             // tokens; read with kHND only
  int32_t kv_heads = 0, head_dim = 0;
  DeviceSpan<const std::byte> k_new = {};  // [tokens, kv_heads, head_dim]
  DeviceSpan<const std::byte> v_new = {};  // the same shape
  // [tokens]; page * page_size + offset. -1 writes nothing, as does one past the pool
  DeviceSpan<const int32_t> slots = {};
  DeviceSpan<std::byte> k = {};  // [num_pages, page_size, kv_heads, head_dim], or as `layout` says
  DeviceSpan<std::byte> v = {};  // the same shape
  // [1], with a pool that quantizes only, read by every launch and replay; empty: 1. What is stored is
  // new * (1 / scale), rounded to nearest even and saturated at 448; attention multiplies by the scale again.
  DeviceSpan<const float> k_scale = {};
  DeviceSpan<const float> v_scale = {};
};

// Queues one kernel for the first `tokens` rows (none: 0); captureable. Does not block or allocate. Memory must stay
// valid until the kernel, or the last replay, has run. Two equal slots are the caller's error (which row wins is not
// defined). Safe from several threads on streams of their own. INVALID_ARGUMENT: `tokens` below 0; a tensor too small,
// null or not aligned to 4 bytes (quantizing: 16); a row (with kHND, a head) that is no multiple of 4 bytes, or a row
// (with kHND, a page) of 2^31 bytes or more; quantizing with a head_dim that is no multiple of 8; a scale for a pool
// that does not quantize. UNIMPLEMENTED: another pair of dtypes; lists those that exist.
absl::Status AppendKv(Stream& stream, int32_t tokens, const AppendKvTensors& tensors);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_APPEND_KV_H_
