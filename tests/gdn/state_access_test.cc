#include "pristine/attention/gdn/state_access.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pristine/attention/gdn/recurrent.h"
#include "pristine/graph_runtime/graph.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DeviceCaps;
using namespace attention::gdn;  // NOLINT(build/namespaces)

TEST(StateAccessRule, InPlaceEverywhereUnlessAskedForTheOther) {
  const auto gpu = [](int major) { return DeviceCaps{.backend = Backend::kCuda, .sm_major = major}; };
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const StateAccessPolicy in_place = {StateAccess::kInPlace, dtype};
    const StateAccessPolicy gathered = {StateAccess::kGatherScatter, DType::kFloat32};
    EXPECT_EQ(ChooseStateAccess({}, dtype), in_place);
    for (const int major : {8, 9, 10, 12}) EXPECT_EQ(ChooseStateAccess(gpu(major), dtype), in_place);
    EXPECT_EQ(ChooseStateAccess(gpu(9), dtype, AccessRule::kSglang22921), gathered);
    EXPECT_EQ(ChooseStateAccess(gpu(8), dtype, AccessRule::kSglang22921), gathered);
    EXPECT_EQ(ChooseStateAccess(gpu(10), dtype, AccessRule::kSglang22921), in_place);
    EXPECT_EQ(ChooseStateAccess(gpu(12), dtype, AccessRule::kSglang22921), in_place);
    EXPECT_EQ(ChooseStateAccess({}, dtype, AccessRule::kSglang22921), in_place);
  }
}

template <class BackendT>
class StateAccessTest : public DeviceTest<BackendT> {
 protected:
  static constexpr int32_t kHeads = 3, kRows = 5, kSlots = 6;

  void Make(DType pool_dtype, DType gathered_dtype) {
    ASSERT_OK_AND_ASSIGN(pool_, StatePool::Create(*this->device_, pool_dtype, kHeads, kSlots));
    pool_bytes_ =
        Encode(pool_dtype, Uniform(random_, pool_->view().states.size() / attention::SizeOf(pool_dtype), -0.3, 0.3));
    ASSERT_OK_AND_ASSIGN(gathered_, MakeTensor(*this->device_, *this->stream_, gathered_dtype,
                                               std::vector<double>(kRows * kHeads * kStateElements, NAN)));
    for (DeviceBuffer* to : {&indices_, &gathered_indices_}) {
      ASSERT_OK_AND_ASSIGN(*to, this->device_->Allocate(kRows * sizeof(int32_t), "indices"));
    }
    Reset();
  }
  void Reset() {
    ASSERT_OK(this->stream_->CopyFromHost(pool_->view().states, pool_bytes_));
    ASSERT_OK(this->stream_->Synchronize());
  }
  void SetIndices(const std::vector<int32_t>& values) {
    ASSERT_OK(this->stream_->CopyFromHost(indices_.template As<std::byte>(),
                                          {reinterpret_cast<const std::byte*>(values.data()), 4 * values.size()}));
    ASSERT_OK(this->stream_->Synchronize());
  }
  StateView Gathered() const {
    return {gathered_.dtype, kHeads, kRows, kHeads * kStateElements, gathered_.bytes(), PaddedRows::kSkip};
  }
  Bytes States() {
    absl::StatusOr<Bytes> bytes = ReadBytes(*this->stream_, pool_->view().states);
    EXPECT_OK(bytes);
    return *bytes;
  }
  void TearDown() override {
    pool_.reset();
    gathered_ = {};
    indices_ = {};
    gathered_indices_ = {};
    DeviceTest<BackendT>::TearDown();
  }

  std::mt19937_64 random_{41};
  std::unique_ptr<StatePool> pool_;
  Bytes pool_bytes_;
  Tensor gathered_;
  DeviceBuffer indices_, gathered_indices_;
};
TYPED_TEST_SUITE(StateAccessTest, AllBackends, BackendNames);

// Eager and as replays of one graph, over other slots each time. Bits where the dtypes are the same; else the order of
// a sum may differ.
TYPED_TEST(StateAccessTest, DecodeGivesTheSameResultsBothWays) {
  const DType dtypes[][2] = {
      {DType::kFloat32, DType::kFloat32}, {DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32}};
  for (const auto& [state, gathered_dtype] : dtypes) {
    this->Make(state, gathered_dtype);
    constexpr int32_t rows = TestFixture::kRows, heads = TestFixture::kHeads;
    ASSERT_OK_AND_ASSIGN(const Layer layer, MakeLayer(*this->device_, *this->stream_, DType::kBFloat16, 1, heads, rows,
                                                      true, this->random_));
    ASSERT_OK_AND_ASSIGN(const Tensor out, MakeTensor(*this->device_, *this->stream_, DType::kBFloat16,
                                                      std::vector<double>(rows * heads * 128, NAN)));
    const StateView pool = this->pool_->view(), gathered = this->Gathered();
    RecurrentInputs inputs = {.qk_heads = 1,
                              .q = layer.Part(0),
                              .k = layer.Part(128),
                              .v = layer.Part(256),
                              .gates = layer.gates(),
                              .cache_indices = this->indices_.template As<const int32_t>()};
    RecurrentInputs on_gathered = inputs;
    on_gathered.cache_indices = this->gathered_indices_.template As<const int32_t>();
    const auto body = [&](Stream& s) -> absl::Status {
      PRISTINE_RETURN_IF_ERROR(
          GatherStates(s, rows, inputs.cache_indices, pool, gathered, this->gathered_indices_.template As<int32_t>()));
      PRISTINE_RETURN_IF_ERROR(Decode(s, rows, on_gathered, gathered, out.bytes()));
      return ScatterStates(s, rows, inputs.cache_indices, gathered, pool);
    };
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, Capture(*this->stream_, body));
    ASSERT_EQ(graph->nodes().size(), 3u);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
    constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
    for (const std::vector<int32_t>& slots : std::vector<std::vector<int32_t>>{
             {1, 2, 3, 4, 5}, {6, -1, 2, kMax, 1}, {-1, -1, -1, -1, -1}, {5, 4, -1, -7, 6}}) {
      this->SetIndices(slots);
      this->Reset();
      ASSERT_OK(Decode(*this->stream_, rows, inputs, pool, out.bytes()));
      ASSERT_OK_AND_ASSIGN(const Bytes expected, ReadBytes(*this->stream_, out.bytes()));
      const Bytes states = this->States();
      for (const bool captured : {false, true}) {
        this->Reset();
        ASSERT_OK(captured ? exec->Launch(*this->stream_) : body(*this->stream_));
        ASSERT_OK_AND_ASSIGN(const Bytes got, ReadBytes(*this->stream_, out.bytes()));
        if (state == gathered_dtype) {
          EXPECT_TRUE(got == expected) << captured;
          EXPECT_TRUE(this->States() == states) << captured;
          continue;
        }
        // Half a step of bfloat16, here and there.
        EXPECT_LT(RelativeRms(Decoded(DType::kBFloat16, expected), Decoded(DType::kBFloat16, got)), 1e-3);
        EXPECT_LT(RelativeRms(Decoded(state, states), Decoded(state, this->States())), 1e-3);
      }
    }
  }
}

TYPED_TEST(StateAccessTest, VerifyAndCommitGiveTheSameBitsBothWays) {
  for (const DType state : {DType::kFloat32, DType::kBFloat16}) {
    this->Make(state, state);
    constexpr int32_t rows = TestFixture::kRows, heads = TestFixture::kHeads, tokens = 3;
    ASSERT_OK_AND_ASSIGN(const Layer layer, MakeLayer(*this->device_, *this->stream_, DType::kBFloat16, 1, heads,
                                                      rows * tokens, true, this->random_));
    ASSERT_OK_AND_ASSIGN(const Tensor out, MakeTensor(*this->device_, *this->stream_, DType::kBFloat16,
                                                      std::vector<double>(rows * tokens * heads * 128, NAN)));
    ASSERT_OK_AND_ASSIGN(const DeviceBuffer accepted, this->device_->Allocate(rows * sizeof(int32_t), "accepted"));
    const int32_t counts[rows] = {3, 0, 1, 2, 3};
    ASSERT_OK(this->stream_->CopyFromHost(accepted.As<std::byte>(),
                                          {reinterpret_cast<const std::byte*>(counts), sizeof(counts)}));
    this->SetIndices({4, 1, -1, 6, 2});
    const StateView pool = this->pool_->view(), gathered = this->Gathered();
    RecurrentInputs inputs = {.qk_heads = 1,
                              .q = layer.Part(0),
                              .k = layer.Part(128),
                              .v = layer.Part(256),
                              .gates = layer.gates(),
                              .cache_indices = this->indices_.template As<const int32_t>()};
    const auto round = [&](const RecurrentInputs& at, const StateView& states) -> absl::Status {
      PRISTINE_RETURN_IF_ERROR(Verify(*this->stream_, rows, tokens, at, states, out.bytes()));
      return Commit(*this->stream_, rows, tokens, at, states, accepted.As<const int32_t>());
    };
    ASSERT_OK(round(inputs, pool));
    ASSERT_OK_AND_ASSIGN(const Bytes expected, ReadBytes(*this->stream_, out.bytes()));
    const Bytes states = this->States();
    EXPECT_FALSE(states == this->pool_bytes_);
    this->Reset();
    ASSERT_OK(this->stream_->Fill(out.bytes(), std::byte{0xFF}));
    const DeviceSpan<const int32_t> slots = inputs.cache_indices;
    ASSERT_OK(
        GatherStates(*this->stream_, rows, slots, pool, gathered, this->gathered_indices_.template As<int32_t>()));
    inputs.cache_indices = this->gathered_indices_.template As<const int32_t>();
    ASSERT_OK(round(inputs, gathered));
    ASSERT_OK(ScatterStates(*this->stream_, rows, slots, gathered, pool));
    ASSERT_OK_AND_ASSIGN(const Bytes got, ReadBytes(*this->stream_, out.bytes()));
    EXPECT_TRUE(got == expected);
    EXPECT_TRUE(this->States() == states);
  }
}

TYPED_TEST(StateAccessTest, CopiesRoundAndLeavePaddedRowsAlone) {
  for (const DType pool : {DType::kFloat32, DType::kBFloat16}) {
    for (const DType gathered : {DType::kFloat32, DType::kBFloat16}) {
      this->Make(pool, gathered);
      this->SetIndices({3, -1, 6, 7, 1});
      ASSERT_OK(GatherStates(*this->stream_, 5, this->indices_.template As<const int32_t>(), this->pool_->view(),
                             this->Gathered(), this->gathered_indices_.template As<int32_t>()));
      ASSERT_OK_AND_ASSIGN(const Bytes index_bytes,
                           ReadBytes(*this->stream_, this->gathered_indices_.template As<std::byte>()));
      const std::vector<int32_t> expected_indices = {0, -1, 2, -1, 4};
      EXPECT_EQ(std::memcmp(index_bytes.data(), expected_indices.data(), index_bytes.size()), 0);
      ASSERT_OK_AND_ASSIGN(const std::vector<double> got, ReadTensor(*this->stream_, this->gathered_));
      const std::vector<double> states = Decoded(pool, this->pool_bytes_);
      constexpr size_t kState = TestFixture::kHeads * kStateElements;
      const int32_t slots[5] = {3, -1, 6, -1, 1};
      for (size_t r = 0; r < 5; ++r) {
        const std::vector<double> row(&got[r * kState], &got[r * kState] + kState);
        if (slots[r] < 0) {
          EXPECT_TRUE(std::isnan(row[0]) && std::isnan(row[kState - 1]));
          continue;
        }
        const double* const from = &states[static_cast<size_t>(slots[r]) * kState];
        EXPECT_EQ(row, Decoded(gathered, Encode(gathered, std::vector<double>(from, from + kState)))) << r;
      }
      // Back into a pool of ones: only the slots that are named change.
      ASSERT_OK(this->stream_->Fill(this->pool_->view().states, std::byte{0x3F}));
      ASSERT_OK(ScatterStates(*this->stream_, 5, this->indices_.template As<const int32_t>(), this->Gathered(),
                              this->pool_->view()));
      const Bytes after = this->States();
      const size_t slot_bytes = kState * attention::SizeOf(pool);
      for (size_t s = 0; s <= TestFixture::kSlots; ++s) {
        const std::byte* const at = &after[s * slot_bytes];
        const bool untouched = std::all_of(at, at + slot_bytes, [](std::byte b) { return b == std::byte{0x3F}; });
        EXPECT_EQ(untouched, s != 3 && s != 6 && s != 1) << s;
      }
    }
  }
}

TYPED_TEST(StateAccessTest, ClampGathersSlotZeroAndStoresNothingThere) {
  this->Make(DType::kFloat32, DType::kFloat32);
  this->SetIndices({-1, 2, -1, -1, -1});
  StateView pool = this->pool_->view();
  pool.padded_rows = PaddedRows::kClampToZero;
  ASSERT_OK(GatherStates(*this->stream_, 2, this->indices_.template As<const int32_t>(), pool, this->Gathered(),
                         this->gathered_indices_.template As<int32_t>()));
  ASSERT_OK_AND_ASSIGN(const Bytes got, ReadBytes(*this->stream_, this->gathered_.bytes()));
  const size_t slot = TestFixture::kHeads * kStateElements * sizeof(float);
  EXPECT_EQ(std::memcmp(got.data(), this->pool_bytes_.data(), slot), 0);
  ASSERT_OK(this->stream_->Fill(this->gathered_.bytes(), std::byte{0}));
  ASSERT_OK(ScatterStates(*this->stream_, 2, this->indices_.template As<const int32_t>(), this->Gathered(), pool));
  const Bytes after = this->States();
  EXPECT_EQ(std::memcmp(after.data(), this->pool_bytes_.data(), 2 * slot), 0);
}

TYPED_TEST(StateAccessTest, RefusesWhatDoesNotFit) {
  this->Make(DType::kFloat32, DType::kFloat32);
  const auto indices = this->indices_.template As<const int32_t>();
  const auto out = this->gathered_indices_.template As<int32_t>();
  const StateView pool = this->pool_->view(), gathered = this->Gathered();
  EXPECT_STATUS(GatherStates(*this->stream_, 0, indices, pool, gathered, out), kInvalidArgument, "rows is 0");
  EXPECT_STATUS(GatherStates(*this->stream_, 6, indices, pool, gathered, out), kInvalidArgument,
                "gathered has 5 slots of 3 heads");
  StateView other = gathered;
  other.v_heads = 2;
  EXPECT_STATUS(GatherStates(*this->stream_, 5, indices, pool, other, out), kInvalidArgument,
                "gathered has 5 slots of 2 heads");
  other = gathered;
  other.states = other.states.Sub(0, 100);
  EXPECT_STATUS(ScatterStates(*this->stream_, 5, indices, other, pool), kInvalidArgument, "gathered has 25 elements");
  ASSERT_NO_FATAL_FAILURE(ForBadSlots(pool, [&](const StateView& view) {
    EXPECT_STATUS(GatherStates(*this->stream_, 5, indices, view, gathered, out), kInvalidArgument, "pool");
    EXPECT_STATUS(ScatterStates(*this->stream_, 5, indices, gathered, view), kInvalidArgument, "pool");
  }));
  ASSERT_NO_FATAL_FAILURE(ForBadSlots(gathered, [&](const StateView& view) {
    EXPECT_STATUS(GatherStates(*this->stream_, 5, indices, pool, view, out), kInvalidArgument, "gathered");
    EXPECT_STATUS(ScatterStates(*this->stream_, 5, indices, view, pool), kInvalidArgument, "gathered");
  }));
  EXPECT_STATUS(GatherStates(*this->stream_, 5, indices, pool, gathered, this->indices_.template As<int32_t>()),
                kInvalidArgument, "gathered_indices and cache_indices overlap");
  other = pool;
  other.slots = 5;
  other.states = pool.states.Sub(static_cast<size_t>(pool.slot_stride) * 4, static_cast<size_t>(pool.slot_stride) * 20);
  EXPECT_STATUS(GatherStates(*this->stream_, 5, indices, pool, other, out), kInvalidArgument, "gathered overlap");
  EXPECT_STATUS(ScatterStates(*this->stream_, 5, indices, other, pool), kInvalidArgument, "gathered overlap");
  other = pool;
  other.dtype = DType::kFloat16;
  EXPECT_STATUS(ScatterStates(*this->stream_, 5, indices, gathered, other), kUnimplemented, "pool is float16");
  EXPECT_STATUS(ScatterStates(*this->stream_, 5, indices.Sub(0, 4), gathered, pool), kInvalidArgument,
                "cache_indices has 4 elements, needs 5");
  EXPECT_STATUS(GatherStates(*this->stream_, 5, indices, pool, gathered, {}), kInvalidArgument,
                "gathered_indices has 0 elements, needs 5");
}

}  // namespace
}  // namespace pristine::testing
