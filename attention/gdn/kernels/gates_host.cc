#include <cmath>

#include "attention/gdn/kernels/gates.h"
#include "attention/kernels/bfloat16.h"

namespace pristine::attention::gdn {
namespace {

double At(const void* rows, DType dtype, int64_t index) {
  return dtype == DType::kBFloat16 ? ToFloat(static_cast<const BFloat16*>(rows)[index])
                                   : static_cast<const float*>(rows)[index];
}

}  // namespace

int GatesHost(const GatesParams& p) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int32_t h = 0; h < p.v_heads; ++h) {
      const double x = At(p.a, p.dtype, t * p.a_stride + h) + p.dt_bias[h];
      const double softplus = x > 20 ? x : std::log1p(std::exp(x));
      p.g[t * p.v_heads + h] = static_cast<float>(-std::exp(static_cast<double>(p.a_log[h])) * softplus);
      p.beta[t * p.v_heads + h] = static_cast<float>(1 / (1 + std::exp(-At(p.b, p.dtype, t * p.b_stride + h))));
    }
  }
  return 0;
}

}  // namespace pristine::attention::gdn
