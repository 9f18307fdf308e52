// Small kernels begin before the one ahead of them has ended. Each waits for it: for what it writes late, and with what
// it would overwrite while that one still reads. DecodeEarlyTest is the same for decode.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/kernels/sparse_to_csr.h"
#include "pristine/attention/append_kv.h"
#include "pristine/attention/merge_states.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/attention/merge_rig.h"
#include "tests/support/backends.h"
#include "tests/support/early_op.h"
#include "tests/support/oracle_case.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DType;
using attention::KvLayout;
using attention::LseBase2;
using attention::MergeShape;

std::vector<std::byte> Values(DType dtype, size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<float> value(-2, 2);
  std::vector<float> values(count);
  for (float& x : values) x = value(random);
  return ToBytes(values, dtype);
}

template <class BackendT>
class EarlyOpsTest : public DeviceTest<BackendT> {};
TYPED_TEST_SUITE(EarlyOpsTest, AllBackends, BackendNames);

TYPED_TEST(EarlyOpsTest, AppendKvWaitsForTheKernelAhead) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<EarlyOpRig> rig, EarlyOpRig::Create(*this->stream_, 1 << 20));
  constexpr int32_t kTokens = 21, kSlots = 64;
  const struct {
    DType dtype, kv_dtype;
    int32_t kv_heads, head_dim;
    KvLayout layout;
  } shapes[] = {{DType::kBFloat16, DType::kBFloat16, 2, 128, KvLayout::kNHD},
                {DType::kFloat16, DType::kFloat16, 3, 64, KvLayout::kHND},
                {DType::kFloat32, DType::kFloat32, 1, 5, KvLayout::kNHD},  // 4 bytes at a time
                {DType::kFloat32, DType::kFloat8E4M3, 2, 64, KvLayout::kNHD},
                {DType::kFloat16, DType::kFloat8E4M3, 2, 64, KvLayout::kHND},
                {DType::kBFloat16, DType::kFloat8E4M3, 2, 128, KvLayout::kNHD}};
  for (const auto& shape : shapes) {
    for (const bool padding_only : {false, true}) {
      rig->Clear();
      const size_t row = static_cast<size_t>(shape.kv_heads) * shape.head_dim;
      std::vector<int32_t> late(kTokens, -1), early(kTokens);
      for (int32_t i = 0; i < kTokens; ++i) early[i] = kSlots - 1 - i;
      for (int32_t i = 0; i < kTokens && !padding_only; ++i) late[i] = i % 5 == 4 ? -1 : 3 * i;
      if (padding_only) std::swap(late, early);  // a kernel that comes early finds nothing to do
      const bool quantizes = shape.kv_dtype != shape.dtype;
      const size_t pool = kSlots * row * attention::SizeOf(shape.kv_dtype);
      attention::AppendKvTensors tensors = {.dtype = shape.dtype,
                                            .kv_dtype = shape.kv_dtype,
                                            .layout = shape.layout,
                                            .page_size = 16,
                                            .kv_heads = shape.kv_heads,
                                            .head_dim = shape.head_dim};
      tensors.k_new = rig->Put(Values(shape.dtype, kTokens * row, 1), Values(shape.dtype, kTokens * row, 2));
      tensors.v_new = rig->Put(Values(shape.dtype, kTokens * row, 3), Values(shape.dtype, kTokens * row, 4));
      tensors.slots = rig->Put(late, early);
      tensors.k = rig->Output<std::byte>(pool);
      tensors.v = rig->Output<std::byte>(pool);
      if (quantizes) {
        tensors.k_scale = rig->Put<float>({0.5f}, {4});
        tensors.v_scale = rig->Put<float>({2}, {0.25f});
      }
      EXPECT_EQ(rig->Check([&](Stream& stream) { return AppendKv(stream, kTokens, tensors); }), "")
          << attention::ToString(shape.dtype) << " to " << attention::ToString(shape.kv_dtype)
          << (padding_only ? ", early without slots" : "");
    }
  }
}

template <class BackendT>
class EarlyMergesTest : public MergeTest<BackendT> {
 protected:
  attention::States PutStates(EarlyOpRig& rig, const MergeShape& shape, int32_t rows, uint64_t seed) {
    const attention::MutableStates states = PutMutableStates(rig, shape, rows, seed);
    return this->In(states);
  }
  attention::MutableStates PutMutableStates(EarlyOpRig& rig, const MergeShape& shape, int32_t rows, uint64_t seed) {
    const HostStates late = RandomStates(shape, rows, seed, 0.1), early = RandomStates(shape, rows, seed + 1000, 0.1);
    return {.v = rig.Put(ToBytes(late.v, shape.dtype), ToBytes(early.v, shape.dtype)),
            .lse = this->AsLse(rig.Put(late.lse, early.lse))};
  }
  attention::MutableStates Outputs(EarlyOpRig& rig, const MergeShape& shape, int32_t rows) {
    const size_t heads = static_cast<size_t>(rows) * shape.heads;
    return {.v = rig.Output<std::byte>(heads * shape.head_dim * attention::SizeOf(shape.dtype)),
            .lse = rig.Output<LseBase2>(heads)};
  }
  // Few rows, and so many that a block takes whole tokens.
  const std::vector<std::pair<MergeShape, int32_t>> shapes_ = {{{DType::kBFloat16, 6, 128}, 7},
                                                               {{DType::kFloat16, 4, 64}, 2 * attention::kMergeFewRows},
                                                               {{DType::kFloat32, 33, 256}, 5}};
};
TYPED_TEST_SUITE(EarlyMergesTest, AllBackends, BackendNames);

TYPED_TEST(EarlyMergesTest, PairsWaitForTheKernelAhead) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<EarlyOpRig> rig, EarlyOpRig::Create(*this->stream_, 1 << 20));
  for (const auto& [shape, rows] : this->shapes_) {
    rig->Clear();
    const attention::States a = this->PutStates(*rig, shape, rows, 1), b = this->PutStates(*rig, shape, rows, 2);
    const attention::MutableStates out = this->Outputs(*rig, shape, rows);
    const auto merge = [&, &shape = shape, rows = rows](Stream& stream) {
      return MergeState(stream, shape, rows, a, b, out, this->reports());
    };
    EXPECT_EQ(rig->Check(merge), "") << Name(shape);
  }
}

TYPED_TEST(EarlyMergesTest, PairsInPlaceWaitForTheKernelAheadAndItsMask) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<EarlyOpRig> rig, EarlyOpRig::Create(*this->stream_, 1 << 20));
  for (const auto& [shape, rows] : this->shapes_) {
    rig->Clear();
    const attention::MutableStates a = this->PutMutableStates(*rig, shape, rows, 1);
    const attention::States b = this->PutStates(*rig, shape, rows, 2);
    std::vector<uint8_t> late(static_cast<size_t>(rows)), early(late.size(), 0);  // which comes early has nothing to do
    for (size_t i = 0; i < late.size(); ++i) late[i] = i % 3 != 1;
    const DeviceSpan<const uint8_t> mask = rig->Put(late, early);
    const auto merge = [&, &shape = shape, rows = rows](Stream& stream) {
      return MergeStateInPlace(stream, shape, rows, a, b, mask, this->reports());
    };
    EXPECT_EQ(rig->Check(merge), "") << Name(shape);
  }
}

TYPED_TEST(EarlyMergesTest, ListsOfStatesWaitForTheKernelAhead) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<EarlyOpRig> rig, EarlyOpRig::Create(*this->stream_, 4 << 20));
  constexpr int32_t kEach = 3;
  for (const auto& [shape, rows] : this->shapes_) {
    rig->Clear();
    const int32_t count = rows * kEach;
    const attention::States states = this->PutStates(*rig, shape, count, 1);
    const attention::MutableStates out = this->Outputs(*rig, shape, rows);
    const auto merge = [&, &shape = shape, rows = rows](Stream& stream) {
      return MergeStates(stream, shape, rows, kEach, states, out, this->reports());
    };
    EXPECT_EQ(rig->Check(merge), "") << Name(shape);
  }
}

TYPED_TEST(EarlyMergesTest, RaggedListsOfStatesWaitForTheKernelAhead) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<EarlyOpRig> rig, EarlyOpRig::Create(*this->stream_, 4 << 20));
  for (const auto& [shape, rows] : this->shapes_) {
    rig->Clear();
    const int32_t count = rows * 3;
    const attention::States states = this->PutStates(*rig, shape, count, 1);
    std::vector<int32_t> late = {0}, early(static_cast<size_t>(rows) + 1, 0);  // which comes early has nothing to do
    for (int32_t row = 0; row < rows; ++row) late.push_back(std::min(count, late.back() + row % 5));
    const DeviceSpan<const int32_t> indptr = rig->Put(late, early);
    const attention::MutableStates out = this->Outputs(*rig, shape, rows);
    const auto merge = [&, &shape = shape, rows = rows](Stream& stream) {
      return MergeRaggedStates(stream, shape, rows, indptr, count, states, out, this->reports());
    };
    EXPECT_EQ(rig->Check(merge), "") << Name(shape);
  }
}

void SparseWrites(const attention::SparseToCsrParams& p, WriteList& writes) {
  writes.Add(p.indptr, (static_cast<size_t>(p.rows) + 1) * sizeof(int32_t));
  writes.Add(p.indices, static_cast<size_t>(p.rows) * p.row_bound * sizeof(int32_t));
}
constexpr Kernel<attention::SparseToCsrParams> kSparse = {"sparse_to_csr", &attention::SparseToCsrHost,
                                                          PRISTINE_CUDA(&attention::SparseToCsrCuda), &SparseWrites};

// Each of its five forms.
TYPED_TEST(EarlyOpsTest, ConversionToCsrWaitsForTheKernelAhead) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<BufferManager> manager, BufferManager::Create(*this->device_));
  ASSERT_OK(manager->Seal());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<EarlyOpRig> rig, EarlyOpRig::Create(*this->stream_, 18 << 20));
  constexpr int32_t kRequests = 4, kGroups = 2, kRows = kRequests * kGroups, kTopk = 3, kBlock = 64;
  constexpr int32_t kMaxLength = 1024, kMany = (1 << 22) / kRows;
  const struct { int32_t page_size, dense_len; } forms[] = {{16, 0}, {2, 0}, {1, 0}, {16, kMany + 1}, {1, kMany + 1}};
  for (const auto& [page_size, dense_len] : forms) {
    rig->Clear();
    const int32_t row_bound = std::max(dense_len - 1, kTopk * kBlock);
    const int32_t pages = kMaxLength / page_size, num_pages = kRequests * pages + 1;
    std::vector<int32_t> lengths[2], indptr[2] = {{0}, {0}}, indices[2], table[2];
    for (int32_t early = 0; early < 2; ++early) {
      for (int32_t r = 0; r < kRequests; ++r) {
        const int32_t length = (early == 1 ? std::vector<int32_t>{0, 1, 200, 64} : std::vector{1000, 150, 0, 513})[r];
        lengths[early].push_back(length);
        indptr[early].push_back(indptr[early].back() + (length + page_size - 1) / page_size);
        for (int32_t group = 0; group < kGroups; ++group) {
          const int32_t last = std::max(length - 1, 0) / kBlock;
          for (const int32_t block : {group, last / 2 + early, last}) table[early].push_back(std::min(block, last));
        }
      }
      for (int32_t i = 0; i < kRequests * pages; ++i) indices[early].push_back(early == 1 ? i + 1 : num_pages - 1 - i);
    }
    const attention::SparseToCsrParams params = {
        .lengths = rig->Put(lengths[0], lengths[1]).address(),
        .page_indptr = rig->Put(indptr[0], indptr[1]).address(),
        .page_indices = rig->Put(indices[0], indices[1]).address(),
        .table = rig->Put(table[0], table[1]).address(),
        .indptr = rig->Output<int32_t>(kRows + 1).address(),
        .indices = rig->Output<int32_t>(static_cast<size_t>(kRows) * row_bound).address(),
        .reports = manager->report_ring({kRequests, kRequests}),
        .lengths_id = 0,
        .rows = kRows,
        .row_bound = row_bound,
        .groups = kGroups,
        .block = kBlock,
        .topk = kTopk,
        .dense_len = dense_len,
        .max_length = kMaxLength,
        .page_size = page_size,
        .page_indices_size = static_cast<int64_t>(indices[0].size()),
        .num_pages = num_pages,
        .dummy_page = 0};
    ASSERT_NE(params.indices, nullptr);
    EXPECT_EQ(rig->Check([&](Stream& stream) { return Launch(stream, kSparse, params); }), "")
        << "pages of " << page_size << ", rows of " << row_bound;
  }
}

}  // namespace
}  // namespace pristine::testing
