// Continuous batching over a virtual clock: who is active in which step, and in which pages. No device.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_SCHEDULER_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_SCHEDULER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "examples/replay_driver/trace.h"

namespace pristine::replay_driver {

struct SchedulerConfig {
  int64_t step_ticks = 0;
  int64_t step_limit = 0;
  int32_t max_batch = 0;
  int32_t page_size = 1;
  int32_t pool_pages = 0;  // pages 1 … pool_pages are handed out; page 0 is the dummy, which never is
  uint64_t seed = 0;       // of the order in which fresh pages are handed out
  int32_t spare = 0;       // tokens past its last one that each request's pages have room for
};

struct ActiveRequest {
  int32_t id = 0;              // index in the trace
  int32_t length = 0;          // tokens in KV once this step's token is appended
  int32_t last = 0;            // its length in its last step
  int32_t advance = 1;         // tokens that this step adds
  std::vector<int32_t> pages;  // for all the tokens that it will ever have
};

// Step n is at first arrival + n * step. A request enters in the first step at or after its arrival, first come first
// served, when the batch and the pool have room for all of it, and stays one step per generated token. One that the
// whole pool could not hold is refused.
class Scheduler {
 public:
  // `trace` must outlive this.
  Scheduler(absl::Span<const TraceRequest> trace, const SchedulerConfig& config);

  // Ends the step before (finished requests leave) and begins the next one, passing over steps in which nothing can
  // happen; those count. False: the trace is served, or step_limit reached.
  bool NextStep();

  // What the present step adds to active()[index], instead of one token. `tokens` >= 0, and at most what is left to it.
  void SetAdvance(size_t index, int32_t tokens) { active_[index].advance = tokens; }

  // Of the present step. May be empty: then there is nothing to replay.
  absl::Span<const ActiveRequest> active() const { return active_; }
  // Those that entered in this step are the last of active().
  size_t entered() const { return entered_; }

  int64_t steps() const { return next_step_; }  // begun so far
  int64_t finished() const { return finished_; }
  const std::vector<int32_t>& refused() const { return refused_; }  // ids
  int64_t PagesOf(int32_t id) const;                                // that the whole request needs
  int32_t free_pages() const { return static_cast<int32_t>(free_.size()); }

 private:
  void Leave();
  void Enter();

  const absl::Span<const TraceRequest> trace_;
  const SchedulerConfig config_;
  size_t waiting_ = 0;  // the first request that has not entered
  int64_t next_step_ = 0;
  int64_t finished_ = 0;
  size_t entered_ = 0;
  std::vector<ActiveRequest> active_;
  std::vector<int32_t> free_;  // a stack
  std::vector<int32_t> refused_;
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_SCHEDULER_H_
