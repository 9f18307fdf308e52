#include <cmath>

#include "attention/gdn/kernels/qkv_split.h"
#include "attention/kernels/bfloat16.h"

namespace pristine::attention::gdn {
namespace {

template <class T>
void Split(const QkvSplitParams& p) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    int64_t first = 0;
    for (int i = 0; i < 3; ++i) {
      const T* const from = static_cast<const T*>(p.mixed) + t * p.stride_t + first * p.stride_d;
      T* const to = static_cast<T*>(p.out[i]) + t * p.dim[i];
      const bool normalise = i < 2 && p.norm_head_dim > 0;
      double sum = 0;
      for (int64_t d = 0; d < p.dim[i]; ++d) {
        to[d] = from[d * p.stride_d];
        if (!normalise) continue;
        if (d % p.norm_head_dim == 0) sum = 0;
        sum += double{ToFloat(to[d])} * ToFloat(to[d]);
        if ((d + 1) % p.norm_head_dim != 0) continue;
        const double scale = 1 / std::sqrt(sum + double{kNormEpsilon});
        for (int64_t e = d + 1 - p.norm_head_dim; e <= d; ++e) {
          to[e] = FromFloat<T>(static_cast<float>(ToFloat(to[e]) * scale));
        }
      }
      first += p.dim[i];
    }
  }
}

}  // namespace

int QkvSplitHost(const QkvSplitParams& p) {
  if (p.dtype == DType::kBFloat16) {
    Split<BFloat16>(p);
  } else {
    Split<float>(p);
  }
  return p.gates.g == nullptr ? 0 : GatesHost(p.gates);
}

}  // namespace pristine::attention::gdn
