// Stream and Event of the Host backend.
#ifndef PRISTINE_GRAPH_RUNTIME_HOST_HOST_STREAM_H_
#define PRISTINE_GRAPH_RUNTIME_HOST_HOST_STREAM_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "graph_runtime/host/capture_state.h"
#include "graph_runtime/host/work_queue.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::host {

class SealedRanges;

class HostEvent : public Event {
 public:
  explicit HostEvent(Device& device) : Event(device), device_(device) {}

 private:
  friend class HostStream;
  absl::StatusOr<bool> DoIsReached() override;
  absl::Status DoSynchronize() override;
  absl::Status RefuseCaptured(const char* call);

  const Device& device_;
  Mark mark_;
  // Set instead of mark_ when last recorded in a capture.
  std::shared_ptr<CaptureState> capture_;
  std::vector<int> frontier_;
};

class HostStream : public Stream {
 public:
  // A stream of its own.
  HostStream(Device& device, const SealedRanges& sealed, bool deferred, AccessGuard* guard);
  // A second stream over the queue of another.
  HostStream(Device& device, const SealedRanges& sealed, std::shared_ptr<WorkQueue> queue);
  ~HostStream() override;

  const std::shared_ptr<WorkQueue>& queue() const { return queue_; }

 private:
  bool DoCapturing() const override { return queue_->capture() != nullptr; }
  absl::StatusOr<bool> DoAtCaptureHead() override { return queue_->capture()->empty(); }
  void* DoNative() const override { return queue_.get(); }
  absl::Status DoCopy(void* to, const void* from, size_t bytes) override;
  absl::Status DoCopyFromHost(void* to, const void* from, size_t bytes) override;
  absl::Status DoCopyToHost(void* to, const void* from, size_t bytes) override;
  absl::Status DoFill(void* to, std::byte value, size_t bytes) override;
  absl::Status DoRecord(Event& event) override;
  absl::Status DoWait(Event& event) override;
  absl::Status DoSynchronize() override;
  absl::StatusOr<bool> DoIsIdle() override;
  absl::Status DoEnqueueHostKernel(const char* name, WriteList writes, std::function<int()> work) override;
  absl::Status DoEnqueueCudaKernel(const char* name, absl::FunctionRef<int(CUstream_st*)> launch) override;
  absl::Status DoBeginCapture() override;
  absl::StatusOr<std::unique_ptr<Graph>> DoEndCapture(absl::Status body) override;
  void DoKillCapture(absl::Status why) override;

  const SealedRanges& sealed_;
  const bool owns_queue_;
  const std::shared_ptr<WorkQueue> queue_;
};

}  // namespace pristine::host

#endif  // PRISTINE_GRAPH_RUNTIME_HOST_HOST_STREAM_H_
