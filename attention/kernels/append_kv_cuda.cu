// One vector of K or V per thread: its load does not wait for the slot, and with many small blocks there are always
// enough bytes in flight.
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "attention/kernels/append_kv.h"
#include "attention/kernels/divider.h"

namespace pristine::attention {
namespace {

constexpr int kThreads = 128;
constexpr long long kMaxGridY = 65535;

// What one thread moves: From is a vector of the rows, To one of the pool.
template <class Word>
struct Copy {
  using From = Word;
  using To = Word;
  __device__ static To Convert(From from, const float*) { return from; }
};

__device__ inline unsigned short QuantizePair(float x, float y) {
  return __nv_cvt_float2_to_fp8x2(make_float2(x, y), __NV_SATFINITE, __NV_E4M3);
}
template <class T>
__device__ inline float2 Widen(unsigned pair) {
  return {ToFloat(T{static_cast<uint16_t>(pair)}), ToFloat(T{static_cast<uint16_t>(pair >> 16)})};
}
template <class T>
struct Quantize {
  using From = uint4;
  using To = uint2;
  __device__ static To Convert(From from, const float* scale) {
    const float factor = QuantizeFactor(scale);
    const auto two = [&](unsigned low, unsigned high) -> unsigned {
      const float2 a = Widen<T>(low), b = Widen<T>(high);
      return QuantizePair(a.x * factor, a.y * factor) | static_cast<unsigned>(QuantizePair(b.x * factor, b.y * factor))
                                                            << 16;
    };
    return {two(from.x, from.y), two(from.z, from.w)};
  }
};
template <>
struct Quantize<float> {
  using From = float4;
  using To = unsigned;
  __device__ static To Convert(From from, const float* scale) {
    const float factor = QuantizeFactor(scale);
    return QuantizePair(from.x * factor, from.y * factor) |
           static_cast<unsigned>(QuantizePair(from.z * factor, from.w * factor)) << 16;
  }
};

struct AppendKvLaunch {
  AppendKvParams params;
  int row_vectors;
  Divider head_vectors, page_size;
  long long page_stride, token_stride, head_stride;  // vectors of the pool
};

// Block: (vectors of a row, rows). Grid: (rows, vectors, K and V).
template <class Op>
__global__ void __launch_bounds__(kThreads) AppendKvKernel(const __grid_constant__ AppendKvLaunch launch) {
  const AppendKvParams& p = launch.params;
  const long long token = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= p.tokens) return;
  const bool is_v = blockIdx.z != 0;
  const auto* const from = static_cast<const typename Op::From*>(is_v ? p.v_new : p.k_new) + token * launch.row_vectors;
  const int slot = p.slots[token];
  for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < static_cast<unsigned>(launch.row_vectors);
       i += gridDim.y * blockDim.x) {
    const typename Op::From vector = from[i];
    if (slot < 0 || slot >= p.num_slots) return;
    const long long page = launch.page_size.Quotient(slot);
    const long long head = launch.head_vectors.Quotient(i);
    const long long to = page * launch.page_stride + (slot - page * p.page_size) * launch.token_stride +
                         head * launch.head_stride + (i - head * launch.head_vectors.divisor);
    static_cast<typename Op::To*>(is_v ? p.v : p.k)[to] = Op::Convert(vector, is_v ? p.v_scale : p.k_scale);
  }
}

// `vector` elements at a time.
template <class Op>
int LaunchAppend(CUstream_st* stream, AppendKvParams params, int vector) {
  if (params.head_stride == params.head_dim) {  // a row is one long head
    params.head_dim *= params.kv_heads;
    params.kv_heads = 1;
  }
  const int head_vectors = params.head_dim / vector;
  AppendKvLaunch launch = {.params = params,
                           .row_vectors = params.kv_heads * head_vectors,
                           .head_vectors = MakeDivider(head_vectors),
                           .page_size = MakeDivider(params.page_size),
                           .page_stride = params.page_stride / vector,
                           .token_stride = params.token_stride / vector,
                           .head_stride = params.head_stride / vector};
  void* arguments[] = {&launch};
  const int lanes = launch.row_vectors < kThreads ? launch.row_vectors : kThreads;
  const int rows = kThreads / lanes;
  const long long columns = (launch.row_vectors - 1) / lanes + 1;
  const dim3 grid(static_cast<unsigned>((params.tokens - 1) / rows + 1),
                  static_cast<unsigned>(columns < kMaxGridY ? columns : kMaxGridY), 2);
  return cudaLaunchKernel(reinterpret_cast<const void*>(&AppendKvKernel<Op>), grid,
                          dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(rows)), arguments, 0, stream);
}

bool IsMultipleOf16(const AppendKvParams& p) {
  const int64_t heads = p.head_stride == p.head_dim ? p.kv_heads : 1;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p.k_new) | reinterpret_cast<uintptr_t>(p.v_new) |
                         reinterpret_cast<uintptr_t>(p.k) | reinterpret_cast<uintptr_t>(p.v) |
                         static_cast<uintptr_t>(heads * p.head_dim * p.element_bytes);
  return bits % 16 == 0;
}

}  // namespace

int AppendKvCuda(CUstream_st* stream, const AppendKvParams& params) {
  return IsMultipleOf16(params) ? LaunchAppend<Copy<uint4>>(stream, params, 16 / params.element_bytes)
                                : LaunchAppend<Copy<unsigned>>(stream, params, 4 / params.element_bytes);
}

template <class T>
int AppendKvQuantizeCuda(CUstream_st* stream, const AppendKvParams& params) {
  return LaunchAppend<Quantize<T>>(stream, params, 16 / static_cast<int>(sizeof(T)));
}

template int AppendKvQuantizeCuda<float>(CUstream_st*, const AppendKvParams&);
template int AppendKvQuantizeCuda<Float16>(CUstream_st*, const AppendKvParams&);
template int AppendKvQuantizeCuda<BFloat16>(CUstream_st*, const AppendKvParams&);

}  // namespace pristine::attention
