// A kernel that traps or writes what is sealed loses the device: every later call returns one final status, which has
// the last violation. On CUDA that is final for the process, so each test runs in a child.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pristine/buffers/pollution.h"
#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

constexpr Extent kBucket{4, 4};
using Ints = std::vector<int32_t>;

constexpr char kBadLength[] =
    "invalid value: lengths[1] is 500, bound 100 (graph decode {4 requests, 4 tokens}, replay ";

template <class BackendT>
class DeviceLostDeathTest : public BufferTest<BackendT> {
 protected:
  static void SetUpTestSuite() { ::testing::FLAGS_gtest_death_test_style = "threadsafe"; }

  // A manager, a captured graph and one object of each kind, all of them well.
  void MakeAll(OnViolation on_violation) {
    ManagerOptions options;
    options.on_violation = on_violation;
    this->MakeManager(options);
    BufferSpec spec = Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests());
    spec.limit = 100;
    lengths_ = this->Register(spec, Ints(4, 3));
    constant_ = this->Register(Spec("constant", Role::kConstant), {1, 2});
    ints_ = this->EngineMemory({0, 0});
    this->Capture({kBucket}, kEmptyBody);
    ASSERT_OK_AND_ASSIGN(graph_, pristine::Capture(*this->stream(), [this](Stream& stream) {
                           return Launch(stream, kSetValue, Store());
                         }));
    ASSERT_OK_AND_ASSIGN(exec_, graph_->Instantiate());
    ASSERT_OK_AND_ASSIGN(event_, this->device().CreateEvent());
    ASSERT_OK_AND_ASSIGN(other_stream_, this->device().CreateStream());
    ASSERT_OK_AND_ASSIGN(open_, this->device().AllocateProtected(8, "open"));
    ASSERT_OK(this->stream()->Synchronize());
    ASSERT_OK(this->device().status());
  }
  SetValueParams Store() { return {ints_.address(), 0, 1}; }

  absl::Status StepWithLengths(const Ints& lengths) {
    const Extent extent{static_cast<int32_t>(lengths.size()), static_cast<int32_t>(lengths.size())};
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kBucket, extent));
    PRISTINE_RETURN_IF_ERROR(this->Refill(lengths_, lengths));
    return this->Replay(kBucket, extent);
  }

  // In the child, with the device just lost as `seen` says. Ends the process: 0 if every call returns that very status,
  // which names `violation` ("": none), reports can still be polled, and everything can be destroyed.
  [[noreturn]] void ExpectTheEnd(const absl::Status& seen, const std::string& violation) {
    int wrong = 0;
    const auto expect = [&wrong](bool good, const std::string& what) {
      if (!good) ++wrong;
      if (!good) std::fprintf(stderr, "WRONG: %s\n", what.c_str());
    };
    std::fprintf(stderr, "%s\n", seen.ToString().c_str());
    expect(IsDeviceLost(seen) && seen.code() == absl::StatusCode::kAborted, "not a lost device");
    expect(LastViolation(seen) == violation, "the violation is \"" + LastViolation(seen) + "\"");
    const std::string message(seen.message());
    expect(message.find(violation.empty() ? "no violation was recorded" : violation) != std::string::npos,
           "the message does not name the violation");
    expect(message.find(this->device().name()) != std::string::npos, "the message does not name the device");
    const auto calls = LaterCalls();
    for (const auto& [name, call] : calls) {
      const absl::Status status = call();
      expect(status == seen, name + ": " + status.ToString());
    }
    const std::vector<Violation> polled = this->Poll();
    expect(violation.empty() ? polled.empty() : !polled.empty() && polled.back().ToString() == violation,
           "Poll: " + Describe(polled));
    expect(this->manager().stats().lost_reports == 0, "stats");
    DestroyAll();
    if (::testing::Test::HasFailure()) ++wrong;
    std::fprintf(stderr, "%s\n", wrong == 0 ? "every call said so" : "some call did not");
    std::_Exit(wrong == 0 ? 0 : 1);
  }

  std::vector<std::pair<std::string, std::function<absl::Status()>>> LaterCalls() {
    Device& device = this->device();
    Stream& stream = *this->stream();
    BufferManager& manager = this->manager();
    const auto bytes = [this] { return AsWritableBytes(ints_); };
    static std::byte host[8] = {};
    return {
        {"Device::status", [&device] { return device.status(); }},
        {"Allocate", [&device] { return device.Allocate(64, "late").status(); }},
        {"AllocatePinned", [&device] { return device.AllocatePinned(64, "late").status(); }},
        {"AllocateProtected", [&device] { return device.AllocateProtected(64, "late").status(); }},
        {"CreateStream", [&device] { return device.CreateStream().status(); }},
        {"AdoptStream", [&device, &stream] { return device.AdoptStream(stream.native()).status(); }},
        {"CreateEvent", [&device] { return device.CreateEvent().status(); }},
        {"Device::Synchronize", [&device] { return device.Synchronize(); }},
        {"ProtectedBuffer::Write",
         [this] {
           return open_.Write(0, {host, 8});
         }},
        {"ProtectedBuffer::Seal", [this] { return open_.Seal(); }},
        {"Copy", [=, &stream] { return stream.Copy(bytes(), bytes()); }},
        {"CopyFromHost",
         [=, &stream] {
           return stream.CopyFromHost(bytes(), {host, 8});
         }},
        {"CopyToHost", [=, &stream] { return stream.CopyToHost(absl::MakeSpan(host), bytes()); }},
        {"Fill", [=, &stream] { return stream.Fill(bytes(), std::byte{0}); }},
        {"Launch", [this, &stream] { return Launch(stream, kSetValue, Store()); }},
        {"Record", [this, &stream] { return stream.Record(*event_); }},
        {"Wait", [this, &stream] { return stream.Wait(*event_); }},
        {"Stream::Synchronize", [&stream] { return stream.Synchronize(); }},
        {"IsIdle", [&stream] { return stream.IsIdle().status(); }},
        {"Launch on another stream", [this] { return Launch(*other_stream_, kSetValue, Store()); }},
        {"Synchronize another stream", [this] { return other_stream_->Synchronize(); }},
        {"IsReached", [this] { return event_->IsReached().status(); }},
        {"Event::Synchronize", [this] { return event_->Synchronize(); }},
        {"Capture", [&stream] { return pristine::Capture(stream, [](Stream&) { return absl::OkStatus(); }).status(); }},
        {"Instantiate", [this] { return graph_->Instantiate().status(); }},
        {"Upload", [this, &stream] { return exec_->Upload(stream); }},
        {"SetKernelParams", [this] { return exec_->SetKernelParams(0, kSetValue, Store()); }},
        {"GraphExec::Launch", [this, &stream] { return exec_->Launch(stream); }},
        {"Recapture", [this, &stream] { return this->runner_->Recapture(stream, kBucket); }},
        {"CaptureAll", [this, &stream] { return this->runner_->CaptureAll(stream); }},
        {"Replay",
         [this, &stream] {
           return this->runner_->Replay(stream, kBucket, {1, 1});
         }},
        {"BufferManager::Create", [&device] { return BufferManager::Create(device).status(); }},
        {"Register", [&manager] { return manager.Register<int32_t>(Spec("late", Role::kConstant), Ints{1}).status(); }},
        {"Adopt", [this, &manager] { return manager.Adopt(Spec("late", Role::kConstant), ints_).status(); }},
        {"Seal", [&manager] { return manager.Seal(); }},
        {"BeginStep",
         [&manager] {
           return manager.BeginStep(kBucket, {1, 1});
         }},
        {"Refill", [this] { return this->Refill(lengths_, {1}); }},
        {"Keep", [this, &manager] { return manager.Keep(lengths_); }},
        {"WaitForSlot", [&manager] { return manager.WaitForSlot(); }},
        {"BeforeReplay",
         [&manager, &stream] {
           return manager.BeforeReplay(stream, kBucket, {1, 1});
         }},
        {"RecordPrologue", [&manager, &stream] { return manager.RecordPrologue(stream, kBucket); }},
        {"Restore", [&manager, &stream] { return manager.Restore(stream); }},
        {"RestoreAll", [&manager, &stream] { return manager.RestoreAll(stream, kBucket); }},
        {"CheckEqual", [this, &manager, &stream] { return manager.CheckEqual(stream, lengths_, lengths_, kBucket); }},
        {"Verify", [&manager, &stream] { return manager.Verify(stream).status(); }},
        {"FindPolluter",
         [&manager, &stream] {
           return FindPolluter(manager, stream, kBucket, [](Stream&) { return absl::OkStatus(); }).status();
         }},
    };
  }

  void DestroyAll() {
    exec_ = nullptr;
    graph_ = nullptr;
    event_ = nullptr;
    other_stream_ = nullptr;
    open_ = ProtectedBuffer();
    this->TearDown();
    this->device_ = nullptr;
  }
  void TearDown() override {
    exec_ = nullptr;
    graph_ = nullptr;
    event_ = nullptr;
    other_stream_ = nullptr;
    open_ = ProtectedBuffer();
    BufferTest<BackendT>::TearDown();
  }

  Buffer<int32_t> lengths_, constant_;
  DeviceSpan<int32_t> ints_;
  std::unique_ptr<Graph> graph_;
  std::unique_ptr<GraphExec> exec_;
  std::unique_ptr<Event> event_;
  std::unique_ptr<Stream> other_stream_;
  ProtectedBuffer open_;
};
TYPED_TEST_SUITE(DeviceLostDeathTest, AllBackends, BackendNames);

TYPED_TEST(DeviceLostDeathTest, AfterATrapEachCallReturnsTheViolationThatLedToIt) {
  this->MakeAll(OnViolation::kTrap);
  ASSERT_OK(this->StepWithLengths({1, 2}));
  EXPECT_EXIT(this->ExpectTheEnd(this->StepWithLengths({1, 500}), std::string(kBadLength) + "2)"),
              ::testing::ExitedWithCode(0), " found (.|\n)*every call said so");
}

// Host cannot survive a store to sealed memory (it dies of SIGSEGV, at the store): a trap stands for it.
TYPED_TEST(DeviceLostDeathTest, AfterAWriteToASealedOriginalEachCallReturnsTheLastViolationBefore) {
  this->MakeAll(OnViolation::kRecord);
  ASSERT_OK(this->StepWithLengths({2, 500}));
  ASSERT_OK(this->StepWithLengths({1, 2}));
  EXPECT_EXIT(
      {
        const auto* original = reinterpret_cast<const int*>(this->manager().original(this->constant_.id).address());
        const absl::Status queued =
            this->device().backend() == Backend::kHost
                ? Launch(*this->stream(), kTrap, {0})
                : Launch(*this->stream(), kSetValue, SetValueParams{const_cast<int*>(original), 1, 7});
        if (!queued.ok()) std::_Exit(2);
        this->ExpectTheEnd(this->stream()->Synchronize(), std::string(kBadLength) + "1)");
      },
      ::testing::ExitedWithCode(0), "every call said so");
}

TYPED_TEST(DeviceLostDeathTest, WithoutAViolationTheStatusSaysThatThereWasNone) {
  this->MakeAll(OnViolation::kNeutralise);
  EXPECT_EXIT(
      {
        Launch(*this->other_stream_, kTrap, {0}).IgnoreError();
        this->other_stream_->Synchronize().IgnoreError();
        this->ExpectTheEnd(this->stream()->Synchronize(), "");
      },
      ::testing::ExitedWithCode(0), "every call said so");
}

TYPED_TEST(DeviceLostDeathTest, ATrapInsideACaptureBodysWarmUpEndsTheCapture) {
  this->MakeAll(OnViolation::kNeutralise);
  EXPECT_EXIT(
      {
        absl::StatusOr<std::unique_ptr<GraphRunner>> runner =
            GraphRunner::Create({.name = "traps", .buckets = {kBucket}, .warmups = 1},
                                [](Stream& stream, const Extent&) { return Launch(stream, kTrap, {0}); });
        (*runner)->AddHook(this->manager()).IgnoreError();
        const absl::Status seen = (*runner)->CaptureAll(*this->stream());
        if (this->device().capturing_streams() != 0) std::_Exit(3);
        *runner = nullptr;
        this->ExpectTheEnd(seen, "");
      },
      ::testing::ExitedWithCode(0), "every call said so");
}

TYPED_TEST(DeviceLostDeathTest, AManagerThatIsGoneIsNotAsked) {
  this->MakeAll(OnViolation::kRecord);
  ASSERT_OK(this->StepWithLengths({1, 500}));
  EXPECT_EXIT(
      {
        this->runner_ = nullptr;
        this->manager_ = nullptr;
        Launch(*this->stream(), kTrap, {0}).IgnoreError();
        const absl::Status seen = this->stream()->Synchronize();
        const bool good = IsDeviceLost(seen) && LastViolation(seen).empty() && this->device().status() == seen;
        this->DestroyAll();
        std::_Exit(good ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "");
}

// What Host can show without a child: a device is an object there.
class HostDeviceLost : public BufferTest<HostEager> {};

TEST_F(HostDeviceLost, OtherDevicesGoOnAndQueuedWorkIsSkipped) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Device> other, HostEager::Create());
  const DeviceSpan<int32_t> ints = EngineMemory({0});
  ASSERT_OK_AND_ASSIGN(PinnedBuffer flag, device().AllocatePinned(sizeof(int), "flag"));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> side, device().CreateStream());
  ASSERT_OK(Launch(*side, kSpin, {static_cast<int*>(flag.device_address())}));
  ASSERT_OK(Launch(*side, kAddOne, {ints.address(), 1}));
  ASSERT_OK(Launch(*stream(), kTrap, {0}));
  const absl::Status seen = stream()->Synchronize();
  EXPECT_TRUE(IsDeviceLost(seen)) << seen;
  EXPECT_STATUS(seen, kAborted, "host (eager) is lost, for good: Stream::Synchronize found \"kernel trap trapped\"");
  std::atomic_ref<int>(*flag.As<int>().data()).store(1);
  EXPECT_EQ(side->Synchronize(), seen) << "waits for what runs, and says why";
  EXPECT_EQ(*ints.address(), 0) << "queued behind, and run nevertheless";
  ASSERT_OK_AND_ASSIGN(DeviceBuffer memory, other->Allocate(4, "elsewhere"));
}

TEST_F(HostDeviceLost, AnUndeclaredWriteIsAViolationTooAndTheStatusNamesTheNode) {
  MakeManager();
  const Buffer<int32_t> constant = Register(Spec("constant", Role::kConstant), {1, 2});
  Capture({kBucket}, kEmptyBody);
  ASSERT_OK(Launch(*stream(), kSetValueUndeclared, {constant.live.address(), 1, 7}));
  ASSERT_OK(stream()->Synchronize());
  ASSERT_OK(Launch(*stream(), kTrap, {0}));
  const absl::Status seen = stream()->Synchronize();
  EXPECT_NE(LastViolation(seen).find("undeclared write: constant[1]"), std::string::npos) << seen;
  EXPECT_NE(LastViolation(seen).find("node set_value_undeclared"), std::string::npos) << seen;
  EXPECT_EQ(Poll().size(), 1u) << "the status took no report away";
}

TEST_F(HostDeviceLost, EachManagerHasItsWord) {
  std::vector<std::unique_ptr<BufferManager>> managers;
  for (const char* name : {"a", "b"}) {
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<BufferManager> manager, BufferManager::Create(device()));
    ASSERT_OK_AND_ASSIGN(const Buffer<int32_t> buffer,
                         manager->Register<int32_t>(Spec(name, Role::kConstant), Ints{1, 2}));
    ASSERT_OK(manager->Seal());
    ASSERT_OK(Launch(*stream(), kSetValueUndeclared, {buffer.live.address(), 0, 7}));
    managers.push_back(std::move(manager));
  }
  ASSERT_OK(Launch(*stream(), kTrap, {0}));
  const std::string words = LastViolation(stream()->Synchronize());
  EXPECT_NE(words.find("undeclared write: a[0]"), std::string::npos) << words;
  EXPECT_NE(words.find("\nundeclared write: b[0]"), std::string::npos) << words;
}

// A kernel that returns another number fails its stream, as a launch that CUDA refuses does, and no device.
TEST_F(HostDeviceLost, AFailedKernelIsFinalForItsStreamOnly) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> broken, device().CreateStream());
  ASSERT_OK(Launch(*broken, kFail, {0}));
  const absl::Status failed = broken->Synchronize();
  EXPECT_STATUS(failed, kInternal, "kernel fail returned 7");
  EXPECT_FALSE(IsDeviceLost(failed));
  EXPECT_EQ(LastViolation(failed), "");
  EXPECT_OK(device().status());
  EXPECT_OK(stream()->Synchronize());
}

}  // namespace
}  // namespace pristine::testing
