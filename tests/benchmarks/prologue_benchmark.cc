// What the prologue adds to a replay, in CPU and GPU time, beside what it may add.
//
// A graph of 300 dependent kernels of 2 us each; the same body without any hook is the bare graph. Both are launched in
// turn on one stream, at most 4 launches in flight, so that both see the same clocks and temperature, and the GPU never
// waits for the host. GPU time is what lies between an event before and an event after the launch; whatever the manager
// queues counts. "done" is host time from the first call to the end of the graph, on an idle GPU. The output of both
// graphs is checked before and after. The real size changes at each step.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"
#include "tests/benchmarks/arguments.h"
#include "tests/benchmarks/launch_ring.h"
#include "tests/benchmarks/prologue_pair.h"

namespace pristine::benchmarks {
namespace {

constexpr char kUsage[] =
    "usage: prologue_benchmark [--samples=N] [--device=N] [--only=TEXT] [--json | --json=FILE] [--help]\n"
    "  --samples=N   of each row and kind, at least 100 (2000)\n"
    "  --device=N    the CUDA device (0)\n"
    "  --only=TEXT   rows whose name contains TEXT\n"
    "  --json        print JSON instead of the table; with =FILE, write it there beside the table\n"
    "exit status: 0, 1 wrong arguments, output or allocations, 5 no such device\n";

struct Options {
  int device = 0;
  int samples = 2000;
  bool json = false;
  std::string json_file, only;
};

// What a row should reach, medians; 0: nothing.
struct Targets {
  double replay_ratio = 0;  // CPU of the replay call, of a bare launch
  double replay_added = 0;  // us over a bare launch
  double step_us = 0;       // CPU of refill, plan and replay
  double plan_us = 0;
  double gpu_added = 0;
  double done_added = 0;
};

struct Row {
  const char* name;
  ManagerOptions options;
  Load load;
  Targets targets;
};

std::vector<Row> Rows() {
  using Check = ManagerOptions::Check;
  using Arrays = Load::Arrays;
  const ManagerOptions off = {.check = Check::kOff};
  const ManagerOptions sampled = {.check = Check::kSampled};
  ManagerOptions slots = sampled;
  slots.parameter_bytes = 0;
  const Load lengths = {.real = {48, 17, 64, 33}};  // nothing else
  const Load full = {.real = {64, 17, 48, 33, 1, 56, 25, 40},
                     .arrays = Arrays::kDecode,
                     .restored = 24,
                     .restored_ints = 512,
                     .constants = 32,
                     .constant_ints = 64};
  const auto with = [](Load load, auto change) {
    change(load);
    return load;
  };
  const auto launched = [&](Load::Launch by) { return with(full, [by](Load& load) { load.launch = by; }); };
  const auto batch = [&](Arrays arrays, std::vector<int> real) {
    Load load = {.bucket = 256, .real = std::move(real), .arrays = arrays, .plan = true};
    return load;
  };
  const Load all_parts = with(lengths, [](Load& load) { load.arrays = Arrays::kDecode; });
  const Load small = with(all_parts, [](Load& load) { load.restored = 32; });
  const Load big = with(all_parts, [](Load& load) {
    load.restored = 24;
    load.large = 8;
  });
  return {
      {"64 buffers, check off", off, full, {.replay_ratio = 1.8, .done_added = 5}},
      {"64 buffers, check sampled", sampled, full, {.replay_ratio = 1.8, .done_added = 5}},
      {"64 buffers, check always", {.check = Check::kAlways}, full, {}},
      {"64 buffers, no recorder", {.check = Check::kSampled, .flight_records = 0}, full, {}},
      {"64 buffers, sampled, slots", slots, full, {}},
      {"engine's graph", sampled, launched(Load::Launch::kEngine), {.replay_added = 3.5}},
      {"engine's graph, attached", sampled, launched(Load::Launch::kAttached), {.replay_added = 3.5, .done_added = 5}},
      {"batch 256, 8 arrays, 4 KB",
       sampled,
       batch(Arrays::kUniform, {128, 127, 126, 125}),
       {.step_us = 8, .plan_us = 3, .done_added = 5}},
      {"batch 256, 8 arrays, 8 KB",
       sampled,
       batch(Arrays::kUniform, {256, 255, 254, 253}),
       {.step_us = 10, .plan_us = 3}},
      {"batch 256, + 128 KB pages", sampled, batch(Arrays::kPages128, {256, 255, 254, 253}), {}},
      {"all parts, 32 x 8 KB", off, small, {.gpu_added = 3.2}},
      {"  the same, no recorder", {.check = Check::kOff, .flight_records = 0}, small, {}},
      {"all parts, 2.3 MB", off, big, {.gpu_added = 3.8}},
      {"all parts, 32 x 8 KB, edge", off, with(small, [](Load& load) { load.early = true; }), {.gpu_added = 3.2}},
      {"all parts, 2.3 MB, edge", off, with(big, [](Load& load) { load.early = true; }), {.gpu_added = 3.8}},
      {"lengths only", off, lengths, {}},
      {"place 8 arrays", off, with(all_parts, [](Load& load) { load.rules = false; }), {}},
      {"place, validate 8 arrays", off, all_parts, {}},
      {"restore 32 x 8 KB", off, with(lengths, [](Load& load) { load.restored = 32; }), {}},
      {"restore, pad 32 x 8 KB",
       off,
       with(lengths,
            [](Load& load) {
              load.restored = 32;
              load.tails = true;
            }),
       {}},
      {"restore 2.3 MB",
       off,
       with(lengths,
            [](Load& load) {
              load.restored = 24;
              load.large = 8;
            }),
       {}},
      {"compare 32 x 8 KB", {.check = Check::kAlways}, with(lengths, [](Load& load) { load.constants = 32; }), {}},
      {"neutralise 8 arrays", off, with(all_parts, [](Load& load) { load.broken = true; }), {}},
  };
}

struct Result {
  Row row;
  Samples samples;
};

// How the medians compare with the row's targets.
std::string Verdict(const Result& result) {
  std::string out;
  const auto judge = [&out](const char* what, double reached, double target) {
    if (target == 0) return;
    char text[96];
    std::snprintf(text, sizeof(text), "%s%s %.2f <= %g %s", out.empty() ? "" : "; ", what, reached, target,
                  reached <= target ? "met" : "MISSED");
    out += text;
  };
  const Samples& samples = result.samples;
  const double bare = Summarize(samples.cpu_bare).median, replay = Summarize(samples.cpu_replay).median;
  judge("replay/bare", replay / bare, result.row.targets.replay_ratio);
  judge("replay-bare", replay - bare, result.row.targets.replay_added);
  judge("step", Summarize(samples.cpu_step).median, result.row.targets.step_us);
  judge("plan", Summarize(samples.cpu_plan).median, result.row.targets.plan_us);
  judge("GPU", Summarize(samples.gpu_added).median, result.row.targets.gpu_added);
  judge("done-bare", Summarize(samples.done_added).median, result.row.targets.done_added);
  return out;
}

void PrintTable(const std::vector<Result>& results) {
  const auto median = [](const std::vector<double>& values) { return Summarize(values).median; };
  std::printf("\n%-28s %7s | %14s %6s %6s %20s %6s | %7s %20s | %20s | %s\n", "", "", "CPU us, medians", "", "", "", "",
              "GPU us", "", "done - bare us", "");
  std::printf("%-28s %7s | %7s %6s %6s %22s %6s | %7s %20s | %20s | %6s | %s\n", "row", "values", "bare", "refill",
              "plan", "replay min/med/p99", "step", "bare", "added min/med/p99", "min/med/p99", "allocs", "targets");
  for (const Result& result : results) {
    const Samples& samples = result.samples;
    const Summary replay = Summarize(samples.cpu_replay), added = Summarize(samples.gpu_added),
                  done = Summarize(samples.done_added);
    std::printf(
        "%-28s %7lld | %7.2f %6.2f %6.2f %8.2f/%6.2f/%6.2f %6.2f | %7.1f %6.2f/%6.2f/%6.2f | %6.2f/%6.2f/%6.2f | %6lld "
        "| %s\n",
        result.row.name, static_cast<long long>(samples.value_bytes), median(samples.cpu_bare),
        median(samples.cpu_refill), median(samples.cpu_plan), replay.min, replay.median, replay.p99,
        median(samples.cpu_step), median(samples.gpu_bare), added.min, added.median, added.p99, done.min, done.median,
        done.p99, static_cast<long long>(samples.allocations), Verdict(result).c_str());
  }
}

std::string Json(const std::string& device, const std::vector<Result>& results) {
  std::string out = absl::StrCat("{\"device\": \"", device, "\", \"kernels\": ", kKernels,
                                 ", \"in_flight\": ", LaunchRing::kInFlight, ", \"rows\": [");
  bool first = true;
  for (const Result& result : results) {
    const Samples& samples = result.samples;
    absl::StrAppend(&out, first ? "\n " : ",\n ", "{\"name\": \"", result.row.name,
                    "\", \"samples\": ", samples.cpu_bare.size(), ", \"value_bytes\": ", samples.value_bytes,
                    ", \"allocations\": ", samples.allocations, ", \"targets\": \"", Verdict(result), "\"");
    first = false;
    const auto add = [&](const char* name, const std::vector<double>& values) {
      const Summary summary = Summarize(values);
      absl::StrAppend(&out, ", \"", name, "\": {\"min\": ", summary.min, ", \"median\": ", summary.median,
                      ", \"p99\": ", summary.p99, "}");
    };
    add("cpu_bare_us", samples.cpu_bare);
    add("cpu_refill_us", samples.cpu_refill);
    add("cpu_plan_us", samples.cpu_plan);
    add("cpu_replay_us", samples.cpu_replay);
    add("cpu_step_us", samples.cpu_step);
    add("gpu_bare_us", samples.gpu_bare);
    add("gpu_replay_us", samples.gpu_replay);
    add("gpu_added_us", samples.gpu_added);
    add("done_bare_us", samples.done_bare);
    add("done_step_us", samples.done_step);
    add("done_added_us", samples.done_added);
    out += "}";
  }
  return out + "]}\n";
}

absl::Status Run(const Options& options) {
  PRISTINE_ASSIGN_OR_RETURN(auto device, CreateCudaDevice(options.device));
  PRISTINE_RETURN_IF_ERROR(Cuda(cudaSetDevice(options.device), "cudaSetDevice"));
  std::vector<Result> results;
  int64_t allocated = 0;
  for (Row& row : Rows()) {
    if (std::string(row.name).find(options.only) == std::string::npos) continue;
    const auto named = [&](const absl::Status& status) {
      return absl::Status(status.code(), absl::StrCat(row.name, ": ", std::string(status.message())));
    };
    absl::StatusOr<std::unique_ptr<Pair>> pair = Pair::Create(*device, row.options, row.load);
    if (!pair.ok()) return named(pair.status());
    if (absl::Status status = (*pair)->CheckResults(); !status.ok()) return named(status);
    absl::StatusOr<Samples> samples = (*pair)->Measure(options.samples);
    if (!samples.ok()) return named(samples.status());
    if (absl::Status status = (*pair)->MeasureDone(options.samples / 4, *samples); !status.ok()) return named(status);
    if (absl::Status status = (*pair)->CheckResults(); !status.ok()) return named(status);
    allocated += samples->allocations;
    results.push_back({std::move(row), *std::move(samples)});
  }
  const std::string json = Json(device->name(), results);
  if (options.json) {
    std::fputs(json.c_str(), stdout);
  } else {
    std::printf(
        "%s: graph of %d dependent kernels of about %g us, at most %d launches in flight, %d samples of each,\n",
        device->name().c_str(), kKernels, kKernelMicroseconds, LaunchRing::kInFlight, options.samples);
    std::printf("alternated with the bare graph (done - bare: %d samples, the GPU idle before each)\n",
                options.samples / 4);
    PrintTable(results);
  }
  if (!options.json_file.empty()) {
    std::FILE* const file = std::fopen(options.json_file.c_str(), "w");
    if (file == nullptr || std::fputs(json.c_str(), file) < 0 || std::fclose(file) != 0) {
      return absl::InternalError(absl::StrCat("cannot write ", options.json_file));
    }
  }
  if (allocated != 0) return absl::InternalError(absl::StrCat("the hot path allocated ", allocated, " times"));
  return absl::OkStatus();
}

// False: `argument` is not one of ours.
bool Parse(const char* argument, Options& options) {
  if (std::strcmp(argument, "--json") == 0) {
    options.json = true;
    return true;
  }
  return NumberArgument(argument, "--samples=", 100, options.samples) ||
         NumberArgument(argument, "--device=", 0, options.device) || TextArgument(argument, "--only=", options.only) ||
         TextArgument(argument, "--json=", options.json_file);
}

}  // namespace
}  // namespace pristine::benchmarks

int main(int argc, char** argv) {
  using namespace pristine::benchmarks;  // NOLINT(build/namespaces): all of it is this program
  return Main(argc, argv, kUsage, &Parse, &Run);
}
