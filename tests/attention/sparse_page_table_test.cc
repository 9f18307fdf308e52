#include "pristine/attention/sparse_page_table.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::SparseConfig;
using attention::SparsePageTable;
using attention::SparseRowBound;
using attention::SparseRowLength;
using attention::StepMetadata;
using attention::StepMetadataConfig;
using Values = std::vector<int32_t>;

TEST(SparseRowLength, FollowsTheTable) {
  const SparseConfig all_sparse = {.block = 64, .topk = 96, .dense_len = 0};
  EXPECT_EQ(SparseRowBound(all_sparse), 6144);
  EXPECT_EQ(SparseRowLength(all_sparse, 0), 0);
  EXPECT_EQ(SparseRowLength(all_sparse, 1), 1);
  EXPECT_EQ(SparseRowLength(all_sparse, 6143), 6143);
  EXPECT_EQ(SparseRowLength(all_sparse, 6144), 6144);
  EXPECT_EQ(SparseRowLength(all_sparse, 6145), 6144 - 64 + 1);
  EXPECT_EQ(SparseRowLength(all_sparse, 6144 + 63), 6144 - 1);
  EXPECT_EQ(SparseRowLength(all_sparse, 6144 + 64), 6144);  // a whole last block, not an empty one
  EXPECT_EQ(SparseRowLength(all_sparse, 1000001), 6144 - 64 + 1);

  const SparseConfig dense_first = {.block = 64, .topk = 96, .dense_len = 8192};
  EXPECT_EQ(SparseRowBound(dense_first), 8191);
  EXPECT_EQ(SparseRowLength(dense_first, 6145), 6145);
  EXPECT_EQ(SparseRowLength(dense_first, 8191), 8191);
  EXPECT_EQ(SparseRowLength(dense_first, 8192), 6144);
  EXPECT_EQ(SparseRowLength(dense_first, 8193), 6144 - 64 + 1);

  const SparseConfig short_dense = {.block = 64, .topk = 96, .dense_len = 100};
  EXPECT_EQ(SparseRowBound(short_dense), 6144);
  EXPECT_EQ(SparseRowLength(short_dense, 99), 99);
  EXPECT_EQ(SparseRowLength(short_dense, 100), 100);
}

TEST(SparseRowLength, NeverPassesTheBound) {
  for (const int32_t dense_len : {0, 1, 15, 32, 33, 60}) {
    const SparseConfig config = {.block = 8, .topk = 4, .dense_len = dense_len};
    for (int32_t length = 0; length < 300; ++length) {
      EXPECT_LE(SparseRowLength(config, length), SparseRowBound(config));
      EXPECT_GE(SparseRowLength(config, length), length > 0);
    }
  }
}

// Lengths, page tables and block tables of a step.
struct Step {
  Values lengths, indptr, pages, table, plan_lengths;
};

template <class BackendT>
class SparsePageTableTest : public DeviceTest<BackendT> {
 protected:
  void TearDown() override {
    Drop();
    DeviceTest<BackendT>::TearDown();
  }
  void Drop() {
    runner_.reset();
    sparse_.reset();
    metadata_.reset();
    manager_.reset();
  }
  void Create(const SparseConfig& config, int32_t page_size, int32_t max_requests, int32_t max_length,
              std::vector<Extent> buckets, OnViolation on_violation = OnViolation::kNeutralise) {
    Drop();
    ASSERT_OK_AND_ASSIGN(manager_, BufferManager::Create(*this->device_, {.on_violation = on_violation}));
    const int32_t pages = (max_length - 1) / page_size + 1;
    const int32_t bound = SparseRowBound(config);
    ASSERT_OK_AND_ASSIGN(metadata_, StepMetadata::Create(*manager_, {.max_requests = max_requests,
                                                                     .max_tokens = max_requests,
                                                                     .page_size = page_size,
                                                                     .num_pages = 3 * pages,
                                                                     .max_step_pages = max_requests * pages,
                                                                     .max_length = max_length,
                                                                     .worst_length = bound,
                                                                     .dummy_page = 1}));
    ASSERT_OK_AND_ASSIGN(sparse_, SparsePageTable::Create(*manager_, *metadata_, config));
    ASSERT_OK_AND_ASSIGN(table_, sparse_->RegisterTable("layer0.table"));
    ASSERT_OK_AND_ASSIGN(runner_,
                         GraphRunner::Create({.buckets = buckets}, [this](Stream& stream, const Extent& bucket) {
                           return sparse_->Run(stream, bucket, table_);
                         }));
    ASSERT_OK(runner_->AddHook(*manager_));
    ASSERT_OK(manager_->Seal());
  }

  // Random pages (two requests may share one: the conversion does not care) and ascending random blocks.
  Step Random(const Values& lengths, uint64_t seed) {
    std::mt19937_64 random(seed);
    const SparseConfig& config = sparse_->config();
    const StepMetadataConfig& step = metadata_->config();
    Step result = {.lengths = lengths, .indptr = {0}, .pages = {}, .table = {}, .plan_lengths = {}};
    for (const int32_t length : lengths) {
      const int32_t pages = (length + step.page_size - 1) / step.page_size;
      for (int32_t i = 0; i < pages; ++i) result.pages.push_back(static_cast<int32_t>(random() % step.num_pages));
      result.indptr.push_back(result.indptr.back() + pages);
      const int32_t blocks = (length + config.block - 1) / config.block;
      for (int32_t g = 0; g < config.groups; ++g) {
        result.plan_lengths.push_back(SparseRowLength(config, length));
        Values row(config.topk, 0);  // where it must not be read: block 0
        if (blocks > config.topk) {
          Values others(blocks - 1);
          for (int32_t b = 0; b < blocks - 1; ++b) others[b] = b;
          std::shuffle(others.begin(), others.end(), random);
          std::copy_n(others.begin(), config.topk - 1, row.begin());
          row[config.topk - 1] = blocks - 1;
          std::sort(row.begin(), row.end());
        }
        result.table.insert(result.table.end(), row.begin(), row.end());
      }
    }
    return result;
  }

  absl::Status Begin(const Step& step, const Extent& bucket) {
    const int32_t requests = static_cast<int32_t>(step.lengths.size());
    const Values slots(requests, -1), positions(requests, 0);
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(bucket, {requests, requests}));
    PRISTINE_RETURN_IF_ERROR(metadata_->Refill({.lengths = step.lengths,
                                                .kv_indptr = step.indptr,
                                                .kv_indices = step.pages,
                                                .slots = slots,
                                                .positions = positions}));
    PRISTINE_RETURN_IF_ERROR(sparse_->Refill(step.plan_lengths));
    return manager_->Refill(table_, absl::MakeConstSpan(step.table));
  }
  absl::Status Run(const Step& step, const Extent& bucket) {
    const int32_t requests = static_cast<int32_t>(step.lengths.size());
    PRISTINE_RETURN_IF_ERROR(Begin(step, bucket));
    PRISTINE_RETURN_IF_ERROR(manager_->BeforeReplay(*this->stream_, bucket, {requests, requests}));
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(*this->stream_, bucket));
    PRISTINE_RETURN_IF_ERROR(sparse_->Run(*this->stream_, bucket, table_));
    return this->stream_->Synchronize();
  }
  absl::Status Replay(const Step& step, const Extent& bucket) {
    const int32_t requests = static_cast<int32_t>(step.lengths.size());
    PRISTINE_RETURN_IF_ERROR(Begin(step, bucket));
    PRISTINE_RETURN_IF_ERROR(runner_->Replay(*this->stream_, bucket, {requests, requests}));
    return this->stream_->Synchronize();
  }

  // kv_indptr_ws and kv_indices are what the definition says, over the bucket; beyond it, kv_indptr_ws is its original.
  void ExpectConverted(const Step& step, const Extent& bucket) {
    const SparseConfig& config = sparse_->config();
    const StepMetadataConfig& meta = metadata_->config();
    ASSERT_OK_AND_ASSIGN(const Values indptr, Download(*this->stream_, sparse_->kv_indptr_ws().live));
    ASSERT_OK_AND_ASSIGN(const Values indices, Download(*this->stream_, sparse_->kv_indices().live));
    Values expected_indptr = {0}, expected_indices;
    for (int32_t row = 0; row < config.groups * bucket.requests; ++row) {
      const int32_t request = row / config.groups;
      if (request < static_cast<int32_t>(step.lengths.size())) {
        const int32_t length = step.lengths[request];
        std::vector<int64_t> positions;
        if (length < config.dense_len || length <= config.topk * config.block) {
          for (int32_t p = 0; p < length; ++p) positions.push_back(p);
        } else {
          for (int32_t b = 0; b < config.topk; ++b) {
            const int64_t block = step.table[row * config.topk + b];
            const int64_t size =
                b + 1 < config.topk || length % config.block == 0 ? config.block : length % config.block;
            for (int64_t p = 0; p < size; ++p) positions.push_back(block * config.block + p);
          }
        }
        for (const int64_t p : positions) {
          int64_t slot = meta.dummy_page * meta.page_size;
          if (p < length) {
            slot = int64_t{step.pages[step.indptr[request] + p / meta.page_size]} * meta.page_size + p % meta.page_size;
          }
          expected_indices.push_back(static_cast<int32_t>(slot * config.groups + row % config.groups));
        }
      }
      expected_indptr.push_back(static_cast<int32_t>(expected_indices.size()));
    }
    for (int32_t row = config.groups * bucket.requests + 1; row <= config.groups * meta.max_requests; ++row) {
      expected_indptr.push_back(row * SparseRowBound(config));
    }
    EXPECT_EQ(indptr, expected_indptr);
    EXPECT_TRUE(std::equal(expected_indices.begin(), expected_indices.end(), indices.begin()));
  }
  std::vector<Violation> Poll() {
    std::vector<Violation> violations(64);
    violations.resize(manager_->Poll(absl::MakeSpan(violations)));
    return violations;
  }

  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
  std::unique_ptr<SparsePageTable> sparse_;
  std::unique_ptr<GraphRunner> runner_;
  Buffer<int32_t> table_;
};
TYPED_TEST_SUITE(SparsePageTableTest, AllBackends, BackendNames);

TYPED_TEST(SparsePageTableTest, ConvertsEveryLengthClassForAllPageSizesAndGroups) {
  uint64_t seed = 800;
  for (const int32_t page_size : {1, 3, 16, 64}) {
    for (const int32_t groups : {1, 2, 5}) {
      for (const int32_t dense_len : {0, 20, 50}) {
        const SparseConfig config = {.groups = groups, .block = 8, .topk = 4, .dense_len = dense_len};
        this->Create(config, page_size, 12, 200, {{12, 12}});
        const Step step = this->Random({1, 31, 32, 33, 40, 49, 50, 0, 200, 193}, ++seed);
        ASSERT_OK(this->Run(step, {12, 12}));  // two padded rows per group
        this->ExpectConverted(step, {12, 12});
        EXPECT_TRUE(this->Poll().empty()) << page_size << " " << groups << " " << dense_len;
      }
    }
  }
}

TYPED_TEST(SparsePageTableTest, EveryReplayStartsFromTheWorstCaseWhateverTheOneBeforeLeft) {
  this->Create({.groups = 2, .block = 8, .topk = 4}, 16, 8, 200, {{2, 2}, {8, 8}});
  ASSERT_OK(this->runner_->CaptureAll(*this->stream_));
  const Step large = this->Random({200, 33, 10, 100, 90, 80, 70}, 1), small = this->Random({60, 3}, 2),
             none = this->Random({}, 3);
  for (const auto& [step, bucket] : {std::pair{&large, Extent{8, 8}},
                                     {&small, {2, 2}},
                                     {&none, {2, 2}},
                                     {&small, {8, 8}},
                                     {&none, {8, 8}},
                                     {&large, {8, 8}}}) {
    ASSERT_OK(this->Replay(*step, bucket));
    this->ExpectConverted(*step, bucket);
  }
  EXPECT_TRUE(this->Poll().empty());
}

TYPED_TEST(SparsePageTableTest, ScansMoreRowsThanABlockHasThreads) {
  this->Create({.groups = 2, .block = 4, .topk = 2}, 1, 2500, 40, {{2048, 2048}, {2500, 2500}});
  std::mt19937_64 random(4096);
  for (const int32_t requests : {2048, 2500, 513}) {
    Values lengths(requests);
    for (int32_t& length : lengths) length = static_cast<int32_t>(random() % 41);
    const Step step = this->Random(lengths, random());
    const Extent bucket = requests <= 2048 ? Extent{2048, 2048} : Extent{2500, 2500};
    ASSERT_OK(this->Run(step, bucket));
    this->ExpectConverted(step, bucket);
  }
  EXPECT_TRUE(this->Poll().empty());
}

// Rows of several parts, whose beginnings and ends lie anywhere in a line of memory.
TYPED_TEST(SparsePageTableTest, LongRowsAreWholeForEveryBlockAndPageSize) {
  uint64_t seed = 6000;
  for (const auto& [block, page_size] : {std::pair<int32_t, int32_t>{64, 64}, {64, 1}, {48, 16}, {10, 1}, {10, 12}}) {
    for (const int32_t topk : {30, 130}) {
      const SparseConfig config = {.groups = 3, .block = block, .topk = topk, .dense_len = topk * block - 7};
      const int32_t bound = SparseRowBound(config), max_length = 2 * bound + 77;
      this->Create(config, page_size, 7, max_length, {{7, 7}});
      std::mt19937_64 random(++seed);
      Values lengths = {max_length, bound, 0, bound + 1, bound - 7, 5};
      for (int32_t& length : lengths) {
        if (length > bound) length -= static_cast<int32_t>(random() % 70);
      }
      const Step step = this->Random(lengths, seed);
      ASSERT_OK(this->Run(step, {7, 7}));
      this->ExpectConverted(step, {7, 7});
      EXPECT_TRUE(this->Poll().empty());
      ASSERT_FALSE(this->HasFailure()) << block << " " << page_size << " " << topk << ", seed " << seed;
    }
  }
}

// From some 2^22 indices on, another kernel does pages of one token.
TYPED_TEST(SparsePageTableTest, ManyLongRowsOfTokensAreWhole) {
  constexpr int32_t kRequests = 350;
  const SparseConfig config = {.groups = 2, .block = 64, .topk = 96};
  this->Create(config, 1, kRequests, 7000, {{kRequests, kRequests}});
  std::mt19937_64 random(7000);
  Values lengths(kRequests - 1);
  for (int32_t& length : lengths)
    length = static_cast<int32_t>(random() % 20 == 0 ? random() % 7001 : 6145 + random() % 800);
  const Step step = this->Random(lengths, random());
  ASSERT_OK(this->Run(step, {kRequests, kRequests}));
  this->ExpectConverted(step, {kRequests, kRequests});
  EXPECT_TRUE(this->Poll().empty());
}

TYPED_TEST(SparsePageTableTest, LengthsOutOfRangeAreClampedAndReported) {
  this->Create({.groups = 2, .block = 8, .topk = 4}, 16, 4, 200, {{4, 4}}, OnViolation::kRecord);
  Step step = this->Random({200, 10, 200, 7}, 5);
  ASSERT_OK(this->Run(step, {4, 4}));
  ASSERT_TRUE(this->Poll().empty());
  Step wrong = step;
  wrong.lengths[0] = 100000;
  wrong.lengths[1] = -3;
  ASSERT_OK(this->Run(wrong, {4, 4}));
  step.lengths[1] = 0;  // what it must have become
  this->ExpectConverted(step, {4, 4});
  std::vector<Violation> clamped;
  for (const Violation& violation : this->Poll()) {
    if (violation.kind == Violation::Kind::kClamped) clamped.push_back(violation);
  }
  ASSERT_EQ(clamped.size(), 2u);  // once per request, not per group
  std::sort(clamped.begin(), clamped.end(), [](const auto& a, const auto& b) { return a.index < b.index; });
  EXPECT_EQ(std::string(clamped[0].buffer), "step.lengths");
  EXPECT_EQ(clamped[0].index, 0);
  EXPECT_EQ(clamped[0].expected, 200);
  EXPECT_EQ(clamped[0].actual, 100000);
  EXPECT_EQ(clamped[1].index, 1);
  EXPECT_EQ(clamped[1].expected, 0);
  EXPECT_EQ(clamped[1].actual, -3);
}

TYPED_TEST(SparsePageTableTest, BlocksThatTheRequestDoesNotHaveBecomeTheDummyPage) {
  this->Create({.groups = 2, .block = 8, .topk = 4}, 16, 2, 200, {{2, 2}});
  Step step = this->Random({100, 33}, 6);
  step.table[3] = 24;  // legal in the table, past the end of a request of 100
  step.table[6] = 13;
  ASSERT_OK(this->Run(step, {2, 2}));
  this->ExpectConverted(step, {2, 2});
  EXPECT_TRUE(this->Poll().empty());
}

TYPED_TEST(SparsePageTableTest, StaleColumnsOfShortRowsAreNotRead) {
  this->Create({.groups = 2, .block = 8, .topk = 4, .dense_len = 40}, 16, 2, 200, {{2, 2}});
  Step step = this->Random({32, 39}, 7);
  std::fill(step.table.begin(), step.table.end(), 24);
  ASSERT_OK(this->Run(step, {2, 2}));
  this->ExpectConverted(step, {2, 2});
}

TYPED_TEST(SparsePageTableTest, APlanThatDisagreesIsReportedAndTheBodyGoesOn) {
  this->Create({.groups = 2, .block = 8, .topk = 4}, 16, 4, 200, {{4, 4}});
  ASSERT_OK(this->runner_->CaptureAll(*this->stream_));
  Step step = this->Random({200, 10, 60}, 8);
  ASSERT_OK(this->Replay(step, {4, 4}));
  ASSERT_TRUE(this->Poll().empty());
  step.plan_lengths[3] += 5;
  ASSERT_OK(this->Replay(step, {4, 4}));
  this->ExpectConverted(step, {4, 4});
  const std::vector<Violation> violations = this->Poll();
  ASSERT_EQ(violations.size(), 1u);
  EXPECT_EQ(violations[0].kind, Violation::Kind::kPlanMismatch);
  EXPECT_EQ(violations[0].index, 4);
  EXPECT_EQ(violations[0].expected, 32 + 32 + 10 + 15);
  EXPECT_EQ(violations[0].actual, 32 + 32 + 10 + 10);
}

TYPED_TEST(SparsePageTableTest, NegativePlanLengthsAreRefused) {
  this->Create({.groups = 2, .block = 8, .topk = 4}, 16, 2, 200, {{2, 2}});
  ASSERT_OK(this->manager_->BeginStep({2, 2}, {1, 1}));
  EXPECT_STATUS(this->sparse_->Refill({5, -6}), kInvalidArgument, "plan length 1 is -6");
  EXPECT_STATUS(this->sparse_->Refill(Values(5, 1)), kInvalidArgument, "5 plan lengths");
  EXPECT_STATUS(this->sparse_->Refill(Values(4, 1 << 30)), kInvalidArgument, "add up to");
  EXPECT_OK(this->sparse_->Refill({5, 6}));
}

TYPED_TEST(SparsePageTableTest, WrongConfigurationsAreRefusedByName) {
  this->Create({.groups = 2, .block = 8, .topk = 4}, 16, 2, 200, {{2, 2}});
  const auto refused = [&](const SparseConfig& config, const char* part) {
    EXPECT_STATUS(SparsePageTable::Create(*this->manager_, *this->metadata_, config), kInvalidArgument, part);
  };
  refused({.name = "s", .groups = 0, .block = 8, .topk = 4}, "s: groups is 0");
  refused({.name = "s", .block = 0, .topk = 4}, "block is 0");
  refused({.name = "s", .block = 8, .topk = -4}, "topk is -4");
  refused({.name = "s", .block = 8, .topk = 4, .dense_len = -1}, "dense_len is -1");
  refused({.name = "s", .block = 8, .topk = 5}, "R = 40 tokens, but step.worst_length = 32 gives 32");
  refused({.name = "s", .block = 1 << 20, .topk = 1 << 20}, "topk * block");
  refused({.name = "s", .groups = 1 << 30, .block = 8, .topk = 4}, "groups * max_requests");
  EXPECT_STATUS(this->sparse_->Run(*this->stream_, {3, 3}, this->table_), kInvalidArgument, "max_requests = 2");
  EXPECT_STATUS(this->sparse_->Run(*this->stream_, {2, 2}, this->metadata_->lengths()), kInvalidArgument,
                "table step.lengths has 2 values, needs 16");
}

// --- conversion and decode together ---

// Groups as requests of their own, tokens as pages: the KV pool viewed as [slots * groups, 1, kv_heads / groups, …].
TYPED_TEST(SparsePageTableTest, DecodeOverTheConvertedTableAttendsTheChosenBlocks) {
  for (const int32_t page_size : {1, 16}) {
    for (const attention::DType dtype : {attention::DType::kFloat32, attention::DType::kBFloat16}) {
      constexpr int32_t kGroups = 2, kMax = 4;
      const SparseConfig config = {.groups = kGroups, .block = 16, .topk = 5};
      this->Create(config, page_size, kMax, 400, {{kMax, kMax}});
      this->Drop();
      const DecodeShape shape = {.dtype = dtype, .q_heads = 8, .kv_heads = 4, .page_size = page_size, .seed = 900};
      const Values lengths = {399, 80, 81};
      const DecodeCase step(shape, lengths, {398, 0, 80});
      ASSERT_OK_AND_ASSIGN(this->manager_, BufferManager::Create(*this->device_));
      ASSERT_OK_AND_ASSIGN(this->metadata_,
                           StepMetadata::Create(*this->manager_, {.max_requests = kMax,
                                                                  .max_tokens = kMax,
                                                                  .page_size = page_size,
                                                                  .num_pages = step.num_pages(),
                                                                  .max_step_pages = kMax * ((400 - 1) / page_size + 1),
                                                                  .max_length = 400,
                                                                  .worst_length = 80}));
      ASSERT_OK_AND_ASSIGN(this->sparse_, SparsePageTable::Create(*this->manager_, *this->metadata_, config));
      ASSERT_OK_AND_ASSIGN(this->table_, this->sparse_->RegisterTable("layer0.table"));
      ASSERT_OK_AND_ASSIGN(const auto plan, attention::DecodePlan::Create(
                                                *this->manager_, {.name = "sparse_plan",
                                                                  .buckets = {{kMax, kMax}},
                                                                  .rows_per_request = kGroups,
                                                                  .q_heads = shape.q_heads / kGroups,
                                                                  .kv_heads = shape.kv_heads / kGroups,
                                                                  .head_dim = shape.head_dim,
                                                                  .dtype = dtype,
                                                                  .max_row_tokens = SparseRowBound(config),
                                                                  .derived_from = {this->sparse_->kv_indptr().id}}));
      ASSERT_OK_AND_ASSIGN(const auto decode, attention::PagedDecode::Create(*plan, 0.125f));
      const size_t out_bytes = size_t{kMax} * shape.q_heads * shape.head_dim * attention::SizeOf(dtype);
      const std::vector<std::byte> k_host = step.Pool(false), v_host = step.Pool(true);
      ASSERT_OK_AND_ASSIGN(const DeviceBuffer q, this->device_->Allocate(out_bytes, "q"));
      ASSERT_OK_AND_ASSIGN(const DeviceBuffer out, this->device_->Allocate(out_bytes, "out"));
      ASSERT_OK_AND_ASSIGN(const DeviceBuffer lse,
                           this->device_->Allocate(kMax * shape.q_heads * sizeof(float), "lse"));
      ASSERT_OK_AND_ASSIGN(const DeviceBuffer k, this->device_->Allocate(k_host.size(), "k"));
      ASSERT_OK_AND_ASSIGN(const DeviceBuffer v, this->device_->Allocate(v_host.size(), "v"));
      ASSERT_OK(Upload(*this->stream_, q.As<std::byte>(), step.Q()));
      ASSERT_OK(Upload(*this->stream_, k.As<std::byte>(), k_host));
      ASSERT_OK(Upload(*this->stream_, v.As<std::byte>(), v_host));
      const auto body = [&](Stream& stream, const Extent& bucket) -> absl::Status {
        PRISTINE_RETURN_IF_ERROR(this->sparse_->Run(stream, bucket, this->table_));
        return decode->Run(stream, bucket,
                           {.q = q.As<const std::byte>(),
                            .k = k.As<const std::byte>(),
                            .v = v.As<const std::byte>(),
                            .out = out.As<std::byte>(),
                            .lse = lse.As<attention::LseBase2>(),
                            .kv_indptr = this->sparse_->kv_indptr_ws().live,
                            .kv_indices = this->sparse_->kv_indices().live,
                            .lengths = {}});
      };
      ASSERT_OK_AND_ASSIGN(this->runner_, GraphRunner::Create({.buckets = {{kMax, kMax}}}, body));
      ASSERT_OK(this->runner_->AddHook(*this->manager_));
      ASSERT_OK(this->runner_->CaptureAll(*this->stream_));

      Step values = this->Random(lengths, 9);
      values.indptr = step.indptr();
      values.pages = step.indices();
      ASSERT_OK(this->Begin(values, {kMax, kMax}));
      ASSERT_OK(plan->Plan({kMax, kMax}, values.plan_lengths));
      ASSERT_OK(this->runner_->Replay(*this->stream_, {kMax, kMax}, {3, 3}));
      ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> raw, Download(*this->stream_, out.As<std::byte>()));
      ASSERT_OK_AND_ASSIGN(const std::vector<float> lse_host, Download(*this->stream_, lse.As<float>()));
      const std::vector<float> values_host = ToFloats(raw, dtype);
      for (int32_t request = 0; request < kMax; ++request) {
        for (int32_t head = 0; head < shape.q_heads; ++head) {
          const int32_t row = request * kGroups + head / (shape.q_heads / kGroups);
          OracleRow expected = {.out = {}, .lse = -std::numeric_limits<double>::infinity()};
          if (request < 3) {
            expected = step.Expected(request, head, [&](int32_t position) {
              if (lengths[request] <= 80) return true;
              const auto begin = values.table.begin() + row * config.topk;
              return std::find(begin, begin + config.topk, position / config.block) != begin + config.topk;
            });
          }
          const int32_t place = request * shape.q_heads + head;
          EXPECT_EQ(Mismatch(expected, absl::MakeConstSpan(values_host).subspan(place * shape.head_dim, shape.head_dim),
                             lse_host[place], dtype),
                    "")
              << "request " << request << ", head " << head;
        }
      }
      EXPECT_TRUE(this->Poll().empty());
      this->Drop();
    }
  }
}

}  // namespace
}  // namespace pristine::testing
