// Our own wrappers under the kit, as an engine that captures by itself would use them.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "pristine/attention/append_kv.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/attention/paged_decode.h"
#include "pristine/attention/paged_prefill.h"
#include "pristine/attention/sparse_page_table.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/conformance/attention_conformance.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::AppendKv;
using attention::DecodePlan;
using attention::DecodeScheduler;
using attention::DType;
using attention::PagedDecode;
using attention::PagedPrefill;
using attention::SparsePageTable;
using attention::SparseRowBound;
using attention::SparseRowLength;
using attention::StepMetadata;
using attention::StepValues;
using conformance::AttentionShape;
using conformance::AttentionTensors;
using conformance::BoundArray;
using conformance::Conforms;

float Scale(const AttentionShape& shape) { return 1 / std::sqrt(static_cast<float>(shape.head_dim)); }

// A page more than a request can have.
int32_t TableWidth(const AttentionShape& shape) { return (shape.max_length - 1) / shape.page_size + 2; }

// The step's pages as an engine's block table, which holds anything where no request has a page.
std::vector<int32_t> BlockTable(const StepValues& step, int32_t width) {
  std::vector<int32_t> table(step.lengths.size() * width, 2147480000);
  for (size_t r = 0; r < step.lengths.size(); ++r) {
    std::copy(step.kv_indices.begin() + step.kv_indptr[r], step.kv_indices.begin() + step.kv_indptr[r + 1],
              table.begin() + r * width);
  }
  return table;
}

// StepMetadata, a plan and PagedDecode, for target verify if the shape has several queries; with a sliding window if
// `window` > 0, over a block table if `block_table`.
class DecodeWrapper : public conformance::AttentionWrapper {
 public:
  static absl::StatusOr<std::unique_ptr<DecodeWrapper>> Create(Device& device, const AttentionShape& shape,
                                                               int32_t window,
                                                               DecodeScheduler scheduler = DecodeScheduler::kDevice,
                                                               bool block_table = false) {
    std::unique_ptr<DecodeWrapper> wrapper(new DecodeWrapper(shape, block_table ? TableWidth(shape) : 0));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->manager_, BufferManager::Create(device));
    PRISTINE_ASSIGN_OR_RETURN(
        wrapper->metadata_,
        StepMetadata::Create(*wrapper->manager_, {.max_requests = shape.max_requests(),
                                                  .max_tokens = shape.max_tokens(),
                                                  .page_size = shape.page_size,
                                                  .num_pages = shape.num_pages(),
                                                  .max_step_pages = block_table ? 0 : shape.max_step_pages(),
                                                  .max_length = shape.max_length,
                                                  .block_table_width = wrapper->table_width_}));
    attention::DecodePlanConfig plan = {.q_len = shape.q_len,
                                        .q_heads = shape.q_heads,
                                        .kv_heads = shape.kv_heads,
                                        .head_dim = shape.head_dim,
                                        .dtype = shape.dtype,
                                        .page_size = shape.page_size,
                                        .window = window,
                                        .max_row_tokens = shape.max_length,
                                        .derived_from = {wrapper->metadata_->lengths().id},
                                        .scheduler = scheduler};
    for (const int32_t bucket : shape.buckets) plan.buckets.push_back(wrapper->Of(bucket));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->plan_, DecodePlan::Create(*wrapper->manager_, plan));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->decode_, PagedDecode::Create(*wrapper->plan_, Scale(shape)));
    PRISTINE_RETURN_IF_ERROR(wrapper->manager_->Seal());
    return wrapper;
  }

  absl::Status Prepare(Stream& stream, int32_t bucket, const StepValues& step) override {
    const int32_t real = static_cast<int32_t>(step.lengths.size());
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(Of(bucket), Of(real)));
    StepValues values = step;
    std::vector<int32_t> table;
    if (table_width_ > 0) {
      table = BlockTable(step, table_width_);
      values.kv_indptr = {}, values.kv_indices = {}, values.block_table = table;
    }
    PRISTINE_RETURN_IF_ERROR(metadata_->Refill(values));
    PRISTINE_RETURN_IF_ERROR(plan_->Plan(Of(bucket), step.lengths));
    return manager_->BeforeReplay(stream, Of(bucket), Of(real));
  }
  absl::Status Run(Stream& stream, int32_t bucket, const AttentionTensors& t) override {
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream, Of(bucket)));
    if (shape_.appends) {
      PRISTINE_RETURN_IF_ERROR(AppendKv(stream, Of(bucket).tokens,
                                        {.dtype = shape_.dtype,
                                         .kv_heads = shape_.kv_heads,
                                         .head_dim = shape_.head_dim,
                                         .k_new = t.k_new,
                                         .v_new = t.v_new,
                                         .slots = metadata_->slots().live,
                                         .k = t.k,
                                         .v = t.v}));
    }
    return decode_->Run(stream, Of(bucket),
                        {.q = t.q,
                         .k = t.k,
                         .v = t.v,
                         .out = t.out,
                         .lse = {reinterpret_cast<attention::LseBase2*>(t.lse.address()), t.lse.size()},
                         .kv_indptr = metadata_->kv_indptr().live,
                         .kv_indices = metadata_->kv_indices().live,
                         .lengths = metadata_->lengths().live,
                         .block_table = metadata_->block_table().live,
                         .block_table_stride = table_width_});
  }
  std::vector<BoundArray> BoundArrays() override {
    std::vector<BoundArray> arrays = {{Kind::kLength, metadata_->lengths().live, shape_.max_length},
                                      {Kind::kSlot, metadata_->slots().live, shape_.num_pages() * shape_.page_size},
                                      {Kind::kPosition, metadata_->positions().live, shape_.max_length}};
    if (table_width_ > 0) {
      arrays.push_back({Kind::kPageTable, metadata_->block_table().live, shape_.num_pages()});
    } else {
      arrays.push_back({Kind::kIndptr, metadata_->kv_indptr().live, shape_.max_step_pages()});
      arrays.push_back({Kind::kPageTable, metadata_->kv_indices().live, shape_.num_pages()});
    }
    return arrays;
  }
  BufferManager& manager() { return *manager_; }

 private:
  DecodeWrapper(const AttentionShape& shape, int32_t table_width) : shape_(shape), table_width_(table_width) {}
  Extent Of(int32_t requests) const { return {requests, requests * shape_.q_len}; }

  const AttentionShape shape_;
  const int32_t table_width_;  // 0: kv_indptr and kv_indices
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
  std::unique_ptr<DecodePlan> plan_;
  std::unique_ptr<PagedDecode> decode_;
};

// The sparse path: page table to CSR in the graph, then PagedDecode over pages of one token, a row per KV-head group.
class SparseWrapper : public conformance::AttentionWrapper {
 public:
  static constexpr int32_t kBlock = 4, kTopk = 3;

  // The j-th block that a request of `length` selects in `group`: kTopk - 1 neighbours and the last one.
  static int32_t Block(int32_t length, int32_t group, int32_t j) {
    const int32_t blocks = (length - 1) / kBlock + 1;
    return j == kTopk - 1 ? blocks - 1 : (7 * length + 3 * group) % (blocks - kTopk + 1) + j;
  }
  static bool Attended(int32_t length, int32_t group, int32_t position) {
    if (length <= kTopk * kBlock) return true;
    for (int32_t j = 0; j < kTopk; ++j) {
      if (Block(length, group, j) == position / kBlock) return true;
    }
    return false;
  }

  static absl::StatusOr<std::unique_ptr<SparseWrapper>> Create(Device& device, const AttentionShape& shape) {
    std::unique_ptr<SparseWrapper> wrapper(new SparseWrapper(shape));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->manager_, BufferManager::Create(device));
    BufferManager& manager = *wrapper->manager_;
    const attention::SparseConfig sparse = {.groups = shape.kv_heads, .block = kBlock, .topk = kTopk};
    PRISTINE_ASSIGN_OR_RETURN(wrapper->metadata_,
                              StepMetadata::Create(manager, {.max_requests = shape.max_requests(),
                                                             .max_tokens = shape.max_requests(),
                                                             .page_size = shape.page_size,
                                                             .num_pages = shape.num_pages(),
                                                             .max_step_pages = shape.max_step_pages(),
                                                             .max_length = shape.max_length,
                                                             .worst_length = SparseRowBound(sparse)}));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->sparse_, SparsePageTable::Create(manager, *wrapper->metadata_, sparse));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->table_, wrapper->sparse_->RegisterTable("table"));
    attention::DecodePlanConfig plan = {.rows_per_request = sparse.groups,
                                        .q_heads = shape.q_heads / sparse.groups,
                                        .kv_heads = 1,
                                        .head_dim = shape.head_dim,
                                        .dtype = shape.dtype,
                                        .max_row_tokens = SparseRowBound(sparse),
                                        .derived_from = {wrapper->metadata_->lengths().id}};
    for (const int32_t bucket : shape.buckets) plan.buckets.push_back({bucket, bucket});
    PRISTINE_ASSIGN_OR_RETURN(wrapper->plan_, DecodePlan::Create(manager, plan));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->decode_, PagedDecode::Create(*wrapper->plan_, Scale(shape)));
    PRISTINE_RETURN_IF_ERROR(manager.Seal());
    return wrapper;
  }

  absl::Status Prepare(Stream& stream, int32_t bucket, const StepValues& step) override {
    const int32_t real = static_cast<int32_t>(step.lengths.size()), groups = sparse_->config().groups;
    std::vector<int32_t> plan_lengths, blocks;
    for (const int32_t length : step.lengths) {
      for (int32_t group = 0; group < groups; ++group) {
        plan_lengths.push_back(SparseRowLength(sparse_->config(), length));
        for (int32_t j = 0; j < kTopk; ++j) {
          blocks.push_back(length > kTopk * kBlock ? Block(length, group, j) : 0);  // short rows do not read it
        }
      }
    }
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep({bucket, bucket}, {real, real}));
    PRISTINE_RETURN_IF_ERROR(metadata_->Refill(step));
    PRISTINE_RETURN_IF_ERROR(sparse_->Refill(plan_lengths));
    PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(table_, blocks));
    PRISTINE_RETURN_IF_ERROR(plan_->Plan({bucket, bucket}, plan_lengths));
    return manager_->BeforeReplay(stream, {bucket, bucket}, {real, real});
  }
  absl::Status Run(Stream& stream, int32_t bucket, const AttentionTensors& t) override {
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream, {bucket, bucket}));
    PRISTINE_RETURN_IF_ERROR(sparse_->Run(stream, {bucket, bucket}, table_));
    return decode_->Run(stream, {bucket, bucket},
                        {.q = t.q,
                         .k = t.k,
                         .v = t.v,
                         .out = t.out,
                         .lse = {reinterpret_cast<attention::LseBase2*>(t.lse.address()), t.lse.size()},
                         .kv_indptr = sparse_->kv_indptr_ws().live,
                         .kv_indices = sparse_->kv_indices().live});
  }
  std::vector<BoundArray> BoundArrays() override {
    const int32_t slots = shape_.num_pages() * shape_.page_size, groups = sparse_->config().groups;
    const int32_t tokens = groups * shape_.max_requests() * SparseRowBound(sparse_->config());
    return {{Kind::kLength, metadata_->lengths().live, shape_.max_length},
            {Kind::kIndptr, metadata_->kv_indptr().live, shape_.max_step_pages()},
            {Kind::kPageTable, metadata_->kv_indices().live, shape_.num_pages()},
            {Kind::kIndptr, sparse_->kv_indptr().live, tokens},
            {Kind::kIndptr, sparse_->kv_indptr_ws().live, tokens},
            {Kind::kPageTable, sparse_->kv_indices().live, slots * groups},
            {Kind::kPageTable, table_.live, (shape_.max_length - 1) / kBlock + 1}};
  }
  BufferManager& manager() { return *manager_; }

 private:
  explicit SparseWrapper(const AttentionShape& shape) : shape_(shape) {}
  const AttentionShape shape_;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
  std::unique_ptr<SparsePageTable> sparse_;
  Buffer<int32_t> table_;
  std::unique_ptr<DecodePlan> plan_;
  std::unique_ptr<PagedDecode> decode_;
};

// PagedPrefill where each request has one query: an extend step of one token.
class PrefillWrapper : public conformance::AttentionWrapper {
 public:
  static absl::StatusOr<std::unique_ptr<PrefillWrapper>> Create(Device& device, const AttentionShape& shape,
                                                                int32_t window) {
    std::unique_ptr<PrefillWrapper> wrapper(new PrefillWrapper(shape));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->manager_, BufferManager::Create(device));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->metadata_,
                              StepMetadata::Create(*wrapper->manager_, {.max_requests = shape.max_requests(),
                                                                        .max_tokens = shape.max_requests(),
                                                                        .page_size = shape.page_size,
                                                                        .num_pages = shape.num_pages(),
                                                                        .max_step_pages = shape.max_step_pages(),
                                                                        .max_length = shape.max_length,
                                                                        .ragged = true}));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->prefill_, PagedPrefill::Create(device, {.q_heads = shape.q_heads,
                                                                               .kv_heads = shape.kv_heads,
                                                                               .head_dim = shape.head_dim,
                                                                               .dtype = shape.dtype,
                                                                               .kv_dtype = shape.dtype,
                                                                               .page_size = shape.page_size,
                                                                               .window = window,
                                                                               .scale = Scale(shape)}));
    for (int32_t i = 0; i <= shape.max_requests(); ++i) wrapper->qo_indptr_.push_back(i);
    PRISTINE_RETURN_IF_ERROR(wrapper->manager_->Seal());
    return wrapper;
  }

  absl::Status Prepare(Stream& stream, int32_t bucket, const StepValues& step) override {
    const int32_t real = static_cast<int32_t>(step.lengths.size());
    StepValues ragged = step;
    ragged.qo_indptr = absl::MakeConstSpan(qo_indptr_).first(real + 1);
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep({bucket, bucket}, {real, real}));
    PRISTINE_RETURN_IF_ERROR(metadata_->Refill(ragged));
    return manager_->BeforeReplay(stream, {bucket, bucket}, {real, real});
  }
  absl::Status Run(Stream& stream, int32_t bucket, const AttentionTensors& t) override {
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream, {bucket, bucket}));
    return prefill_->Run(stream, {bucket, bucket},
                         {.q = t.q,
                          .k = t.k,
                          .v = t.v,
                          .out = t.out,
                          .lse = {reinterpret_cast<attention::LseBase2*>(t.lse.address()), t.lse.size()},
                          .qo_indptr = metadata_->qo_indptr().live,
                          .kv_indptr = metadata_->kv_indptr().live,
                          .kv_indices = metadata_->kv_indices().live,
                          .lengths = metadata_->lengths().live});
  }
  std::vector<BoundArray> BoundArrays() override {
    return {{Kind::kLength, metadata_->lengths().live, shape_.max_length},
            {Kind::kIndptr, metadata_->kv_indptr().live, shape_.max_step_pages()},
            {Kind::kIndptr, metadata_->qo_indptr().live, shape_.max_requests()},
            {Kind::kPageTable, metadata_->kv_indices().live, shape_.num_pages()}};
  }
  BufferManager& manager() { return *manager_; }

 private:
  explicit PrefillWrapper(const AttentionShape& shape) : shape_(shape) {}
  const AttentionShape shape_;
  std::vector<int32_t> qo_indptr_;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
  std::unique_ptr<PagedPrefill> prefill_;
};

template <class BackendT>
class OurWrappersTest : public DeviceTest<BackendT> {
 protected:
  // The manager had nothing to report, either.
  void ExpectClean(BufferManager& manager) {
    ASSERT_OK_AND_ASSIGN(const std::vector<Violation> violations, manager.Verify(*this->stream_));
    EXPECT_EQ(violations.size(), 0u) << violations[0].ToString();
    EXPECT_EQ(manager.stats().neutralised, 0);
  }
  void ExpectConforms(const AttentionShape& shape, int32_t window = 0) {
    for (const DecodeScheduler scheduler : {DecodeScheduler::kDevice, DecodeScheduler::kHost}) {
      ASSERT_OK_AND_ASSIGN(const auto wrapper, DecodeWrapper::Create(*this->device_, shape, window, scheduler));
      EXPECT_TRUE(Conforms(*this->stream_, *wrapper, shape));
      ExpectClean(wrapper->manager());
    }
  }
};
TYPED_TEST_SUITE(OurWrappersTest, AllBackends, BackendNames);

TYPED_TEST(OurWrappersTest, DenseDecodeConforms) {
  this->ExpectConforms({});
  this->ExpectConforms({.dtype = DType::kBFloat16, .q_heads = 4, .kv_heads = 1, .head_dim = 128, .buckets = {2, 5}});
  this->ExpectConforms({.page_size = 1, .max_length = 30, .buckets = {1, 2}, .steps_in_flight = 3});
}

TYPED_TEST(OurWrappersTest, AppendThenDecodeConforms) {
  this->ExpectConforms({.appends = true});
  this->ExpectConforms({.dtype = DType::kBFloat16, .page_size = 3, .max_length = 25, .buckets = {4}, .appends = true});
}

TYPED_TEST(OurWrappersTest, WindowedDecodeConforms) {
  const auto last_eleven = [](int32_t length, int32_t, int32_t position) { return position >= length - 11; };
  this->ExpectConforms({.attended = last_eleven}, 11);
  this->ExpectConforms({.dtype = DType::kBFloat16, .page_size = 1, .buckets = {3, 4}, .attended = last_eleven}, 11);
}

TYPED_TEST(OurWrappersTest, TargetVerifyConforms) {
  const auto last_eleven = [](int32_t length, int32_t, int32_t position) { return position >= length - 11; };
  this->ExpectConforms({.q_len = 4, .buckets = {1, 3}});
  this->ExpectConforms({.dtype = DType::kBFloat16, .q_heads = 6, .kv_heads = 1, .q_len = 3, .buckets = {2, 4}});
  this->ExpectConforms({.dtype = DType::kBFloat16, .q_len = 5, .page_size = 3, .buckets = {3}, .appends = true});
  this->ExpectConforms({.dtype = DType::kBFloat16, .q_len = 2, .page_size = 1, .buckets = {3}, .attended = last_eleven},
                       11);
}

TYPED_TEST(OurWrappersTest, DecodeOverABlockTableConforms) {
  const AttentionShape shapes[] = {{}, {.dtype = DType::kBFloat16, .q_len = 3, .page_size = 3, .buckets = {2, 4}}};
  for (const AttentionShape& shape : shapes) {
    ASSERT_OK_AND_ASSIGN(const auto wrapper,
                         DecodeWrapper::Create(*this->device_, shape, 0, DecodeScheduler::kDevice, true));
    EXPECT_TRUE(Conforms(*this->stream_, *wrapper, shape));
    this->ExpectClean(wrapper->manager());
  }
}

TYPED_TEST(OurWrappersTest, AChainThatIsOffByOneIsAWrongValueOfAQuery) {
  // By this shape the wrapper's queries see a token too many.
  const auto not_itself = [](int32_t length, int32_t, int32_t position) { return position < length - 1; };
  const AttentionShape shape = {.q_len = 2, .buckets = {2}, .appends = true, .attended = not_itself};
  ASSERT_OK_AND_ASSIGN(const auto wrapper, DecodeWrapper::Create(*this->device_, shape, 0));
  ASSERT_OK_AND_ASSIGN(const conformance::Report report, CheckAttention(*this->stream_, *wrapper, shape));
  ASSERT_EQ(report.findings.size(), 1u) << report.ToString();
  EXPECT_EQ(report.findings[0].kind, conformance::Finding::Kind::kWrongValue);
  EXPECT_NE(report.findings[0].detail.find("query 0: "), std::string::npos) << report.ToString();
}

TYPED_TEST(OurWrappersTest, AWindowThatTheShapeDoesNotNameIsAWrongValue) {
  const AttentionShape shape = {.buckets = {2}};
  ASSERT_OK_AND_ASSIGN(const auto wrapper, DecodeWrapper::Create(*this->device_, shape, 11));
  ASSERT_OK_AND_ASSIGN(const conformance::Report report, CheckAttention(*this->stream_, *wrapper, shape));
  ASSERT_EQ(report.findings.size(), 1u) << report.ToString();
  EXPECT_EQ(report.findings[0].kind, conformance::Finding::Kind::kWrongValue);
}

TYPED_TEST(OurWrappersTest, SparseDecodeConforms) {
  for (const int32_t page_size : {1, 8}) {
    const AttentionShape shape = {.page_size = page_size, .attended = SparseWrapper::Attended};
    ASSERT_OK_AND_ASSIGN(const auto wrapper, SparseWrapper::Create(*this->device_, shape));
    EXPECT_TRUE(Conforms(*this->stream_, *wrapper, shape));
    this->ExpectClean(wrapper->manager());
  }
}

TYPED_TEST(OurWrappersTest, PrefillConforms) {
  const auto last_eleven = [](int32_t length, int32_t, int32_t position) { return position >= length - 11; };
  const std::pair<AttentionShape, int32_t> cases[] = {
      {{}, 0},
      {{.dtype = DType::kBFloat16, .q_heads = 4, .kv_heads = 1, .head_dim = 128, .buckets = {2, 5}}, 0},
      {{.dtype = DType::kBFloat16, .page_size = 1, .buckets = {3, 4}, .attended = last_eleven}, 11}};
  for (const auto& [shape, window] : cases) {
    ASSERT_OK_AND_ASSIGN(const auto wrapper, PrefillWrapper::Create(*this->device_, shape, window));
    EXPECT_TRUE(Conforms(*this->stream_, *wrapper, shape));
    this->ExpectClean(wrapper->manager());
  }
}

}  // namespace
}  // namespace pristine::testing
