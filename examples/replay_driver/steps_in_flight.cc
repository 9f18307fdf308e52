#include "examples/replay_driver/steps_in_flight.h"

#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {

absl::StatusOr<StepsInFlight> StepsInFlight::Create(Device& device, const ModelConfig& config, int32_t places,
                                                    bool compares) {
  StepsInFlight steps;
  steps.places_.resize(static_cast<size_t>(places));
  for (StepInFlight& place : steps.places_) {
    PRISTINE_ASSIGN_OR_RETURN(place.pages, device.AllocatePinned(config.pool_pages * sizeof(int32_t), "pages"));
    PRISTINE_ASSIGN_OR_RETURN(place.done, device.CreateEvent());
    if (!compares) continue;
    PRISTINE_ASSIGN_OR_RETURN(place.replayed_copy, OutputCopy::Create(device, config));
    PRISTINE_ASSIGN_OR_RETURN(place.eager_copy, OutputCopy::Create(device, config));
  }
  return steps;
}

int64_t StepsInFlight::Bytes(const ModelConfig& config, int32_t places, bool compares) {
  const int64_t pages = int64_t{config.pool_pages} * static_cast<int64_t>(sizeof(int32_t));
  return places * (pages + (compares ? 2 * OutputCopy::Bytes(config) : 0));
}

StepInFlight* StepsInFlight::FirstFrom(int64_t StepInFlight::*number, int64_t value) {
  for (size_t i = 0; i < size_; ++i) {
    StepInFlight& place = places_[(oldest_ + i) % places_.size()];
    if (place.*number >= value) return &place;
  }
  return nullptr;
}

}  // namespace pristine::replay_driver
