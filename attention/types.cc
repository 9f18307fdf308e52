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
    case DType::kFloat8E4M3:
      return "float8_e4m3";
  }
  return "unknown dtype";
}

const char* ToString(KvLayout layout) {
  switch (layout) {
    case KvLayout::kNHD:
      return "NHD";
    case KvLayout::kHND:
      return "HND";
  }
  return "unknown layout";
}

}  // namespace pristine::attention
