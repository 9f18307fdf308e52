// What merging gives: both kernels of every variant, empty sides, extreme log-sum-exps, strides, bases.
#include "pristine/attention/merge_states.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "tests/attention/merge_rig.h"

namespace pristine::testing {
namespace {

using attention::ConvertLse;
using attention::DType;
using attention::EmptyLse;
using attention::LseBase2;
using attention::LseNatural;
using attention::MergeForm;
using attention::MergeShape;
using attention::MergeVariant;
using attention::MutableStates;
using attention::States;

// A log-sum-exp of the other base does not compile.
static_assert(std::is_convertible_v<DeviceSpan<LseBase2>, decltype(States::lse)>);
static_assert(!std::is_convertible_v<DeviceSpan<LseNatural>, decltype(States::lse)>);
static_assert(!std::is_convertible_v<DeviceSpan<float>, decltype(States::lse)>);

template <class BackendT>
class MergeStatesTest : public MergeTest<BackendT> {
 protected:
  // One of a variant's two kernels for pairs, over dense states.
  HostStates Run(const Kernel<attention::MergePairParams>& kernel, const HostStates& a, const HostStates& b) {
    const MergeShape shape = a.shape;
    const MutableStates first = this->Put(a), second = this->Put(b), out = this->Output(shape, a.rows);
    const int64_t row = int64_t{shape.heads} * shape.head_dim;
    const auto input = [&](const MutableStates& s) -> attention::MergeInput {
      return {s.v.address(), this->AsFloat(s.lse).address(), row, shape.heads, 1};
    };
    EXPECT_OK(Launch(
        *this->stream_, kernel,
        attention::MergePairParams{.a = input(first),
                                   .b = input(second),
                                   .out = {out.v.address(), this->AsFloat(out.lse).address(), row, shape.heads, 1},
                                   .mask = nullptr,
                                   .rows = a.rows,
                                   .heads = shape.heads,
                                   .head_dim = shape.head_dim,
                                   .reports = this->reports()}));
    return this->Get(shape, a.rows, out);
  }
};
TYPED_TEST_SUITE(MergeStatesTest, AllBackends, BackendNames);

// --- the two kernels ---

TEST(MergeForm, IsAFunctionOfTheShapeWithItsEdgeAt1024Threads) {
  const struct {
    DType dtype;
    int32_t head_dim, heads;  // the most that a block holds
  } edges[] = {{DType::kFloat16, 64, 128},  {DType::kFloat16, 128, 64},  {DType::kFloat16, 256, 32},
               {DType::kBFloat16, 64, 128}, {DType::kBFloat16, 128, 64}, {DType::kBFloat16, 256, 32},
               {DType::kFloat32, 64, 64},   {DType::kFloat32, 128, 32},  {DType::kFloat32, 256, 32}};
  for (const auto& edge : edges) {
    const MergeVariant* const variant = attention::FindMergeVariant(edge.dtype, edge.head_dim);
    ASSERT_NE(variant, nullptr);
    EXPECT_EQ(variant->max_heads_per_block, edge.heads);
    const int32_t vec = std::max<int32_t>(16 / static_cast<int32_t>(SizeOf(edge.dtype)), edge.head_dim / 32);
    EXPECT_EQ(edge.head_dim / vec * edge.heads, 1024);
    const auto form = [&](int32_t heads, int32_t rows) {
      return attention::ChooseMergeForm(edge.dtype, edge.head_dim, heads, rows);
    };
    constexpr int32_t kMany = attention::kMergeFewRows + 1;
    EXPECT_EQ(form(1, kMany), MergeForm::kBlockPerToken);
    EXPECT_EQ(form(edge.heads, kMany), MergeForm::kBlockPerToken);
    EXPECT_EQ(form(edge.heads + 1, kMany), MergeForm::kTokenHead);
    EXPECT_EQ(form(65535, kMany), MergeForm::kTokenHead);
    // Few rows are spread over more blocks, whatever the heads.
    EXPECT_EQ(form(1, kMany - 1), MergeForm::kTokenHead);
    EXPECT_EQ(form(edge.heads, 1), MergeForm::kTokenHead);
    EXPECT_EQ(form(edge.heads + 1, 1), MergeForm::kTokenHead);
  }
  EXPECT_EQ(attention::MergeVariants().size(), std::size(edges));
}

TYPED_TEST(MergeStatesTest, EveryVariantAndKernelMergesRaggedRandomStates) {
  uint64_t seed = 10;
  for (const MergeVariant& variant : attention::MergeVariants()) {
    const MergeShape shape = {variant.dtype, 5, variant.head_dim};
    const HostStates a = RandomStates(shape, 37, ++seed, 0.2), b = RandomStates(shape, 37, ++seed, 0.2);
    EXPECT_EQ(this->CheckPair(a, b, this->Run(variant.block_per_token, a, b)), "") << variant.block_per_token.name;
    EXPECT_EQ(this->CheckPair(a, b, this->Run(variant.token_head, a, b)), "") << variant.token_head.name;
    this->memory_.clear();
  }
  EXPECT_TRUE(this->Poll().empty());
}

TYPED_TEST(MergeStatesTest, BothKernelsAgreeForEveryHeadCountThatABlockHolds) {
  uint64_t seed = 1000;
  for (const MergeVariant& variant : attention::MergeVariants()) {
    for (int32_t heads = 1; heads <= variant.max_heads_per_block; ++heads) {
      const MergeShape shape = {variant.dtype, heads, variant.head_dim};
      const HostStates a = RandomStates(shape, 2, ++seed, 0.1), b = RandomStates(shape, 2, ++seed, 0.1);
      const HostStates block = this->Run(variant.block_per_token, a, b), grid = this->Run(variant.token_head, a, b);
      for (size_t i = 0; i < block.lse.size(); ++i) {
        if (std::isinf(block.lse[i]) && block.lse[i] == grid.lse[i]) continue;
        ASSERT_LE(std::abs(block.lse[i] - grid.lse[i]), 1e-5f) << Name(shape) << ", place " << i;
      }
      ASSERT_EQ(block.v, grid.v) << Name(shape);
      ASSERT_EQ(this->CheckPair(a, b, block), "") << Name(shape);
      this->memory_.clear();
    }
  }
}

// sglang PR #23993: more heads than a block of 1024 threads holds.
TYPED_TEST(MergeStatesTest, MoreHeadsThanABlockHoldsAreMergedEagerlyAndInACapture) {
  uint64_t seed = 2000;
  for (const MergeVariant& variant : attention::MergeVariants()) {
    for (const int32_t heads : {65, 128, 200, variant.max_heads_per_block, variant.max_heads_per_block + 1}) {
      const MergeShape shape = {variant.dtype, heads, variant.head_dim};
      const HostStates a = RandomStates(shape, 3, ++seed), b = RandomStates(shape, 3, ++seed);
      EXPECT_EQ(this->CheckPair(a, b, this->Merge(a, b)), "") << Name(shape);

      const MutableStates first = this->Put(a), second = this->Put(b), out = this->Output(shape, 3);
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& stream) {
                             return MergeState(stream, shape, 3, this->In(first), this->In(second), out,
                                               this->reports());
                           }));
      ASSERT_EQ(graph->nodes().size(), 1u);
      EXPECT_EQ(graph->nodes()[0].name, variant.token_head.name);
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
      ASSERT_OK(exec->Launch(*this->stream_));
      EXPECT_EQ(this->CheckPair(a, b, this->Get(shape, 3, out)), "") << Name(shape);
      if (heads != variant.max_heads_per_block && heads != variant.max_heads_per_block + 1) continue;
      // With rows enough for a block per token, the edge decides.
      constexpr int32_t kMany = attention::kMergeFewRows + 1;
      const MutableStates many = this->Output(shape, kMany);
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> large, Capture(*this->stream_, [&](Stream& stream) {
                             return MergeState(stream, shape, kMany, this->In(many), this->In(many), many,
                                               this->reports());
                           }));
      ASSERT_EQ(large->nodes().size(), 1u);
      EXPECT_EQ(large->nodes()[0].name,
                heads <= variant.max_heads_per_block ? variant.block_per_token.name : variant.token_head.name);
      this->memory_.clear();
    }
  }
}

// --- empty sides ---

TYPED_TEST(MergeStatesTest, AnEmptySideHasNoWeightWhateverItsValuesAre) {
  for (const MergeVariant& variant : attention::MergeVariants()) {
    for (const int32_t rows : kEitherForm) {
      const MergeShape shape = {variant.dtype, 3, variant.head_dim};
      HostStates a = RandomStates(shape, rows, 1), b = RandomStates(shape, rows, 2);
      const HostStates full_a = a, full_b = b;
      for (int32_t head = 0; head < shape.heads; ++head) {
        a.Empty(0, head);
        b.Empty(1, head);
        a.Empty(2, head);
        b.Empty(2, head);
        std::fill_n(b.v_of(2, head), shape.head_dim, kInf);
      }
      const HostStates merged = this->Merge(a, b);
      for (int32_t head = 0; head < shape.heads; ++head) {
        for (int32_t d = 0; d < shape.head_dim; ++d) {
          ASSERT_EQ(merged.v_of(0, head)[d], full_b.v_of(0, head)[d]);  // the other side, bit for bit
          ASSERT_EQ(merged.v_of(1, head)[d], full_a.v_of(1, head)[d]);
          ASSERT_EQ(merged.v_of(2, head)[d], 0);
        }
        EXPECT_EQ(merged.lse_of(0, head), full_b.lse_of(0, head));
        EXPECT_EQ(merged.lse_of(1, head), full_a.lse_of(1, head));
        EXPECT_EQ(merged.lse_of(2, head), -kInf);
      }
      EXPECT_EQ(this->CheckPair(a, b, merged), "");
      this->memory_.clear();
    }
  }
}

TYPED_TEST(MergeStatesTest, WhereEverythingIsEmptyAllIsZeroAndMinusInfinity) {
  for (const MergeVariant& variant : attention::MergeVariants()) {
    for (const auto& [heads, rows] : {std::pair{200, 5}, {7, kEitherForm[1]}}) {
      const MergeShape shape = {variant.dtype, heads, variant.head_dim};
      const HostStates a = RandomStates(shape, rows, 1, 1.0), b = RandomStates(shape, rows, 2, 1.0);
      const HostStates merged = this->Merge(a, b);
      EXPECT_TRUE(std::all_of(merged.v.begin(), merged.v.end(), [](float x) { return x == 0; })) << Name(shape);
      EXPECT_TRUE(std::all_of(merged.lse.begin(), merged.lse.end(), [](float x) { return x == -kInf; })) << Name(shape);
      this->memory_.clear();
    }
  }
}

// --- extreme and wrong log-sum-exps ---

TYPED_TEST(MergeStatesTest, LargeDifferencesNeitherOverflowNorLoseTheLargerSide) {
  const std::pair<float, float> pairs[] = {{0, -150},       {-200, 0},      {1e30f, -1e30f}, {3e38f, 3e38f},
                                           {-3e38f, 3e38f}, {-1e4f, -1e4f}, {1000, 990},     {-130, -131}};
  const MergeShape shape = {DType::kFloat32, static_cast<int32_t>(std::size(pairs)), 64};
  HostStates a = RandomStates(shape, 1, 3), b = RandomStates(shape, 1, 4);
  for (int32_t head = 0; head < shape.heads; ++head) {
    std::tie(a.lse_of(0, head), b.lse_of(0, head)) = pairs[head];
  }
  EXPECT_EQ(this->CheckPair(a, b, this->Merge(a, b)), "");
  EXPECT_TRUE(this->Poll().empty());
}

TYPED_TEST(MergeStatesTest, PlusInfinityIsReportedAndTakenAsEmpty) {
  for (const auto& [heads, rows] : {std::pair{3, kEitherForm[0]}, {3, kEitherForm[1]}, {200, kEitherForm[0]}}) {
    const MergeShape shape = {DType::kBFloat16, heads, 128};
    HostStates a = RandomStates(shape, rows, 5), b = RandomStates(shape, rows, 6);
    a.lse_of(1, 2) = kInf;
    b.lse_of(2, 0) = kInf;
    a.lse_of(3, 1) = b.lse_of(3, 1) = kInf;
    EXPECT_EQ(this->CheckPair(a, b, this->Merge(a, b)), "");
    std::vector<Violation> found = this->Poll();
    ASSERT_EQ(found.size(), 4u);
    std::sort(found.begin(), found.end(), [](const Violation& x, const Violation& y) {
      return std::pair(x.index, x.expected) < std::pair(y.index, y.expected);
    });
    const int64_t expected[4][3] = {{1, 0, 2}, {2, 1, 0}, {3, 0, 1}, {3, 1, 1}};  // row, input, head
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(found[i].kind, Violation::Kind::kInfiniteLse);
      EXPECT_EQ(found[i].index, expected[i][0]);
      EXPECT_EQ(found[i].expected, expected[i][1]);
      EXPECT_EQ(found[i].actual, expected[i][2]);
    }
    EXPECT_NE(found[0].ToString().find("log-sum-exp of +inf: row 1, head 2 of the first input of a merge"),
              std::string::npos)
        << found[0].ToString();
  }
}

TYPED_TEST(MergeStatesTest, PlusInfinityInASetIsReportedOncePerStateAndHead) {
  const MergeShape shape = {DType::kFloat16, 6, 64};
  HostStates states = RandomStates(shape, 3 * 7, 7);
  states.lse_of(0, 0) = states.lse_of(6, 5) = states.lse_of(20, 3) = kInf;
  const MutableStates out = this->Output(shape, 3);
  ASSERT_OK(MergeStates(*this->stream_, shape, 3, 7, this->In(this->Put(states)), out, this->reports()));
  EXPECT_EQ(this->CheckSets(states, {0, 7, 14, 21}, this->Get(shape, 3, out)), "");
  std::vector<std::pair<int64_t, int64_t>> found;
  for (const Violation& violation : this->Poll()) {
    EXPECT_EQ(violation.kind, Violation::Kind::kInfiniteLse);
    found.push_back({violation.index, violation.actual});
  }
  std::sort(found.begin(), found.end());
  EXPECT_EQ(found, (std::vector<std::pair<int64_t, int64_t>>{{0, 0}, {6, 5}, {20, 3}}));
}

TYPED_TEST(MergeStatesTest, NanStaysInItsRowAndHead) {
  for (const int32_t rows : kEitherForm) {
    const MergeShape shape = {DType::kFloat32, 4, 128};
    HostStates a = RandomStates(shape, rows, 8), b = RandomStates(shape, rows, 9);
    const HostStates clean = this->Merge(a, b);
    a.lse_of(1, 2) = kNan;
    b.v_of(2, 0)[5] = kNan;
    const HostStates merged = this->Merge(a, b);
    for (int32_t row = 0; row < rows; ++row) {
      for (int32_t head = 0; head < 4; ++head) {
        const bool lse_lost = row == 1 && head == 2, one_lost = row == 2 && head == 0;
        for (int32_t d = 0; d < 128; ++d) {
          const float expected = clean.v_of(row, head)[d], actual = merged.v_of(row, head)[d];
          ASSERT_EQ(std::isnan(actual), lse_lost || (one_lost && d == 5));
          if (!std::isnan(actual)) {
            ASSERT_EQ(actual, expected);
          }
        }
        EXPECT_EQ(std::isnan(merged.lse_of(row, head)), lse_lost);
      }
    }
  }
  EXPECT_TRUE(this->Poll().empty());
}

// --- algebra ---

TYPED_TEST(MergeStatesTest, TheOrderOfMergesDoesNotMatter) {
  const MergeShape shape = {DType::kFloat32, 7, 128};
  const int32_t rows = 20;
  const HostStates a = RandomStates(shape, rows, 11, 0.3), b = RandomStates(shape, rows, 12, 0.3),
                   c = RandomStates(shape, rows, 13, 0.3);
  const HostStates left = this->Merge(this->Merge(a, b), c), right = this->Merge(a, this->Merge(b, c));
  HostStates all = {.shape = shape, .rows = 3 * rows, .v = {}, .lse = {}};
  std::vector<int32_t> indptr = {0};
  for (int32_t row = 0; row < rows; ++row) {
    for (const HostStates* s : {&c, &a, &b}) {
      all.v.insert(all.v.end(), s->v_of(row, 0), s->v_of(row, 0) + shape.heads * shape.head_dim);
      all.lse.insert(all.lse.end(), &s->lse[row * shape.heads], &s->lse[row * shape.heads] + shape.heads);
    }
    indptr.push_back(indptr.back() + 3);
  }
  EXPECT_EQ(this->CheckSets(all, indptr, left), "");
  EXPECT_EQ(this->CheckSets(all, indptr, right), "");
  const MutableStates out = this->Output(shape, rows);
  ASSERT_OK(MergeStates(*this->stream_, shape, rows, 3, this->In(this->Put(all)), out, this->reports()));
  EXPECT_EQ(this->CheckSets(all, indptr, this->Get(shape, rows, out)), "");
}

// --- N and a ragged number per row ---

TYPED_TEST(MergeStatesTest, AnyNumberOfStatesPerRowForEveryVariant) {
  uint64_t seed = 3000;
  for (const MergeVariant& variant : attention::MergeVariants()) {
    for (const int32_t each : {0, 1, 2, 3, 4, 5, 9}) {
      const MergeShape shape = {variant.dtype, each == 5 ? 33 : 3, variant.head_dim};
      const HostStates states = RandomStates(shape, 4 * each, ++seed, 0.2);
      const MutableStates out = this->Output(shape, 4);
      ASSERT_OK(MergeStates(*this->stream_, shape, 4, each, this->In(this->Put(states)), out, this->reports()));
      EXPECT_EQ(this->CheckSets(states, {0, each, 2 * each, 3 * each, 4 * each}, this->Get(shape, 4, out)), "")
          << variant.sets.name << ", " << each;
      this->memory_.clear();
    }
  }
}

TYPED_TEST(MergeStatesTest, RaggedRowsForEveryVariant) {
  uint64_t seed = 4000;
  std::mt19937_64 random(77);
  for (const MergeVariant& variant : attention::MergeVariants()) {
    for (const int32_t heads : {2, 17, 65}) {
      const MergeShape shape = {variant.dtype, heads, variant.head_dim};
      std::vector<int32_t> indptr = {0};
      for (int row = 0; row < 9; ++row) indptr.push_back(indptr.back() + static_cast<int32_t>(random() % 7));
      indptr.insert(indptr.end(), {indptr.back(), indptr.back() + 60});  // none, and many
      const HostStates states = RandomStates(shape, indptr.back(), ++seed, 0.25, 40);
      const int32_t rows = static_cast<int32_t>(indptr.size()) - 1;
      const MutableStates out = this->Output(shape, rows);
      ASSERT_OK(MergeRaggedStates(*this->stream_, shape, rows, this->Array(indptr), indptr.back(),
                                  this->In(this->Put(states)), out, this->reports()));
      EXPECT_EQ(this->CheckSets(states, indptr, this->Get(shape, rows, out)), "") << Name(shape);
      this->memory_.clear();
    }
  }
}

TYPED_TEST(MergeStatesTest, AWildIndptrReadsNothingPastTheStates) {
  const MergeShape shape = {DType::kFloat32, 2, 64};
  const HostStates states = RandomStates(shape, 6, 21);
  const std::vector<int32_t> indptr = {-1000000, 2, 2000000000, 1, 5, -3, 6};
  const std::vector<std::pair<int32_t, int32_t>> clipped = {{0, 2}, {2, 6}, {6, 1}, {1, 5}, {5, 0}, {0, 6}};
  const MutableStates out = this->Output(shape, 6);
  ASSERT_OK(MergeRaggedStates(*this->stream_, shape, 6, this->Array(indptr), 6, this->In(this->Put(states)), out,
                              this->reports()));
  const HostStates merged = this->Get(shape, 6, out);
  for (int32_t row = 0; row < 6; ++row) {
    std::vector<Source> sources;
    for (int32_t i = clipped[row].first; i < clipped[row].second; ++i) sources.push_back({&states, i});
    for (int32_t head = 0; head < 2; ++head) {
      EXPECT_EQ(Difference(Merged(sources, head, 64), merged, row, head), "");
    }
  }
}

// --- in place ---

TYPED_TEST(MergeStatesTest, InPlaceLeavesRowsWithAMaskOf0Untouched) {
  for (const MergeVariant& variant : attention::MergeVariants()) {
    for (const auto& [heads, rows] : {std::pair{4, kEitherForm[0]}, {4, kEitherForm[1]}, {130, kEitherForm[0]}}) {
      const MergeShape shape = {variant.dtype, heads, variant.head_dim};
      HostStates a = RandomStates(shape, rows, 31, 0.2);
      const HostStates b = RandomStates(shape, rows, 32, 0.2);
      a.Empty(4, 1);  // NaN that a masked row must keep
      std::vector<uint8_t> mask(rows);
      for (int32_t row = 0; row < rows; ++row) mask[row] = std::array<uint8_t, 6>{1, 0, 255, 2, 0, 1}[row % 6];
      const MutableStates device = this->Put(a);
      ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> before, Download(*this->stream_, device.v));
      ASSERT_OK(MergeStateInPlace(*this->stream_, shape, rows, device, this->In(this->Put(b)),
                                  this->template Array<uint8_t>(mask), this->reports()));
      ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> after, Download(*this->stream_, device.v));
      const HostStates merged = this->Get(shape, rows, device);
      const size_t row_bytes = after.size() / rows;
      for (int32_t row = 0; row < rows; ++row) {
        if (mask[row] == 0) {
          EXPECT_EQ(std::memcmp(&before[row * row_bytes], &after[row * row_bytes], row_bytes), 0) << row;
        }
        for (int32_t head = 0; head < heads; ++head) {
          if (mask[row] == 0) {
            EXPECT_EQ(merged.lse_of(row, head), a.lse_of(row, head));
          } else {
            EXPECT_EQ(Difference(Merged({{&a, row}, {&b, row}}, head, shape.head_dim), merged, row, head), "");
          }
        }
      }
      this->memory_.clear();
    }
  }
}

TYPED_TEST(MergeStatesTest, InPlaceWithoutAMaskMergesEveryRow) {
  for (const int32_t rows : kEitherForm) {
    const MergeShape shape = {DType::kFloat16, 4, 128};
    const HostStates a = RandomStates(shape, rows, 33, 0.2), b = RandomStates(shape, rows, 34, 0.2);
    const MutableStates device = this->Put(a);
    ASSERT_OK(MergeStateInPlace(*this->stream_, shape, rows, device, this->In(this->Put(b)), {}, this->reports()));
    EXPECT_EQ(this->CheckPair(a, b, this->Get(shape, rows, device)), "");
  }
}

// --- layouts ---

TYPED_TEST(MergeStatesTest, StridesAreHonouredAndGapsAreNotWritten) {
  for (const int32_t rows : kEitherForm) {
    const MergeShape shape = {DType::kBFloat16, 3, 64};
    const int64_t row = 3 * 64, stride = row + 40;
    const HostStates a = RandomStates(shape, rows, 41, 0.2), b = RandomStates(shape, rows, 42, 0.2);
    // a: rows apart, lse as [heads, rows]. out: rows apart, lse as [rows, heads + 2].
    std::vector<float> wide(rows * stride, kNan), flipped(rows * 3);
    for (int32_t r = 0; r < rows; ++r) {
      std::copy_n(a.v_of(r, 0), row, &wide[r * stride]);
      for (int32_t h = 0; h < 3; ++h) flipped[h * rows + r] = a.lse_of(r, h);
    }
    const States first = {.v = this->Array(ToBytes(wide, shape.dtype)),
                          .lse = this->AsLse(this->Array(flipped)),
                          .v_stride = stride,
                          .lse_stride = 1,
                          .lse_head_stride = rows};
    const MutableStates out = {.v = this->Array(ToBytes(std::vector<float>(rows * stride, 7), shape.dtype)),
                               .lse = this->AsLse(this->Array(std::vector<float>(rows * 5, 7))),
                               .v_stride = stride,
                               .lse_stride = 5};
    ASSERT_OK(MergeState(*this->stream_, shape, rows, first, this->In(this->Put(b)), out, this->reports()));
    const HostStates raw = this->Get(shape, rows, out);
    HostStates merged = {.shape = shape, .rows = rows, .v = {}, .lse = {}};
    for (int32_t r = 0; r < rows; ++r) {
      merged.v.insert(merged.v.end(), &raw.v[r * stride], &raw.v[r * stride] + row);
      merged.lse.insert(merged.lse.end(), &raw.lse[r * 5], &raw.lse[r * 5] + 3);
      EXPECT_TRUE(std::all_of(&raw.v[r * stride] + row, &raw.v[0] + (r + 1) * stride, [](float x) { return x == 7; }));
      EXPECT_EQ(raw.lse[r * 5 + 3], 7);
      EXPECT_EQ(raw.lse[r * 5 + 4], 7);
    }
    EXPECT_EQ(this->CheckPair(a, b, merged), "");
  }
}

TYPED_TEST(MergeStatesTest, AnLseThatIsNotWantedIsNotWritten) {
  for (const int32_t rows : kEitherForm) {
    const MergeShape shape = {DType::kFloat32, 3, 64};
    const HostStates a = RandomStates(shape, rows, 43), b = RandomStates(shape, rows, 44);
    const MutableStates out = this->Output(shape, rows);
    MutableStates only_v = out;
    only_v.lse = {};
    ASSERT_OK(MergeState(*this->stream_, shape, rows, this->In(this->Put(a)), this->In(this->Put(b)), only_v,
                         this->reports()));
    HostStates merged = this->Get(shape, rows, out);
    for (int32_t row = 0; row < rows; ++row) {
      for (int32_t head = 0; head < 3; ++head) {
        EXPECT_TRUE(std::isnan(merged.lse_of(row, head)));
        const OracleRow expected = Merged({{&a, row}, {&b, row}}, head, 64);
        merged.lse_of(row, head) = static_cast<float>(expected.lse);
        EXPECT_EQ(Difference(expected, merged, row, head), "");
      }
    }
  }
}

// sgl-kernel: 32-bit offsets wrapped at 2^32 elements.
TYPED_TEST(MergeStatesTest, OffsetsPast32BitsReachTheirRows) {
  const MergeShape shape = {DType::kFloat16, 2, 64};
  constexpr int64_t kStride = (int64_t{1} << 32) + 1024;  // elements: the second row lies past 8 GB
  constexpr size_t kBytes = (kStride + 128) * 2;
  const HostStates a = RandomStates(shape, 2, 45), b = RandomStates(shape, 2, 46);
  const std::vector<std::byte> values = ToBytes(a.v, shape.dtype);
  DeviceSpan<std::byte> far;
  void* mapped = MAP_FAILED;
  if (this->device_->backend() == Backend::kHost) {
    // Address space only: two pages of it are used.
    mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) GTEST_SKIP() << "this machine does not give " << kBytes << " bytes of address space";
    far = {static_cast<std::byte*>(mapped), kBytes};
  } else {
    absl::StatusOr<DeviceBuffer> buffer = this->device_->Allocate(kBytes, "far");
    if (absl::IsResourceExhausted(buffer.status())) GTEST_SKIP() << buffer.status();
    ASSERT_OK(buffer);
    this->memory_.push_back(*std::move(buffer));
    far = this->memory_.back().template As<std::byte>();
  }
  const size_t row_bytes = values.size() / 2;
  for (int row = 0; row < 2; ++row) {
    const std::vector<std::byte> part(values.begin() + row * row_bytes, values.begin() + (row + 1) * row_bytes);
    ASSERT_OK(Upload(*this->stream_, far.Sub(row * kStride * 2, row_bytes), part));
  }
  const MutableStates device = {.v = far, .lse = this->Put(a).lse, .v_stride = kStride};
  // Read there, then written there.
  const MutableStates out = this->Output(shape, 2);
  const States second = this->In(this->Put(b));
  ASSERT_OK(MergeState(*this->stream_, shape, 2, this->In(device), second, out, this->reports()));
  EXPECT_EQ(this->CheckPair(a, b, this->Get(shape, 2, out)), "");
  ASSERT_OK(MergeStateInPlace(*this->stream_, shape, 2, device, second, {}, this->reports()));
  HostStates merged = this->Get(shape, 2, out);
  merged.v.clear();
  for (int row = 0; row < 2; ++row) {
    ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> part,
                         Download(*this->stream_, far.Sub(row * kStride * 2, row_bytes)));
    const std::vector<float> floats = ToFloats(part, shape.dtype);
    merged.v.insert(merged.v.end(), floats.begin(), floats.end());
  }
  EXPECT_EQ(this->CheckPair(a, b, merged), "");
  if (mapped != MAP_FAILED) munmap(mapped, kBytes);
}

// --- bases ---

TYPED_TEST(MergeStatesTest, ConversionScalesAndMapsEmptyRowsByWhatTheyLookLikeThere) {
  const std::vector<float> natural = {0, 1, -2.5f, 30, -kInf, kInf, 1e-3f};
  const auto as_natural = [](DeviceSpan<float> span) {
    return DeviceSpan<LseNatural>(reinterpret_cast<LseNatural*>(span.address()), span.size());
  };
  const DeviceSpan<LseNatural> from = as_natural(this->Array(natural));
  for (const EmptyLse empty : {EmptyLse::kMinusInfinity, EmptyLse::kPlusInfinity}) {
    const DeviceSpan<float> to = this->Array(std::vector<float>(natural.size(), kNan));
    ASSERT_OK(ConvertLse(*this->stream_, from, empty, this->AsLse(to)));
    ASSERT_OK_AND_ASSIGN(const std::vector<float> base2, Download(*this->stream_, to));
    for (size_t i = 0; i < natural.size(); ++i) {
      if (std::isinf(natural[i])) continue;
      EXPECT_NEAR(base2[i], natural[i] * 1.4426950408889634, 1e-6 * std::abs(natural[i])) << i;
    }
    EXPECT_EQ(base2[4], -kInf);
    EXPECT_EQ(base2[5], empty == EmptyLse::kPlusInfinity ? -kInf : kInf);  // otherwise the merge reports it

    // And back, in the same memory.
    ASSERT_OK(ConvertLse(*this->stream_, this->AsLse(to), as_natural(to), empty));
    ASSERT_OK_AND_ASSIGN(const std::vector<float> back, Download(*this->stream_, to));
    for (size_t i = 0; i < natural.size(); ++i) {
      if (std::isinf(natural[i])) continue;
      EXPECT_NEAR(back[i], natural[i], 1e-6 * std::abs(natural[i])) << i;
    }
    EXPECT_EQ(back[4], empty == EmptyLse::kPlusInfinity ? kInf : -kInf);
    EXPECT_EQ(back[5], kInf);
  }
  EXPECT_OK(ConvertLse(*this->stream_, DeviceSpan<const LseNatural>(), EmptyLse::kMinusInfinity, {}));
  EXPECT_STATUS(
      ConvertLse(*this->stream_, from, EmptyLse::kMinusInfinity, this->AsLse(this->template Array<float>({1}))),
      kInvalidArgument, "from has 7 elements, to has 1");
  EXPECT_STATUS(ConvertLse(*this->stream_, DeviceSpan<const LseNatural>(nullptr, 1), EmptyLse::kMinusInfinity,
                           this->AsLse(this->template Array<float>({1}))),
                kInvalidArgument, "from must be aligned to 4 bytes and not null");
}

// sglang#40903: the weaker side of a gap of 2 has 1/5 in base 2 and 1/(1 + e^2) in base e.
TYPED_TEST(MergeStatesTest, StatesOfTheOtherBaseMergeRightOnceConverted) {
  const MergeShape shape = {DType::kFloat32, 1, 64};
  HostStates a = RandomStates(shape, 2, 51), b = a;
  std::fill(a.v.begin(), a.v.end(), 0.0f);
  std::fill(b.v.begin(), b.v.end(), 1.0f);
  a.lse = {2, kInf};  // the second row is empty, as FlashMLA writes it
  b.lse = {0, 3};
  const MutableStates device = this->Put(a), out = this->Output(shape, 2);
  HostStates as_base2 = a;
  as_base2.lse[1] = -kInf;
  EXPECT_NEAR(this->Merge(as_base2, b).v[0], 0.2, 1e-6);
  const DeviceSpan<float> lse = this->AsFloat(device.lse);
  const DeviceSpan<const LseNatural> natural(reinterpret_cast<const LseNatural*>(lse.address()), lse.size());
  ASSERT_OK(ConvertLse(*this->stream_, natural, EmptyLse::kPlusInfinity, device.lse));
  ASSERT_OK(MergeState(*this->stream_, shape, 2, this->In(device), this->In(this->Put(b)), out, this->reports()));
  const HostStates merged = this->Get(shape, 2, out);
  EXPECT_NEAR(merged.v[0], 1 / (1 + std::exp(2.0)), 1e-6);
  EXPECT_EQ(merged.v[64], 1);
  EXPECT_EQ(merged.lse[1], 3);
  EXPECT_TRUE(this->Poll().empty());
}

}  // namespace
}  // namespace pristine::testing
