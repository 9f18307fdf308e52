#include "pristine/attention/types.h"

namespace pristine::attention {

const char* ToString(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "unknown dtype";
}

}  // namespace pristine::attention
