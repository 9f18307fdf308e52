// What the parts of the speculative flow (--spec=T) agree on.
//
// A round of a request that has `committed` tokens in KV, in both models' pools, which share pages and page numbers:
//   draft         T decode steps of the draft model make T drafts, at positions committed …
//   verify        the target model looks at all T of them at once
//   accept        the first `accepted` of them hold; a seed draws how many, from 0 to T
//   draft extend  the draft model takes in what held, with what it had been waiting for: the last committed token (the
//                 target saw what follows it only now) and the accepted ones, accepted + 1 tokens, ragged. What the
//                 draft steps left of these tokens was preliminary.
//   rollback      the slots of the rejected ones are given back, filled with NaN
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_CONFIG_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_CONFIG_H_

#include <cstdint>
#include <vector>

#include "examples/replay_driver/model_config.h"
#include "examples/replay_driver/options.h"
#include "pristine/graph_runtime/extent.h"

namespace pristine::replay_driver {

// The three captured variants.
enum class SpecPhase { kDraft, kVerify, kDraftExtend };
inline constexpr SpecPhase kSpecPhases[] = {SpecPhase::kDraft, SpecPhase::kVerify, SpecPhase::kDraftExtend};

struct SpecConfig {
  ModelConfig model;         // layers: the target's, the last of which is sliding window, and then the draft's one
  int32_t draft_tokens = 0;  // T
  DraftExtend draft_extend = DraftExtend::kRagged;
  AcceptRule accept = AcceptRule::kRandom;

  int32_t draft_layer() const { return model.layers - 1; }
  bool is_window(int32_t layer) const { return layer == model.layers - 2; }
  // Query tokens of each request in the graphs of `phase`, or the most that it may have.
  int32_t max_q_len(SpecPhase phase) const {
    return phase == SpecPhase::kDraft ? 1 : phase == SpecPhase::kVerify ? draft_tokens : draft_tokens + 1;
  }
  int32_t max_tokens() const { return model.max_batch() * (draft_tokens + 1); }
  // No two phases share a bucket, so each plan knows its graphs.
  std::vector<Extent> buckets(SpecPhase phase) const {
    std::vector<Extent> buckets;
    for (const Extent& bucket : model.buckets) buckets.push_back({bucket.requests, bucket.requests * max_q_len(phase)});
    return buckets;
  }
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_CONFIG_H_
