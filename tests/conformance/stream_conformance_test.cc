// Streams and events: order, errors, and what does and does not block.
#include <string>

#include "tests/conformance/conformance.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class StreamConformance : public ConformanceTest<BackendT> {};
TYPED_TEST_SUITE(StreamConformance, AllBackends, BackendNames);

TYPED_TEST(StreamConformance, TwoThousandTasksRunInOrder) {
  constexpr int kTasks = 2000;
  DeviceBuffer log = this->MakeInts(std::vector<int>(kTasks, -1));
  DeviceBuffer counter = this->MakeInts({0});
  int* next = counter.As<int>().address();
  for (int i = 0; i < kTasks; ++i) {
    ASSERT_OK(Launch(*this->stream_, kCopyInts, {log.As<int>().address() + i, next, 1}));
    ASSERT_OK(Launch(*this->stream_, kAddOne, {next, 1}));
  }
  const std::vector<int> values = this->Read(log);
  for (int i = 0; i < kTasks; ++i) ASSERT_EQ(values[i], i);
}

TYPED_TEST(StreamConformance, CopiesAndFillsMoveTheBytesTheyName) {
  DeviceBuffer a = this->MakeInts({1, 2, 3, 4});
  DeviceBuffer b = this->MakeInts({0, 0, 0, 0});
  ASSERT_OK(this->stream_->Copy(AsWritableBytes(b.As<int>().Sub(1, 2)), AsBytes(a.As<int>().Sub(2, 2))));
  ASSERT_OK(this->stream_->Fill(AsWritableBytes(b.As<int>().Sub(3, 1)), std::byte{0xFF}));
  EXPECT_EQ(this->Read(b), (std::vector<int>{0, 3, 4, -1}));
}

TYPED_TEST(StreamConformance, CopySizesMustMatch) {
  DeviceBuffer a = this->MakeInts({1, 2});
  std::vector<int> host(3);
  EXPECT_STATUS(this->stream_->Copy(AsWritableBytes(a.As<int>().Sub(0, 1)), AsBytes(a.As<int>())), kInvalidArgument,
                "8 bytes to a destination of 4");
  EXPECT_STATUS(this->stream_->CopyFromHost(AsWritableBytes(a.As<int>()), HostBytes(host)), kInvalidArgument, "12");
  EXPECT_STATUS(this->stream_->CopyToHost(WritableHostBytes(host), AsBytes(a.As<int>())), kInvalidArgument, "12");
  EXPECT_STATUS(this->stream_->Fill({nullptr, 4}, std::byte{0}), kInvalidArgument, "null");
  EXPECT_OK(this->stream_->Synchronize());
}

TYPED_TEST(StreamConformance, ACopyOfNothingIsNothing) {
  EXPECT_OK(this->stream_->Copy({}, {}));
  EXPECT_OK(this->stream_->CopyFromHost({}, {}));
  EXPECT_OK(this->stream_->CopyToHost({}, {}));
  EXPECT_OK(this->stream_->Fill({}, std::byte{1}));
}

TYPED_TEST(StreamConformance, LaunchReturnsWhileAKernelIsBlocked) {
  DeviceBuffer x = this->MakeInts({0});
  Latch latch = this->MakeLatch();
  ASSERT_OK(Launch(*this->stream_, kSpin, latch.spin()));
  ASSERT_OK(Launch(*this->stream_, kAddOne, {x.As<int>().address(), 1}));  // would never return if it ran here
  ASSERT_OK_AND_ASSIGN(const bool idle, this->stream_->IsIdle());
  EXPECT_FALSE(idle);
  latch.Open();
  EXPECT_EQ(this->Read(x), std::vector<int>{1});
}

TYPED_TEST(StreamConformance, SynchronizeDrains) {
  DeviceBuffer x = this->MakeInts({0});
  for (int i = 0; i < 10; ++i) {
    ASSERT_OK(Launch(*this->stream_, kDelay, {20'000}));
    ASSERT_OK(Launch(*this->stream_, kAddOne, {x.As<int>().address(), 1}));
  }
  ASSERT_OK(this->stream_->Synchronize());
  ASSERT_OK_AND_ASSIGN(const bool idle, this->stream_->IsIdle());
  EXPECT_TRUE(idle);
  EXPECT_EQ(this->Read(x), std::vector<int>{10});
}

TYPED_TEST(StreamConformance, DeviceSynchronizeDrainsAllStreams) {
  std::unique_ptr<Stream> other = this->MakeStream();
  DeviceBuffer x = this->MakeInts({0, 0});
  ASSERT_OK(Launch(*this->stream_, kAddOne, {x.As<int>().address(), 1}));
  ASSERT_OK(Launch(*other, kAddOne, {x.As<int>().address() + 1, 1}));
  ASSERT_OK(this->device_->Synchronize());
  EXPECT_TRUE(*this->stream_->IsIdle());
  EXPECT_TRUE(*other->IsIdle());
  EXPECT_EQ(this->Read(x), (std::vector<int>{1, 1}));
}

TYPED_TEST(StreamConformance, TheDestructorWaitsForQueuedWork) {
  DeviceBuffer x = this->MakeInts({0});
  std::unique_ptr<Stream> other = this->MakeStream();
  ASSERT_OK(Launch(*other, kDelay, {200'000}));
  ASSERT_OK(Launch(*other, kAddOne, {x.As<int>().address(), 1}));
  other.reset();
  EXPECT_EQ(this->Read(x), std::vector<int>{1});
}

// C6 row 12.
TYPED_TEST(StreamConformance, TwoStreamsAreUnorderedWithoutAnEvent) {
  std::unique_ptr<Stream> other = this->MakeStream();
  DeviceBuffer x = this->MakeInts({0});
  Latch latch = this->MakeLatch();
  ASSERT_OK(Launch(*this->stream_, kSpin, latch.spin()));
  ASSERT_OK(Launch(*other, kAddOne, {x.As<int>().address(), 1}));
  ASSERT_OK(other->Synchronize());  // while stream_ is blocked
  EXPECT_FALSE(*this->stream_->IsIdle());
  latch.Open();
  EXPECT_EQ(this->Read(x), std::vector<int>{1});
}

TYPED_TEST(StreamConformance, AnEventOrdersTwoStreams) {
  std::unique_ptr<Stream> other = this->MakeStream();
  std::unique_ptr<Event> event = this->MakeEvent();
  DeviceBuffer x = this->MakeInts({0, 0});
  int* address = x.As<int>().address();
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK(Launch(*this->stream_, kDelay, {10'000}));
    ASSERT_OK(Launch(*this->stream_, kAddOne, {address, 1}));
    ASSERT_OK(this->stream_->Record(*event));
    ASSERT_OK(other->Wait(*event));
    ASSERT_OK(Launch(*other, kCopyInts, {address + 1, address, 1}));
    ASSERT_OK(other->Record(*event));
    ASSERT_OK(this->stream_->Wait(*event));
  }
  EXPECT_EQ(this->Read(x), (std::vector<int>{20, 20}));
}

// A wait is for the mark that the event held when Wait was called, not for a later one.
TYPED_TEST(StreamConformance, RecordingAgainDoesNotMoveAnEarlierWait) {
  std::unique_ptr<Stream> other = this->MakeStream();
  std::unique_ptr<Event> event = this->MakeEvent();
  Latch latch = this->MakeLatch();
  ASSERT_OK(this->stream_->Record(*event));
  ASSERT_OK(other->Wait(*event));
  ASSERT_OK(Launch(*this->stream_, kSpin, latch.spin()));
  ASSERT_OK(this->stream_->Record(*event));
  EXPECT_OK(other->Synchronize());
  EXPECT_FALSE(*event->IsReached());
  latch.Open();
  EXPECT_OK(event->Synchronize());
}

TYPED_TEST(StreamConformance, EventsTellWhatWasReached) {
  std::unique_ptr<Event> event = this->MakeEvent();
  EXPECT_TRUE(*event->IsReached()) << "never recorded";
  EXPECT_OK(event->Synchronize());
  EXPECT_OK(this->stream_->Wait(*event));
  Latch latch = this->MakeLatch();
  ASSERT_OK(Launch(*this->stream_, kSpin, latch.spin()));
  ASSERT_OK(this->stream_->Record(*event));
  EXPECT_FALSE(*event->IsReached());
  latch.Open();
  EXPECT_OK(event->Synchronize());
  EXPECT_TRUE(*event->IsReached());
}

// C6 row 10.
TYPED_TEST(StreamConformance, TheFirstErrorSticksAndIsReturnedByEveryLaterCall) {
  std::unique_ptr<Stream> broken = this->MakeStream();
  std::unique_ptr<Event> event = this->MakeEvent();
  DeviceBuffer x = this->MakeInts({0});
  Launch(*broken, kFail, {}).IgnoreError();  // CUDA refuses at the launch, Host when it runs
  Launch(*broken, kAddOne, {x.As<int>().address(), 1}).IgnoreError();
  const absl::Status first = broken->Synchronize();
  EXPECT_STATUS(first, kInternal, "fail");
  EXPECT_EQ(broken->Fill(AsWritableBytes(x.As<int>()), std::byte{1}), first);
  EXPECT_EQ(broken->Copy(AsWritableBytes(x.As<int>()), AsBytes(x.As<int>())), first);
  EXPECT_EQ(Launch(*broken, kAddOne, {x.As<int>().address(), 1}), first);
  EXPECT_EQ(broken->Record(*event), first);
  EXPECT_EQ(broken->Wait(*event), first);
  EXPECT_EQ(broken->IsIdle().status(), first);
  EXPECT_EQ(broken->Synchronize(), first);
  EXPECT_EQ(this->Read(x), std::vector<int>{0}) << "work after the failure ran";
}

TYPED_TEST(StreamConformance, TheObserverSeesEachNodeAndCanRefuse) {
  DeviceBuffer x = this->MakeInts({0, 0});
  std::vector<std::string> seen;
  this->stream_->SetObserver([&](const std::string& node) -> absl::Status {
    seen.push_back(node);
    return node == "fill" ? absl::DataLossError("observer") : absl::OkStatus();
  });
  EXPECT_OK(Launch(*this->stream_, kAddOne, {x.As<int>().address(), 1}));
  EXPECT_OK(this->stream_->Copy(AsWritableBytes(x.As<int>().Sub(0, 1)), AsBytes(x.As<int>().Sub(1, 1))));
  EXPECT_STATUS(this->stream_->Fill(AsWritableBytes(x.As<int>()), std::byte{0}), kDataLoss, "observer");
  EXPECT_OK(Capture(*this->stream_, [&](Stream& s) { return Launch(s, kAddOne, {x.As<int>().address(), 1}); }));
  this->stream_->SetObserver(nullptr);
  EXPECT_EQ(this->Read(x).size(), 2u);
  EXPECT_EQ(seen, (std::vector<std::string>{"add_one", "copy", "fill"}));
}

TYPED_TEST(StreamConformance, AnAdoptedStreamSharesTheQueueOfItsOwner) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> adopted, this->device_->AdoptStream(this->stream_->native()));
  DeviceBuffer x = this->MakeInts({0, 0});
  int* address = x.As<int>().address();
  ASSERT_OK(Launch(*this->stream_, kDelay, {100'000}));
  ASSERT_OK(Launch(*this->stream_, kAddOne, {address, 1}));
  ASSERT_OK(Launch(*adopted, kCopyInts, {address + 1, address, 1}));
  adopted.reset();
  EXPECT_EQ(this->Read(x), (std::vector<int>{1, 1}));
  EXPECT_STATUS(this->device_->AdoptStream(nullptr), kInvalidArgument, "null");
}

TYPED_TEST(StreamConformance, AnEventOfAnotherDeviceIsRefused) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Device> host, CreateHostDevice({.enforce_accesses = true}));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Event> event, host->CreateEvent());
  EXPECT_STATUS(this->stream_->Record(*event), kInvalidArgument, "device");
  EXPECT_OK(this->stream_->Synchronize());
}

}  // namespace
}  // namespace pristine::testing
