#include "tests/support/truth.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "examples/replay_driver/kv_hash.h"

namespace pristine::testing {
namespace {

using replay_driver::Element;
using replay_driver::FromBFloat16;
using replay_driver::RowKey;
using replay_driver::SelectBlocks;
using replay_driver::Tensor;
using replay_driver::ToBFloat16;

TruthModel SmallModel() {
  return {.seed = 3, .heads = 4, .kv_heads = 2, .head_dim = 64, .groups = 2, .block = 8, .topk = 4, .window = 16};
}

TEST(KvHash, ElementsAreSpreadOverMinusOneToOne) {
  double sum = 0, squares = 0;
  const int rows = 2000;
  for (int row = 0; row < rows; ++row) {
    const uint64_t key = RowKey(1, row % 7, row % 3, row, row % 2, Tensor::kKey);
    for (int dim = 0; dim < 64; ++dim) {
      const double value = Element(key, dim);
      ASSERT_GE(value, -1.0);
      ASSERT_LT(value, 1.0);
      sum += value;
      squares += value * value;
    }
  }
  EXPECT_NEAR(sum / (rows * 64), 0.0, 0.01);
  EXPECT_NEAR(squares / (rows * 64), 1.0 / 3, 0.01);
}

TEST(KvHash, EveryCoordinateMatters) {
  const uint64_t key = RowKey(1, 2, 3, 4, 5, Tensor::kKey);
  EXPECT_NE(key, RowKey(0, 2, 3, 4, 5, Tensor::kKey));
  EXPECT_NE(key, RowKey(1, 0, 3, 4, 5, Tensor::kKey));
  EXPECT_NE(key, RowKey(1, 2, 0, 4, 5, Tensor::kKey));
  EXPECT_NE(key, RowKey(1, 2, 3, 0, 5, Tensor::kKey));
  EXPECT_NE(key, RowKey(1, 2, 3, 4, 0, Tensor::kKey));
  EXPECT_NE(key, RowKey(1, 2, 3, 4, 5, Tensor::kValue));
  EXPECT_NE(key, RowKey(1, 2, 3, 4, 5, Tensor::kQuery));
  EXPECT_NE(Element(key, 6), Element(key, 7));
}

// What adds up, or is exchanged, is not the same either.
TEST(KvHash, ManyCoordinatesGiveManyKeys) {
  std::set<uint64_t> keys;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    for (int32_t i = 0; i < 4 * 4 * 4 * 4; ++i) {
      for (const Tensor tensor : {Tensor::kQuery, Tensor::kKey, Tensor::kValue}) {
        keys.insert(RowKey(seed, i & 3, i >> 2 & 3, i >> 4 & 3, i >> 6, tensor));
      }
    }
  }
  EXPECT_EQ(keys.size(), 4u * 256 * 3);
}

TEST(KvHash, BFloat16RoundsToNearestEven) {
  EXPECT_EQ(FromBFloat16(ToBFloat16(1.0f)), 1.0f);
  EXPECT_EQ(FromBFloat16(ToBFloat16(1.0f + 0x1p-8f)), 1.0f);              // a tie, down to even
  EXPECT_EQ(FromBFloat16(ToBFloat16(1.0f + 0x3p-8f)), 1.0f + 0x2p-7f);    // a tie, up to even
  EXPECT_EQ(FromBFloat16(ToBFloat16(1.0f + 0x1.1p-8f)), 1.0f + 0x1p-7f);  // above a tie
  EXPECT_EQ(FromBFloat16(ToBFloat16(-0.99999f)), -1.0f);
}

TEST(SelectBlocks, TakesTopkBlocksAscendingAndAlwaysTheLast) {
  for (int32_t blocks = 5; blocks < 60; ++blocks) {
    for (int32_t topk = 1; topk <= 5; ++topk) {
      std::vector<int32_t> taken;
      SelectBlocks(9, 1, 0, blocks % 2, blocks, topk, [&](int32_t block) { taken.push_back(block); });
      ASSERT_EQ(taken.size(), static_cast<size_t>(topk));
      EXPECT_EQ(taken.back(), blocks - 1);
      EXPECT_GE(taken.front(), 0);
      for (size_t i = 1; i < taken.size(); ++i) EXPECT_LT(taken[i - 1], taken[i]);
    }
  }
}

TEST(SelectBlocks, EveryCoordinateMatters) {
  const auto draw = [](uint64_t seed, int32_t request, int32_t layer, int32_t group, int32_t blocks) {
    std::vector<int32_t> taken;
    SelectBlocks(seed, request, layer, group, blocks, 20, [&](int32_t block) { taken.push_back(block); });
    taken.pop_back();  // the last block is always taken
    return taken;
  };
  const std::vector<int32_t> taken = draw(1, 2, 3, 4, 200);
  EXPECT_EQ(taken, draw(1, 2, 3, 4, 200));
  EXPECT_NE(taken, draw(0, 2, 3, 4, 200));
  EXPECT_NE(taken, draw(1, 0, 3, 4, 200));
  EXPECT_NE(taken, draw(1, 2, 0, 4, 200));
  EXPECT_NE(taken, draw(1, 2, 3, 0, 200));
  EXPECT_NE(taken, draw(1, 2, 3, 4, 201));
}

TEST(SelectBlocks, DrawsEveryBlockEquallyOften) {
  std::vector<int> taken(10);
  for (int32_t request = 0; request < 6000; ++request) {
    SelectBlocks(1, request, 0, 0, 10, 4, [&](int32_t block) { ++taken[block]; });
  }
  EXPECT_EQ(taken[9], 6000);
  for (int32_t block = 0; block < 9; ++block) EXPECT_NEAR(taken[block], 2000, 200) << block;
}

TEST(Truth, OfOneTokenIsItsValue) {
  const TruthModel model = SmallModel();
  const TruthRow row = DenseAttention(model, TruthLayer::kSparse, 11, 0, 1, 3);
  const uint64_t key = RowKey(model.seed, 11, 0, 0, 1, Tensor::kValue);
  double score = 0;
  for (int dim = 0; dim < 64; ++dim) {
    EXPECT_EQ(row.out[dim], Element(key, dim));
    score += static_cast<double>(Element(RowKey(model.seed, 11, 0, 0, 3, Tensor::kQuery), dim)) *
             Element(RowKey(model.seed, 11, 0, 0, 1, Tensor::kKey), dim);
  }
  EXPECT_NEAR(row.lse, score / 8 / std::log(2.0), 1e-12);
}

TEST(Truth, AWindowIsTheSameAsASparseRowOverTheSamePositions) {
  TruthModel model = SmallModel();
  // Sparse with K = 32 attends all of 16 tokens, as does the window of 16.
  const TruthRow all = DenseAttention(model, TruthLayer::kSparse, 1, 0, 16, 0);
  const TruthRow window = DenseAttention(model, TruthLayer::kWindow, 1, 0, 16, 0);
  EXPECT_EQ(all.out, window.out);
  const TruthRow longer = DenseAttention(model, TruthLayer::kWindow, 1, 0, 17, 0);
  EXPECT_GT(RelativeRms(window.out, longer.out), 1e-2);
}

// What a comparison with the truth must see, it can see: one token more or less moves a row by more than the tolerance.
TEST(Truth, OneTokenMoreInSixteenThousandIsAboveTheFloat32Tolerance) {
  TruthModel model = SmallModel();
  model.block = 64;
  model.topk = 256;
  model.window = 16384;
  const TruthRow row = DenseAttention(model, TruthLayer::kWindow, 1, 0, 20000, 0);
  model.window = 16385;
  const TruthRow off_by_one = DenseAttention(model, TruthLayer::kWindow, 1, 0, 20000, 0);
  EXPECT_GT(RelativeRms(row.out, off_by_one.out), 100 * RmsTolerance(attention::DType::kFloat32));
}

TEST(Truth, GroupsOfALongRequestAttendDifferentBlocks) {
  const TruthModel model = SmallModel();
  std::set<int32_t> groups[2];
  for (int32_t group = 0; group < 2; ++group) {
    SelectBlocks(model.seed, 5, 0, group, 40, 4, [&](int32_t block) { groups[group].insert(block); });
  }
  EXPECT_NE(groups[0], groups[1]);
}

TEST(RelativeRms, IsNaNForNaNSoThatNoToleranceAcceptsIt) {
  EXPECT_FALSE(RelativeRms({1, 2}, {1, std::nan("")}) <= 1.0);
  EXPECT_EQ(RelativeRms({3, 4}, {3, 4}), 0.0);
  EXPECT_DOUBLE_EQ(RelativeRms({3, 4}, {3, 9}), 1.0);
}

}  // namespace
}  // namespace pristine::testing
