// What the prologue adds to a replay, in CPU and GPU time.
//
// A graph of 300 dependent kernels of 2 us each, and 64 buffers: 8 refilled each step, 24 restored (2 KB each), 32
// constants. The same body without any hook is the bare graph. Both are launched alternately on one stream, at most 4
// launches in flight, so that both see the same clocks and temperature, and the GPU never waits for the host. GPU time
// is what lies between an event before and an event after the launch; whatever the manager queues counts. Then each
// part of the prologue by itself, in smaller managers.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"
#include "tests/benchmarks/allocation_count.h"
#include "tests/benchmarks/spin.h"

namespace pristine::benchmarks {

int SpinHost(const SpinParams& params) {
  *params.total += *params.input;
  return 0;
}

namespace {

constexpr int kKernels = 300;
constexpr double kKernelMicroseconds = 2.0;
constexpr int kInFlight = 4;
constexpr int kWarmup = 50;
constexpr Extent kBucket = {64, 64};
constexpr Extent kStep = {48, 48};
constexpr int32_t kLength = 3;  // every request's, and so what each kernel adds
constexpr int32_t kPages = 4096;
constexpr int32_t kPagesPerRow = 16;

struct Options {
  int device = 0;
  int samples = 2000;
  bool json = false;
};

struct Samples {
  std::vector<double> cpu_bare, cpu_step, cpu_replay, cpu_added;  // us; a step is BeginStep and the refills
  std::vector<double> gpu_bare, gpu_replay, gpu_added;            // us
  int64_t allocations = 0;
};

struct Summary {
  double min, median, p99;
};
Summary Summarize(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {values.front(), values[values.size() / 2], values[values.size() * 99 / 100]};
}

absl::Status Cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

class Timer {
 public:
  double Microseconds() const {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// Two timed events around a launch; a ring of them bounds how many launches are in flight.
class LaunchRing {
 public:
  static absl::StatusOr<LaunchRing> Create() {
    LaunchRing ring;
    for (Launch& launch : ring.launches_) {
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventCreate(&launch.begin), "cudaEventCreate"));
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventCreate(&launch.end), "cudaEventCreate"));
    }
    return ring;
  }
  // Waits for the launch that was here before, and gives its GPU time to whom it belongs.
  absl::Status Begin(cudaStream_t stream, double* gpu_us) {
    PRISTINE_RETURN_IF_ERROR(Collect(current()));
    current().gpu_us = gpu_us;
    return Cuda(cudaEventRecord(current().begin, stream), "cudaEventRecord");
  }
  absl::Status End(cudaStream_t stream) {
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventRecord(current().end, stream), "cudaEventRecord"));
    ++next_;
    return absl::OkStatus();
  }
  absl::Status Drain() {
    for (Launch& launch : launches_) PRISTINE_RETURN_IF_ERROR(Collect(launch));
    return absl::OkStatus();
  }

 private:
  struct Launch {
    cudaEvent_t begin = nullptr;  // these live as long as the program
    cudaEvent_t end = nullptr;
    double* gpu_us = nullptr;  // null: not in flight
  };
  Launch& current() { return launches_[next_ % kInFlight]; }
  static absl::Status Collect(Launch& launch) {
    if (launch.gpu_us == nullptr) return absl::OkStatus();
    float milliseconds = 0;
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventSynchronize(launch.end), "cudaEventSynchronize"));
    PRISTINE_RETURN_IF_ERROR(
        Cuda(cudaEventElapsedTime(&milliseconds, launch.begin, launch.end), "cudaEventElapsedTime"));
    *std::exchange(launch.gpu_us, nullptr) = 1000.0 * milliseconds;
    return absl::OkStatus();
  }

  Launch launches_[kInFlight];
  int64_t next_ = 0;
};

// What a manager holds beside the lengths, which the kernels read.
struct Load {
  bool arrays = true;  // the seven other refilled arrays, 4.4 KB of values with the lengths
  bool rules = true;   // all are validated
  int restored = 24;
  int restored_ints = 512;
  bool tails = false;  // restored buffers have padded tails
  int large = 0;       // more restored buffers, of 256 KB
  int constants = 32;
  int constant_ints = 64;
  bool broken = false;  // each step breaks a rule
};

// The buffers and the values of a step.
struct Buffers {
  std::vector<Buffer<int32_t>> refilled;
  std::vector<std::vector<int32_t>> values;  // parallel to refilled
};

absl::StatusOr<Buffers> RegisterBuffers(BufferManager& manager, const Load& load) {
  Buffers buffers;
  const auto add_refilled = [&](const char* name, Kind kind, Axis axis, int32_t limit, std::vector<int32_t> original,
                                std::vector<int32_t> values) -> absl::Status {
    BufferSpec spec{.name = name, .role = Role::kRefilled, .kind = load.rules ? kind : Kind::kOpaque, .axis = axis};
    spec.limit = limit;
    PRISTINE_ASSIGN_OR_RETURN(auto buffer, manager.Register<int32_t>(spec, original));
    buffers.refilled.push_back(buffer);
    buffers.values.push_back(std::move(values));
    return absl::OkStatus();
  };
  const auto ramp = [](int count, int32_t step) {
    std::vector<int32_t> values(count);
    for (int i = 0; i < count; ++i) values[i] = i * step;
    return values;
  };
  const auto same = [](int count, int32_t value) { return std::vector<int32_t>(count, value); };
  const int bucket = kBucket.requests, step = kStep.requests;
  PRISTINE_RETURN_IF_ERROR(add_refilled("lengths", Kind::kLength, Axis::Requests(), kPages, same(bucket, kPagesPerRow),
                                        same(step, load.broken ? kPages + 1 : kLength)));
  if (load.arrays) {
    PRISTINE_RETURN_IF_ERROR(
        add_refilled("extend_lengths", Kind::kLength, Axis::Requests(), kPages, same(bucket, 1), same(step, 1)));
    PRISTINE_RETURN_IF_ERROR(add_refilled("kv_indptr", Kind::kIndptr, Axis::RequestsPlusOne(), kPages,
                                          ramp(bucket + 1, kPagesPerRow), ramp(step + 1, kLength)));
    PRISTINE_RETURN_IF_ERROR(add_refilled("qo_indptr", Kind::kIndptr, Axis::RequestsPlusOne(), kPages,
                                          ramp(bucket + 1, 1), ramp(step + 1, 1)));
    PRISTINE_RETURN_IF_ERROR(
        add_refilled("positions", Kind::kPosition, Axis::Tokens(), kPages, same(bucket, 0), same(step, kLength - 1)));
    PRISTINE_RETURN_IF_ERROR(
        add_refilled("slots", Kind::kSlot, Axis::Tokens(), kPages, same(bucket, -1), ramp(step, 1)));
    PRISTINE_RETURN_IF_ERROR(add_refilled("page_table", Kind::kPageTable, Axis::Rows(kPagesPerRow), kPages,
                                          same(bucket * kPagesPerRow, 0), ramp(step * kPagesPerRow, 1)));
    PRISTINE_RETURN_IF_ERROR(
        add_refilled("request_ids", Kind::kOpaque, Axis::Requests(), kPages, same(bucket, 0), ramp(step, 7)));
  }
  for (int i = 0; i < load.restored + load.large; ++i) {
    BufferSpec spec{.name = absl::StrCat("restored_", i), .role = Role::kRestored};
    const int ints = i < load.restored ? load.restored_ints : 64 << 10;
    if (load.tails) spec.axis = Axis::Requests(ints / kBucket.requests);
    PRISTINE_RETURN_IF_ERROR(manager.Register<int32_t>(spec, ramp(ints, i)).status());
  }
  for (int i = 0; i < load.constants; ++i) {
    const std::string name = absl::StrCat("constant_", i);
    PRISTINE_RETURN_IF_ERROR(
        manager.Register<int32_t>({.name = name, .role = Role::kConstant}, ramp(load.constant_ints, i)).status());
  }
  return buffers;
}

// The bare graph and the same one behind a prologue, on one device.
class Pair {
 public:
  static absl::StatusOr<std::unique_ptr<Pair>> Create(Device& device, ManagerOptions options, const Load& load) {
    std::unique_ptr<Pair> pair(new Pair);
    PRISTINE_ASSIGN_OR_RETURN(pair->total_, device.Allocate(sizeof(int64_t), "total"));
    PRISTINE_ASSIGN_OR_RETURN(pair->stream_, device.CreateStream());
    PRISTINE_ASSIGN_OR_RETURN(pair->manager_, BufferManager::Create(device, options));
    PRISTINE_ASSIGN_OR_RETURN(pair->buffers_, RegisterBuffers(*pair->manager_, load));
    PRISTINE_ASSIGN_OR_RETURN(pair->ring_, LaunchRing::Create());
    int ordinal = 0, kilohertz = 0;
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaGetDevice(&ordinal), "cudaGetDevice"));
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, ordinal), "clock rate"));
    const SpinParams params = {pair->buffers_.refilled[0].live.address(), pair->total_.As<int64_t>().address(),
                               static_cast<int64_t>(kKernelMicroseconds * kilohertz / 1000)};
    const auto body = [params](Stream& stream, const Extent&) -> absl::Status {
      for (int i = 0; i < kKernels; ++i) PRISTINE_RETURN_IF_ERROR(Launch(stream, kSpin, params));
      return absl::OkStatus();
    };
    PRISTINE_ASSIGN_OR_RETURN(pair->runner_, GraphRunner::Create({.name = "benchmark", .buckets = {kBucket}}, body));
    PRISTINE_RETURN_IF_ERROR(pair->runner_->AddHook(*pair->manager_));
    PRISTINE_RETURN_IF_ERROR(pair->runner_->CaptureAll(*pair->stream_));
    PRISTINE_ASSIGN_OR_RETURN(pair->bare_graph_,
                              Capture(*pair->stream_, [&](Stream& stream) { return body(stream, kBucket); }));
    PRISTINE_ASSIGN_OR_RETURN(pair->bare_, pair->bare_graph_->Instantiate());
    PRISTINE_ASSIGN_OR_RETURN(const Graph* graph, pair->runner_->graph(kBucket));
    if (graph->nodes().size() != pair->bare_graph_->nodes().size() + 1) {
      return absl::InternalError(absl::StrCat("the prologue should be one node: ", graph->nodes().size(), " nodes, ",
                                              pair->bare_graph_->nodes().size(), " without"));
    }
    return pair;
  }

  // Both graphs, alternated: the kernels must have run, and read what was refilled.
  absl::Status CheckResults() {
    constexpr int kRounds = 8;
    PRISTINE_RETURN_IF_ERROR(stream_->Fill(total_.As<std::byte>(), std::byte{0}));
    double ignored = 0;
    int64_t ignored_allocations = 0;
    for (int i = 0; i < kRounds; ++i) {
      PRISTINE_RETURN_IF_ERROR(RunReplay(&ignored, &ignored, &ignored, &ignored_allocations));
      PRISTINE_RETURN_IF_ERROR(RunBare(&ignored, &ignored));
    }
    PRISTINE_RETURN_IF_ERROR(ring_.Drain());
    int64_t total = 0;
    PRISTINE_RETURN_IF_ERROR(
        stream_->CopyToHost({reinterpret_cast<std::byte*>(&total), sizeof(total)}, total_.As<const std::byte>()));
    PRISTINE_ASSIGN_OR_RETURN(const std::vector<Violation> violations, manager_->Verify(*stream_));
    if (!violations.empty()) return absl::DataLossError(violations[0].ToString());
    if (constexpr int64_t expected = 2ll * kRounds * kKernels * kLength; total != expected) {
      return absl::DataLossError(absl::StrCat("the kernels added up to ", total, ", should be ", expected));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Samples> Measure(int count) {
    Samples samples;
    for (std::vector<double>* list : {&samples.cpu_bare, &samples.cpu_step, &samples.cpu_replay, &samples.cpu_added,
                                      &samples.gpu_bare, &samples.gpu_replay, &samples.gpu_added}) {
      list->resize(kWarmup + count);
    }
    for (int i = 0; i < kWarmup + count; ++i) {
      const auto replay = [&] {
        return RunReplay(&samples.cpu_step[i], &samples.cpu_replay[i], &samples.gpu_replay[i],
                         i < kWarmup ? &warmup_allocations_ : &samples.allocations);
      };
      // Alternating which goes first, so that neither always follows the other.
      if (i % 2 == 0) {
        PRISTINE_RETURN_IF_ERROR(replay());
      }
      PRISTINE_RETURN_IF_ERROR(RunBare(&samples.cpu_bare[i], &samples.gpu_bare[i]));
      if (i % 2 == 1) {
        PRISTINE_RETURN_IF_ERROR(replay());
      }
    }
    PRISTINE_RETURN_IF_ERROR(ring_.Drain());
    for (int i = 0; i < kWarmup + count; ++i) {
      samples.cpu_added[i] = samples.cpu_step[i] + samples.cpu_replay[i] - samples.cpu_bare[i];
      samples.gpu_added[i] = samples.gpu_replay[i] - samples.gpu_bare[i];
    }
    for (std::vector<double>* list : {&samples.cpu_bare, &samples.cpu_step, &samples.cpu_replay, &samples.cpu_added,
                                      &samples.gpu_bare, &samples.gpu_replay, &samples.gpu_added}) {
      list->erase(list->begin(), list->begin() + kWarmup);
    }
    return samples;
  }

 private:
  Pair() = default;
  cudaStream_t native() { return static_cast<cudaStream_t>(stream_->native()); }

  absl::Status RunBare(double* cpu_us, double* gpu_us) {
    PRISTINE_RETURN_IF_ERROR(ring_.Begin(native(), gpu_us));
    const Timer timer;
    PRISTINE_RETURN_IF_ERROR(bare_->Launch(*stream_));
    *cpu_us = timer.Microseconds();
    return ring_.End(native());
  }

  absl::Status RunReplay(double* step_us, double* replay_us, double* gpu_us, int64_t* allocated) {
    PRISTINE_RETURN_IF_ERROR(ring_.Begin(native(), gpu_us));
    PRISTINE_RETURN_IF_ERROR(manager_->WaitForSlot());
    const int64_t before = AllocationCount();
    const Timer step_timer;
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(kBucket, kStep));
    for (size_t i = 0; i < buffers_.refilled.size(); ++i) {
      PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(buffers_.refilled[i], buffers_.values[i]));
    }
    *step_us = step_timer.Microseconds();
    const Timer replay_timer;
    PRISTINE_RETURN_IF_ERROR(runner_->Replay(*stream_, kBucket, kStep));
    *replay_us = replay_timer.Microseconds();
    *allocated += AllocationCount() - before;
    return ring_.End(native());
  }

  // Destroyed from the last to the first: graphs before the manager whose memory they use.
  DeviceBuffer total_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<BufferManager> manager_;
  Buffers buffers_;
  std::unique_ptr<GraphRunner> runner_;
  std::unique_ptr<Graph> bare_graph_;
  std::unique_ptr<GraphExec> bare_;
  LaunchRing ring_;
  int64_t warmup_allocations_ = 0;
};

void PrintTable(const char* mode, const Samples& samples) {
  const std::string title = absl::StrCat(mode, ", us");
  std::printf("\n%-30s %9s %9s %9s\n", title.c_str(), "min", "median", "p99");
  const auto row = [](const char* name, const std::vector<double>& values) {
    const Summary summary = Summarize(values);
    std::printf("  %-28s %9.2f %9.2f %9.2f\n", name, summary.min, summary.median, summary.p99);
  };
  row("CPU  bare launch", samples.cpu_bare);
  row("CPU  begin step + refills", samples.cpu_step);
  row("CPU  replay", samples.cpu_replay);
  row("CPU  added", samples.cpu_added);
  row("GPU  bare graph", samples.gpu_bare);
  row("GPU  replay", samples.gpu_replay);
  row("GPU  added", samples.gpu_added);
  std::printf("  %-28s %9lld\n", "allocations, hot path", static_cast<long long>(samples.allocations));
}

std::string Json(const char* mode, const Samples& samples) {
  std::string out = absl::StrCat("{\"mode\": \"", mode, "\", \"samples\": ", samples.cpu_bare.size(),
                                 ", \"allocations\": ", samples.allocations);
  const auto add = [&](const char* name, const std::vector<double>& values) {
    const Summary summary = Summarize(values);
    absl::StrAppend(&out, ", \"", name, "\": {\"min\": ", summary.min, ", \"median\": ", summary.median,
                    ", \"p99\": ", summary.p99, "}");
  };
  add("cpu_bare_us", samples.cpu_bare);
  add("cpu_step_us", samples.cpu_step);
  add("cpu_replay_us", samples.cpu_replay);
  add("cpu_added_us", samples.cpu_added);
  add("gpu_bare_us", samples.gpu_bare);
  add("gpu_replay_us", samples.gpu_replay);
  add("gpu_added_us", samples.gpu_added);
  return out + "}";
}

absl::Status Run(const Options& options) {
  PRISTINE_ASSIGN_OR_RETURN(auto device, CreateCudaDevice(options.device));
  PRISTINE_RETURN_IF_ERROR(Cuda(cudaSetDevice(options.device), "cudaSetDevice"));
  struct Mode {
    const char* name;
    ManagerOptions::Check check;
    size_t parameter_bytes;
    Load load = {};
  };
  using Check = ManagerOptions::Check;
  constexpr size_t kParameters = ManagerOptions::kMaxParameterBytes;
  const auto with = [](auto change) {  // the lengths only, changed
    Load load = {.arrays = false, .restored = 0, .constants = 0};
    change(load);
    return load;
  };
  const Mode modes[] = {
      {"64 buffers, check off", Check::kOff, kParameters},
      {"64 buffers, check sampled", Check::kSampled, kParameters},
      {"64 buffers, check always", Check::kAlways, kParameters},
      {"64 buffers, sampled, slots", Check::kSampled, 0},
      {"lengths only", Check::kOff, kParameters, with([](Load&) {})},
      {"place 8 arrays", Check::kOff, kParameters, with([](Load& load) {
         load.arrays = true;
         load.rules = false;
       })},
      {"place, validate 8 arrays", Check::kOff, kParameters, with([](Load& load) { load.arrays = true; })},
      {"restore 32 x 8 KB", Check::kOff, kParameters, with([](Load& load) {
         load.restored = 32;
         load.restored_ints = 2048;
       })},
      {"restore, pad 32 x 8 KB", Check::kOff, kParameters, with([](Load& load) {
         load.restored = 32;
         load.restored_ints = 2048;
         load.tails = true;
       })},
      {"restore 2.3 MB", Check::kOff, kParameters, with([](Load& load) {
         load.restored = 24;
         load.restored_ints = 2048;
         load.large = 8;
       })},
      {"compare 32 x 8 KB", Check::kAlways, kParameters, with([](Load& load) {
         load.constants = 32;
         load.constant_ints = 2048;
       })},
      {"neutralise 8 arrays", Check::kOff, kParameters, with([](Load& load) { load.arrays = load.broken = true; })},
  };
  if (!options.json) {
    std::printf("%s: graph of %d dependent kernels of about %g us, bucket of %d, step of %d requests,\n",
                device->name().c_str(), kKernels, kKernelMicroseconds, kBucket.requests, kStep.requests);
    std::printf("at most %d launches in flight, %d samples of each, alternated\n", kInFlight, options.samples);
  }
  std::string json = absl::StrCat("{\"device\": \"", device->name(), "\", \"modes\": [");
  bool first = true;
  int64_t allocated = 0;
  for (const Mode& mode : modes) {
    PRISTINE_ASSIGN_OR_RETURN(
        auto pair, Pair::Create(*device, {.check = mode.check, .parameter_bytes = mode.parameter_bytes}, mode.load));
    if (!mode.load.broken) {
      PRISTINE_RETURN_IF_ERROR(pair->CheckResults());
    }
    PRISTINE_ASSIGN_OR_RETURN(const Samples samples, pair->Measure(options.samples));
    if (!mode.load.broken) {
      PRISTINE_RETURN_IF_ERROR(pair->CheckResults());
    }
    allocated += samples.allocations;
    if (options.json) {
      absl::StrAppend(&json, std::exchange(first, false) ? "\n " : ",\n ", Json(mode.name, samples));
    } else {
      PrintTable(mode.name, samples);
    }
  }
  if (options.json) std::printf("%s]}\n", json.c_str());
  if (allocated != 0) return absl::InternalError(absl::StrCat("the hot path allocated ", allocated, " times"));
  return absl::OkStatus();
}

// False: `argument` is not one of ours.
bool Parse(const char* argument, Options& options) {
  const auto number = [&](const char* prefix, int minimum, int* value) {
    const size_t length = std::strlen(prefix);
    if (std::strncmp(argument, prefix, length) != 0) return false;
    const char* end = argument + std::strlen(argument);
    const auto [parsed, error] = std::from_chars(argument + length, end, *value);
    return error == std::errc() && parsed == end && *value >= minimum;
  };
  if (std::strcmp(argument, "--json") == 0) {
    options.json = true;
    return true;
  }
  return number("--samples=", 100, &options.samples) || number("--device=", 0, &options.device);
}

}  // namespace
}  // namespace pristine::benchmarks

int main(int argc, char** argv) {
  pristine::benchmarks::Options options;
  for (int i = 1; i < argc; ++i) {
    if (!pristine::benchmarks::Parse(argv[i], options)) {
      std::fprintf(stderr,
                   "unknown argument %s\nusage: prologue_benchmark [--samples=N (>= 100)] [--device=N] [--json]\n",
                   argv[i]);
      return 1;
    }
  }
  const absl::Status status = pristine::benchmarks::Run(options);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : absl::IsUnavailable(status) ? 5 : 1;
}
