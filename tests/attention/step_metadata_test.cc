#include "pristine/attention/step_metadata.h"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::StepMetadata;
using attention::StepMetadataConfig;
using attention::StepValues;
using Values = std::vector<int32_t>;

StepMetadataConfig Config() {
  return {.max_requests = 4,
          .max_tokens = 4,
          .page_size = 16,
          .num_pages = 10,
          .max_step_pages = 12,
          .max_length = 100,
          .worst_length = 40,
          .dummy_page = 9};
}

template <class BackendT>
class StepMetadataTest : public DeviceTest<BackendT> {
 protected:
  void SetUp() override {
    DeviceTest<BackendT>::SetUp();
    if (this->IsSkipped() || this->HasFatalFailure()) return;
    ASSERT_OK_AND_ASSIGN(manager_, BufferManager::Create(*this->device_));
  }
  void TearDown() override {
    metadata_.reset();
    manager_.reset();
    DeviceTest<BackendT>::TearDown();
  }
  void Create() {
    ASSERT_OK_AND_ASSIGN(metadata_, StepMetadata::Create(*manager_, Config()));
    ASSERT_OK(manager_->Seal());
  }
  Values Read(const Buffer<int32_t>& buffer) {
    absl::StatusOr<Values> values = Download(*this->stream_, buffer.live);
    EXPECT_OK(values);
    return values.ok() ? *values : Values();
  }
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
};
TYPED_TEST_SUITE(StepMetadataTest, AllBackends, BackendNames);

TYPED_TEST(StepMetadataTest, CapturesSeeTheWorstCase) {
  this->Create();
  ASSERT_OK(this->manager_->RestoreAll(*this->stream_, {4, 4}));
  EXPECT_EQ(this->Read(this->metadata_->lengths()), (Values{40, 40, 40, 40}));
  EXPECT_EQ(this->Read(this->metadata_->kv_indptr()), (Values{0, 3, 6, 9, 12}));
  EXPECT_EQ(this->Read(this->metadata_->kv_indices()), Values(12, 9));
  EXPECT_EQ(this->Read(this->metadata_->slots()), Values(4, -1));
  EXPECT_EQ(this->Read(this->metadata_->positions()), Values(4, 0));
}

TYPED_TEST(StepMetadataTest, PaddedRowsAreEmptyAndPointAtTheDummyPage) {
  this->Create();
  ASSERT_OK(this->manager_->BeginStep({4, 4}, {2, 2}));
  const Values lengths = {33, 16}, indptr = {0, 3, 4}, pages = {5, 6, 7, 8}, slots = {82, 143}, positions = {32, 15};
  ASSERT_OK(this->metadata_->Refill(
      {.lengths = lengths, .kv_indptr = indptr, .kv_indices = pages, .slots = slots, .positions = positions}));
  ASSERT_OK(this->manager_->BeforeReplay(*this->stream_, {4, 4}, {2, 2}));
  ASSERT_OK(this->manager_->RecordPrologue(*this->stream_, {4, 4}));
  EXPECT_EQ(this->Read(this->metadata_->lengths()), (Values{33, 16, 0, 0}));
  EXPECT_EQ(this->Read(this->metadata_->kv_indptr()), (Values{0, 3, 4, 4, 4}));
  EXPECT_EQ(this->Read(this->metadata_->kv_indices()), (Values{5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9, 9}));
  EXPECT_EQ(this->Read(this->metadata_->slots()), (Values{82, 143, -1, -1}));
  EXPECT_EQ(this->Read(this->metadata_->positions()), (Values{32, 15, 0, 0}));
}

TYPED_TEST(StepMetadataTest, SizesThatDoNotBelongTogetherAreRefused) {
  this->Create();
  ASSERT_OK(this->manager_->BeginStep({4, 4}, {2, 2}));
  const Values two = {1, 1}, three = {0, 1, 2}, none;
  const StepValues good = {.lengths = two, .kv_indptr = three, .kv_indices = two, .slots = two, .positions = two};
  const auto refused = [&](auto change, const char* part) {
    StepValues values = good;
    change(values);
    EXPECT_STATUS(this->metadata_->Refill(values), kInvalidArgument, part);
  };
  refused([&](StepValues& v) { v.kv_indptr = two; }, "step.kv_indptr has 2 values, must have 3");
  refused([&](StepValues& v) { v.kv_indptr = none; }, "step.kv_indptr has 0 values, must have 3");
  refused([&](StepValues& v) { v.kv_indices = three; }, "step.kv_indices has 3 values, must have 2");
  refused([&](StepValues& v) { v.positions = three; }, "step.positions has 3 values, must have 2");
  refused([&](StepValues& v) { v.slots = v.positions = three; }, "slots");
  EXPECT_OK(this->metadata_->Refill(good));
}

TYPED_TEST(StepMetadataTest, RaggedStepsAndStateSlotsAreRegisteredOnRequest) {
  StepMetadataConfig config = Config();
  config.max_tokens = 10;
  config.ragged = true;
  config.state_slots = 7;
  ASSERT_OK_AND_ASSIGN(this->metadata_, StepMetadata::Create(*this->manager_, config));
  ASSERT_OK(this->manager_->Seal());
  ASSERT_OK(this->manager_->RestoreAll(*this->stream_, {4, 10}));
  EXPECT_EQ(this->Read(this->metadata_->qo_indptr()), (Values{0, 2, 5, 7, 10}));
  EXPECT_EQ(this->Read(this->metadata_->state_slots()), Values(4, -1));

  ASSERT_OK(this->manager_->BeginStep({4, 10}, {2, 4}));
  const Values lengths = {33, 16}, indptr = {0, 3, 4}, pages = {5, 6, 7, 8}, four = {-1, -1, -1, -1}, qo = {0, 3, 4},
               state_slots = {6, 1}, three = {0, 1, 2}, short_qo = {0, 1, 3}, none;
  const StepValues good = {.lengths = lengths,
                           .kv_indptr = indptr,
                           .kv_indices = pages,
                           .slots = four,
                           .positions = lengths,
                           .qo_indptr = qo,
                           .state_slots = state_slots};
  const auto refused = [&](auto change, const char* part) {
    StepValues values = good;
    values.positions = four;
    change(values);
    EXPECT_STATUS(this->metadata_->Refill(values), kInvalidArgument, part);
  };
  refused([&](StepValues& v) { v.qo_indptr = none; }, "step.qo_indptr has 0 values, must have 3");
  refused([&](StepValues& v) { v.qo_indptr = short_qo; },
          "step.qo_indptr ends at 3, must end at the number of slots, 4");
  refused([&](StepValues& v) { v.state_slots = three; }, "step.state_slots has 3 values, must have 2");
  StepValues values = good;
  const Values positions = {30, 31, 32, 15};
  values.positions = positions;
  ASSERT_OK(this->metadata_->Refill(values));
  ASSERT_OK(this->manager_->BeforeReplay(*this->stream_, {4, 10}, {2, 4}));
  ASSERT_OK(this->manager_->RecordPrologue(*this->stream_, {4, 10}));
  EXPECT_EQ(this->Read(this->metadata_->qo_indptr()), (Values{0, 3, 4, 4, 4}));
  EXPECT_EQ(this->Read(this->metadata_->state_slots()), (Values{6, 1, -1, -1}));
}

TYPED_TEST(StepMetadataTest, ValuesThatWereNotAskedForAreRefused) {
  this->Create();
  ASSERT_OK(this->manager_->BeginStep({4, 4}, {2, 2}));
  const Values two = {1, 1}, three = {0, 1, 2};
  StepValues values = {.lengths = two, .kv_indptr = three, .kv_indices = two, .slots = two, .positions = two};
  values.qo_indptr = three;
  EXPECT_STATUS(this->metadata_->Refill(values), kInvalidArgument, "config.ragged is false");
  values.qo_indptr = {};
  values.state_slots = two;
  EXPECT_STATUS(this->metadata_->Refill(values), kInvalidArgument, "config.state_slots is 0");
  values.state_slots = {};
  values.block_table = two;
  EXPECT_STATUS(this->metadata_->Refill(values), kInvalidArgument, "config.block_table_width is 0");
}

// What lies behind a request's pages in the engine's table, and what an earlier step or a kernel left in ours, reaches
// no kernel: a page that is another request's by now, or no page at all.
TYPED_TEST(StepMetadataTest, ABlockTableThatShrinksLeavesNoStaleColumns) {
  StepMetadataConfig config = Config();
  config.max_step_pages = 0;
  config.block_table_width = 8;
  ASSERT_OK_AND_ASSIGN(this->metadata_, StepMetadata::Create(*this->manager_, config));
  ASSERT_OK(this->manager_->Seal());
  EXPECT_TRUE(this->metadata_->kv_indptr().live.empty() && this->metadata_->kv_indices().live.empty());
  EXPECT_EQ(this->metadata_->block_table().live.size(), 4u * 8u);
  ASSERT_OK(this->manager_->RestoreAll(*this->stream_, {4, 4}));
  EXPECT_EQ(this->Read(this->metadata_->block_table()), Values(32, 9));

  constexpr int32_t kWild = 2147480000;
  Values table = {1,     2,     3,     4,     5,     6,     7,     kWild,  // 7 pages of 100 tokens
                  kWild, kWild, kWild, kWild, kWild, kWild, kWild, kWild,  // none
                  8,     -1,    3,     4,     5,     6,     7,     1};     // 1 of 16
  const auto refill = [&](const Values& lengths) {
    const int32_t requests = static_cast<int32_t>(lengths.size());
    const Values zeros(requests, 0);
    ASSERT_OK(this->manager_->BeginStep({4, 4}, {requests, requests}));
    ASSERT_OK(this->metadata_->Refill({.lengths = lengths,
                                       .kv_indptr = {},
                                       .kv_indices = {},
                                       .slots = zeros,
                                       .positions = zeros,
                                       .block_table = absl::MakeConstSpan(table).first(requests * 8)}));
    ASSERT_OK(this->manager_->BeforeReplay(*this->stream_, {4, 4}, {requests, requests}));
    ASSERT_OK(this->stream_->Fill(AsWritableBytes(this->metadata_->block_table().live), std::byte{0x7f}));
    ASSERT_OK(this->manager_->RecordPrologue(*this->stream_, {4, 4}));
  };
  refill({100, 0, 16});
  EXPECT_EQ(this->Read(this->metadata_->block_table()),
            (Values{1, 2, 3, 4, 5, 6, 7, 9, 9, 9, 9, 9, 9, 9, 9, 9, 8, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9}));
  refill({17, 0});
  EXPECT_EQ(this->Read(this->metadata_->block_table()),
            (Values{1, 2, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9}));
  std::vector<Violation> violations(4);
  EXPECT_EQ(this->manager_->Poll(absl::MakeSpan(violations)), 0u);

  // A page of a request that the pool does not have is reported, and so is a length beyond the table.
  table[1] = kWild;
  refill({32, 0});
  EXPECT_EQ(this->Read(this->metadata_->block_table()), Values(32, 9));
  ASSERT_GT(this->manager_->Poll(absl::MakeSpan(violations)), 0u);
  table[1] = 2;
  refill({std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()});
  EXPECT_EQ(this->Read(this->metadata_->block_table()), Values(32, 9));
  EXPECT_GT(this->manager_->Poll(absl::MakeSpan(violations)), 0u);
}

TYPED_TEST(StepMetadataTest, ABlockTableStandsForIndptrAndIndices) {
  StepMetadataConfig config = Config();
  config.block_table_width = 7;
  EXPECT_STATUS(StepMetadata::Create(*this->manager_, config), kInvalidArgument,
                "max_step_pages is 12, must be 0 with a block table");
  config.max_step_pages = 0;
  for (const int32_t width : {-1, 6, 1 << 29}) {
    config.block_table_width = width;
    EXPECT_STATUS(StepMetadata::Create(*this->manager_, config), kInvalidArgument,
                  absl::StrCat("block_table_width is ", width, ", must be in [7 (the pages of max_length)").c_str());
  }
  config.block_table_width = 7;
  ASSERT_OK_AND_ASSIGN(this->metadata_, StepMetadata::Create(*this->manager_, config));
  ASSERT_OK(this->manager_->Seal());
  ASSERT_OK(this->manager_->BeginStep({4, 4}, {2, 2}));
  const Values two = {1, 1}, three = {0, 1, 2}, table(14, 1), more(21, 1);
  const StepValues good = {
      .lengths = two, .kv_indptr = {}, .kv_indices = {}, .slots = two, .positions = two, .block_table = table};
  const auto refused = [&](auto change, const char* part) {
    StepValues values = good;
    change(values);
    EXPECT_STATUS(this->metadata_->Refill(values), kInvalidArgument, part);
  };
  refused([&](StepValues& v) { v.kv_indptr = three; }, "step.kv_indptr has 3 values, must have 0 (a block table");
  refused([&](StepValues& v) { v.kv_indices = two; }, "step.kv_indices has 2 values, must have 0");
  refused([&](StepValues& v) { v.block_table = {}; }, "step.block_table has 0 values, must have 14");
  refused([&](StepValues& v) { v.block_table = more; }, "step.block_table has 21 values, must have 14");
  const Values many(100, 1), many_table(700, 1);
  StepValues large = good;
  large.lengths = large.slots = large.positions = many, large.block_table = many_table;
  EXPECT_STATUS(this->metadata_->Refill(large), kOutOfRange, "the buffer holds 4");
  EXPECT_OK(this->metadata_->Refill(good));
}

TYPED_TEST(StepMetadataTest, RefillNeedsAnOpenStep) {
  this->Create();
  const Values one = {1}, indptr = {0, 1};
  EXPECT_STATUS(
      this->metadata_->Refill({.lengths = one, .kv_indptr = indptr, .kv_indices = one, .slots = one, .positions = one}),
      kFailedPrecondition, "");
}

TYPED_TEST(StepMetadataTest, WrongConfigurationsAreRefusedByName) {
  const auto refused = [&](auto change, const char* part) {
    StepMetadataConfig config = Config();
    change(config);
    EXPECT_STATUS(StepMetadata::Create(*this->manager_, config), kInvalidArgument, part);
  };
  refused([](auto& c) { c.max_requests = 0; }, "max_requests is 0");
  refused([](auto& c) { c.max_requests = std::numeric_limits<int32_t>::max(); }, "max_requests is 2147483647");
  refused([](auto& c) { c.max_tokens = -1; }, "max_tokens is -1");
  refused([](auto& c) { c.page_size = 0; }, "page_size is 0");
  refused([](auto& c) { c.num_pages = 0; }, "num_pages is 0");
  refused([](auto& c) { c.max_length = 0; }, "max_length is 0");
  refused([](auto& c) { c.worst_length = 101; }, "worst_length is 101, must be at most max_length 100");
  refused([](auto& c) { c.max_step_pages = 11; }, "needs 12");
  refused([](auto& c) { c.worst_length = 0; }, "needs 28");  // max_length then
  refused([](auto& c) { c.dummy_page = 10; }, "dummy_page is 10");
  refused([](auto& c) { c.state_slots = -1; }, "state_slots is -1");
  refused([](auto& c) { c.num_pages = 1 << 28; }, "slots");
}

}  // namespace
}  // namespace pristine::testing
