// Prefill kernels over mma.sync, head_dim 128.
#include "attention/kernels/paged_prefill_kernel.cuh"

namespace pristine::attention {

template <class T, class KV, int kHeadDim>
int PagedPrefillMmaCuda(CUstream_st* stream, const PagedPrefillParams& params) {
  return LaunchPagedPrefill<T, KV, kHeadDim, prefill::Unit::kMma>(stream, params);
}
template <class T, class KV, int kHeadDim>
int PreparePagedPrefillMma() {
  return PreparePagedPrefill<T, KV, kHeadDim, prefill::Unit::kMma>();
}

#define PRISTINE_PREFILL(T, KV)                                                          \
  template int PagedPrefillMmaCuda<T, KV, 128>(CUstream_st*, const PagedPrefillParams&); \
  template int PreparePagedPrefillMma<T, KV, 128>();
PRISTINE_PREFILL(Float16, Float16)
PRISTINE_PREFILL(Float16, Float8E4M3)
PRISTINE_PREFILL(BFloat16, BFloat16)
PRISTINE_PREFILL(BFloat16, Float8E4M3)
#undef PRISTINE_PREFILL

}  // namespace pristine::attention
