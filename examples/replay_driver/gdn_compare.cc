#include "examples/replay_driver/gdn_compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/gdn_config.h"
#include "tests/support/truth.h"

namespace pristine::replay_driver {
namespace {

constexpr size_t kDim = kGdnHeadDim;
constexpr int32_t kTaps = 4;  // of the convolution

void CountMismatch(Comparison& comparison, const std::string& what) {
  if (comparison.mismatches++ == 0) comparison.first = what;
}

// As the device holds it.
double Rounded(const ModelConfig& config, double value) {
  const float single = static_cast<float>(value);
  return config.dtype == attention::DType::kFloat32 ? single : FromBFloat16(ToBFloat16(single));
}

// One request's tokens in one layer, as a value head sees them.
class Tokens {
 public:
  Tokens(const ModelConfig& config, const GdnQuery& query, int32_t layer, int32_t head)
      : config_(config), query_(query), layer_(layer), head_(head) {
    const uint64_t weights = Parameter(GdnTensor::kWeight);
    for (int32_t i = 0; i < config.gdn.dim() * kTaps; ++i) {
      weight_.push_back(Rounded(config, GdnElement(weights, GdnTensor::kWeight, i)));
    }
    a_log_ = GdnElement(Parameter(GdnTensor::kALog), GdnTensor::kALog, head);
    dt_bias_ = GdnElement(Parameter(GdnTensor::kDtBias), GdnTensor::kDtBias, head);
  }

  // One head of what the convolution gives at `position`, from channel `first` on. `normalised`: as q and k are.
  std::vector<double> Convolved(int32_t position, int32_t first, bool normalised) const {
    std::vector<double> y(kDim);
    std::vector<uint64_t> keys;
    for (int32_t tap = 0; tap < kTaps; ++tap) {
      keys.push_back(Key(position - (kTaps - 1) + tap, GdnTensor::kMixed));
    }
    double norm = 1e-6;
    for (size_t i = 0; i < kDim; ++i) {
      const int32_t channel = first + static_cast<int32_t>(i);
      double sum = 0;
      for (int32_t tap = std::max(0, kTaps - 1 - position); tap < kTaps; ++tap) {
        const size_t at = static_cast<size_t>(tap);
        const float x = GdnElement(keys[at], GdnTensor::kMixed, channel);
        sum += weight_[static_cast<size_t>(channel * kTaps) + at] * Rounded(config_, x);
      }
      y[i] = Rounded(config_, sum / (1 + std::exp(-sum)));
      norm += y[i] * y[i];
    }
    if (normalised) {
      for (double& value : y) value /= std::sqrt(norm);
    }
    return y;
  }
  int32_t qk_head() const { return head_ / (config_.gdn.v_heads / config_.gdn.qk_heads); }
  std::vector<double> q(int32_t position) const { return Convolved(position, qk_head() * kGdnHeadDim, true); }
  std::vector<double> k(int32_t position) const {
    return Convolved(position, config_.gdn.qk_dim() + qk_head() * kGdnHeadDim, true);
  }
  std::vector<double> v(int32_t position) const {
    return Convolved(position, 2 * config_.gdn.qk_dim() + head_ * kGdnHeadDim, false);
  }
  double decay(int32_t position) const {
    const double x = Gate(position, GdnTensor::kA) + dt_bias_;
    return std::exp(-std::exp(a_log_) * std::log1p(std::exp(x)));
  }
  double beta(int32_t position) const { return 1 / (1 + std::exp(-Gate(position, GdnTensor::kB))); }

 private:
  uint64_t Parameter(GdnTensor tensor) const { return GdnKey(config_.seed, 0, layer_, 0, tensor); }
  uint64_t Key(int32_t position, GdnTensor tensor) const {
    const int32_t draft = position - (query_.length - static_cast<int32_t>(query_.drafts.size()));
    const uint64_t seed = draft < 0 ? config_.seed : TokenSeed(config_.seed, query_.drafts[static_cast<size_t>(draft)]);
    return GdnKey(seed, query_.request, layer_, position, tensor);
  }
  double Gate(int32_t position, GdnTensor tensor) const {
    return Rounded(config_, GdnElement(Key(position, tensor), tensor, head_));
  }

  const ModelConfig& config_;
  const GdnQuery& query_;
  const int32_t layer_, head_;
  std::vector<double> weight_;  // [dim, 4]
  double a_log_ = 0, dt_bias_ = 0;
};

}  // namespace

GdnTruth TrueGdn(const ModelConfig& config, const GdnQuery& query, int32_t layer, int32_t head) {
  const Tokens tokens(config, query, layer, head);
  GdnTruth truth = {std::vector<double>(kDim), 0};
  std::vector<double> w = tokens.q(query.length - 1);
  for (double& value : w) value /= std::sqrt(static_cast<double>(kDim));
  double decay = 1;  // of all tokens after `position`
  // What is left out weighs less than 1e-20 of |q| |v|, which neither decay nor k (|k| < 1, beta < 1) can raise again.
  for (int32_t position = query.length - 1; position >= 0 && decay > 1e-20; --position) {
    const std::vector<double> k = tokens.k(position), v = tokens.v(position);
    const double beta = tokens.beta(position);
    double dot = 0, w_squares = 0, v_squares = 0;
    for (size_t i = 0; i < kDim; ++i) {
      dot += k[i] * w[i];
      w_squares += w[i] * w[i];
      v_squares += v[i] * v[i];
    }
    truth.typical_norm += decay * decay * beta * beta * w_squares * v_squares / kDim;
    for (size_t i = 0; i < kDim; ++i) {
      truth.out[i] += decay * beta * dot * v[i];
      w[i] -= beta * dot * k[i];
    }
    decay *= tokens.decay(position);
  }
  truth.typical_norm = std::sqrt(truth.typical_norm);
  return truth;
}

void CompareGdnSame(const ModelConfig& config, const Extent& bucket, const Extent& extent, const Outputs& replayed,
                    const Outputs& eager, Comparison& comparison) {
  const size_t row_bytes = static_cast<size_t>(config.gdn.v_dim()) * attention::SizeOf(config.dtype);
  const std::vector<std::byte> zeros(row_bytes);
  for (size_t layer = 0; layer < replayed.gdn_out.size(); ++layer) {
    for (int32_t row = 0; row < bucket.tokens; ++row) {
      const size_t offset = static_cast<size_t>(row) * row_bytes;
      const std::byte* const out = replayed.gdn_out[layer].data() + offset;
      ++comparison.rows;
      if (std::memcmp(out, eager.gdn_out[layer].data() + offset, row_bytes) != 0) {
        CountMismatch(comparison,
                      absl::StrCat("row ", row, " of GDN layer ", layer,
                                   " differs from an eager run of the same step in bucket ", bucket.ToString()));
      } else if (row >= extent.tokens && std::memcmp(out, zeros.data(), row_bytes) != 0) {
        CountMismatch(comparison, absl::StrCat("padded row ", row, " of GDN layer ", layer, " is not zeros in bucket ",
                                               bucket.ToString()));
      }
    }
  }
  for (size_t i = 0; i < eager.state_differences.size(); ++i) {
    if (eager.state_differences[i] == 0) continue;
    const size_t layers = static_cast<size_t>(config.gdn.layers);
    CountMismatch(comparison, absl::StrCat("the states of GDN layer ", i % layers, " in slot ", i / layers,
                                           " differ from those that an eager run of the same step leaves in bucket ",
                                           bucket.ToString()));
  }
}

void CompareGdnTruth(const ModelConfig& config, absl::Span<const GdnQuery> queries, const Outputs& replayed,
                     int32_t rows, int64_t draw, Comparison& comparison) {
  const double tolerance = testing::RmsTolerance(config.dtype);
  const int64_t heads = config.gdn.v_heads;
  const int64_t triples = static_cast<int64_t>(queries.size()) * config.gdn.layers * heads;
  const uint64_t key = Combine(~config.seed, static_cast<uint64_t>(draw));
  int64_t needed = std::min<int64_t>(rows, triples);
  for (int64_t triple = 0; needed > 0; ++triple) {
    const uint64_t left = static_cast<uint64_t>(triples - triple);
    if (Combine(key, static_cast<uint64_t>(triple)) % left >= static_cast<uint64_t>(needed)) continue;
    --needed;
    const int32_t head = static_cast<int32_t>(triple % heads);
    const int32_t layer = static_cast<int32_t>(triple / heads % config.gdn.layers);
    const size_t row = static_cast<size_t>(triple / heads / config.gdn.layers);
    const GdnQuery& query = queries[row];
    const GdnTruth truth = TrueGdn(config, query, layer, head);
    const size_t first = row * static_cast<size_t>(config.gdn.v_dim()) + static_cast<size_t>(head) * kDim;
    double error = 0, norm = 0;
    for (size_t i = 0; i < kDim; ++i) {
      const double actual = OutputElement(config, replayed.gdn_out[static_cast<size_t>(layer)], first + i);
      error += (actual - truth.out[i]) * (actual - truth.out[i]);
      norm += truth.out[i] * truth.out[i];
    }
    const double rms = std::sqrt(error) / std::max(std::sqrt(norm), truth.typical_norm);
    ++comparison.rows;
    comparison.max_rel_rms =
        std::max(comparison.max_rel_rms, std::isfinite(rms) ? rms : std::numeric_limits<double>::infinity());
    if (rms <= tolerance) continue;  // NaN is a mismatch
    CountMismatch(comparison,
                  absl::StrCat("request ", query.request, " of ", query.length, " tokens, GDN layer ", layer,
                               ", value head ", head, ": relative RMS ", rms, " (at most ", tolerance, ")"));
  }
}

}  // namespace pristine::replay_driver
