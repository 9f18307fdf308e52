// Bugs of padded rows that engines had, made the way they were made there: docs/culprits.md, 1 to 12.
#include <cmath>
#include <limits>

#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

constexpr Extent kBucket{4, 8};
using Ints = std::vector<int32_t>;

template <class BackendT>
class PaddingRegression : public BufferTest<BackendT> {
 protected:
  Buffer<int32_t> Refilled(const std::string& name, Kind kind, Axis axis, int32_t limit, const Ints& original,
                           int32_t dummy = 0) {
    BufferSpec spec = Spec(name, Role::kRefilled, kind, axis);
    spec.limit = limit;
    spec.dummy = dummy;
    return this->Register(spec, original);
  }
};
TYPED_TEST_SUITE(PaddingRegression, AllBackends, BackendNames);

// A gather by position runs over the whole bucket. After a larger batch the rows behind the real ones still held that
// batch's positions; once the gathered table was smaller, the gather read past its end.
TYPED_TEST(PaddingRegression, Sglang10892PositionsOfALargerBatchAreGone) {
  this->MakeManager();
  const auto positions = this->Refilled("positions", Kind::kPosition, Axis::Tokens(), 64, Ints(8, 0));
  const auto seen = this->EngineMemory(Ints(8, -1));
  this->Capture({kBucket}, [&](Stream& stream, const Extent& bucket) {
    return Launch(stream, kCopyInts, CopyIntsParams{seen.address(), positions.live.address(), bucket.tokens});
  });
  const auto step = [&](const Ints& values, int32_t requests) {
    const Extent extent{requests, static_cast<int32_t>(values.size())};
    ASSERT_OK(this->manager().BeginStep(kBucket, extent));
    ASSERT_OK(this->Refill(positions, values));
    ASSERT_OK(this->Replay(kBucket, extent));
  };
  step({56, 57, 58, 59, 60, 61, 62, 63}, 4);
  step({1, 2, 3}, 3);
  EXPECT_EQ(this->Read(seen), (Ints{1, 2, 3, 0, 0, 0, 0, 0}));
  EXPECT_EQ(Describe(this->Poll()), "");
  // The same bug with the stale number in a real row: sglang#24361 ran for hours before it faulted.
  step({1, 64, 3}, 3);
  EXPECT_EQ(this->Read(seen), Ints(8, 0)) << "the body saw only what is harmless";
  const std::vector<Violation> found = this->Poll();
  ASSERT_EQ(found.size(), 1u) << Describe(found);
  EXPECT_STREQ(found[0].buffer, "positions");
  EXPECT_EQ(found[0].index, 1);
  EXPECT_EQ(found[0].actual, 64);
}

// Some arrays were padded to the number of requests and others to that of tokens, each by its own code, and one not at
// all.
TYPED_TEST(PaddingRegression, Vllm39773ArraysByRequestByTokenAndByPageArePaddedEachToItsOwnCount) {
  this->MakeManager();
  const auto last = this->Refilled("last_token_indices", Kind::kPosition, Axis::Requests(), 8, Ints(4, 0));
  const auto indptr = this->Refilled("qo_indptr", Kind::kIndptr, Axis::RequestsPlusOne(), 8, {0, 2, 4, 6, 8});
  const auto positions = this->Refilled("positions", Kind::kPosition, Axis::Tokens(), 64, Ints(8, 0));
  const auto pages = this->Refilled("kv_indices", Kind::kPageTable, Axis::Pages(), 100, Ints(6, 99), 99);
  this->Capture({kBucket}, kEmptyBody);
  ASSERT_OK(this->manager().BeginStep(kBucket, kBucket));
  ASSERT_OK(this->Refill(last, {1, 3, 5, 7}));
  ASSERT_OK(this->Refill(indptr, {0, 2, 4, 6, 8}));
  ASSERT_OK(this->Refill(positions, Ints(8, 50)));
  ASSERT_OK(this->Refill(pages, {11, 12, 13, 14, 15, 16}));
  ASSERT_OK(this->Replay(kBucket, kBucket));
  constexpr Extent kOne{1, 2};
  ASSERT_OK(this->manager().BeginStep(kBucket, kOne));
  EXPECT_STATUS(this->Refill(last, {1, 1}), kInvalidArgument, "refill of last_token_indices with 2 elements; extent");
  EXPECT_STATUS(this->Refill(positions, {50}), kInvalidArgument, "refill of positions with 1 elements; extent");
  ASSERT_OK(this->Refill(last, {1}));
  ASSERT_OK(this->Refill(indptr, {0, 2}));
  ASSERT_OK(this->Refill(positions, {50, 51}));
  ASSERT_OK(this->Refill(pages, {17}));
  ASSERT_OK(this->Replay(kBucket, kOne));
  EXPECT_EQ(this->Read(last), (Ints{1, 0, 0, 0}));
  EXPECT_EQ(this->Read(indptr), (Ints{0, 2, 2, 2, 2}));
  EXPECT_EQ(this->Read(positions), (Ints{50, 51, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(this->Read(pages), (Ints{17, 99, 99, 99, 99, 99}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

// The engine's own arrays on the host are as long as the bucket; rows behind the batch kept the state of requests that
// had gone, and a padded row was taken for a prefill with a live state slot.
TYPED_TEST(PaddingRegression, Vllm41841StaleRowsOfAHostArrayNeverReachPaddedRows) {
  this->MakeManager();
  const auto slots = this->Refilled("state_slots", Kind::kSlot, Axis::Requests(), 16, Ints(4, -1));
  const auto has_state = this->template Register<uint8_t>(
      Spec("has_initial_state", Role::kRefilled, Kind::kMask, Axis::Requests()), std::vector<uint8_t>(4, 0));
  this->Capture({kBucket}, kEmptyBody);
  Ints host_slots = {3, 4, 5, 6};
  std::vector<uint8_t> host_has_state(4, 1);
  const auto refill = [&](size_t rows) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(
        this->manager().template Refill<int32_t>(slots, absl::MakeConstSpan(host_slots).first(rows)));
    return this->manager().template Refill<uint8_t>(has_state, absl::MakeConstSpan(host_has_state).first(rows));
  };
  ASSERT_OK(this->manager().BeginStep(kBucket, {4, 4}));
  ASSERT_OK(refill(4));
  ASSERT_OK(this->Replay(kBucket, {4, 4}));
  host_slots[0] = 7;
  ASSERT_OK(this->manager().BeginStep(kBucket, {1, 1}));
  EXPECT_STATUS(refill(4), kInvalidArgument, "refill of state_slots with 4 elements");
  ASSERT_OK(refill(1));
  ASSERT_OK(this->Replay(kBucket, {1, 1}));
  EXPECT_EQ(this->Read(slots), (Ints{7, -1, -1, -1}));
  EXPECT_EQ(this->Read(has_state), (std::vector<uint8_t>{1, 0, 0, 0}));
}

// One indptr had one element where the other had one more than the batch has requests; the planner read on, into memory
// that nobody wrote, and asked for a huge workspace.
TYPED_TEST(PaddingRegression, FlashInfer362AnIndptrOfOneElementForABatchIsRefused) {
  this->MakeManager();
  const auto indptr = this->Refilled("kv_indptr", Kind::kIndptr, Axis::RequestsPlusOne(), 100, {0, 9, 18, 27, 36});
  this->Capture({kBucket}, kEmptyBody);
  ASSERT_OK(this->manager().BeginStep(kBucket, {3, 3}));
  EXPECT_STATUS(this->Refill(indptr, {0}), kInvalidArgument,
                "refill of kv_indptr with 1 elements; extent {3 requests, 3 tokens} has 4");
  EXPECT_STATUS(this->Replay(kBucket, {3, 3}), kFailedPrecondition, "buffer kv_indptr");
  this->Refilled("short_indptr", Kind::kIndptr, Axis::RequestsPlusOne(), 100, {0});
  EXPECT_STATUS(this->runner_->Recapture(*this->stream(), kBucket), kOutOfRange,
                "needs 5 elements of buffer short_indptr, which has 1");
}

// A scale was the largest magnitude over all rows of the bucket; NaN that a padded row kept from an earlier batch
// spread to every real row.
TYPED_TEST(PaddingRegression, FlashInfer3057AReductionOverTheBucketSeesNoNanOfPaddedRows) {
  this->MakeManager();
  const auto hidden = this->template Register<float>(Spec("hidden", Role::kRefilled, Kind::kOpaque, Axis::Tokens(2)),
                                                     std::vector<float>(16, 0));
  this->Capture({kBucket}, kEmptyBody);
  const auto step = [&](const std::vector<float>& values, const Extent& extent) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kBucket, extent));
    PRISTINE_RETURN_IF_ERROR(this->manager().template Refill<float>(hidden, values));
    return this->Replay(kBucket, extent);
  };
  ASSERT_OK(step(std::vector<float>(16, std::numeric_limits<float>::quiet_NaN()), kBucket));
  ASSERT_OK(step({1, -8, 3, 4}, {2, 2}));
  float scale = 0;
  for (const float value : this->Read(hidden)) {
    ASSERT_TRUE(std::isfinite(value));
    scale = std::max(scale, std::abs(value));
  }
  EXPECT_EQ(scale, 8);
}

}  // namespace
}  // namespace pristine::testing
