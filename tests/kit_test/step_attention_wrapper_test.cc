// StepAttention under the kit, in every forward mode that attends: what Route chooses, over kv_indices or a block
// table.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "pristine/attention/append_kv.h"
#include "pristine/attention/step_attention.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/conformance/attention_conformance.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DecodeScheduler;
using attention::DType;
using attention::ForwardMode;
using attention::KernelFamily;
using attention::StepAttention;
using attention::StepMetadata;
using attention::StepValues;
using conformance::AttentionShape;
using conformance::AttentionTensors;
using conformance::BoundArray;

// How a mode's wrapper is made.
struct Mode {
  ForwardMode mode = ForwardMode::kDecode;
  // Each of the kit's requests is two of the step: the first queries of its chain and the others, and where it is cut
  // changes from step to step. So requests have different numbers of query tokens, none too.
  bool ragged = false;
  bool decode_draft_extend = false;
  bool block_table = false;
  DecodeScheduler scheduler = DecodeScheduler::kDevice;
};

class StepAttentionWrapper : public conformance::AttentionWrapper {
 public:
  static absl::StatusOr<std::unique_ptr<StepAttentionWrapper>> Create(Device& device, const AttentionShape& shape,
                                                                      const Mode& mode) {
    std::unique_ptr<StepAttentionWrapper> wrapper(new StepAttentionWrapper(shape, mode));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->manager_, BufferManager::Create(device));
    attention::StepMetadataConfig metadata;
    metadata.max_requests = wrapper->parts_ * shape.max_requests();
    metadata.max_tokens = shape.max_tokens();
    metadata.page_size = shape.page_size;
    metadata.num_pages = shape.num_pages();
    metadata.max_step_pages = mode.block_table ? 0 : wrapper->parts_ * shape.max_step_pages();
    metadata.max_length = shape.max_length;
    metadata.ragged = true;
    metadata.block_table_width = wrapper->table_width_;
    PRISTINE_ASSIGN_OR_RETURN(wrapper->metadata_, StepMetadata::Create(*wrapper->manager_, metadata));
    attention::StepAttentionConfig config;
    config.mode = mode.mode;
    config.route = {.dtype = shape.dtype,
                    .kv_dtype = shape.stored_dtype(),
                    .q_heads = shape.q_heads,
                    .kv_heads = shape.kv_heads,
                    .head_dim = shape.head_dim,
                    .page_size = shape.page_size,
                    .q_len = mode.ragged ? 0 : shape.q_len,
                    .decode_draft_extend = mode.decode_draft_extend};
    for (const int32_t bucket : shape.buckets) config.buckets.push_back(wrapper->Of(bucket));
    config.layout = shape.layout;
    config.scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
    config.scheduler = mode.scheduler;
    PRISTINE_ASSIGN_OR_RETURN(wrapper->attention_,
                              StepAttention::Create(*wrapper->manager_, *wrapper->metadata_, config));
    PRISTINE_RETURN_IF_ERROR(wrapper->manager_->Seal());
    return wrapper;
  }

  absl::Status Prepare(Stream& stream, int32_t bucket, const StepValues& step) override {
    const int32_t real = static_cast<int32_t>(step.lengths.size());
    ++steps_;
    std::vector<int32_t> lengths, kv_indptr = {0}, kv_indices, qo_indptr = {0};
    for (int32_t r = 0; r < real; ++r) {
      const int32_t first = parts_ == 2 ? (steps_ + r) % (shape_.q_len + 1) : 0;
      for (const int32_t queries : {first, shape_.q_len - first}) {
        if (parts_ == 1 && queries == 0) continue;
        // The first queries see what the others' tokens come behind.
        const int32_t behind = parts_ == 2 && static_cast<int32_t>(lengths.size()) % 2 == 0 ? shape_.q_len - first : 0;
        lengths.push_back(std::max(0, step.lengths[r] - behind));
        const int32_t pages = (lengths.back() + shape_.page_size - 1) / shape_.page_size;
        const auto begin = step.kv_indices.begin() + step.kv_indptr[r];
        kv_indices.insert(kv_indices.end(), begin, begin + pages);
        kv_indptr.push_back(static_cast<int32_t>(kv_indices.size()));
        qo_indptr.push_back(qo_indptr.back() + queries);
      }
    }
    StepValues values = {.lengths = lengths,
                         .kv_indptr = kv_indptr,
                         .kv_indices = kv_indices,
                         .slots = step.slots,
                         .positions = step.positions,
                         .qo_indptr = qo_indptr};
    std::vector<int32_t> table(lengths.size() * table_width_, 2147480000);  // where no request has a page
    if (mode_.block_table) {
      for (size_t r = 0; r < lengths.size(); ++r) {
        std::copy(kv_indices.begin() + kv_indptr[r], kv_indices.begin() + kv_indptr[r + 1],
                  table.begin() + r * table_width_);
      }
      values.kv_indptr = {}, values.kv_indices = {}, values.block_table = table;
    }
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(Of(bucket), Of(real)));
    PRISTINE_RETURN_IF_ERROR(metadata_->Refill(values));
    PRISTINE_RETURN_IF_ERROR(attention_->Plan(Of(bucket), values));
    return manager_->BeforeReplay(stream, Of(bucket), Of(real));
  }

  absl::Status Run(Stream& stream, int32_t bucket, const AttentionTensors& t) override {
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream, Of(bucket)));
    if (shape_.appends) {
      PRISTINE_RETURN_IF_ERROR(attention::AppendKv(stream, Of(bucket).tokens,
                                                   {.dtype = shape_.dtype,
                                                    .kv_dtype = shape_.stored_dtype(),
                                                    .layout = shape_.layout,
                                                    .page_size = shape_.page_size,
                                                    .kv_heads = shape_.kv_heads,
                                                    .head_dim = shape_.head_dim,
                                                    .k_new = t.k_new,
                                                    .v_new = t.v_new,
                                                    .slots = metadata_->slots().live,
                                                    .k = t.k,
                                                    .v = t.v}));
    }
    return attention_->Run(stream, Of(bucket),
                           {.q = t.q,
                            .k = t.k,
                            .v = t.v,
                            .out = t.out,
                            .lse = {reinterpret_cast<attention::LseBase2*>(t.lse.address()), t.lse.size()}});
  }

  std::vector<BoundArray> BoundArrays() override {
    std::vector<BoundArray> arrays = {{Kind::kLength, metadata_->lengths().live, shape_.max_length},
                                      {Kind::kSlot, metadata_->slots().live, shape_.num_pages() * shape_.page_size},
                                      {Kind::kPosition, metadata_->positions().live, shape_.max_length},
                                      {Kind::kIndptr, metadata_->qo_indptr().live, shape_.max_tokens()}};
    if (mode_.block_table) {
      arrays.push_back({Kind::kPageTable, metadata_->block_table().live, shape_.num_pages()});
    } else {
      arrays.push_back({Kind::kIndptr, metadata_->kv_indptr().live, parts_ * shape_.max_step_pages()});
      arrays.push_back({Kind::kPageTable, metadata_->kv_indices().live, shape_.num_pages()});
    }
    return arrays;
  }
  BufferManager& manager() { return *manager_; }
  KernelFamily family() const { return attention_->family(); }

 private:
  StepAttentionWrapper(const AttentionShape& shape, const Mode& mode)
      : shape_(shape),
        mode_(mode),
        parts_(mode.ragged ? 2 : 1),
        table_width_(mode.block_table ? (shape.max_length - 1) / shape.page_size + 2 : 0) {}
  // Of `requests` of the kit.
  Extent Of(int32_t requests) const { return {parts_ * requests, requests * shape_.q_len}; }

  const AttentionShape shape_;
  const Mode mode_;
  const int32_t parts_;        // of a request of the kit
  const int32_t table_width_;  // a page more than a request can have; 0: kv_indptr and kv_indices
  int32_t steps_ = 0;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
  std::unique_ptr<StepAttention> attention_;
};

template <class BackendT>
class StepAttentionConformanceTest : public DeviceTest<BackendT> {
 protected:
  void ExpectConforms(const AttentionShape& shape, const Mode& mode, KernelFamily family) {
    ASSERT_OK_AND_ASSIGN(const auto wrapper, StepAttentionWrapper::Create(*this->device_, shape, mode));
    EXPECT_EQ(wrapper->family(), family);
    EXPECT_TRUE(Conforms(*this->stream_, *wrapper, shape));
    ASSERT_OK_AND_ASSIGN(const std::vector<Violation> violations, wrapper->manager().Verify(*this->stream_));
    EXPECT_EQ(violations.size(), 0u) << violations[0].ToString();
    EXPECT_EQ(wrapper->manager().stats().neutralised, 0);
  }
};
TYPED_TEST_SUITE(StepAttentionConformanceTest, AllBackends, BackendNames);

TYPED_TEST(StepAttentionConformanceTest, DecodeConforms) {
  const AttentionShape shape = {.dtype = DType::kFloat16, .buckets = {1, 4}, .appends = true};
  this->ExpectConforms(shape, {}, KernelFamily::kDecode);
  this->ExpectConforms(shape, {.block_table = true}, KernelFamily::kDecode);
}

// Keys and values that are quantized as they are appended, for every mode; and pages in HND.
TYPED_TEST(StepAttentionConformanceTest, Float8KvInEitherLayoutConforms) {
  AttentionShape shape = {.dtype = DType::kBFloat16,
                          .kv_dtype = DType::kFloat8E4M3,
                          .page_size = 16,
                          .layout = attention::KvLayout::kHND,
                          .buckets = {1, 3},
                          .appends = true};
  this->ExpectConforms(shape, {}, KernelFamily::kDecode);
  shape.q_len = 3;
  this->ExpectConforms(shape, {.mode = ForwardMode::kTargetVerify}, KernelFamily::kDecode);
  this->ExpectConforms(shape, {.mode = ForwardMode::kDraftExtend, .ragged = true}, KernelFamily::kContext);
  shape.dtype = DType::kFloat16;
  shape.layout = attention::KvLayout::kNHD;
  this->ExpectConforms(shape, {.mode = ForwardMode::kTargetVerify, .block_table = true}, KernelFamily::kDecode);
  this->ExpectConforms(shape, {.mode = ForwardMode::kExtend, .ragged = true}, KernelFamily::kContext);
  shape.kv_dtype = std::nullopt;
  shape.layout = attention::KvLayout::kHND;
  this->ExpectConforms(shape, {.mode = ForwardMode::kTargetVerify}, KernelFamily::kDecode);
  this->ExpectConforms(shape, {.mode = ForwardMode::kExtend, .ragged = true}, KernelFamily::kContext);
}

TYPED_TEST(StepAttentionConformanceTest, TargetVerifyConforms) {
  const AttentionShape shape = {.dtype = DType::kFloat16, .q_len = 4, .page_size = 3, .buckets = {1, 3}};
  for (const DecodeScheduler scheduler : {DecodeScheduler::kDevice, DecodeScheduler::kHost}) {
    this->ExpectConforms(shape, {.mode = ForwardMode::kTargetVerify, .scheduler = scheduler}, KernelFamily::kDecode);
  }
}

TYPED_TEST(StepAttentionConformanceTest, RaggedExtendConforms) {
  const AttentionShape shape = {
      .dtype = DType::kBFloat16, .head_dim = 128, .q_len = 9, .page_size = 16, .buckets = {2, 4}, .appends = true};
  this->ExpectConforms(shape, {.mode = ForwardMode::kExtend, .ragged = true}, KernelFamily::kContext);
}

// A decode's one query and a prompt's several side by side are a ragged step as well.
TYPED_TEST(StepAttentionConformanceTest, MixedConforms) {
  const AttentionShape shape = {.q_len = 2, .buckets = {1, 3}, .appends = true};
  this->ExpectConforms(shape, {.mode = ForwardMode::kMixed, .ragged = true, .block_table = true},
                       KernelFamily::kContext);
}

TYPED_TEST(StepAttentionConformanceTest, DraftExtendConforms) {
  const AttentionShape shape = {
      .dtype = DType::kFloat16, .q_len = 5, .page_size = 3, .buckets = {1, 3}, .appends = true};
  const Mode ragged = {.mode = ForwardMode::kDraftExtend, .ragged = true};
  this->ExpectConforms(shape, ragged, KernelFamily::kContext);
  const Mode fixed = {.mode = ForwardMode::kDraftExtend};
  this->ExpectConforms(shape, fixed, KernelFamily::kContext);
  const Mode decode = {.mode = ForwardMode::kDraftExtend, .decode_draft_extend = true};
  this->ExpectConforms(shape, decode, KernelFamily::kDecode);
}

}  // namespace
}  // namespace pristine::testing
