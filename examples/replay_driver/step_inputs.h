// StepInputs: one step's values as host arrays, made from who is active.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_STEP_INPUTS_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_STEP_INPUTS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "examples/replay_driver/model_config.h"
#include "examples/replay_driver/scheduler.h"

namespace pristine::replay_driver {

struct StepInputs {
  Extent bucket, extent;
  std::vector<int32_t> requests;             // [requests] ids
  std::vector<int32_t> lengths;              // [requests] the appended token included
  std::vector<int32_t> kv_indptr;            // [requests + 1] pages
  std::vector<int32_t> kv_indices;           // [kv_indptr.back()]
  std::vector<int32_t> slots;                // [requests]
  std::vector<int32_t> positions;            // [requests]
  std::vector<std::vector<int32_t>> tables;  // per sparse layer, [groups * requests, topk] blocks
  std::vector<int32_t> plan_lengths;         // [groups * requests] tokens: what the sparse path is planned from

  std::vector<int32_t> state_slots;  // [requests] of a hybrid model; see DecodeModel::AssignSlots

  // All but `bucket` and `state_slots`; plan_lengths as they should be. Keeps the vectors' memory.
  void Set(const ModelConfig& config, absl::Span<const ActiveRequest> active);
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_STEP_INPUTS_H_
