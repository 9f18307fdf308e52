#include "pristine/conformance/state_conformance.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"
#include "tests/kit/laws.h"

namespace pristine::conformance {
namespace {

absl::Status CheckShape(const StateShape& shape) {
  const auto refuse = [](const std::string& name, int64_t value, const char* accepted) {
    return absl::InvalidArgumentError(absl::StrCat("StateShape: ", name, " is ", value, "; accepted: ", accepted));
  };
  for (const std::vector<StateShape::Tensor>* tensors : {&shape.inputs, &shape.outputs, &shape.states}) {
    for (const StateShape::Tensor& tensor : *tensors) {
      if (tensor.width < 1) return refuse(tensor.name + ".width", tensor.width, "1 or more");
    }
  }
  if (shape.states.empty()) return absl::InvalidArgumentError("StateShape: states is empty");
  if (shape.rule == nullptr) return absl::InvalidArgumentError("StateShape: rule is null");
  if (shape.tokens < 1) return refuse("tokens", shape.tokens, "1 or more");
  if (shape.steps_in_flight < 1) return refuse("steps_in_flight", shape.steps_in_flight, "1 or more");
  if (shape.buckets.empty()) return absl::InvalidArgumentError("StateShape: buckets is empty");
  for (size_t i = 0; i < shape.buckets.size(); ++i) {
    if (shape.buckets[i] <= (i == 0 ? 0 : shape.buckets[i - 1])) {
      return refuse("buckets", shape.buckets[i], "positive and ascending");
    }
  }
  return absl::OkStatus();
}

// A tensor in an image. Gaps between parts are poison, too.
struct Part {
  StateShape::Tensor tensor;
  size_t offset = 0, row = 0;  // bytes; of a row
  int32_t rows = 0;            // for a pool with the one past slots()

  size_t bytes() const { return row * static_cast<size_t>(rows); }
};

// The numbers of a step that the wrapper is told.
struct Numbers {
  uint64_t seed = 0;
  std::vector<int32_t> slots, qo_indptr;

  StateRow Row(size_t request) const { return {slots[request], qo_indptr[request + 1] - qo_indptr[request]}; }
};

class StateSubject final : public Subject {
 public:
  StateSubject(StateWrapper& wrapper, const StateShape& shape) : wrapper_(wrapper), shape_(shape) {
    for (const StateShape::Tensor& tensor : shape.inputs) inputs_.push_back(AddPart(tensor, shape.max_tokens()));
    for (const StateShape::Tensor& tensor : shape.states) states_.push_back(AddPart(tensor, shape.slots() + 1));
    for (const StateShape::Tensor& tensor : shape.outputs) outputs_.push_back(AddPart(tensor, shape.max_tokens()));
    MakeSteps();
  }

  const std::vector<int32_t>& buckets() const override { return shape_.buckets; }
  const std::vector<Step>& steps() const override { return steps_; }
  int32_t steps_in_flight() const override { return shape_.steps_in_flight; }
  size_t image_bytes() const override { return bytes_; }
  Bytes Before(size_t step, Poison poison) const override;
  // The states in their slots are results: StrayWrite does not look there.
  Bytes After(size_t step, Poison poison) const override { return Before(step, poison); }
  std::string StrayWrite(size_t step, const Bytes& expected, const Bytes& found) const override;
  std::optional<Place> Difference(size_t step, const Bytes& a, const Bytes& b) const override;
  std::optional<Place> WrongValue(size_t step, const Bytes& found) const override;

  absl::Status Prepare(Stream& stream, size_t step) override {
    return wrapper_.Prepare(stream, steps_[step].bucket, {numbers_[step].slots, numbers_[step].qo_indptr});
  }
  absl::Status WarmUp(Stream& stream, int32_t bucket, DeviceSpan<std::byte> image) override {
    return wrapper_.WarmUp(stream, bucket, Tensors(image));
  }
  absl::Status Run(Stream& stream, int32_t bucket, DeviceSpan<std::byte> image) override {
    return wrapper_.Run(stream, bucket, Tensors(image));
  }
  std::vector<BoundArray> BoundArrays() override { return wrapper_.BoundArrays(); }

 private:
  Part AddPart(const StateShape::Tensor& tensor, int32_t rows) {
    Part part = {tensor, bytes_, attention::SizeOf(tensor.dtype) * static_cast<size_t>(tensor.width), rows};
    bytes_ = (bytes_ + part.bytes() + 255) / 256 * 256 + 256;
    return part;
  }
  void MakeSteps();
  StateTensors Tensors(DeviceSpan<std::byte> image) const;
  double StartValue(const Part& part, const Numbers& numbers, int64_t row, int32_t element) const;
  // Rows [first, first + count) of `part`, decoded.
  static std::vector<double> Decode(const Part& part, const Bytes& image, int64_t first, int64_t count);
  // What the rule gives: of each request, its states and its rows of the outputs.
  std::pair<Values, Values> Expected(const Numbers& numbers, size_t request) const;
  // The first rows of `part` in [first, first + count) that differ.
  static std::optional<Place> RowDifference(const Part& part, const Bytes& a, const Bytes& b, int64_t first,
                                            int64_t count);
  std::optional<Place> WrongRows(const Part& part, const Bytes& found, int64_t first,
                                 const std::vector<double>& expected, const char* what) const;

  StateWrapper& wrapper_;
  const StateShape& shape_;
  std::vector<Part> inputs_, states_, outputs_;
  size_t bytes_ = 0;
  std::vector<Step> steps_;
  std::vector<Numbers> numbers_;  // parallel to steps_
};

void StateSubject::MakeSteps() {
  const int32_t shortest = shape_.ragged ? 0 : shape_.tokens;
  std::vector<std::vector<std::vector<int32_t>>> sets;
  for (size_t b = 0; b < shape_.buckets.size(); ++b) {
    const int32_t bucket = shape_.buckets[b], below = b == 0 ? 0 : shape_.buckets[b - 1];
    uint64_t seed = Mix(shape_.seed + b);
    std::vector<std::vector<int32_t>>& of_bucket = sets.emplace_back();
    of_bucket.emplace_back(bucket, shape_.tokens);
    of_bucket.emplace_back();  // all rows padded
    of_bucket.emplace_back(1, shape_.tokens);
    of_bucket.emplace_back(bucket, shortest);
    const int32_t random = 1 + static_cast<int32_t>(Mix(++seed) % static_cast<uint64_t>(bucket));
    for (const int32_t count : {bucket, below + 1, std::max(1, bucket - 1), random, bucket}) {
      std::vector<int32_t>& lengths = of_bucket.emplace_back();
      for (int32_t r = 0; r < count; ++r) {
        lengths.push_back(shortest + static_cast<int32_t>(Mix(++seed) % (shape_.tokens - shortest + 1)));
      }
    }
  }
  for (size_t i = 0; i < sets[0].size(); ++i) {
    for (size_t b = 0; b < sets.size(); ++b) {
      Numbers numbers = {Mix(shape_.seed ^ Mix(steps_.size())), {}, {0}};
      std::vector<int32_t> slots(shape_.slots() - 2);  // neither slot 0 nor the last
      std::iota(slots.begin(), slots.end(), 1);
      for (size_t s = slots.size(); s > 1; --s) std::swap(slots[s - 1], slots[Mix(numbers.seed + s) % s]);
      for (size_t r = 0; r < sets[b][i].size(); ++r) {
        numbers.slots.push_back(slots[r]);
        numbers.qo_indptr.push_back(numbers.qo_indptr.back() + sets[b][i][r]);
      }
      steps_.push_back({shape_.buckets[b], sets[b][i]});
      numbers_.push_back(std::move(numbers));
    }
  }
}

StateTensors StateSubject::Tensors(DeviceSpan<std::byte> image) const {
  StateTensors tensors;
  for (const Part& part : inputs_) tensors.inputs.push_back(image.Sub(part.offset, part.bytes()));
  for (const Part& part : states_) tensors.states.push_back(image.Sub(part.offset, part.bytes() - part.row));
  for (const Part& part : outputs_) tensors.outputs.push_back(image.Sub(part.offset, part.bytes()));
  return tensors;
}

double StateSubject::StartValue(const Part& part, const Numbers& numbers, int64_t row, int32_t element) const {
  const uint64_t place = static_cast<uint64_t>(row) << 32 | static_cast<uint32_t>(element);
  const double uniform = static_cast<double>(Mix(Mix(numbers.seed ^ part.offset) ^ place) >> 11) * 0x1p-53;
  return Round(part.tensor.dtype, part.tensor.low + (part.tensor.high - part.tensor.low) * uniform);
}

Bytes StateSubject::Before(size_t step, Poison poison) const {
  const Numbers& numbers = numbers_[step];
  Bytes image(bytes_, poison == Poison::kNan ? std::byte{0xff} : std::byte{0x7a});
  const auto put = [&](const Part& part, int64_t row) {
    const size_t element = attention::SizeOf(part.tensor.dtype);
    for (int32_t i = 0; i < part.tensor.width; ++i) {
      Store(part.tensor.dtype, static_cast<float>(StartValue(part, numbers, row, i)),
            image.data() + part.offset + static_cast<size_t>(row) * part.row + static_cast<size_t>(i) * element);
    }
  };
  for (const std::vector<Part>* parts : {&inputs_, &states_, &outputs_}) {
    for (const Part& part : *parts) {
      // Pools have another poison than inputs: a stored padded row shows.
      Fill(part.tensor.dtype, parts == &states_ ? -PoisonValue(poison) : PoisonValue(poison),
           image.data() + part.offset, part.bytes());
    }
  }
  for (const Part& part : inputs_) {
    for (int32_t token = 0; token < numbers.qo_indptr.back(); ++token) put(part, token);
  }
  for (const Part& part : states_) {
    for (const int32_t slot : numbers.slots) put(part, slot);
  }
  return image;
}

std::string StateSubject::StrayWrite(size_t step, const Bytes& expected, const Bytes& found) const {
  std::vector<std::pair<size_t, size_t>> allowed;  // begin, end
  for (const Part& part : states_) {
    std::vector<int32_t> slots = numbers_[step].slots;
    std::sort(slots.begin(), slots.end());
    for (const int32_t slot : slots) {
      const size_t begin = part.offset + static_cast<size_t>(slot) * part.row;
      allowed.emplace_back(begin, begin + part.row);
    }
  }
  for (const Part& part : outputs_) {
    const size_t rows = static_cast<size_t>(steps_[step].bucket) * static_cast<size_t>(shape_.tokens);
    allowed.emplace_back(part.offset, part.offset + rows * part.row);
  }
  allowed.emplace_back(bytes_, bytes_);
  size_t at = 0;
  for (const auto& [begin, end] : allowed) {
    if (std::memcmp(expected.data() + at, found.data() + at, begin - at) != 0) {
      at = static_cast<size_t>(std::mismatch(expected.begin() + static_cast<std::ptrdiff_t>(at), expected.end(),
                                             found.begin() + static_cast<std::ptrdiff_t>(at))
                                   .first -
                               expected.begin());
      for (const std::vector<Part>* parts : {&outputs_, &states_, &inputs_}) {
        for (const Part& part : *parts) {
          if (at < part.offset || at >= part.offset + part.bytes()) continue;
          return absl::StrCat(part.tensor.name, parts == &states_ ? " slot " : " row ", (at - part.offset) / part.row,
                              ", element ", (at - part.offset) % part.row / attention::SizeOf(part.tensor.dtype));
        }
      }
      return absl::StrCat("byte ", at, ", between two tensors");
    }
    at = end;
  }
  return "";
}

std::optional<Subject::Place> StateSubject::RowDifference(const Part& part, const Bytes& a, const Bytes& b,
                                                          int64_t first, int64_t count) {
  const size_t begin = part.offset + static_cast<size_t>(first) * part.row;
  const size_t bytes = static_cast<size_t>(count) * part.row;
  if (std::memcmp(a.data() + begin, b.data() + begin, bytes) == 0) return std::nullopt;
  const size_t element = attention::SizeOf(part.tensor.dtype);
  size_t i = 0;
  while (std::memcmp(a.data() + begin + i, b.data() + begin + i, element) == 0) i += element;
  return Place{0, 0,
               absl::StrCat(part.tensor.name, "[", static_cast<size_t>(first) + i / part.row, "][",
                            i % part.row / element, "] ", Fetch(part.tensor.dtype, a.data() + begin + i), " and ",
                            Fetch(part.tensor.dtype, b.data() + begin + i))};
}

std::optional<Subject::Place> StateSubject::Difference(size_t step, const Bytes& a, const Bytes& b) const {
  const Numbers& numbers = numbers_[step];
  for (size_t r = 0; r < numbers.slots.size(); ++r) {
    std::optional<Place> difference;
    for (const Part& part : outputs_) {
      if (!difference) difference = RowDifference(part, a, b, numbers.qo_indptr[r], numbers.Row(r).tokens);
    }
    for (const Part& part : states_) {
      if (!difference) difference = RowDifference(part, a, b, numbers.slots[r], 1);
    }
    if (difference) difference->row = static_cast<int32_t>(r);
    if (difference) return difference;
  }
  return std::nullopt;
}

std::vector<double> StateSubject::Decode(const Part& part, const Bytes& image, int64_t first, int64_t count) {
  std::vector<double> values(static_cast<size_t>(count) * static_cast<size_t>(part.tensor.width));
  const size_t element = attention::SizeOf(part.tensor.dtype);
  const std::byte* const from = image.data() + part.offset + static_cast<size_t>(first) * part.row;
  for (size_t i = 0; i < values.size(); ++i) values[i] = Fetch(part.tensor.dtype, from + i * element);
  return values;
}

std::pair<Values, Values> StateSubject::Expected(const Numbers& numbers, size_t request) const {
  const StateRow row = numbers.Row(request);
  Values inputs, states, outputs;
  const auto start = [&](const Part& part, int64_t first, int64_t count) {
    std::vector<double> values;
    for (int64_t i = 0; i < count * part.tensor.width; ++i) {
      values.push_back(
          StartValue(part, numbers, first + i / part.tensor.width, static_cast<int32_t>(i % part.tensor.width)));
    }
    return values;
  };
  for (const Part& part : inputs_) inputs.push_back(start(part, numbers.qo_indptr[request], row.tokens));
  for (const Part& part : states_) states.push_back(start(part, row.slot, 1));
  for (const Part& part : outputs_) outputs.emplace_back(static_cast<size_t>(row.tokens) * part.tensor.width);
  shape_.rule(row, inputs, states, outputs);
  return {std::move(states), std::move(outputs)};
}

// Of a whole block of rows: NaN fails, too.
std::optional<Subject::Place> StateSubject::WrongRows(const Part& part, const Bytes& found, int64_t first,
                                                      const std::vector<double>& expected, const char* what) const {
  const std::vector<double> values =
      Decode(part, found, first, static_cast<int64_t>(expected.size()) / part.tensor.width);
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (values[i] - expected[i]) * (values[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double rms = norm > 0 ? std::sqrt(error / norm) : error;
  if (rms <= shape_.tolerance) return std::nullopt;
  return Place{
      0, 0,
      absl::StrCat(part.tensor.name, " ", what, " ", first, ": relative RMS ", rms, ", accepted ", shape_.tolerance)};
}

std::optional<Subject::Place> StateSubject::WrongValue(size_t step, const Bytes& found) const {
  const Numbers& numbers = numbers_[step];
  for (size_t r = 0; r < numbers.slots.size(); ++r) {
    const auto [states, outputs] = Expected(numbers, r);
    std::optional<Place> wrong;
    for (size_t i = 0; i < outputs_.size() && !wrong; ++i) {
      wrong = WrongRows(outputs_[i], found, numbers.qo_indptr[r], outputs[i], "from row");
    }
    for (size_t i = 0; i < states_.size() && !wrong; ++i) {
      wrong = WrongRows(states_[i], found, numbers.slots[r], states[i], "in slot");
    }
    if (wrong) wrong->row = static_cast<int32_t>(r);
    if (wrong) return wrong;
  }
  for (const Part& part : outputs_) {
    for (int64_t token = numbers.qo_indptr.back(); token < int64_t{steps_[step].bucket} * shape_.tokens; ++token) {
      for (const double value : Decode(part, found, token, 1)) {
        if (value == 0) continue;
        return Place{static_cast<int32_t>(numbers.slots.size()), 0,
                     absl::StrCat("padded row ", token, " of ", part.tensor.name, " holds ", value, ", expected 0")};
      }
    }
  }
  return std::nullopt;
}

}  // namespace

absl::StatusOr<Report> CheckState(Stream& stream, StateWrapper& wrapper, const StateShape& shape) {
  PRISTINE_RETURN_IF_ERROR(CheckShape(shape));
  StateSubject subject(wrapper, shape);
  return CheckLaws(stream, subject);
}

::testing::AssertionResult Conforms(Stream& stream, StateWrapper& wrapper, const StateShape& shape) {
  const absl::StatusOr<Report> report = CheckState(stream, wrapper, shape);
  if (!report.ok()) return ::testing::AssertionFailure() << report.status();
  if (!report->findings.empty()) return ::testing::AssertionFailure() << report->ToString();
  return ::testing::AssertionSuccess() << report->ToString();
}

}  // namespace pristine::conformance
