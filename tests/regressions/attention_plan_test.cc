// Bugs that split planners and their workspaces had in engines and in their attention libraries.
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "pristine/attention/decode_plan.h"
#include "pristine/attention/paged_decode.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DecodePlan;
using attention::DecodePlanConfig;
using attention::DecodeScheduler;
using attention::DType;
using attention::PagedDecode;
using attention::StepMetadata;
using attention::WorkItem;
using Bytes = std::vector<std::byte>;
using Ints = std::vector<int32_t>;

// The two that have a workspace: the plan of the host's planner, with items and partial results; and the stream-K
// kernel's partial results and counters, which the 16-bit kernels take (float32 gives each row a block and needs none).
struct Planner {
  DecodeScheduler scheduler;
  DType dtype;
};
constexpr Planner kPlanners[] = {{DecodeScheduler::kHost, DType::kFloat32},
                                 {DecodeScheduler::kDevice, DType::kBFloat16}};
const char* Name(const Planner& planner) { return planner.scheduler == DecodeScheduler::kHost ? "host" : "device"; }

template <class BackendT>
class AttentionPlanRegression : public DeviceTest<BackendT> {
 protected:
  void TearDown() override {
    rig_.reset();
    DeviceTest<BackendT>::TearDown();
  }
  std::unique_ptr<DecodeRig> rig_;
};
TYPED_TEST_SUITE(AttentionPlanRegression, AllBackends, BackendNames);

// FlashInfer's split planner counts a request without pages as no work when it looks for the chunk, and as one item
// when it writes them: 60 requests, six of 1000 pages and the others empty, made 120 items where there was room for 66.
TEST(AttentionPlanRegression, FlashInferPlannerRequestsWithoutPagesFitThePlan) {
  DecodePlanConfig config;
  const Extent bucket = {60, 60};
  config.buckets = {bucket};
  config.q_heads = 32;
  config.kv_heads = 8;
  config.head_dim = 128;
  config.page_size = 16;
  config.max_row_tokens = 1 << 20;
  Ints lengths(60, 0);
  for (size_t r = 0; r < 60; r += 10) lengths[r] = 16000;
  for (const int multiprocessors : {1, 33, 132, 264}) {
    const size_t places = MaxItems(config, bucket, multiprocessors);
    constexpr WorkItem kGuard = {-7, -7, -7};
    std::vector<WorkItem> items(places + 64, kGuard);
    Ints indptr(61 + 64, -7);
    ASSERT_OK_AND_ASSIGN(const int32_t count,
                         PlanItems(config, bucket, multiprocessors, lengths, absl::MakeSpan(items).first(places),
                                   absl::MakeSpan(indptr).first(61)));
    ASSERT_LE(count, static_cast<int32_t>(places));
    for (size_t i = count; i < items.size(); ++i) ASSERT_EQ(items[i].row, kGuard.row) << i;
    for (size_t i = 61; i < indptr.size(); ++i) ASSERT_EQ(indptr[i], -7) << i;
    ASSERT_EQ(indptr[60], count);
    for (int32_t row = 0; row < 60; ++row) {
      int32_t at = 0;
      for (int32_t i = indptr[row]; i < indptr[row + 1]; ++i) {
        ASSERT_EQ(items[i].row, row);
        ASSERT_EQ(items[i].begin, at);
        at = items[i].end;
      }
      ASSERT_EQ(at, lengths[row]);
    }
  }
}

TYPED_TEST(AttentionPlanRegression, FlashInferPlannerRequestsWithoutPagesAmongSplitOnesAreZerosAndMinusInfinity) {
  for (const Planner& planner : kPlanners) {
    const DecodeShape shape = {.dtype = planner.dtype, .page_size = 16, .seed = 811};
    const DecodeCase step(shape, {900, 0, 0, 0, 0, 1, 0, 0, 0, 777, 0, 0}, Ints(12, -1));
    this->rig_.reset();
    ASSERT_OK_AND_ASSIGN(
        this->rig_,
        DecodeRig::Create(*this->device_, *this->stream_, shape,
                          {.buckets = {12}, .max_length = 1000, .num_pages = 128, .scheduler = planner.scheduler}));
    ASSERT_OK(this->rig_->Capture());
    ASSERT_OK(this->rig_->Load(step));
    ASSERT_OK(this->rig_->Begin(12, step, 12));
    ASSERT_OK(this->rig_->Replay(12, 12));
    EXPECT_EQ(this->rig_->Check(12, step, 12), "") << Name(planner);
  }
}

// FlashInfer #411, TensorRT-LLM #15556: a replay ran work items of another plan, or of rows beyond its padded batch.
TYPED_TEST(AttentionPlanRegression, FlashInfer411ItemsBeyondThePaddedBatchNeverRun) {
  for (const Planner& planner : kPlanners) {
    const DecodeShape shape = {.dtype = planner.dtype, .page_size = 4, .seed = 812};
    const DecodeCase large(shape, {500, 480, 1, 333, 257, 512, 64, 130}, Ints(8, -1));
    const DecodeCase small(shape, {3, 200}, Ints(2, -1));
    this->rig_.reset();
    ASSERT_OK_AND_ASSIGN(
        this->rig_,
        DecodeRig::Create(*this->device_, *this->stream_, shape,
                          {.buckets = {2, 8}, .max_length = 512, .num_pages = 1024, .scheduler = planner.scheduler}));
    DecodeRig& rig = *this->rig_;
    ASSERT_OK(rig.Capture());
    const auto replay = [&](const DecodeCase& step, int32_t bucket, int32_t requests) {
      ASSERT_OK(rig.Load(step));
      ASSERT_OK(rig.Begin(bucket, step, requests));
      ASSERT_OK(rig.Replay(bucket, requests));
      EXPECT_EQ(rig.Check(bucket, step, requests), "") << Name(planner);
      const size_t written = rig.raw_out.size() / 8 * bucket;
      for (size_t i = written; i < rig.raw_out.size(); ++i) ASSERT_EQ(rig.raw_out[i], std::byte{0xff}) << i;
    };
    replay(large, 8, 8);
    replay(small, 2, 2);
    replay(small, 2, 1);
    replay(small, 8, 2);
    replay(large, 8, 8);
  }
}

// TensorRT-LLM #18436, FlashInfer #3929: two kinds of plan, full and sliding window, wrote the same workspace. Accuracy
// fell from 50.8 to 44.7 %.
TYPED_TEST(AttentionPlanRegression, TensorRtLlm18436TwoPlanKindsKeepTheirOwnWorkspaces) {
  for (const Planner& planner : kPlanners) {
    constexpr int32_t kMaxLength = 700, kRows = 3;
    constexpr Extent kBucket = {kRows, kRows};
    const DecodeShape full_shape = {.dtype = planner.dtype, .page_size = 4, .seed = 813};
    DecodeShape windowed_shape = full_shape;
    windowed_shape.window = 100;
    const Ints lengths[] = {{700, 5, 333}, {1, 699, 128}, {64, 64, 650}};

    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<BufferManager> manager, BufferManager::Create(*this->device_));
    ASSERT_OK_AND_ASSIGN(
        const auto metadata,
        StepMetadata::Create(*manager, {.max_requests = kRows,
                                        .max_tokens = kRows,
                                        .page_size = full_shape.page_size,
                                        .num_pages = 600,
                                        .max_step_pages = kRows * ((kMaxLength - 1) / full_shape.page_size + 1),
                                        .max_length = kMaxLength}));
    DecodePlanConfig config = {.name = "full",
                               .buckets = {kBucket},
                               .q_heads = full_shape.q_heads,
                               .kv_heads = full_shape.kv_heads,
                               .head_dim = full_shape.head_dim,
                               .dtype = full_shape.dtype,
                               .page_size = full_shape.page_size,
                               .max_row_tokens = kMaxLength,
                               .derived_from = {metadata->lengths().id},
                               .scheduler = planner.scheduler};
    ASSERT_OK_AND_ASSIGN(const auto full_plan, DecodePlan::Create(*manager, config));
    config.name = "windowed";
    config.window = windowed_shape.window;
    ASSERT_OK_AND_ASSIGN(const auto windowed_plan, DecodePlan::Create(*manager, config));
    const float scale = 1 / std::sqrt(static_cast<float>(full_shape.head_dim));
    ASSERT_OK_AND_ASSIGN(const auto full, PagedDecode::Create(*full_plan, scale));
    ASSERT_OK_AND_ASSIGN(const auto windowed, PagedDecode::Create(*windowed_plan, scale));

    const size_t element = attention::SizeOf(planner.dtype);
    const size_t row = element * full_shape.q_heads * full_shape.head_dim;
    const size_t pool = size_t{600} * element * full_shape.page_size * full_shape.kv_heads * full_shape.head_dim;
    std::vector<DeviceBuffer> memory;
    for (const size_t size : {kRows * row, pool, pool, kRows * row, kRows * row}) {
      ASSERT_OK_AND_ASSIGN(DeviceBuffer buffer, this->device_->Allocate(size, "tensor"));
      memory.push_back(std::move(buffer));
    }
    const auto tensors = [&](size_t out) -> attention::DecodeTensors {
      return {.q = memory[0].As<const std::byte>(),
              .k = memory[1].As<const std::byte>(),
              .v = memory[2].As<const std::byte>(),
              .out = memory[out].As<std::byte>(),
              .kv_indptr = metadata->kv_indptr().live,
              .kv_indices = metadata->kv_indices().live,
              .lengths = metadata->lengths().live};
    };
    ASSERT_OK_AND_ASSIGN(
        const auto runner,
        GraphRunner::Create({.buckets = {kBucket}}, [&](Stream& queue, const Extent& bucket) -> absl::Status {
          // As layers of a model alternate.
          PRISTINE_RETURN_IF_ERROR(full->Run(queue, bucket, tensors(3)));
          PRISTINE_RETURN_IF_ERROR(windowed->Run(queue, bucket, tensors(4)));
          return full->Run(queue, bucket, tensors(3));
        }));
    ASSERT_OK(runner->AddHook(*manager));
    ASSERT_OK(manager->Seal());
    ASSERT_OK(runner->CaptureAll(*this->stream_));

    for (const Ints& some : lengths) {
      const DecodeCase steps[] = {DecodeCase(full_shape, some, Ints(kRows, -1)),
                                  DecodeCase(windowed_shape, some, Ints(kRows, -1))};
      ASSERT_OK(Upload(*this->stream_, memory[0].As<std::byte>(), steps[0].Q()));
      ASSERT_OK(Upload(*this->stream_, memory[1].As<std::byte>(), steps[0].Pool(false)));
      ASSERT_OK(Upload(*this->stream_, memory[2].As<std::byte>(), steps[0].Pool(true)));
      const Ints slots(kRows, -1), positions(kRows, 0);
      ASSERT_OK(manager->BeginStep(kBucket, kBucket));
      ASSERT_OK(metadata->Refill({.lengths = some,
                                  .kv_indptr = steps[0].indptr(),
                                  .kv_indices = steps[0].indices(),
                                  .slots = slots,
                                  .positions = positions}));
      ASSERT_OK(full_plan->Plan(kBucket, some));
      ASSERT_OK(windowed_plan->Plan(kBucket, some));
      ASSERT_OK(runner->Replay(*this->stream_, kBucket, kBucket));
      for (int kind = 0; kind < 2; ++kind) {
        ASSERT_OK_AND_ASSIGN(const Bytes bytes,
                             Download(*this->stream_, memory[3 + kind].template As<const std::byte>()));
        const std::vector<float> out = ToFloats(bytes, planner.dtype);
        for (int32_t r = 0; r < kRows; ++r) {
          for (int32_t h = 0; h < full_shape.q_heads; ++h) {
            const OracleRow expected = steps[kind].Expected(r, h);
            const size_t at = (size_t{1} * r * full_shape.q_heads + h) * full_shape.head_dim;
            EXPECT_EQ(Mismatch(expected, absl::MakeConstSpan(out).subspan(at, full_shape.head_dim),
                               static_cast<float>(expected.lse), full_shape.dtype),
                      "")
                << Name(planner) << (kind == 0 ? ", full" : ", windowed") << ", row " << r << ", head " << h;
          }
        }
      }
    }
  }
}

// vLLM #52553, #52540: a workspace grew after a capture, and graphs went on using the memory that it had left.
TYPED_TEST(AttentionPlanRegression, Vllm52553NoStepGrowsAWorkspaceAfterTheCapture) {
  for (const Planner& planner : kPlanners) {
    const DecodeShape shape = {.dtype = planner.dtype, .page_size = 1, .seed = 814};
    this->rig_.reset();
    ASSERT_OK_AND_ASSIGN(
        this->rig_,
        DecodeRig::Create(*this->device_, *this->stream_, shape,
                          {.buckets = {1, 6}, .max_length = 600, .num_pages = 5000, .scheduler = planner.scheduler}));
    DecodeRig& rig = *this->rig_;
    ASSERT_OK(rig.Capture());
    const size_t before = this->device_->total_allocations();
    const Ints steps[] = {{1}, {600, 600, 600, 600, 600, 600}, {600}, {0, 599, 0, 0, 1, 0}};
    for (const Ints& lengths : steps) {
      const int32_t rows = static_cast<int32_t>(lengths.size());
      const DecodeCase step(shape, lengths, Ints(rows, -1));
      ASSERT_OK(rig.Load(step));
      ASSERT_OK(rig.Begin(rows, step, rows));
      ASSERT_OK(rig.Replay(rows, rows));
      EXPECT_EQ(rig.Check(rows, step, rows), "") << Name(planner);
    }
    EXPECT_EQ(this->device_->total_allocations(), before) << Name(planner);
  }
}

}  // namespace
}  // namespace pristine::testing
