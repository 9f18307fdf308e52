// Bugs of stale plans and stale metadata that engines had, made the way they were made there: docs/culprits.md, 13 to
// 22.
#include "pristine/attention/decode_plan.h"
#include "tests/buffers/buffer_fixture.h"
#include "tests/buffers/engine.h"

namespace pristine::testing {
namespace {

constexpr Extent kBucket{4, 4};
using Ints = std::vector<int32_t>;

template <class BackendT>
class StaleRegression : public BufferTest<BackendT> {
 protected:
  Buffer<int32_t> RegisterIndptr() {
    return this->Register(Spec("kv_indptr", Role::kRefilled, Kind::kIndptr, Axis::RequestsPlusOne()),
                          {0, 10, 20, 30, 40});
  }
};
TYPED_TEST_SUITE(StaleRegression, AllBackends, BackendNames);

// The updater of target verify wrote the array of the eager path. The graph was bound to another one, which kept the
// values of its capture: attention over the wrong pages, without an error.
TYPED_TEST(StaleRegression, Sglang37975GraphBoundIndptrKeepsCaptureValues) {
  this->MakeManager();
  const auto bound = this->RegisterIndptr();
  const auto eager = this->EngineMemory({0, 10, 20, 30, 40});
  const auto seen = this->EngineMemory(Ints(5, -1));
  this->Capture({kBucket}, [&](Stream& stream, const Extent&) {
    return Launch(stream, kCopyInts, CopyIntsParams{seen.address(), bound.live.address(), 5});
  });
  const Ints before = this->Read(seen);
  const Ints values = {0, 3, 7};
  ASSERT_OK(this->manager().BeginStep(kBucket, {2, 2}));
  ASSERT_OK(this->stream()->CopyFromHost(AsWritableBytes(eager).Sub(0, 12),
                                         {reinterpret_cast<const std::byte*>(values.data()), 12}));
  EXPECT_STATUS(this->Replay(kBucket, {2, 2}), kFailedPrecondition,
                "buffer kv_indptr was last refilled in step 0 (generation 0); this is step 1: Refill or Keep it");
  ASSERT_OK(this->stream()->Synchronize());
  EXPECT_EQ(this->Read(seen), before) << "nothing was launched";
  ASSERT_OK(this->Refill(bound, values));
  ASSERT_OK(this->Replay(kBucket, {2, 2}));
  EXPECT_EQ(this->Read(seen), (Ints{0, 3, 7, 7, 7}));
  // In a later step too, where the bound array holds the values of the step before.
  ASSERT_OK(this->manager().BeginStep(kBucket, {2, 2}));
  EXPECT_STATUS(this->Replay(kBucket, {2, 2}), kFailedPrecondition, "buffer kv_indptr was last refilled in step 1");
}

// Of two wrappers one planned in forward(), which a replay never calls. With one request its plan happened to be right.
TYPED_TEST(StaleRegression, TensorRtLlm18443ASecondWrapperThatPlansOnlyInForwardIsRefused) {
  this->MakeManager();
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 512));
  attention::DecodePlanConfig config = {.name = "full",
                                        .buckets = {kBucket},
                                        .q_heads = 4,
                                        .kv_heads = 2,
                                        .head_dim = 64,
                                        .max_row_tokens = 512,
                                        .derived_from = {lengths.id},
                                        .scheduler = attention::DecodeScheduler::kHost};
  ASSERT_OK_AND_ASSIGN(const auto full, attention::DecodePlan::Create(this->manager(), config));
  config.name = "windowed";
  config.window = 128;
  ASSERT_OK_AND_ASSIGN(const auto windowed, attention::DecodePlan::Create(this->manager(), config));
  this->Capture({kBucket}, kEmptyBody);
  const Ints first = {100, 200}, second = {101, 201};
  ASSERT_OK(this->manager().BeginStep(kBucket, {2, 2}));
  ASSERT_OK(this->Refill(lengths, first));
  ASSERT_OK(full->Plan(kBucket, first));
  ASSERT_OK(windowed->Plan(kBucket, first));
  ASSERT_OK(this->Replay(kBucket, {2, 2}));
  ASSERT_OK(this->manager().BeginStep(kBucket, {2, 2}));
  ASSERT_OK(this->Refill(lengths, second));
  ASSERT_OK(full->Plan(kBucket, second));
  EXPECT_STATUS(this->Replay(kBucket, {2, 2}), kFailedPrecondition, "buffer windowed.items_4_4 was last refilled in");
  ASSERT_OK(windowed->Plan(kBucket, second));
  EXPECT_OK(this->Replay(kBucket, {2, 2}));
}

// A wrapper was captured without having been told that it would be: its graph took nothing of what each step prepared,
// and read what the capture had left.
TYPED_TEST(StaleRegression, FlashInfer3904AGraphThatTakesNoStepIsRefused) {
  this->MakeManager();
  const auto indptr = this->RegisterIndptr();
  const auto seen = this->EngineMemory(Ints(5, -1));
  ASSERT_OK(this->manager().Seal());
  const auto capture = [&](bool with_prologue) -> absl::StatusOr<EngineLaunch> {
    PRISTINE_RETURN_IF_ERROR(EngineBeginCapture(*this->stream()));
    if (with_prologue) {
      EXPECT_OK(this->manager().RecordPrologue(*this->stream(), kBucket));
    }
    EXPECT_OK(Launch(*this->stream(), kCopyInts, CopyIntsParams{seen.address(), indptr.live.address(), 5}));
    return EngineEndCapture(*this->stream());
  };
  const auto step = [&](const EngineLaunch& launch, int32_t length) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kBucket, {1, 1}));
    PRISTINE_RETURN_IF_ERROR(this->Refill(indptr, {0, length}));
    PRISTINE_RETURN_IF_ERROR(this->manager().BeforeReplay(*this->stream(), kBucket, {1, 1}));
    PRISTINE_RETURN_IF_ERROR(launch(*this->stream()));
    return this->stream()->Synchronize();
  };
  ASSERT_OK_AND_ASSIGN(EngineLaunch launch, capture(false));
  ASSERT_OK(step(launch, 3)) << "as before an eager prologue";
  for (int i = 0; i < 3; ++i) EXPECT_STATUS(step(launch, 4), kFailedPrecondition, "RecordPrologue must come first");
  launch = nullptr;
  ASSERT_OK_AND_ASSIGN(launch, capture(true));
  ASSERT_OK(step(launch, 5));
  EXPECT_EQ(Describe(this->Poll()),
            "armed more than once for one launch: expected step 1, found 2 (graph {4 requests, 4 tokens}, replay 2)\n");
  ASSERT_OK(step(launch, 6));
  EXPECT_EQ(this->Read(seen), (Ints{0, 6, 6, 6, 6}));
  EXPECT_EQ(Describe(this->Poll()), "");
  launch = nullptr;
}

// The preparation was captured too, the host's planning with it: its numbers were those of the capture in every replay.
TYPED_TEST(StaleRegression, SglangGlueGraphAPlanInsideTheCapturedBodyIsRefused) {
  this->MakeManager();
  attention::DecodePlanConfig config;
  config.buckets = {kBucket};
  config.q_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 64;
  config.max_row_tokens = 512;
  config.scheduler = attention::DecodeScheduler::kHost;
  ASSERT_OK_AND_ASSIGN(const auto plan, attention::DecodePlan::Create(this->manager(), config));
  bool plans = true;
  RunnerOptions options;
  options.buckets = {kBucket};
  options.warmups = 0;
  ASSERT_OK_AND_ASSIGN(this->runner_, GraphRunner::Create(options, [&](Stream&, const Extent& bucket) {
                         return plans ? plan->Plan(bucket, Ints{1, 2}) : absl::OkStatus();
                       }));
  ASSERT_OK(this->runner_->AddHook(this->manager()));
  EXPECT_STATUS(this->runner_->CaptureAll(*this->stream()), kFailedPrecondition, "no step is open");
  plans = false;
  ASSERT_OK(this->runner_->CaptureAll(*this->stream()));
  EXPECT_STATUS(this->Step(kBucket, {2, 2}), kFailedPrecondition, "buffer plan.items_4_4") << "the replay asks for it";
}

}  // namespace
}  // namespace pristine::testing
