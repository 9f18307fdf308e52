// A made-up prefill step, what attention over it must give straight from the definition, and the smallest engine that
// runs it: a manager, a StepMetadata and a PagedPrefill over one KV pool, eagerly and from captured graphs.
#ifndef PRISTINE_TESTS_ATTENTION_PREFILL_RIG_H_
#define PRISTINE_TESTS_ATTENTION_PREFILL_RIG_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "attention/kernels/float8.h"
#include "attention/prefill_variants.h"
#include "pristine/attention/paged_prefill.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/status.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/oracle_case.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {

struct PrefillShape {
  attention::DType dtype = attention::DType::kFloat32;
  attention::DType kv_dtype = attention::DType::kFloat32;
  int32_t q_heads = 4, kv_heads = 2, head_dim = 64;
  int32_t page_size = 1;
  attention::KvLayout layout = attention::KvLayout::kNHD;
  int32_t window = 0;
  float soft_cap = 0;
  bool sinks = false;
  bool block_table = false;
  float k_scale = 1, v_scale = 1;  // of float8 KV
  float spread = 1;                // standard deviation of scores, about
  uint64_t seed = 1;

  bool scaled() const { return kv_dtype == attention::DType::kFloat8E4M3; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(head_dim)); }
  std::string ToString() const {
    return absl::StrCat(attention::ToString(dtype), " with ", attention::ToString(kv_dtype), " KV, ", q_heads, "/",
                        kv_heads, " heads of ", head_dim, ", ", attention::ToString(layout), ", page size ", page_size,
                        ", window ", window, ", soft cap ", soft_cap, sinks ? ", sinks" : "",
                        block_table ? ", block table" : "", ", seed ", seed);
  }
};

// Values as the dtype stores them.
inline std::vector<std::byte> Encode(absl::Span<const float> values, attention::DType dtype) {
  if (dtype != attention::DType::kFloat8E4M3) return ToBytes(values, dtype);
  std::vector<std::byte> bytes(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    bytes[i] = std::byte{attention::FromFloat<attention::Float8E4M3>(values[i]).bits};
  }
  return bytes;
}
inline std::vector<float> Decode(absl::Span<const std::byte> bytes, attention::DType dtype) {
  if (dtype != attention::DType::kFloat8E4M3) return ToFloats(bytes, dtype);
  std::vector<float> values(bytes.size());
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = attention::ToFloat(attention::Float8E4M3{static_cast<uint8_t>(bytes[i])});
  }
  return values;
}

// Requests with queries, lengths, and a pool of scattered pages. Slots that belong to no token, or to one that no
// query's window reaches, are NaN in K and V, but for page 0, the dummy page, which is zeros. needles[r]: a position of
// request r whose key has at least half of the mass of each query that sees it and whose value is its own; -1: none.
class PrefillCase {
 public:
  PrefillCase(const PrefillShape& shape, const std::vector<int32_t>& qo_lens, const std::vector<int32_t>& lengths,
              const std::vector<int32_t>& needles = {})
      : shape_(shape), lengths_(lengths) {
    for (size_t r = 0; r < lengths.size(); ++r) {
      qo_indptr_.push_back(qo_indptr_.back() + qo_lens[r]);
      indptr_.push_back(indptr_.back() + (lengths[r] + shape.page_size - 1) / shape.page_size);
    }
    constexpr int32_t kUnusedPages = 3;
    num_pages_ = 1 + indptr_.back() + kUnusedPages;
    std::mt19937_64 random(shape.seed);
    std::vector<int32_t> pages(num_pages_ - 1);
    std::iota(pages.begin(), pages.end(), 1);
    std::shuffle(pages.begin(), pages.end(), random);
    if (indptr_.back() > 0)
      *std::find(pages.begin(), pages.end(), num_pages_ - 1) = std::exchange(pages[0], num_pages_ - 1);
    indices_.assign(pages.begin(), pages.begin() + indptr_.back());

    std::uniform_real_distribution<float> noise(-1.732f, 1.732f);
    const auto fill = [&](std::vector<float>& values, size_t size, float spread, attention::DType dtype) {
      values.resize(size);
      for (float& value : values) value = spread * noise(random);
      values = Decode(Encode(values, dtype), dtype);
    };
    fill(q_, size_t{1} * tokens() * shape.q_heads * shape.head_dim, shape.spread, shape.dtype);
    for (size_t i = 0; i < q_.size(); i += shape.head_dim) q_[i] = kQueryTag;
    const size_t row = size_t{1} * shape.kv_heads * shape.head_dim;
    for (size_t r = 0; r < lengths.size(); ++r) {
      std::vector<float>&k = keys_.emplace_back(), &v = values_.emplace_back();
      fill(k, lengths[r] * row, 1, shape.kv_dtype);
      fill(v, lengths[r] * row, 1, shape.kv_dtype);
      for (size_t i = 0; i < k.size(); i += shape.head_dim) k[i] = 0;
      if (r >= needles.size() || needles[r] < 0) continue;
      // The other keys have about length * e^(spread^2 / 2) of the mass.
      const float logit = std::log(static_cast<float>(lengths[r])) + 2.5f + shape.spread * shape.spread / 2;
      for (int32_t h = 0; h < shape.kv_heads; ++h) {
        float* const key = &k[needles[r] * row + size_t{1} * h * shape.head_dim];
        std::fill_n(key, shape.head_dim, 0.0f);
        const std::vector<float> tag = {logit / (kQueryTag * shape.scale() * shape.k_scale)};
        key[0] = Decode(Encode(tag, shape.kv_dtype), shape.kv_dtype)[0];
      }
    }
    sinks_.resize(shape.q_heads);
    for (float& sink : sinks_) sink = 2 * noise(random);
  }

  const PrefillShape& shape() const { return shape_; }
  int32_t requests() const { return static_cast<int32_t>(lengths_.size()); }
  int32_t tokens() const { return qo_indptr_.back(); }
  int32_t num_pages() const { return num_pages_; }
  const std::vector<int32_t>& lengths() const { return lengths_; }
  const std::vector<int32_t>& qo_indptr() const { return qo_indptr_; }
  const std::vector<int32_t>& indptr() const { return indptr_; }
  const std::vector<int32_t>& indices() const { return indices_; }
  const std::vector<float>& sinks() const { return sinks_; }
  std::vector<std::byte> Q() const { return Encode(q_, shape_.dtype); }

  std::vector<std::byte> Pool(bool values) const {
    const int32_t page = shape_.page_size, heads = shape_.kv_heads, dim = shape_.head_dim;
    const bool nhd = shape_.layout == attention::KvLayout::kNHD;
    std::vector<float> pool(size_t{1} * num_pages_ * page * heads * dim, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(pool.begin(), page * heads * dim, 0.0f);
    for (int32_t r = 0; r < requests(); ++r) {
      const float* from = (values ? values_ : keys_)[r].data() + size_t{1} * FirstSeen(r) * heads * dim;
      for (int32_t t = FirstSeen(r); t < lengths_[r]; ++t) {
        const int64_t first = int64_t{indices_[indptr_[r] + t / page]} * page * heads;
        for (int32_t h = 0; h < heads; ++h, from += dim) {
          const int64_t at = first + (nhd ? t % page * heads + h : h * page + t % page);
          std::copy_n(from, dim, pool.begin() + at * dim);
        }
      }
    }
    return Encode(pool, shape_.kv_dtype);
  }
  // The first position of request r that a window reaches, at most its length.
  int32_t FirstSeen(int32_t r) const {
    const int64_t queries = qo_indptr_[r + 1] - qo_indptr_[r];
    const int64_t first = shape_.window > 0 ? lengths_[r] - queries + 1 - shape_.window : 0;
    return static_cast<int32_t>(std::clamp<int64_t>(first, 0, lengths_[r]));
  }
  // [requests, width], with page numbers outside the pool behind each request's pages, and where no window reaches a
  // page: an engine has freed it.
  std::vector<int32_t> BlockTable(int32_t rows, int32_t width) const {
    std::vector<int32_t> table(size_t{1} * rows * width, num_pages_ + 1000000);
    for (int32_t r = 0; r < requests(); ++r) {
      std::copy(indices_.begin() + indptr_[r], indices_.begin() + indptr_[r + 1], table.begin() + r * width);
      std::fill_n(table.begin() + r * width, FirstSeen(r) / shape_.page_size, kFreedPage);
    }
    return table;
  }

  // Attention of a query of the batch, in double; over those positions that `there` accepts (null: all).
  OracleRow Expected(int32_t token, int32_t q_head, const std::function<bool(int32_t)>& there = nullptr) const {
    const int32_t r =
        static_cast<int32_t>(std::upper_bound(qo_indptr_.begin(), qo_indptr_.end(), token) - qo_indptr_.begin()) - 1;
    const int32_t position = lengths_[r] - qo_indptr_[r + 1] + token;
    const int32_t dim = shape_.head_dim, kv_head = q_head / (shape_.q_heads / shape_.kv_heads);
    const float* const query = &q_[(size_t{1} * token * shape_.q_heads + q_head) * dim];
    OracleRow row = {.out = std::vector<double>(dim, 0.0), .lse = -std::numeric_limits<double>::infinity()};
    std::vector<std::pair<double, const float*>> attended;
    const int64_t seen = shape_.window > 0 ? int64_t{position} + 1 - shape_.window : 0;
    for (int32_t p = static_cast<int32_t>(std::max<int64_t>(0, seen)); p <= position; ++p) {
      if (there && !there(p)) continue;
      const size_t at = (size_t{1} * p * shape_.kv_heads + kv_head) * dim;
      double score = 0;
      for (int32_t d = 0; d < dim; ++d) score += double{query[d]} * keys_[r][at + d];
      score *= double{shape_.scale()} * shape_.k_scale;
      if (shape_.soft_cap > 0) score = shape_.soft_cap * std::tanh(score / shape_.soft_cap);
      attended.push_back({score, &values_[r][at]});
    }
    if (attended.empty()) return row;
    double top = shape_.sinks ? sinks_[q_head] : attended[0].first;
    for (const auto& [score, value] : attended) top = std::max(top, score);
    double mass = shape_.sinks ? std::exp(sinks_[q_head] - top) : 0;
    for (const auto& [score, value] : attended) {
      const double weight = std::exp(score - top);
      mass += weight;
      row.top_mass = std::max(row.top_mass, weight);
      for (int32_t d = 0; d < dim; ++d) row.out[d] += weight * value[d];
    }
    for (double& x : row.out) x *= shape_.v_scale / mass;
    row.top_mass /= mass;
    row.lse = (top + std::log(mass)) / std::log(2.0);
    return row;
  }

  double Tolerance() const {
    if (shape_.scaled() || shape_.dtype == attention::DType::kBFloat16) return 8e-3;
    return shape_.dtype == attention::DType::kFloat16 ? 2e-3 : 1e-5;
  }

 private:
  static constexpr int32_t kFreedPage = 2147480000;
  static constexpr float kQueryTag = 4;  // element 0 of every query; keys have 0 there, needles a large number

  const PrefillShape shape_;
  const std::vector<int32_t> lengths_;
  std::vector<int32_t> qo_indptr_ = {0}, indptr_ = {0}, indices_;
  int32_t num_pages_ = 0;
  std::vector<float> q_, sinks_;
  std::vector<std::vector<float>> keys_, values_;  // of each request, [length, kv_heads, head_dim]
};

// "" if a head is as expected: relative RMS within `tolerance`, lse to 1e-3; zeros and -inf exactly.
inline std::string Difference(const OracleRow& expected, const float* out, float lse, double tolerance) {
  if (std::isinf(expected.lse)) {
    const bool zeros = std::all_of(out, out + expected.out.size(), [](float x) { return x == 0; });
    if (zeros && std::isinf(lse) && lse < 0) return "";
    return absl::StrCat("attends nothing, but has ", zeros ? "zeros" : "values", " and LSE ", lse);
  }
  double error = 0, norm = 0;
  for (size_t d = 0; d < expected.out.size(); ++d) {
    error += (out[d] - expected.out[d]) * (out[d] - expected.out[d]);
    norm += expected.out[d] * expected.out[d];
  }
  // Written so that NaN does not pass.
  if (!(std::sqrt(error) <= tolerance * std::sqrt(norm))) {
    return absl::StrCat("relative RMS ", std::sqrt(error / norm), " > ", tolerance);
  }
  if (!(std::abs(lse - expected.lse) <= 1e-3)) return absl::StrCat("LSE ", lse, ", expected ", expected.lse);
  return "";
}

class PrefillRig {
 public:
  struct Options {
    std::vector<Extent> buckets = {{4, 64}};
    int32_t max_length = 512;
    int32_t num_pages = 0;
    const attention::PrefillVariant* variant = nullptr;  // null: what the device gets
  };

  static absl::StatusOr<std::unique_ptr<PrefillRig>> Create(Device& device, Stream& stream, const PrefillShape& shape,
                                                            const Options& options) {
    std::unique_ptr<PrefillRig> rig(new PrefillRig(stream, shape, options));
    PRISTINE_ASSIGN_OR_RETURN(rig->manager_, BufferManager::Create(device));
    const Extent most = options.buckets.back();
    rig->table_width_ = (options.max_length - 1) / shape.page_size + 1;
    PRISTINE_ASSIGN_OR_RETURN(rig->metadata_, attention::StepMetadata::Create(
                                                  *rig->manager_, {.max_requests = most.requests,
                                                                   .max_tokens = most.tokens,
                                                                   .page_size = shape.page_size,
                                                                   .num_pages = options.num_pages,
                                                                   .max_step_pages = most.requests * rig->table_width_,
                                                                   .max_length = options.max_length,
                                                                   .ragged = true}));
    const attention::PagedPrefillConfig config = {.q_heads = shape.q_heads,
                                                  .kv_heads = shape.kv_heads,
                                                  .head_dim = shape.head_dim,
                                                  .dtype = shape.dtype,
                                                  .kv_dtype = shape.kv_dtype,
                                                  .layout = shape.layout,
                                                  .page_size = shape.page_size,
                                                  .window = shape.window,
                                                  .scale = shape.scale(),
                                                  .soft_cap = shape.soft_cap};
    PRISTINE_ASSIGN_OR_RETURN(rig->prefill_, options.variant == nullptr
                                                 ? attention::PagedPrefill::Create(device, config)
                                                 : attention::PagedPrefill::Create(device, config, *options.variant));
    const size_t row = size_t{1} * shape.q_heads * shape.head_dim * attention::SizeOf(shape.dtype);
    const size_t pool = size_t{1} * options.num_pages * shape.page_size * shape.kv_heads * shape.head_dim *
                        attention::SizeOf(shape.kv_dtype);
    PRISTINE_ASSIGN_OR_RETURN(rig->q_, device.Allocate(most.tokens * row, "q"));
    PRISTINE_ASSIGN_OR_RETURN(rig->out_, device.Allocate(most.tokens * row, "out"));
    PRISTINE_ASSIGN_OR_RETURN(rig->lse_, device.Allocate(size_t{4} * most.tokens * shape.q_heads, "lse"));
    PRISTINE_ASSIGN_OR_RETURN(rig->k_, device.Allocate(pool, "k"));
    PRISTINE_ASSIGN_OR_RETURN(rig->v_, device.Allocate(pool, "v"));
    PRISTINE_ASSIGN_OR_RETURN(rig->scales_, device.Allocate(8, "scales"));
    PRISTINE_ASSIGN_OR_RETURN(rig->sinks_, device.Allocate(size_t{4} * shape.q_heads, "sinks"));
    PRISTINE_ASSIGN_OR_RETURN(rig->table_,
                              device.Allocate(size_t{4} * most.requests * rig->table_width_, "block_table"));
    PrefillRig* const self = rig.get();
    PRISTINE_ASSIGN_OR_RETURN(
        rig->runner_, GraphRunner::Create({.buckets = options.buckets}, [self](Stream& queue, const Extent& bucket) {
          return self->prefill_->Run(queue, bucket, self->tensors);
        }));
    PRISTINE_RETURN_IF_ERROR(rig->runner_->AddHook(*rig->manager_));
    PRISTINE_RETURN_IF_ERROR(rig->manager_->Seal());
    rig->tensors = {.q = rig->q_.As<const std::byte>(),
                    .k = rig->k_.As<const std::byte>(),
                    .v = rig->v_.As<const std::byte>(),
                    .out = rig->out_.As<std::byte>(),
                    .lse = rig->lse_.As<attention::LseBase2>(),
                    .qo_indptr = rig->metadata_->qo_indptr().live,
                    .lengths = rig->metadata_->lengths().live};
    if (shape.scaled()) {
      rig->tensors.k_scale = rig->scales_.As<const float>().Sub(0, 1);
      rig->tensors.v_scale = rig->scales_.As<const float>().Sub(1, 1);
    }
    if (shape.sinks) rig->tensors.sinks = rig->sinks_.As<const float>();
    if (shape.block_table) {
      rig->tensors.block_table = rig->table_.As<const int32_t>();
      rig->tensors.table_width = rig->table_width_;
    } else {
      rig->tensors.kv_indptr = rig->metadata_->kv_indptr().live;
      rig->tensors.kv_indices = rig->metadata_->kv_indices().live;
    }
    return rig;
  }

  // Writes a case's queries (the rest NaN), pool (its pages are the pool's first), scales, sinks and block table.
  absl::Status Load(const PrefillCase& step) {
    PRISTINE_RETURN_IF_ERROR(stream_.Fill(q_.As<std::byte>(), std::byte{0xff}));
    PRISTINE_RETURN_IF_ERROR(Upload(stream_, q_.As<std::byte>(), step.Q()));
    PRISTINE_RETURN_IF_ERROR(Upload(stream_, k_.As<std::byte>(), step.Pool(false)));
    PRISTINE_RETURN_IF_ERROR(Upload(stream_, v_.As<std::byte>(), step.Pool(true)));
    PRISTINE_RETURN_IF_ERROR(Upload(stream_, scales_.As<float>(), {step.shape().k_scale, step.shape().v_scale}));
    PRISTINE_RETURN_IF_ERROR(
        Upload(stream_, table_.As<int32_t>(), step.BlockTable(options_.buckets.back().requests, table_width_)));
    return Upload(stream_, sinks_.As<float>(), step.sinks());
  }

  // Opens a step over all of `step`, with outputs that are NaN.
  absl::Status Begin(const Extent& bucket, const PrefillCase& step) {
    const std::vector<int32_t> slots(step.tokens(), -1), positions(step.tokens(), 0);
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(bucket, {step.requests(), step.tokens()}));
    PRISTINE_RETURN_IF_ERROR(metadata_->Refill({.lengths = step.lengths(),
                                                .kv_indptr = step.indptr(),
                                                .kv_indices = step.indices(),
                                                .slots = slots,
                                                .positions = positions,
                                                .qo_indptr = step.qo_indptr()}));
    PRISTINE_RETURN_IF_ERROR(stream_.Fill(out_.As<std::byte>(), std::byte{0xff}));
    return stream_.Fill(lse_.As<std::byte>(), std::byte{0xff});
  }
  absl::Status RunEagerly(const Extent& bucket, const PrefillCase& step) {
    PRISTINE_RETURN_IF_ERROR(manager_->BeforeReplay(stream_, bucket, {step.requests(), step.tokens()}));
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream_, bucket));
    PRISTINE_RETURN_IF_ERROR(prefill_->Run(stream_, bucket, tensors));
    return ReadBack();
  }
  absl::Status Capture() { return runner_->CaptureAll(stream_); }
  absl::Status Replay(const Extent& bucket, const PrefillCase& step) {
    PRISTINE_RETURN_IF_ERROR(runner_->Replay(stream_, bucket, {step.requests(), step.tokens()}));
    return ReadBack();
  }
  // Copies the outputs to `raw_out`, `out` and `lse`. Blocks.
  absl::Status ReadBack() {
    PRISTINE_ASSIGN_OR_RETURN(raw_out, Download(stream_, out_.As<std::byte>()));
    PRISTINE_ASSIGN_OR_RETURN(lse, Download(stream_, lse_.As<float>()));
    out = ToFloats(raw_out, shape_.dtype);
    return absl::OkStatus();
  }

  // "" if the last run's outputs are attention over `step`, zeros and -inf in the rest of the bucket. Looks at every
  // `stride`-th (token, head).
  std::string Check(const Extent& bucket, const PrefillCase& step, const std::function<bool(int32_t)>& there = nullptr,
                    int64_t stride = 1) const {
    const OracleRow nothing = {.out = std::vector<double>(shape_.head_dim, 0.0),
                               .lse = -std::numeric_limits<double>::infinity()};
    for (int64_t place = 0; place < int64_t{bucket.tokens} * shape_.q_heads; place += stride) {
      const int32_t token = static_cast<int32_t>(place / shape_.q_heads), head = place % shape_.q_heads;
      const OracleRow expected = token < step.tokens() ? step.Expected(token, head, there) : nothing;
      const std::string difference = Difference(expected, &out[place * shape_.head_dim], lse[place], step.Tolerance());
      if (!difference.empty()) return absl::StrCat("token ", token, ", head ", head, ": ", difference);
    }
    return "";
  }

  BufferManager& manager() { return *manager_; }
  attention::StepMetadata& metadata() { return *metadata_; }
  attention::PagedPrefill& prefill() { return *prefill_; }
  DeviceSpan<float> scales() { return scales_.As<float>(); }
  int32_t table_width() const { return table_width_; }

  attention::PrefillTensors tensors;  // of every run; a test may point it elsewhere
  std::vector<float> out, lse;        // of the last run
  std::vector<std::byte> raw_out;     // the same, as bytes

 private:
  PrefillRig(Stream& stream, const PrefillShape& shape, const Options& options)
      : stream_(stream), shape_(shape), options_(options) {}

  Stream& stream_;
  const PrefillShape shape_;
  const Options options_;
  int32_t table_width_ = 0;
  DeviceBuffer q_, k_, v_, out_, lse_, scales_, sinks_, table_;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<attention::StepMetadata> metadata_;
  std::unique_ptr<attention::PagedPrefill> prefill_;
  std::unique_ptr<GraphRunner> runner_;
};

// The variants for `shape` that `device` can run; on Host they are all one.
inline std::vector<const attention::PrefillVariant*> RunnableVariants(const Device& device, const PrefillShape& shape) {
  std::vector<const attention::PrefillVariant*> runnable;
  for (const attention::PrefillVariant& variant : attention::PrefillVariants()) {
    if (variant.dtype != shape.dtype || variant.kv_dtype != shape.kv_dtype) continue;
    if (variant.head_dim != shape.head_dim) continue;
    const int32_t only = variant.only_capability;
    if (only == 0 || only == device.compute_capability()) runnable.push_back(&variant);
  }
  return runnable;
}

template <class BackendT>
class PrefillTest : public DeviceTest<BackendT> {
 protected:
  void TearDown() override {
    if (this->stream_ != nullptr) this->stream_->Synchronize().IgnoreError();
    rig_.reset();
    DeviceTest<BackendT>::TearDown();
  }
  bool on_host() const { return this->device_->backend() == Backend::kHost; }
  std::vector<const attention::PrefillVariant*> Runnable(const PrefillShape& shape) const {
    return RunnableVariants(*this->device_, shape);
  }
  absl::Status Prepare(const PrefillCase& step, const Extent& bucket,
                       const attention::PrefillVariant* variant = nullptr) {
    rig_.reset();
    int32_t longest = 1;
    for (const int32_t length : step.lengths()) longest = std::max(longest, length);
    PRISTINE_ASSIGN_OR_RETURN(
        rig_, PrefillRig::Create(
                  *this->device_, *this->stream_, step.shape(),
                  {.buckets = {bucket}, .max_length = longest, .num_pages = step.num_pages(), .variant = variant}));
    return rig_->Load(step);
  }
  // Runs `step` with every variant, eagerly and from a graph: both are attention, and the same bytes.
  void ExpectAttention(const PrefillCase& step, const Extent& bucket, int64_t stride = 1) {
    for (const attention::PrefillVariant* const variant : Runnable(step.shape())) {
      SCOPED_TRACE(absl::StrCat(variant->kernel.name, ": ", step.shape().ToString()));
      ASSERT_OK(Prepare(step, bucket, variant));
      ASSERT_OK(rig_->Begin(bucket, step));
      ASSERT_OK(rig_->RunEagerly(bucket, step));
      ASSERT_EQ(rig_->Check(bucket, step, nullptr, stride), "");
      const std::vector<std::byte> eager = rig_->raw_out;
      ASSERT_OK(rig_->Capture());
      for (const char* const run : {"first launch", "second launch"}) {
        ASSERT_OK(rig_->Begin(bucket, step));
        ASSERT_OK(rig_->Replay(bucket, step));
        EXPECT_TRUE(rig_->raw_out == eager) << run;
      }
    }
  }
  // Without slack in the bucket.
  void ExpectAttention(const PrefillCase& step) {
    ExpectAttention(step, {step.requests(), std::max(1, step.tokens())});
  }

  std::unique_ptr<PrefillRig> rig_;
};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_ATTENTION_PREFILL_RIG_H_
