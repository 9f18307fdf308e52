#include "examples/replay_driver/scheduler.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "examples/replay_driver/kv_hash.h"

namespace pristine::replay_driver {

Scheduler::Scheduler(absl::Span<const TraceRequest> trace, const SchedulerConfig& config)
    : trace_(trace), config_(config), free_(config.pool_pages) {
  // Fresh pages come in no order, as they would from an engine that has run for a while.
  std::iota(free_.begin(), free_.end(), 1);
  for (size_t i = free_.size(); i > 1; --i) std::swap(free_[i - 1], free_[Combine(config.seed, i) % i]);
  active_.reserve(config.max_batch);
}

int64_t Scheduler::PagesOf(int32_t id) const {
  const int64_t tokens = int64_t{trace_[id].context} + trace_[id].generated + config_.spare;
  return (tokens + config_.page_size - 1) / config_.page_size;
}

bool Scheduler::NextStep() {
  Leave();
  entered_ = 0;
  if (active_.empty()) {
    if (waiting_ == trace_.size()) return false;
    const int64_t wake = (trace_[waiting_].arrival + config_.step_ticks - 1) / config_.step_ticks;
    next_step_ = std::max(next_step_, std::min(wake, config_.step_limit));
  }
  if (next_step_ >= config_.step_limit) return false;
  Enter();
  ++next_step_;
  return true;
}

void Scheduler::Leave() {
  const auto leaves = [this](ActiveRequest& request) {
    request.length += request.advance;
    if (request.length <= request.last) return false;
    free_.insert(free_.end(), request.pages.begin(), request.pages.end());
    ++finished_;
    return true;
  };
  active_.erase(std::remove_if(active_.begin(), active_.end(), leaves), active_.end());
}

void Scheduler::Enter() {
  const int64_t now = next_step_ * config_.step_ticks;
  for (; waiting_ < trace_.size() && trace_[waiting_].arrival <= now; ++waiting_) {
    const int32_t id = static_cast<int32_t>(waiting_);
    const TraceRequest& request = trace_[id];
    const int64_t pages = PagesOf(id);
    if (pages > config_.pool_pages) {
      refused_.push_back(id);
      continue;
    }
    if (request.generated == 0) {
      ++finished_;
      continue;
    }
    if (active_.size() == static_cast<size_t>(config_.max_batch) || pages > free_pages()) return;
    ActiveRequest& entering = active_.emplace_back();
    entering.id = id;
    entering.length = request.context + 1;
    entering.last = request.context + request.generated;
    entering.pages.assign(free_.end() - pages, free_.end());
    free_.resize(free_.size() - pages);
    ++entered_;
  }
}

}  // namespace pristine::replay_driver
