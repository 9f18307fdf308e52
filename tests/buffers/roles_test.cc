// What each role promises: constants stay, restored buffers come back, refilled ones take the step's values.
#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

constexpr Extent kSmall{2, 2};
constexpr Extent kLarge{4, 4};

ManagerOptions Always() {
  ManagerOptions options;
  options.check = ManagerOptions::Check::kAlways;
  return options;
}

template <class BackendT>
class RolesTest : public BufferTest<BackendT> {};
TYPED_TEST_SUITE(RolesTest, AllBackends, BackendNames);

TYPED_TEST(RolesTest, ACleanReplayReportsNothing) {
  this->MakeManager(Always());
  const auto constant = this->Register(Spec("constant", Role::kConstant), {1, 2, 3});
  const auto restored = this->Register(Spec("restored", Role::kRestored), {4, 5, 6});
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), {9, 9, 9, 9});
  this->Capture({kSmall, kLarge}, kEmptyBody);
  for (int step = 1; step <= 3; ++step) {
    ASSERT_OK(this->manager().BeginStep(kSmall, {1, 1}));
    ASSERT_OK(this->Refill(lengths, {step}));
    ASSERT_OK(this->Replay(kSmall, {1, 1}));
    EXPECT_EQ(this->Read(lengths), (std::vector<int32_t>{step, 0, 9, 9}));
  }
  EXPECT_EQ(this->Read(constant), (std::vector<int32_t>{1, 2, 3}));
  EXPECT_EQ(this->Read(restored), (std::vector<int32_t>{4, 5, 6}));
  EXPECT_EQ(Describe(this->Poll()), "");
  ASSERT_OK_AND_ASSIGN(const std::vector<Violation> found, this->manager().Verify(*this->stream()));
  EXPECT_EQ(Describe(found), "");
  EXPECT_EQ(this->manager().stats().replays, 3);
  EXPECT_EQ(this->manager().stats().expected_writes, 0);
}

TYPED_TEST(RolesTest, APollutedConstantIsReportedHealedAndCounted) {
  this->MakeManager(Always());
  const auto constant = this->template Register<int16_t>(Spec("page_size", Role::kConstant), {16, 17, 18, -19});
  const auto seen = this->template Register<int16_t>(Spec("seen", Role::kScratch), {0, 0, 0, 0});
  this->Capture({kLarge}, [&](Stream& stream, const Extent&) {
    return stream.Copy(AsWritableBytes(seen.live), AsBytes(constant.live));
  });
  const auto bytes = AsWritableBytes(constant.live);
  for (const size_t byte : {size_t{0}, bytes.size() - 1}) {  // the first and the last
    this->Overwrite(bytes.address() + byte, std::byte{0x7F});
    ASSERT_OK(this->Step(kLarge, kLarge));
    const std::vector<Violation> found = this->Poll();
    ASSERT_EQ(found.size(), 1u) << Describe(found);
    EXPECT_EQ(found[0].kind, Violation::Kind::kPolluted);
    EXPECT_STREQ(found[0].buffer, "page_size");
    EXPECT_EQ(found[0].index, byte == 0 ? 0 : 3);
    EXPECT_EQ(found[0].expected, byte == 0 ? 16 : static_cast<uint16_t>(-19));
    EXPECT_EQ(found[0].actual, byte == 0 ? 0x7F : (0x7F00 | 0xED));
    EXPECT_STREQ(found[0].graph, "decode");
    EXPECT_EQ(found[0].bucket, kLarge);
    EXPECT_EQ(found[0].replay, byte == 0 ? 1 : 2);
    EXPECT_EQ(this->Read(constant), (std::vector<int16_t>{16, 17, 18, -19}));
    EXPECT_EQ(this->Read(seen), (std::vector<int16_t>{16, 17, 18, -19})) << "healed before the body";
  }
  EXPECT_EQ(this->manager().stats().healed, 2);
  EXPECT_EQ(this->manager().stats().neutralised, 0);
}

TYPED_TEST(RolesTest, AConstantThatAWarmUpPollutesIsReportedHealedAndCounted) {
  for (const auto check : {ManagerOptions::Check::kSampled, ManagerOptions::Check::kOff}) {
    ManagerOptions options;
    options.check = check;
    this->runner_.reset();
    this->MakeManager(options);
    const auto constant = this->Register(Spec("constant", Role::kConstant), {1, 2, 3});
    this->Capture({kLarge}, [&](Stream& stream, const Extent&) {
      if (stream.capturing()) return absl::OkStatus();
      return Launch(stream, kSetValue, SetValueParams{constant.live.address(), 2, 9});
    });
    EXPECT_EQ(this->Read(constant), (std::vector<int32_t>{1, 2, 3}));
    const std::vector<Violation> found = this->Poll();
    if (check == ManagerOptions::Check::kOff) {
      EXPECT_EQ(Describe(found), "");
      continue;
    }
    ASSERT_EQ(found.size(), 1u) << Describe(found);
    EXPECT_EQ(found[0].ToString(), "polluted: constant[2] is 9, was 3 (graph decode {4 requests, 4 tokens})");
    EXPECT_EQ(found[0].replay, 0);
    EXPECT_EQ(this->manager().stats().healed, 1);
  }
}

TYPED_TEST(RolesTest, LargeBuffersInTwoChunksAreHealedAndRestoredToTheirLastByte) {
  this->MakeManager(Always());
  const std::vector<int32_t> original(2 << 20, 7);  // 8 MB: more tiles than a launch has blocks
  const auto constant = this->Register(Spec("constant", Role::kConstant), original);
  ASSERT_OK(this->manager().Seal());
  const auto restored = this->Register(Spec("restored", Role::kRestored), original);
  this->Capture({kLarge}, kEmptyBody, 0);
  for (const auto& buffer : {constant, restored}) {
    this->Overwrite(AsWritableBytes(buffer.live).address() + original.size() * 4 - 1, std::byte{0x70});
  }
  ASSERT_OK(this->Step(kLarge, kLarge));
  EXPECT_TRUE(this->Read(constant) == original);
  EXPECT_TRUE(this->Read(restored) == original);
  const std::vector<Violation> found = this->Poll();
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_STREQ(found[0].buffer, "constant");
  EXPECT_EQ(found[0].index, static_cast<int64_t>(original.size()) - 1);
  EXPECT_EQ(this->manager().stats().expected_writes, 1);
}

TYPED_TEST(RolesTest, ASecondChunkIsHealedNeutralisedAndGuardedLikeTheFirst) {
  this->MakeManager(Always());
  const auto first = this->Register(Spec("first", Role::kRefilled, Kind::kLength, Axis::Requests()), {1, 1, 1, 1});
  ASSERT_OK(this->manager().Seal());
  BufferSpec spec = Spec("second", Role::kRefilled, Kind::kLength, Axis::Requests());
  spec.limit = 10;
  const auto second = this->Register(spec, {1, 1, 1, 1});
  const auto constant = this->Register(Spec("constant", Role::kConstant), {5, 6});
  this->Capture({kLarge}, kEmptyBody);
  const auto step = [&](int32_t length) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kLarge, {1, 1}));
    PRISTINE_RETURN_IF_ERROR(this->Refill(first, {3}));
    PRISTINE_RETURN_IF_ERROR(this->Refill(second, {length}));
    return this->Replay(kLarge, {1, 1});
  };
  this->Overwrite(AsWritableBytes(constant.live).address() + 4, std::byte{9});
  ASSERT_OK(step(11));
  EXPECT_EQ(this->Read(first), (std::vector<int32_t>{0, 0, 0, 0}));
  EXPECT_EQ(this->Read(second), (std::vector<int32_t>{0, 0, 0, 0}));
  EXPECT_EQ(this->Read(constant), (std::vector<int32_t>{5, 6}));
  EXPECT_EQ(this->Poll().size(), 2u) << "a polluted constant and a broken rule";
  ASSERT_OK(step(10));
  EXPECT_EQ(this->Read(second), (std::vector<int32_t>{10, 0, 0, 0}));
  this->Overwrite(AsWritableBytes(second.live).address() + 16, std::byte{1});
  ASSERT_OK_AND_ASSIGN(const std::vector<Violation> found, this->manager().Verify(*this->stream()));
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_EQ(found[0].kind, Violation::Kind::kGuardBand);
  EXPECT_STREQ(found[0].buffer, "second");
  EXPECT_EQ(found[0].index, 16);
}

TYPED_TEST(RolesTest, AnAdoptedSlotsOriginalIsItsPadWhateverTheMemoryHolds) {
  this->MakeManager();
  const auto memory = this->EngineMemory({3, 4, 5, 6});
  ASSERT_OK_AND_ASSIGN(const auto slots, this->manager().template Adopt<int32_t>(
                                             Spec("slots", Role::kRefilled, Kind::kSlot, Axis::Requests()), memory));
  ASSERT_OK(this->manager().Seal());
  EXPECT_EQ(this->Read(slots), std::vector<int32_t>(4, -1));
}

TYPED_TEST(RolesTest, SampledChecksRunEveryNthReplay) {
  ManagerOptions options;
  options.check = ManagerOptions::Check::kSampled;
  options.sample_every = 3;
  this->MakeManager(options);
  const auto constant = this->Register(Spec("constant", Role::kConstant), {1, 2, 3});
  this->Capture({kLarge}, kEmptyBody);
  this->Overwrite(AsWritableBytes(constant.live).address(), std::byte{9});
  ASSERT_OK(this->Step(kLarge, kLarge));
  ASSERT_OK(this->Step(kLarge, kLarge));
  EXPECT_EQ(this->Poll().size(), 0u);
  ASSERT_OK(this->Step(kLarge, kLarge));
  const std::vector<Violation> found = this->Poll();
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].replay, 3);
}

TYPED_TEST(RolesTest, ARestoredBufferComesBackWholeBeforeEachReplay) {
  this->MakeManager(Always());
  std::vector<int32_t> original(10000);  // more than a tile
  for (size_t i = 0; i < original.size(); ++i) original[i] = static_cast<int32_t>(i * 7);
  const auto restored = this->Register(Spec("restored", Role::kRestored), original);
  const auto seen = this->Register(Spec("seen", Role::kScratch), std::vector<int32_t>(original.size(), 0));
  const int64_t size = static_cast<int64_t>(original.size());
  this->Capture({kLarge}, [&](Stream& stream, const Extent&) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(
        Launch(stream, kCopyInts, CopyIntsParams{seen.live.address(), restored.live.address(), size}));
    return Launch(stream, kAddOne, AddOneParams{restored.live.address(), size});
  });
  for (int step = 1; step <= 3; ++step) {
    ASSERT_OK(this->Step(kLarge, kLarge));
    EXPECT_EQ(this->Read(seen), original) << "what the body saw in step " << step;
    EXPECT_EQ(this->Read(restored)[0], 1) << "the graph may write it";
  }
  EXPECT_EQ(Describe(this->Poll()), "");
  const BufferManager::Stats stats = this->manager().stats();
  EXPECT_EQ(stats.restored_bytes, 3 * size * 4);
  EXPECT_EQ(stats.expected_writes, 2);  // all but the first, before which the capture restored
}

TYPED_TEST(RolesTest, WarmUpsAndCapturesSeeTheOriginalsOfAllRoles) {
  this->MakeManager();
  const auto constant = this->Register(Spec("constant", Role::kConstant), {1, 2});
  const auto restored = this->Register(Spec("restored", Role::kRestored), {3, 4});
  const auto refilled = this->Register(Spec("refilled", Role::kRefilled), {5, 6});
  const auto seen = this->EngineMemory(std::vector<int32_t>(6, 0));
  const std::vector<int32_t> originals = {1, 2, 3, 4, 5, 6};
  int runs = 0;
  this->Capture(
      {kSmall, kLarge},
      [&](Stream& stream, const Extent&) -> absl::Status {
        if (!stream.capturing() && ++runs > 1) {  // what the warm-up before left is gone
          EXPECT_EQ(this->Read(restored), (std::vector<int32_t>{3, 4}));
          EXPECT_EQ(this->Read(refilled), (std::vector<int32_t>{5, 6}));
        }
        int place = 0;
        for (const Buffer<int32_t>& buffer : {constant, restored, refilled}) {
          PRISTINE_RETURN_IF_ERROR(
              Launch(stream, kCopyInts, CopyIntsParams{seen.address() + place, buffer.live.address(), 2}));
          place += 2;
        }
        PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, AddOneParams{refilled.live.address(), 2}));
        return Launch(stream, kAddOne, AddOneParams{restored.live.address(), 2});
      },
      2);
  EXPECT_EQ(runs, 4);
  EXPECT_EQ(this->Read(seen), originals);
  EXPECT_EQ(this->Read(restored), (std::vector<int32_t>{3, 4})) << "restored after the last warm-up too";
}

TYPED_TEST(RolesTest, RestoreOffNeverRestoresNotEvenAroundWarmUps) {
  ManagerOptions options;
  options.restore = ManagerOptions::Restore::kOff;
  this->MakeManager(options);
  const auto restored = this->Register(Spec("restored", Role::kRestored), {10, 20});
  const auto refilled = this->Register(Spec("refilled", Role::kRefilled), {1});
  this->Capture(
      {kLarge},
      [&](Stream& stream, const Extent&) {
        return Launch(stream, kAddOne, AddOneParams{restored.live.address(), 2});
      },
      2);
  EXPECT_EQ(this->Read(restored), (std::vector<int32_t>{12, 22}));
  ASSERT_OK(this->manager().BeginStep(kLarge, kLarge));
  ASSERT_OK(this->Refill(refilled, {8}));
  ASSERT_OK(this->Replay(kLarge, kLarge));
  EXPECT_EQ(this->Read(restored), (std::vector<int32_t>{13, 23}));
  EXPECT_EQ(this->Read(refilled), (std::vector<int32_t>{8}));
  EXPECT_EQ(this->manager().stats().restored_bytes, 0);
}

TYPED_TEST(RolesTest, RestoreOnTheStreamPutsBackOnlyWhatTheCallerAsksFor) {
  ManagerOptions options;
  options.restore = ManagerOptions::Restore::kStream;
  this->MakeManager(options);
  const auto restored = this->Register(Spec("restored", Role::kRestored), {10, 20});
  this->Capture({kLarge}, [&](Stream& stream, const Extent&) {
    return Launch(stream, kAddOne, AddOneParams{restored.live.address(), 2});
  });
  EXPECT_EQ(this->Read(restored), (std::vector<int32_t>{10, 20})) << "restored around the warm-up as always";
  ASSERT_OK(this->Step(kLarge, kLarge));
  ASSERT_OK(this->Step(kLarge, kLarge));
  EXPECT_EQ(this->Read(restored), (std::vector<int32_t>{12, 22}));
  ASSERT_OK(this->manager().Restore(*this->stream()));
  EXPECT_EQ(this->Read(restored), (std::vector<int32_t>{10, 20}));
  EXPECT_EQ(this->manager().stats().restored_bytes, 8);
}

TYPED_TEST(RolesTest, ScratchIsPoisonedWhereAsked) {
  ManagerOptions options;
  options.poison_scratch = true;
  this->MakeManager(options);
  const auto scratch = this->Register(Spec("scratch", Role::kScratch), {1, 2, 3});
  this->Capture({kLarge}, kEmptyBody);
  EXPECT_EQ(this->Read(scratch), (std::vector<int32_t>{1, 2, 3}));
  ASSERT_OK(this->Step(kLarge, kLarge));
  EXPECT_EQ(this->Read(scratch), (std::vector<int32_t>{-1, -1, -1}));
}

TYPED_TEST(RolesTest, AdoptedMemoryIsTreatedAlike) {
  this->MakeManager(Always());
  const auto constant_memory = this->EngineMemory({1, 2, 3});
  const auto bound_memory = this->EngineMemory({0, 5, 10, 15, 20});
  ASSERT_OK_AND_ASSIGN(const auto constant,
                       this->manager().template Adopt<int32_t>(Spec("constant", Role::kConstant), constant_memory));
  ASSERT_OK_AND_ASSIGN(const auto bound,
                       this->manager().template Adopt<int32_t>(
                           Spec("indptr", Role::kRefilled, Kind::kIndptr, Axis::RequestsPlusOne()), bound_memory));
  EXPECT_EQ(constant.live.address(), constant_memory.address());
  this->Capture({kLarge}, kEmptyBody);
  EXPECT_EQ(this->Read(bound), (std::vector<int32_t>{0, 5, 10, 15, 20})) << "its contents became the original";
  this->Overwrite(AsWritableBytes(constant_memory).address() + 4, std::byte{77});
  ASSERT_OK(this->manager().BeginStep(kLarge, kSmall));
  ASSERT_OK(this->Refill(bound, {0, 2, 3}));
  ASSERT_OK(this->Replay(kLarge, kSmall));
  EXPECT_EQ(this->Read(bound_memory), (std::vector<int32_t>{0, 2, 3, 3, 3}));
  EXPECT_EQ(this->Read(constant_memory), (std::vector<int32_t>{1, 2, 3}));
  const std::vector<Violation> found = this->Poll();
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].index, 1);
  EXPECT_EQ(found[0].actual, 77);
}

TYPED_TEST(RolesTest, TwoManagersDoNotTouchEachOthersBuffers) {
  this->MakeManager(Always());
  const auto mine = this->Register(Spec("restored", Role::kRestored), {1, 1});
  ASSERT_OK_AND_ASSIGN(auto other, BufferManager::Create(this->device(), Always()));
  const std::vector<int32_t> twos = {2, 2};
  ASSERT_OK_AND_ASSIGN(const auto theirs, other->template Register<int32_t>(Spec("restored", Role::kRestored), twos));
  ASSERT_OK(other->Seal());
  this->Capture({kLarge}, kEmptyBody);
  for (const auto& buffer : {mine, theirs}) this->Overwrite(AsWritableBytes(buffer.live).address(), std::byte{9});
  ASSERT_OK(this->Step(kLarge, kLarge));
  EXPECT_EQ(this->Read(mine), (std::vector<int32_t>{1, 1}));
  EXPECT_EQ(this->Read(theirs), (std::vector<int32_t>{9, 2}));
  ASSERT_OK(other->Restore(*this->stream()));
  EXPECT_EQ(this->Read(theirs), twos);
}

// Host enforces declared writes; CUDA finds the pollution at the next check.
TYPED_TEST(RolesTest, AnUndeclaredWriteIsReportedWithNodeBufferAndIndex) {
  this->MakeManager(Always());
  if (!this->device().enforces_accesses()) GTEST_SKIP() << "this device does not enforce accesses";
  const auto constant = this->Register(Spec("constant", Role::kConstant), std::vector<int32_t>(2000, 1));
  const auto pool = this->EngineMemory(std::vector<int32_t>(4096, 0));
  ASSERT_OK(this->manager().Protect("kv pool", AsBytes(pool), sizeof(int32_t)));
  bool pollute = false;
  this->Capture({kLarge}, [&](Stream& stream, const Extent&) -> absl::Status {
    if (!pollute) return absl::OkStatus();
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kSetValueUndeclared, SetValueParams{constant.live.address(), 1999, 5}));
    return Launch(stream, kSetValueUndeclared, SetValueParams{pool.address(), 17, 5});
  });
  ASSERT_OK(this->Step(kLarge, kLarge));
  EXPECT_EQ(Describe(this->Poll()), "");
  pollute = true;
  ASSERT_OK(this->runner_->Recapture(*this->stream(), kLarge));
  this->Poll();
  ASSERT_OK(this->Step(kLarge, kLarge));
  const std::vector<Violation> found = this->Poll();
  ASSERT_EQ(found.size(), 2u) << Describe(found);
  EXPECT_EQ(found[0].kind, Violation::Kind::kUndeclaredWrite);
  EXPECT_STREQ(found[0].buffer, "constant");
  EXPECT_EQ(found[0].index, 1999);
  EXPECT_STREQ(found[0].node, "set_value_undeclared");
  EXPECT_EQ(found[0].replay, 2);
  EXPECT_STREQ(found[1].buffer, "kv pool");
  EXPECT_EQ(found[1].index, 17);
}

}  // namespace
}  // namespace pristine::testing
