// SpecSession: what Session is, for --spec=T: a device with the three steps of speculation captured on it, and the loop
// that serves requests in rounds of draft, verify, accept, draft extend and rollback.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_SESSION_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_SESSION_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "examples/replay_driver/driver.h"
#include "examples/replay_driver/kv_pool.h"
#include "examples/replay_driver/options.h"
#include "examples/replay_driver/report.h"
#include "examples/replay_driver/scheduler.h"
#include "examples/replay_driver/spec_inputs.h"
#include "examples/replay_driver/spec_model.h"
#include "examples/replay_driver/trace.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

class SpecSession {
 public:
  // All must outlive this. Counts into `report`.
  SpecSession(const Options& options, const Environment& environment, RunReport& report)
      : options_(options), environment_(environment), report_(report) {}
  ~SpecSession();
  SpecSession(const SpecSession&) = delete;
  SpecSession& operator=(const SpecSession&) = delete;

  // Creates the device, the pool, the model and its shadow, and captures every bucket of every phase.
  absl::Status SetUp();
  // Serves `trace` once.
  absl::Status Serve(absl::Span<const TraceRequest> trace);
  // After the last Serve: what only the whole run shows.
  absl::Status Finish();
  // What the flight recorder holds, also after a failure of the device.
  void KeepFlightRecords();

 private:
  absl::Status Capture(SpecPhase phase);
  absl::Status RunRound(absl::Span<const ActiveRequest> active);
  // The replay of one step, waited for, and its comparisons.
  absl::Status RunPhase(SpecPhase phase, int32_t draft_step);
  absl::Status Compare();
  // A draft extend that an engine sends to the decode kernels: when its graphs are made, and when they are replayed.
  absl::Status Misroute();
  absl::Status CountRefusal(const absl::Status& refused);
  void CollectReports();
  void AddViolation(const Violation& violation, bool shadow);
  GraphRunner& runner(SpecPhase phase) { return *runners_[static_cast<size_t>(phase)]; }

  const Options& options_;
  const Environment& environment_;
  RunReport& report_;

  // In the order of creation: each may use those above it.
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<KvPool> pool_;
  PinnedBuffer pages_;                                 // [pool_pages] of the requests that enter
  std::unique_ptr<SpecModel> model_;                   // what the graphs run
  std::unique_ptr<SpecModel> shadow_;                  // what compares with it
  std::vector<std::unique_ptr<GraphRunner>> runners_;  // by phase

  std::optional<Scheduler> scheduler_;  // of the present Serve
  std::vector<SpecRow> rows_;           // of the present round
  SpecInputs inputs_;                   // of the present step
  ServeTimes times_;
  Extent last_bucket_;
  int64_t step_ = 0;        // rounds of virtual time before the present Serve, then the present one's number
  int64_t first_step_ = 0;  // of the present Serve
  bool misrouted_ = false;
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_SESSION_H_
