// WorkQueue: the FIFO and the worker thread of one Host stream. What Stream::native() points to.
#ifndef PRISTINE_GRAPH_RUNTIME_HOST_WORK_QUEUE_H_
#define PRISTINE_GRAPH_RUNTIME_HOST_WORK_QUEUE_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "graph_runtime/host/op.h"
#include "pristine/graph_runtime/device.h"

namespace pristine::host {

class AccessGuard;
class CaptureState;
class WorkQueue;

// A point in a queue: the end of its first `position` tasks. Needs no task of its own.
struct Mark {
  std::shared_ptr<WorkQueue> queue;  // null: a point that was always reached
  uint64_t position = 0;
};

// Waits for `after`, then runs `graph` if there is one, with `replaced` in it, and `op` otherwise.
struct Task {
  Mark after;
  Op op;
  std::shared_ptr<const OpList> graph;
  std::shared_ptr<const ReplacedOps> replaced;
};

// Calls come from one thread at a time, but those marked "any thread".
class WorkQueue : public std::enable_shared_from_this<WorkQueue> {
 public:
  // `guard` may be null. `count_capture` is told +1 and -1 when the queue enters and leaves a capture.
  WorkQueue(Device& device, bool deferred, AccessGuard* guard, std::function<void(int)> count_capture);
  ~WorkQueue();

  Device& device() const { return device_; }

  // Queues `op`, or records it while capturing.
  absl::Status Submit(Op op);
  // Queues a task whatever the capture state. Allocates only when more tasks than ever before are queued.
  uint64_t Push(Task task);
  // The end of what is queued.
  Mark End();

  // Any thread. Lets the worker run the first `position` tasks (deferred mode; a no-op in eager mode).
  void Release(uint64_t position);
  // Any thread. Release, then blocks until they are done.
  void Finish(uint64_t position);
  void FinishAll() { Finish(enqueued()); }
  // Any thread. Whether the first `position` tasks are done; starts nothing.
  bool Done(uint64_t position);
  uint64_t enqueued();
  // Any thread. The first failure.
  absl::Status status();

  // Finishes everything and ends the worker; the queue stays valid as a mark's target.
  void Stop();

  // Capture state; see capture_state.h.
  const std::shared_ptr<CaptureState>& capture() const { return capture_; }
  void EnterCapture(std::shared_ptr<CaptureState> capture, std::vector<int> frontier);
  void LeaveCapture();
  std::vector<int>& frontier() { return frontier_; }

 private:
  void Work();
  void Execute(const Task& task);
  absl::Status RunOp(const Op& op);
  void Grow();  // doubles the ring; holds mutex_

  Device& device_;
  AccessGuard* const guard_;
  const std::function<void(int)> count_capture_;
  std::shared_ptr<CaptureState> capture_;
  std::vector<int> frontier_;  // nodes of capture_ that the next node depends on

  std::mutex mutex_;
  std::condition_variable runnable_;
  std::condition_variable progress_;
  std::vector<Task> ring_;  // task i lies at i % size; size is a power of two
  uint64_t enqueued_ = 0;
  uint64_t done_ = 0;
  uint64_t released_ = 0;
  bool stopping_ = false;
  absl::Status status_;
  std::atomic<bool> failed_{false};
  std::thread worker_;
};

}  // namespace pristine::host

#endif  // PRISTINE_GRAPH_RUNTIME_HOST_WORK_QUEUE_H_
