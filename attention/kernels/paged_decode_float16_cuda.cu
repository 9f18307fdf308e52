// float16 over its own dtype.
#include "attention/kernels/paged_decode_mma.cuh"

namespace pristine::attention {

template int PagedDecodeCuda<Float16, Float16, 64>(CUstream_st*, const PagedDecodeParams&);
template int PagedDecodeCuda<Float16, Float16, 128>(CUstream_st*, const PagedDecodeParams&);
template int PagedDecodeCuda<Float16, Float16, 256>(CUstream_st*, const PagedDecodeParams&);
template int PagedDecodePrepare<Float16, Float16, 64>(bool*);
template int PagedDecodePrepare<Float16, Float16, 128>(bool*);
template int PagedDecodePrepare<Float16, Float16, 256>(bool*);

}  // namespace pristine::attention
