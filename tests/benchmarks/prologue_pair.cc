#include "tests/benchmarks/prologue_pair.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
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

constexpr int kWarmup = 50;
constexpr int32_t kLength = 3;  // every request's, and so what each kernel adds
constexpr int32_t kPages = 32768;

std::vector<int32_t> Ramp(size_t count, int32_t step) {
  std::vector<int32_t> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<int32_t>(i) * step % kPages;
  return values;
}
std::vector<int32_t> Same(size_t count, int32_t value) { return std::vector<int32_t>(count, value); }

struct Array {
  const char* name;
  Kind kind;
  Axis axis;
  std::vector<int32_t> original, values;
};

std::vector<Array> ArraysOf(const Load& load) {
  const size_t n = static_cast<size_t>(load.bucket);
  std::vector<Array> arrays;
  arrays.push_back(
      {"lengths", Kind::kLength, Axis::Requests(), Same(n, 16), Same(n, load.broken ? kPages + 1 : kLength)});
  if (load.arrays == Load::Arrays::kLengths) return arrays;
  arrays.push_back({"extend_lengths", Kind::kLength, Axis::Requests(), Same(n, 1), Same(n, 1)});
  arrays.push_back({"positions", Kind::kPosition, Axis::Tokens(), Same(n, 0), Same(n, kLength - 1)});
  arrays.push_back({"slots", Kind::kSlot, Axis::Tokens(), Same(n, -1), Ramp(n, 1)});
  arrays.push_back({"request_ids", Kind::kOpaque, Axis::Requests(), Same(n, 0), Ramp(n, 7)});
  if (load.arrays == Load::Arrays::kDecode) {
    arrays.push_back({"kv_indptr", Kind::kIndptr, Axis::RequestsPlusOne(), Ramp(n + 1, 16), Ramp(n + 1, kLength)});
    arrays.push_back({"qo_indptr", Kind::kIndptr, Axis::RequestsPlusOne(), Ramp(n + 1, 1), Ramp(n + 1, 1)});
    arrays.push_back({"page_table", Kind::kPageTable, Axis::Rows(8), Same(8 * n, 0), Ramp(8 * n, 1)});
    return arrays;
  }
  arrays.push_back({"first_pages", Kind::kPageTable, Axis::Rows(1), Same(n, 0), Ramp(n, 1)});
  arrays.push_back({"last_pages", Kind::kPageTable, Axis::Rows(1), Same(n, 0), Ramp(n, 3)});
  arrays.push_back({"adapters", Kind::kOpaque, Axis::Requests(), Same(n, 0), Ramp(n, 5)});
  if (load.arrays == Load::Arrays::kPages128) {
    arrays.push_back({"page_table", Kind::kPageTable, Axis::Rows(128), Same(128 * n, 0), Ramp(128 * n, 1)});
  }
  return arrays;
}

attention::DecodePlanConfig PlanConfig(int bucket) {
  attention::DecodePlanConfig config;
  config.buckets = {{bucket, bucket}};
  config.q_heads = 32;
  config.kv_heads = 8;
  config.head_dim = 128;
  config.dtype = attention::DType::kBFloat16;
  config.page_size = 16;
  config.max_row_tokens = 8192;
  config.scheduler = attention::DecodeScheduler::kHost;
  return config;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Pair>> Pair::Create(Device& device, ManagerOptions options, const Load& load) {
  std::unique_ptr<Pair> pair(new Pair);
  pair->load_ = load;
  PRISTINE_ASSIGN_OR_RETURN(pair->total_, device.Allocate(sizeof(int64_t), "total"));
  PRISTINE_ASSIGN_OR_RETURN(pair->stream_, device.CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(pair->manager_, BufferManager::Create(device, options));
  for (Array& array : ArraysOf(load)) {
    BufferSpec spec{.name = array.name,
                    .role = Role::kRefilled,
                    .kind = load.rules ? array.kind : Kind::kOpaque,
                    .axis = array.axis};
    spec.limit = kPages;
    PRISTINE_ASSIGN_OR_RETURN(auto buffer, pair->manager_->Register<int32_t>(spec, array.original));
    pair->refilled_.push_back({buffer, array.axis, std::move(array.values)});
  }
  for (int i = 0; i < load.restored + load.large; ++i) {
    BufferSpec spec{.name = absl::StrCat("restored_", i), .role = Role::kRestored};
    const int ints = i < load.restored ? load.restored_ints : 64 << 10;
    if (load.tails) spec.axis = Axis::Requests(ints / load.bucket);
    PRISTINE_RETURN_IF_ERROR(pair->manager_->Register<int32_t>(spec, Ramp(static_cast<size_t>(ints), i)).status());
  }
  for (int i = 0; i < load.constants; ++i) {
    const std::string name = absl::StrCat("constant_", i);
    const auto values = Ramp(static_cast<size_t>(load.constant_ints), i);
    PRISTINE_RETURN_IF_ERROR(
        pair->manager_->Register<int32_t>({.name = name, .role = Role::kConstant}, values).status());
  }
  if (load.plan) {
    pair->plan_config_ = PlanConfig(load.bucket);
    pair->plan_lengths_ = Ramp(static_cast<size_t>(load.bucket), 37);
    for (int32_t& length : pair->plan_lengths_) length = 1 + length % 4096;
    const int items = attention::MaxItems(pair->plan_config_, {load.bucket, load.bucket}, device.multiprocessors());
    pair->plan_items_.resize(static_cast<size_t>(items));
    pair->plan_indptr_.resize(static_cast<size_t>(load.bucket) + 1);
  }
  PRISTINE_ASSIGN_OR_RETURN(pair->ring_, LaunchRing::Create());
  int ordinal = 0, kilohertz = 0;
  PRISTINE_RETURN_IF_ERROR(Cuda(cudaGetDevice(&ordinal), "cudaGetDevice"));
  PRISTINE_RETURN_IF_ERROR(Cuda(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, ordinal), "clock rate"));
  const SpinParams params = {pair->refilled_[0].buffer.live.address(), pair->total_.As<int64_t>().address(),
                             static_cast<int64_t>(kKernelMicroseconds * kilohertz / 1000)};
  const bool early = load.early;
  const auto body = [params, early](Stream& stream, const Extent&) -> absl::Status {
    for (int i = 0; i < kKernels; ++i) {
      PRISTINE_RETURN_IF_ERROR(Launch(stream, early && i == 0 ? kSpinEarly : kSpin, params));
    }
    return absl::OkStatus();
  };
  const Extent bucket = {load.bucket, load.bucket};
  if (load.launch == Load::Launch::kRunner) {
    PRISTINE_ASSIGN_OR_RETURN(pair->runner_, GraphRunner::Create({.name = "benchmark", .buckets = {bucket}}, body));
    PRISTINE_RETURN_IF_ERROR(pair->runner_->AddHook(*pair->manager_));
    PRISTINE_RETURN_IF_ERROR(pair->runner_->CaptureAll(*pair->stream_));
    PRISTINE_ASSIGN_OR_RETURN(pair->bare_graph_,
                              Capture(*pair->stream_, [&](Stream& stream) { return body(stream, bucket); }));
    PRISTINE_ASSIGN_OR_RETURN(pair->bare_, pair->bare_graph_->Instantiate());
    PRISTINE_ASSIGN_OR_RETURN(const Graph* graph, pair->runner_->graph(bucket));
    if (graph->nodes().size() != pair->bare_graph_->nodes().size() + 1) {
      return absl::InternalError(absl::StrCat("the prologue should be one node: ", graph->nodes().size(), " nodes, ",
                                              pair->bare_graph_->nodes().size(), " without"));
    }
  } else {
    PRISTINE_RETURN_IF_ERROR(pair->CaptureByEngine(body));
  }
  return pair;
}

Pair::~Pair() {
  if (stream_ != nullptr) stream_->Synchronize().IgnoreError();
  if (load_.launch == Load::Launch::kAttached && manager_ != nullptr) {
    manager_->DetachExec({load_.bucket, load_.bucket}).IgnoreError();
  }
  for (cudaGraphExec_t exec : {engine_exec_, bare_native_}) {
    if (exec != nullptr) cudaGraphExecDestroy(exec);
  }
  for (cudaGraph_t graph : {engine_graph_, bare_native_graph_}) {
    if (graph != nullptr) cudaGraphDestroy(graph);
  }
}

// Twice: with the prologue and without.
absl::Status Pair::CaptureByEngine(const GraphRunner::Body& body) {
  const Extent bucket = {load_.bucket, load_.bucket};
  PRISTINE_RETURN_IF_ERROR(manager_->Seal());
  const auto capture = [&](bool prologue, cudaGraph_t* graph, cudaGraphExec_t* exec) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(
        Cuda(cudaStreamBeginCapture(native(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture"));
    absl::Status status = prologue ? manager_->RecordPrologue(*stream_, bucket) : absl::OkStatus();
    if (status.ok()) status = body(*stream_, bucket);
    status.Update(Cuda(cudaStreamEndCapture(native(), graph), "cudaStreamEndCapture"));
    PRISTINE_RETURN_IF_ERROR(status);
    return Cuda(cudaGraphInstantiate(exec, *graph, 0), "cudaGraphInstantiate");
  };
  PRISTINE_RETURN_IF_ERROR(capture(true, &engine_graph_, &engine_exec_));
  PRISTINE_RETURN_IF_ERROR(capture(false, &bare_native_graph_, &bare_native_));
  if (load_.launch != Load::Launch::kAttached) return absl::OkStatus();
  return manager_->AttachExec(bucket, engine_graph_, engine_exec_);
}

absl::Status Pair::RunBare(double* cpu_us) {
  const Timer timer;
  if (bare_native_ != nullptr) {
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaGraphLaunch(bare_native_, native()), "cudaGraphLaunch"));
  } else {
    PRISTINE_RETURN_IF_ERROR(bare_->Launch(*stream_));
  }
  *cpu_us = timer.Microseconds();
  return absl::OkStatus();
}

absl::Status Pair::Plan(size_t real) {
  return attention::PlanItems(plan_config_, {load_.bucket, load_.bucket}, manager_->device().multiprocessors(),
                              absl::MakeConstSpan(plan_lengths_).first(real), absl::MakeSpan(plan_items_),
                              absl::MakeSpan(plan_indptr_))
      .status();
}

absl::Status Pair::RunStep(Times& times) {
  const int real = load_.real[static_cast<size_t>(turn_++) % load_.real.size()];
  const Extent bucket = {load_.bucket, load_.bucket};
  const Extent extent = {real, real};
  const Timer whole;
  PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(bucket, extent));
  for (const Refilled& refilled : refilled_) {
    const auto count = static_cast<size_t>(refilled.axis.Count(extent, static_cast<int64_t>(refilled.values.size())));
    PRISTINE_RETURN_IF_ERROR(
        manager_->Refill<int32_t>(refilled.buffer, absl::MakeConstSpan(refilled.values).first(count)));
  }
  times.refill = whole.Microseconds();
  if (load_.plan) {
    const Timer timer;
    PRISTINE_RETURN_IF_ERROR(Plan(static_cast<size_t>(real)));
    times.plan = timer.Microseconds();
  }
  const Timer timer;
  if (runner_ != nullptr) {
    PRISTINE_RETURN_IF_ERROR(runner_->Replay(*stream_, bucket, extent));
  } else {
    PRISTINE_RETURN_IF_ERROR(manager_->BeforeReplay(*stream_, bucket, extent));
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaGraphLaunch(engine_exec_, native()), "cudaGraphLaunch"));
  }
  times.replay = timer.Microseconds();
  times.step = whole.Microseconds();
  return absl::OkStatus();
}

absl::Status Pair::CheckResults() {
  constexpr int kRounds = 8;
  PRISTINE_RETURN_IF_ERROR(stream_->Fill(total_.As<std::byte>(), std::byte{0}));
  for (int i = 0; i < kRounds; ++i) {
    double ignored = 0;
    Times times;
    PRISTINE_RETURN_IF_ERROR(manager_->WaitForSlot());
    PRISTINE_RETURN_IF_ERROR(RunStep(times));
    PRISTINE_RETURN_IF_ERROR(RunBare(&ignored));
  }
  int64_t total = 0;
  PRISTINE_RETURN_IF_ERROR(
      stream_->CopyToHost({reinterpret_cast<std::byte*>(&total), sizeof(total)}, total_.As<const std::byte>()));
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<Violation> violations, manager_->Verify(*stream_));
  if (load_.broken) {
    const auto wrong = [](const Violation& violation) { return violation.kind != Violation::Kind::kInvariant; };
    if (violations.empty() || std::any_of(violations.begin(), violations.end(), wrong)) {
      return absl::DataLossError("each step breaks a rule, which was not reported");
    }
    return absl::OkStatus();
  }
  if (!violations.empty()) return absl::DataLossError(violations[0].ToString());
  if (constexpr int64_t expected = 2ll * kRounds * kKernels * kLength; total != expected) {
    return absl::DataLossError(absl::StrCat("the kernels added up to ", total, ", should be ", expected));
  }
  return absl::OkStatus();
}

absl::StatusOr<Samples> Pair::Measure(int count) {
  Samples samples;
  for (const int real : load_.real) {
    int64_t bytes = 0;
    for (const Refilled& refilled : refilled_) {
      bytes += 4 * refilled.axis.Count({real, real}, static_cast<int64_t>(refilled.values.size()));
    }
    samples.value_bytes = std::max(samples.value_bytes, bytes);
  }
  const size_t all = static_cast<size_t>(kWarmup + count);
  std::vector<double>* const lists[] = {&samples.cpu_bare, &samples.cpu_refill, &samples.cpu_plan,  &samples.cpu_replay,
                                        &samples.cpu_step, &samples.gpu_bare,   &samples.gpu_replay};
  for (std::vector<double>* list : lists) list->resize(all);
  std::vector<Violation> reports(64);
  for (size_t i = 0; i < all; ++i) {
    const auto step = [&]() -> absl::Status {
      Times times;
      PRISTINE_RETURN_IF_ERROR(ring_.Begin(native(), &samples.gpu_replay[i]));
      PRISTINE_RETURN_IF_ERROR(manager_->WaitForSlot());
      const int64_t before = AllocationCount();
      PRISTINE_RETURN_IF_ERROR(RunStep(times));
      manager_->Poll(absl::MakeSpan(reports));
      if (i >= kWarmup) samples.allocations += AllocationCount() - before;
      samples.cpu_refill[i] = times.refill;
      samples.cpu_plan[i] = times.plan;
      samples.cpu_replay[i] = times.replay;
      samples.cpu_step[i] = times.step;
      return ring_.End(native());
    };
    const auto bare = [&]() -> absl::Status {
      PRISTINE_RETURN_IF_ERROR(ring_.Begin(native(), &samples.gpu_bare[i]));
      PRISTINE_RETURN_IF_ERROR(RunBare(&samples.cpu_bare[i]));
      return ring_.End(native());
    };
    // Alternating which goes first, so that neither always follows the other.
    PRISTINE_RETURN_IF_ERROR(i % 2 == 0 ? step() : bare());
    PRISTINE_RETURN_IF_ERROR(i % 2 == 0 ? bare() : step());
  }
  PRISTINE_RETURN_IF_ERROR(ring_.Drain());
  for (std::vector<double>* list : lists) list->erase(list->begin(), list->begin() + kWarmup);
  for (size_t i = 0; i < samples.gpu_bare.size(); ++i) {
    samples.gpu_added.push_back(samples.gpu_replay[i] - samples.gpu_bare[i]);
  }
  return samples;
}

absl::Status Pair::MeasureDone(int count, Samples& samples) {
  for (int i = 0; i < kWarmup + count; ++i) {
    double step_us = 0, bare_us = 0, ignored = 0;
    const auto step = [&]() -> absl::Status {
      Times times;
      const Timer timer;
      PRISTINE_RETURN_IF_ERROR(RunStep(times));
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaStreamSynchronize(native()), "cudaStreamSynchronize"));
      step_us = timer.Microseconds();
      return absl::OkStatus();
    };
    const auto bare = [&]() -> absl::Status {
      const Timer timer;
      PRISTINE_RETURN_IF_ERROR(RunBare(&ignored));
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaStreamSynchronize(native()), "cudaStreamSynchronize"));
      bare_us = timer.Microseconds();
      return absl::OkStatus();
    };
    PRISTINE_RETURN_IF_ERROR(i % 2 == 0 ? step() : bare());
    PRISTINE_RETURN_IF_ERROR(i % 2 == 0 ? bare() : step());
    if (i < kWarmup) continue;
    samples.done_bare.push_back(bare_us);
    samples.done_step.push_back(step_us);
    samples.done_added.push_back(step_us - bare_us);
  }
  return absl::OkStatus();
}

}  // namespace pristine::benchmarks
