// Soft caps of logits, in few instructions: they lie among those of every tile.
#ifndef PRISTINE_ATTENTION_KERNELS_SOFT_CAP_CUH_
#define PRISTINE_ATTENTION_KERNELS_SOFT_CAP_CUH_

namespace pristine::attention {

constexpr float kTanhRate = 2.88539008177792681472f;  // 2 * log2(e)

// cap * tanh(rate * x / kTanhRate), exact to about 1e-7 of the cap (tanh.approx: 5e-4), and where it is small to 1e-5
// of itself: a cap far above all logits leaves them as they are. NaN stays.
__device__ __forceinline__ float SoftCap(float x, float cap, float rate) {
  const float exponent = rate * x;
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(exponent));
  const float bent = cap - __fdividef(2.0f * cap, 1.0f + power);
  const float y = exponent * (1.0f / kTanhRate);
  return fabsf(exponent) < 0.05f * kTanhRate ? cap * fmaf(y * y, y * (-1.0f / 3.0f), y) : bent;
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_SOFT_CAP_CUH_
