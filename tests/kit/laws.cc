#include "tests/kit/laws.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/kernels/bfloat16.h"
#include "attention/kernels/float16.h"
#include "attention/kernels/float8.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::conformance {
namespace {

using attention::DType;

class Checker {
 public:
  Checker(Stream& stream, Subject& subject)
      : stream_(stream), subject_(subject), buckets_(subject.buckets()), steps_(subject.steps()) {}

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
  // Captures the bucket of step `index`, whose memory must stay as that step left it.
  absl::Status CaptureBucket(size_t index);
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
  absl::StatusOr<Bytes> Download(const DeviceBuffer& from) {
    Bytes bytes(subject_.image_bytes());
    PRISTINE_RETURN_IF_ERROR(stream_.CopyToHost({bytes.data(), bytes.size()}, AsBytes(from.As<std::byte>())));
    PRISTINE_RETURN_IF_ERROR(stream_.Synchronize());
    return bytes;
  }
  void Add(Finding::Kind kind, size_t index, const std::string& detail, int32_t row = -1, int32_t head = -1);
  void Die(size_t index, const absl::Status& why) {
    dead_ = true;
    Add(Finding::Kind::kRefused, index, absl::StrCat("the stream failed, nothing more was run: ", why.ToString()));
  }
  Image& ImageOf(size_t step, Poison poison) { return images_[step][static_cast<size_t>(poison)]; }

  Stream& stream_;
  Subject& subject_;
  const std::vector<int32_t>& buckets_;
  const std::vector<Subject::Step>& steps_;
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
  const size_t bytes = subject_.image_bytes();
  PRISTINE_ASSIGN_OR_RETURN(live_, device.Allocate(bytes, "conformance.live"));
  for (int32_t i = 0; i < subject_.steps_in_flight(); ++i) {
    PRISTINE_ASSIGN_OR_RETURN(snapshots_.emplace_back(), device.Allocate(bytes, "conformance.snapshot"));
  }
  for (size_t step = 0; step < steps_.size(); ++step) {
    images_.emplace_back();
    for (const Poison poison : kPoisons) {
      Image& to = images_.back()[static_cast<size_t>(poison)];
      const Bytes start = subject_.Before(step, poison);
      PRISTINE_ASSIGN_OR_RETURN(to.device, Upload(start.data(), start.size(), "conformance.image"));
      to.expected = subject_.After(step, poison);
    }
  }
  for (const BoundArray& array : subject_.BoundArrays()) {
    if (array.live.empty()) return absl::InvalidArgumentError("a BoundArray is empty");
    PoisonedArray& to = arrays_.emplace_back(PoisonedArray{array.live, {}});
    for (const Poison poison : kPoisons) {
      const std::vector<int32_t> values(array.live.size(), PoisonOf(poison, array, buckets_.back()));
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
  const std::vector<size_t> worst(order.begin(), order.begin() + buckets_.size());
  for (const Poison poison : kPoisons) {
    Walk(order, poison, How::kEager, 1);
    Walk(reversed, poison, How::kEagerAgain, 1);
  }
  ComparePoisons();
  CaptureAll(0);
  for (const Poison poison : kPoisons) Walk(worst, poison, How::kFirstLaunch, 1);
  for (const Poison poison : kPoisons) {
    Walk(order, poison, How::kReplay, 1);
    Walk(reversed, poison, How::kReplay, subject_.steps_in_flight());
  }
  // Again, after steps without requests: the graphs must not be narrower for it.
  CaptureAll(buckets_.size());
  for (const Poison poison : kPoisons) Walk(order, poison, How::kReplay, 1);
}

// Largest first, a warm-up before each, as engines do: what one bucket's warm-up leaves behind must not hurt the next.
// The warm-ups run the steps from `warm_up` on, one for each bucket.
void Checker::CaptureAll(size_t warm_up) {
  graphs_.clear();
  for (size_t b = buckets_.size(); b-- > 0 && !dead_;) {
    Walk({warm_up + b}, Poison::kNan, How::kEagerAgain, 1);
    if (dead_) return;
    if (const absl::Status failed = CaptureBucket(warm_up + b); !failed.ok()) Die(warm_up + b, failed);
  }
}

absl::Status Checker::CaptureBucket(size_t index) {
  const int32_t bucket = steps_[index].bucket;
  const DeviceSpan<std::byte> live = live_.As<std::byte>();
  const auto refuse = [&](const char* what, const absl::Status& status) {
    Add(Finding::Kind::kRefused, index, absl::StrCat(what, status.ToString()));
  };
  PRISTINE_ASSIGN_OR_RETURN(const Bytes before, Download(live_));
  if (const absl::Status warm = subject_.WarmUp(stream_, bucket, live); !warm.ok()) refuse("warm-up: ", warm);
  const absl::StatusOr<std::unique_ptr<Graph>> graph =
      Capture(stream_, [&](Stream& stream) { return subject_.Run(stream, bucket, live); });
  if (graph.ok()) {
    absl::StatusOr<std::unique_ptr<GraphExec>> exec = (*graph)->Instantiate();
    if (!exec.ok()) {
      refuse("instantiation: ", exec.status());
    } else {
      graphs_[bucket] = *std::move(exec);
    }
  } else {
    refuse("capture of Run: ", graph.status());
  }
  PRISTINE_ASSIGN_OR_RETURN(const Bytes after, Download(live_));
  const std::string stray = subject_.StrayWrite(buckets_.size() + index % buckets_.size(), before, after);
  if (!stray.empty()) Add(Finding::Kind::kCaptureWrites, index, stray);
  return absl::OkStatus();
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
        Add(Finding::Kind::kRefused, index, run.ToString());
      }
    }
    absl::Status device = stream_.Synchronize();  // from here on an error means that the stream has failed
    for (size_t i = 0; i < submitted.size() && device.ok(); ++i) {
      const absl::StatusOr<Bytes> after = Download(snapshots_[i]);
      device = after.status();
      if (!device.ok()) break;
      Judge(submitted[i], poison, how, before, *after);
      const Subject::Step& step = steps_[submitted[i]];
      before = absl::StrCat("right after bucket ", step.bucket, " with ", step.lengths.size(), " requests",
                            in_flight > 1 ? ", steps in flight together" : "");
    }
    if (!device.ok()) Die(submitted.empty() ? order.back() : submitted.front(), device);
  }
}

absl::Status Checker::Submit(size_t index, Poison poison, How how, DeviceBuffer& snapshot) {
  const DeviceSpan<std::byte> live = live_.As<std::byte>();
  const int32_t bucket = steps_[index].bucket;
  PRISTINE_RETURN_IF_ERROR(stream_.Copy(live, AsBytes(ImageOf(index, poison).device.As<std::byte>())));
  for (const PoisonedArray& array : arrays_) {
    PRISTINE_RETURN_IF_ERROR(
        stream_.Copy(AsWritableBytes(array.live), AsBytes(array.poison[static_cast<size_t>(poison)].As<std::byte>())));
  }
  PRISTINE_RETURN_IF_ERROR(subject_.Prepare(stream_, index));
  if (how == How::kEager || how == How::kEagerAgain) {
    PRISTINE_RETURN_IF_ERROR(subject_.Run(stream_, bucket, live));
  } else {
    PRISTINE_RETURN_IF_ERROR(graphs_.at(bucket)->Launch(stream_));
  }
  return stream_.Copy(snapshot.As<std::byte>(), AsBytes(live));
}

void Checker::Judge(size_t index, Poison poison, How how, const std::string& before, const Bytes& after) {
  Image& image = ImageOf(index, poison);
  const std::string stray = subject_.StrayWrite(index, image.expected, after);
  if (!stray.empty()) Add(Finding::Kind::kWritesOutside, index, stray);
  if (how == How::kEager) {
    image.eager = after;
    return;
  }
  const std::optional<Subject::Place> difference = subject_.Difference(index, image.eager, after);
  if (!difference) return;
  const Finding::Kind kind = how == How::kEagerAgain    ? Finding::Kind::kNotRepeatable
                             : how == How::kFirstLaunch ? Finding::Kind::kCapturedDiffers
                                                        : Finding::Kind::kReplayDiffers;
  Add(kind, index, absl::StrCat(difference->what, ", ", before), difference->row, difference->head);
}

// Of the first eager runs: the same results under both poisons, and the right ones.
void Checker::ComparePoisons() {
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Bytes &nan = ImageOf(i, Poison::kNan).eager, &maximal = ImageOf(i, Poison::kMaximal).eager;
    if (nan.empty() || maximal.empty()) continue;
    if (const auto difference = subject_.Difference(i, nan, maximal)) {
      Add(Finding::Kind::kReadsPadding, i,
          absl::StrCat(difference->what, " under poison ", ToString(Poison::kNan), " and ", ToString(Poison::kMaximal)),
          difference->row, difference->head);
      continue;  // that the values are wrong as well says nothing new
    }
    if (const auto wrong = subject_.WrongValue(i, nan)) {
      Add(Finding::Kind::kWrongValue, i, wrong->what, wrong->row, wrong->head);
    }
  }
}

void Checker::Add(Finding::Kind kind, size_t index, const std::string& detail, int32_t row, int32_t head) {
  const Subject::Step& step = steps_[index];
  for (const Finding& known : report_.findings) {
    if (known.kind == kind && known.bucket == step.bucket) {
      ++report_.more;
      return;
    }
  }
  report_.findings.push_back(
      {.kind = kind, .bucket = step.bucket, .lengths = step.lengths, .row = row, .head = head, .detail = detail});
}

template <class T>
T Read(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
template <class T>
void Write(T value, std::byte* to) {
  std::memcpy(to, &value, sizeof(value));
}

}  // namespace

const char* ToString(Poison poison) { return poison == Poison::kNan ? "NaN" : "maximal"; }

float PoisonValue(Poison poison) {
  constexpr float kLarge = 1e4f;  // finite in every dtype (448 in float8), and far above all live values
  return poison == Poison::kNan ? std::numeric_limits<float>::quiet_NaN() : kLarge;
}

int32_t PoisonOf(Poison poison, const BoundArray& array, int32_t max_requests) {
  const bool nan = poison == Poison::kNan;
  switch (array.kind) {
    case Kind::kIndptr:
      return nan ? 0 : array.limit - array.limit / max_requests;  // where the last of the longest rows begins
    case Kind::kLength:
      return nan ? 1 : array.limit;
    case Kind::kPageTable:
    case Kind::kSlot:
      return nan ? array.limit : array.limit - 1;
    case Kind::kPosition:
    case Kind::kMask:
    case Kind::kOpaque:
      break;
  }
  return nan ? 0 : array.limit - 1;
}

uint64_t Mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

double Fetch(DType dtype, const std::byte* from) {
  switch (dtype) {
    case DType::kFloat32:
      return Read<float>(from);
    case DType::kBFloat16:
      return ToFloat(Read<attention::BFloat16>(from));
    case DType::kFloat16:
      return ToFloat(Read<attention::Float16>(from));
    case DType::kFloat8E4M3:
      return ToFloat(Read<attention::Float8E4M3>(from));
  }
  return std::numeric_limits<double>::quiet_NaN();
}

double Round(DType dtype, double value) {
  std::byte stored[sizeof(float)];
  Store(dtype, static_cast<float>(value), stored);
  return Fetch(dtype, stored);
}

void Store(DType dtype, float value, std::byte* to) {
  switch (dtype) {
    case DType::kFloat32:
      return Write(value, to);
    case DType::kBFloat16:
      return Write(attention::FromFloat<attention::BFloat16>(value), to);
    case DType::kFloat16:
      return Write(attention::FromFloat<attention::Float16>(value), to);
    case DType::kFloat8E4M3:
      return Write(attention::FromFloat<attention::Float8E4M3>(value), to);
  }
}

void Fill(DType dtype, float value, std::byte* to, size_t bytes) {
  if (bytes == 0) return;
  Store(dtype, value, to);
  for (size_t done = attention::SizeOf(dtype); done < bytes; done *= 2) {
    std::memcpy(to + done, to, std::min(done, bytes - done));
  }
}

absl::StatusOr<Report> CheckLaws(Stream& stream, Subject& subject) { return Checker(stream, subject).Check(); }

}  // namespace pristine::conformance
