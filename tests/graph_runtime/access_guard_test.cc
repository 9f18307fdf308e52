// Device::Watch on an enforcing Host device: undeclared writes are reported with node, region and index.
#include <gtest/gtest.h>

#include <mutex>
#include <string>

#include "tests/conformance/conformance.h"

namespace pristine::testing {
namespace {

class RecordingWatcher : public Watcher {
 public:
  void OnUndeclaredWrite(const UndeclaredWrite& write) override {
    std::lock_guard lock(mutex_);
    writes_.push_back(absl::StrCat(write.node, " wrote ", write.region, "[", write.index, "]"));
  }
  std::vector<std::string> Take() {
    std::lock_guard lock(mutex_);
    return std::exchange(writes_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> writes_;
};

using Strings = std::vector<std::string>;
constexpr int kPageInts = 1024;

template <class BackendT>
class AccessGuardTest : public ConformanceTest<BackendT> {
 protected:
  void TearDown() override {
    for (const int64_t id : ids_) this->device_->Unwatch(id);
    ConformanceTest<BackendT>::TearDown();
  }
  int64_t Watch(const char* name, int* address, size_t count, Watcher& watcher) {
    absl::StatusOr<int64_t> id = this->device_->Watch({name, address, count * sizeof(int), sizeof(int)}, &watcher);
    EXPECT_OK(id);
    ids_.push_back(*id);
    return *id;
  }
  void Run(const Kernel<SetValueParams>& kernel, int* values, int64_t index, int value, Stream* stream = nullptr) {
    if (stream == nullptr) stream = this->stream_.get();
    EXPECT_OK(Launch(*stream, kernel, {values, index, value}));
    EXPECT_OK(stream->Synchronize());
  }

  RecordingWatcher watcher_;
  std::vector<int64_t> ids_;
};
using HostBackends = ::testing::Types<HostEager, HostDeferred>;
TYPED_TEST_SUITE(AccessGuardTest, HostBackends, BackendNames);

TYPED_TEST(AccessGuardTest, AnUndeclaredWriteToPagesIsReportedAndLetThrough) {
  DeviceBuffer pages = this->MakeInts(std::vector<int>(3 * kPageInts, 1));
  int* address = pages.As<int>().address();
  EXPECT_NE(this->Watch("kv", address, 3 * kPageInts, this->watcher_), 0);
  this->Run(kSetValueUndeclared, address, 2 * kPageInts + 5, 7);
  EXPECT_EQ(this->watcher_.Take(), Strings{"set_value_undeclared wrote kv[2053]"});
  EXPECT_EQ(this->Read(pages)[2 * kPageInts + 5], 7) << "the program goes on as without the guard";
  this->Run(kSetValueUndeclared, address, 2 * kPageInts + 6, 8);
  EXPECT_EQ(this->watcher_.Take(), Strings{"set_value_undeclared wrote kv[2054]"}) << "protected again";
}

TYPED_TEST(AccessGuardTest, AnUndeclaredWriteToASmallUnalignedRegionIsReported) {
  std::vector<int> engine(100, 1);  // memory that the engine owns
  this->Watch("indptr", engine.data() + 1, 33, this->watcher_);
  this->Run(kSetValueUndeclared, engine.data(), 33, 7);
  EXPECT_EQ(this->watcher_.Take(), Strings{"set_value_undeclared wrote indptr[32]"});
  this->Run(kSetValueUndeclared, engine.data(), 34, 7);
  this->Run(kSetValueUndeclared, engine.data(), 0, 7);
  EXPECT_EQ(this->watcher_.Take(), Strings{}) << "outside";
}

TYPED_TEST(AccessGuardTest, TheTailThatFillsNoPageIsWatchedToo) {
  DeviceBuffer x = this->MakeInts(std::vector<int>(kPageInts + 3, 1));
  int* address = x.As<int>().address();
  this->Watch("x", address, kPageInts + 3, this->watcher_);
  this->Run(kSetValueUndeclared, address, kPageInts + 2, 7);
  EXPECT_EQ(this->watcher_.Take(), Strings{"set_value_undeclared wrote x[1026]"});
  this->Run(kSetValueUndeclared, address, kPageInts - 1, 7);
  EXPECT_EQ(this->watcher_.Take(), Strings{"set_value_undeclared wrote x[1023]"});
}

TYPED_TEST(AccessGuardTest, DeclaredWritesAreNotReported) {
  DeviceBuffer x = this->MakeInts(std::vector<int>(2 * kPageInts + 3, 1));
  int* address = x.As<int>().address();
  this->Watch("x", address, 2 * kPageInts + 3, this->watcher_);
  this->Run(kSetValue, address, 5, 7);
  this->Run(kSetValue, address, 2 * kPageInts + 1, 7);
  ASSERT_OK(Launch(*this->stream_, kAddOne, {address, 2 * kPageInts + 3}));
  ASSERT_OK(this->stream_->Fill(AsWritableBytes(x.As<int>()), std::byte{0}));
  ASSERT_OK(this->stream_->Synchronize());
  EXPECT_EQ(this->watcher_.Take(), Strings{});
  EXPECT_EQ(this->Read(x), std::vector<int>(2 * kPageInts + 3, 0));
}

TYPED_TEST(AccessGuardTest, OneNodeOverManyPagesIsReportedOnce) {
  DeviceBuffer x = this->MakeInts(std::vector<int>(8 * kPageInts + 1, 1));
  int* address = x.As<int>().address();
  this->Watch("x", address, 8 * kPageInts + 1, this->watcher_);
  ASSERT_OK(host::EnqueueForeign(this->stream_->native(), "foreign", [=] {
    return AddOneHost({address + 3, 8 * kPageInts - 2});
  }));
  ASSERT_OK(this->stream_->Synchronize());
  EXPECT_EQ(this->watcher_.Take(), Strings{"foreign wrote x[3]"});
  EXPECT_EQ(this->Read(x)[8 * kPageInts], 2);
}

TYPED_TEST(AccessGuardTest, TheNodeInsideAGraphIsNamed) {
  std::vector<int> engine(8, 1);
  DeviceBuffer x = this->MakeInts({0});
  this->Watch("engine", engine.data(), engine.size(), this->watcher_);
  std::unique_ptr<GraphExec> exec = this->MakeExec([&](Stream& stream) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {x.As<int>().address(), 1}));
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kSetValueUndeclared, {engine.data(), 4, 9}));
    return Launch(stream, kAddOne, {x.As<int>().address(), 1});
  });
  for (int i = 0; i < 2; ++i) {
    engine[4] = 0;
    ASSERT_OK(exec->Launch(*this->stream_));
    ASSERT_OK(this->stream_->Synchronize());
    EXPECT_EQ(this->watcher_.Take(), Strings{"set_value_undeclared wrote engine[4]"});
  }
}

TYPED_TEST(AccessGuardTest, EachManagerIsToldOfItsOwnRegions) {
  RecordingWatcher other;
  DeviceBuffer shared = this->MakeInts(std::vector<int>(2 * kPageInts, 1));
  DeviceBuffer mine = this->MakeInts(std::vector<int>(kPageInts, 1));
  int* address = shared.As<int>().address();
  this->Watch("a", address, 2 * kPageInts, this->watcher_);
  this->Watch("b", address, 2 * kPageInts, other);
  this->Watch("mine", mine.As<int>().address(), kPageInts, this->watcher_);
  this->Run(kSetValueUndeclared, address, 1, 7);
  EXPECT_EQ(this->watcher_.Take(), Strings{"set_value_undeclared wrote a[1]"});
  EXPECT_EQ(other.Take(), Strings{"set_value_undeclared wrote b[1]"});
  this->Run(kSetValueUndeclared, mine.As<int>().address(), 2, 7);
  EXPECT_EQ(this->watcher_.Take(), Strings{"set_value_undeclared wrote mine[2]"});
  EXPECT_EQ(other.Take(), Strings{});
  this->Run(kSetValue, address, 1, 8);
  EXPECT_EQ(this->watcher_.Take(), Strings{});
  EXPECT_EQ(other.Take(), Strings{});
}

// A declared writer on one stream runs while nodes of another stream come and go.
TYPED_TEST(AccessGuardTest, ConcurrentStreamsAreNotBlamedForEachOther) {
  DeviceBuffer pages = this->MakeInts(std::vector<int>(2 * kPageInts, 0));
  std::vector<int> small(16, 0);
  DeviceBuffer x = this->MakeInts({0});
  this->Watch("pages", pages.As<int>().address(), 2 * kPageInts, this->watcher_);
  this->Watch("small", small.data(), small.size(), this->watcher_);
  std::unique_ptr<Stream> other = this->MakeStream();
  for (int i = 0; i < 200; ++i) {
    ASSERT_OK(Launch(*this->stream_, kAddOne, {pages.As<int>().address(), 2 * kPageInts}));
    ASSERT_OK(Launch(*this->stream_, kAddOne, {small.data(), 16}));
    ASSERT_OK(Launch(*other, kDelay, {1000}));
    ASSERT_OK(Launch(*other, kAddOne, {x.As<int>().address(), 1}));
  }
  std::thread synchronize([&] { EXPECT_OK(other->Synchronize()); });  // deferred streams run together too
  EXPECT_OK(this->stream_->Synchronize());
  synchronize.join();
  EXPECT_EQ(this->watcher_.Take(), Strings{});
  EXPECT_EQ(small[15], 200);
  EXPECT_EQ(this->Read(pages)[2 * kPageInts - 1], 200);
  EXPECT_EQ(this->Read(x), std::vector<int>{200});
}

TYPED_TEST(AccessGuardTest, AnUndeclaredWriteBesideABlockedNodeIsReported) {
  std::vector<int> small(16, 0);
  Latch latch = this->MakeLatch();
  this->Watch("small", small.data(), small.size(), this->watcher_);
  std::unique_ptr<Stream> other = this->MakeStream();
  ASSERT_OK(Launch(*this->stream_, kSpin, latch.spin()));
  this->Run(kSetValueUndeclared, small.data(), 3, 9, other.get());
  const Strings reports = this->watcher_.Take();
  ASSERT_EQ(reports.size(), 1u);
  EXPECT_NE(reports[0].find("set_value_undeclared"), std::string::npos) << reports[0];
  EXPECT_NE(reports[0].find("small[3]"), std::string::npos) << reports[0];
  latch.Open();
  EXPECT_OK(this->stream_->Synchronize());
  EXPECT_EQ(this->watcher_.Take(), Strings{});
}

TYPED_TEST(AccessGuardTest, WhatTheProgramItselfWritesBetweenNodesIsNoNodesDoing) {
  std::vector<int> engine(16, 0);
  DeviceBuffer x = this->MakeInts({0});
  this->Watch("engine", engine.data(), engine.size(), this->watcher_);
  engine[3] = 5;
  this->Run(kSetValue, x.As<int>().address(), 0, 1);
  EXPECT_EQ(this->watcher_.Take(), Strings{});
}

TYPED_TEST(AccessGuardTest, UnwatchEndsReportsAndMakesTheMemoryWritable) {
  DeviceBuffer pages = this->MakeInts(std::vector<int>(kPageInts, 0));
  int* address = pages.As<int>().address();
  ASSERT_OK_AND_ASSIGN(const int64_t id,
                       this->device_->Watch({"pages", address, kPageInts * sizeof(int), sizeof(int)}, &this->watcher_));
  this->device_->Unwatch(id);
  this->Run(kSetValueUndeclared, address, 1, 7);
  EXPECT_EQ(this->watcher_.Take(), Strings{});
  address[2] = 1;  // would kill the process
  this->Watch("again", address, kPageInts, this->watcher_);
  this->Run(kSetValueUndeclared, address, 1, 8);
  EXPECT_EQ(this->watcher_.Take(), Strings{"set_value_undeclared wrote again[1]"});
}

TYPED_TEST(AccessGuardTest, FreeingWatchedMemoryEndsTheWatch) {
  DeviceBuffer pages = this->MakeInts(std::vector<int>(kPageInts, 0));
  this->Watch("pages", pages.As<int>().address(), kPageInts, this->watcher_);
  pages = DeviceBuffer();
  DeviceBuffer x = this->MakeInts({0});
  this->Run(kSetValueUndeclared, x.As<int>().address(), 0, 1);
  EXPECT_EQ(this->watcher_.Take(), Strings{});
}

TYPED_TEST(AccessGuardTest, TwoEnforcingDevicesDoNotMeet) {
  RecordingWatcher other_watcher;
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Device> other, TypeParam::Create());
  {
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> other_stream, other->CreateStream());
    ASSERT_OK_AND_ASSIGN(DeviceBuffer theirs, other->Allocate(kPageInts * sizeof(int), "theirs"));
    DeviceBuffer mine = this->MakeInts(std::vector<int>(kPageInts, 0));
    this->Watch("mine", mine.As<int>().address(), kPageInts, this->watcher_);
    ASSERT_OK_AND_ASSIGN(const int64_t id,
                         other->Watch({"theirs", theirs.As<int>().address(), theirs.bytes(), 4}, &other_watcher));
    std::thread run_other([&] {
      for (int i = 0; i < 20; ++i) this->Run(kSetValueUndeclared, theirs.As<int>().address(), i, i, other_stream.get());
    });
    for (int i = 0; i < 20; ++i) this->Run(kSetValueUndeclared, mine.As<int>().address(), i, i);
    run_other.join();
    EXPECT_EQ(this->watcher_.Take().size(), 20u);
    const Strings reports = other_watcher.Take();
    EXPECT_EQ(reports.size(), 20u);
    EXPECT_EQ(reports[3], "set_value_undeclared wrote theirs[3]");
    other->Unwatch(id);
  }
  other.reset();
  DeviceBuffer mine = this->MakeInts(std::vector<int>(kPageInts, 0));
  this->Watch("later", mine.As<int>().address(), kPageInts, this->watcher_);
  this->Run(kSetValueUndeclared, mine.As<int>().address(), 9, 1);
  EXPECT_EQ(this->watcher_.Take(), Strings{"set_value_undeclared wrote later[9]"}) << "the handler is still there";
}

TYPED_TEST(AccessGuardTest, BadRegionsAreRefused) {
  int x = 0;
  EXPECT_STATUS(this->device_->Watch({"x", nullptr, 4, 4}, &this->watcher_), kInvalidArgument, "'x'");
  EXPECT_STATUS(this->device_->Watch({"x", &x, 0, 4}, &this->watcher_), kInvalidArgument, "0 bytes");
  EXPECT_STATUS(this->device_->Watch({"x", &x, 4, 0}, &this->watcher_), kInvalidArgument, "elements of 0");
  EXPECT_STATUS(this->device_->Watch({"x", &x, 4, 4}, nullptr), kInvalidArgument, "'x'");
  this->device_->Unwatch(0);
  this->device_->Unwatch(12345);
}

TEST(AccessGuardOffTest, WithoutEnforcementNothingIsWatched) {
  RecordingWatcher watcher;
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Device> device, CreateHostDevice());
  EXPECT_FALSE(device->enforces_accesses());
  int x = 0;
  ASSERT_OK_AND_ASSIGN(const int64_t id, device->Watch({"x", &x, 4, 4}, &watcher));
  EXPECT_EQ(id, 0);
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> stream, device->CreateStream());
  ASSERT_OK(Launch(*stream, kSetValueUndeclared, {&x, 0, 1}));
  ASSERT_OK(stream->Synchronize());
  EXPECT_TRUE(watcher.Take().empty());
}

}  // namespace
}  // namespace pristine::testing
