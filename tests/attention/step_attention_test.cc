// Which kernels a captured graph has for each forward mode, and what StepAttention refuses.
#include "pristine/attention/step_attention.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "pristine/graph_runtime/graph.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DType;
using attention::ForwardMode;
using attention::KernelFamily;
using attention::LseBase2;
using attention::StepAttention;
using attention::StepAttentionConfig;
using attention::StepMetadata;
using attention::StepMetadataConfig;
using attention::StepValues;

constexpr int32_t kRequests = 4, kMaxQLen = 5, kPageSize = 4, kPages = 64, kHeads = 4, kKvHeads = 2, kHeadDim = 64;

template <class BackendT>
class StepAttentionTest : public DeviceTest<BackendT> {
 protected:
  void SetUp() override {
    DeviceTest<BackendT>::SetUp();
    if (this->device_ == nullptr) return;
    absl::StatusOr<std::unique_ptr<BufferManager>> manager = BufferManager::Create(*this->device_);
    ASSERT_OK(manager);
    manager_ = *std::move(manager);
    metadata_ = Metadata("step", true);
  }
  void TearDown() override {
    metadata_.reset();
    manager_.reset();
    DeviceTest<BackendT>::TearDown();
  }
  std::unique_ptr<StepMetadata> Metadata(const std::string& name, bool ragged) {
    StepMetadataConfig config;
    config.name = name;
    config.max_requests = kRequests;
    config.max_tokens = kRequests * kMaxQLen;
    config.page_size = kPageSize;
    config.num_pages = kPages;
    config.max_step_pages = kPages;
    config.max_length = 48;
    config.ragged = ragged;
    absl::StatusOr<std::unique_ptr<StepMetadata>> metadata = StepMetadata::Create(*manager_, config);
    EXPECT_OK(metadata);
    return metadata.ok() ? *std::move(metadata) : nullptr;
  }
  // q_len 0: ragged, in a bucket with room for kMaxQLen each.
  StepAttentionConfig Config(ForwardMode mode, int32_t q_len, bool decode_draft_extend = false) {
    StepAttentionConfig config;
    config.name = ToString(mode);
    config.mode = mode;
    config.route = {.dtype = DType::kBFloat16,
                    .kv_dtype = DType::kBFloat16,
                    .q_heads = kHeads,
                    .kv_heads = kKvHeads,
                    .head_dim = kHeadDim,
                    .page_size = kPageSize,
                    .q_len = q_len,
                    .decode_draft_extend = decode_draft_extend};
    config.buckets = {{kRequests, kRequests * (q_len == 0 ? kMaxQLen : q_len)}};
    config.scale = 0.125f;
    return config;
  }
  // The names of the nodes that one layer adds to a graph.
  std::vector<std::string> CapturedNodes(const StepAttentionConfig& config) {
    std::vector<std::string> names;
    absl::StatusOr<std::unique_ptr<StepAttention>> attention = StepAttention::Create(*manager_, *metadata_, config);
    EXPECT_OK(attention);
    if (!attention.ok()) return names;
    const size_t token_bytes = kHeadDim * sizeof(uint16_t);
    const size_t q_bytes = kRequests * kMaxQLen * kHeads * token_bytes;
    const size_t kv_bytes = kPages * kPageSize * kKvHeads * token_bytes;
    absl::StatusOr<DeviceBuffer> q = this->device_->Allocate(q_bytes, "q");
    absl::StatusOr<DeviceBuffer> out = this->device_->Allocate(q_bytes, "out");
    absl::StatusOr<DeviceBuffer> kv = this->device_->Allocate(kv_bytes, "kv");
    EXPECT_TRUE(q.ok() && out.ok() && kv.ok());
    absl::StatusOr<std::unique_ptr<Graph>> graph = Capture(*this->stream_, [&](Stream& stream) {
      return (*attention)
          ->Run(stream, config.buckets.front(),
                {.q = q->template As<const std::byte>(),
                 .k = kv->template As<const std::byte>(),
                 .v = kv->template As<const std::byte>(),
                 .out = out->template As<std::byte>()});
    });
    EXPECT_OK(graph);
    if (!graph.ok()) return names;
    for (const GraphNode& node : (*graph)->nodes()) {
      EXPECT_EQ(node.kind, GraphNode::Kind::kKernel);
      names.push_back(node.name);
    }
    return names;
  }
  void ExpectKernels(const StepAttentionConfig& config, const std::string& first, size_t count) {
    SCOPED_TRACE(config.name);
    const std::vector<std::string> names = CapturedNodes(config);
    ASSERT_EQ(names.size(), count);
    EXPECT_EQ(names.front().substr(0, first.size()), first);
  }
  absl::Status Create(const StepAttentionConfig& config) {
    return StepAttention::Create(*manager_, *metadata_, config).status();
  }

  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
};
TYPED_TEST_SUITE(StepAttentionTest, AllBackends, BackendNames);

TYPED_TEST(StepAttentionTest, TheGraphOfEachModeHasTheKernelsOfItsRoute) {
  const std::string decode = "paged_decode_bfloat16", verify = "target_verify_bfloat16";
  const std::string context = "paged_prefill_bfloat16";
  this->ExpectKernels(this->Config(ForwardMode::kDecode, 1), decode, 1);
  this->ExpectKernels(this->Config(ForwardMode::kTargetVerify, 4), verify, 1);
  this->ExpectKernels(this->Config(ForwardMode::kExtend, 0), context, 1);
  this->ExpectKernels(this->Config(ForwardMode::kMixed, 0), context, 1);
  this->ExpectKernels(this->Config(ForwardMode::kDraftExtend, 0), context, 1);
  StepAttentionConfig fixed = this->Config(ForwardMode::kDraftExtend, 5);
  this->ExpectKernels(fixed, context, 1);
  fixed.name = "fixed";
  fixed.route.decode_draft_extend = true;
  this->ExpectKernels(fixed, verify, 1);
}

TYPED_TEST(StepAttentionTest, PlannedOnTheHostDecodeIsFollowedByItsMerge) {
  StepAttentionConfig config = this->Config(ForwardMode::kTargetVerify, 4);
  config.scheduler = attention::DecodeScheduler::kHost;
  const std::vector<std::string> names = this->CapturedNodes(config);
  ASSERT_EQ(names.size(), 2u);
  EXPECT_EQ(names[0].rfind("target_verify_bfloat16", 0), 0u) << names[0];
  EXPECT_EQ(names[1].rfind("merge_states", 0), 0u) << names[1];
}

TYPED_TEST(StepAttentionTest, AnIdleStepLaunchesNothingAndIsOk) {
  EXPECT_TRUE(this->CapturedNodes(this->Config(ForwardMode::kIdle, 0)).empty());
  StepAttentionConfig config;  // whatever it is asked with
  config.mode = ForwardMode::kIdle;
  absl::StatusOr<std::unique_ptr<StepAttention>> idle =
      StepAttention::Create(*this->manager_, *this->metadata_, config);
  ASSERT_OK(idle);
  EXPECT_EQ((*idle)->family(), KernelFamily::kNone);
  EXPECT_OK((*idle)->Plan({1, 1}, {}));
  EXPECT_OK((*idle)->Run(*this->stream_, {1, 1}, {}));
}

TYPED_TEST(StepAttentionTest, ARaggedStepIsRefusedToAGraphOfOneQLen) {
  const StepAttentionConfig config = this->Config(ForwardMode::kTargetVerify, 4);
  absl::StatusOr<std::unique_ptr<StepAttention>> verify =
      StepAttention::Create(*this->manager_, *this->metadata_, config);
  ASSERT_OK(verify);
  ASSERT_OK(this->manager_->Seal());
  const Extent bucket = config.buckets.front();
  const auto plan = [&](const std::vector<int32_t>& q_lens) {
    std::vector<int32_t> lengths, kv_indptr = {0}, kv_indices, qo_indptr = {0};
    for (const int32_t q_len : q_lens) {
      lengths.push_back(q_len + 3);
      kv_indices.insert(kv_indices.end(), (q_len + 2) / kPageSize + 1, 1);
      kv_indptr.push_back(static_cast<int32_t>(kv_indices.size()));
      qo_indptr.push_back(qo_indptr.back() + q_len);
    }
    const std::vector<int32_t> tokens(qo_indptr.back(), 0);
    const StepValues values = {.lengths = lengths,
                               .kv_indptr = kv_indptr,
                               .kv_indices = kv_indices,
                               .slots = tokens,
                               .positions = tokens,
                               .qo_indptr = qo_indptr};
    const Extent extent = {static_cast<int32_t>(q_lens.size()), qo_indptr.back()};
    absl::Status status = this->manager_->BeginStep(bucket, extent);
    if (status.ok()) status = this->metadata_->Refill(values);
    return status.ok() ? (*verify)->Plan(bucket, values) : status;
  };
  EXPECT_OK(plan({4, 4, 4}));
  EXPECT_STATUS(plan({4, 2, 4}), kInvalidArgument,
                "target_verify: request 1 has 2 query tokens; the decode kernels of a target_verify graph run 4");
  EXPECT_STATUS(plan({4, 4, 0}), kInvalidArgument, "request 2 has 0 query tokens");
  EXPECT_STATUS(plan({3, 5}), kInvalidArgument, "sglang PR #24856");
  EXPECT_OK(plan({4, 4, 4, 4}));
}

TYPED_TEST(StepAttentionTest, WhatDoesNotFitTogetherIsRefusedAndLeavesNothingRegistered) {
  const int registered = this->manager_->registered();
  StepAttentionConfig config = this->Config(ForwardMode::kTargetVerify, 4);
  config.buckets = {{4, 15}};
  EXPECT_STATUS(this->Create(config), kInvalidArgument, "must have q_len = 4 tokens for each request");
  config = this->Config(ForwardMode::kDecode, 1);
  config.route.page_size = 2;
  EXPECT_STATUS(this->Create(config), kInvalidArgument, "page_size is 2, must be that of step, 4");
  config = this->Config(ForwardMode::kDraftExtend, 0, true);
  EXPECT_STATUS(this->Create(config), kInvalidArgument, "route of draft_extend: q_len is 0 (requests differ)");
  config = this->Config(ForwardMode::kDecode, 1);
  config.route.head_dim = 80;
  EXPECT_STATUS(this->Create(config), kUnimplemented, "with head_dim 80");
  config = this->Config(ForwardMode::kDecode, 1);
  config.scale = -1;
  EXPECT_STATUS(this->Create(config), kInvalidArgument, "scale");
  EXPECT_EQ(this->manager_->registered(), registered);
  const std::unique_ptr<StepMetadata> uniform = this->Metadata("uniform", false);
  EXPECT_STATUS(StepAttention::Create(*this->manager_, *uniform, this->Config(ForwardMode::kExtend, 0)),
                kInvalidArgument, "extend needs qo_indptr, and uniform has none");
}

}  // namespace
}  // namespace pristine::testing
