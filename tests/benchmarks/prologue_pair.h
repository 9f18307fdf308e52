// The bare graph and the same one behind a prologue, on one device, launched in turn.
#ifndef PRISTINE_TESTS_BENCHMARKS_PROLOGUE_PAIR_H_
#define PRISTINE_TESTS_BENCHMARKS_PROLOGUE_PAIR_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "tests/benchmarks/launch_ring.h"

namespace pristine::benchmarks {

inline constexpr int kKernels = 300;
inline constexpr double kKernelMicroseconds = 2.0;

// What a manager holds beside the lengths, which the kernels read, and who launches.
struct Load {
  enum class Launch {
    kRunner,    // a GraphRunner, with the manager as its hook
    kEngine,    // the engine's own capture and cudaGraphLaunch
    kAttached,  // the same, with the exec handed over
  } launch = Launch::kRunner;
  int bucket = 64;               // requests, tokens
  std::vector<int> real = {48};  // one after the other, a step each
  enum class Arrays {
    kLengths,   // only those
    kDecode,    // seven more, as a decode step has
    kUniform,   // seven more, one int32 per request each
    kPages128,  // those seven, and a page table of 128 int32 per request
  } arrays = Arrays::kLengths;
  bool rules = true;  // all are validated
  int restored = 0;
  int restored_ints = 2048;
  bool tails = false;  // restored buffers have padded tails
  int large = 0;       // more restored buffers, of 256 KB
  int constants = 0;
  int constant_ints = 2048;
  bool broken = false;  // each step breaks a rule
  bool plan = false;    // each step is planned: the cut of a batch's KV into work items
  bool early = false;   // the body's first kernel begins while the prologue runs, and waits for it
};

struct Samples {
  std::vector<double> cpu_bare, cpu_refill, cpu_plan, cpu_replay, cpu_step;  // us; step: the three together
  std::vector<double> gpu_bare, gpu_replay, gpu_added;                       // us
  std::vector<double> done_bare, done_step, done_added;                      // us, from the first call to the end
  int64_t allocations = 0;
  int64_t value_bytes = 0;  // of the largest step
};

class Pair {
 public:
  static absl::StatusOr<std::unique_ptr<Pair>> Create(Device& device, ManagerOptions options, const Load& load);
  ~Pair();

  // Both graphs, alternated: the kernels must have run, and read what was refilled. DATA_LOSS: they did not.
  absl::Status CheckResults();
  // `count` of each, alternated, at most LaunchRing::kInFlight launches in flight.
  absl::StatusOr<Samples> Measure(int count);
  // `count` of each, alternated, the GPU idle at the start of each: fills the done_… of `samples`.
  absl::Status MeasureDone(int count, Samples& samples);

 private:
  Pair() = default;
  cudaStream_t native() { return static_cast<cudaStream_t>(stream_->native()); }
  absl::Status CaptureByEngine(const GraphRunner::Body& body);
  absl::Status RunBare(double* cpu_us);
  struct Times {
    double refill = 0, plan = 0, replay = 0, step = 0;
  };
  absl::Status RunStep(Times& times);
  absl::Status Plan(size_t real);

  Load load_;
  int64_t turn_ = 0;  // steps run
  // Destroyed from the last to the first: graphs before the manager whose memory they use.
  DeviceBuffer total_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<BufferManager> manager_;
  struct Refilled {
    Buffer<int32_t> buffer;
    Axis axis;
    std::vector<int32_t> values;  // for a full bucket; a step takes as many as it has
  };
  std::vector<Refilled> refilled_;
  attention::DecodePlanConfig plan_config_;
  std::vector<int32_t> plan_lengths_, plan_indptr_;
  std::vector<attention::WorkItem> plan_items_;
  std::unique_ptr<GraphRunner> runner_;
  cudaGraph_t engine_graph_ = nullptr;
  cudaGraphExec_t engine_exec_ = nullptr;
  std::unique_ptr<Graph> bare_graph_;
  std::unique_ptr<GraphExec> bare_;
  cudaGraph_t bare_native_graph_ = nullptr;
  cudaGraphExec_t bare_native_ = nullptr;
  LaunchRing ring_;
};

}  // namespace pristine::benchmarks

#endif  // PRISTINE_TESTS_BENCHMARKS_PROLOGUE_PAIR_H_
