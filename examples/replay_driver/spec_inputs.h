// SpecInputs: the values of one step of a round, as host arrays: who drafts, verifies and extends what. No device.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_INPUTS_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_INPUTS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "examples/replay_driver/spec_config.h"

namespace pristine::replay_driver {

// One request in one round.
struct SpecRow {
  int32_t request = 0;              // id
  int32_t committed = 0;            // > 0; tokens in KV before the round
  int32_t accepted = 0;             // of the T drafts, those that hold
  int32_t round = 0;                // > 0
  int32_t state_slot = -1;          // of a hybrid model
  absl::Span<const int32_t> pages;  // for committed + T tokens at least
};

// How many drafts of a request hold, by config.accept; drawn for (request, round). At most `left`, what it still lacks.
int32_t DrawAccepted(const SpecConfig& config, int32_t request, int32_t round, int32_t left);

// The tokens of a request that a step runs, by position.
struct QueryRange {
  int32_t first = 0, count = 0;
};
// `draft_step` in [0, T), of the draft phase only.
QueryRange QueriesOf(const SpecConfig& config, SpecPhase phase, int32_t draft_step, const SpecRow& row);

// Which token a step of `phase` runs and leaves at `position`, as TokenSeed takes it. Draft steps guess: even a draft
// that will hold is preliminary, since the draft model did not see what the target made of the tokens before it.
int32_t TokenAt(SpecPhase phase, const SpecRow& row, int32_t position);

struct SpecInputs {
  SpecPhase phase = SpecPhase::kDraft;
  int32_t draft_step = 0;
  std::vector<SpecRow> rows;
  Extent bucket, extent;
  std::vector<int32_t> lengths;         // [requests] this step's tokens included
  std::vector<int32_t> kv_indptr;       // [requests + 1] pages
  std::vector<int32_t> kv_indices;      // [kv_indptr.back()]
  std::vector<int32_t> qo_indptr;       // [requests + 1] tokens
  std::vector<int32_t> slots;           // [tokens]
  std::vector<int32_t> positions;       // [tokens]
  std::vector<int32_t> token_requests;  // [tokens] ids
  std::vector<int32_t> drafts;          // [tokens] see TokenSeed
  std::vector<int32_t> state_slots;     // [requests]
  std::vector<int32_t> accepted;        // [requests] drafts that the states take in: those of a draft extend
  std::vector<int32_t> rejected;        // [T * requests] slots that this step gives back; -1: none

  // All but `bucket`. Keeps the vectors' memory.
  void Set(const SpecConfig& config, SpecPhase of_phase, int32_t of_step, absl::Span<const SpecRow> of_rows);
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_INPUTS_H_
