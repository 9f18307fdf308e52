// tanh for soft caps of logits, in few instructions: they lie among those of every tile.
#ifndef PRISTINE_ATTENTION_KERNELS_SOFT_CAP_CUH_
#define PRISTINE_ATTENTION_KERNELS_SOFT_CAP_CUH_

namespace pristine::attention {

constexpr float kTanhRate = 2.88539008177792681472f;  // 2 * log2(e)

// tanh(x) of kTanhRate * x, exact to about 1e-7 beside 1 (tanh.approx: 5e-4), and where it is small beside itself: a
// cap far above all logits must leave them as they are. NaN stays.
__device__ __forceinline__ float TanhOfRated(float rated) {
  float power;
  asm("{\n.reg .f32 most;\nmin.NaN.f32 most, %1, 0f42A00000;\nex2.approx.ftz.f32 %0, most;\n}\n"  // with 80
      : "=f"(power)
      : "f"(rated));
  const float x = rated * (1.0f / kTanhRate);
  const float near_zero = fmaf(x * x, x * (-1.0f / 3.0f), x);
  return fabsf(rated) < 0.05f * kTanhRate ? near_zero : 1.0f - __fdividef(2.0f, 1.0f + power);
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_SOFT_CAP_CUH_
