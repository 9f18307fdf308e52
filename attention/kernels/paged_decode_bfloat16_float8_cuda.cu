// bfloat16 over float8 e4m3.
#include "attention/kernels/paged_decode_mma.cuh"

namespace pristine::attention {

template int PagedDecodeCuda<BFloat16, Float8E4M3, 64>(CUstream_st*, const PagedDecodeParams&);
template int PagedDecodeCuda<BFloat16, Float8E4M3, 128>(CUstream_st*, const PagedDecodeParams&);
template int PagedDecodeCuda<BFloat16, Float8E4M3, 256>(CUstream_st*, const PagedDecodeParams&);
template int PagedDecodePrepare<BFloat16, Float8E4M3, 64>(bool*);
template int PagedDecodePrepare<BFloat16, Float8E4M3, 128>(bool*);
template int PagedDecodePrepare<BFloat16, Float8E4M3, 256>(bool*);

}  // namespace pristine::attention
