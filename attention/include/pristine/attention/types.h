// Types shared by the attention wrappers. No Abseil, no CUDA: kernels include this.
#ifndef PRISTINE_ATTENTION_TYPES_H_
#define PRISTINE_ATTENTION_TYPES_H_

#include <cstddef>
#include <cstdint>

namespace pristine::attention {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };
constexpr size_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
const char* ToString(DType dtype);

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
