#include "examples/replay_driver/spec_inputs.h"

#include <algorithm>

#include "examples/replay_driver/kv_hash.h"

namespace pristine::replay_driver {

int32_t DrawAccepted(const SpecConfig& config, int32_t request, int32_t round, int32_t left) {
  int32_t accepted = 0;
  if (config.accept == AcceptRule::kAll) accepted = config.draft_tokens;
  if (config.accept == AcceptRule::kRandom) {
    const uint64_t where = (static_cast<uint64_t>(static_cast<uint32_t>(request)) << 32) | static_cast<uint32_t>(round);
    accepted =
        static_cast<int32_t>(Combine(~config.model.seed, where) % static_cast<uint64_t>(config.draft_tokens + 1));
  }
  return std::min(accepted, left);
}

QueryRange QueriesOf(const SpecConfig& config, SpecPhase phase, int32_t draft_step, const SpecRow& row) {
  if (phase == SpecPhase::kDraft) return {row.committed + draft_step, 1};
  if (phase == SpecPhase::kVerify) return {row.committed, config.draft_tokens};
  const bool ragged = config.draft_extend == DraftExtend::kRagged;
  return {row.committed - 1, (ragged ? row.accepted : config.draft_tokens) + 1};
}

int32_t TokenAt(SpecPhase phase, const SpecRow& row, int32_t position) {
  const int32_t known = row.committed + (phase == SpecPhase::kDraft ? 0 : row.accepted);
  return position < known ? 0 : row.round;
}

void SpecInputs::Set(const SpecConfig& config, SpecPhase of_phase, int32_t of_step, absl::Span<const SpecRow> of_rows) {
  const int32_t page_size = config.model.page_size;
  phase = of_phase;
  draft_step = of_step;
  rows.assign(of_rows.begin(), of_rows.end());
  for (std::vector<int32_t>* values : {&lengths, &kv_indptr, &kv_indices, &qo_indptr, &slots, &positions,
                                       &token_requests, &drafts, &state_slots, &accepted, &rejected}) {
    values->clear();
  }
  kv_indptr.push_back(0);
  qo_indptr.push_back(0);
  for (const SpecRow& row : rows) {
    const auto slot = [&](int32_t position) {
      return row.pages[position / page_size] * page_size + position % page_size;
    };
    const QueryRange queries = QueriesOf(config, phase, draft_step, row);
    const int32_t length = queries.first + queries.count;
    lengths.push_back(length);
    kv_indices.insert(kv_indices.end(), row.pages.begin(), row.pages.begin() + (length - 1) / page_size + 1);
    kv_indptr.push_back(static_cast<int32_t>(kv_indices.size()));
    qo_indptr.push_back(qo_indptr.back() + queries.count);
    state_slots.push_back(row.state_slot);
    accepted.push_back(phase == SpecPhase::kDraftExtend ? row.accepted : 0);
    for (int32_t position = queries.first; position < length; ++position) {
      slots.push_back(slot(position));
      positions.push_back(position);
      token_requests.push_back(row.request);
      drafts.push_back(TokenAt(phase, row, position));
    }
    for (int32_t draft = 0; draft < config.draft_tokens; ++draft) {
      const bool gives_back = phase == SpecPhase::kDraftExtend && draft >= row.accepted;
      rejected.push_back(gives_back ? slot(row.committed + draft) : -1);
    }
  }
  extent = {static_cast<int32_t>(rows.size()), static_cast<int32_t>(slots.size())};
}

}  // namespace pristine::replay_driver
