// What only the Host backend promises: deferred work, guard bands, independent devices.
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "tests/conformance/conformance.h"

namespace pristine::testing {
namespace {

class HostDeferredTest : public ConformanceTest<HostDeferred> {};
class HostEagerTest : public ConformanceTest<HostEager> {};

TEST_F(HostDeferredTest, NothingRunsBeforeSomethingSynchronizes) {
  DeviceBuffer x = MakeInts({0});
  std::unique_ptr<Event> event = MakeEvent();
  ASSERT_OK(Launch(*stream_, kAddOne, {x.As<int>().address(), 1}));
  ASSERT_OK(stream_->Record(*event));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  // Host may look: nothing runs. Polling starts nothing either.
  EXPECT_EQ(*x.As<int>().address(), 0);
  for (int i = 0; i < 100; ++i) {
    EXPECT_FALSE(*event->IsReached());
    EXPECT_FALSE(*stream_->IsIdle());
  }
  ASSERT_OK(event->Synchronize());
  EXPECT_EQ(*x.As<int>().address(), 1);
}

TEST_F(HostDeferredTest, SynchronizingAnEventRunsTheWorkBeforeItAndNoMore) {
  DeviceBuffer x = MakeInts({0});
  std::unique_ptr<Event> event = MakeEvent();
  ASSERT_OK(Launch(*stream_, kAddOne, {x.As<int>().address(), 1}));
  ASSERT_OK(stream_->Record(*event));
  ASSERT_OK(Launch(*stream_, kAddOne, {x.As<int>().address(), 1}));
  ASSERT_OK(event->Synchronize());
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(*x.As<int>().address(), 1);
  EXPECT_EQ(Read(x), std::vector<int>{2});
}

TEST_F(HostDeferredTest, SynchronizingRunsWhatOtherStreamsMustDoFirst) {
  std::unique_ptr<Stream> first = MakeStream();
  std::unique_ptr<Stream> second = MakeStream();
  std::unique_ptr<Event> event = MakeEvent();
  DeviceBuffer x = MakeInts({0});
  ASSERT_OK(Launch(*first, kAddOne, {x.As<int>().address(), 1}));
  ASSERT_OK(first->Record(*event));
  ASSERT_OK(Launch(*first, kAddOne, {x.As<int>().address(), 1}));
  ASSERT_OK(second->Wait(*event));
  ASSERT_OK(second->Record(*event));
  ASSERT_OK(stream_->Wait(*event));
  ASSERT_OK(stream_->Synchronize());
  EXPECT_EQ(*x.As<int>().address(), 1) << "only what was recorded";
  ASSERT_OK(first->Synchronize());
  EXPECT_EQ(*x.As<int>().address(), 2);
}

TEST_F(HostDeferredTest, MoreTasksThanTheQueueFirstHasRoomForKeepTheirOrder) {
  DeviceBuffer x = MakeInts({0});
  int* address = x.As<int>().address();
  for (int i = 1; i <= 5000; ++i) ASSERT_OK(Launch(*stream_, kSetValue, {address, 0, i}));
  EXPECT_EQ(Read(x), std::vector<int>{5000});
}

TEST_F(HostEagerTest, FreshMemoryIsFilledWithCb) {
  ASSERT_OK_AND_ASSIGN(DeviceBuffer x, device_->Allocate(3 * sizeof(int), "fresh"));
  EXPECT_EQ(Read(x), std::vector<int>(3, static_cast<int>(0xCBCBCBCB)));
}

TEST_F(HostEagerTest, NamesTellTheBackend) {
  EXPECT_EQ(device_->name(), "host (eager)");
  EXPECT_EQ(device_->backend(), Backend::kHost);
  EXPECT_EQ(device_->multiprocessors(), 8);
  EXPECT_EQ(device_->compute_capability(), 0);
  EXPECT_EQ(device_->watch_alignment(), 4096u);
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Device> plain, CreateHostDevice({.run = HostOptions::Run::kDeferred}));
  EXPECT_EQ(plain->name(), "host (deferred)");
  EXPECT_EQ(plain->watch_alignment(), 256u);
}

TEST_F(HostEagerTest, AKernelsResultIsInTheError) {
  std::unique_ptr<Stream> broken = MakeStream();
  ASSERT_OK(Launch(*broken, kFail, {}));
  EXPECT_STATUS(broken->Synchronize(), kInternal, "kernel fail returned 7");
}

TEST_F(HostEagerTest, AFailureInsideAGraphSkipsItsRest) {
  DeviceBuffer x = MakeInts({0});
  std::unique_ptr<Stream> broken = MakeStream();
  std::unique_ptr<GraphExec> exec = MakeExec([&](Stream& stream) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {x.As<int>().address(), 1}));
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kFail, {}));
    return Launch(stream, kAddOne, {x.As<int>().address(), 1});
  });
  ASSERT_OK(exec->Launch(*broken));
  EXPECT_STATUS(broken->Synchronize(), kInternal, "kernel fail returned 7");
  EXPECT_EQ(Read(x), std::vector<int>{1});
}

TEST_F(HostEagerTest, ACudaKernelIsUnimplemented) {
  EXPECT_STATUS(stream_->EnqueueCudaKernel("gpu_only", [](CUstream_st*) { return 0; }), kUnimplemented, "gpu_only");
}

TEST_F(HostEagerTest, AnUnknownNativeStreamIsRefused) {
  int not_a_stream = 0;
  EXPECT_STATUS(device_->AdoptStream(&not_a_stream), kInvalidArgument, "AdoptStream");
  EXPECT_STATUS(host::EnqueueForeign(nullptr, "x", [] { return 0; }), kInvalidArgument, "null");
  EXPECT_STATUS(host::BeginCapture(nullptr), kInvalidArgument, "null");
  EXPECT_STATUS(host::EndCapture(nullptr), kInvalidArgument, "null");
}

TEST_F(HostEagerTest, AnUnjoinedForkIsNamed) {
  std::unique_ptr<Stream> side = MakeStream();
  std::unique_ptr<Event> fork = MakeEvent();
  DeviceBuffer x = MakeInts({0});
  EXPECT_STATUS(Capture(*stream_,
                        [&](Stream& stream) -> absl::Status {
                          PRISTINE_RETURN_IF_ERROR(stream.Record(*fork));
                          PRISTINE_RETURN_IF_ERROR(side->Wait(*fork));
                          return Launch(*side, kAddOne, {x.As<int>().address(), 1});
                        }),
                kFailedPrecondition, "node 0 (add_one) is on a forked stream");
}

TEST_F(HostEagerTest, AStreamDestroyedInsideACaptureFailsIt) {
  std::unique_ptr<Stream> side = MakeStream();
  std::unique_ptr<Event> fork = MakeEvent();
  EXPECT_STATUS(Capture(*stream_,
                        [&](Stream& stream) -> absl::Status {
                          PRISTINE_RETURN_IF_ERROR(stream.Record(*fork));
                          PRISTINE_RETURN_IF_ERROR(side->Wait(*fork));
                          side.reset();
                          return absl::OkStatus();
                        }),
                kFailedPrecondition, "destroyed");
  EXPECT_EQ(device_->capturing_streams(), 0);
}

TEST_F(HostEagerTest, AStreamInAnotherCaptureCannotJoin) {
  std::unique_ptr<Stream> other = MakeStream();
  std::unique_ptr<Event> event = MakeEvent();
  ASSERT_OK(host::BeginCapture(other->native()));
  ASSERT_OK(Capture(*stream_, [&](Stream& stream) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(stream.Record(*event));
    EXPECT_STATUS(other->Wait(*event), kFailedPrecondition, "another capture");
    return absl::OkStatus();
  }));
  EXPECT_STATUS(other->Wait(*event), kFailedPrecondition, "has ended");
  EXPECT_STATUS(host::EndCapture(other->native()), kFailedPrecondition, "another capture");
}

class HostGuardBandDeathTest : public HostEagerTest {
 protected:
  static void SetUpTestSuite() { ::testing::FLAGS_gtest_death_test_style = "threadsafe"; }
};

TEST_F(HostGuardBandDeathTest, AWriteBehindTheEndIsReportedWhenTheMemoryIsFreed) {
  EXPECT_DEATH(
      {
        DeviceBuffer x = MakeInts({0, 0}, "victim");
        Launch(*stream_, kSetValueUndeclared, {x.As<int>().address(), 2, 5}).IgnoreError();
        stream_->Synchronize().IgnoreError();
      },
      "guard band after 'victim' \\(8 bytes\\) damaged at byte 0 of the band: found 0x05");
}

TEST_F(HostGuardBandDeathTest, AWriteBeforeTheStartIsReportedWhenTheMemoryIsFreed) {
  EXPECT_DEATH(
      {
        DeviceBuffer x = MakeInts({0, 0}, "victim");
        Launch(*stream_, kSetValueUndeclared, {x.As<int>().address(), -1, 5}).IgnoreError();
        stream_->Synchronize().IgnoreError();
      },
      "guard band before 'victim' \\(8 bytes\\) damaged at byte 252 of the band");
}

// Nothing is process-wide: two devices, each used by its own thread.
TEST(HostDevicesTest, TwoThreadsWithADeviceEachDoNotMeet) {
  const auto run = [](HostOptions::Run mode, int* result) {
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<Device> device, CreateHostDevice({.run = mode, .enforce_accesses = true}));
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> stream, device->CreateStream());
    ASSERT_OK_AND_ASSIGN(DeviceBuffer x, device->Allocate(sizeof(int), "x"));
    ASSERT_OK(stream->Fill(AsWritableBytes(x.As<int>()), std::byte{0}));
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> graph, Capture(*stream, [&](Stream& s) {
                           return Launch(s, kAddOne, {x.As<int>().address(), 1});
                         }));
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<GraphExec> exec, graph->Instantiate());
    for (int i = 0; i < 300; ++i) ASSERT_OK(exec->Launch(*stream));
    ASSERT_OK(stream->CopyToHost({reinterpret_cast<std::byte*>(result), sizeof(int)}, AsBytes(x.As<int>())));
    ASSERT_OK(stream->Synchronize());
  };
  int first = 0;
  int second = 0;
  std::thread a(run, HostOptions::Run::kEager, &first);
  std::thread b(run, HostOptions::Run::kDeferred, &second);
  a.join();
  b.join();
  EXPECT_EQ(first, 300);
  EXPECT_EQ(second, 300);
}

}  // namespace
}  // namespace pristine::testing
