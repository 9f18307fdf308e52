// Bugs of steps that overlap and of host memory used too early or too long, made the way they were made in engines:
// docs/culprits.md, 21, 30 to 32.
#include <algorithm>
#include <atomic>
#include <numeric>

#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

constexpr Extent kBucket{2, 2};
using Ints = std::vector<int32_t>;

// A body that waits for the test and then reads the page table, [2 requests, 2 pages].
template <class BackendT>
class OverlapRegression : public BufferTest<BackendT> {
 protected:
  void SetUp() override {
    BufferTest<BackendT>::SetUp();
    if (this->IsSkipped() || this->HasFatalFailure()) return;
    ASSERT_OK_AND_ASSIGN(flag_, this->device().AllocatePinned(sizeof(int), "latch"));
    SetLatch(1);
    this->MakeManager();
    BufferSpec spec = Spec("page_table", Role::kRefilled, Kind::kPageTable, Axis::Rows(2));
    spec.limit = 100;
    pages_ = this->Register(spec, Ints(4, 0));
    const auto seen = seen_ = this->EngineMemory(Ints(4, 0));
    log_ = this->EngineMemory(Ints(3 * 4, -1));
    this->Capture({kBucket}, [this, seen](Stream& stream, const Extent&) -> absl::Status {
      PRISTINE_RETURN_IF_ERROR(Launch(stream, kSpin, SpinParams{static_cast<int*>(flag_.device_address())}));
      return Launch(stream, kCopyInts, CopyIntsParams{seen.address(), pages_.live.address(), 4});
    });
    SetLatch(0);
  }
  void TearDown() override {
    if (flag_.bytes() > 0) SetLatch(1);
    if (this->stream() != nullptr) this->stream()->Synchronize().IgnoreError();
    flag_ = PinnedBuffer();
    BufferTest<BackendT>::TearDown();
  }
  void SetLatch(int value) { std::atomic_ref<int>(*flag_.As<int>().data()).store(value); }

  absl::Status Begin(absl::Span<const int32_t> table) {
    PRISTINE_RETURN_IF_ERROR(this->manager().BeginStep(kBucket, kBucket));
    return this->manager().template Refill<int32_t>(pages_, table);
  }
  // Queues the replay, then a copy of what its body saw.
  absl::Status Go() {
    PRISTINE_RETURN_IF_ERROR(this->runner_->Replay(*this->stream(), kBucket, kBucket));
    return this->stream()->Copy(AsWritableBytes(log_.Sub(4 * launched_++, 4)), AsBytes(seen_));
  }
  PinnedBuffer flag_;
  Buffer<int32_t> pages_;
  DeviceSpan<int32_t> seen_, log_;
  size_t launched_ = 0;
};
TYPED_TEST_SUITE(OverlapRegression, AllBackends, BackendNames);

// The scheduler prepared step n + 1 in the page table that the forward pass of step n was still reading.
TYPED_TEST(OverlapRegression, Sglang26380TheSchedulerRewritesItsPageTableWhileAGraphReadsIt) {
  Ints table = {1, 2, 3, 4};  // one array for the whole life of the scheduler
  for (const Ints& next : {Ints{1, 2, 3, 5}, Ints{9, 8, 7, 6}, Ints{-1, -1, -1, -1}}) {
    ASSERT_OK(this->Begin(table));
    ASSERT_OK(this->Go());
    table = next;
  }
  this->SetLatch(1);
  EXPECT_EQ(this->Read(this->log_), (Ints{1, 2, 3, 4, 1, 2, 3, 5, 9, 8, 7, 6}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

// A captured copy read a pinned buffer that had gone back to its pool: the bytes of a prefill came out as a table.
// vllm#25279 and its like overwrote the buffer before the first copy had run.
TYPED_TEST(OverlapRegression, OnnxRuntime32121PinnedMemoryThatWasRecycledIsNotReadAgain) {
  ASSERT_OK_AND_ASSIGN(const PinnedBuffer pinned,
                       this->device().AllocatePinned(4 * sizeof(int32_t), "the engine's table"));
  const absl::Span<int32_t> table = pinned.template As<int32_t>();
  for (const int32_t first : {10, 20}) {
    std::iota(table.begin(), table.end(), first);
    ASSERT_OK(this->Begin(table));
    std::fill(table.begin(), table.end(), 0x7E7E7E7E);  // recycled before anything was copied
    ASSERT_OK(this->Go());
  }
  ASSERT_OK(this->manager().BeginStep(kBucket, kBucket));
  ASSERT_OK(this->manager().Keep(this->pages_));
  ASSERT_OK(this->Go());
  this->SetLatch(1);
  EXPECT_EQ(this->Read(this->log_), (Ints{10, 11, 12, 13, 20, 21, 22, 23, 20, 21, 22, 23}));
  EXPECT_EQ(Describe(this->Poll()), "");
}

}  // namespace
}  // namespace pristine::testing
