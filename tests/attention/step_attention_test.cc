// Which kernels a captured graph has for each forward mode, what they compute, and what StepAttention refuses.
#include "pristine/attention/step_attention.h"

#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "tests/attention/prefill_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DType;
using attention::ForwardMode;
using attention::KernelFamily;
using attention::KvLayout;
using attention::LseBase2;
using attention::StepAttention;
using attention::StepAttentionConfig;
using attention::StepAttentionTensors;
using attention::StepMetadata;
using attention::StepMetadataConfig;
using attention::StepValues;

constexpr int32_t kRequests = 4, kMaxQLen = 5, kPageSize = 4, kPages = 64, kHeads = 4, kKvHeads = 2, kHeadDim = 64;
constexpr int32_t kTableWidth = 13;  // a page more than a request can have

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
  std::unique_ptr<StepMetadata> Metadata(const std::string& name, bool ragged, bool block_table = false) {
    StepMetadataConfig config;
    config.name = name;
    config.max_requests = kRequests;
    config.max_tokens = kRequests * kMaxQLen;
    config.page_size = kPageSize;
    config.num_pages = kPages;
    config.max_step_pages = block_table ? 0 : kPages;
    config.max_length = 48;
    config.ragged = ragged;
    config.block_table_width = block_table ? kTableWidth : 0;
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
  // Eagerly and replayed, over kv_indices under a window and over a block table without one, `config` over float8 KV in
  // HND with a soft cap, sinks, and scales and lengths that differ from step to step gives what the definition says.
  void ExpectAttention(const StepAttentionConfig& config, const std::vector<int32_t>& qo_lens) {
    ExpectAttention(config, qo_lens, false);
    metadata_.reset();
    ASSERT_OK_AND_ASSIGN(manager_, BufferManager::Create(*this->device_));
    metadata_ = Metadata("step", true, true);
    ExpectAttention(config, qo_lens, true);
  }
  void ExpectAttention(StepAttentionConfig config, const std::vector<int32_t>& qo_lens, bool block_table) {
    config.route.kv_dtype = DType::kFloat8E4M3;
    config.layout = KvLayout::kHND;
    config.soft_cap = 3;
    config.window = block_table ? 0 : 13;
    const Extent bucket = config.buckets.front();
    ASSERT_OK_AND_ASSIGN(const auto attention, StepAttention::Create(*manager_, *metadata_, config));
    const size_t q_bytes = size_t{1} * bucket.tokens * kHeads * kHeadDim * sizeof(uint16_t);
    ASSERT_OK_AND_ASSIGN(DeviceBuffer q, this->device_->Allocate(q_bytes, "q"));
    ASSERT_OK_AND_ASSIGN(DeviceBuffer k, this->device_->Allocate(kPages * kPageSize * kKvHeads * kHeadDim, "k"));
    ASSERT_OK_AND_ASSIGN(DeviceBuffer v, this->device_->Allocate(k.bytes(), "v"));
    ASSERT_OK_AND_ASSIGN(DeviceBuffer out, this->device_->Allocate(q_bytes, "out"));
    ASSERT_OK_AND_ASSIGN(DeviceBuffer lse, this->device_->Allocate(4 * bucket.tokens * kHeads, "lse"));
    ASSERT_OK_AND_ASSIGN(DeviceBuffer scales, this->device_->Allocate(2 * sizeof(float), "scales"));
    ASSERT_OK_AND_ASSIGN(DeviceBuffer sinks, this->device_->Allocate(kHeads * sizeof(float), "sinks"));
    const StepAttentionTensors tensors = {.q = q.As<const std::byte>(),
                                          .k = k.As<const std::byte>(),
                                          .v = v.As<const std::byte>(),
                                          .out = out.As<std::byte>(),
                                          .lse = lse.As<LseBase2>(),
                                          .k_scale = scales.As<const float>().Sub(0, 1),
                                          .v_scale = scales.As<const float>().Sub(1, 1),
                                          .sinks = sinks.As<const float>()};
    ASSERT_OK_AND_ASSIGN(const auto runner,
                         GraphRunner::Create({.buckets = config.buckets}, [&](Stream& stream, const Extent& of) {
                           return attention->Run(stream, of, tensors);
                         }));
    ASSERT_OK(runner->AddHook(*manager_));
    ASSERT_OK(manager_->Seal());
    for (const DeviceBuffer* const buffer : {&q, &k, &v, &sinks}) {
      ASSERT_OK(this->stream_->Fill(buffer->template As<std::byte>(), std::byte{0}));
    }
    ASSERT_OK(Upload(*this->stream_, scales.As<float>(), {1, 1}));
    ASSERT_OK(runner->CaptureAll(*this->stream_));

    for (const float k_scale : {0.75f, 2.0f, 0.5f}) {
      const int32_t first = k_scale > 1 ? 11 : 46;  // shrinks, and grows again
      if (k_scale == 0.5f) {
        ASSERT_OK(runner->CaptureAll(*this->stream_));  // again, over what a step left
      }
      const PrefillCase step({.dtype = config.route.dtype,
                              .kv_dtype = config.route.kv_dtype,
                              .q_heads = kHeads,
                              .kv_heads = kKvHeads,
                              .head_dim = kHeadDim,
                              .page_size = kPageSize,
                              .layout = config.layout,
                              .window = config.window,
                              .soft_cap = config.soft_cap,
                              .sinks = true,
                              .k_scale = k_scale,
                              .v_scale = 1.5f / k_scale,
                              .seed = 7},
                             qo_lens, {first, qo_lens[1], 21});
      const std::vector<int32_t> tokens(step.tokens(), 0);
      StepValues values = {.lengths = step.lengths(),
                           .kv_indptr = step.indptr(),
                           .kv_indices = step.indices(),
                           .slots = tokens,
                           .positions = tokens,
                           .qo_indptr = step.qo_indptr()};
      const std::vector<int32_t> table = step.BlockTable(step.requests(), kTableWidth);
      if (block_table) values.kv_indptr = {}, values.kv_indices = {}, values.block_table = table;
      const Extent extent = {step.requests(), step.tokens()};
      for (const DeviceBuffer* const buffer : {&q, &k, &v}) {
        ASSERT_OK(this->stream_->Fill(buffer->template As<std::byte>(), std::byte{0xff}));
      }
      ASSERT_OK(Upload(*this->stream_, q.As<std::byte>(), step.Q()));
      ASSERT_OK(Upload(*this->stream_, k.As<std::byte>(), step.Pool(false)));
      ASSERT_OK(Upload(*this->stream_, v.As<std::byte>(), step.Pool(true)));
      ASSERT_OK(Upload(*this->stream_, scales.As<float>(), {step.shape().k_scale, step.shape().v_scale}));
      ASSERT_OK(Upload(*this->stream_, sinks.As<float>(), step.sinks()));
      for (const bool replay : {false, true}) {
        SCOPED_TRACE(
            absl::StrCat(replay ? "replay" : "eager", block_table ? ", block table" : "", ", k_scale ", k_scale));
        ASSERT_OK(this->stream_->Fill(out.As<std::byte>(), std::byte{0xff}));
        ASSERT_OK(this->stream_->Fill(lse.As<std::byte>(), std::byte{0xff}));
        ASSERT_OK(manager_->BeginStep(bucket, extent));
        ASSERT_OK(metadata_->Refill(values));
        ASSERT_OK(attention->Plan(bucket, values));
        if (replay) {
          ASSERT_OK(runner->Replay(*this->stream_, bucket, extent));
        } else {
          ASSERT_OK(manager_->BeforeReplay(*this->stream_, bucket, extent));
          ASSERT_OK(manager_->RecordPrologue(*this->stream_, bucket));
          ASSERT_OK(attention->Run(*this->stream_, bucket, tensors));
        }
        ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> out_bytes,
                             Download(*this->stream_, out.As<const std::byte>()));
        ASSERT_OK_AND_ASSIGN(const std::vector<float> lses, Download(*this->stream_, lse.As<const float>()));
        const std::vector<float> outs = ToFloats(out_bytes, config.route.dtype);
        for (int32_t place = 0; place < bucket.tokens * kHeads; ++place) {
          OracleRow expected = {.out = std::vector<double>(kHeadDim, 0.0),
                                .lse = -std::numeric_limits<double>::infinity()};
          if (place < step.tokens() * kHeads) expected = step.Expected(place / kHeads, place % kHeads);
          ASSERT_EQ(Difference(expected, &outs[place * kHeadDim], lses[place], step.Tolerance()), "")
              << "token " << place / kHeads << ", head " << place % kHeads;
        }
      }
    }
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

TYPED_TEST(StepAttentionTest, DecodeHasEveryOptionOfItsKernels) {
  this->ExpectAttention(this->Config(ForwardMode::kDecode, 1), {1, 1, 1});
}

TYPED_TEST(StepAttentionTest, TargetVerifyHasEveryOptionOfItsKernels) {
  this->ExpectAttention(this->Config(ForwardMode::kTargetVerify, 4), {4, 4, 4});
}

TYPED_TEST(StepAttentionTest, TargetVerifyPlannedOnTheHostHasEveryOptionOfItsKernels) {
  StepAttentionConfig config = this->Config(ForwardMode::kTargetVerify, 4);
  config.scheduler = attention::DecodeScheduler::kHost;
  this->ExpectAttention(config, {4, 4, 4});
}

TYPED_TEST(StepAttentionTest, ExtendHasEveryOptionOfItsKernels) {
  this->ExpectAttention(this->Config(ForwardMode::kExtend, 0), {5, 9, 3});
}

TYPED_TEST(StepAttentionTest, DraftExtendHasEveryOptionOfItsKernels) {
  this->ExpectAttention(this->Config(ForwardMode::kDraftExtend, 0), {2, 4, 1});
}

TYPED_TEST(StepAttentionTest, AFixedDraftExtendHasEveryOptionOfTheDecodeKernels) {
  this->ExpectAttention(this->Config(ForwardMode::kDraftExtend, 5, true), {5, 5, 5});
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

// The context kernels would run such a step; the engine has said that there is none.
TYPED_TEST(StepAttentionTest, ARaggedStepIsRefusedToAContextGraphOfOneQLenForAnotherReason) {
  const StepAttentionConfig config = this->Config(ForwardMode::kDraftExtend, 5);
  absl::StatusOr<std::unique_ptr<StepAttention>> extend =
      StepAttention::Create(*this->manager_, *this->metadata_, config);
  ASSERT_OK(extend);
  ASSERT_EQ((*extend)->family(), KernelFamily::kContext);
  const std::vector<int32_t> lengths = {9, 9}, qo_indptr = {0, 5, 8}, slots(8, 0);
  EXPECT_STATUS((*extend)->Plan(config.buckets.front(), {.lengths = lengths,
                                                         .kv_indptr = {},
                                                         .kv_indices = {},
                                                         .slots = slots,
                                                         .positions = {},
                                                         .qo_indptr = qo_indptr}),
                kInvalidArgument,
                "request 1 has 3 query tokens; route.q_len says that a draft_extend graph has 5 for every request; "
                "instead: a graph of a mode whose requests may differ");
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
  for (const ForwardMode mode : {ForwardMode::kDecode, ForwardMode::kExtend}) {
    config = this->Config(mode, 1);
    config.soft_cap = -1;
    EXPECT_STATUS(this->Create(config), kInvalidArgument, "soft_cap is -1");
  }
  EXPECT_EQ(this->manager_->registered(), registered);
  const std::unique_ptr<StepMetadata> uniform = this->Metadata("uniform", false);
  EXPECT_STATUS(StepAttention::Create(*this->manager_, *uniform, this->Config(ForwardMode::kExtend, 0)),
                kInvalidArgument, "extend needs qo_indptr, and uniform has none");
}

}  // namespace
}  // namespace pristine::testing
