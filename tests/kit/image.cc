#include "tests/kit/image.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "absl/strings/str_cat.h"

namespace pristine::conformance {
namespace {

using attention::DType;

size_t AlignUp(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Sets all elements of `parts`.
void FillParts(Bytes& image, const Layout& layout, std::initializer_list<Layout::Name> parts, float value) {
  for (const Layout::Name name : parts) {
    Fill(layout[name].dtype, value, image.data() + layout[name].offset, layout[name].bytes);
  }
}

}  // namespace

Layout::Layout(const AttentionShape& shape) {
  const DType dtype = shape.dtype, stored = shape.stored_dtype();
  const size_t kv_row = size_t{1} * shape.kv_heads * shape.head_dim;  // elements
  const size_t q_row = SizeOf(dtype) * shape.q_len * shape.q_heads * shape.head_dim;
  const size_t new_row = SizeOf(dtype) * kv_row * shape.q_len, page = SizeOf(stored) * kv_row * shape.page_size;
  const size_t lse_row = sizeof(float) * shape.q_len * shape.q_heads;
  const size_t requests = shape.max_requests(), pages = shape.num_pages() + 1;
  parts_ = {Part{"q", 0, requests * q_row, dtype, q_row},
            {"k_new", 0, requests * new_row, dtype, new_row},
            {"v_new", 0, requests * new_row, dtype, new_row},
            {"k", 0, pages * page, stored, page},
            {"v", 0, pages * page, stored, page},
            {"out", 0, requests * q_row, dtype, q_row},
            {"lse", 0, requests * lse_row, DType::kFloat32, lse_row}};
  for (Part& part : parts_) {
    part.offset = bytes_;
    bytes_ = AlignUp(bytes_ + part.bytes) + 256;
  }
}

AttentionTensors Layout::Tensors(const AttentionShape& shape, DeviceSpan<std::byte> image) const {
  const auto part = [&](Name name) { return image.Sub(parts_[name].offset, parts_[name].bytes); };
  const auto pool = [&](Name name) { return part(name).Sub(0, parts_[name].row * shape.num_pages()); };
  const DeviceSpan<std::byte> lse = part(kLse);
  return {.q = part(kQ),
          .k_new = part(kKNew),
          .v_new = part(kVNew),
          .k = pool(kK),
          .v = pool(kV),
          .out = part(kOut),
          .lse = {reinterpret_cast<float*>(lse.address()), lse.size() / sizeof(float)}};
}

std::string Layout::StrayWrite(const AttentionShape& shape, int32_t bucket, const std::vector<std::byte>& expected,
                               const std::vector<std::byte>& after) const {
  size_t at = 0;
  // Compares [at, end), then skips `allowed` bytes.
  const auto clean = [&](size_t end, size_t allowed) {
    if (std::memcmp(expected.data() + at, after.data() + at, end - at) == 0) {
      at = end + allowed;
      return true;
    }
    const auto difference = std::mismatch(expected.begin() + at, expected.begin() + end, after.begin() + at);
    at = difference.first - expected.begin();
    return false;
  };
  const size_t rows = bucket;
  if (clean(parts_[kK].offset, parts_[kK].row) && clean(parts_[kV].offset, parts_[kV].row) &&
      clean(parts_[kOut].offset, rows * parts_[kOut].row) &&
      clean(parts_[kLse].offset, shape.lse == AttentionShape::Lse::kNone ? 0 : rows * parts_[kLse].row) &&
      clean(bytes_, 0)) {
    return "";
  }
  const Part* part = &parts_[0];
  for (const Part& candidate : parts_) {
    if (candidate.offset <= at) part = &candidate;
  }
  const size_t offset = at - part->offset;
  if (offset >= part->bytes) return absl::StrCat("byte ", offset - part->bytes, " past the end of ", part->name);
  return absl::StrCat(part->name, part == &parts_[kK] || part == &parts_[kV] ? " page " : " row ", offset / part->row,
                      ", element ", offset % part->row / part->element());
}

double StepImage::Value(What what, int32_t row, int32_t position, int32_t head, int32_t d) const {
  const uint64_t place = Mix(Mix(uint64_t{what} << 32 | static_cast<uint32_t>(row)) ^ static_cast<uint32_t>(position)) ^
                         (static_cast<uint64_t>(head) << 32 | static_cast<uint32_t>(d));
  const double uniform = static_cast<double>(Mix(step_.seed ^ place) >> 11) * 0x1p-53;
  return Round(what == kQuery ? shape_.dtype : shape_.stored_dtype(), (2 * uniform - 1) * std::sqrt(3.0));
}

void StepImage::Put(std::vector<std::byte>& image, Layout::Name part, int64_t index, double value) const {
  const Layout::Part& to = layout_[part];
  Store(to.dtype, static_cast<float>(value), image.data() + to.offset + index * to.element());
}

int64_t StepImage::Place(int32_t r, int32_t p, int32_t i) const {
  const int64_t slot = step_.Slot(shape_, r, p), page_size = shape_.page_size, dim = shape_.head_dim;
  if (shape_.layout == attention::KvLayout::kNHD) return slot * shape_.kv_heads * dim + i;
  return ((slot / page_size * shape_.kv_heads + i / dim) * page_size + slot % page_size) * dim + i % dim;
}

bool StepImage::Attended(int32_t row, int32_t kv_head, int32_t position) const {
  if (!shape_.attended) return true;
  for (int32_t length = step_.lengths[row] - shape_.q_len + 1; length <= step_.lengths[row]; ++length) {
    if (position < length && shape_.attended(length, kv_head, position)) return true;
  }
  return false;
}

std::vector<std::byte> StepImage::Build(Poison poison, bool appended) const {
  // Outputs and gaps: NaN in every dtype, or large and finite.
  std::vector<std::byte> image(layout_.bytes(), poison == Poison::kNan ? std::byte{0xff} : std::byte{0x7a});
  // Inputs have another poison than the pool: a stored padded row shows.
  FillParts(image, layout_, {Layout::kQ, Layout::kKNew, Layout::kVNew}, PoisonValue(poison));
  FillParts(image, layout_, {Layout::kK, Layout::kV}, -PoisonValue(poison));
  for (const Layout::Name part : {Layout::kK, Layout::kV}) {  // the dummy page is finite
    std::fill_n(image.begin() + layout_[part].offset, layout_[part].row, std::byte{0});
  }
  const int32_t dim = shape_.head_dim, kv_row = shape_.kv_heads * dim;
  for (int32_t r = 0; r < step_.requests(); ++r) {
    const int32_t length = step_.lengths[r], first_new = length - shape_.q_len;
    for (int32_t query = 0; query < shape_.q_len; ++query) {
      const int64_t first = (int64_t{r} * shape_.q_len + query) * shape_.q_heads * dim;
      for (int32_t i = 0; i < shape_.q_heads * dim; ++i) {
        Put(image, Layout::kQ, first + i, Value(kQuery, r, query, i / dim, i % dim));
      }
    }
    for (int32_t p = 0; p < length; ++p) {
      for (int32_t i = 0; i < kv_row; ++i) {
        const double key = Value(kKey, r, p, i / dim, i % dim), value = Value(kValue, r, p, i / dim, i % dim);
        if (p >= first_new) {
          const int64_t place = (int64_t{r} * shape_.q_len + p - first_new) * kv_row + i;
          Put(image, Layout::kKNew, place, key);
          Put(image, Layout::kVNew, place, value);
          if (shape_.appends && !appended) continue;
        }
        // What is not attended is poison, but for what the step itself stores there.
        const bool stored = p >= first_new && shape_.appends;
        if (!stored && !Attended(r, i / dim, p)) continue;
        Put(image, Layout::kK, Place(r, p, i), key);
        Put(image, Layout::kV, Place(r, p, i), value);
      }
    }
  }
  return image;
}

std::string StepImage::WrongValue(const std::vector<std::byte>& after, int32_t row, int32_t query, int32_t head) const {
  const int32_t dim = shape_.head_dim, kv_head = head / (shape_.q_heads / shape_.kv_heads);
  const double scale = shape_.scale > 0 ? shape_.scale : 1 / std::sqrt(static_cast<double>(dim));
  std::vector<double> q(dim), scores;
  for (int32_t d = 0; d < dim; ++d) q[d] = Value(kQuery, row, query, head, d);
  std::vector<int32_t> positions;
  const int32_t length = step_.lengths[row] - shape_.q_len + 1 + query;  // up to this query
  for (int32_t p = 0; p < length; ++p) {
    if (shape_.attended && !shape_.attended(length, kv_head, p)) continue;
    double score = 0;
    for (int32_t d = 0; d < dim; ++d) score += q[d] * Value(kKey, row, p, kv_head, d);
    positions.push_back(p);
    scores.push_back(score * scale);
  }
  const double top = scores.empty() ? 0 : *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  std::vector<double> expected(dim, 0);
  for (size_t i = 0; i < scores.size(); ++i) {
    const double mass = std::exp(scores[i] - top);
    sum += mass;
    for (int32_t d = 0; d < dim; ++d) expected[d] += mass * Value(kValue, row, positions[i], kv_head, d);
  }
  double error = 0, norm = 0;
  const int64_t place = (int64_t{row} * shape_.q_len + query) * shape_.q_heads + head;
  for (int32_t d = 0; d < dim; ++d) {
    if (sum > 0) expected[d] /= sum;
    const std::byte* address = after.data() + layout_[Layout::kOut].offset + (place * dim + d) * SizeOf(shape_.dtype);
    error += std::pow(Fetch(shape_.dtype, address) - expected[d], 2);
    norm += expected[d] * expected[d];
  }
  // Far above rounding, far below the weight of one position at the kit's lengths. NaN fails, too.
  const double rms = norm > 0 ? std::sqrt(error / norm) : error;
  const double tolerance = shape_.dtype == DType::kFloat32 ? 1e-4 : 1e-2;
  if (!(rms <= tolerance)) {
    return absl::StrCat("relative RMS ", rms, " over ", positions.size(), " positions, accepted ", tolerance);
  }
  if (shape_.lse == AttentionShape::Lse::kNone) return "";
  const double natural = sum > 0 ? top + std::log(sum) : -std::numeric_limits<double>::infinity();
  const double lse = shape_.lse == AttentionShape::Lse::kBase2 ? natural / std::log(2.0) : natural;
  const double actual = Fetch(DType::kFloat32, after.data() + layout_[Layout::kLse].offset + place * sizeof(float));
  if (lse == actual || std::abs(lse - actual) <= 1e-2) return "";
  return absl::StrCat("lse ", actual, ", expected ", lse);
}

}  // namespace pristine::conformance
