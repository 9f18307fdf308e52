// StatePool by itself: what it hands out, what it refuses, and how a BufferManager looks after it. What a run does with
// its slots is in state_slots_test.cc.
#include "pristine/attention/gdn/state_pool.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using namespace attention::gdn;  // NOLINT(build/namespaces): the suite is about that namespace

template <class BackendT>
class StatePoolTest : public DeviceTest<BackendT> {};
TYPED_TEST_SUITE(StatePoolTest, AllBackends, BackendNames);

TYPED_TEST(StatePoolTest, NeverHandsOutSlotZeroAndZeroesWhatItHandsOut) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<StatePool> pool, StatePool::Create(*this->device_, DType::kBFloat16, 2, 3));
  ASSERT_OK(this->stream_->Fill(pool->view().states, std::byte{0xFF}));
  std::vector<bool> seen(4);
  for (int i = 0; i < 3; ++i) {
    ASSERT_OK_AND_ASSIGN(const Slot slot, pool->Allocate(*this->stream_));
    ASSERT_GE(slot, 1);
    ASSERT_LE(slot, 3);
    EXPECT_FALSE(seen[static_cast<size_t>(slot)]);
    seen[static_cast<size_t>(slot)] = true;
  }
  EXPECT_STATUS(pool->Allocate(*this->stream_), kResourceExhausted, "all 3 slots are taken");
  ASSERT_OK_AND_ASSIGN(const Bytes states, ReadBytes(*this->stream_, pool->view().states));
  const size_t slot_bytes = states.size() / 4;
  for (size_t i = 0; i < states.size(); ++i) {
    ASSERT_EQ(states[i], i < slot_bytes ? std::byte{0xFF} : std::byte{0}) << i;
  }
  EXPECT_STATUS(pool->Free(0), kInvalidArgument, "slot 0 is not handed out");
  EXPECT_STATUS(pool->Free(kNoSlot), kInvalidArgument, "slot -1 is not handed out");
  EXPECT_STATUS(pool->Free(4), kInvalidArgument, "slot 4 is not handed out");
  EXPECT_OK(pool->Free(2));
  EXPECT_STATUS(pool->Free(2), kInvalidArgument, "slot 2 is not handed out");
  ASSERT_OK_AND_ASSIGN(const Slot again, pool->Allocate(*this->stream_));
  EXPECT_EQ(again, 2);
  ASSERT_OK(this->stream_->Synchronize());  // the pool outlives what is queued for it
}

// In a capture the zeroing would become a node, and every replay would zero a slot that is someone's.
TYPED_TEST(StatePoolTest, HandsOutNothingInACapture) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<StatePool> pool, StatePool::Create(*this->device_, DType::kBFloat16, 2, 3));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& stream) {
                         EXPECT_STATUS(pool->Allocate(stream), kFailedPrecondition, "the stream is capturing");
                         return absl::OkStatus();
                       }));
  EXPECT_TRUE(graph->nodes().empty());
  EXPECT_EQ(pool->free_slots(), 3);
}

// sglang #36880: -1 became a slot that a live request owned.
TYPED_TEST(StatePoolTest, Sglang36880ClampIsRefusedWhereSlotZeroIsAllocatable) {
  ASSERT_OK_AND_ASSIGN(const DeviceBuffer memory,
                       this->device_->Allocate(3 * kStateElements * sizeof(float), "foreign states"));
  ForeignPool foreign = {DType::kFloat32, 1, 3, 0, memory.As<std::byte>(), 0};
  EXPECT_STATUS(ViewOf(foreign, PaddedRows::kClampToZero), kInvalidArgument, "slot 0 is allocatable");
  EXPECT_OK(ViewOf(foreign, PaddedRows::kSkip));
  foreign.first_allocatable_slot = 1;
  ASSERT_OK_AND_ASSIGN(const StateView view, ViewOf(foreign, PaddedRows::kClampToZero));
  EXPECT_EQ(view.slot_stride, kStateElements);
  foreign.slots = 4;
  EXPECT_STATUS(ViewOf(foreign, PaddedRows::kSkip), kInvalidArgument, "states has 49152 elements, needs 65536");
  foreign.slots = 3;
  foreign.slot_stride = kStateElements + 2;
  EXPECT_STATUS(ViewOf(foreign, PaddedRows::kSkip), kInvalidArgument, "a multiple of 4");
  foreign.slot_stride = int64_t{1} << 62;
  EXPECT_STATUS(ViewOf(foreign, PaddedRows::kSkip), kInvalidArgument, "4611686018427387904 elements apart");
  foreign.slot_stride = 0;
  foreign.first_allocatable_slot = -1;
  EXPECT_STATUS(ViewOf(foreign, PaddedRows::kSkip), kInvalidArgument, "first_allocatable_slot is -1");
}

TYPED_TEST(StatePoolTest, ASlotHasBothStatesOfAllLayersAndStartsAsZeros) {
  constexpr int32_t kLayers = 3, kDim = 40, kSlots = 2;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<StatePool> pool,
                       StatePool::Create(*this->device_, DType::kBFloat16, 2, kSlots,
                                         {.layers = kLayers, .conv_dim = kDim, .conv_dtype = DType::kFloat32}));
  ASSERT_OK(this->stream_->Fill(pool->view().states, std::byte{0xFF}));
  ASSERT_OK(this->stream_->Fill(pool->conv_view().states, std::byte{0xFF}));
  ASSERT_OK_AND_ASSIGN(const Slot slot, pool->Allocate(*this->stream_));
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    const StateView view = pool->view(layer);
    const ConvStateView conv = pool->conv_view(layer);
    EXPECT_EQ(view.slots, kSlots + 1);
    EXPECT_EQ(conv.slots, kSlots + 1);
    EXPECT_EQ(view.slot_stride, kLayers * 2 * kStateElements);
    EXPECT_EQ(conv.slot_stride, kLayers * kDim * 3);
    ASSERT_OK_AND_ASSIGN(const Bytes states, ReadBytes(*this->stream_, view.states));
    ASSERT_OK_AND_ASSIGN(const Bytes convs, ReadBytes(*this->stream_, conv.states));
    for (Slot s = 0; s <= kSlots; ++s) {
      const std::byte expected = s == slot ? std::byte{0} : std::byte{0xFF};
      const size_t at = static_cast<size_t>(s * view.slot_stride) * 2, size = 2 * kStateElements * 2;
      EXPECT_EQ(std::count(&states[at], &states[at] + size, expected), static_cast<std::ptrdiff_t>(size));
      const size_t conv_at = static_cast<size_t>(s * conv.slot_stride) * 4, conv_size = size_t{kDim} * 3 * 4;
      EXPECT_EQ(std::count(&convs[conv_at], &convs[conv_at] + conv_size, expected),
                static_cast<std::ptrdiff_t>(conv_size));
    }
  }
  for (const int32_t layer : {-1, kLayers}) {
    EXPECT_EQ(pool->view(layer).slots, 0);
    EXPECT_EQ(pool->conv_view(layer).slots, 0);
  }
  EXPECT_STATUS(StatePool::Create(*this->device_, DType::kFloat32, 1, 1, {.layers = 0}), kInvalidArgument, "layers 0");
  EXPECT_STATUS(StatePool::Create(*this->device_, DType::kFloat32, 1, 1, {.conv_dim = -1}), kInvalidArgument,
                "conv_dim -1");
  EXPECT_STATUS(StatePool::Create(*this->device_, DType::kFloat32, 1, 1, {.conv_dtype = DType::kFloat16}),
                kUnimplemented, "conv_dtype is float16");
}

// Ops take slots of at most 2^31 elements: a pool that none of them takes is not made, nor its memory asked for.
TYPED_TEST(StatePoolTest, SlotsThatNoOpTakesAreRefusedBeforeAnythingIsAllocated) {
  const size_t before = this->device_->total_allocations();
  EXPECT_STATUS(StatePool::Create(*this->device_, DType::kBFloat16, (1 << 17) + 1, 1), kInvalidArgument,
                "a slot has 2147500032 elements of state and 0 of convolution inputs");
  EXPECT_STATUS(StatePool::Create(*this->device_, DType::kBFloat16, 32, 1, {.layers = 4097}), kInvalidArgument,
                "layers is 4097");
  EXPECT_STATUS(StatePool::Create(*this->device_, DType::kBFloat16, 1, 1, {.layers = 1024, .conv_dim = 1 << 20}),
                kInvalidArgument, "3221225472 of convolution inputs");
  EXPECT_EQ(this->device_->total_allocations(), before);
}

TYPED_TEST(StatePoolTest, AProtectThatFailedHalfWayLeavesNothingRegistered) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<StatePool> pool,
                       StatePool::Create(*this->device_, DType::kFloat32, 1, 1, {.conv_dim = 8}));
  {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<BufferManager> manager, BufferManager::Create(*this->device_));
    const int32_t value = 7;
    ASSERT_OK(manager->Register<int32_t>({.name = "states.conv.slot0"}, {&value, 1}));  // the name is taken
    EXPECT_STATUS(pool->Protect(*manager, "states"), kAlreadyExists, "states.conv.slot0");
    EXPECT_EQ(manager->registered(), 1);
    ASSERT_OK(manager->Unregister(0));
    EXPECT_OK(pool->Protect(*manager, "states"));
    EXPECT_EQ(manager->registered(), 2);
  }
}

}  // namespace
}  // namespace pristine::testing
