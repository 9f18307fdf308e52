#include "pristine/conformance/attention_conformance.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/status.h"
#include "tests/kit/image.h"
#include "tests/kit/step.h"

namespace pristine::conformance {
namespace {

using Bytes = std::vector<std::byte>;

absl::Status CheckShape(const AttentionShape& shape) {
  const auto refuse = [](const char* name, int64_t value, const char* accepted) {
    return absl::InvalidArgumentError(absl::StrCat("AttentionShape: ", name, " is ", value, "; accepted: ", accepted));
  };
  if (shape.head_dim < 1) return refuse("head_dim", shape.head_dim, "1 or more");
  if (shape.kv_heads < 1) return refuse("kv_heads", shape.kv_heads, "1 or more");
  if (shape.q_heads < 1 || shape.q_heads % shape.kv_heads != 0) {
    return refuse("q_heads", shape.q_heads, "a multiple of kv_heads");
  }
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

class Checker {
 public:
  Checker(Stream& stream, AttentionWrapper& wrapper, const AttentionShape& shape)
      : stream_(stream), wrapper_(wrapper), shape_(shape), layout_(shape), steps_(MakeSteps(shape)) {}

  absl::StatusOr<Report> Check() {
    PRISTINE_RETURN_IF_ERROR(SetUp());
    RunAll();
    // Nothing of ours may be freed while the device still uses it.
    const absl::Status idle = stream_.Synchronize();
    if (!idle.ok() && !dead_) return idle;
    report_.steps = static_cast<int32_t>(steps_.size());
    return std::move(report_);
  }

 private:
  // What one (step, poison) starts from, on the device and, as it must be afterwards, on the host.
  struct Image {
    DeviceBuffer device;
    Bytes expected;
    Bytes eager;  // after the first eager run; empty: it was refused
  };
  struct PoisonedArray {
    DeviceSpan<int32_t> live;
    std::array<DeviceBuffer, 2> poison;
  };
  enum class How { kEager, kEagerAgain, kFirstLaunch, kReplay };

  absl::Status SetUp();
  void RunAll();
  void CaptureAll(size_t warm_up);
  // Runs `order` (indices of steps_) under `poison`, up to `in_flight` steps before the device is waited for.
  void Walk(const std::vector<size_t>& order, Poison poison, How how, int32_t in_flight);
  absl::Status Submit(size_t index, Poison poison, How how, DeviceBuffer& snapshot);
  void Judge(size_t index, Poison poison, How how, const std::string& before, const Bytes& after);
  void ComparePoisons();

  absl::StatusOr<DeviceBuffer> Upload(const void* values, size_t bytes, const char* name) {
    PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer buffer, stream_.device().Allocate(bytes, name));
    PRISTINE_RETURN_IF_ERROR(
        stream_.CopyFromHost(buffer.As<std::byte>(), {static_cast<const std::byte*>(values), bytes}));
    PRISTINE_RETURN_IF_ERROR(stream_.Synchronize());
    return buffer;
  }
  // The first live (row, head) whose out or lse differ between two images of a step.
  std::optional<std::pair<int32_t, int32_t>> Difference(const KitStep& step, const Bytes& a, const Bytes& b) const;
  std::string Values(const Bytes& a, const Bytes& b, int32_t row, int32_t head) const;
  void Add(Finding::Kind kind, const KitStep& step, const std::string& detail, int32_t row = -1, int32_t head = -1);
  Image& ImageOf(size_t step, Poison poison) { return images_[step][static_cast<size_t>(poison)]; }

  Stream& stream_;
  AttentionWrapper& wrapper_;
  const AttentionShape& shape_;
  const Layout layout_;
  const std::vector<KitStep> steps_;
  DeviceBuffer live_;                         // the one image that wrapper and graphs see
  std::vector<DeviceBuffer> snapshots_;       // of live_ after each step in flight
  std::vector<std::array<Image, 2>> images_;  // parallel to steps_
  std::vector<PoisonedArray> arrays_;
  std::map<int32_t, std::unique_ptr<GraphExec>> graphs_;  // by bucket; those that could be captured
  bool dead_ = false;                                     // the stream failed: nothing more can run
  Report report_;
};

absl::Status Checker::SetUp() {
  Device& device = stream_.device();
  PRISTINE_ASSIGN_OR_RETURN(live_, device.Allocate(layout_.bytes(), "conformance.live"));
  for (int32_t i = 0; i < shape_.steps_in_flight; ++i) {
    PRISTINE_ASSIGN_OR_RETURN(snapshots_.emplace_back(), device.Allocate(layout_.bytes(), "conformance.snapshot"));
  }
  for (const KitStep& step : steps_) {
    const StepImage image(shape_, layout_, step);
    images_.emplace_back();
    for (const Poison poison : kPoisons) {
      Image& to = images_.back()[static_cast<size_t>(poison)];
      const Bytes start = image.Build(poison, false);
      PRISTINE_ASSIGN_OR_RETURN(to.device, Upload(start.data(), start.size(), "conformance.image"));
      to.expected = shape_.appends ? image.Build(poison, true) : start;
    }
  }
  for (const BoundArray& array : wrapper_.BoundArrays()) {
    if (array.live.empty()) return absl::InvalidArgumentError("a BoundArray is empty");
    PoisonedArray& to = arrays_.emplace_back(PoisonedArray{array.live, {}});
    for (const Poison poison : kPoisons) {
      const std::vector<int32_t> values(array.live.size(), PoisonOf(poison, array, shape_.max_requests()));
      PRISTINE_ASSIGN_OR_RETURN(to.poison[static_cast<size_t>(poison)],
                                Upload(values.data(), values.size() * sizeof(int32_t), "conformance.poison"));
    }
  }
  return absl::OkStatus();
}

void Checker::RunAll() {
  std::vector<size_t> order(steps_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const std::vector<size_t> reversed(order.rbegin(), order.rend());
  const std::vector<size_t> worst(order.begin(), order.begin() + shape_.buckets.size());
  for (const Poison poison : kPoisons) {
    Walk(order, poison, How::kEager, 1);
    Walk(reversed, poison, How::kEagerAgain, 1);
  }
  ComparePoisons();
  CaptureAll(0);
  for (const Poison poison : kPoisons) Walk(worst, poison, How::kFirstLaunch, 1);
  for (const Poison poison : kPoisons) {
    Walk(order, poison, How::kReplay, 1);
    Walk(reversed, poison, How::kReplay, shape_.steps_in_flight);
  }
  // Again, after steps without requests: the graphs must not be narrower for it.
  CaptureAll(shape_.buckets.size());
  for (const Poison poison : kPoisons) Walk(order, poison, How::kReplay, 1);
}

// Largest first, a warm-up before each, as engines do: what one bucket's warm-up leaves behind must not hurt the next.
// The warm-ups run the steps from `warm_up` on, one for each bucket.
void Checker::CaptureAll(size_t warm_up) {
  graphs_.clear();
  for (size_t b = shape_.buckets.size(); b-- > 0 && !dead_;) {
    const size_t index = warm_up + b;
    Walk({index}, Poison::kNan, How::kEagerAgain, 1);
    if (dead_) return;
    const int32_t bucket = shape_.buckets[b];
    const absl::StatusOr<std::unique_ptr<Graph>> graph = Capture(stream_, [&](Stream& stream) {
      return wrapper_.Run(stream, bucket, layout_.Tensors(shape_, live_.As<std::byte>()));
    });
    if (!graph.ok()) {
      Add(Finding::Kind::kRefused, steps_[index], absl::StrCat("capture of Run: ", graph.status().ToString()));
      continue;
    }
    absl::StatusOr<std::unique_ptr<GraphExec>> exec = (*graph)->Instantiate();
    if (!exec.ok()) {
      Add(Finding::Kind::kRefused, steps_[index], absl::StrCat("instantiation: ", exec.status().ToString()));
      continue;
    }
    graphs_[bucket] = *std::move(exec);
  }
}

void Checker::Walk(const std::vector<size_t>& order, Poison poison, How how, int32_t in_flight) {
  const bool launches = how == How::kFirstLaunch || how == How::kReplay;
  std::string before = "first of its walk";
  size_t next = 0;
  while (next < order.size() && !dead_) {
    std::vector<size_t> submitted;
    for (; next < order.size() && submitted.size() < static_cast<size_t>(in_flight); ++next) {
      const size_t index = order[next];
      // The first eager run that was refused was reported; there is nothing to compare with.
      if (how != How::kEager && ImageOf(index, poison).eager.empty()) continue;
      if (launches && graphs_.count(steps_[index].bucket) == 0) continue;
      const absl::Status run = Submit(index, poison, how, snapshots_[submitted.size()]);
      if (run.ok()) {
        submitted.push_back(index);
        ++report_.runs;
      } else {
        Add(Finding::Kind::kRefused, steps_[index], run.ToString());
      }
    }
    absl::Status device = stream_.Synchronize();  // from here on an error means that the stream has failed
    for (size_t i = 0; i < submitted.size() && device.ok(); ++i) {
      Bytes after(layout_.bytes());
      device = stream_.CopyToHost({after.data(), after.size()}, AsBytes(snapshots_[i].As<std::byte>()));
      if (device.ok()) device = stream_.Synchronize();
      if (!device.ok()) break;
      Judge(submitted[i], poison, how, before, after);
      before =
          absl::StrCat("right after bucket ", steps_[submitted[i]].bucket, " with ", steps_[submitted[i]].requests(),
                       " requests", in_flight > 1 ? ", steps in flight together" : "");
    }
    if (!device.ok()) {
      dead_ = true;
      Add(Finding::Kind::kRefused, steps_[submitted.empty() ? order.back() : submitted.front()],
          absl::StrCat("the stream failed, nothing more was run: ", device.ToString()));
    }
  }
}

absl::Status Checker::Submit(size_t index, Poison poison, How how, DeviceBuffer& snapshot) {
  const KitStep& step = steps_[index];
  const DeviceSpan<std::byte> live = live_.As<std::byte>();
  PRISTINE_RETURN_IF_ERROR(stream_.Copy(live, AsBytes(ImageOf(index, poison).device.As<std::byte>())));
  for (const PoisonedArray& array : arrays_) {
    PRISTINE_RETURN_IF_ERROR(
        stream_.Copy(AsWritableBytes(array.live), AsBytes(array.poison[static_cast<size_t>(poison)].As<std::byte>())));
  }
  PRISTINE_RETURN_IF_ERROR(wrapper_.Prepare(stream_, step.bucket, step.values()));
  if (how == How::kEager || how == How::kEagerAgain) {
    PRISTINE_RETURN_IF_ERROR(wrapper_.Run(stream_, step.bucket, layout_.Tensors(shape_, live)));
  } else {
    PRISTINE_RETURN_IF_ERROR(graphs_.at(step.bucket)->Launch(stream_));
  }
  return stream_.Copy(snapshot.As<std::byte>(), AsBytes(live));
}

void Checker::Judge(size_t index, Poison poison, How how, const std::string& before, const Bytes& after) {
  const KitStep& step = steps_[index];
  Image& image = ImageOf(index, poison);
  const std::string stray = layout_.StrayWrite(shape_, step.bucket, image.expected, after);
  if (!stray.empty()) Add(Finding::Kind::kWritesOutside, step, stray);
  if (how == How::kEager) {
    image.eager = after;
    return;
  }
  const auto difference = Difference(step, image.eager, after);
  if (!difference) return;
  const Finding::Kind kind = how == How::kEagerAgain    ? Finding::Kind::kNotRepeatable
                             : how == How::kFirstLaunch ? Finding::Kind::kCapturedDiffers
                                                        : Finding::Kind::kReplayDiffers;
  const auto [row, head] = *difference;
  Add(kind, step, absl::StrCat(Values(image.eager, after, row, head), ", ", before), row, head);
}

// Of the first eager runs: the same live rows under both poisons, and attention.
void Checker::ComparePoisons() {
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Bytes &nan = ImageOf(i, Poison::kNan).eager, &maximal = ImageOf(i, Poison::kMaximal).eager;
    if (nan.empty() || maximal.empty()) continue;
    if (const auto difference = Difference(steps_[i], nan, maximal)) {
      const auto [row, head] = *difference;
      Add(Finding::Kind::kReadsPadding, steps_[i],
          absl::StrCat(Values(nan, maximal, row, head), " under poison ", ToString(Poison::kNan), " and ",
                       ToString(Poison::kMaximal)),
          row, head);
      continue;  // that the values are wrong as well says nothing new
    }
    const StepImage image(shape_, layout_, steps_[i]);
    for (int32_t at = 0; at < steps_[i].requests() * shape_.q_heads; ++at) {
      const int32_t row = at / shape_.q_heads, head = at % shape_.q_heads;
      const std::string wrong = image.WrongValue(nan, row, head);
      if (wrong.empty()) continue;
      Add(Finding::Kind::kWrongValue, steps_[i], wrong, row, head);
      break;
    }
  }
}

std::optional<std::pair<int32_t, int32_t>> Checker::Difference(const KitStep& step, const Bytes& a,
                                                               const Bytes& b) const {
  for (int32_t row = 0; row < step.requests(); ++row) {
    for (int32_t head = 0; head < shape_.q_heads; ++head) {
      for (const Layout::Name name : {Layout::kOut, Layout::kLse}) {
        if (name == Layout::kLse && shape_.lse == AttentionShape::Lse::kNone) continue;
        const Layout::Part& part = layout_[name];
        const size_t bytes = part.row / shape_.q_heads, offset = part.offset + row * part.row + head * bytes;
        if (std::memcmp(a.data() + offset, b.data() + offset, bytes) != 0) return std::pair(row, head);
      }
    }
  }
  return std::nullopt;
}

// "out[3] 0.5 and nan": the first element in which a head's outputs differ, else its lse.
std::string Checker::Values(const Bytes& a, const Bytes& b, int32_t row, int32_t head) const {
  const Layout::Part &out = layout_[Layout::kOut], &lse = layout_[Layout::kLse];
  for (int32_t d = 0; d < shape_.head_dim; ++d) {
    const size_t offset = out.offset + row * out.row + (head * shape_.head_dim + d) * out.element;
    if (std::memcmp(a.data() + offset, b.data() + offset, out.element) == 0) continue;
    return absl::StrCat("out[", d, "] ", Fetch(shape_.dtype, a.data() + offset), " and ",
                        Fetch(shape_.dtype, b.data() + offset));
  }
  const size_t offset = lse.offset + row * lse.row + head * lse.element;
  return absl::StrCat("lse ", Fetch(attention::DType::kFloat32, a.data() + offset), " and ",
                      Fetch(attention::DType::kFloat32, b.data() + offset));
}

void Checker::Add(Finding::Kind kind, const KitStep& step, const std::string& detail, int32_t row, int32_t head) {
  for (const Finding& known : report_.findings) {
    if (known.kind == kind && known.bucket == step.bucket) {
      ++report_.more;
      return;
    }
  }
  report_.findings.push_back(
      {.kind = kind, .bucket = step.bucket, .lengths = step.lengths, .row = row, .head = head, .detail = detail});
}

}  // namespace

absl::StatusOr<Report> CheckAttention(Stream& stream, AttentionWrapper& wrapper, const AttentionShape& shape) {
  PRISTINE_RETURN_IF_ERROR(CheckShape(shape));
  return Checker(stream, wrapper, shape).Check();
}

}  // namespace pristine::conformance
