// FlashInfer's test_shared_prefix_kernels, its decode: the prefix that requests share and what is a request's own are
// attended by themselves and the two states merged. Host runs the small cells.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "pristine/attention/merge_states.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DType;
using Ints = std::vector<int32_t>;

template <class BackendT>
class CascadeGridTest : public DecodeRigTest<BackendT> {
 protected:
  bool OnHost() const { return this->device_->backend() == Backend::kHost; }
  DeviceBuffer Allocate(size_t bytes) {
    absl::StatusOr<DeviceBuffer> buffer = this->device_->Allocate(bytes, "part");
    EXPECT_OK(buffer);
    return *std::move(buffer);
  }
  // `rows` of `batch` rows are real.
  void ExpectMerged(const DecodeShape& shape, int32_t batch, int32_t rows, int32_t shared, int32_t own) {
    const DecodeCase step(shape, Ints(rows, shared + own), Ints(rows, -1));
    ASSERT_OK(this->Prepare(step, {.buckets = {batch}}));
    DecodeRig& rig = *this->rig_;
    ASSERT_OK(rig.Begin(batch, step, rows));
    ASSERT_OK(rig.manager().BeforeReplay(*this->stream_, rig.Of(batch), rig.Of(rows)));
    ASSERT_OK(rig.manager().RecordPrologue(*this->stream_, rig.Of(batch)));
    const DeviceBuffer own_out = Allocate(rig.tensors.out.size()), own_lse = Allocate(rig.tensors.lse.bytes());
    std::vector<DeviceBuffer> arrays;
    const auto put = [&](const Ints& values) {
      arrays.push_back(Allocate(values.size() * sizeof(int32_t)));
      EXPECT_OK(Upload(*this->stream_, arrays.back().As<int32_t>(), values));
      return arrays.back().As<const int32_t>();
    };
    for (const bool prefix : {true, false}) {
      Ints lengths(batch, 0), indptr = {0}, pages;
      for (int32_t r = 0; r < batch; ++r) {
        if (r < rows) {
          const auto begin = step.indices().begin() + step.indptr()[r], middle = begin + shared / shape.page_size;
          const auto end = step.indices().begin() + step.indptr()[r + 1];
          pages.insert(pages.end(), prefix ? begin : middle, prefix ? middle : end);
          lengths[r] = prefix ? shared : own;
        }
        indptr.push_back(static_cast<int32_t>(pages.size()));
      }
      attention::DecodeTensors part = rig.tensors;
      part.kv_indptr = put(indptr);
      part.kv_indices = put(pages);
      part.lengths = put(lengths);
      if (!prefix) {
        part.out = own_out.As<std::byte>();
        part.lse = own_lse.As<attention::LseBase2>();
      }
      ASSERT_OK(rig.decode().Run(*this->stream_, rig.Of(batch), part));
    }
    ASSERT_OK(attention::MergeStateInPlace(
        *this->stream_, {.dtype = shape.dtype, .heads = shape.q_heads, .head_dim = shape.head_dim}, batch,
        {.v = rig.tensors.out, .lse = rig.tensors.lse},
        {.v = own_out.As<const std::byte>(), .lse = own_lse.As<const attention::LseBase2>()}, {},
        rig.manager().report_ring(rig.Of(batch))));
    ASSERT_OK(rig.ReadBack());
    const int64_t checked = OnHost() ? 10 : 2'000'000 / ((shared + own) * shape.head_dim);
    EXPECT_EQ(rig.Check(batch, step, rows, (int64_t{batch} * shape.q_heads / checked) | 1), "")
        << shape.ToString() << ", " << shared << " and " << own << " tokens";
  }
};
TYPED_TEST_SUITE(CascadeGridTest, AllBackends, BackendNames);

TYPED_TEST(CascadeGridTest, FlashInferSharedPrefix) {
  uint64_t seed = 6000;
  for (const int32_t batch : {12, 17}) {
    for (const int32_t own : {37, 17}) {
      for (const int32_t shared : {128, 512, 2048}) {
        for (const int32_t heads : {8, 16}) {
          for (const int32_t head_dim : {128, 256}) {
            for (const int32_t page_size : {1, 16}) {
              if (++seed % 3 != 0) continue;  // takes turns with each parameter
              if (this->OnHost() && (shared > 128 || head_dim == 256)) continue;
              const DecodeShape shape = {.dtype = seed % 2 == 0 ? DType::kFloat16 : DType::kBFloat16,
                                         .q_heads = heads,
                                         .kv_heads = this->OnHost() ? 1 : 2,
                                         .head_dim = head_dim,
                                         .page_size = page_size,
                                         .seed = seed};
              this->ExpectMerged(shape, batch, this->OnHost() ? 2 : std::min(batch, 5000 / shared), shared, own);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace pristine::testing
