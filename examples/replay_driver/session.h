// Session: a device with the model captured on it, and the loop that serves requests.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_SESSION_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_SESSION_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "examples/replay_driver/decode_model.h"
#include "examples/replay_driver/driver.h"
#include "examples/replay_driver/injector.h"
#include "examples/replay_driver/kv_pool.h"
#include "examples/replay_driver/options.h"
#include "examples/replay_driver/report.h"
#include "examples/replay_driver/scheduler.h"
#include "examples/replay_driver/step_inputs.h"
#include "examples/replay_driver/trace.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

class Session {
 public:
  // All must outlive this. Counts into `report`.
  Session(const Options& options, const Environment& environment, RunReport& report)
      : options_(options), environment_(environment), report_(report) {}
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Creates the device, the pool, the model and its shadow, and captures every bucket.
  absl::Status SetUp();
  // Serves `trace` once. Stops early, OK, when the planner refuses (report.plan_refused).
  absl::Status Serve(absl::Span<const TraceRequest> trace);
  // After the last Serve: what only the whole run shows.
  absl::Status Finish();

 private:
  absl::Status OpenDevice(const ModelConfig& config);
  absl::Status RunStep(int64_t step, absl::Span<const ActiveRequest> active);
  absl::Status PlanFromLive();
  absl::Status DescribeRefusal(int64_t step, const absl::Status& refusal);
  absl::Status Compare(int64_t step);
  void CollectReports(int64_t step);
  void ShowProgress();
  bool live() const { return options_.plan_from == PlanFrom::kLive; }

  const Options& options_;
  const Environment& environment_;
  RunReport& report_;

  // In the order of creation: each may use those above it.
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<KvPool> pool_;
  std::unique_ptr<DecodeModel> model_;   // what the graphs run
  std::unique_ptr<DecodeModel> shadow_;  // what compares with it
  std::unique_ptr<Injector> injector_;   // null without --inject
  std::unique_ptr<GraphRunner> runner_;

  std::optional<Scheduler> scheduler_;  // of the present Serve; queued copies read its page lists
  StepInputs inputs_;
  std::vector<int32_t> live_indptr_;
  Extent last_bucket_;
  int64_t first_step_ = 0;  // of the present Serve
  int64_t last_step_ = -1;  // the last one that replayed; -1: none has
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_SESSION_H_
