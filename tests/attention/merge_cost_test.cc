// What a merge costs the host: its launch, and no allocation beside it. It is called in every layer of every step.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>

#include "absl/status/status.h"
#include "tests/attention/merge_rig.h"

namespace {
thread_local int64_t allocations = 0;  // of this thread, by operator new
}  // namespace

// Not inlined: GCC takes a free that it sees and a new that it does not for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  ++allocations;
  void* const address = std::malloc(bytes == 0 ? 1 : bytes);
  if (address == nullptr) std::abort();
  return address;
}
[[gnu::noinline]] void operator delete(void* address) noexcept { std::free(address); }
[[gnu::noinline]] void operator delete(void* address, std::size_t) noexcept { std::free(address); }

namespace pristine::testing {
namespace {

using namespace attention;  // NOLINT(build/namespaces): the suite is about that namespace

// Of the cheapest of several calls: the Host backend's queue grows now and then.
template <class Call>
int64_t Allocations(const Call& call) {
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < 8; ++i) {
    const int64_t before = allocations;
    const absl::Status status = call();
    least = std::min(least, allocations - before);
    EXPECT_OK(status);
  }
  return least;
}

template <class BackendT>
class MergeCostTest : public MergeTest<BackendT> {};
TYPED_TEST_SUITE(MergeCostTest, AllBackends, BackendNames);

TYPED_TEST(MergeCostTest, AMergeAllocatesNoMoreThanItsLaunch) {
  constexpr MergeShape kShape = {DType::kBFloat16, 2, 64};
  const MutableStates a = this->Put(RandomStates(kShape, 4, 1)), b = this->Put(RandomStates(kShape, 4, 2));
  const MutableStates out = this->Output(kShape, 2);
  const DeviceSpan<int32_t> indptr = this->Array(std::vector<int32_t>{0, 1, 4});
  const ReportRing reports = this->reports();
  Stream& stream = *this->stream_;

  // The launches alone: what their kernels declare to write is as many ranges.
  const MergeVariant& variant = *FindMergeVariant(kShape.dtype, kShape.head_dim);
  MergePairParams pair = {};
  pair.a = pair.b = {a.v.address(), reinterpret_cast<const float*>(a.lse.address()), 128, 2, 1};
  pair.out = {out.v.address(), reinterpret_cast<float*>(out.lse.address()), 128, 2, 1};
  pair.rows = 2;
  pair.heads = kShape.heads;
  pair.head_dim = kShape.head_dim;
  pair.reports = reports;
  MergeSetsParams sets = {};
  sets.states = pair.a;
  sets.out = pair.out;
  sets.num_states = 4;
  sets.states_per_row = 2;
  sets.rows = 2;
  sets.heads = kShape.heads;
  sets.head_dim = kShape.head_dim;
  sets.reports = reports;
  const int64_t pair_launch = Allocations([&] { return Launch(stream, variant.token_head, pair); });
  const int64_t sets_launch = Allocations([&] { return Launch(stream, variant.sets, sets); });

  EXPECT_EQ(Allocations([&] { return MergeState(stream, kShape, 2, this->In(a), this->In(b), out, reports); }),
            pair_launch);
  EXPECT_EQ(Allocations([&] { return MergeStateInPlace(stream, kShape, 2, out, this->In(b), {}, reports); }),
            pair_launch);
  EXPECT_EQ(Allocations([&] { return MergeStates(stream, kShape, 2, 2, this->In(a), out, reports); }), sets_launch);
  EXPECT_EQ(Allocations([&] { return MergeRaggedStates(stream, kShape, 2, indptr, 4, this->In(a), out, reports); }),
            sets_launch);
  EXPECT_OK(stream.Synchronize());
}

}  // namespace
}  // namespace pristine::testing
