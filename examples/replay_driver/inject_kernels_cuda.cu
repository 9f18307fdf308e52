#include "examples/replay_driver/inject_kernels.h"

namespace pristine::replay_driver {
namespace {

constexpr int kThreads = 256;

__global__ void StrayWrite(StrayWriteParams p) { p.buffer[p.index] = p.value; }

// One block, so that every thread reads the live slot before any row changes.
__global__ void __launch_bounds__(kThreads) PadSlots(PadSlotsParams p) {
  const int32_t slot = LiveSlot(p);
  for (int32_t row = threadIdx.x; row < p.rows; row += kThreads) {
    if (p.slots[row] < 0) p.slots[row] = slot;
  }
}

// A block per page.
__global__ void __launch_bounds__(kThreads) PoisonPages(PoisonPagesParams p) {
  const size_t page = blockIdx.x;
  if (p.in_use[page] != 0) return;
  for (size_t i = threadIdx.x; i < p.page_bytes; i += kThreads) {
    p.k[page * p.page_bytes + i] = std::byte{0xff};
    p.v[page * p.page_bytes + i] = std::byte{0xff};
  }
}

// A block per row.
__global__ void __launch_bounds__(kThreads) PoisonPadding(PoisonPaddingParams p) {
  const size_t row = blockIdx.x;
  if (p.requests[row] >= 0) return;
  for (const PoisonPaddingParams::Rows& tensor : p.tensors) {
    for (size_t i = threadIdx.x; i < tensor.row_bytes; i += kThreads) {
      tensor.base[row * tensor.row_bytes + i] = std::byte{0xff};
    }
  }
}

// A block per row.
__global__ void __launch_bounds__(kThreads) LeakyScale(LeakyScaleParams p) {
  const int64_t row = blockIdx.x;
  if (p.requests[row] < 0) return;
  for (int64_t element = threadIdx.x; element < p.row_elements; element += kThreads) {
    float sum = Load(p.dtype, p.out, row * p.row_elements + element);
    for (int64_t other = 0; other < p.rows; ++other) {
      if (p.requests[other] < 0) sum += 0.0f * Load(p.dtype, p.q, other * p.row_elements + element);
    }
    Store(p.dtype, p.out, row * p.row_elements + element, sum);
  }
}

__global__ void Hold(HoldParams p) {
  const volatile uint32_t& release = *p.release;
  while (release == 0) __nanosleep(1000);
}

}  // namespace

int LaunchStrayWrite(CUstream_st* stream, const StrayWriteParams& params) {
  StrayWrite<<<1, 1, 0, stream>>>(params);
  return cudaGetLastError();
}
int LaunchPadSlots(CUstream_st* stream, const PadSlotsParams& params) {
  PadSlots<<<1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}
int LaunchPoisonPages(CUstream_st* stream, const PoisonPagesParams& params) {
  PoisonPages<<<params.pages, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}
int LaunchPoisonPadding(CUstream_st* stream, const PoisonPaddingParams& params) {
  PoisonPadding<<<params.rows, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}
int LaunchLeakyScale(CUstream_st* stream, const LeakyScaleParams& params) {
  LeakyScale<<<params.rows, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}
int LaunchHold(CUstream_st* stream, const HoldParams& params) {
  Hold<<<1, 1, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pristine::replay_driver
