// Each class of bug that the kit claims to find, in a wrapper that has this one bug and no other.
#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "pristine/conformance/attention_conformance.h"
#include "tests/kit_test/naive_wrapper.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using conformance::AttentionShape;
using conformance::CheckAttention;
using conformance::Conforms;
using conformance::Finding;
using conformance::Report;

template <class BackendT>
class BrokenWrapperTest : public DeviceTest<BackendT> {
 protected:
  Report Check(Fault fault, const AttentionShape& shape = {.head_dim = 16, .buckets = {1, 3, 6}},
               bool tells_arrays = true) {
    auto wrapper = NaiveWrapper::Create(*this->device_, shape, fault, tells_arrays);
    EXPECT_OK(wrapper);
    if (!wrapper.ok()) return {};
    absl::StatusOr<Report> report = CheckAttention(*this->stream_, **wrapper, shape);
    EXPECT_OK(report);
    return report.ok() ? *std::move(report) : Report();
  }
  // The fault is found as `kind`, and as nothing else.
  void ExpectOnly(Finding::Kind kind, const Report& report) {
    EXPECT_TRUE(report.Has(kind)) << report.ToString();
    for (const Finding& finding : report.findings) EXPECT_EQ(finding.kind, kind) << finding.ToString();
  }
};
TYPED_TEST_SUITE(BrokenWrapperTest, AllBackends, BackendNames);

TYPED_TEST(BrokenWrapperTest, AWrapperWithoutFaultPasses) {
  for (const bool appends : {false, true}) {
    for (const int32_t page_size : {1, 8}) {
      const Report report =
          this->Check(Fault::kNone, {.head_dim = 16, .page_size = page_size, .buckets = {1, 3, 6}, .appends = appends});
      EXPECT_TRUE(report.findings.empty()) << report.ToString();
      EXPECT_EQ(report.steps, 3 * 13);
      // Two poisons: twice eager, replayed three times; two warm-ups and two first launches for each bucket.
      EXPECT_EQ(report.runs, 3 * 13 * 2 * (2 + 3) + 3 * (2 + 2));
    }
  }
}

TYPED_TEST(BrokenWrapperTest, MaskingByMultiplicationReadsPadding) {
  const Report report = this->Check(Fault::kLeaks);
  this->ExpectOnly(Finding::Kind::kReadsPadding, report);
  EXPECT_NE(report.ToString().find("under poison NaN and maximal"), std::string::npos) << report.ToString();
}

// Not behind the length: between tokens that are there and a window that has left them.
TYPED_TEST(BrokenWrapperTest, MaskingByMultiplicationBeforeAWindowReadsPadding) {
  for (const bool appends : {false, true}) {
    const AttentionShape shape = {
        .head_dim = 16,
        .buckets = {1, 3, 6},
        .appends = appends,
        .attended = [](int32_t length, int32_t, int32_t position) { return position >= length - kNaiveWindow; }};
    const Report right = this->Check(Fault::kNone, shape);
    EXPECT_TRUE(right.findings.empty()) << right.ToString();
    this->ExpectOnly(Finding::Kind::kReadsPadding, this->Check(Fault::kLeaksWindow, shape));
  }
}

TYPED_TEST(BrokenWrapperTest, ATokenPastTheEndReadsPadding) {
  this->ExpectOnly(Finding::Kind::kReadsPadding, this->Check(Fault::kReadsOnePastEnd));
}

TYPED_TEST(BrokenWrapperTest, NanThatAComparisonHidesIsFoundByTheOtherPoison) {
  this->ExpectOnly(Finding::Kind::kReadsPadding, this->Check(Fault::kHidesNan));
}

TYPED_TEST(BrokenWrapperTest, AnEntryPastThePageTableReadsPadding) {
  this->ExpectOnly(Finding::Kind::kReadsPadding, this->Check(Fault::kLeavesPageTail, {.head_dim = 16, .buckets = {1}}));
}

TYPED_TEST(BrokenWrapperTest, ARowOfAFullBucketThatNobodyComputesIsFound) {
  const Report report = this->Check(Fault::kMissesLastRow);
  this->ExpectOnly(Finding::Kind::kReadsPadding, report);
  ASSERT_FALSE(report.findings.empty());
  EXPECT_EQ(report.findings[0].row, report.findings[0].bucket - 1);
}

TYPED_TEST(BrokenWrapperTest, ASkippedTokenIsAWrongValue) {
  this->ExpectOnly(Finding::Kind::kWrongValue, this->Check(Fault::kSkipsNewest));
}

TYPED_TEST(BrokenWrapperTest, TheOtherBaseOfTheLseIsAWrongValue) {
  this->ExpectOnly(Finding::Kind::kWrongValue, this->Check(Fault::kNaturalLse));
}

TYPED_TEST(BrokenWrapperTest, AnEmptyLiveRowOfNanIsAWrongValue) {
  this->ExpectOnly(Finding::Kind::kWrongValue, this->Check(Fault::kDividesByZero));
  // A wrapper that takes no empty requests says so, and is given none.
  const Report report = this->Check(Fault::kDividesByZero, {.head_dim = 16, .buckets = {1, 3}, .min_length = 1});
  EXPECT_TRUE(report.findings.empty()) << report.ToString();
}

TYPED_TEST(BrokenWrapperTest, RowsBeyondTheBucketAreWritesOutside) {
  const Report report = this->Check(Fault::kRunsMaxRows);
  this->ExpectOnly(Finding::Kind::kWritesOutside, report);
  EXPECT_EQ(report.findings.size(), 2u);  // not in the largest bucket
  EXPECT_NE(report.ToString().find("out row 1, element 0"), std::string::npos) << report.ToString();
}

TYPED_TEST(BrokenWrapperTest, AnAppendFromAPaddedRowIsAWriteOutside) {
  const Report report = this->Check(Fault::kLeavesSlotTail, {.head_dim = 16, .buckets = {1, 3, 6}, .appends = true});
  this->ExpectOnly(Finding::Kind::kWritesOutside, report);
  EXPECT_NE(report.ToString().find("k page"), std::string::npos) << report.ToString();
}

TYPED_TEST(BrokenWrapperTest, ARowCountFrozenAtCaptureIsFoundInReplays) {
  this->ExpectOnly(Finding::Kind::kReplayDiffers, this->Check(Fault::kFreezesRows, {.head_dim = 16, .buckets = {6}}));
}

TYPED_TEST(BrokenWrapperTest, ArraysThatAreNewInEachStepAreFoundInReplays) {
  const AttentionShape shape = {.head_dim = 16, .buckets = {1, 3, 6}};
  const Report report = this->Check(Fault::kNewArrays, shape, false);  // nobody could name them
  EXPECT_TRUE(report.Has(Finding::Kind::kReplayDiffers)) << report.ToString();
  EXPECT_FALSE(report.Has(Finding::Kind::kNotRepeatable)) << report.ToString();
  EXPECT_FALSE(report.Has(Finding::Kind::kReadsPadding)) << report.ToString();
}

TYPED_TEST(BrokenWrapperTest, AnotherKernelInCapturesIsFoundInTheFirstLaunch) {
  const Report report = this->Check(Fault::kCapturesOther);
  EXPECT_TRUE(report.Has(Finding::Kind::kCapturedDiffers)) << report.ToString();
  EXPECT_FALSE(report.Has(Finding::Kind::kNotRepeatable)) << report.ToString();
  EXPECT_FALSE(report.Has(Finding::Kind::kReadsPadding)) << report.ToString();
}

TYPED_TEST(BrokenWrapperTest, AKernelOnAStreamThatIsNotCapturedIsFoundInTheFirstLaunch) {
  const Report report = this->Check(Fault::kLeavesCapture);
  EXPECT_TRUE(report.Has(Finding::Kind::kCapturedDiffers)) << report.ToString();
  EXPECT_FALSE(report.Has(Finding::Kind::kNotRepeatable)) << report.ToString();
  EXPECT_FALSE(report.Has(Finding::Kind::kRefused)) << report.ToString();
}

TYPED_TEST(BrokenWrapperTest, BlockingInRunIsRefused) {
  const Report report = this->Check(Fault::kBlocks);
  this->ExpectOnly(Finding::Kind::kRefused, report);
  EXPECT_EQ(report.findings.size(), 3u);  // each bucket's capture
  EXPECT_NE(report.ToString().find("capture of Run"), std::string::npos) << report.ToString();
}

TYPED_TEST(BrokenWrapperTest, AFailedStreamEndsTheCheck) {
  const Report report = this->Check(Fault::kFails);
  this->ExpectOnly(Finding::Kind::kRefused, report);
  // Once for each bucket where the launch is refused at the call (CUDA, or a worker that was quick), else once.
  EXPECT_GE(report.findings.size(), 1u) << report.ToString();
  EXPECT_LE(report.findings.size(), 3u) << report.ToString();
  EXPECT_LE(report.runs, 1);
}

TYPED_TEST(BrokenWrapperTest, AnErrorForAStepOfPaddingOnlyIsRefused) {
  const Report report = this->Check(Fault::kRefusesNoRequests);
  this->ExpectOnly(Finding::Kind::kRefused, report);
  EXPECT_NE(report.ToString().find("naive: no requests (bucket 1, lengths [])"), std::string::npos)
      << report.ToString();
}

TYPED_TEST(BrokenWrapperTest, MetadataThatIsNotUploadedAgainIsFound) {
  // Known arrays are poisoned, so what was not written shows at once…
  EXPECT_TRUE(this->Check(Fault::kSkipsSameRows).Has(Finding::Kind::kReadsPadding));
  // …and what the step before left in unknown ones shows in another order of steps.
  const AttentionShape shape = {.head_dim = 16, .buckets = {1, 3, 6}};
  EXPECT_TRUE(this->Check(Fault::kSkipsSameRows, shape, false).Has(Finding::Kind::kNotRepeatable));
}

TYPED_TEST(BrokenWrapperTest, TheGoogleTestLayerFailsWithTheReport) {
  const AttentionShape shape = {.head_dim = 16, .buckets = {1}};
  ASSERT_OK_AND_ASSIGN(const auto good, NaiveWrapper::Create(*this->device_, shape, Fault::kNone));
  EXPECT_TRUE(Conforms(*this->stream_, *good, shape));
  ASSERT_OK_AND_ASSIGN(const auto bad, NaiveWrapper::Create(*this->device_, shape, Fault::kSkipsNewest));
  EXPECT_NONFATAL_FAILURE(EXPECT_TRUE(Conforms(*this->stream_, *bad, shape)), "wrong value: row 0, head 0");
}

TYPED_TEST(BrokenWrapperTest, AShapeThatMakesNoSenseIsInvalid) {
  ASSERT_OK_AND_ASSIGN(const auto wrapper, NaiveWrapper::Create(*this->device_, {}, Fault::kNone));
  EXPECT_STATUS(CheckAttention(*this->stream_, *wrapper, {.q_heads = 3}), kInvalidArgument, "q_heads is 3");
  EXPECT_STATUS(CheckAttention(*this->stream_, *wrapper, {.dtype = attention::DType::kFloat8E4M3}), kInvalidArgument,
                "dtype is float8_e4m3; accepted: float32, bfloat16, float16");
  EXPECT_STATUS(CheckAttention(*this->stream_, *wrapper, {.kv_dtype = attention::DType::kFloat16}), kInvalidArgument,
                "kv_dtype is float16; accepted: dtype, which is float32, or float8_e4m3");
  EXPECT_STATUS(CheckAttention(*this->stream_, *wrapper, {.page_size = 0}), kInvalidArgument, "page_size is 0");
  EXPECT_STATUS(CheckAttention(*this->stream_, *wrapper, {.buckets = {4, 2}}), kInvalidArgument, "buckets is 2");
  EXPECT_STATUS(CheckAttention(*this->stream_, *wrapper, {.buckets = {}}), kInvalidArgument, "buckets is empty");
}

// Whether a copy has read its staging memory when the host overwrites it is a race; HostDeferred decides it.
TEST(BrokenWrapperHostDeferredTest, AStagingSlotThatIsUsedTwiceIsFoundInReplaysInFlight) {
  ASSERT_OK_AND_ASSIGN(const auto device, HostDeferred::Create());
  ASSERT_OK_AND_ASSIGN(const auto stream, device->CreateStream());
  AttentionShape shape = {.head_dim = 16, .buckets = {1, 3, 6}};
  ASSERT_OK_AND_ASSIGN(const auto wrapper, NaiveWrapper::Create(*device, shape, Fault::kOneStagingSlot));
  ASSERT_OK_AND_ASSIGN(const Report report, CheckAttention(*stream, *wrapper, shape));
  EXPECT_TRUE(report.Has(Finding::Kind::kReplayDiffers)) << report.ToString();
  EXPECT_FALSE(report.Has(Finding::Kind::kNotRepeatable)) << report.ToString();
  shape.steps_in_flight = 1;  // legal for a wrapper that says so
  EXPECT_TRUE(Conforms(*stream, *wrapper, shape));
}

}  // namespace
}  // namespace pristine::testing
