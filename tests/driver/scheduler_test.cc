#include "examples/replay_driver/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "examples/replay_driver/options.h"
#include "tests/driver/traces.h"
#include "tests/support/status_matchers.h"

namespace pristine::replay_driver {
namespace {

constexpr int64_t kStep = 30 * kTicksPerMs;

SchedulerConfig Config(int32_t max_batch, int32_t pool_pages, int32_t page_size = 1) {
  return {.step_ticks = kStep,
          .step_limit = std::numeric_limits<int64_t>::max(),
          .max_batch = max_batch,
          .page_size = page_size,
          .pool_pages = pool_pages,
          .seed = 1};
}

TEST(Scheduler, StepsWithNobodyActiveCount) {
  const std::vector<TraceRequest> trace = {{0, 5, 2}, {100 * kStep, 5, 1}};
  Scheduler scheduler(trace, Config(4, 100));
  ASSERT_TRUE(scheduler.NextStep());
  EXPECT_EQ(scheduler.active()[0].length, 6);
  ASSERT_TRUE(scheduler.NextStep());
  EXPECT_EQ(scheduler.active()[0].length, 7);
  ASSERT_TRUE(scheduler.NextStep());
  EXPECT_EQ(scheduler.steps(), 101);  // 98 of which had nobody
  EXPECT_EQ(scheduler.active()[0].id, 1);
  EXPECT_FALSE(scheduler.NextStep());
  EXPECT_EQ(scheduler.finished(), 2);
}

TEST(Scheduler, AStepLimitAlsoEndsAWait) {
  const std::vector<TraceRequest> trace = {{0, 5, 1}, {100 * kStep, 5, 1}};
  SchedulerConfig config = Config(4, 100);
  config.step_limit = 50;
  Scheduler scheduler(trace, config);
  EXPECT_TRUE(scheduler.NextStep());
  EXPECT_FALSE(scheduler.NextStep());
  EXPECT_EQ(scheduler.steps(), 50);
  EXPECT_EQ(scheduler.finished(), 1);
}

TEST(Scheduler, RefusesOnlyWhatTheWholePoolCouldNotHold) {
  const std::vector<TraceRequest> trace = {{0, 90, 10}, {0, 91, 10}, {0, 3, 1}};
  Scheduler scheduler(trace, Config(4, 10, 10));
  ASSERT_TRUE(scheduler.NextStep());
  ASSERT_EQ(scheduler.active().size(), 1u);  // the third waits for the pool, the second is gone
  EXPECT_EQ(scheduler.active()[0].id, 0);
  EXPECT_EQ(scheduler.refused(), (std::vector<int32_t>{1}));
  while (scheduler.NextStep()) {
  }
  EXPECT_EQ(scheduler.finished(), 2);
  EXPECT_EQ(scheduler.steps(), 11);
}

TEST(Scheduler, AStepMayHaveNobodyBecauseAllWereRefused) {
  const std::vector<TraceRequest> trace = {{0, 1000, 10}, {0, 7, 0}};
  Scheduler scheduler(trace, Config(4, 10));
  EXPECT_TRUE(scheduler.NextStep());
  EXPECT_TRUE(scheduler.active().empty());
  EXPECT_FALSE(scheduler.NextStep());
  EXPECT_EQ(scheduler.finished(), 1);  // nothing to generate
}

TEST(Scheduler, PropertiesOfRandomTraces) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const auto draw = [&random](int64_t least, int64_t most) {
      return std::uniform_int_distribution<int64_t>(least, most)(random);
    };
    const int32_t page_size = static_cast<int32_t>(draw(1, 20));
    const SchedulerConfig config =
        Config(static_cast<int32_t>(draw(1, 8)), static_cast<int32_t>(draw(5, 60)), page_size);
    std::vector<TraceRequest> trace(draw(1, 80));
    int64_t arrival = 0;
    for (TraceRequest& request : trace) {
      request = {arrival, static_cast<int32_t>(draw(0, 30 * page_size)), static_cast<int32_t>(draw(0, 30))};
      arrival += draw(0, 4) == 0 ? draw(0, 40 * kStep) : draw(0, kStep);
    }

    Scheduler scheduler(trace, config);
    std::map<int32_t, int32_t> served;  // id -> steps
    int32_t last_entered = -1;
    while (scheduler.NextStep()) {
      const int64_t now = (scheduler.steps() - 1) * kStep;
      const absl::Span<const ActiveRequest> active = scheduler.active();
      ASSERT_LE(active.size(), static_cast<size_t>(config.max_batch));
      std::set<int32_t> pages;
      for (size_t i = 0; i < active.size(); ++i) {
        const ActiveRequest& request = active[i];
        const bool entered = i >= active.size() - scheduler.entered();
        ASSERT_EQ(served.count(request.id) == 0, entered);
        if (entered) {
          ASSERT_GT(request.id, last_entered) << "first come, first served";
          ASSERT_LE(trace[request.id].arrival, now);
          last_entered = request.id;
        }
        ASSERT_EQ(request.length, trace[request.id].context + ++served[request.id]);
        ASSERT_EQ(static_cast<int64_t>(request.pages.size()), scheduler.PagesOf(request.id));
        for (const int32_t page : request.pages) {
          ASSERT_GE(page, 1) << "the dummy page";
          ASSERT_LE(page, config.pool_pages);
          ASSERT_TRUE(pages.insert(page).second) << "page " << page << " is handed out twice";
        }
      }
      ASSERT_EQ(pages.size() + scheduler.free_pages(), static_cast<size_t>(config.pool_pages));
    }
    int64_t refused = 0;
    for (int32_t id = 0; id < static_cast<int32_t>(trace.size()); ++id) {
      const bool could_never_fit = scheduler.PagesOf(id) > config.pool_pages;
      refused += could_never_fit;
      EXPECT_EQ(served[id], could_never_fit ? 0 : trace[id].generated);
    }
    EXPECT_EQ(static_cast<int64_t>(scheduler.refused().size()), refused);
    EXPECT_EQ(scheduler.finished() + refused, static_cast<int64_t>(trace.size()));
    EXPECT_EQ(scheduler.free_pages(), config.pool_pages);
  }
}

// Buckets that a default run over `trace` replays, and how often they change.
int64_t BucketChanges(const std::vector<TraceRequest>& trace) {
  absl::StatusOr<Options> options = ParseOptions({});
  SchedulerConfig config = Config(options->max_batch, options->kv_tokens);
  Scheduler scheduler(trace, config);
  int64_t changes = 0;
  int32_t last = 0;
  while (scheduler.NextStep()) {
    if (scheduler.active().empty()) continue;
    const int32_t bucket = *std::lower_bound(options->buckets.begin(), options->buckets.end(),
                                             static_cast<int32_t>(scheduler.active().size()));
    changes += last != 0 && bucket != last;
    last = bucket;
  }
  return changes;
}

TEST(Scheduler, TheWholeAzureTraceChangesBucketsOverAThousandTimes) {
  const std::string path = testing::TracePath("azure_llm_2023_code.csv");
  if (path.empty()) GTEST_SKIP() << testing::kNoTraces;
  ASSERT_OK_AND_ASSIGN(const std::vector<TraceRequest> trace, ReadTrace(path, TraceFormat::kAzureCsv));
  EXPECT_EQ(trace.size(), 8819u);
  EXPECT_GT(BucketChanges(trace), 1000);
}

}  // namespace
}  // namespace pristine::replay_driver
