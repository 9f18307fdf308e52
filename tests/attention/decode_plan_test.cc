#include "pristine/attention/decode_plan.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DecodePlan;
using attention::DecodePlanConfig;
using attention::DType;
using attention::MaxItems;
using attention::PlanItems;
using attention::WorkItem;

constexpr int kMultiprocessors = 8;

DecodePlanConfig Config() {
  DecodePlanConfig config;
  config.buckets = {{4, 4}};
  config.q_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 64;
  config.max_row_tokens = 1 << 20;
  config.scheduler = attention::DecodeScheduler::kHost;
  return config;
}

struct Planned {
  std::vector<WorkItem> items;
  std::vector<int32_t> indptr;
};

absl::StatusOr<Planned> Plan(const DecodePlanConfig& config, const Extent& bucket, const std::vector<int32_t>& lengths,
                             int multiprocessors = kMultiprocessors) {
  Planned planned = {std::vector<WorkItem>(MaxItems(config, bucket, multiprocessors), WorkItem{-1, -1, -1}),
                     std::vector<int32_t>(config.rows_per_request * bucket.requests + 1, -1)};
  absl::StatusOr<int32_t> count = PlanItems(config, bucket, multiprocessors, lengths, absl::MakeSpan(planned.items),
                                            absl::MakeSpan(planned.indptr));
  if (!count.ok()) return count.status();
  if (*count > static_cast<int32_t>(planned.items.size())) return absl::InternalError("more items than there is room");
  planned.items.resize(*count);
  return planned;
}

// Every token of every row's planned range is covered exactly once, in order; nothing else is.
void ExpectCoversExactlyOnce(const DecodePlanConfig& config, const Extent& bucket,
                             const std::vector<int32_t>& lengths) {
  ASSERT_OK_AND_ASSIGN(const Planned planned, Plan(config, bucket, lengths));
  const int32_t rows = config.rows_per_request * bucket.requests;
  ASSERT_EQ(planned.indptr.front(), 0);
  ASSERT_EQ(planned.indptr.back(), static_cast<int32_t>(planned.items.size()));
  for (int32_t row = 0; row < rows; ++row) {
    const int32_t length =
        row < static_cast<int32_t>(lengths.size()) ? std::min(lengths[row], config.max_row_tokens) : 0;
    int32_t at = config.window > 0 ? std::max(0, length - config.window) : 0;
    ASSERT_LE(planned.indptr[row], planned.indptr[row + 1]);
    for (int32_t i = planned.indptr[row]; i < planned.indptr[row + 1]; ++i) {
      ASSERT_EQ(planned.items[i].row, row);
      ASSERT_EQ(planned.items[i].begin, at);
      ASSERT_GT(planned.items[i].end, at);
      at = planned.items[i].end;
    }
    ASSERT_EQ(at, length) << "row " << row;
  }
}

TEST(PlanItems, CoversEveryTokenExactlyOnceInAllSmallCases) {
  const std::vector<int32_t> sizes = {0, 1, 127, 128, 129, 130, 511, 4097};
  for (const int32_t page_size : {1, 3, 16, 64, 200}) {
    for (const int32_t window : {0, 1, 128, 300}) {
      for (const int32_t bound : {128, 1 << 20}) {
        DecodePlanConfig config = Config();
        config.page_size = page_size;
        config.window = window;
        config.max_row_tokens = bound;
        for (const int32_t a : sizes) {
          for (const int32_t b : sizes) {
            ExpectCoversExactlyOnce(config, {2, 2}, {a, b});
            ExpectCoversExactlyOnce(config, {4, 4}, {a, b});
            for (const int32_t c : sizes) ExpectCoversExactlyOnce(config, {3, 3}, {a, b, c});
          }
        }
      }
    }
  }
}

TEST(PlanItems, CoversEveryTokenExactlyOnceInRandomCases) {
  constexpr uint64_t kSeed = 20231116;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  for (int n = 0; n < 300; ++n) {
    DecodePlanConfig config = Config();
    config.rows_per_request = 1 + static_cast<int32_t>(random() % 3);
    config.page_size = 1 + static_cast<int32_t>(random() % 70);
    config.kv_heads = 1 << random() % 4;
    config.window = random() % 2 == 0 ? 0 : static_cast<int32_t>(random() % 5000);
    const int32_t requests = 1 + static_cast<int32_t>(random() % 256);
    std::vector<int32_t> lengths(config.rows_per_request * (random() % (requests + 1)));
    for (int32_t& length : lengths) length = random() % 5 == 0 ? 0 : static_cast<int32_t>(random() % 40000);
    ExpectCoversExactlyOnce(config, {requests, requests}, lengths);
  }
}

TEST(PlanItems, ItemsStartOnPageEdgesWithoutAWindow) {
  for (const int32_t page_size : {3, 16, 64, 200}) {
    DecodePlanConfig config = Config();
    config.page_size = page_size;
    ASSERT_OK_AND_ASSIGN(const Planned planned, Plan(config, {2, 2}, {10000, 333}));
    EXPECT_GT(planned.items.size(), 2u);
    for (const WorkItem& item : planned.items) EXPECT_EQ(item.begin % page_size, 0);
  }
}

TEST(PlanItems, ChunksAreTheSmallestThatFit) {
  DecodePlanConfig config = Config();
  const std::vector<int32_t> lengths = {9001, 17, 0, 4444};
  const Extent bucket = {4, 4};
  const int32_t places = MaxItems(config, bucket, kMultiprocessors);
  ASSERT_OK_AND_ASSIGN(const Planned planned, Plan(config, bucket, lengths));
  const int32_t chunk = planned.items[0].end - planned.items[0].begin;
  EXPECT_EQ(chunk % 16, 0);
  const auto count = [&](int32_t size) {
    int32_t items = 0;
    for (const int32_t length : lengths) items += (length + size - 1) / size;
    return items;
  };
  EXPECT_LE(count(chunk), places);
  EXPECT_GT(count(chunk - 16), places);
}

TEST(PlanItems, ShortRowsAreNotCut) {
  ASSERT_OK_AND_ASSIGN(const Planned planned, Plan(Config(), {4, 4}, {128, 1, 0, 100}));
  EXPECT_EQ(planned.items.size(), 3u);
}

TEST(PlanItems, IsTheSameEveryTime) {
  const std::vector<int32_t> lengths = {9001, 17, 0, 4444};
  ASSERT_OK_AND_ASSIGN(const Planned first, Plan(Config(), {4, 4}, lengths));
  ASSERT_OK_AND_ASSIGN(const Planned second, Plan(Config(), {4, 4}, lengths));
  ASSERT_EQ(first.items.size(), second.items.size());
  for (size_t i = 0; i < first.items.size(); ++i) {
    EXPECT_EQ(first.items[i].row, second.items[i].row);
    EXPECT_EQ(first.items[i].begin, second.items[i].begin);
    EXPECT_EQ(first.items[i].end, second.items[i].end);
  }
}

// A planner that counts an empty row as no work when it sizes the chunks and as one item when it writes them overruns
// its arrays: 6 long rows and 54 empty ones.
TEST(PlanItems, EmptyRowsTakeNoPlace) {
  DecodePlanConfig config = Config();
  config.page_size = 16;
  config.kv_heads = 4;
  config.q_heads = 32;
  std::vector<int32_t> lengths(60, 0);
  for (int r = 0; r < 6; ++r) lengths[r * 10] = 16000;
  ExpectCoversExactlyOnce(config, {60, 60}, lengths);
  ASSERT_OK_AND_ASSIGN(const Planned planned, Plan(config, {60, 60}, lengths));
  EXPECT_GT(planned.items.size(), 6u);
  for (const WorkItem& item : planned.items) EXPECT_LT(item.begin, item.end);
}

TEST(PlanItems, LengthsNearTheInt32LimitDoNotOverflow) {
  DecodePlanConfig config = Config();
  config.max_row_tokens = std::numeric_limits<int32_t>::max();
  const int32_t most = std::numeric_limits<int32_t>::max();
  ExpectCoversExactlyOnce(config, {4, 4}, {most, most, most - 1, 5});
}

TEST(PlanItems, MaxItemsFollowsFromBucketHeadsAndDeviceAlone) {
  DecodePlanConfig config = Config();
  EXPECT_EQ(MaxItems(config, {4, 4}, 8), 4 + 8);
  EXPECT_EQ(MaxItems(config, {4, 4}, 132), 4 + 132);
  config.rows_per_request = 2;
  config.kv_heads = 3;
  EXPECT_EQ(MaxItems(config, {4, 4}, 8), 8 + 6);
}

TEST(PlanItems, ADecreaseIsRefusedInTheWordsOfThePrefixSums) {
  std::vector<int32_t> lengths = {6144, 6144, 6144, 6144, 4000, 4000, 2000, 2030, -1715, 100};
  EXPECT_STATUS(Plan(Config(), {16, 16}, lengths), kInvalidArgument, "kv_indptr falls from 36606 at 8 to 34891 at 9");
  EXPECT_STATUS(Plan(Config(), {4, 4}, {-1}), kInvalidArgument, "kv_indptr falls from 0 at 0 to -1 at 1");
}

TEST(PlanItems, MoreRowsThanTheBucketAreRefused) {
  EXPECT_STATUS(Plan(Config(), {2, 2}, {1, 2, 3}), kInvalidArgument, "3 rows, bucket {2 requests, 2 tokens} has 2");
}

TEST(PlanItems, ARowAboveTheBoundIsPlannedAsTheBound) {
  DecodePlanConfig config = Config();
  config.max_row_tokens = 6144;
  ASSERT_OK_AND_ASSIGN(const Planned planned, Plan(config, {1, 1}, {50000}));
  EXPECT_EQ(planned.items.back().end, 6144);
}

template <class BackendT>
class DecodePlanTest : public DeviceTest<BackendT> {
 protected:
  void SetUp() override {
    DeviceTest<BackendT>::SetUp();
    if (this->IsSkipped() || this->HasFatalFailure()) return;
    ASSERT_OK_AND_ASSIGN(manager_, BufferManager::Create(*this->device_));
  }
  void TearDown() override {
    plan_.reset();
    manager_.reset();
    DeviceTest<BackendT>::TearDown();
  }
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<DecodePlan> plan_;
};
TYPED_TEST_SUITE(DecodePlanTest, AllBackends, BackendNames);

TYPED_TEST(DecodePlanTest, WrongConfigurationsAreRefusedByName) {
  const auto refused = [&](auto change, absl::StatusCode code, const char* part) {
    DecodePlanConfig config = Config();
    change(config);
    EXPECT_TRUE(HasStatus(DecodePlan::Create(*this->manager_, config).status(), code, part));
  };
  constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
  refused([](auto& c) { c.buckets.clear(); }, kInvalid, "no buckets");
  refused([](auto& c) { c.buckets = {{0, 1}}; }, kInvalid, "{0 requests, 1 tokens}");
  refused([](auto& c) { c.buckets = {{1, 1}, {1, 1}}; }, kInvalid, "given twice");
  refused([](auto& c) { c.kv_heads = 0; }, kInvalid, "kv_heads is 0");
  refused([](auto& c) { c.kv_heads = 3; }, kInvalid, "q_heads is 4, must be a multiple of kv_heads 3");
  refused([](auto& c) { c.page_size = 0; }, kInvalid, "page_size is 0");
  refused([](auto& c) { c.window = -1; }, kInvalid, "window is -1");
  refused([](auto& c) { c.max_row_tokens = 0; }, kInvalid, "max_row_tokens is 0");
  refused([](auto& c) { c.worst_row_tokens = 1 << 21; }, kInvalid, "worst_row_tokens is 2097152");
  refused([](auto& c) { c.rows_per_request = 0; }, kInvalid, "rows_per_request is 0");
  refused([](auto& c) { c.buckets = {{1 << 24, 1 << 24}}; }, kInvalid, "16777216 rows, must be at most 8192");
  refused(
      [](auto& c) {
        c.head_dim = 256, c.dtype = DType::kBFloat16, c.buckets = {{4097, 4097}};
      },
      kInvalid, "4097 rows, must be at most 4096");
  refused(
      [](auto& c) {
        c.q_heads = 4096, c.kv_heads = 128, c.buckets = {{8192, 8192}};
      },
      kInvalid, "values of partial results");
  // The device counts tiles in 32 bits.
  refused(
      [](auto& c) {
        c.scheduler = attention::DecodeScheduler::kDevice, c.buckets = {{8192, 8192}}, c.max_row_tokens = 1 << 30;
      },
      kInvalid, "has 274877906944 tiles of 64 tokens at max_row_tokens 1073741824, must be at most 2147483647");
  refused([](auto& c) { c.soft_cap = -1; }, kInvalid, "soft_cap is -1");
  refused([](auto& c) { c.layout = static_cast<attention::KvLayout>(7); }, kInvalid, "layout is 7, must be NHD or HND");
  refused([](auto& c) { c.q_len = 0; }, kInvalid, "q_len is 0");
  refused([](auto& c) { c.q_len = 17; }, absl::StatusCode::kUnimplemented, "q_len is 17, kernels take at most 16");
  refused([](auto& c) { c.kv_dtype = DType::kFloat8E4M3; }, absl::StatusCode::kUnimplemented,
          "float32 over float8_e4m3 with head_dim 64");
  refused([](auto& c) { c.head_dim = 96; }, absl::StatusCode::kUnimplemented, "bfloat16 with head_dim 128");
  refused([](auto& c) { c.q_heads = 66; }, absl::StatusCode::kUnimplemented, "33 query heads per KV head");
  refused([](auto& c) { c.q_heads = c.kv_heads = 65536; }, kInvalid, "q_heads is 65536, must be at most 65535");
  refused([](auto& c) { c.derived_from = {77}; }, absl::StatusCode::kNotFound, "77");
}

TYPED_TEST(DecodePlanTest, PlanNeedsAStepABucketAndWholeRequests) {
  DecodePlanConfig config = Config();
  config.rows_per_request = 2;
  ASSERT_OK_AND_ASSIGN(this->plan_, DecodePlan::Create(*this->manager_, config));
  ASSERT_OK(this->manager_->Seal());
  EXPECT_STATUS(this->plan_->Plan({4, 4}, {1, 2}), kFailedPrecondition, "");
  ASSERT_OK(this->manager_->BeginStep({4, 4}, {1, 1}));
  EXPECT_STATUS(this->plan_->Plan({8, 8}, {1, 2}), kNotFound, "{8 requests, 8 tokens}");
  EXPECT_STATUS(this->plan_->Plan({4, 4}, {1, 2, 3}), kInvalidArgument, "multiple of rows_per_request 2");
  EXPECT_STATUS(this->plan_->Plan({4, 4}, {5, -2}), kInvalidArgument, "falls from 5 at 1 to 3 at 2");
  EXPECT_OK(this->plan_->Plan({4, 4}, {1, 2}));
}

TYPED_TEST(DecodePlanTest, PlanAllocatesNoDeviceMemory) {
  ASSERT_OK_AND_ASSIGN(this->plan_, DecodePlan::Create(*this->manager_, Config()));
  ASSERT_OK(this->manager_->Seal());
  ASSERT_OK(this->manager_->BeginStep({4, 4}, {4, 4}));
  const size_t before = this->device_->total_allocations();
  ASSERT_OK(this->plan_->Plan({4, 4}, {5000, 1, 0, 70000}));
  EXPECT_EQ(this->device_->total_allocations(), before);
}

}  // namespace
}  // namespace pristine::testing
