// Each class of bug with states that the kit claims to find, in a wrapper that has this one bug and no other.
#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "pristine/conformance/state_conformance.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"
#include "tests/kit_test/naive_state.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DType;
using conformance::BoundArray;
using conformance::CheckState;
using conformance::Conforms;
using conformance::Finding;
using conformance::Report;
using conformance::StateRow;
using conformance::StateShape;
using conformance::StateStep;
using conformance::StateTensors;
using conformance::Values;

constexpr int32_t kWidth = 8;

StateShape NaiveShape() {
  StateShape shape;
  shape.inputs = {{"x", DType::kFloat32, kWidth}};
  shape.outputs = {{"y", DType::kFloat32, kWidth}};
  shape.states = {{"sum", DType::kFloat32, kWidth}};
  shape.rule = [](const StateRow&, const Values& inputs, Values& states, Values& outputs) {
    for (size_t i = 0; i < kWidth; ++i) outputs[0][i] = states[0][i] = states[0][i] / 2 + inputs[0][i];
  };
  return shape;
}

// As an engine would wrap it: an array of its own, padded by itself, uploaded from pinned memory.
class NaiveStateWrapper : public conformance::StateWrapper {
 public:
  static absl::StatusOr<std::unique_ptr<NaiveStateWrapper>> Create(Device& device, const StateShape& shape,
                                                                   StateFault fault, bool tells_arrays) {
    std::unique_ptr<NaiveStateWrapper> wrapper(new NaiveStateWrapper(shape, fault, tells_arrays));
    const size_t bytes = wrapper->Size() * sizeof(int32_t);
    PRISTINE_ASSIGN_OR_RETURN(wrapper->slots_, device.Allocate(bytes, "naive.slots"));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->staging_, device.AllocatePinned(kStaging * bytes, "naive.staging"));
    return wrapper;
  }

  absl::Status Prepare(Stream& stream, int32_t, const StateStep& step) override {
    const int32_t real = static_cast<int32_t>(step.slots.size());
    if (fault_ == StateFault::kSkipsSameRows && real == real_) return absl::OkStatus();
    real_ = real;
    return Upload(stream, step.slots, fault_ == StateFault::kLeavesSlotTail ? step.slots.size() : Size());
  }
  absl::Status Run(Stream& stream, int32_t bucket, const StateTensors& t) override {
    NaiveStateParams params = {.x = reinterpret_cast<const float*>(t.inputs[0].address()),
                               .y = reinterpret_cast<float*>(t.outputs[0].address()),
                               .states = reinterpret_cast<float*>(t.states[0].address()),
                               .slots = slots_.As<int32_t>().address(),
                               .rows = bucket,
                               .width = kWidth,
                               .num_slots = shape_.slots(),
                               .y_elements = static_cast<int64_t>(t.outputs[0].size() / sizeof(float)),
                               .store = fault_ != StateFault::kCapturesWithoutStore || !stream.capturing(),
                               .fault = fault_};
    if (fault_ == StateFault::kRunsMaxRows) params.rows = shape_.max_requests();
    if (fault_ == StateFault::kSkipsTheLastRow) params.rows = bucket - 1;
    if (fault_ == StateFault::kFreezesRows) params.rows = real_;
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kNaiveState, params));
    return fault_ == StateFault::kBlocks ? stream.Synchronize() : absl::OkStatus();
  }
  absl::Status WarmUp(Stream& stream, int32_t bucket, const StateTensors& tensors) override {
    if (fault_ != StateFault::kWarmsUpWithLiveSlots) {
      PRISTINE_RETURN_IF_ERROR(Upload(stream, {}, Size()));
    }
    PRISTINE_RETURN_IF_ERROR(Run(stream, bucket, tensors));
    return stream.Synchronize();
  }
  std::vector<BoundArray> BoundArrays() override {
    if (!tells_arrays_) return {};
    return {{Kind::kSlot, slots_.As<int32_t>(), shape_.slots()}};
  }

 private:
  static constexpr size_t kStaging = 4;  // more than steps are ever in flight
  NaiveStateWrapper(const StateShape& shape, StateFault fault, bool tells_arrays)
      : shape_(shape), fault_(fault), tells_arrays_(tells_arrays) {}
  size_t Size() const { return static_cast<size_t>(shape_.max_requests()); }
  absl::Status Upload(Stream& stream, absl::Span<const int32_t> slots, size_t count) {
    next_ = (next_ + 1) % kStaging;
    const absl::Span<int32_t> to = staging_.As<int32_t>().subspan(next_ * Size(), Size());
    std::fill(to.begin(), to.end(), -1);
    std::copy(slots.begin(), slots.end(), to.begin());
    if (count == 0) return absl::OkStatus();
    return stream.CopyFromHost(
        AsWritableBytes(slots_.As<int32_t>().Sub(0, count)),
        staging_.As<std::byte>().subspan(next_ * Size() * sizeof(int32_t), count * sizeof(int32_t)));
  }

  const StateShape shape_;
  const StateFault fault_;
  const bool tells_arrays_;
  DeviceBuffer slots_;
  PinnedBuffer staging_;
  size_t next_ = 0;
  int32_t real_ = -1;  // requests of the step prepared last
};

template <class BackendT>
class BrokenStateTest : public DeviceTest<BackendT> {
 protected:
  Report Check(StateFault fault, bool tells_arrays = true) {
    const StateShape shape = NaiveShape();
    auto wrapper = NaiveStateWrapper::Create(*this->device_, shape, fault, tells_arrays);
    EXPECT_OK(wrapper);
    if (!wrapper.ok()) return {};
    absl::StatusOr<Report> report = CheckState(*this->stream_, **wrapper, shape);
    EXPECT_OK(report);
    return report.ok() ? *std::move(report) : Report();
  }
  // The fault is found as `kind`, and as nothing else.
  void ExpectOnly(Finding::Kind kind, const Report& report) {
    EXPECT_TRUE(report.Has(kind)) << report.ToString();
    for (const Finding& finding : report.findings) EXPECT_EQ(finding.kind, kind) << finding.ToString();
  }
  static bool Says(const Report& report, const std::string& text) {
    return report.ToString().find(text) != std::string::npos;
  }
};
TYPED_TEST_SUITE(BrokenStateTest, AllBackends, BackendNames);

TYPED_TEST(BrokenStateTest, AWrapperWithoutFaultPasses) {
  const Report report = this->Check(StateFault::kNone);
  EXPECT_TRUE(report.findings.empty()) << report.ToString();
  EXPECT_EQ(report.steps, 3 * 9);
  // As with attention: two poisons, twice eager, replayed three times; two warm-ups and two first launches a bucket.
  EXPECT_EQ(report.runs, 3 * 9 * 2 * (2 + 3) + 3 * (2 + 2));
}

// sglang#36880: padded rows used the last slot that the allocator hands out.
TYPED_TEST(BrokenStateTest, PaddedRowsInTheLastSlotAreWritesOutside) {
  const Report report = this->Check(StateFault::kPaddingUsesTheLastSlot);
  EXPECT_TRUE(report.Has(Finding::Kind::kWritesOutside)) << report.ToString();
  EXPECT_TRUE(report.Has(Finding::Kind::kCaptureWrites)) << report.ToString();
  EXPECT_TRUE(this->Says(report, "sum slot 8, element 0")) << report.ToString();
}

TYPED_TEST(BrokenStateTest, PaddedRowsInSlotZeroAreWritesOutside) {
  const Report report = this->Check(StateFault::kPaddingUsesSlotZero);
  EXPECT_TRUE(report.Has(Finding::Kind::kWritesOutside)) << report.ToString();
  EXPECT_TRUE(this->Says(report, "sum slot 0, element 0")) << report.ToString();
}

TYPED_TEST(BrokenStateTest, APaddedRowThatIsNotZeroIsAWrongValue) {
  const Report report = this->Check(StateFault::kLeavesPaddedOutput);
  this->ExpectOnly(Finding::Kind::kWrongValue, report);
  EXPECT_TRUE(this->Says(report, "padded row")) << report.ToString();
}

TYPED_TEST(BrokenStateTest, AnotherSlotThatIsReadIsReadsPadding) {
  EXPECT_TRUE(this->Check(StateFault::kReadsTheNextSlot).Has(Finding::Kind::kReadsPadding));
}

TYPED_TEST(BrokenStateTest, NanThatAComparisonHidesIsFoundByTheOtherPoison) {
  // Pools hold large negative values where inputs hold positive ones.
  const Report report = this->Check(StateFault::kHidesNan);
  EXPECT_TRUE(report.Has(Finding::Kind::kReadsPadding)) << report.ToString();
}

TYPED_TEST(BrokenStateTest, AStateThatIsNotMovedOnIsAWrongValue) {
  const Report report = this->Check(StateFault::kStoresTheStateBefore);
  this->ExpectOnly(Finding::Kind::kWrongValue, report);
  EXPECT_TRUE(this->Says(report, "sum in slot")) << report.ToString();
}

TYPED_TEST(BrokenStateTest, ARowThatNobodyComputesIsFound) {
  EXPECT_TRUE(this->Check(StateFault::kSkipsTheLastRow).Has(Finding::Kind::kReadsPadding));
}

TYPED_TEST(BrokenStateTest, RowsBeyondTheBucketAreWritesOutside) {
  const Report report = this->Check(StateFault::kRunsMaxRows);
  EXPECT_TRUE(report.Has(Finding::Kind::kWritesOutside)) << report.ToString();
  EXPECT_TRUE(this->Says(report, "y row")) << report.ToString();
}

TYPED_TEST(BrokenStateTest, ARowCountFrozenAtCaptureIsFoundInReplays) {
  EXPECT_TRUE(this->Check(StateFault::kFreezesRows).Has(Finding::Kind::kReplayDiffers));
}

TYPED_TEST(BrokenStateTest, AStateThatCapturedGraphsLeaveIsFoundInTheFirstLaunch) {
  const Report report = this->Check(StateFault::kCapturesWithoutStore);
  EXPECT_TRUE(report.Has(Finding::Kind::kCapturedDiffers)) << report.ToString();
  EXPECT_TRUE(report.Has(Finding::Kind::kReplayDiffers)) << report.ToString();
  EXPECT_FALSE(report.Has(Finding::Kind::kNotRepeatable)) << report.ToString();
}

TYPED_TEST(BrokenStateTest, BlockingInRunIsRefused) {
  this->ExpectOnly(Finding::Kind::kRefused, this->Check(StateFault::kBlocks));
}

TYPED_TEST(BrokenStateTest, SlotsOfTheStepBeforeInPaddedRowsAreWritesOutside) {
  // Unknown arrays are not poisoned: what is left in them are slots that others have by now.
  EXPECT_TRUE(this->Check(StateFault::kLeavesSlotTail, false).Has(Finding::Kind::kWritesOutside));
  EXPECT_TRUE(this->Check(StateFault::kLeavesSlotTail).Has(Finding::Kind::kWritesOutside));
}

TYPED_TEST(BrokenStateTest, StaleSlotsAreFound) {
  EXPECT_FALSE(this->Check(StateFault::kSkipsSameRows).findings.empty());
  EXPECT_TRUE(this->Check(StateFault::kSkipsSameRows, false).Has(Finding::Kind::kWritesOutside));
}

TYPED_TEST(BrokenStateTest, AWarmUpThatMovesLiveStatesOnIsFound) {
  const Report report = this->Check(StateFault::kWarmsUpWithLiveSlots);
  this->ExpectOnly(Finding::Kind::kCaptureWrites, report);
  EXPECT_TRUE(this->Says(report, "sum slot")) << report.ToString();
}

TYPED_TEST(BrokenStateTest, TheGoogleTestLayerFailsWithTheReport) {
  const StateShape shape = NaiveShape();
  ASSERT_OK_AND_ASSIGN(const auto good, NaiveStateWrapper::Create(*this->device_, shape, StateFault::kNone, true));
  EXPECT_TRUE(Conforms(*this->stream_, *good, shape));
  ASSERT_OK_AND_ASSIGN(const auto bad,
                       NaiveStateWrapper::Create(*this->device_, shape, StateFault::kStoresTheStateBefore, true));
  EXPECT_NONFATAL_FAILURE(EXPECT_TRUE(Conforms(*this->stream_, *bad, shape)), "wrong value: row 0, head 0");
}

TYPED_TEST(BrokenStateTest, AShapeThatMakesNoSenseIsInvalid) {
  StateShape shape = NaiveShape();
  ASSERT_OK_AND_ASSIGN(const auto wrapper, NaiveStateWrapper::Create(*this->device_, shape, StateFault::kNone, true));
  shape.tokens = 0;
  EXPECT_STATUS(CheckState(*this->stream_, *wrapper, shape), kInvalidArgument, "tokens is 0");
  shape = NaiveShape();
  shape.states[0].width = 0;
  EXPECT_STATUS(CheckState(*this->stream_, *wrapper, shape), kInvalidArgument, "sum.width is 0");
  shape = NaiveShape();
  shape.buckets = {4, 2};
  EXPECT_STATUS(CheckState(*this->stream_, *wrapper, shape), kInvalidArgument, "buckets is 2");
  shape = NaiveShape();
  shape.rule = nullptr;
  EXPECT_STATUS(CheckState(*this->stream_, *wrapper, shape), kInvalidArgument, "rule is null");
}

}  // namespace
}  // namespace pristine::testing
