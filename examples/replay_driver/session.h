// Session: a device with the model captured on it, and the loop that serves requests.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_SESSION_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_SESSION_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
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
#include "examples/replay_driver/steps_in_flight.h"
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
  // Serves `trace` once; with --overlap=both once without overlap and once with it. Stops early, OK, when the planner
  // refuses (report.plan_refused).
  absl::Status Serve(absl::Span<const TraceRequest> trace);
  // After the last Serve: what only the whole run shows.
  absl::Status Finish();
  // What the flight recorder holds, also after a failure of the device.
  void KeepFlightRecords();

 private:
  absl::Status ServeOnce(absl::Span<const TraceRequest> trace, bool overlap);
  // Prepares and launches a step. Without overlap it is retired too.
  absl::Status RunStep(int64_t step, absl::Span<const ActiveRequest> active);
  // Its values, its plans. OK with report.plan_refused: the planner refused it.
  absl::Status Prepare(int64_t step);
  absl::Status Launch(StepInFlight& launched);
  absl::Status PlanFromLive();
  absl::Status DescribeRefusal(int64_t step, const absl::Status& refusal);
  // Queues an eager run of the same step behind its replay, and the copies of what both computed.
  absl::Status QueueComparison(StepInFlight& compared);

  // Retire: look at what a step that is done has left. All steps, in order; or those that are done by now.
  absl::Status RetireAll();
  absl::Status RetireDone();
  absl::Status RetireOldest();
  absl::Status Compare(const StepInFlight& done);
  void CollectReports();
  // `number`: of which manager it is.
  void AddReport(const Violation& violation, int64_t StepInFlight::*number);
  // Calls `wait` and counts the time.
  absl::Status Wait(absl::FunctionRef<absl::Status()> wait);
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

  std::optional<StepsInFlight> steps_;

  std::optional<Scheduler> scheduler_;  // of the present Serve
  StepInputs inputs_;                   // of the step that is prepared
  bool overlap_ = false;                // of the present Serve
  ServeTimes times_;                    // of the present Serve
  std::vector<int32_t> live_indptr_;
  Extent last_bucket_;
  int64_t first_step_ = 0;  // of the present Serve
  int64_t this_step_ = 0;   // the one that is prepared
  int64_t last_step_ = -1;  // the last one that was retired; -1: none was
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_SESSION_H_
