#include "tests/support/oracle_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "attention/kernels/bfloat16.h"
#include "attention/kernels/float16.h"
#include "attention/kernels/float8.h"

namespace pristine::testing {
namespace {

using attention::BFloat16;
using attention::DType;
using attention::Float16;
using attention::Float8E4M3;

constexpr double kQueryTag = 4;  // element 0 of every query; keys have 0 there, needles a large number
enum What : uint64_t { kQueryNoise, kKeyNoise, kValueNoise, kSinkNoise, kNeedleCode };

double Round(double value, DType dtype) {
  const float narrow = static_cast<float>(value);
  switch (dtype) {
    case DType::kFloat32:
      return narrow;
    case DType::kFloat16:
      return attention::ToFloat(attention::FromFloat<Float16>(narrow));
    case DType::kFloat8E4M3:
      return attention::ToFloat(attention::FromFloat<Float8E4M3>(narrow));
    case DType::kBFloat16:
      break;
  }
  return attention::ToFloat(attention::FromFloat<BFloat16>(narrow));
}

uint64_t Mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

int32_t PagesOf(int32_t length, int32_t page_size) { return (length + page_size - 1) / page_size; }

}  // namespace

std::string DecodeShape::ToString() const {
  return absl::StrCat(attention::ToString(dtype), " ", q_heads, "/", kv_heads, " heads of ", head_dim, ", page size ",
                      page_size, ", window ", window, ", seed ", seed, ", q_len ", q_len, ", KV ",
                      attention::ToString(KvDType()), " ", attention::ToString(layout), ", soft cap ", soft_cap,
                      sinks ? ", sinks" : "", ", KV scales ", k_scale, " and ", v_scale);
}

DecodeCase::DecodeCase(const DecodeShape& shape, const std::vector<int32_t>& lengths,
                       const std::vector<int32_t>& needles)
    : shape_(shape), lengths_(lengths), needles_(needles), indptr_(lengths.size() + 1, 0) {
  for (size_t r = 0; r < lengths.size(); ++r) indptr_[r + 1] = indptr_[r] + PagesOf(lengths[r], shape.page_size);
  constexpr int32_t kUnusedPages = 3;
  num_pages_ = 1 + indptr_.back() + kUnusedPages;
  std::vector<int32_t> pages(num_pages_ - 1);
  std::iota(pages.begin(), pages.end(), 1);
  std::shuffle(pages.begin(), pages.end(), std::mt19937_64(shape.seed));
  indices_.assign(pages.begin(), pages.begin() + indptr_.back());
}

double DecodeCase::Scale() const { return 1 / std::sqrt(static_cast<double>(shape_.head_dim)); }

double DecodeCase::Noise(uint64_t what, int32_t row, int32_t position, int32_t head, int32_t d) const {
  const uint64_t bits = Mix(Mix(Mix(shape_.seed * 8 + what) ^
                                (uint64_t{static_cast<uint32_t>(row)} << 32 | static_cast<uint32_t>(position))) ^
                            (uint64_t{static_cast<uint32_t>(head)} << 32 | static_cast<uint32_t>(d)));
  const double uniform = static_cast<double>(bits >> 11) * 0x1p-53;
  return (2 * uniform - 1) * std::sqrt(3.0);
}

double DecodeCase::Query(int32_t row, int32_t query, int32_t q_head, int32_t d) const {
  return Round(d == 0 ? kQueryTag : Noise(kQueryNoise, row, query, q_head, d), shape_.dtype);
}

double DecodeCase::Key(int32_t row, int32_t position, int32_t kv_head, int32_t d) const {
  const DType dtype = shape_.KvDType();
  if (position != needles_[row]) return d == 0 ? 0 : Round(Noise(kKeyNoise, row, position, kv_head, d), dtype);
  if (d != 0) return 0;
  // The others have about length * e^(1/2) of the mass; the needle gets e^2 times that.
  const int32_t attended = shape_.window > 0 ? std::min(shape_.window, lengths_[row]) : lengths_[row];
  return Round((std::log(std::max(1, attended)) + 2.5) / (kQueryTag * Scale() * shape_.k_scale), dtype);
}

double DecodeCase::Value(int32_t row, int32_t position, int32_t kv_head, int32_t d) const {
  const DType dtype = shape_.KvDType();
  if (position != needles_[row]) return Round(Noise(kValueNoise, row, position, kv_head, d), dtype);
  const int32_t page = indices_[indptr_[row] + position / shape_.page_size];
  return Round(2 * Noise(kNeedleCode + (static_cast<uint64_t>(page) << 8), row, position, kv_head, d), dtype);
}

std::vector<std::byte> DecodeCase::Q() const {
  std::vector<float> q;
  for (int32_t r = 0; r < rows(); ++r) {
    for (int32_t i = 0; i < shape_.q_len; ++i) {
      for (int32_t h = 0; h < shape_.q_heads; ++h) {
        for (int32_t d = 0; d < shape_.head_dim; ++d) q.push_back(static_cast<float>(Query(r, i, h, d)));
      }
    }
  }
  return ToBytes(q, shape_.dtype);
}

std::vector<float> DecodeCase::Sinks() const {
  std::vector<float> sinks;
  for (int32_t h = 0; shape_.sinks && h < shape_.q_heads; ++h) {
    sinks.push_back(static_cast<float>(2 * Noise(kSinkNoise, 0, 0, h, 0)));
  }
  return sinks;
}

std::vector<std::byte> DecodeCase::Pool(bool values) const {
  const int32_t page_size = shape_.page_size, heads = shape_.kv_heads, head_dim = shape_.head_dim;
  const bool tokens_first = shape_.layout == attention::KvLayout::kNHD;
  const int64_t page_elements = int64_t{page_size} * heads * head_dim;
  std::vector<float> pool(num_pages_ * page_elements, std::numeric_limits<float>::quiet_NaN());
  std::fill(pool.begin(), pool.begin() + page_elements, 0.0f);
  for (int32_t r = 0; r < rows(); ++r) {
    for (int32_t p = 0; p < std::max(lengths_[r], needles_[r] + 1); ++p) {
      if (p >= lengths_[r] && p != needles_[r]) continue;
      float* const page = pool.data() + indices_[indptr_[r] + p / page_size] * page_elements;
      const int32_t in_page = p % page_size;
      for (int32_t h = 0; h < heads; ++h) {
        float* const slot = page + (tokens_first ? in_page * heads + h : h * page_size + in_page) * int64_t{head_dim};
        for (int32_t d = 0; d < head_dim; ++d) {
          slot[d] = static_cast<float>(values ? Value(r, p, h, d) : Key(r, p, h, d));
        }
      }
    }
  }
  return ToBytes(pool, shape_.KvDType());
}

const DecodeCase::HeadOfRow& DecodeCase::Head(int32_t row, int32_t kv_head) const {
  if (head_.row == row && head_.kv_head == kv_head) return head_;
  head_ = {.row = row, .kv_head = kv_head, .keys = {}, .values = {}};
  for (int32_t p = 0; p < lengths_[row]; ++p) {
    for (int32_t d = 0; d < shape_.head_dim; ++d) {
      head_.keys.push_back(Key(row, p, kv_head, d));
      head_.values.push_back(shape_.v_scale * Value(row, p, kv_head, d));
    }
  }
  return head_;
}

OracleRow DecodeCase::Expected(int32_t row, int32_t q_head, const std::function<bool(int32_t)>& attended,
                               int32_t query) const {
  const HeadOfRow& head = Head(row, q_head / (shape_.q_heads / shape_.kv_heads));
  std::vector<double> q;
  for (int32_t d = 0; d < shape_.head_dim; ++d) q.push_back(Query(row, query, q_head, d));
  OracleScores scores = {.scale = Scale() * shape_.k_scale, .soft_cap = shape_.soft_cap};
  if (shape_.sinks) scores.sink = Sinks()[q_head];
  const size_t dim = shape_.head_dim;
  const int32_t end = std::max(0, lengths_[row] - shape_.q_len + query + 1);
  const int32_t begin = shape_.window > 0 && end > shape_.window ? end - shape_.window : 0;
  if (!attended) {
    return OracleAttention(q, absl::MakeConstSpan(head.keys).subspan(begin * dim, (end - begin) * dim),
                           absl::MakeConstSpan(head.values).subspan(begin * dim, (end - begin) * dim), scores);
  }
  std::vector<double> keys, values;
  for (int32_t p = begin; p < end; ++p) {
    if (!attended(p)) continue;
    keys.insert(keys.end(), head.keys.begin() + p * dim, head.keys.begin() + (p + 1) * dim);
    values.insert(values.end(), head.values.begin() + p * dim, head.values.begin() + (p + 1) * dim);
  }
  return OracleAttention(q, keys, values, scores);
}

namespace {

template <class T>
void Narrow(absl::Span<const float> values, std::byte* to) {
  for (size_t i = 0; i < values.size(); ++i) {
    const T narrow = attention::FromFloat<T>(values[i]);
    std::memcpy(to + i * sizeof(T), &narrow, sizeof(T));
  }
}
template <class T>
void Widen(absl::Span<const std::byte> bytes, std::vector<float>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    T narrow;
    std::memcpy(&narrow, bytes.data() + i * sizeof(T), sizeof(T));
    values[i] = attention::ToFloat(narrow);
  }
}

}  // namespace

std::vector<std::byte> ToBytes(absl::Span<const float> values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * attention::SizeOf(dtype));
  switch (dtype) {
    case DType::kFloat32:
      Narrow<float>(values, bytes.data());
      break;
    case DType::kBFloat16:
      Narrow<BFloat16>(values, bytes.data());
      break;
    case DType::kFloat16:
      Narrow<Float16>(values, bytes.data());
      break;
    case DType::kFloat8E4M3:
      Narrow<Float8E4M3>(values, bytes.data());
      break;
  }
  return bytes;
}

std::vector<float> ToFloats(absl::Span<const std::byte> bytes, DType dtype) {
  std::vector<float> values(bytes.size() / attention::SizeOf(dtype));
  switch (dtype) {
    case DType::kFloat32:
      Widen<float>(bytes, values);
      break;
    case DType::kBFloat16:
      Widen<BFloat16>(bytes, values);
      break;
    case DType::kFloat16:
      Widen<Float16>(bytes, values);
      break;
    case DType::kFloat8E4M3:
      Widen<Float8E4M3>(bytes, values);
      break;
  }
  return values;
}

std::vector<int32_t> NeedlePositions(const DecodeShape& shape, int32_t length, int32_t split) {
  const int32_t page = shape.page_size;
  const int32_t last_page = (length - 1) / page * page;
  const int32_t visible = shape.window > 0 ? std::max(0, length - shape.window) : 0;
  std::vector<int32_t> positions = {0,         length - 1, page - 1, page,        last_page - 1,       last_page,
                                    split - 1, split,      visible,  visible - 1, visible + split - 1, visible + split,
                                    length};
  const int32_t stored = PagesOf(length, page) * page;
  std::erase_if(positions, [stored](int32_t p) { return p < 0 || p >= stored; });
  std::sort(positions.begin(), positions.end());
  positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
  return positions;
}

}  // namespace pristine::testing
