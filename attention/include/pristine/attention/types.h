// Types shared by the attention wrappers. No Abseil, no CUDA: kernels include this.
#ifndef PRISTINE_ATTENTION_TYPES_H_
#define PRISTINE_ATTENTION_TYPES_H_

#include <cstddef>
#include <cstdint>

namespace pristine::attention {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat8E4M3 };
constexpr size_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8E4M3 ? 1 : 2; }
const char* ToString(DType dtype);

// How a page of the KV cache lies in memory.
enum class KvLayout : int32_t {
  kNHD,  // [num_pages, page_size, kv_heads, head_dim]
  kHND,  // [num_pages, kv_heads, page_size, head_dim]
};
const char* ToString(KvLayout layout);

// A log-sum-exp of scaled scores. The base is in the type, because merging base-2 with natural-log states is silently
// wrong (sglang#40903 measured 11.8 % mean error). -inf marks an empty row.
struct LseBase2 {
  float value;
};
struct LseNatural {
  float value;
};

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_TYPES_H_
