// Bugs of lifetimes that engines had, made the way they were made there: docs/culprits.md, 25 and 27.
#include "pristine/graph_runtime/graph.h"
#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

constexpr Extent kSmall{2, 2};
constexpr Extent kLarge{4, 4};
using Ints = std::vector<int32_t>;

template <class BackendT>
class LifetimeRegression : public BufferTest<BackendT> {};
TYPED_TEST_SUITE(LifetimeRegression, AllBackends, BackendNames);

// A workspace belonged to whichever graph was captured first; destroying that one took it away from all others.
TYPED_TEST(LifetimeRegression, PyTorch193402ReleasingOneGraphLeavesTheOthersWorkspace) {
  this->MakeManager();
  const auto lengths = this->Register(Spec("lengths", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(4, 9));
  const auto workspace = this->Register(Spec("workspace", Role::kScratch), Ints(4, 0));
  const auto seen = this->EngineMemory(Ints(4, 0));
  this->Capture({kSmall, kLarge}, [&](Stream& stream, const Extent& bucket) -> absl::Status {
    const int32_t rows = bucket.requests;
    PRISTINE_RETURN_IF_ERROR(
        Launch(stream, kCopyInts, CopyIntsParams{workspace.live.address(), lengths.live.address(), rows}));
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, AddOneParams{workspace.live.address(), rows}));
    return Launch(stream, kCopyInts, CopyIntsParams{seen.address(), workspace.live.address(), rows});
  });
  const auto step = [&](const Extent& bucket, const Ints& values) {
    const Extent extent{static_cast<int32_t>(values.size()), static_cast<int32_t>(values.size())};
    ASSERT_OK(this->manager().BeginStep(bucket, extent));
    ASSERT_OK(this->Refill(lengths, values));
    ASSERT_OK(this->Replay(bucket, extent));
  };
  step(kLarge, {5, 6, 7, 8});
  const size_t allocations = this->device().live_allocations();
  ASSERT_OK(this->runner_->Release(kLarge));  // the first one captured
  EXPECT_EQ(this->device().live_allocations(), allocations) << "no graph owns memory that others use";
  for (int i = 0; i < 3; ++i) {
    step(kSmall, {10 + i, 20 + i});
    EXPECT_EQ(this->Read(seen), (Ints{11 + i, 21 + i, 8, 9}));
  }
  ASSERT_OK(this->runner_->Recapture(*this->stream(), kLarge));
  step(kLarge, {1, 2, 3});
  EXPECT_EQ(this->Read(seen), (Ints{2, 3, 4, 1}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

// A garbage collector, or an allocator that gave memory back, ran in the middle of a capture and invalidated it.
TYPED_TEST(LifetimeRegression, PyTorch159594FreeingMemoryAndGraphsInsideACaptureLeavesItValid) {
  const auto counter = this->EngineMemory({0});
  const auto add = [&](Stream& stream) { return Launch(stream, kAddOne, AddOneParams{counter.address(), 1}); };
  ASSERT_OK_AND_ASSIGN(DeviceBuffer memory, this->device().Allocate(1 << 20, "garbage"));
  ASSERT_OK_AND_ASSIGN(PinnedBuffer pinned, this->device().AllocatePinned(4096, "garbage"));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Event> event, this->device().CreateEvent());
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> old, pristine::Capture(*this->stream(), add));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<GraphExec> old_exec, old->Instantiate());
  ASSERT_OK(old_exec->Launch(*this->stream()));
  ASSERT_OK(this->stream()->Record(*event));
  ASSERT_OK(this->stream()->Synchronize());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph,
                       pristine::Capture(*this->stream(), [&](Stream& stream) -> absl::Status {
                         PRISTINE_RETURN_IF_ERROR(add(stream));
                         memory = DeviceBuffer();
                         pinned = PinnedBuffer();
                         event.reset();
                         old_exec.reset();
                         old.reset();
                         return add(stream);
                       }));
  EXPECT_EQ(graph->nodes().size(), 2u);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
  ASSERT_OK(exec->Launch(*this->stream()));
  EXPECT_EQ(this->Read(counter), Ints{3});
}

}  // namespace
}  // namespace pristine::testing
