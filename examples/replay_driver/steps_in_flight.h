// StepsInFlight: what the host keeps of each step that was launched and not yet looked at. While the device works on
// one step the host prepares others, so nothing that a queued copy reads or writes may be shared between steps.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_STEPS_IN_FLIGHT_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_STEPS_IN_FLIGHT_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "examples/replay_driver/compare.h"
#include "examples/replay_driver/model_config.h"
#include "examples/replay_driver/step_inputs.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/extent.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

struct StepInFlight {
  // Of the present step; set anew by each one that takes this place.
  int64_t step = 0;
  Extent bucket, extent;
  int64_t replay = 0;         // its number at the model's manager
  int64_t shadow_replay = 0;  // and at the shadow's; 0: it is not compared
  bool disagreed = false;     // its plan and its conversion
  std::chrono::steady_clock::time_point launched;
  double us = 0;      // from then until it had run; without overlap, where it is waited for at once
  StepInputs inputs;  // of one that is compared

  // Memory of this place's own, free again once `done` is reached.
  PinnedBuffer pages;                    // [pool_pages] of the requests that enter with the step
  OutputCopy replayed_copy, eager_copy;  // of one that is compared
  std::unique_ptr<Event> done;           // everything that was queued for the step has run
};

// A queue of them in places that are used in turn.
class StepsInFlight {
 public:
  // `compares`: some steps are compared. `device` must outlive this. RESOURCE_EXHAUSTED: no memory.
  static absl::StatusOr<StepsInFlight> Create(Device& device, const ModelConfig& config, int32_t places, bool compares);
  // What it allocates.
  static int64_t Bytes(const ModelConfig& config, int32_t places, bool compares);

  size_t size() const { return size_; }
  bool full() const { return size_ == places_.size(); }
  // The place behind the last step, for the next one; not if full(). Push makes it part of the queue.
  StepInFlight& next() { return places_[(oldest_ + size_) % places_.size()]; }
  void Push() { ++size_; }
  // Not if there is none.
  StepInFlight& oldest() { return places_[oldest_]; }
  void Pop() {
    oldest_ = (oldest_ + 1) % places_.size();
    --size_;
  }
  // The first step whose `number` (replay or shadow_replay) is at least `value`: replays of the manager between two
  // steps (captures, what an injection attempts) belong to the later one. Null: none in the queue.
  StepInFlight* FirstFrom(int64_t StepInFlight::*number, int64_t value);

 private:
  std::vector<StepInFlight> places_;
  size_t oldest_ = 0, size_ = 0;
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_STEPS_IN_FLIGHT_H_
