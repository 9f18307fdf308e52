// The kernels that injections add to the graph. No Abseil, no CUDA headers.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_INJECT_KERNELS_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_INJECT_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "examples/replay_driver/model_kernels.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/kernel.h"

namespace pristine::replay_driver {

// Writes buffer[index], which may lie outside of the buffer.
struct StrayWriteParams {
  int32_t* buffer;
  size_t bytes;  // of the buffer
  int64_t index;
  int32_t value;
};

// Gives each row of slot -1 the slot of the last token but one of request 0.
struct PadSlotsParams {
  int32_t rows, page_size;
  const int32_t* lengths;
  const int32_t* kv_indices;
  int32_t* slots;  // [rows]
};

// Fills every page that is not in use with NaN.
struct PoisonPagesParams {
  const uint8_t* in_use;  // [pages]
  int32_t pages;
  size_t page_bytes;
  std::byte* k;  // [pages] of page_bytes
  std::byte* v;
};

// Fills the rows of request -1 with NaN.
struct PoisonPaddingParams {
  const int32_t* requests;  // [rows]
  int32_t rows;
  struct Rows {
    std::byte* base;
    size_t row_bytes;
  } tensors[5];
};

// out[row] += 0 * the sum of the padded rows of q, for each row that is live: 0 as long as those are finite.
struct LeakyScaleParams {
  const int32_t* requests;  // [rows]
  int32_t rows, row_elements;
  attention::DType dtype;
  const void* q;  // [rows, row_elements]
  void* out;      // the same shape
};

// Keeps the stream busy until *release is not 0. `release` is host memory that the device sees.
struct HoldParams {
  uint32_t* release;
};

extern const Kernel<StrayWriteParams> kWritePastEnd, kWriteConstant, kUndeclaredWrite;
extern const Kernel<PadSlotsParams> kPadSlots;
extern const Kernel<PoisonPagesParams> kPoisonPages;
extern const Kernel<PoisonPaddingParams> kPoisonPadding;
extern const Kernel<LeakyScaleParams> kLeakyScale;
extern const Kernel<HoldParams> kHold;

int LaunchStrayWrite(CUstream_st* stream, const StrayWriteParams& params);
int LaunchPadSlots(CUstream_st* stream, const PadSlotsParams& params);
int LaunchPoisonPages(CUstream_st* stream, const PoisonPagesParams& params);
int LaunchPoisonPadding(CUstream_st* stream, const PoisonPaddingParams& params);
int LaunchLeakyScale(CUstream_st* stream, const LeakyScaleParams& params);
int LaunchHold(CUstream_st* stream, const HoldParams& params);

PRISTINE_HOST_DEVICE inline float Load(attention::DType dtype, const void* base, int64_t index) {
  if (dtype == attention::DType::kFloat32) return static_cast<const float*>(base)[index];
  return FromBFloat16(static_cast<const uint16_t*>(base)[index]);
}

// Where request 0's last token but one is kept; -1: it has none.
PRISTINE_HOST_DEVICE inline int32_t LiveSlot(const PadSlotsParams& p) {
  const int32_t position = p.lengths[0] - 2;
  if (position < 0) return -1;
  return p.kv_indices[position / p.page_size] * p.page_size + position % p.page_size;
}

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_INJECT_KERNELS_H_
