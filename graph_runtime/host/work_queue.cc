#include "graph_runtime/host/work_queue.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "graph_runtime/host/access_guard.h"
#include "graph_runtime/host/capture_state.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::host {
namespace {

constexpr size_t kInitialTasks = 512;

}  // namespace

WorkQueue::WorkQueue(Device& device, bool deferred, AccessGuard* guard, std::function<void(int)> count_capture)
    : device_(device),
      guard_(guard),
      count_capture_(std::move(count_capture)),
      ring_(kInitialTasks),
      released_(deferred ? 0 : std::numeric_limits<uint64_t>::max()),
      worker_([this] { Work(); }) {}

WorkQueue::~WorkQueue() { Stop(); }

absl::Status WorkQueue::Submit(Op op) {
  if (failed_) return status();
  if (capture_ != nullptr) return capture_->AddNode(*this, std::move(op));
  Task task;
  task.op = std::move(op);
  Push(std::move(task));
  return absl::OkStatus();
}

uint64_t WorkQueue::Push(Task task) {
  std::unique_lock lock(mutex_);
  if (enqueued_ - done_ == ring_.size()) Grow();
  ring_[enqueued_ & (ring_.size() - 1)] = std::move(task);
  const uint64_t position = ++enqueued_;
  lock.unlock();
  runnable_.notify_one();
  return position;
}

void WorkQueue::Grow() {
  std::vector<Task> larger(ring_.size() * 2);
  for (uint64_t i = done_; i < enqueued_; ++i) {
    larger[i & (larger.size() - 1)] = std::move(ring_[i & (ring_.size() - 1)]);
  }
  ring_ = std::move(larger);
}

Mark WorkQueue::End() { return {shared_from_this(), enqueued()}; }

void WorkQueue::Release(uint64_t position) {
  {
    std::lock_guard lock(mutex_);
    if (position <= released_) return;
    released_ = position;
  }
  runnable_.notify_one();
}

void WorkQueue::Finish(uint64_t position) {
  Release(position);
  std::unique_lock lock(mutex_);
  progress_.wait(lock, [&] { return done_ >= position; });
}

bool WorkQueue::Done(uint64_t position) {
  std::lock_guard lock(mutex_);
  return done_ >= position;
}

uint64_t WorkQueue::enqueued() {
  std::lock_guard lock(mutex_);
  return enqueued_;
}

absl::Status WorkQueue::status() {
  if (!failed_) return absl::OkStatus();
  std::lock_guard lock(mutex_);
  return status_;
}

void WorkQueue::Stop() {
  if (!worker_.joinable()) return;
  if (capture_ != nullptr) capture_->Abandon(*this);
  FinishAll();
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  runnable_.notify_one();
  worker_.join();
}

void WorkQueue::EnterCapture(std::shared_ptr<CaptureState> capture, std::vector<int> frontier) {
  capture_ = std::move(capture);
  frontier_ = std::move(frontier);
  count_capture_(1);
}

void WorkQueue::LeaveCapture() {
  capture_ = nullptr;
  frontier_.clear();
  count_capture_(-1);
}

void WorkQueue::Work() {
  std::unique_lock lock(mutex_);
  while (true) {
    runnable_.wait(lock, [&] { return (done_ < enqueued_ && done_ < released_) || stopping_; });
    if (done_ == enqueued_) return;  // stopping: Stop() drained the queue
    const Task task = std::move(ring_[done_ & (ring_.size() - 1)]);
    ring_[done_ & (ring_.size() - 1)] = Task();
    lock.unlock();
    Execute(task);
    lock.lock();
    ++done_;
    progress_.notify_all();
  }
}

void WorkQueue::Execute(const Task& task) {
  // A mark of this very queue was reached already: tasks run in order.
  if (task.after.queue != nullptr && task.after.queue.get() != this) task.after.queue->Finish(task.after.position);
  if (failed_ || device_.lost()) return;  // the work after a failure is skipped
  absl::Status status;
  if (task.graph != nullptr) {
    for (size_t i = 0; i < task.graph->size(); ++i) {
      const Op* const other = task.replaced == nullptr ? nullptr : task.replaced->Find(static_cast<int>(i));
      status = RunOp(other == nullptr ? (*task.graph)[i] : *other);
      if (!status.ok()) break;
    }
  } else {
    status = RunOp(task.op);
  }
  if (status.ok()) return;
  if (IsDeviceLost(status)) device_.Lose(status);
  std::lock_guard lock(mutex_);
  status_ = std::move(status);
  failed_ = true;
}

absl::Status WorkQueue::RunOp(const Op& op) {
  if (guard_ == nullptr || op.kind == GraphNode::Kind::kOther) return op.Run();
  AccessGuard::Node node(*guard_, op);
  return op.Run();
}

}  // namespace pristine::host
