// Where an array's real part is the restored one (an engine that plans from the live buffer), the padded tail used to
// repeat the array's last element. After a larger batch that is another batch's sum: the tail falls, or jumps ahead,
// and the planner throws on "kv_indptr falls from 36606 at 8 to 34891 at 9".
#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class PaddedTailRegression : public BufferTest<BackendT> {};
TYPED_TEST_SUITE(PaddedTailRegression, AllBackends, BackendNames);

TYPED_TEST(PaddedTailRegression, TakesTheRestoredValueAtIndexRealNeverTheArraysLastElement) {
  constexpr Extent kBucket{4, 4};
  constexpr int32_t kR = 6144;
  constexpr int kGroups = 2, kMaxRequests = 8;
  this->MakeManager();
  std::vector<int32_t> worst;
  for (int i = 0; i <= kGroups * kMaxRequests; ++i) worst.push_back(i * kR);
  const auto indptr =
      this->Register(Spec("kv_indptr", Role::kRestored, Kind::kIndptr, Axis::RequestsPlusOne(kGroups)), worst);
  this->Capture({kBucket}, [&](Stream& stream, const Extent&) {  // the graph leaves a large last element behind
    return Launch(stream, kSetValue, SetValueParams{indptr.live.address(), kGroups * kMaxRequests, 34891});
  });
  for (const int real : {3, 1, 0, 4, 2}) {
    ASSERT_OK(this->Step(kBucket, {real, real}));
    const std::vector<int32_t> values = this->Read(indptr);
    for (int i = 0; i < kGroups * kMaxRequests; ++i) {
      const bool tail = i > kGroups * real && i <= kGroups * kBucket.requests;
      EXPECT_EQ(values[i], tail ? kGroups * real * kR : i * kR) << "index " << i << " with " << real << " requests";
    }
  }
  EXPECT_EQ(Describe(this->Poll()), "");
}

}  // namespace
}  // namespace pristine::testing
