// A plain layer with a state over float32, with a fault to choose: what the kit must notice. No Abseil:
// naive_state_cuda.cu includes this.
//   state <- state / 2 + x;  y = state
#ifndef PRISTINE_TESTS_KIT_TEST_NAIVE_STATE_H_
#define PRISTINE_TESTS_KIT_TEST_NAIVE_STATE_H_

#include <cmath>
#include <cstdint>

#include "pristine/graph_runtime/kernel.h"

#ifdef __CUDACC__
#define NAIVE_DEVICE __host__ __device__
#else
#define NAIVE_DEVICE
#endif

namespace pristine::testing {

enum class StateFault : int32_t {
  kNone,
  // In the kernel.
  kPaddingUsesTheLastSlot,  // sglang#36880
  kPaddingUsesSlotZero,     // and stores there
  kLeavesPaddedOutput,      // as it was
  kReadsTheNextSlot,        // which belongs to nobody, or to another request
  kHidesNan,                // the same, and drops what is NaN
  kStoresTheStateBefore,    // the output is right
  kSkipsTheLastRow,         // of the bucket
  // In what is launched.
  kRunsMaxRows,           // the largest bucket's rows, whatever the bucket
  kFreezesRows,           // the rows of the step that was prepared last, baked into the graph
  kCapturesWithoutStore,  // another kernel in captures, which leaves the state
  kBlocks,                // synchronizes
  // In Prepare and WarmUp.
  kLeavesSlotTail,        // pads nothing: slots of the step before
  kSkipsSameRows,         // uploads only if the number of requests changed
  kWarmsUpWithLiveSlots,  // those of the step before
};

struct NaiveStateParams {
  const float* x;
  float *y, *states;
  const int32_t* slots;
  int32_t rows, width, num_slots;
  int64_t y_elements;  // for what is declared as written
  bool store;
  StateFault fault;
};

NAIVE_DEVICE inline void StepState(const NaiveStateParams& p, int32_t row, int32_t i) {
  int32_t slot = p.slots[row];
  float* const y = p.y + int64_t{row} * p.width + i;
  if (slot < 0 || slot >= p.num_slots) {
    if (p.fault == StateFault::kLeavesPaddedOutput) return;
    *y = 0;
    if (p.fault == StateFault::kPaddingUsesTheLastSlot) slot = p.num_slots - 1;
    if (p.fault == StateFault::kPaddingUsesSlotZero) slot = 0;
    if (slot < 0 || slot >= p.num_slots) return;
    p.states[int64_t{slot} * p.width + i] = 0;
    return;
  }
  float* const state = p.states + int64_t{slot} * p.width + i;
  const float before = *state;
  *y = before / 2 + p.x[int64_t{row} * p.width + i];
  const float next = state[p.width];
  if (p.fault == StateFault::kReadsTheNextSlot) *y += 0 * next;
  if (p.fault == StateFault::kHidesNan && next < -100) *y += 1;
  if (p.store) *state = p.fault == StateFault::kStoresTheStateBefore ? before : *y;
}

int NaiveStateHost(const NaiveStateParams& p);
int NaiveStateCuda(CUstream_st* stream, const NaiveStateParams& p);

inline constexpr Kernel<NaiveStateParams> kNaiveState{
    "naive_state", NaiveStateHost, PRISTINE_CUDA(NaiveStateCuda), [](const NaiveStateParams& p, WriteList& writes) {
      writes.Add(p.y, p.y_elements * sizeof(float));
      writes.Add(p.states, int64_t{p.num_slots} * p.width * sizeof(float));
    }};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_KIT_TEST_NAIVE_STATE_H_
