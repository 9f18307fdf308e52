#include "examples/replay_driver/compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/gdn_compare.h"
#include "examples/replay_driver/gdn_layers.h"
#include "examples/replay_driver/kv_hash.h"
#include "pristine/graph_runtime/status.h"
#include "tests/support/truth.h"

namespace pristine::replay_driver {
namespace {

void CountMismatch(Comparison& comparison, const std::string& what) {
  if (comparison.mismatches++ == 0) comparison.first = what;
}

}  // namespace

double OutputElement(const ModelConfig& config, const std::vector<std::byte>& out, size_t index) {
  if (config.dtype == attention::DType::kFloat32) {
    float value;
    std::memcpy(&value, out.data() + index * sizeof(value), sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, out.data() + index * sizeof(bits), sizeof(bits));
  return FromBFloat16(bits);
}

namespace {

// Of all outputs of a GDN layer.
size_t GdnLayerBytes(const ModelConfig& config, int32_t rows) {
  return static_cast<size_t>(rows) * config.gdn.v_dim() * attention::SizeOf(config.dtype);
}
size_t DifferencesBytes(const ModelConfig& config) {
  return config.gdn.layers == 0 ? 0 : static_cast<size_t>(GdnLayers::PoolSlots(config)) * config.gdn.layers * 4;
}
int64_t GdnBytes(const ModelConfig& config) {
  return static_cast<int64_t>(DifferencesBytes(config) + GdnLayerBytes(config, config.max_batch()) * config.gdn.layers);
}

}  // namespace

absl::StatusOr<OutputCopy> OutputCopy::Create(Device& device, const ModelConfig& config) {
  OutputCopy copy;
  copy.config_ = config;
  PRISTINE_ASSIGN_OR_RETURN(copy.memory_, device.AllocatePinned(static_cast<size_t>(Bytes(config)), "outputs"));
  return copy;
}

int64_t OutputCopy::Bytes(const ModelConfig& config) {
  const int64_t lse = int64_t{config.max_batch()} * config.heads * static_cast<int64_t>(sizeof(float));
  return config.layers * (static_cast<int64_t>(config.q_bytes(config.max_batch())) + lse) + GdnBytes(config);
}

OutputCopy::Layer OutputCopy::PlaceOf(int32_t layer) const {
  // All layers' LSEs come first: whole floats, wherever the outputs' rows end.
  const size_t lses = static_cast<size_t>(config_.max_batch()) * config_.heads;
  const size_t outs = config_.q_bytes(config_.max_batch());
  std::byte* const first_out = memory_.host() + config_.layers * lses * sizeof(float);
  return {{first_out + layer * outs, config_.q_bytes(bucket_.requests)},
          {memory_.As<float>().data() + layer * lses, static_cast<size_t>(bucket_.requests) * config_.heads}};
}

// Behind all that attention layers need.
absl::Span<std::byte> OutputCopy::PlaceOfGdn(int32_t layer) const {
  std::byte* const first = memory_.host() + Bytes(config_) - GdnBytes(config_);
  return {first + layer * GdnLayerBytes(config_, config_.max_batch()), GdnLayerBytes(config_, bucket_.requests)};
}

absl::Span<std::byte> OutputCopy::PlaceOfDifferences() const {
  const size_t bytes = DifferencesBytes(config_);
  return {memory_.host() + Bytes(config_) - bytes, bytes};
}

absl::Status OutputCopy::Queue(Stream& stream, const DecodeModel& model, const Extent& bucket) {
  bucket_ = bucket;
  for (int32_t layer = 0; layer < config_.layers; ++layer) {
    const auto [out, lse] = PlaceOf(layer);
    PRISTINE_RETURN_IF_ERROR(stream.CopyToHost(out, model.out(layer).Sub(0, out.size())));
    PRISTINE_RETURN_IF_ERROR(
        stream.CopyToHost(absl::MakeSpan(reinterpret_cast<std::byte*>(lse.data()), lse.size() * sizeof(float)),
                          AsBytes(model.lse(layer).Sub(0, lse.size()))));
  }
  if (config_.gdn.layers == 0) return absl::OkStatus();
  for (int32_t layer = 0; layer < config_.gdn.layers; ++layer) {
    const absl::Span<std::byte> out = PlaceOfGdn(layer);
    PRISTINE_RETURN_IF_ERROR(stream.CopyToHost(out, model.gdn().out(layer).Sub(0, out.size())));
  }
  return stream.CopyToHost(PlaceOfDifferences(), AsBytes(model.gdn().differences()));
}

Outputs OutputCopy::Read() const {
  Outputs outputs;
  for (int32_t layer = 0; layer < config_.layers; ++layer) {
    const auto [out, lse] = PlaceOf(layer);
    outputs.out.emplace_back(out.begin(), out.end());
    outputs.lse.emplace_back(lse.begin(), lse.end());
  }
  for (int32_t layer = 0; layer < config_.gdn.layers; ++layer) {
    const absl::Span<std::byte> out = PlaceOfGdn(layer);
    outputs.gdn_out.emplace_back(out.begin(), out.end());
  }
  const absl::Span<std::byte> differences = PlaceOfDifferences();
  outputs.state_differences.resize(differences.size() / sizeof(int32_t));
  if (!differences.empty()) std::memcpy(outputs.state_differences.data(), differences.data(), differences.size());
  return outputs;
}

Comparison CompareSame(const ModelConfig& config, const StepInputs& inputs, const Outputs& replayed,
                       const Outputs& eager) {
  Comparison comparison;
  const size_t row_bytes = config.q_bytes(1);
  const std::vector<std::byte> zeros(row_bytes);
  const std::vector<float> empty(config.heads, -std::numeric_limits<float>::infinity());
  const size_t lse_bytes = empty.size() * sizeof(float);
  for (int32_t layer = 0; layer < config.layers; ++layer) {
    for (int32_t row = 0; row < inputs.bucket.requests; ++row) {
      const std::byte* out = replayed.out[layer].data() + row * row_bytes;
      const float* lse = replayed.lse[layer].data() + row * config.heads;
      ++comparison.rows;
      if (std::memcmp(out, eager.out[layer].data() + row * row_bytes, row_bytes) != 0 ||
          std::memcmp(lse, eager.lse[layer].data() + row * config.heads, lse_bytes) != 0) {
        CountMismatch(comparison,
                      absl::StrCat("row ", row, " of layer ", layer,
                                   " differs from an eager run of the same step in bucket ", inputs.bucket.ToString()));
      } else if (row >= inputs.extent.requests &&
                 (std::memcmp(out, zeros.data(), row_bytes) != 0 || std::memcmp(lse, empty.data(), lse_bytes) != 0)) {
        CountMismatch(comparison,
                      absl::StrCat("padded row ", row, " of layer ", layer,
                                   " is not zeros with an LSE of -inf in bucket ", inputs.bucket.ToString()));
      }
    }
  }
  CompareGdnSame(config, inputs.bucket, inputs.extent, replayed, eager, comparison);
  return comparison;
}

Comparison CompareTruth(const ModelConfig& config, const StepInputs& inputs, const Outputs& replayed, int32_t rows,
                        int64_t draw) {
  const testing::TruthModel model = {.seed = config.seed,
                                     .heads = config.heads,
                                     .kv_heads = config.kv_heads,
                                     .head_dim = config.head_dim,
                                     .dtype = config.dtype,
                                     .groups = config.sparse.groups,
                                     .block = config.sparse.block,
                                     .topk = config.sparse.topk,
                                     .dense_len = config.sparse.dense_len,
                                     .window = config.window};
  const double tolerance = testing::RmsTolerance(config.dtype);
  const int64_t triples = int64_t{inputs.extent.requests} * config.layers * config.heads;
  const uint64_t key = Combine(config.seed, static_cast<uint64_t>(draw));
  int64_t needed = std::min<int64_t>(rows, triples);
  Comparison comparison;
  // Each triple in turn is taken with probability needed / left, which draws every subset equally often.
  for (int64_t triple = 0; needed > 0; ++triple) {
    const uint64_t left = static_cast<uint64_t>(triples - triple);
    if (Combine(key, static_cast<uint64_t>(triple)) % left >= static_cast<uint64_t>(needed)) continue;
    --needed;
    const int32_t head = static_cast<int32_t>(triple % config.heads);
    const int32_t layer = static_cast<int32_t>(triple / config.heads % config.layers);
    const int32_t row = static_cast<int32_t>(triple / config.heads / config.layers);
    const testing::TruthRow truth = testing::DenseAttention(
        model, config.is_sparse(layer) ? testing::TruthLayer::kSparse : testing::TruthLayer::kWindow,
        inputs.requests[row], layer, inputs.lengths[row], head);
    const size_t head_row = static_cast<size_t>(row) * config.heads + head;
    std::vector<double> actual(config.head_dim);
    for (int32_t dim = 0; dim < config.head_dim; ++dim) {
      actual[dim] = OutputElement(config, replayed.out[layer], head_row * config.head_dim + dim);
    }
    const double rms = testing::RelativeRms(truth.out, actual);
    const double lse_error = std::abs(replayed.lse[layer][head_row] - truth.lse);
    ++comparison.rows;
    comparison.max_rel_rms =
        std::max(comparison.max_rel_rms, std::isfinite(rms) ? rms : std::numeric_limits<double>::infinity());
    // Written so that NaN is a mismatch.
    if (!(rms <= tolerance) || !(lse_error <= testing::kLseTolerance)) {
      CountMismatch(comparison,
                    absl::StrCat("request ", inputs.requests[row], " of ", inputs.lengths[row], " tokens, layer ",
                                 layer, ", head ", head, ": relative RMS ", rms, " (at most ", tolerance,
                                 "), LSE off by ", lse_error, " (at most ", testing::kLseTolerance, ")"));
    }
  }
  std::vector<GdnQuery> queries;
  for (size_t row = 0; row < inputs.requests.size(); ++row) {
    queries.push_back({inputs.requests[row], inputs.lengths[row]});
  }
  CompareGdnTruth(config, queries, replayed, rows, draw, comparison);
  return comparison;
}

}  // namespace pristine::replay_driver
