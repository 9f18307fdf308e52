#include "examples/replay_driver/compare.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <vector>

#include "tests/support/truth.h"

namespace pristine::replay_driver {
namespace {

// Two requests in a bucket of four, with outputs made from the truth itself.
class Comparisons : public ::testing::Test {
 protected:
  Comparisons() {
    config_.seed = 5;
    config_.buckets = {{4, 4}};
    config_.layers = 2;
    config_.heads = 4;
    config_.kv_heads = 2;
    config_.head_dim = 64;
    config_.window = 16;
    config_.sparse.block = 8;
    config_.sparse.topk = 4;
    inputs_.bucket = {4, 4};
    inputs_.extent = {2, 2};
    inputs_.requests = {7, 9};
    inputs_.lengths = {20, 100};
    const testing::TruthModel model = {
        .seed = 5, .heads = 4, .kv_heads = 2, .head_dim = 64, .groups = 2, .block = 8, .topk = 4, .window = 16};
    outputs_.out.assign(2, std::vector<std::byte>(config_.q_bytes(4)));
    outputs_.lse.assign(2, std::vector<float>(16, -std::numeric_limits<float>::infinity()));
    for (int layer = 0; layer < 2; ++layer) {
      for (int row = 0; row < 2; ++row) {
        for (int head = 0; head < 4; ++head) {
          const testing::TruthRow truth =
              DenseAttention(model, layer == 0 ? testing::TruthLayer::kSparse : testing::TruthLayer::kWindow,
                             inputs_.requests[row], layer, inputs_.lengths[row], head);
          outputs_.lse[layer][row * 4 + head] = static_cast<float>(truth.lse);
          for (int dim = 0; dim < 64; ++dim) Set(layer, row, head, dim, static_cast<float>(truth.out[dim]));
        }
      }
    }
  }
  void Set(int layer, int row, int head, int dim, float value) {
    const size_t index = (static_cast<size_t>(row) * 4 + head) * 64 + dim;
    std::memcpy(outputs_.out[layer].data() + index * sizeof(float), &value, sizeof(value));
  }
  ModelConfig config_;
  StepInputs inputs_;
  Outputs outputs_;
};

TEST_F(Comparisons, EqualOutputsMatch) {
  EXPECT_EQ(CompareSame(config_, inputs_, outputs_, outputs_).mismatches, 0);
  const Comparison truth = CompareTruth(config_, inputs_, outputs_, 64, 1);
  EXPECT_EQ(truth.rows, 16);  // all there are
  EXPECT_EQ(truth.mismatches, 0) << truth.first;
  EXPECT_LT(truth.max_rel_rms, 1e-6);
}

TEST_F(Comparisons, SameSeesOneBitOfAnOutputAndOfAnLse) {
  Outputs other = outputs_;
  other.out[1][64] ^= std::byte{1};
  EXPECT_EQ(CompareSame(config_, inputs_, outputs_, other).mismatches, 1);
  other = outputs_;
  other.lse[0][5] = -other.lse[0][5];
  const Comparison same = CompareSame(config_, inputs_, outputs_, other);
  EXPECT_EQ(same.mismatches, 1);
  EXPECT_EQ(same.first.rfind("row 1 of layer 0 differs", 0), 0u) << same.first;
}

TEST_F(Comparisons, PaddedRowsMustBeZerosAndMinusInfinityEvenIfBothAgree) {
  Set(0, 3, 0, 0, 1.0f);
  outputs_.lse[1][8] = 0.0f;
  EXPECT_EQ(CompareSame(config_, inputs_, outputs_, outputs_).mismatches, 2);
}

TEST_F(Comparisons, TruthSeesAWrongRowAWrongLseAndANaN) {
  Set(1, 0, 2, 5, 0.5f);
  outputs_.lse[0][4] += 0.01f;
  Set(0, 0, 0, 0, std::numeric_limits<float>::quiet_NaN());
  const Comparison truth = CompareTruth(config_, inputs_, outputs_, 64, 1);
  EXPECT_EQ(truth.mismatches, 3);
  EXPECT_EQ(truth.max_rel_rms, std::numeric_limits<double>::infinity());
  EXPECT_EQ(truth.first.rfind("request 7 of 20 tokens, layer 0, head 0", 0), 0u) << truth.first;
}

TEST_F(Comparisons, SamplesAsManyRowsAsAskedAndOthersNextTime) {
  Set(1, 1, 3, 0, 9.0f);  // found in about half of the draws
  int64_t found = 0;
  for (int64_t draw = 0; draw < 40; ++draw) {
    const Comparison truth = CompareTruth(config_, inputs_, outputs_, 8, draw);
    EXPECT_EQ(truth.rows, 8);
    found += truth.mismatches;
  }
  EXPECT_GT(found, 5);
  EXPECT_LT(found, 35);
  EXPECT_EQ(CompareTruth(config_, inputs_, outputs_, 0, 1).rows, 0);
}

}  // namespace
}  // namespace pristine::replay_driver
