// What Verify, CheckEqual, Poll, LastWriter and FindPolluter say.
#include <array>
#include <csignal>
#include <cstdlib>

#include "pristine/buffers/pollution.h"
#include "tests/buffers/buffer_fixture.h"
#include "tests/buffers/engine.h"

namespace pristine::testing {
namespace {

constexpr Extent kSmall{2, 2};
constexpr Extent kLarge{4, 4};
using Ints = std::vector<int32_t>;

template <class BackendT>
class CheckTest : public BufferTest<BackendT> {
 protected:
  std::vector<Violation> Verify() {
    absl::StatusOr<std::vector<Violation>> found = this->manager().Verify(*this->stream());
    EXPECT_OK(found);
    return found.ok() ? *found : std::vector<Violation>();
  }
};
TYPED_TEST_SUITE(CheckTest, AllBackends, BackendNames);

TYPED_TEST(CheckTest, GuardBandsNameTheBufferBeforeThem) {
  this->MakeManager();
  std::vector<DeviceSpan<std::byte>> live;
  for (const Role role : {Role::kConstant, Role::kRestored, Role::kRefilled, Role::kScratch}) {
    for (const char* which : {".a", ".b", ".c"}) {
      live.push_back(AsWritableBytes(this->Register(Spec(ToString(role) + std::string(which), role), {1, 2, 3}).live));
    }
  }
  // In the order registered: constants in one arena, the rest in another.
  ASSERT_OK(this->manager().Seal());
  ASSERT_EQ(Describe(this->Verify()), "");
  struct Case {
    int buffer;
    std::ptrdiff_t offset;
    const char* blamed;
    int64_t index;  // -1: not known here, the bytes between two buffers depend on the device
  };
  for (const Case& test : std::vector<Case>{{0, -1, "constant.a", -1},
                                            {0, 12, "constant.a", 12},
                                            {1, -1, "constant.a", -1},
                                            {2, 12, "constant.c", 12},
                                            {2, 12 + 255, "constant.c", 12 + 255},
                                            {3, -1, "restored.a", -1},
                                            {5, 12, "restored.c", 12},
                                            {6, -256, "restored.c", -1},
                                            {11, 12, "scratch.c", 12}}) {
    std::byte* const address = live[static_cast<size_t>(test.buffer)].address() + test.offset;
    this->Overwrite(address, std::byte{0});
    const std::vector<Violation> found = this->Verify();
    ASSERT_EQ(found.size(), 1u) << Describe(found);
    EXPECT_EQ(found[0].kind, Violation::Kind::kGuardBand);
    EXPECT_STREQ(found[0].buffer, test.blamed) << "byte " << test.offset << " of " << this->manager().name(test.buffer);
    EXPECT_EQ(found[0].index, test.index < 0 ? found[0].index : test.index);
    EXPECT_EQ(found[0].expected, 0xA5);
    EXPECT_EQ(found[0].actual, 0);
    this->Overwrite(address, std::byte{0xA5});
  }
  EXPECT_EQ(Describe(this->Verify()), "");
}

TYPED_TEST(CheckTest, VerifyReportsAPollutedConstantAndDoesNotHeal) {
  ManagerOptions options;
  options.check = ManagerOptions::Check::kOff;
  this->MakeManager(options);
  const auto constant = this->template Register<int64_t>(Spec("scale", Role::kConstant), {1, -2, 3});
  const auto restored = this->Register(Spec("restored", Role::kRestored), {1, 2});
  this->Capture({kLarge}, kEmptyBody);
  this->Overwrite(AsWritableBytes(constant.live).address() + 8, std::byte{0});
  this->Overwrite(AsWritableBytes(restored.live).address(), std::byte{9});
  ASSERT_OK(this->Step(kLarge, kLarge));
  EXPECT_EQ(Describe(this->Poll()), "") << "checks are off";
  for (int again = 0; again < 2; ++again) {
    const std::vector<Violation> found = this->Verify();
    ASSERT_EQ(found.size(), 1u) << Describe(found);
    EXPECT_EQ(found[0].kind, Violation::Kind::kPolluted);
    EXPECT_STREQ(found[0].buffer, "scale");
    EXPECT_EQ(found[0].index, 1);
    EXPECT_EQ(found[0].expected, -2);
    EXPECT_EQ(found[0].actual, -256);
    EXPECT_EQ(found[0].ToString(), "polluted: scale[1] is -256, was -2");
  }
}

TYPED_TEST(CheckTest, OriginalsAreSealedAndSurviveWhateverLiveMemoryGoesThrough) {
  this->MakeManager();
  const auto restored = this->Register(Spec("restored", Role::kRestored), {1, 2});
  EXPECT_TRUE(this->manager().original(restored.id).empty());
  this->Capture({kLarge}, kEmptyBody);
  const DeviceSpan<const std::byte> original = this->manager().original(restored.id);
  ASSERT_EQ(original.size(), 8u);
  Ints values(2);
  ASSERT_OK(this->stream()->CopyToHost({reinterpret_cast<std::byte*>(values.data()), 8}, original));
  ASSERT_OK(this->stream()->Synchronize());
  EXPECT_EQ(values, (Ints{1, 2}));
  EXPECT_TRUE(this->manager().sealed());
  EXPECT_TRUE(this->manager().original(-1).empty());
  EXPECT_TRUE(this->manager().original(1).empty());
}

TYPED_TEST(CheckTest, NothingCanWriteASealedOriginal) {
  this->MakeManager();
  const auto restored = this->Register(Spec("restored", Role::kRestored), {1, 2});
  this->Capture({kLarge}, kEmptyBody);
  if (this->manager().protection_level() != ProtectionLevel::kHardware) GTEST_SKIP() << "digests only";
  auto* const original = const_cast<std::byte*>(this->manager().original(restored.id).address());
  EXPECT_FALSE(this->stream()->Fill({original, 8}, std::byte{0}).ok() && this->stream()->Synchronize().ok());
  EXPECT_EQ(Describe(this->Verify()), "");
}

TYPED_TEST(CheckTest, AStoreToASealedOriginalDies) {
  if (this->device().backend() != Backend::kHost) GTEST_SKIP() << "host memory only";
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  // A sanitizer would turn the signal into its own report.
  for (const char* name : {"ASAN_OPTIONS", "TSAN_OPTIONS"}) {
    const char* const old = std::getenv(name);
    setenv(name, (std::string(old != nullptr ? old : "") + ":handle_segv=0").c_str(), 1);
  }
  EXPECT_EXIT(
      {
        this->MakeManager();
        const auto restored = this->Register(Spec("restored", Role::kRestored), {1, 2});
        this->Capture({kLarge}, kEmptyBody);
        *const_cast<volatile std::byte*>(this->manager().original(restored.id).address()) = std::byte{0};
      },
      ::testing::KilledBySignal(SIGSEGV), "");
}

TYPED_TEST(CheckTest, WhereOriginalsCannotBeProtectedVerifyNamesTheOneThatChanged) {
  this->stream_.reset();
  const auto run = this->device().name() == "host (deferred)" ? HostOptions::Run::kDeferred : HostOptions::Run::kEager;
  absl::StatusOr<std::unique_ptr<Device>> device =
      this->device().backend() == Backend::kCuda
          ? CreateCudaDevice(0, {.protect = false})
          : CreateHostDevice({.run = run, .enforce_accesses = true, .protect = false});
  ASSERT_OK(device);
  this->device_ = *std::move(device);
  ASSERT_OK_AND_ASSIGN(this->stream_, this->device().CreateStream());
  this->MakeManager();
  this->Register(Spec("first", Role::kConstant), {1, 2, 3});
  const auto second = this->Register(Spec("second", Role::kRestored), {4, 5, 6});
  this->Capture({kLarge}, kEmptyBody);
  EXPECT_EQ(this->manager().protection_level(), ProtectionLevel::kDigest);
  EXPECT_EQ(Describe(this->Verify()), "");
  this->Overwrite(const_cast<std::byte*>(this->manager().original(second.id).address()) + 8, std::byte{99});
  const std::vector<Violation> found = this->Verify();
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_EQ(found[0].kind, Violation::Kind::kOriginalChanged);
  EXPECT_STREQ(found[0].buffer, "second");
  EXPECT_EQ(found[0].index, 2);
  EXPECT_EQ(found[0].expected, 6);
  EXPECT_EQ(found[0].actual, 99);
}

TYPED_TEST(CheckTest, CheckEqualReportsTheFirstDifferenceAndTheBodyGoesOn) {
  this->MakeManager();
  const auto planned =
      this->Register(Spec("kv_indptr", Role::kRefilled, Kind::kIndptr, Axis::RequestsPlusOne()), {0, 10, 20, 30, 40});
  const auto converted = this->Register(Spec("kv_indptr_ws", Role::kRestored, Kind::kIndptr, Axis::RequestsPlusOne()),
                                        {0, 10, 20, 30, 40});
  const auto after = this->EngineMemory({0});
  this->Capture({kSmall, kLarge}, [&](Stream& stream, const Extent& bucket) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(this->manager().CheckEqual(stream, planned, converted, bucket));
    return Launch(stream, kAddOne, AddOneParams{after.address(), 1});
  });
  EXPECT_EQ(Describe(this->Poll()), "") << "warm-ups compare originals";
  const Ints before = this->Read(after);
  ASSERT_OK(this->manager().BeginStep(kSmall, {2, 2}));
  ASSERT_OK(this->Refill(planned, {0, 10, 19}));
  ASSERT_OK(this->Replay(kSmall, {2, 2}));
  const std::vector<Violation> found = this->Poll();
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_EQ(found[0].ToString(),
            "plan and conversion disagree: kv_indptr_ws[2]: planned 19, converted 20 (graph decode {2 requests, 2 "
            "tokens}, replay 1)");
  EXPECT_EQ(this->Read(after)[0], before[0] + 1);
  // What lies beyond the bucket does not count.
  ASSERT_OK(this->manager().BeginStep(kSmall, {2, 2}));
  ASSERT_OK(this->Refill(planned, {0, 10, 20}));
  this->Overwrite(AsWritableBytes(planned.live).address() + 12, std::byte{99});
  ASSERT_OK(this->Replay(kSmall, {2, 2}));
  EXPECT_EQ(Describe(this->Poll()), "");
  EXPECT_STATUS(this->manager().CheckEqual(*this->stream(), planned, converted, {5, 5}), kOutOfRange, "6 elements");
  EXPECT_STATUS(this->manager().CheckEqual(*this->stream(), planned, {99, {}}, kSmall), kInvalidArgument, "99");
}

TYPED_TEST(CheckTest, PollGivesReportsInOrderAndCountsThoseItCouldNotKeep) {
  this->MakeManager();
  const auto one = this->Register(Spec("one", Role::kConstant), {1});
  const auto two = this->Register(Spec("two", Role::kConstant), {2});
  const auto live = this->Register(Spec("live", Role::kScratch), {0});
  ASSERT_OK(this->manager().Seal());
  constexpr int kReports = 5000, kKept = 4096;
  for (int i = 0; i < kReports; ++i) {
    ASSERT_OK(Launch(*this->stream(), kSetValue, SetValueParams{live.live.address(), 0, 1000 + i}));
    ASSERT_OK(this->manager().CheckEqual(*this->stream(), i % 2 == 0 ? one : two, live, {1, 1}));
    if (i == 9) {
      ASSERT_OK(this->stream()->Synchronize());
      std::array<Violation, 3> few;
      ASSERT_EQ(this->manager().Poll(absl::MakeSpan(few)), 3u);
      EXPECT_EQ(few[0].actual, 1000);
      EXPECT_EQ(few[2].actual, 1002);
      EXPECT_EQ(few[1].expected, 2);
    }
  }
  ASSERT_OK(this->stream()->Synchronize());
  const std::vector<Violation> found = this->Verify();
  ASSERT_EQ(found.size(), static_cast<size_t>(kKept));
  for (int i = 0; i < kKept; ++i) ASSERT_EQ(found[i].actual, 1000 + kReports - kKept + i);
  EXPECT_EQ(this->manager().stats().lost_reports, kReports - kKept - 3);
}

TYPED_TEST(CheckTest, LastWriterNamesTheLastGraphThatCoversAnIndex) {
  this->MakeManager();
  const auto indptr =
      this->Register(Spec("ws", Role::kRestored, Kind::kIndptr, Axis::RequestsPlusOne()), {0, 1, 2, 3, 4, 5});
  const auto constant = this->Register(Spec("constant", Role::kConstant), {1});
  EXPECT_STATUS(this->manager().LastWriter(indptr.id, 0), kNotFound, "ran yet");
  this->Capture({kSmall, kLarge}, kEmptyBody);
  ASSERT_OK(this->Step(kLarge, kLarge));
  ASSERT_OK(this->Step(kSmall, kSmall));
  ASSERT_OK(this->Step(kSmall, {1, 1}));
  const auto expect = [&](int64_t index, const Extent& bucket, int64_t replay) {
    ASSERT_OK_AND_ASSIGN(const BufferManager::Writer writer, this->manager().LastWriter(indptr.id, index));
    EXPECT_STREQ(writer.graph, "decode");
    EXPECT_EQ(writer.bucket, bucket);
    EXPECT_EQ(writer.replay, replay);
  };
  expect(2, kSmall, 3);
  expect(3, kLarge, 1);
  ASSERT_OK(this->runner_->Recapture(*this->stream(), kLarge));
  expect(2, kLarge, 0);
  EXPECT_STATUS(this->manager().LastWriter(indptr.id, 5), kNotFound, "covers ws[5]");
  EXPECT_STATUS(this->manager().LastWriter(indptr.id, 6), kOutOfRange, "it has 6");
  EXPECT_STATUS(this->manager().LastWriter(constant.id, 0), kInvalidArgument, "not a restored buffer");
}

TYPED_TEST(CheckTest, FindPolluterNamesTheNode) {
  this->MakeManager();
  const auto constant = this->Register(Spec("constant", Role::kConstant), {1, 2, 3});
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 1));
  const auto restored = this->Register(Spec("restored", Role::kRestored), {1, 2, 3});
  int32_t* const past_the_end = constant.live.address() + 3;
  const auto body = [&](Stream& stream) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, AddOneParams{restored.live.address(), 3}));
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kSetValueUndeclared, SetValueParams{constant.live.address(), 2, 9}));
    PRISTINE_RETURN_IF_ERROR(
        Launch(stream, kCopyInts, CopyIntsParams{lengths.live.address(), restored.live.address(), 2}));
    PRISTINE_RETURN_IF_ERROR(EngineFill(stream, past_the_end, 0));
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, AddOneParams{restored.live.address(), 3}));
    return EngineFill(stream, constant.live.address(), 5);
  };
  ASSERT_OK_AND_ASSIGN(const std::vector<Violation> found,
                       FindPolluter(this->manager(), *this->stream(), kLarge, body));
  ASSERT_EQ(found.size(), 4u) << Describe(found);
  EXPECT_STREQ(found[0].node, "set_value_undeclared");
  EXPECT_STREQ(found[0].buffer, "constant");
  EXPECT_EQ(found[0].index, 2);
  EXPECT_EQ(found[0].expected, 3);
  EXPECT_EQ(found[0].actual, 9);
  EXPECT_STREQ(found[1].node, "copy_ints");
  EXPECT_STREQ(found[1].buffer, "lengths");
  EXPECT_EQ(found[1].index, 0);
  EXPECT_STREQ(found[2].node, "before add_one");
  EXPECT_EQ(found[2].kind, Violation::Kind::kGuardBand);
  EXPECT_STREQ(found[2].buffer, "constant");
  EXPECT_EQ(found[2].index, 12);
  EXPECT_STREQ(found[3].node, "before the end of the body");
  EXPECT_STREQ(found[3].buffer, "constant");
  EXPECT_EQ(found[3].index, 0);
  // All is put back, and the observer is off.
  EXPECT_EQ(this->Read(constant), (Ints{1, 2, 3}));
  EXPECT_EQ(this->Read(lengths), Ints(4, 1));
  EXPECT_EQ(this->Read(restored), (Ints{1, 2, 3}));
  this->Poll();  // what the access guard saw
  EXPECT_EQ(Describe(this->Verify()), "");
}

TYPED_TEST(CheckTest, FindPolluterReturnsTheBodysError) {
  this->MakeManager();
  this->Register(Spec("constant", Role::kConstant), {1, 2, 3});
  EXPECT_STATUS(FindPolluter(this->manager(), *this->stream(), kLarge,
                             [](Stream&) { return absl::AbortedError("the body gave up"); }),
                kAborted, "the body gave up");
  ASSERT_OK_AND_ASSIGN(const std::vector<Violation> found, FindPolluter(this->manager(), *this->stream(), kLarge,
                                                                        [](Stream&) { return absl::OkStatus(); }));
  EXPECT_EQ(Describe(found), "");
}

TYPED_TEST(CheckTest, AdoptRefusesWhatItCannotUse) {
  this->MakeManager();
  const auto memory = this->EngineMemory({1, 2, 3, 4});
  const Ints original = {1, 2};
  EXPECT_STATUS(this->manager().template Adopt<int32_t>(Spec("null", Role::kConstant), {nullptr, 2}, original),
                kInvalidArgument, "null");
  EXPECT_STATUS(this->manager().template Adopt<int32_t>(Spec("null", Role::kConstant), {nullptr, 0}), kInvalidArgument,
                "nothing to adopt");
  EXPECT_STATUS(this->manager().template Adopt<int32_t>(Spec("size", Role::kConstant), memory, original),
                kInvalidArgument, "adopts 16 bytes");
  EXPECT_OK(this->manager().template Adopt<int32_t>(Spec("first", Role::kConstant), memory.Sub(0, 2), original));
  EXPECT_STATUS(this->manager().template Adopt<int32_t>(Spec("second", Role::kConstant), memory.Sub(1, 2), original),
                kInvalidArgument, "overlaps buffer first");
  EXPECT_STATUS(this->manager().Protect("nothing", {}, 4), kInvalidArgument, "Protect nothing");
}

}  // namespace
}  // namespace pristine::testing
