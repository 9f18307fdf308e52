#include "pristine/conformance/attention_conformance.h"

#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"
#include "tests/kit/image.h"
#include "tests/kit/laws.h"
#include "tests/kit/step.h"

namespace pristine::conformance {
namespace {

absl::Status CheckShape(const AttentionShape& shape) {
  const auto refuse = [](const char* name, int64_t value, const char* accepted) {
    return absl::InvalidArgumentError(absl::StrCat("AttentionShape: ", name, " is ", value, "; accepted: ", accepted));
  };
  if (shape.dtype == attention::DType::kFloat8E4M3) {
    return absl::InvalidArgumentError("AttentionShape: dtype is float8_e4m3; accepted: float32, bfloat16, float16");
  }
  if (shape.stored_dtype() != shape.dtype && shape.stored_dtype() != attention::DType::kFloat8E4M3) {
    return absl::InvalidArgumentError(absl::StrCat("AttentionShape: kv_dtype is ", ToString(shape.stored_dtype()),
                                                   "; accepted: dtype, which is ", ToString(shape.dtype),
                                                   ", or float8_e4m3"));
  }
  if (shape.head_dim < 1) return refuse("head_dim", shape.head_dim, "1 or more");
  if (shape.kv_heads < 1) return refuse("kv_heads", shape.kv_heads, "1 or more");
  if (shape.q_heads < 1 || shape.q_heads % shape.kv_heads != 0) {
    return refuse("q_heads", shape.q_heads, "a multiple of kv_heads");
  }
  if (shape.q_len < 1) return refuse("q_len", shape.q_len, "1 or more");
  if (shape.page_size < 1) return refuse("page_size", shape.page_size, "1 or more");
  if (shape.min_length < 0) return refuse("min_length", shape.min_length, "0 or more");
  if (shape.max_length < 2 || shape.max_length < shape.min_length) {
    return refuse("max_length", shape.max_length, "2 or more, and not less than min_length");
  }
  if (shape.steps_in_flight < 1) return refuse("steps_in_flight", shape.steps_in_flight, "1 or more");
  if (shape.buckets.empty()) return absl::InvalidArgumentError("AttentionShape: buckets is empty");
  for (size_t i = 0; i < shape.buckets.size(); ++i) {
    if (shape.buckets[i] <= (i == 0 ? 0 : shape.buckets[i - 1])) {
      return refuse("buckets", shape.buckets[i], "positive and ascending");
    }
  }
  return absl::OkStatus();
}

class AttentionSubject final : public Subject {
 public:
  AttentionSubject(AttentionWrapper& wrapper, const AttentionShape& shape)
      : wrapper_(wrapper), shape_(shape), layout_(shape), kit_steps_(MakeSteps(shape)) {
    for (const KitStep& step : kit_steps_) steps_.push_back({step.bucket, step.lengths});
  }

  const std::vector<int32_t>& buckets() const override { return shape_.buckets; }
  const std::vector<Step>& steps() const override { return steps_; }
  int32_t steps_in_flight() const override { return shape_.steps_in_flight; }
  size_t image_bytes() const override { return layout_.bytes(); }
  Bytes Before(size_t step, Poison poison) const override { return ImageOf(step).Build(poison, false); }
  Bytes After(size_t step, Poison poison) const override { return ImageOf(step).Build(poison, shape_.appends); }
  std::string StrayWrite(size_t step, const Bytes& expected, const Bytes& found) const override {
    return layout_.StrayWrite(shape_, steps_[step].bucket, expected, found);
  }
  std::optional<Place> Difference(size_t step, const Bytes& a, const Bytes& b) const override;
  std::optional<Place> WrongValue(size_t step, const Bytes& found) const override;

  absl::Status Prepare(Stream& stream, size_t step) override {
    return wrapper_.Prepare(stream, steps_[step].bucket, kit_steps_[step].values());
  }
  absl::Status WarmUp(Stream&, int32_t, DeviceSpan<std::byte>) override { return absl::OkStatus(); }
  absl::Status Run(Stream& stream, int32_t bucket, DeviceSpan<std::byte> image) override {
    return wrapper_.Run(stream, bucket, layout_.Tensors(shape_, image));
  }
  std::vector<BoundArray> BoundArrays() override { return wrapper_.BoundArrays(); }

 private:
  StepImage ImageOf(size_t step) const { return StepImage(shape_, layout_, kit_steps_[step]); }
  // `place`: query * q_heads + head.
  Place PlaceOf(int32_t row, int32_t place, const std::string& what) const {
    const int32_t query = place / shape_.q_heads, head = place % shape_.q_heads;
    return {row, head, shape_.q_len == 1 ? what : absl::StrCat("query ", query, ": ", what)};
  }
  std::string Values(const Bytes& a, const Bytes& b, int32_t row, int32_t place) const;

  AttentionWrapper& wrapper_;
  const AttentionShape& shape_;
  const Layout layout_;
  const std::vector<KitStep> kit_steps_;
  std::vector<Step> steps_;
};

// The first live (row, query, head) whose out or lse differ.
std::optional<Subject::Place> AttentionSubject::Difference(size_t step, const Bytes& a, const Bytes& b) const {
  for (int32_t row = 0; row < kit_steps_[step].requests(); ++row) {
    for (int32_t place = 0; place < shape_.q_len * shape_.q_heads; ++place) {
      for (const Layout::Name name : {Layout::kOut, Layout::kLse}) {
        if (name == Layout::kLse && shape_.lse == AttentionShape::Lse::kNone) continue;
        const Layout::Part& part = layout_[name];
        const size_t bytes = part.row / (shape_.q_len * shape_.q_heads);
        const size_t offset = part.offset + row * part.row + place * bytes;
        if (std::memcmp(a.data() + offset, b.data() + offset, bytes) != 0) {
          return PlaceOf(row, place, Values(a, b, row, place));
        }
      }
    }
  }
  return std::nullopt;
}

std::optional<Subject::Place> AttentionSubject::WrongValue(size_t step, const Bytes& found) const {
  const StepImage image = ImageOf(step);
  for (int32_t row = 0; row < kit_steps_[step].requests(); ++row) {
    for (int32_t place = 0; place < shape_.q_len * shape_.q_heads; ++place) {
      const std::string wrong = image.WrongValue(found, row, place / shape_.q_heads, place % shape_.q_heads);
      if (!wrong.empty()) return PlaceOf(row, place, wrong);
    }
  }
  return std::nullopt;
}

// "out[3] 0.5 and nan": the first element in which a head's outputs differ, else its lse.
std::string AttentionSubject::Values(const Bytes& a, const Bytes& b, int32_t row, int32_t place) const {
  const Layout::Part &out = layout_[Layout::kOut], &lse = layout_[Layout::kLse];
  for (int32_t d = 0; d < shape_.head_dim; ++d) {
    const size_t offset = out.offset + row * out.row + (place * shape_.head_dim + d) * out.element();
    if (std::memcmp(a.data() + offset, b.data() + offset, out.element()) == 0) continue;
    return absl::StrCat("out[", d, "] ", Fetch(shape_.dtype, a.data() + offset), " and ",
                        Fetch(shape_.dtype, b.data() + offset));
  }
  const size_t offset = lse.offset + row * lse.row + place * lse.element();
  return absl::StrCat("lse ", Fetch(attention::DType::kFloat32, a.data() + offset), " and ",
                      Fetch(attention::DType::kFloat32, b.data() + offset));
}

}  // namespace

absl::StatusOr<Report> CheckAttention(Stream& stream, AttentionWrapper& wrapper, const AttentionShape& shape) {
  PRISTINE_RETURN_IF_ERROR(CheckShape(shape));
  AttentionSubject subject(wrapper, shape);
  return CheckLaws(stream, subject);
}

::testing::AssertionResult Conforms(Stream& stream, AttentionWrapper& wrapper, const AttentionShape& shape) {
  const absl::StatusOr<Report> report = CheckAttention(stream, wrapper, shape);
  if (!report.ok()) return ::testing::AssertionFailure() << report.status();
  if (!report->findings.empty()) return ::testing::AssertionFailure() << report->ToString();
  return ::testing::AssertionSuccess() << report->ToString();
}

}  // namespace pristine::conformance
