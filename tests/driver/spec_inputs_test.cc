// The bookkeeping of speculation, without a device: what each step of a round runs, what holds, what is given back.
#include "examples/replay_driver/spec_inputs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "examples/replay_driver/scheduler.h"

namespace pristine::replay_driver {
namespace {

uint32_t Seed() {
  const char* given = std::getenv("PRISTINE_SEED");
  return given != nullptr ? static_cast<uint32_t>(std::strtoul(given, nullptr, 10)) : std::random_device()();
}

SpecConfig ConfigOf(int32_t drafts, int32_t page_size, DraftExtend draft_extend = DraftExtend::kRagged) {
  SpecConfig config;
  config.model.seed = 7;
  config.model.buckets = {{2, 2}, {8, 8}};
  config.model.layers = 3;
  config.model.heads = config.model.kv_heads = 1;
  config.model.head_dim = 64;
  config.model.page_size = page_size;
  config.model.pool_pages = 512;
  config.draft_tokens = drafts;
  config.draft_extend = draft_extend;
  return config;
}

TEST(SpecConfig, NoTwoPhasesShareABucket) {
  for (int32_t drafts = 2; drafts <= 16; ++drafts) {
    std::set<std::pair<int32_t, int32_t>> seen;
    for (const SpecPhase phase : kSpecPhases) {
      for (const Extent& bucket : ConfigOf(drafts, 1).buckets(phase)) {
        EXPECT_TRUE(seen.emplace(bucket.requests, bucket.tokens).second) << bucket.ToString();
      }
    }
  }
}

TEST(DrawAccepted, IsFrom0ToTAndNoMoreThanIsLeft) {
  SpecConfig config = ConfigOf(4, 1);
  std::vector<int> drawn(5);
  for (int32_t round = 1; round <= 5000; ++round) ++drawn[DrawAccepted(config, round % 7, round, 100)];
  for (int accepted = 0; accepted <= 4; ++accepted) EXPECT_NEAR(drawn[accepted], 1000, 150) << accepted;
  for (int32_t round = 1; round <= 50; ++round) {
    EXPECT_EQ(DrawAccepted(config, 3, round, 100), DrawAccepted(config, 3, round, 100));
    EXPECT_LE(DrawAccepted(config, 3, round, 1), 1);
  }
  config.accept = AcceptRule::kAll;
  EXPECT_EQ(DrawAccepted(config, 3, 1, 100), 4);
  EXPECT_EQ(DrawAccepted(config, 3, 1, 3), 3);
  config.accept = AcceptRule::kNone;
  EXPECT_EQ(DrawAccepted(config, 3, 1, 100), 0);
}

// Against plain loops, over random rounds.
TEST(SpecInputs, EveryStepRunsItsTokensAndNoOthers) {
  const uint32_t seed = Seed();
  SCOPED_TRACE("PRISTINE_SEED=" + std::to_string(seed));
  std::mt19937 random(seed);
  const auto below = [&random](int32_t n) { return static_cast<int32_t>(random() % static_cast<uint32_t>(n)); };
  SpecInputs inputs;
  for (int trial = 0; trial < 200; ++trial) {
    const SpecConfig config =
        ConfigOf(2 + below(15), 1 + below(5), below(2) == 0 ? DraftExtend::kRagged : DraftExtend::kFixed);
    const int32_t drafts = config.draft_tokens, page_size = config.model.page_size;
    std::vector<int32_t> free(config.model.pool_pages);
    std::iota(free.begin(), free.end(), 1);
    std::shuffle(free.begin(), free.end(), random);
    std::vector<std::vector<int32_t>> pages;
    std::vector<SpecRow> rows(1 + below(8));
    for (size_t i = 0; i < rows.size(); ++i) {
      SpecRow& row = rows[i];
      row = {.request = 10 * static_cast<int32_t>(i),
             .committed = 1 + below(30),
             .accepted = below(drafts + 1),
             .round = 1 + below(100),
             .pages = {}};
      const int32_t needed = (row.committed + drafts - 1) / page_size + 1;
      pages.emplace_back(free.end() - needed, free.end());
      free.resize(free.size() - needed);
    }
    for (size_t i = 0; i < rows.size(); ++i) rows[i].pages = pages[i];
    for (const SpecPhase phase : kSpecPhases) {
      const int32_t step = phase == SpecPhase::kDraft ? below(drafts) : 0;
      inputs.Set(config, phase, step, rows);
      ASSERT_EQ(inputs.extent.requests, static_cast<int32_t>(rows.size()));
      ASSERT_EQ(inputs.qo_indptr.size(), rows.size() + 1);
      ASSERT_EQ(inputs.qo_indptr.back(), inputs.extent.tokens);
      ASSERT_LE(inputs.extent.tokens, inputs.extent.requests * config.max_q_len(phase));
      std::set<int32_t> written, given_back;
      for (size_t i = 0; i < rows.size(); ++i) {
        const SpecRow& row = rows[i];
        int32_t first = row.committed, count = 1;
        if (phase == SpecPhase::kDraft) first += step;
        if (phase == SpecPhase::kVerify) count = drafts;
        if (phase == SpecPhase::kDraftExtend) {
          first -= 1;
          count += config.draft_extend == DraftExtend::kRagged ? row.accepted : drafts;
        }
        ASSERT_EQ(inputs.qo_indptr[i + 1] - inputs.qo_indptr[i], count);
        ASSERT_EQ(inputs.lengths[i], first + count);
        ASSERT_EQ(inputs.kv_indptr[i + 1] - inputs.kv_indptr[i], (first + count + page_size - 1) / page_size);
        const auto slot_of = [&](int32_t position) {
          return pages[i][position / page_size] * page_size + position % page_size;
        };
        for (int32_t j = 0; j < count; ++j) {
          const int32_t token = inputs.qo_indptr[i] + j, position = first + j;
          EXPECT_EQ(inputs.positions[token], position);
          EXPECT_EQ(inputs.token_requests[token], row.request);
          EXPECT_EQ(inputs.slots[token], slot_of(position));
          EXPECT_TRUE(written.insert(inputs.slots[token]).second) << "two tokens in one slot";
          const bool holds =
              position < row.committed || (phase != SpecPhase::kDraft && position < row.committed + row.accepted);
          EXPECT_EQ(inputs.drafts[token], holds ? 0 : row.round);
        }
        for (int32_t draft = 0; draft < drafts; ++draft) {
          const int32_t slot = inputs.rejected[i * drafts + draft];
          if (phase == SpecPhase::kDraftExtend && draft >= row.accepted) {
            EXPECT_EQ(slot, slot_of(row.committed + draft));
            given_back.insert(slot);
          } else {
            EXPECT_EQ(slot, -1) << "what is committed is never given back, nor anything before it is judged";
          }
        }
      }
      if (phase == SpecPhase::kDraftExtend && config.draft_extend == DraftExtend::kRagged) {
        for (const int32_t slot : given_back) EXPECT_EQ(written.count(slot), 0u);
      }
    }
  }
}

TEST(Scheduler, AStepMayAddAnyNumberOfTokensAndPagesHaveRoomToSpare) {
  const std::vector<TraceRequest> trace = {{.arrival = 0, .context = 5, .generated = 7},
                                           {.arrival = 0, .context = 1, .generated = 3}};
  SchedulerConfig config;
  config.step_ticks = kTicksPerMs;
  config.step_limit = 100;
  config.max_batch = 2;
  config.pool_pages = 64;
  config.spare = 4;
  Scheduler scheduler(trace, config);
  EXPECT_EQ(scheduler.PagesOf(0), 5 + 7 + 4);
  ASSERT_TRUE(scheduler.NextStep());
  ASSERT_EQ(scheduler.active().size(), 2u);
  EXPECT_EQ(scheduler.active()[0].pages.size(), 16u);
  scheduler.SetAdvance(0, 0);  // nothing held
  scheduler.SetAdvance(1, 3);  // all that it lacked
  ASSERT_TRUE(scheduler.NextStep());
  ASSERT_EQ(scheduler.active().size(), 1u);
  EXPECT_EQ(scheduler.active()[0].length, 6);
  scheduler.SetAdvance(0, 4);
  ASSERT_TRUE(scheduler.NextStep());
  EXPECT_EQ(scheduler.active()[0].length, 10);
  scheduler.SetAdvance(0, 3);
  EXPECT_FALSE(scheduler.NextStep());
  EXPECT_EQ(scheduler.finished(), 2);
  EXPECT_EQ(scheduler.free_pages(), 64);
}

}  // namespace
}  // namespace pristine::replay_driver
