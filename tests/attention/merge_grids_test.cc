// The shapes over which other libraries test their merges, each test named after where its grid comes from. A GPU takes
// the sizes as they are, Host a part of the tokens; rows are compared in steps.
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/attention/merge_rig.h"

namespace pristine::testing {
namespace {

using attention::DType;
using attention::MergeShape;
using attention::MutableStates;

template <class BackendT>
class MergeGridsTest : public MergeTest<BackendT> {
 protected:
  int32_t Tokens(int32_t tokens) const {
    return this->device_->backend() == Backend::kHost ? (tokens - 1) / 32 + 1 : tokens;
  }
  // "" if every few rows of `merged` are the sum of `sources(row)`.
  template <class SourcesT>
  static std::string CheckRows(const HostStates& merged, const SourcesT& sources) {
    const int32_t step = merged.rows / 64 + 1;
    for (int32_t row = 0; row < merged.rows; row += step) {
      for (int32_t head = 0; head < merged.shape.heads; ++head) {
        const std::string difference = Difference(Merged(sources(row), head, merged.shape.head_dim), merged, row, head);
        if (!difference.empty()) return difference;
      }
    }
    return "";
  }
};
TYPED_TEST_SUITE(MergeGridsTest, AllBackends, BackendNames);

// sgl-kernel, test_merge_state_v2: a tenth of all LSEs is +inf.
TYPED_TEST(MergeGridsTest, SglKernelMergeStateV2) {
  uint64_t seed = 1;
  std::mt19937_64 random(5);
  for (const int32_t tokens : {613, 1536}) {
    for (const int32_t heads : {8, 16, 32}) {
      for (const int32_t head_dim : {64, 128, 256}) {
        for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
          const MergeShape shape = {dtype, heads, head_dim};
          const int32_t rows = this->Tokens(tokens);
          HostStates a = RandomStates(shape, rows, ++seed), b = RandomStates(shape, rows, ++seed);
          for (HostStates* states : {&a, &b}) {
            for (float& lse : states->lse) lse = random() % 10 == 0 ? kInf : lse;
          }
          EXPECT_EQ(this->CheckRows(this->Merge(a, b),
                                    [&](int32_t row) {
                                      return std::vector<Source>{{&a, row}, {&b, row}};
                                    }),
                    "")
              << Name(shape) << ", " << rows << " tokens";
          this->memory_.clear();
        }
      }
    }
  }
  EXPECT_FALSE(this->Poll().empty());  // none of them unseen
  for (const int32_t head_dim : {32, 48}) {
    EXPECT_STATUS(attention::MergeState(*this->stream_, {DType::kFloat16, 8, head_dim}, 1, {}, {}, {}, this->reports()),
                  kUnimplemented, "float16 with head_dim 256");
  }
}

// FlashInfer, test_triton_cascade: two states, 100 states, up to 512 states.
TYPED_TEST(MergeGridsTest, FlashInferTritonCascade) {
  const MergeShape shape = {DType::kFloat16, 32, 128};
  const int32_t rows = this->Tokens(2048);
  const HostStates a = RandomStates(shape, rows, 101), b = RandomStates(shape, rows, 102);
  EXPECT_EQ(this->CheckRows(this->Merge(a, b),
                            [&](int32_t row) {
                              return std::vector<Source>{{&a, row}, {&b, row}};
                            }),
            "");
  this->memory_.clear();

  std::mt19937_64 random(7);
  const int32_t few = this->Tokens(64);
  for (const bool ragged : {false, true}) {
    std::vector<int32_t> indptr = {0};
    for (int32_t row = 0; row < few; ++row) {
      indptr.push_back(indptr.back() + (ragged ? static_cast<int32_t>(random() % 513) : 100));
    }
    const HostStates states = RandomStates(shape, indptr.back(), 103, 0.1, 20);
    const MutableStates out = this->Output(shape, few), device = this->Put(states);
    if (ragged) {
      ASSERT_OK(MergeRaggedStates(*this->stream_, shape, few, this->Array(indptr), indptr.back(), this->In(device), out,
                                  this->reports()));
    } else {
      ASSERT_OK(MergeStates(*this->stream_, shape, few, 100, this->In(device), out, this->reports()));
    }
    const auto sources = [&](int32_t row) {
      std::vector<Source> list;
      for (int32_t i = indptr[row]; i < indptr[row + 1]; ++i) list.push_back({&states, i});
      return list;
    };
    EXPECT_EQ(this->CheckRows(this->Get(shape, few, out), sources), "");
    this->memory_.clear();
  }
  EXPECT_TRUE(this->Poll().empty());
}

// vLLM, test_merge_attn_states: its head counts and head sizes, those of them that there are kernels for.
TYPED_TEST(MergeGridsTest, VllmMergeAttnStates) {
  uint64_t seed = 300;
  for (const int32_t heads : {4, 8, 16, 48, 64}) {
    for (const int32_t head_dim : {64, 128, 256}) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        const MergeShape shape = {dtype, heads, head_dim};
        const int32_t rows = this->Tokens(256);
        const HostStates a = RandomStates(shape, rows, ++seed, 0.1), b = RandomStates(shape, rows, ++seed, 0.1);
        EXPECT_EQ(this->CheckRows(this->Merge(a, b),
                                  [&](int32_t row) {
                                    return std::vector<Source>{{&a, row}, {&b, row}};
                                  }),
                  "")
            << Name(shape);
        this->memory_.clear();
      }
    }
  }
  EXPECT_TRUE(this->Poll().empty());
}

// tokenspeed, test_large_num_heads: more heads than a block of 1024 threads holds, over tokens enough that fewer heads
// would take a block each; and the edge itself.
TYPED_TEST(MergeGridsTest, TokenspeedLargeNumHeads) {
  uint64_t seed = 400;
  for (const int32_t head_dim : {128, 256}) {
    for (const int32_t heads : {8192 / head_dim, 65, 128, 200}) {
      const MergeShape shape = {DType::kBFloat16, heads, head_dim};
      const int32_t rows = this->Tokens(4 * attention::kMergeFewRows);
      const HostStates a = RandomStates(shape, rows, ++seed), b = RandomStates(shape, rows, ++seed);
      EXPECT_EQ(this->CheckRows(this->Merge(a, b),
                                [&](int32_t row) {
                                  return std::vector<Source>{{&a, row}, {&b, row}};
                                }),
                "")
          << Name(shape);
      this->memory_.clear();
    }
  }
  EXPECT_TRUE(this->Poll().empty());
}

// FlashInfer, test_shared_prefix_kernels: in place, 512 tokens, 50 masks one after the other into the same memory.
TYPED_TEST(MergeGridsTest, FlashInferInPlaceWithMasks) {
  const MergeShape shape = {DType::kBFloat16, 32, 128};
  const int32_t rows = this->Tokens(512);
  const HostStates start = RandomStates(shape, rows, 201), b = RandomStates(shape, rows, 202);
  const MutableStates device = this->Put(start), second = this->Put(b);
  std::mt19937_64 random(9);
  for (int i = 0; i < 50; ++i) {
    std::vector<uint8_t> mask(rows);
    for (uint8_t& value : mask) value = random() % 2;
    const HostStates a = i == 0 ? start : this->Get(shape, rows, device);
    ASSERT_OK(MergeStateInPlace(*this->stream_, shape, rows, device, this->In(second),
                                this->template Array<uint8_t>(mask), this->reports()));
    // A row left alone is a state by itself.
    const auto sources = [&](int32_t row) {
      return mask[row] != 0 ? std::vector<Source>{{&a, row}, {&b, row}} : std::vector<Source>{{&a, row}};
    };
    ASSERT_EQ(this->CheckRows(this->Get(shape, rows, device), sources), "") << "mask " << i;
  }
  EXPECT_TRUE(this->Poll().empty());
}

}  // namespace
}  // namespace pristine::testing
