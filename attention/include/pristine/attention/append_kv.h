// AppendKv: writes the new K and V rows of a step into their pages.
#ifndef PRISTINE_ATTENTION_APPEND_KV_H_
#define PRISTINE_ATTENTION_APPEND_KV_H_

#include <cstdint>

#include "absl/status/status.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention {

struct AppendKvTensors {
  DType dtype = DType::kFloat32;
  int32_t kv_heads = 0, head_dim = 0;
  DeviceSpan<const std::byte> k_new = {};  // [tokens, kv_heads, head_dim]
  DeviceSpan<const std::byte> v_new = {};  // the same shape
  // [tokens]; page * page_size + offset. -1 writes nothing, as does one past the pool
  DeviceSpan<const int32_t> slots = {};
  DeviceSpan<std::byte> k = {};  // [num_pages * page_size, kv_heads, head_dim]
  DeviceSpan<std::byte> v = {};  // the same shape
};

// Queues one kernel for the first `tokens` rows; captureable. Two equal slots are the caller's error (which row wins is
// not defined). INVALID_ARGUMENT: a tensor too small, or a row size that is no multiple of 4 bytes.
absl::Status AppendKv(Stream& stream, int32_t tokens, const AppendKvTensors& tensors);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_APPEND_KV_H_
