// GraphRunner: which bucket, which graph, and when hooks are called.
#include <string>

#include "pristine/graph_runtime/graph_runner.h"
#include "tests/conformance/conformance.h"

namespace pristine::testing {
namespace {

constexpr Extent kSmall = {2, 2};
constexpr Extent kMiddle = {4, 8};
constexpr Extent kLarge = {8, 16};

// Writes down each call, and fails the one named `fail_at`.
class RecordingHook : public GraphHook {
 public:
  RecordingHook(std::string name, std::vector<std::string>* log, int* counter = nullptr)
      : name_(std::move(name)), log_(log), counter_(counter) {}
  void FailAt(std::string call) { fail_at_ = std::move(call); }
  const RunInfo& last() const { return last_; }

  absl::Status BeforeCapture(Stream&, const RunInfo& info) override { return Note("BeforeCapture", info); }
  absl::Status RecordPrologue(Stream& stream, const RunInfo& info) override {
    EXPECT_TRUE(stream.capturing());
    PRISTINE_RETURN_IF_ERROR(Note("RecordPrologue", info));
    return counter_ != nullptr ? Launch(stream, kAddOne, {counter_, 1}) : absl::OkStatus();
  }
  void AfterCapture(const RunInfo& info, const absl::Status& outcome) override {
    Note(outcome.ok() ? "AfterCapture" : "AfterCapture(failed)", info).IgnoreError();
  }
  absl::Status BeforeReplay(Stream&, const RunInfo& info) override { return Note("BeforeReplay", info); }
  void AfterReplay(Stream&, const RunInfo& info, const absl::Status& outcome) override {
    Note(outcome.ok() ? "AfterReplay" : "AfterReplay(failed)", info).IgnoreError();
  }

 private:
  absl::Status Note(const std::string& call, const RunInfo& info) {
    last_ = info;
    if (log_ != nullptr) log_->push_back(absl::StrCat(name_, ".", call, " ", info.bucket.requests));
    return call == fail_at_ ? absl::UnavailableError(absl::StrCat(name_, " refused")) : absl::OkStatus();
  }

  const std::string name_;
  std::vector<std::string>* const log_;
  int* const counter_;
  std::string fail_at_;
  RunInfo last_;
};

template <class BackendT>
class RunnerConformance : public ConformanceTest<BackendT> {
 protected:
  void SetUp() override {
    ConformanceTest<BackendT>::SetUp();
    if (this->IsSkipped()) return;
    counts_ = this->MakeInts({0, 0, 0, 0, 0, 0, 0, 0, 0});
  }
  void TearDown() override {
    runner_.reset();
    if (this->stream_ != nullptr) this->stream_->Synchronize().IgnoreError();  // before the memory goes
    counts_ = DeviceBuffer();
    ConformanceTest<BackendT>::TearDown();
  }
  int* Count(int index) { return counts_.As<int>().address() + index; }
  // Its body counts its runs at counts_[requests].
  GraphRunner& MakeRunner(int warmups = 0) {
    absl::StatusOr<std::unique_ptr<GraphRunner>> runner = GraphRunner::Create(
        {.name = "decode", .buckets = {kSmall, kMiddle, kLarge}, .warmups = warmups},
        [this](Stream& stream, const Extent& bucket) -> absl::Status {
          PRISTINE_RETURN_IF_ERROR(body_error_);
          log_.push_back(absl::StrCat(stream.capturing() ? "captured body " : "eager body ", bucket.requests));
          return Launch(stream, kAddOne, {Count(bucket.requests), 1});
        });
    EXPECT_OK(runner);
    runner_ = *std::move(runner);
    return *runner_;
  }
  std::vector<int> Counts() {
    const std::vector<int> all = this->Read(counts_);
    return {all[2], all[4], all[8]};
  }

  DeviceBuffer counts_;
  std::vector<std::string> log_;
  absl::Status body_error_;
  std::unique_ptr<GraphRunner> runner_;
};
TYPED_TEST_SUITE(RunnerConformance, AllBackends, BackendNames);

TYPED_TEST(RunnerConformance, BadOptionsAreRefused) {
  const GraphRunner::Body body = [](Stream&, const Extent&) { return absl::OkStatus(); };
  EXPECT_STATUS(GraphRunner::Create({.buckets = {}}, body), kInvalidArgument, "no buckets");
  EXPECT_STATUS(GraphRunner::Create({.buckets = {{0, 1}}}, body), kInvalidArgument, "at least 1");
  EXPECT_STATUS(GraphRunner::Create({.buckets = {{1, 0}}}, body), kInvalidArgument, "at least 1");
  EXPECT_STATUS(GraphRunner::Create({.buckets = {{2, 2}, {1, 1}}}, body), kInvalidArgument, "ascend");
  EXPECT_STATUS(GraphRunner::Create({.buckets = {{2, 4}, {3, 3}}}, body), kInvalidArgument, "ascend");
  EXPECT_STATUS(GraphRunner::Create({.buckets = {{2, 2}, {2, 2}}}, body), kInvalidArgument, "equal");
  EXPECT_STATUS(GraphRunner::Create({.buckets = {{2, 2}}, .warmups = -1}, body), kInvalidArgument, "warmups");
  EXPECT_STATUS(GraphRunner::Create({.buckets = {{2, 2}}}, nullptr), kInvalidArgument, "no body");
  EXPECT_OK(GraphRunner::Create({.buckets = {{2, 2}, {2, 4}}}, body));
}

TYPED_TEST(RunnerConformance, ABucketFitsIfBothCountsDo) {
  GraphRunner& runner = this->MakeRunner();
  const struct {
    Extent extent;
    Extent bucket;
  } cases[] = {{{1, 1}, kSmall}, {{2, 2}, kSmall}, {{2, 3}, kMiddle}, {{3, 3}, kMiddle}, {{4, 8}, kMiddle},
               {{4, 9}, kLarge}, {{5, 5}, kLarge}, {{1, 16}, kLarge}, {{8, 16}, kLarge}};
  for (const auto& c : cases) {
    ASSERT_OK_AND_ASSIGN(const Extent bucket, runner.BucketFor(c.extent));
    EXPECT_EQ(bucket, c.bucket) << c.extent.ToString() << " got " << bucket.ToString();
  }
}

TYPED_TEST(RunnerConformance, ChoosingABucketForNothingIsInvalid) {
  GraphRunner& runner = this->MakeRunner();
  EXPECT_STATUS(runner.BucketFor({0, 0}), kInvalidArgument, "{0 requests, 0 tokens}");
  EXPECT_STATUS(runner.BucketFor({1, 0}), kInvalidArgument, "nothing to run");
  EXPECT_STATUS(runner.BucketFor({-1, 4}), kInvalidArgument, "nothing to run");
}

TYPED_TEST(RunnerConformance, ChoosingABucketForTooMuchIsOutOfRange) {
  GraphRunner& runner = this->MakeRunner();
  EXPECT_STATUS(runner.BucketFor({9, 9}), kOutOfRange, "{8 requests, 16 tokens}");
  EXPECT_STATUS(runner.BucketFor({1, 17}), kOutOfRange, "largest");
}

TYPED_TEST(RunnerConformance, ReplayOfWhatWasNotCapturedIsNotFound) {
  GraphRunner& runner = this->MakeRunner();
  EXPECT_STATUS(runner.Replay(*this->stream_, kSmall, {1, 1}), kNotFound, "not captured");
  EXPECT_STATUS(runner.Replay(*this->stream_, {3, 3}, {1, 1}), kNotFound, "no bucket {3 requests, 3 tokens}");
  EXPECT_STATUS(runner.graph(kSmall), kNotFound, "not captured");
  EXPECT_STATUS(runner.Release(kSmall), kNotFound, "not captured");
  EXPECT_STATUS(runner.Recapture(*this->stream_, {3, 3}), kNotFound, "no bucket");
}

TYPED_TEST(RunnerConformance, ReplayRunsTheGraphOfTheNamedBucket) {
  GraphRunner& runner = this->MakeRunner();
  ASSERT_OK(runner.CaptureAll(*this->stream_));
  EXPECT_EQ(this->Counts(), (std::vector<int>{0, 0, 0}));
  ASSERT_OK(runner.Replay(*this->stream_, kSmall, {1, 1}));
  ASSERT_OK(runner.Replay(*this->stream_, kLarge, {1, 1}));
  ASSERT_OK(runner.Replay(*this->stream_, kLarge, {8, 16}));
  EXPECT_EQ(this->Counts(), (std::vector<int>{1, 0, 2}));
  EXPECT_EQ(runner.stats().captures, 3);
  EXPECT_EQ(runner.stats().replays, 3);
  EXPECT_EQ(runner.stats().replays_by_bucket, (std::vector<int64_t>{1, 0, 2}));
  EXPECT_GT(runner.stats().capture_ms, 0);
}

TYPED_TEST(RunnerConformance, ANamedBucketMayBeReplayedWithNothing) {
  GraphRunner& runner = this->MakeRunner();
  ASSERT_OK(runner.CaptureAll(*this->stream_));
  EXPECT_OK(runner.Replay(*this->stream_, kMiddle, {0, 0}));
  EXPECT_EQ(this->Counts(), (std::vector<int>{0, 1, 0}));
}

TYPED_TEST(RunnerConformance, BadReplaysAreRefusedAndLaunchNothing) {
  RecordingHook hook("hook", &this->log_);
  GraphRunner& runner = this->MakeRunner();
  ASSERT_OK(runner.AddHook(hook));
  ASSERT_OK(runner.CaptureAll(*this->stream_));
  this->log_.clear();
  EXPECT_STATUS(runner.Replay(*this->stream_, kSmall, {3, 2}), kOutOfRange, "{3 requests, 2 tokens} does not fit");
  EXPECT_STATUS(runner.Replay(*this->stream_, kSmall, {2, 3}), kOutOfRange, "does not fit");
  EXPECT_STATUS(runner.Replay(*this->stream_, kSmall, {-1, 0}), kInvalidArgument, "negative");
  EXPECT_STATUS(Capture(*this->stream_,
                        [&](Stream& stream) {
                          return runner.Replay(stream, kSmall, {1, 1});
                        }),
                kFailedPrecondition, "capturing");
  EXPECT_TRUE(this->log_.empty());
  EXPECT_EQ(this->Counts(), (std::vector<int>{0, 0, 0}));
  EXPECT_EQ(runner.stats().replays, 0);
}

TYPED_TEST(RunnerConformance, ReplayReturnsWhileAKernelIsBlocked) {
  Latch latch = this->MakeLatch();
  GraphRunner& runner = this->MakeRunner();
  ASSERT_OK(runner.CaptureAll(*this->stream_));
  ASSERT_OK(Launch(*this->stream_, kSpin, latch.spin()));
  for (int i = 0; i < 3; ++i) ASSERT_OK(runner.Replay(*this->stream_, kSmall, {1, 1}));
  EXPECT_FALSE(*this->stream_->IsIdle());
  latch.Open();
  EXPECT_EQ(this->Counts(), (std::vector<int>{3, 0, 0}));
}

TYPED_TEST(RunnerConformance, LargestBucketIsCapturedFirst) {
  GraphRunner& runner = this->MakeRunner();
  ASSERT_OK(runner.CaptureAll(*this->stream_));
  EXPECT_EQ(this->log_, (std::vector<std::string>{"captured body 8", "captured body 4", "captured body 2"}));
}

TYPED_TEST(RunnerConformance, HooksRunBeforeEachWarmUpAndAgainBeforeTheCaptureInTheOrderAdded) {
  RecordingHook a("a", &this->log_);
  RecordingHook b("b", &this->log_);
  GraphRunner& runner = this->MakeRunner(/*warmups=*/2);
  ASSERT_OK(runner.AddHook(a));
  ASSERT_OK(runner.AddHook(b));
  ASSERT_OK(runner.Recapture(*this->stream_, kMiddle));
  EXPECT_EQ(this->log_, (std::vector<std::string>{"a.BeforeCapture 4", "b.BeforeCapture 4", "eager body 4",       //
                                                  "a.BeforeCapture 4", "b.BeforeCapture 4", "eager body 4",       //
                                                  "a.BeforeCapture 4", "b.BeforeCapture 4",                       //
                                                  "a.RecordPrologue 4", "b.RecordPrologue 4", "captured body 4",  //
                                                  "a.AfterCapture 4", "b.AfterCapture 4"}));
  EXPECT_EQ(a.last().extent, kMiddle);
  EXPECT_EQ(a.last().replay, 0);
  EXPECT_STREQ(a.last().graph, "decode");
  EXPECT_EQ(this->Counts(), (std::vector<int>{0, 2, 0})) << "warm-ups execute";
  this->log_.clear();
  ASSERT_OK(runner.Replay(*this->stream_, kMiddle, {1, 2}));
  EXPECT_EQ(this->log_, (std::vector<std::string>{"a.BeforeReplay 4", "b.BeforeReplay 4",  //
                                                  "a.AfterReplay 4", "b.AfterReplay 4"}));
  EXPECT_EQ(a.last().extent, (Extent{1, 2}));
  EXPECT_EQ(a.last().replay, 1);
  RecordingHook late("late", &this->log_);
  EXPECT_STATUS(runner.AddHook(late), kFailedPrecondition, "decode");
}

TYPED_TEST(RunnerConformance, ThePrologueIsAtTheHeadOfTheGraph) {
  RecordingHook hook("hook", nullptr, this->Count(0));
  GraphRunner& runner = this->MakeRunner();
  ASSERT_OK(runner.AddHook(hook));
  ASSERT_OK(runner.CaptureAll(*this->stream_));
  ASSERT_OK_AND_ASSIGN(const Graph* graph, runner.graph(kSmall));
  EXPECT_EQ(graph->nodes().size(), 2u);
  EXPECT_EQ(graph->edges(), (std::vector<GraphEdge>{{0, 1}}));
  ASSERT_OK(runner.Replay(*this->stream_, kSmall, {1, 1}));
  EXPECT_EQ(this->Read(this->counts_)[0], 1);
}

TYPED_TEST(RunnerConformance, AHookThatRefusesStopsTheLaunch) {
  RecordingHook a("a", &this->log_);
  RecordingHook b("b", &this->log_);
  GraphRunner& runner = this->MakeRunner();
  ASSERT_OK(runner.AddHook(a));
  ASSERT_OK(runner.AddHook(b));
  ASSERT_OK(runner.CaptureAll(*this->stream_));
  this->log_.clear();
  b.FailAt("BeforeReplay");
  EXPECT_STATUS(runner.Replay(*this->stream_, kSmall, {1, 1}), kUnavailable, "b refused");
  EXPECT_EQ(this->log_, (std::vector<std::string>{"a.BeforeReplay 2", "b.BeforeReplay 2", "a.AfterReplay(failed) 2"}));
  EXPECT_EQ(this->Counts(), (std::vector<int>{0, 0, 0}));
  EXPECT_EQ(runner.stats().replays, 0);
}

TYPED_TEST(RunnerConformance, AFailedCaptureKeepsTheGraphsBeforeIt) {
  RecordingHook hook("hook", &this->log_);
  GraphRunner& runner = this->MakeRunner();
  ASSERT_OK(runner.AddHook(hook));
  ASSERT_OK(runner.CaptureAll(*this->stream_));
  for (const char* call : {"BeforeCapture", "RecordPrologue"}) {
    this->log_.clear();
    hook.FailAt(call);
    EXPECT_STATUS(runner.Recapture(*this->stream_, kSmall), kUnavailable, "hook refused");
    EXPECT_EQ(this->log_.back(), "hook.AfterCapture(failed) 2");
  }
  hook.FailAt("");
  this->body_error_ = absl::AbortedError("body");
  EXPECT_STATUS(runner.Recapture(*this->stream_, kSmall), kAborted, "body");
  EXPECT_FALSE(this->stream_->capturing());
  ASSERT_OK(runner.Replay(*this->stream_, kSmall, {1, 1}));
  EXPECT_EQ(this->Counts(), (std::vector<int>{1, 0, 0}));
  EXPECT_EQ(runner.stats().captures, 3);
}

TYPED_TEST(RunnerConformance, RecaptureAndReleaseMayHappenWhileALaunchRuns) {
  Latch latch = this->MakeLatch();
  GraphRunner& runner = this->MakeRunner();
  ASSERT_OK(runner.CaptureAll(*this->stream_));
  std::unique_ptr<Stream> capture_stream = this->MakeStream();
  ASSERT_OK(Launch(*this->stream_, kSpin, latch.spin()));
  ASSERT_OK(runner.Replay(*this->stream_, kSmall, {1, 1}));
  ASSERT_OK(runner.Replay(*this->stream_, kMiddle, {1, 1}));
  ASSERT_OK(runner.Recapture(*capture_stream, kSmall));
  ASSERT_OK(runner.Release(kMiddle));
  ASSERT_OK(runner.Replay(*this->stream_, kSmall, {1, 1}));
  latch.Open();
  EXPECT_EQ(this->Counts(), (std::vector<int>{2, 1, 0}));
  EXPECT_STATUS(runner.Replay(*this->stream_, kMiddle, {1, 1}), kNotFound, "not captured");
  ASSERT_OK(runner.Recapture(*this->stream_, kMiddle));
  EXPECT_OK(runner.Replay(*this->stream_, kMiddle, {1, 1}));
}

}  // namespace
}  // namespace pristine::testing
