// Partial attention states on a device and on the host, and what merging them must give, straight from the definition.
#ifndef PRISTINE_TESTS_ATTENTION_MERGE_RIG_H_
#define PRISTINE_TESTS_ATTENTION_MERGE_RIG_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "attention/merge_variants.h"
#include "pristine/attention/merge_states.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/oracle_case.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {

// Few rows, which take the grid over tokens and heads, and so many that a block takes whole tokens where heads allow
// it.
constexpr int32_t kEitherForm[] = {6, attention::kMergeFewRows + 2};

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// v: [rows, heads, head_dim], representable in the dtype; lse: [rows, heads].
struct HostStates {
  attention::MergeShape shape;
  int32_t rows = 0;
  std::vector<float> v, lse;

  float* v_of(int32_t row, int32_t head) { return v.data() + (int64_t{row} * shape.heads + head) * shape.head_dim; }
  const float* v_of(int32_t row, int32_t head) const { return const_cast<HostStates*>(this)->v_of(row, head); }
  float& lse_of(int32_t row, int32_t head) { return lse[static_cast<size_t>(row) * shape.heads + head]; }
  float lse_of(int32_t row, int32_t head) const { return const_cast<HostStates*>(this)->lse_of(row, head); }
  // Makes (row, head) empty, with NaN where its values were.
  void Empty(int32_t row, int32_t head) {
    lse_of(row, head) = -kInf;
    std::fill_n(v_of(row, head), shape.head_dim, kNan);
  }
};

// Values of mean 0 and variance 1; an lse in [-spread, spread]; a share of empty states whose values are NaN.
inline HostStates RandomStates(const attention::MergeShape& shape, int32_t rows, uint64_t seed, double empty = 0,
                               float spread = 6) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<float> value(-1.732f, 1.732f), lse(-spread, spread);
  std::uniform_real_distribution<double> share(0, 1);
  HostStates states = {.shape = shape, .rows = rows, .v = {}, .lse = {}};
  const size_t heads = static_cast<size_t>(rows) * shape.heads;
  states.v.resize(heads * shape.head_dim);
  states.lse.resize(heads);
  for (float& x : states.v) x = value(random);
  states.v = ToFloats(ToBytes(states.v, shape.dtype), shape.dtype);
  for (float& x : states.lse) x = lse(random);
  for (int32_t row = 0; row < rows; ++row) {
    for (int32_t head = 0; head < shape.heads; ++head) {
      if (share(random) < empty) states.Empty(row, head);
    }
  }
  return states;
}

// The definition, in double and through natural logarithms: which states of which rows make up each merged row.
struct Source {
  const HostStates* states;
  int32_t row;
};
inline OracleRow Merged(const std::vector<Source>& sources, int32_t head, int32_t head_dim) {
  OracleRow merged = {.out = std::vector<double>(head_dim, 0.0), .lse = -std::numeric_limits<double>::infinity()};
  double top = -std::numeric_limits<double>::infinity(), mass = 0;
  for (const Source& s : sources) {
    const double lse = s.states->lse_of(s.row, head);
    if (!std::isinf(lse)) top = std::fmax(top, lse);
  }
  for (const Source& s : sources) {
    const double lse = s.states->lse_of(s.row, head);
    if (std::isinf(lse)) continue;  // -inf: empty; +inf: taken as empty
    const double weight = std::exp((lse - top) * std::log(2.0));
    mass += weight;
    for (int32_t d = 0; d < head_dim; ++d) merged.out[d] += weight * s.states->v_of(s.row, head)[d];
  }
  if (mass == 0) return merged;
  for (double& value : merged.out) value /= mass;
  merged.lse = top + std::log(mass) / std::log(2.0);
  return merged;
}

// "" if (row, head) of `actual` is `expected`: relative RMS 1e-5, 2e-3 or 8e-3 by dtype, lse to 1e-5 (relative above
// 1); zeros and -inf exactly.
inline std::string Difference(const OracleRow& expected, const HostStates& actual, int32_t row, int32_t head) {
  const attention::DType dtype = actual.shape.dtype;
  const double tolerance = dtype == attention::DType::kFloat32   ? 1e-5
                           : dtype == attention::DType::kFloat16 ? 2e-3
                                                                 : 8e-3;
  const float* const v = actual.v_of(row, head);
  const float lse = actual.lse_of(row, head);
  const std::string where = absl::StrCat("row ", row, ", head ", head, ": ");
  double error = 0, norm = 0;
  for (int32_t d = 0; d < actual.shape.head_dim; ++d) {
    error += (v[d] - expected.out[d]) * (v[d] - expected.out[d]);
    norm += expected.out[d] * expected.out[d];
  }
  // Written so that NaN does not pass.
  if (!(std::sqrt(error) <= tolerance * std::sqrt(norm))) {
    return absl::StrCat(where, "relative RMS ", std::sqrt(error / norm), " > ", tolerance);
  }
  const bool same = std::isinf(expected.lse)
                        ? lse == -kInf
                        : std::abs(lse - expected.lse) <= 1e-5 * std::fmax(1.0, std::abs(expected.lse));
  return same ? "" : absl::StrCat(where, "LSE ", lse, ", expected ", expected.lse);
}

template <class BackendT>
class MergeTest : public DeviceTest<BackendT> {
 protected:
  using MergeShape = attention::MergeShape;

  void SetUp() override {
    DeviceTest<BackendT>::SetUp();
    if (this->IsSkipped() || this->HasFatalFailure()) return;
    ASSERT_OK_AND_ASSIGN(manager_, BufferManager::Create(*this->device_));
    ASSERT_OK(manager_->Seal());
  }
  void TearDown() override {
    if (this->stream_ != nullptr) this->stream_->Synchronize().IgnoreError();
    memory_.clear();
    manager_.reset();
    DeviceTest<BackendT>::TearDown();
  }

  ReportRing reports(const Extent& bucket = {4, 4}) { return manager_->report_ring(bucket); }
  std::vector<Violation> Poll() {
    EXPECT_OK(this->stream_->Synchronize());
    std::vector<Violation> violations(64);
    violations.resize(manager_->Poll(absl::MakeSpan(violations)));
    return violations;
  }

  DeviceSpan<std::byte> Allocate(size_t bytes) {
    absl::StatusOr<DeviceBuffer> buffer = this->device_->Allocate(std::max<size_t>(bytes, 16), "states");
    EXPECT_OK(buffer);
    if (!buffer.ok()) return {};
    memory_.push_back(*std::move(buffer));
    return memory_.back().template As<std::byte>().Sub(0, bytes);
  }
  template <class T>
  DeviceSpan<T> Array(const std::vector<T>& values) {
    const DeviceSpan<std::byte> bytes = Allocate(values.size() * sizeof(T));
    const DeviceSpan<T> span(reinterpret_cast<T*>(bytes.address()), values.size());
    if (!values.empty()) {
      EXPECT_OK(Upload(*this->stream_, span, values));
    }
    return span;
  }
  static DeviceSpan<attention::LseBase2> AsLse(DeviceSpan<float> span) {
    return {reinterpret_cast<attention::LseBase2*>(span.address()), span.size()};
  }
  static DeviceSpan<float> AsFloat(DeviceSpan<attention::LseBase2> span) {
    return {reinterpret_cast<float*>(span.address()), span.size()};
  }

  // Dense copies on the device; outputs start as NaN.
  attention::MutableStates Put(const HostStates& states) {
    return {.v = Array(ToBytes(states.v, states.shape.dtype)), .lse = AsLse(Array(states.lse))};
  }
  attention::MutableStates Output(const MergeShape& shape, int32_t rows) {
    HostStates states = {.shape = shape, .rows = rows, .v = {}, .lse = {}};
    states.lse.assign(static_cast<size_t>(rows) * shape.heads, kNan);
    states.v.assign(states.lse.size() * shape.head_dim, kNan);
    return Put(states);
  }
  static attention::States In(const attention::MutableStates& s) {
    return {.v = s.v,
            .lse = s.lse,
            .v_stride = s.v_stride,
            .lse_stride = s.lse_stride,
            .lse_head_stride = s.lse_head_stride};
  }
  HostStates Get(const MergeShape& shape, int32_t rows, const attention::MutableStates& states) {
    HostStates result = {.shape = shape, .rows = rows, .v = {}, .lse = {}};
    absl::StatusOr<std::vector<std::byte>> v = Download(*this->stream_, states.v);
    absl::StatusOr<std::vector<float>> lse = Download(*this->stream_, AsFloat(states.lse));
    EXPECT_OK(v);
    EXPECT_OK(lse);
    if (!v.ok() || !lse.ok()) return result;
    result.v = ToFloats(*v, shape.dtype);
    result.lse = *std::move(lse);
    return result;
  }

  // Merges a and b with what the library chooses; the result on the host.
  HostStates Merge(const HostStates& a, const HostStates& b) {
    const attention::MutableStates out = Output(a.shape, a.rows);
    EXPECT_OK(MergeState(*this->stream_, a.shape, a.rows, In(Put(a)), In(Put(b)), out, reports()));
    return Get(a.shape, a.rows, out);
  }
  // "" if `merged` is a + b in every row and head.
  static std::string CheckPair(const HostStates& a, const HostStates& b, const HostStates& merged) {
    for (int32_t row = 0; row < a.rows; ++row) {
      for (int32_t head = 0; head < a.shape.heads; ++head) {
        const std::string difference =
            Difference(Merged({{&a, row}, {&b, row}}, head, a.shape.head_dim), merged, row, head);
        if (!difference.empty()) return difference;
      }
    }
    return "";
  }
  // "" if row r of `merged` is the sum of the states [indptr[r], indptr[r + 1]), for all its rows.
  static std::string CheckSets(const HostStates& states, const std::vector<int32_t>& indptr, const HostStates& merged) {
    for (int32_t row = 0; row + 1 < static_cast<int32_t>(indptr.size()); ++row) {
      std::vector<Source> sources;
      for (int32_t i = indptr[row]; i < indptr[row + 1]; ++i) sources.push_back({&states, i});
      for (int32_t head = 0; head < states.shape.heads; ++head) {
        const std::string difference = Difference(Merged(sources, head, states.shape.head_dim), merged, row, head);
        if (!difference.empty()) return difference;
      }
    }
    return "";
  }

  std::unique_ptr<BufferManager> manager_;
  std::vector<DeviceBuffer> memory_;
};

inline std::string Name(const attention::MergeShape& shape) {
  return absl::StrCat(attention::ToString(shape.dtype), ", ", shape.heads, " heads of ", shape.head_dim);
}

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_ATTENTION_MERGE_RIG_H_
