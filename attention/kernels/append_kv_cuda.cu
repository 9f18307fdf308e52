// One vector of K and one of V per thread: their loads do not wait for the slot, and with many small blocks there are
// always enough bytes in flight.
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "attention/kernels/append_kv.h"
#include "attention/kernels/dependent_launch.cuh"
#include "attention/kernels/divider.h"

namespace pristine::attention {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxGridY = 65535;

// A load that is made where it stands: left to itself, nvcc makes it after the slot has been read and checked.
__device__ inline uint4 LoadNow(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(from)));
  return value;
}
__device__ inline unsigned LoadNow(const unsigned* from) {
  unsigned value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(from)));
  return value;
}

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
  using From = uint4;
  using To = unsigned;
  __device__ static To Convert(From from, const float* scale) {
    const float factor = QuantizeFactor(scale);
    const auto two = [&](unsigned x, unsigned y) -> unsigned {
      return QuantizePair(__uint_as_float(x) * factor, __uint_as_float(y) * factor);
    };
    return two(from.x, from.y) | two(from.z, from.w) << 16;
  }
};

// In vectors. A page has fewer than 2^31 bytes.
struct AppendKvLaunch {
  AppendKvParams params;
  unsigned row;
  unsigned page_stride, token_stride, head_stride;  // of the pool
  Divider head, page_size;
};

// Block: (vectors of a row, rows). Grid: (rows, vectors).
template <class Op>
__global__ void __launch_bounds__(kThreads) AppendKvKernel(const __grid_constant__ AppendKvLaunch launch) {
  LetNextBegin();
  WaitForStream();
  const AppendKvParams& p = launch.params;
  const unsigned token = blockIdx.x * blockDim.y + threadIdx.y;
  if (token >= static_cast<unsigned>(p.tokens)) return;
  const int slot = p.slots[token];
  for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < launch.row; i += gridDim.y * blockDim.x) {
    const unsigned long long from = static_cast<unsigned long long>(token) * launch.row + i;
    const typename Op::From k = LoadNow(static_cast<const typename Op::From*>(p.k_new) + from);
    const typename Op::From v = LoadNow(static_cast<const typename Op::From*>(p.v_new) + from);
    const unsigned head = launch.head.Quotient(i);
    const unsigned in_token = head * launch.head_stride + i - head * launch.head.divisor;
    if (slot < 0 || slot >= p.num_slots) return;
    const unsigned page = launch.page_size.Quotient(slot);
    const unsigned in_page = (slot - page * launch.page_size.divisor) * launch.token_stride + in_token;
    const unsigned long long to = static_cast<unsigned long long>(page) * launch.page_stride + in_page;
    static_cast<typename Op::To*>(p.k)[to] = Op::Convert(k, p.k_scale);
    static_cast<typename Op::To*>(p.v)[to] = Op::Convert(v, p.v_scale);
  }
}

// `vector` elements at a time.
template <class Op>
int LaunchAppend(CUstream_st* stream, AppendKvParams params, int vector) {
  if (params.head_stride == params.head_dim) {  // a row is one long head
    params.head_dim *= params.kv_heads;
    params.kv_heads = 1;
  }
  const int head = params.head_dim / vector;
  const int row = params.kv_heads * head;
  AppendKvLaunch launch = {.params = params,
                           .row = static_cast<unsigned>(row),
                           .page_stride = static_cast<unsigned>(params.page_stride / vector),
                           .token_stride = static_cast<unsigned>(params.token_stride / vector),
                           .head_stride = static_cast<unsigned>(params.head_stride / vector),
                           .head = MakeDivider(head),
                           .page_size = MakeDivider(params.page_size)};
  const int lanes = row < kThreads ? row : kThreads;
  const int rows = kThreads / lanes;
  const int columns = (row - 1) / lanes + 1;
  const dim3 grid(static_cast<unsigned>((params.tokens - 1) / rows + 1),
                  static_cast<unsigned>(columns < kMaxGridY ? columns : kMaxGridY));
  return LaunchDependent(stream, AppendKvKernel<Op>, grid,
                         dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(rows)), 0, launch);
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
