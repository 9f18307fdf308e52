// Prefill kernels of head_dim 128.
#include "attention/kernels/paged_prefill_mma.cuh"

namespace pristine::attention {

#define PRISTINE_PREFILL(T, KV)                                                       \
  template int PagedPrefillCuda<T, KV, 128>(CUstream_st*, const PagedPrefillParams&); \
  template int PagedPrefillPrepare<T, KV, 128>();
PRISTINE_PREFILL(Float16, Float16)
PRISTINE_PREFILL(Float16, Float8E4M3)
PRISTINE_PREFILL(BFloat16, BFloat16)
PRISTINE_PREFILL(BFloat16, Float8E4M3)
#undef PRISTINE_PREFILL

}  // namespace pristine::attention
