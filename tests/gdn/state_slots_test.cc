// States in a run: slots that come and go with requests, steps through StepMetadata, graphs and recaptures.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "pristine/attention/gdn/recurrent.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/support/backends.h"
#include "tests/support/gdn_truth.h"
#include "tests/support/status_matchers.h"
#include "tests/support/test_kernels.h"

namespace pristine::testing {
namespace {

using namespace attention::gdn;  // NOLINT(build/namespaces): the suite is about that namespace
using attention::StepMetadata;

constexpr Extent kSmall{2, 2}, kLarge{5, 5};
constexpr int32_t kSlots = 6, kQkHeads = 1, kVHeads = 2;
constexpr size_t kSlotBytes = kVHeads * kStateElements * sizeof(float);

// A layer that decodes one token of each request: row r has the same inputs in every step.
template <class BackendT>
class StateSlotsTest : public DeviceTest<BackendT> {
 protected:
  void SetUp() override {
    DeviceTest<BackendT>::SetUp();
    if (this->device_ == nullptr) return;
    std::mt19937_64 random(31);
    ASSERT_OK_AND_ASSIGN(layer_, MakeLayer(*this->device_, *this->stream_, DType::kFloat32, kQkHeads, kVHeads,
                                           kLarge.tokens, true, random));
    ASSERT_OK_AND_ASSIGN(out_,
                         MakeTensor(*this->device_, *this->stream_, DType::kFloat32,
                                    std::vector<double>(static_cast<size_t>(kLarge.tokens * layer_.v_dim()), NAN)));
    ASSERT_OK_AND_ASSIGN(pool_, StatePool::Create(*this->device_, DType::kFloat32, kVHeads, kSlots));
    ManagerOptions options;
    options.check = ManagerOptions::Check::kAlways;
    ASSERT_OK_AND_ASSIGN(manager_, BufferManager::Create(*this->device_, options));
    ASSERT_OK_AND_ASSIGN(metadata_, StepMetadata::Create(*manager_, {.max_requests = kLarge.requests,
                                                                     .max_tokens = kLarge.tokens,
                                                                     .page_size = 1,
                                                                     .num_pages = 1,
                                                                     .max_step_pages = kLarge.requests,
                                                                     .max_length = 1,
                                                                     .state_slots = kSlots + 1}));
    ASSERT_OK(pool_->Protect(*manager_, "gdn_states"));
    ASSERT_OK_AND_ASSIGN(
        runner_, GraphRunner::Create({.buckets = {kSmall, kLarge}}, [this](Stream& s, const Extent& b) {
          return Decode(s, b.requests, Inputs(metadata_->state_slots().live), pool_->view(), out_.bytes());
        }));
    ASSERT_OK(runner_->AddHook(*manager_));
    ASSERT_OK(runner_->CaptureAll(*this->stream_));
  }
  void TearDown() override {
    runner_.reset();
    metadata_.reset();
    manager_.reset();
    pool_.reset();
    layer_ = {};
    out_ = {};
    DeviceTest<BackendT>::TearDown();
  }

  RecurrentInputs Inputs(DeviceSpan<const int32_t> slots) const {
    return {.qk_heads = kQkHeads,
            .q = layer_.Part(0),
            .k = layer_.Part(layer_.qk_dim()),
            .v = layer_.Part(2 * layer_.qk_dim()),
            .gates = layer_.gates(),
            .cache_indices = slots};
  }
  absl::Status Replay(const Extent& bucket, const std::vector<int32_t>& slots) {
    const int32_t real = static_cast<int32_t>(slots.size());
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(bucket, {real, real}));
    const std::vector<int32_t> zeros(slots.size()), nowhere(slots.size(), -1), indptr(slots.size() + 1);
    PRISTINE_RETURN_IF_ERROR(metadata_->Refill({.lengths = zeros,
                                                .kv_indptr = indptr,
                                                .kv_indices = {},
                                                .slots = nowhere,
                                                .positions = zeros,
                                                .state_slots = slots}));
    PRISTINE_RETURN_IF_ERROR(runner_->Replay(*this->stream_, bucket, {real, real}));
    return this->stream_->Synchronize();
  }
  Slot Allocate() {
    const absl::StatusOr<Slot> slot = pool_->Allocate(*this->stream_);
    EXPECT_OK(slot);
    return slot.ok() ? *slot : kNoSlot;
  }
  Bytes States() {
    absl::StatusOr<Bytes> bytes = ReadBytes(*this->stream_, pool_->view().states);
    EXPECT_OK(bytes);
    return bytes.ok() ? *std::move(bytes) : Bytes();
  }
  std::vector<double> State(Slot slot) {
    const Bytes all = States();
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(slot) * kSlotBytes);
    return Decoded(DType::kFloat32, Bytes(begin, begin + kSlotBytes));
  }
  // Of a request that was in row `row` for `steps` steps.
  std::vector<double> Expected(int32_t row, int32_t steps) const {
    std::vector<double> states;
    for (int32_t h = 0; h < kVHeads; ++h) {
      std::vector<double> state(kStateElements), out(kHeadDim);
      const double* const token = &layer_.mixed.values[static_cast<size_t>(row * layer_.dim())];
      const size_t head = static_cast<size_t>(h), gate = static_cast<size_t>(row * kVHeads + h);
      for (int32_t step = 0; step < steps; ++step) {
        GdnStep({token, token + layer_.qk_dim(), token + 2 * layer_.qk_dim() + h * kHeadDim, layer_.a.values[gate],
                 layer_.b.values[gate], layer_.a_log.values[head], layer_.dt_bias.values[head]},
                state, out.data());
      }
      states.insert(states.end(), state.begin(), state.end());
    }
    return states;
  }
  std::vector<Violation> Violations() {
    std::vector<Violation> found(16);
    found.resize(manager_->Poll(absl::MakeSpan(found)));
    return found;
  }

  Layer layer_;
  Tensor out_;
  std::unique_ptr<StatePool> pool_;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
  std::unique_ptr<GraphRunner> runner_;
};
TYPED_TEST_SUITE(StateSlotsTest, AllBackends, BackendNames);

TYPED_TEST(StateSlotsTest, RecaptureMidRunLeavesEveryLiveStateByteUnchanged) {
  std::vector<Slot> slots;
  for (int i = 0; i < 4; ++i) slots.push_back(this->Allocate());
  for (int step = 0; step < 3; ++step) ASSERT_OK(this->Replay(kLarge, slots));
  ASSERT_OK(this->Replay(kSmall, {slots[1]}));
  const Bytes before = this->States();
  for (const Extent& bucket : {kSmall, kLarge}) {
    ASSERT_OK(this->runner_->Recapture(*this->stream_, bucket));
    EXPECT_TRUE(this->States() == before) << "recapture of " << bucket.ToString();
  }
  ASSERT_OK(this->runner_->CaptureAll(*this->stream_));
  EXPECT_TRUE(this->States() == before);
  ASSERT_OK(this->Replay(kLarge, slots));  // and the run goes on
  EXPECT_LT(RelativeRms(this->Expected(0, 4), this->State(slots[0])), 2e-5);
  EXPECT_TRUE(this->Violations().empty());
}

TYPED_TEST(StateSlotsTest, SlotsThatAreFreedAndReusedStartFromZero) {
  for (int life = 0; life < 3; ++life) {
    std::vector<Slot> slots;
    for (int i = 0; i < kSlots; ++i) slots.push_back(this->Allocate());
    EXPECT_EQ(this->pool_->free_slots(), 0);
    slots.resize(5);
    for (int step = 0; step < 2; ++step) ASSERT_OK(this->Replay(kLarge, slots));
    for (int32_t row = 0; row < 5; ++row) {
      EXPECT_LT(RelativeRms(this->Expected(row, 2), this->State(slots[static_cast<size_t>(row)])), 2e-5)
          << "life " << life << ", slot " << slots[static_cast<size_t>(row)];
    }
    for (Slot slot = 1; slot <= kSlots; ++slot) ASSERT_OK(this->pool_->Free(slot));
  }
}

TYPED_TEST(StateSlotsTest, TwoRequestsNeverShareASlot) {
  std::mt19937_64 random(7);
  std::vector<Slot> taken;
  for (int i = 0; i < 400; ++i) {
    if (taken.empty() || (random() % 2 == 0 && this->pool_->free_slots() > 0)) {
      const Slot slot = this->Allocate();
      EXPECT_GE(slot, 1);
      EXPECT_LE(slot, kSlots);
      EXPECT_EQ(std::count(taken.begin(), taken.end(), slot), 0) << "after " << i << " calls";
      taken.push_back(slot);
    } else {
      std::swap(taken[random() % taken.size()], taken.back());
      ASSERT_OK(this->pool_->Free(taken.back()));
      taken.pop_back();
    }
    EXPECT_EQ(this->pool_->free_slots() + static_cast<int32_t>(taken.size()), kSlots);
  }
  ASSERT_OK(this->stream_->Synchronize());  // the pool outlives what is queued for it
}

TYPED_TEST(StateSlotsTest, AWriteToSlotZeroIsReportedByNameAndHealed) {
  const Slot slot = this->Allocate();
  ASSERT_OK(this->Replay(kSmall, {slot, 0}));  // the engine's mistake
  EXPECT_TRUE(this->Violations().empty()) << "the next replay looks";
  ASSERT_OK(this->Replay(kSmall, {slot}));
  const std::vector<Violation> found = this->Violations();
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].kind, Violation::Kind::kPolluted);
  EXPECT_STREQ(found[0].buffer, "gdn_states.slot0");
  EXPECT_EQ(found[0].expected, 0);
  const Bytes states = this->States();
  EXPECT_TRUE(std::all_of(states.begin(), states.begin() + kSlotBytes, [](std::byte b) { return b == std::byte{0}; }));
  EXPECT_LT(RelativeRms(this->Expected(0, 2), this->State(slot)), 2e-5);
}

TYPED_TEST(StateSlotsTest, ASlotPastThePoolIsReportedAndTouchesNoState) {
  const Slot slot = this->Allocate();
  ASSERT_OK(this->Replay(kSmall, {slot}));
  const Bytes before = this->States();
  for (const int32_t wrong : {kSlots + 1, -2, std::numeric_limits<int32_t>::max()}) {
    ASSERT_OK(this->Replay(kSmall, {slot, wrong}));
    const std::vector<Violation> found = this->Violations();
    ASSERT_EQ(found.size(), 1u) << wrong;
    EXPECT_EQ(found[0].kind, Violation::Kind::kInvariant);
    EXPECT_STREQ(found[0].buffer, "step.state_slots");
    EXPECT_EQ(found[0].index, 1);
    EXPECT_EQ(found[0].actual, wrong);
    EXPECT_TRUE(this->States() == before) << "the replay is harmless: " << wrong;
  }
  ASSERT_OK_AND_ASSIGN(const std::vector<double> out, ReadTensor(*this->stream_, this->out_));
  for (int i = 0; i < 2 * kVHeads * kHeadDim; ++i) ASSERT_EQ(out[static_cast<size_t>(i)], 0) << i;
}

TYPED_TEST(StateSlotsTest, AnUndeclaredWriteToAStateIsReportedByName) {
  if (!this->device_->enforces_accesses()) GTEST_SKIP() << "this device does not enforce accesses";
  int32_t* const states = reinterpret_cast<int32_t*>(this->pool_->view().states.address());
  ASSERT_OK(Launch(*this->stream_, kSetValueUndeclared, {states + 2 * kSlotBytes / sizeof(float), 3, 7}));
  ASSERT_OK(this->stream_->Synchronize());
  const std::vector<Violation> found = this->Violations();
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].kind, Violation::Kind::kUndeclaredWrite);
  EXPECT_STREQ(found[0].buffer, "gdn_states");
  EXPECT_EQ(found[0].index, static_cast<int64_t>(kSlotBytes / sizeof(float)) + 3);  // of slot 2, counted from slot 1
}

}  // namespace
}  // namespace pristine::testing
