#include "tests/support/truth.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>

#include "examples/replay_driver/kv_hash.h"

namespace pristine::testing {
namespace {

using replay_driver::RowKey;
using replay_driver::Tensor;

// The positions that are attended, ascending.
std::vector<int32_t> Positions(const TruthModel& model, TruthLayer kind, int32_t request, int32_t layer, int32_t length,
                               int32_t head) {
  std::vector<int32_t> positions;
  const auto append = [&positions](int32_t begin, int32_t end) {
    for (int32_t position = begin; position < end; ++position) positions.push_back(position);
  };
  if (kind == TruthLayer::kFull) {
    append(0, length);
  } else if (kind == TruthLayer::kWindow) {
    append(std::max(0, length - model.window), length);
  } else if (length < model.dense_len || length <= model.block * model.topk) {
    append(0, length);
  } else {
    const int32_t group = head / (model.heads / model.groups);
    const int32_t blocks = (length + model.block - 1) / model.block;
    replay_driver::SelectBlocks(model.seed, request, layer, group, blocks, model.topk, [&](int32_t block) {
      append(block * model.block, std::min(length, (block + 1) * model.block));
    });
  }
  return positions;
}

}  // namespace

TruthRow DenseAttention(const TruthModel& model, TruthLayer kind, int32_t request, int32_t layer, int32_t length,
                        int32_t head, const std::vector<int32_t>& drafts) {
  const auto seed = [&](int32_t position) {
    const int32_t first = length - static_cast<int32_t>(drafts.size());
    return replay_driver::TokenSeed(model.seed, position < first ? 0 : drafts[position - first]);
  };
  const auto element = [&model](uint64_t key, int32_t dim) -> double {
    const float exact = replay_driver::Element(key, dim);
    return model.dtype == attention::DType::kFloat32 ? exact
                                                     : replay_driver::FromBFloat16(replay_driver::ToBFloat16(exact));
  };
  const std::vector<int32_t> positions = Positions(model, kind, request, layer, length, head);
  const int32_t kv_head = head / (model.heads / model.kv_heads);
  const double scale = 1.0 / std::sqrt(static_cast<double>(model.head_dim));

  std::vector<double> query(model.head_dim);
  const uint64_t query_key = RowKey(seed(length - 1), request, layer, length - 1, head, Tensor::kQuery);
  for (int32_t dim = 0; dim < model.head_dim; ++dim) query[dim] = element(query_key, dim);

  std::vector<double> weights;
  weights.reserve(positions.size());
  for (const int32_t position : positions) {
    const uint64_t key = RowKey(seed(position), request, layer, position, kv_head, Tensor::kKey);
    double score = 0;
    for (int32_t dim = 0; dim < model.head_dim; ++dim) score += query[dim] * element(key, dim);
    weights.push_back(scale * score);
  }
  const double highest = *std::max_element(weights.begin(), weights.end());
  for (double& weight : weights) weight = std::exp(weight - highest);
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);

  TruthRow row;
  row.lse = highest / std::log(2.0) + std::log2(sum);
  row.out.assign(model.head_dim, 0.0);
  for (size_t i = 0; i < positions.size(); ++i) {
    const uint64_t key = RowKey(seed(positions[i]), request, layer, positions[i], kv_head, Tensor::kValue);
    for (int32_t dim = 0; dim < model.head_dim; ++dim) row.out[dim] += weights[i] / sum * element(key, dim);
  }
  return row;
}

double RelativeRms(const std::vector<double>& expected, const std::vector<double>& actual) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

double RmsTolerance(attention::DType dtype) { return dtype == attention::DType::kFloat32 ? 1e-5 : 8e-3; }

}  // namespace pristine::testing
