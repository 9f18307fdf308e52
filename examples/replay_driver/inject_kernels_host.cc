#include <atomic>
#include <cstring>
#include <thread>

#include "examples/replay_driver/inject_kernels.h"

namespace pristine::replay_driver {
namespace {

int RunStrayWrite(const StrayWriteParams& p) {
  p.buffer[p.index] = p.value;
  return 0;
}
void WritesBuffer(const StrayWriteParams& p, WriteList& writes) { writes.Add(p.buffer, p.bytes); }
void WritesNothing(const StrayWriteParams&, WriteList&) {}

int RunPadSlots(const PadSlotsParams& p) {
  const int32_t slot = LiveSlot(p);
  for (int32_t row = 0; row < p.rows; ++row) {
    if (p.slots[row] < 0) p.slots[row] = slot;
  }
  return 0;
}
void WritesOfPadSlots(const PadSlotsParams& p, WriteList& writes) { writes.Add(p.slots, sizeof(int32_t) * p.rows); }

int RunPoisonPages(const PoisonPagesParams& p) {
  for (int64_t page = 0; page < p.pages; ++page) {
    if (p.in_use[page] != 0) continue;
    std::memset(p.k + page * p.page_bytes, 0xff, p.page_bytes);
    std::memset(p.v + page * p.page_bytes, 0xff, p.page_bytes);
  }
  return 0;
}
void WritesOfPoisonPages(const PoisonPagesParams& p, WriteList& writes) {
  writes.Add(p.k, p.page_bytes * p.pages);
  writes.Add(p.v, p.page_bytes * p.pages);
}

int RunPoisonPadding(const PoisonPaddingParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.requests[row] >= 0) continue;
    for (const PoisonPaddingParams::Rows& tensor : p.tensors) {
      std::memset(tensor.base + row * tensor.row_bytes, 0xff, tensor.row_bytes);
    }
  }
  return 0;
}
void WritesOfPoisonPadding(const PoisonPaddingParams& p, WriteList& writes) {
  for (const PoisonPaddingParams::Rows& tensor : p.tensors) writes.Add(tensor.base, tensor.row_bytes * p.rows);
}

int RunLeakyScale(const LeakyScaleParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.requests[row] < 0) continue;
    for (int64_t element = 0; element < p.row_elements; ++element) {
      float sum = Load(p.dtype, p.out, row * p.row_elements + element);
      for (int64_t other = 0; other < p.rows; ++other) {
        if (p.requests[other] < 0) sum += 0.0f * Load(p.dtype, p.q, other * p.row_elements + element);
      }
      Store(p.dtype, p.out, row * p.row_elements + element, sum);
    }
  }
  return 0;
}
void WritesOfLeakyScale(const LeakyScaleParams& p, WriteList& writes) {
  writes.Add(p.out, attention::SizeOf(p.dtype) * p.rows * p.row_elements);
}

int RunHold(const HoldParams& p) {
  while (std::atomic_ref(*p.release).load(std::memory_order_acquire) == 0) std::this_thread::yield();
  return 0;
}
void WritesOfHold(const HoldParams&, WriteList&) {}

}  // namespace

const Kernel<StrayWriteParams> kWritePastEnd = {"write_past_end", RunStrayWrite, PRISTINE_CUDA(LaunchStrayWrite),
                                                WritesBuffer};
const Kernel<StrayWriteParams> kWriteConstant = {"write_constant", RunStrayWrite, PRISTINE_CUDA(LaunchStrayWrite),
                                                 WritesBuffer};
const Kernel<StrayWriteParams> kUndeclaredWrite = {"undeclared_write", RunStrayWrite, PRISTINE_CUDA(LaunchStrayWrite),
                                                   WritesNothing};
const Kernel<PadSlotsParams> kPadSlots = {"pad_slots", RunPadSlots, PRISTINE_CUDA(LaunchPadSlots), WritesOfPadSlots};
const Kernel<PoisonPagesParams> kPoisonPages = {"poison_pages", RunPoisonPages, PRISTINE_CUDA(LaunchPoisonPages),
                                                WritesOfPoisonPages};
const Kernel<PoisonPaddingParams> kPoisonPadding = {"poison_padding", RunPoisonPadding,
                                                    PRISTINE_CUDA(LaunchPoisonPadding), WritesOfPoisonPadding};
const Kernel<LeakyScaleParams> kLeakyScale = {"leaky_scale", RunLeakyScale, PRISTINE_CUDA(LaunchLeakyScale),
                                              WritesOfLeakyScale};
const Kernel<HoldParams> kHold = {"hold", RunHold, PRISTINE_CUDA(LaunchHold), WritesOfHold};

}  // namespace pristine::replay_driver
