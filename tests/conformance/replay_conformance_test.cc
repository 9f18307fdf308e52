// Launching graphs: order, repetition, lifetime, and work that is not ours.
#ifdef PRISTINE_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

#include <string>

#include "tests/conformance/conformance.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class ReplayConformance : public ConformanceTest<BackendT> {
 protected:
  static absl::Status AddOne(Stream& stream, const DeviceBuffer& x, int64_t count = 1) {
    return Launch(stream, kAddOne, {x.As<int>().address(), count});
  }
};
TYPED_TEST_SUITE(ReplayConformance, AllBackends, BackendNames);

// C6 row 7.
TYPED_TEST(ReplayConformance, AReplayRunsAfterEarlierWorkAndBeforeLaterWork) {
  DeviceBuffer x = this->MakeInts({0, 0});
  int* address = x.As<int>().address();
  std::unique_ptr<GraphExec> exec = this->MakeExec([&](Stream& stream) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kDelay, {20'000}));
    return this->AddOne(stream, x);
  });
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK(Launch(*this->stream_, kDelay, {10'000}));
    ASSERT_OK(Launch(*this->stream_, kSetValue, {address, 0, 10 * i}));
    ASSERT_OK(exec->Launch(*this->stream_));
    ASSERT_OK(Launch(*this->stream_, kCopyInts, {address + 1, address, 1}));
    ASSERT_OK(Launch(*this->stream_, kSetValue, {address, 0, -1}));
    const std::vector<int> values = this->Read(x);
    ASSERT_EQ(values[1], 10 * i + 1);
  }
}

TYPED_TEST(ReplayConformance, TheSameGraphRunsAHundredTimes) {
  DeviceBuffer x = this->MakeInts({0});
  std::unique_ptr<GraphExec> exec = this->MakeExec([&](Stream& stream) { return this->AddOne(stream, x); });
  for (int i = 0; i < 100; ++i) ASSERT_OK(exec->Launch(*this->stream_));
  EXPECT_EQ(this->Read(x), std::vector<int>{100});
}

TYPED_TEST(ReplayConformance, AReplayReadsWhatTheInputHoldsThen) {
  DeviceBuffer in = this->MakeInts({1});
  DeviceBuffer out = this->MakeInts({0});
  std::unique_ptr<GraphExec> exec = this->MakeExec(
      [&](Stream& stream) { return stream.Copy(AsWritableBytes(out.As<int>()), AsBytes(in.As<int>())); });
  for (const int value : {5, 6, 7}) {
    ASSERT_OK(Launch(*this->stream_, kSetValue, {in.As<int>().address(), 0, value}));
    ASSERT_OK(exec->Launch(*this->stream_));
    EXPECT_EQ(this->Read(out), std::vector<int>{value});
  }
}

TYPED_TEST(ReplayConformance, LaunchReturnsWhileAKernelIsBlocked) {
  DeviceBuffer x = this->MakeInts({0});
  Latch latch = this->MakeLatch();
  std::unique_ptr<GraphExec> exec = this->MakeExec([&](Stream& stream) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kSpin, latch.spin()));
    return this->AddOne(stream, x);
  });
  for (int i = 0; i < 3; ++i) ASSERT_OK(exec->Launch(*this->stream_));
  EXPECT_FALSE(*this->stream_->IsIdle());
  latch.Open();
  EXPECT_EQ(this->Read(x), std::vector<int>{3});
}

// C6 row 8.
TYPED_TEST(ReplayConformance, OneLaunchOfAnExecRunsAtATimeOnWhateverStreams) {
  std::unique_ptr<Stream> other = this->MakeStream();
  std::unique_ptr<Event> second = this->MakeEvent();
  DeviceBuffer x = this->MakeInts({0});
  Latch latch = this->MakeLatch();
  std::unique_ptr<GraphExec> exec = this->MakeExec([&](Stream& stream) { return this->AddOne(stream, x); });
  ASSERT_OK(Launch(*this->stream_, kSpin, latch.spin()));
  ASSERT_OK(exec->Launch(*this->stream_));
  ASSERT_OK(exec->Launch(*other));
  ASSERT_OK(other->Record(*second));
  ASSERT_OK(Launch(*other, kAddOne, {x.As<int>().address(), 1}));
  for (int i = 0; i < 50; ++i) EXPECT_FALSE(*second->IsReached());
  latch.Open();
  ASSERT_OK(second->Synchronize());
  EXPECT_TRUE(*this->stream_->IsIdle()) << "the second launch ended before the first";
  ASSERT_OK(other->Synchronize());
  EXPECT_EQ(this->Read(x), std::vector<int>{3});
}

// C6 row 9.
TYPED_TEST(ReplayConformance, GraphAndExecMayBeDestroyedWhileALaunchRuns) {
  DeviceBuffer x = this->MakeInts({0});
  Latch latch = this->MakeLatch();
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
                         PRISTINE_RETURN_IF_ERROR(Launch(stream, kSpin, latch.spin()));
                         return this->AddOne(stream, x);
                       }));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<GraphExec> exec, graph->Instantiate());
  ASSERT_OK(exec->Launch(*this->stream_));
  ASSERT_OK(exec->Launch(*this->stream_));
  graph.reset();
  exec.reset();
  latch.Open();
  EXPECT_EQ(this->Read(x), std::vector<int>{2});
}

TYPED_TEST(ReplayConformance, TwoExecsOfOneGraphAreIndependent) {
  DeviceBuffer x = this->MakeInts({0});
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> graph,
                       Capture(*this->stream_, [&](Stream& stream) { return this->AddOne(stream, x); }));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<GraphExec> first, graph->Instantiate());
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<GraphExec> second, graph->Instantiate());
  ASSERT_OK(first->Launch(*this->stream_));
  first.reset();
  ASSERT_OK(second->Launch(*this->stream_));
  EXPECT_EQ(this->Read(x), std::vector<int>{2});
}

// C6 row 10.
TYPED_TEST(ReplayConformance, AFailedStreamRefusesLaunches) {
  std::unique_ptr<Stream> broken = this->MakeStream();
  DeviceBuffer x = this->MakeInts({0});
  std::unique_ptr<GraphExec> exec = this->MakeExec([&](Stream& stream) { return this->AddOne(stream, x); });
  Launch(*broken, kFail, {}).IgnoreError();
  const absl::Status first = broken->Synchronize();
  EXPECT_STATUS(first, kInternal, "fail");
  EXPECT_EQ(exec->Launch(*broken), first);
  EXPECT_OK(exec->Launch(*this->stream_));
  EXPECT_EQ(this->Read(x), std::vector<int>{1});
}

TYPED_TEST(ReplayConformance, AStreamOfAnotherDeviceIsRefused) {
  std::unique_ptr<GraphExec> exec = this->MakeExec([](Stream&) { return absl::OkStatus(); });
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Device> other, CreateHostDevice({.enforce_accesses = true}));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> stream, other->CreateStream());
  EXPECT_STATUS(exec->Launch(*stream), kInvalidArgument, "another device");
}

TYPED_TEST(ReplayConformance, ForeignWorkRunsAndAppearsAsForeignNodes) {
  DeviceBuffer x = this->MakeInts({0});
  const AddOneParams params = {x.As<int>().address(), 1};
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
                         PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, params));
                         PRISTINE_RETURN_IF_ERROR(EnqueueForeignAddOne(stream, params));
                         return EnqueueForeignAddOne(stream, params);
                       }));
  ASSERT_EQ(graph->nodes().size(), 3u);
  EXPECT_FALSE(graph->nodes()[0].foreign);
  EXPECT_TRUE(graph->nodes()[1].foreign);
  EXPECT_TRUE(graph->nodes()[2].foreign);
  EXPECT_EQ(graph->nodes()[1].kind, GraphNode::Kind::kKernel);
  EXPECT_EQ(graph->edges().size(), 2u);
  EXPECT_NE(graph->ToDot("foreign").find("style=dashed"), std::string::npos);
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<GraphExec> exec, graph->Instantiate());
  ASSERT_OK(exec->Launch(*this->stream_));
  ASSERT_OK(EnqueueForeignAddOne(*this->stream_, params));
  EXPECT_EQ(this->Read(x), std::vector<int>{4});
}

// The engine captures by itself; what we queue on the adopted stream goes into its graph.
TYPED_TEST(ReplayConformance, AnEngineOwnedCaptureTakesOurWork) {
  DeviceBuffer x = this->MakeInts({0});
  const AddOneParams params = {x.As<int>().address(), 1};
  void* native = this->stream_->native();
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> adopted, this->device_->AdoptStream(native));
  if (this->device_->backend() == Backend::kHost) {
    ASSERT_OK(host::BeginCapture(native));
    EXPECT_STATUS(host::BeginCapture(native), kFailedPrecondition, "already");
    EXPECT_TRUE(adopted->capturing());
    EXPECT_TRUE(*adopted->AtCaptureHead());
    ASSERT_OK(Launch(*adopted, kAddOne, params));
    EXPECT_FALSE(*adopted->AtCaptureHead());
    ASSERT_OK(EnqueueForeignAddOne(*this->stream_, params));
    EXPECT_STATUS(Capture(*adopted, [](Stream&) { return absl::OkStatus(); }), kFailedPrecondition, "already");
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> graph, host::EndCapture(native));
    EXPECT_STATUS(host::EndCapture(native), kFailedPrecondition, "not capturing");
    EXPECT_EQ(Names(*graph), (std::vector<std::string>{"add_one", "foreign_add"}));
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<GraphExec> exec, graph->Instantiate());
    ASSERT_OK(exec->Launch(*this->stream_));
  } else {
#ifdef PRISTINE_HAS_CUDA
    auto* stream = static_cast<cudaStream_t>(native);
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    EXPECT_TRUE(adopted->capturing());
    EXPECT_TRUE(*adopted->AtCaptureHead());
    ASSERT_OK(Launch(*adopted, kAddOne, params));
    EXPECT_FALSE(*adopted->AtCaptureHead());
    ASSERT_OK(EnqueueForeignAddOne(*this->stream_, params));
    EXPECT_STATUS(Capture(*adopted, [](Stream&) { return absl::OkStatus(); }), kFailedPrecondition, "already");
    cudaGraph_t graph = nullptr;
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    size_t nodes = 0;
    ASSERT_EQ(cudaGraphGetNodes(graph, nullptr, &nodes), cudaSuccess);
    EXPECT_EQ(nodes, 2u);
    cudaGraphExec_t exec = nullptr;
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    ASSERT_OK(this->stream_->Synchronize());
    EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
#endif
  }
  adopted.reset();
  EXPECT_EQ(this->Read(x), std::vector<int>{2});
}

}  // namespace
}  // namespace pristine::testing
