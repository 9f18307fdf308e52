#include "attention/gdn/kernels/state_copy.h"
#include "attention/kernels/bfloat16.h"

namespace pristine::attention::gdn {
namespace {

template <class Pool, class Gathered>
void Copy(const StateCopyParams& p) {
  const bool gather = p.gathered_indices != nullptr;
  for (int32_t row = 0; row < p.rows; ++row) {
    const int32_t index = p.cache_indices[row];
    const bool padded = index < 0 || index >= p.slots;
    const bool copied = !padded || (gather && p.clamp_to_zero);
    if (gather) p.gathered_indices[row] = copied ? row : -1;
    if (!copied) continue;
    Pool* const state = static_cast<Pool*>(p.pool) + (padded ? 0 : index) * p.pool_stride;
    Gathered* const own = static_cast<Gathered*>(p.gathered) + row * p.gathered_stride;
    for (int64_t i = 0; i < p.elements; ++i) {
      if (gather) {
        own[i] = FromFloat<Gathered>(ToFloat(state[i]));
      } else {
        state[i] = FromFloat<Pool>(ToFloat(own[i]));
      }
    }
  }
}

}  // namespace

int StateCopyHost(const StateCopyParams& p) {
  const bool wide = p.pool_dtype == DType::kFloat32, wide_gathered = p.gathered_dtype == DType::kFloat32;
  if (wide && wide_gathered) Copy<float, float>(p);
  if (wide && !wide_gathered) Copy<float, BFloat16>(p);
  if (!wide && wide_gathered) Copy<BFloat16, float>(p);
  if (!wide && !wide_gathered) Copy<BFloat16, BFloat16>(p);
  return 0;
}

}  // namespace pristine::attention::gdn
