#include "examples/replay_driver/spec_compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/gdn_compare.h"
#include "examples/replay_driver/kv_hash.h"
#include "pristine/graph_runtime/status.h"
#include "tests/support/truth.h"

namespace pristine::replay_driver {
namespace {

const char* NameOf(const SpecModel& model, SpecPhase phase) { return ToString(model.attention(phase).config().mode); }

void CountMismatch(Comparison& comparison, const std::string& what) {
  if (comparison.mismatches++ == 0) comparison.first = what;
}

// A query token of a step, by its definition.
struct Query {
  const SpecRow* row;
  int32_t position;
};
std::vector<Query> QueriesOf(const SpecConfig& config, const SpecInputs& inputs) {
  std::vector<Query> queries;
  for (const SpecRow& row : inputs.rows) {
    const QueryRange range = QueriesOf(config, inputs.phase, inputs.draft_step, row);
    for (int32_t i = 0; i < range.count; ++i) queries.push_back({&row, range.first + i});
  }
  return queries;
}

// What the request's tokens from the committed ones to this one are, as TokenSeed takes them.
std::vector<int32_t> DraftsOf(const SpecInputs& inputs, const Query& query) {
  std::vector<int32_t> drafts;
  for (int32_t position = query.row->committed; position <= query.position; ++position) {
    drafts.push_back(TokenAt(inputs.phase, *query.row, position));
  }
  return drafts;
}

testing::TruthRow TruthOf(const SpecConfig& config, const SpecInputs& inputs, const Query& query, int32_t layer,
                          int32_t head) {
  const ModelConfig& model = config.model;
  const testing::TruthModel truth = {.seed = model.seed,
                                     .heads = model.heads,
                                     .kv_heads = model.kv_heads,
                                     .head_dim = model.head_dim,
                                     .dtype = model.dtype,
                                     .window = model.window};
  const bool window = inputs.phase == SpecPhase::kVerify && config.is_window(layer);
  return testing::DenseAttention(truth, window ? testing::TruthLayer::kWindow : testing::TruthLayer::kFull,
                                 query.row->request, layer, query.position + 1, head, DraftsOf(inputs, query));
}

}  // namespace

absl::StatusOr<Outputs> ReadOutputs(Stream& stream, const SpecModel& model, const SpecInputs& inputs) {
  const ModelConfig& config = model.config().model;
  Outputs outputs;
  const auto read = [&stream](void* to, DeviceSpan<const std::byte> from) {
    return stream.CopyToHost(absl::MakeSpan(static_cast<std::byte*>(to), from.size()), from);
  };
  for (const int32_t layer : model.LayersOf(inputs.phase)) {
    std::vector<std::byte>& out = outputs.out.emplace_back(config.q_bytes(inputs.bucket.tokens));
    std::vector<float>& lse = outputs.lse.emplace_back(static_cast<size_t>(inputs.bucket.tokens) * config.heads);
    PRISTINE_RETURN_IF_ERROR(read(out.data(), model.out(layer).Sub(0, out.size())));
    PRISTINE_RETURN_IF_ERROR(read(lse.data(), AsBytes(model.lse(layer).Sub(0, lse.size()))));
  }
  if (model.gdn() != nullptr) {
    const size_t row_bytes = static_cast<size_t>(config.gdn.v_dim()) * attention::SizeOf(config.dtype);
    for (int32_t layer = 0; inputs.phase == SpecPhase::kVerify && layer < config.gdn.layers; ++layer) {
      std::vector<std::byte>& out = outputs.gdn_out.emplace_back(row_bytes * inputs.bucket.tokens);
      PRISTINE_RETURN_IF_ERROR(read(out.data(), model.gdn()->out(layer).Sub(0, out.size())));
    }
    const DeviceSpan<const std::byte> differences = AsBytes(model.gdn()->differences());
    outputs.state_differences.resize(differences.size() / sizeof(int32_t));
    PRISTINE_RETURN_IF_ERROR(read(outputs.state_differences.data(), differences));
  }
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return outputs;
}

Comparison CompareSame(const SpecModel& model, const SpecInputs& inputs, const Outputs& replayed,
                       const Outputs& eager) {
  const ModelConfig& config = model.config().model;
  const std::vector<int32_t> layers = model.LayersOf(inputs.phase);
  Comparison comparison;
  const size_t row_bytes = config.q_bytes(1);
  const std::vector<std::byte> zeros(row_bytes);
  const std::vector<float> empty(config.heads, -std::numeric_limits<float>::infinity());
  const size_t lse_bytes = empty.size() * sizeof(float);
  for (size_t i = 0; i < layers.size(); ++i) {
    for (int32_t token = 0; token < inputs.bucket.tokens; ++token) {
      const std::byte* out = replayed.out[i].data() + token * row_bytes;
      const float* lse = replayed.lse[i].data() + static_cast<size_t>(token) * config.heads;
      ++comparison.rows;
      std::string what;
      if (std::memcmp(out, eager.out[i].data() + token * row_bytes, row_bytes) != 0 ||
          std::memcmp(lse, eager.lse[i].data() + static_cast<size_t>(token) * config.heads, lse_bytes) != 0) {
        what = "differs from an eager run of the same step";
      } else if (token >= inputs.extent.tokens &&
                 (std::memcmp(out, zeros.data(), row_bytes) != 0 || std::memcmp(lse, empty.data(), lse_bytes) != 0)) {
        what = "is padding, and not zeros with an LSE of -inf";
      }
      if (what.empty()) continue;
      CountMismatch(comparison, absl::StrCat(NameOf(model, inputs.phase), ": token ", token, " of layer ", layers[i],
                                             " ", what, " in bucket ", inputs.bucket.ToString()));
    }
  }
  CompareGdnSame(config, inputs.bucket, inputs.extent, replayed, eager, comparison);
  return comparison;
}

Comparison CompareTruth(const SpecModel& model, const SpecInputs& inputs, const Outputs& replayed, int32_t rows,
                        int64_t draw) {
  const ModelConfig& config = model.config().model;
  const std::vector<int32_t> layers = model.LayersOf(inputs.phase);
  const std::vector<Query> queries = QueriesOf(model.config(), inputs);
  const double tolerance = testing::RmsTolerance(config.dtype);
  const int64_t triples = static_cast<int64_t>(queries.size() * layers.size()) * config.heads;
  const uint64_t key = Combine(config.seed, static_cast<uint64_t>(draw));
  int64_t needed = std::min<int64_t>(rows, triples);
  Comparison comparison;
  // Each triple in turn is taken with probability needed / left, which draws every subset equally often.
  for (int64_t triple = 0; needed > 0; ++triple) {
    const uint64_t left = static_cast<uint64_t>(triples - triple);
    if (Combine(key, static_cast<uint64_t>(triple)) % left >= static_cast<uint64_t>(needed)) continue;
    --needed;
    const int32_t head = static_cast<int32_t>(triple % config.heads);
    const size_t i = static_cast<size_t>(triple / config.heads) % layers.size();
    const size_t token = static_cast<size_t>(triple / config.heads) / layers.size();
    const Query& query = queries[token];
    const testing::TruthRow truth = TruthOf(model.config(), inputs, query, layers[i], head);
    const size_t head_row = token * config.heads + head;
    std::vector<double> actual(config.head_dim);
    for (int32_t dim = 0; dim < config.head_dim; ++dim) {
      actual[dim] = OutputElement(config, replayed.out[i], head_row * config.head_dim + dim);
    }
    const double rms = testing::RelativeRms(truth.out, actual);
    const double lse_error = std::abs(replayed.lse[i][head_row] - truth.lse);
    ++comparison.rows;
    comparison.max_rel_rms =
        std::max(comparison.max_rel_rms, std::isfinite(rms) ? rms : std::numeric_limits<double>::infinity());
    // Written so that NaN is a mismatch.
    if (!(rms <= tolerance) || !(lse_error <= testing::kLseTolerance)) {
      CountMismatch(comparison,
                    absl::StrCat(NameOf(model, inputs.phase), ": request ", query.row->request, " at position ",
                                 query.position, " with ", query.row->committed, " tokens and ", query.row->accepted,
                                 " accepted, layer ", layers[i], ", head ", head, ": relative RMS ", rms, " (at most ",
                                 tolerance, "), LSE off by ", lse_error, " (at most ", testing::kLseTolerance, ")"));
    }
  }
  if (replayed.gdn_out.empty()) return comparison;
  std::vector<GdnQuery> gdn;
  for (const Query& query : queries) {
    gdn.push_back({query.row->request, query.position + 1, DraftsOf(inputs, query)});
  }
  CompareGdnTruth(config, gdn, replayed, rows, draw, comparison);
  return comparison;
}

absl::StatusOr<Comparison> CompareRolledBack(Stream& stream, const SpecModel& model, const KvPool& pool,
                                             const SpecInputs& inputs) {
  const ModelConfig& config = model.config().model;
  const size_t row_bytes = config.q_bytes(1) / config.heads * config.kv_heads;
  const std::vector<std::byte> nothing(row_bytes, std::byte{0xff});
  std::vector<std::byte> k(row_bytes), v(row_bytes);
  Comparison comparison;
  for (const SpecRow& row : inputs.rows) {
    for (int32_t position = row.committed + row.accepted; position < row.committed + model.config().draft_tokens;
         ++position) {
      const size_t slot =
          static_cast<size_t>(row.pages[position / config.page_size]) * config.page_size + position % config.page_size;
      for (int32_t layer = 0; layer < config.layers; ++layer) {
        PRISTINE_RETURN_IF_ERROR(stream.CopyToHost(absl::MakeSpan(k), pool.k(layer).Sub(slot * row_bytes, row_bytes)));
        PRISTINE_RETURN_IF_ERROR(stream.CopyToHost(absl::MakeSpan(v), pool.v(layer).Sub(slot * row_bytes, row_bytes)));
        PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
        ++comparison.rows;
        if (k == nothing && v == nothing) continue;
        CountMismatch(comparison, absl::StrCat("rollback: request ", row.request, " at position ", position, ", layer ",
                                               layer, ": slot ", slot, " still holds a rejected token"));
      }
    }
  }
  return comparison;
}

}  // namespace pristine::replay_driver
