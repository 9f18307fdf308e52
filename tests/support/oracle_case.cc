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

namespace pristine::testing {
namespace {

using attention::BFloat16;
using attention::DType;
using attention::Float16;

constexpr double kQueryTag = 4;  // element 0 of every query; keys have 0 there, needles a large number
enum What : uint64_t { kQueryNoise, kKeyNoise, kValueNoise, kNeedleCode };

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
                      page_size, ", window ", window, ", seed ", seed);
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

double DecodeCase::Round(double value) const {
  const float narrow = static_cast<float>(value);
  if (shape_.dtype == DType::kFloat32) return narrow;
  if (shape_.dtype == DType::kFloat16) return attention::ToFloat(attention::FromFloat<Float16>(narrow));
  return attention::ToFloat(attention::FromFloat<BFloat16>(narrow));
}

double DecodeCase::Noise(uint64_t what, int32_t row, int32_t position, int32_t head, int32_t d) const {
  const uint64_t bits = Mix(Mix(Mix(shape_.seed * 8 + what) ^
                                (uint64_t{static_cast<uint32_t>(row)} << 32 | static_cast<uint32_t>(position))) ^
                            (uint64_t{static_cast<uint32_t>(head)} << 32 | static_cast<uint32_t>(d)));
  const double uniform = static_cast<double>(bits >> 11) * 0x1p-53;
  return Round((2 * uniform - 1) * std::sqrt(3.0));
}

double DecodeCase::Query(int32_t row, int32_t q_head, int32_t d) const {
  return d == 0 ? kQueryTag : Noise(kQueryNoise, row, 0, q_head, d);
}

double DecodeCase::Key(int32_t row, int32_t position, int32_t kv_head, int32_t d) const {
  if (position != needles_[row]) return d == 0 ? 0 : Noise(kKeyNoise, row, position, kv_head, d);
  if (d != 0) return 0;
  // The others have about length * e^(1/2) of the mass; the needle gets e^2 times that.
  const int32_t attended = shape_.window > 0 ? std::min(shape_.window, lengths_[row]) : lengths_[row];
  return Round((std::log(std::max(1, attended)) + 2.5) / (kQueryTag * Scale()));
}

double DecodeCase::Value(int32_t row, int32_t position, int32_t kv_head, int32_t d) const {
  if (position != needles_[row]) return Noise(kValueNoise, row, position, kv_head, d);
  const int32_t page = indices_[indptr_[row] + position / shape_.page_size];
  return Round(2 * Noise(kNeedleCode + (static_cast<uint64_t>(page) << 8), row, position, kv_head, d));
}

std::vector<std::byte> DecodeCase::Q() const {
  std::vector<float> q;
  for (int32_t r = 0; r < rows(); ++r) {
    for (int32_t h = 0; h < shape_.q_heads; ++h) {
      for (int32_t d = 0; d < shape_.head_dim; ++d) q.push_back(static_cast<float>(Query(r, h, d)));
    }
  }
  return ToBytes(q, shape_.dtype);
}

std::vector<std::byte> DecodeCase::Pool(bool values) const {
  const int64_t row = int64_t{shape_.kv_heads} * shape_.head_dim;
  std::vector<float> pool(num_pages_ * shape_.page_size * row, std::numeric_limits<float>::quiet_NaN());
  std::fill(pool.begin(), pool.begin() + shape_.page_size * row, 0.0f);
  for (int32_t r = 0; r < rows(); ++r) {
    for (int32_t p = 0; p < std::max(lengths_[r], needles_[r] + 1); ++p) {
      if (p >= lengths_[r] && p != needles_[r]) continue;
      const int64_t page = indices_[indptr_[r] + p / shape_.page_size];
      float* const slot = pool.data() + (page * shape_.page_size + p % shape_.page_size) * row;
      for (int32_t h = 0; h < shape_.kv_heads; ++h) {
        for (int32_t d = 0; d < shape_.head_dim; ++d) {
          slot[h * shape_.head_dim + d] = static_cast<float>(values ? Value(r, p, h, d) : Key(r, p, h, d));
        }
      }
    }
  }
  return ToBytes(pool, shape_.dtype);
}

OracleRow DecodeCase::Expected(int32_t row, int32_t q_head, const std::function<bool(int32_t)>& attended) const {
  const int32_t kv_head = q_head / (shape_.q_heads / shape_.kv_heads);
  std::vector<double> q, keys, values;
  for (int32_t d = 0; d < shape_.head_dim; ++d) q.push_back(Query(row, q_head, d));
  const int32_t begin = shape_.window > 0 ? std::max(0, lengths_[row] - shape_.window) : 0;
  for (int32_t p = begin; p < lengths_[row]; ++p) {
    if (attended && !attended(p)) continue;
    for (int32_t d = 0; d < shape_.head_dim; ++d) {
      keys.push_back(Key(row, p, kv_head, d));
      values.push_back(Value(row, p, kv_head, d));
    }
  }
  return OracleAttention(q, keys, values, Scale());
}

std::vector<std::byte> ToBytes(absl::Span<const float> values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * attention::SizeOf(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kFloat32) {
      std::memcpy(bytes.data() + i * 4, &values[i], 4);
    } else if (dtype == DType::kFloat16) {
      const Float16 narrow = attention::FromFloat<Float16>(values[i]);
      std::memcpy(bytes.data() + i * 2, &narrow, 2);
    } else {
      const BFloat16 narrow = attention::FromFloat<BFloat16>(values[i]);
      std::memcpy(bytes.data() + i * 2, &narrow, 2);
    }
  }
  return bytes;
}

std::vector<float> ToFloats(absl::Span<const std::byte> bytes, DType dtype) {
  std::vector<float> values(bytes.size() / attention::SizeOf(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kFloat32) {
      std::memcpy(&values[i], bytes.data() + i * 4, 4);
    } else if (dtype == DType::kFloat16) {
      Float16 narrow;
      std::memcpy(&narrow, bytes.data() + i * 2, 2);
      values[i] = attention::ToFloat(narrow);
    } else {
      BFloat16 narrow;
      std::memcpy(&narrow, bytes.data() + i * 2, 2);
      values[i] = attention::ToFloat(narrow);
    }
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
