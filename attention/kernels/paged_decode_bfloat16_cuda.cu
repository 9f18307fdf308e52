// bfloat16 over its own dtype.
#include "attention/kernels/paged_decode_mma.cuh"

namespace pristine::attention {

template int PagedDecodeCuda<BFloat16, BFloat16, 64>(CUstream_st*, const PagedDecodeParams&);
template int PagedDecodeCuda<BFloat16, BFloat16, 128>(CUstream_st*, const PagedDecodeParams&);
template int PagedDecodeCuda<BFloat16, BFloat16, 256>(CUstream_st*, const PagedDecodeParams&);
template int PagedDecodePrepare<BFloat16, BFloat16, 64>(bool*);
template int PagedDecodePrepare<BFloat16, BFloat16, 128>(bool*);
template int PagedDecodePrepare<BFloat16, BFloat16, 256>(bool*);

}  // namespace pristine::attention
