// Stream and Event: a FIFO of asynchronous work, and marks in it.
//
//            Capture(stream, body)
//   idle  ----------------------->  capturing        Only the function that began a capture ends it, whatever `body`
//   does.
//         <-----------------------
#ifndef PRISTINE_GRAPH_RUNTIME_STREAM_H_
#define PRISTINE_GRAPH_RUNTIME_STREAM_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/kernel.h"
#include "pristine/graph_runtime/memory.h"

namespace pristine {

class Graph;
class GraphExec;

// A mark in a stream. Created by Device::CreateEvent; may be recorded again and again. Not thread-safe.
class Event {
 public:
  virtual ~Event() { --device_.live_events_; }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  // Whether the last recorded mark has been reached; true if none was recorded. Does not block, on HostDeferred
  // does not start work either. FAILED_PRECONDITION: recorded in a capture.
  absl::StatusOr<bool> IsReached();
  // Blocks until the last recorded mark is reached. FAILED_PRECONDITION: recorded in a capture.
  absl::Status Synchronize();

 protected:
  explicit Event(Device& device) : device_(device) { ++device_.live_events_; }

 private:
  virtual absl::StatusOr<bool> DoIsReached() = 0;
  virtual absl::Status DoSynchronize() = 0;

  Device& device_;
};

// A FIFO of asynchronous work. Every call but Synchronize returns when the work is queued (or, while capturing,
// recorded). Not thread-safe: one thread at a time. The first failure of queued work is kept and returned by every
// later call. The destructor waits for queued work.
class Stream {
 public:
  virtual ~Stream() { --device_.live_streams_; }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  Device& device() const { return device_; }
  // Whether what is queued now is recorded into a graph, ours or the engine's.
  bool capturing() const;
  // Whether the capture that this stream is in has recorded no node yet and depends on none. FAILED_PRECONDITION: not
  // capturing.
  absl::StatusOr<bool> AtCaptureHead();
  // cudaStream_t; on Host, what host_native.h takes. Work queued there by the caller is ordered with ours, and appears
  // in graphs as foreign nodes.
  void* native() const;

  // All four may be captured. Sizes must match (INVALID_ARGUMENT). The host range must stay valid and unchanged until
  // the copy has run; when captured, it is read (written) again by every replay.
  absl::Status Copy(DeviceSpan<std::byte> to, DeviceSpan<const std::byte> from);
  absl::Status CopyFromHost(DeviceSpan<std::byte> to, absl::Span<const std::byte> from);
  absl::Status CopyToHost(absl::Span<std::byte> to, DeviceSpan<const std::byte> from);
  absl::Status Fill(DeviceSpan<std::byte> to, std::byte value);

  // Record marks the end of what is queued; Wait makes later work of this stream wait for the mark. Waiting for an
  // event recorded in a capture joins that capture (fork); the origin stream must wait for an event of each joined
  // stream before the body ends (join), or the capture fails.
  absl::Status Record(Event& event);
  absl::Status Wait(Event& event);

  // Blocks until the queue is empty. FAILED_PRECONDITION while capturing, and the capture is dead.
  absl::Status Synchronize();
  // Does not block. FAILED_PRECONDITION while capturing, and the capture is dead.
  absl::StatusOr<bool> IsIdle();

  // Called after each kernel, copy and fill that this stream queues outside a capture, with its name; an error is
  // returned from the call that queued. For FindPolluter (buffers/pollution.h). Null switches it off.
  using Observer = std::function<absl::Status(const std::string& node)>;
  void SetObserver(Observer observer) { observer_ = std::move(observer); }

  // For Launch (launch.h), which is what callers use.
  absl::Status EnqueueHostKernel(const char* name, WriteList writes, std::function<int()> work);
  absl::Status EnqueueCudaKernel(const char* name, absl::FunctionRef<int(CUstream_st*)> launch);

 protected:
  explicit Stream(Device& device) : device_(device) { ++device_.live_streams_; }
  // Subclasses keep Device::capturing_streams right.
  void CountCapture(int delta) { device_.capturing_ += delta; }

 private:
  friend absl::StatusOr<std::unique_ptr<Graph>> Capture(Stream&, absl::FunctionRef<absl::Status(Stream&)>);
  friend class Device;  // kills the capture that allocates
  friend class GraphExec;

  // FAILED_PRECONDITION while capturing, and the capture is dead.
  absl::Status RefuseWhileCapturing(const char* call);
  absl::Status Observe(const char* node);
  // Device::Admit; a refusal while capturing kills the capture, as an error of the driver does.
  absl::Status Admit(Operation operation, const char* what);
  // Device::Settle, and Observe where it is well.
  absl::Status Queued(const char* call, absl::Status outcome, const char* node);

  virtual bool DoCapturing() const = 0;
  virtual absl::StatusOr<bool> DoAtCaptureHead() = 0;
  virtual void* DoNative() const = 0;
  virtual absl::Status DoCopy(void* to, const void* from, size_t bytes) = 0;
  virtual absl::Status DoCopyFromHost(void* to, const void* from, size_t bytes) = 0;
  virtual absl::Status DoCopyToHost(void* to, const void* from, size_t bytes) = 0;
  virtual absl::Status DoFill(void* to, std::byte value, size_t bytes) = 0;
  virtual absl::Status DoRecord(Event& event) = 0;
  virtual absl::Status DoWait(Event& event) = 0;
  virtual absl::Status DoSynchronize() = 0;
  virtual absl::StatusOr<bool> DoIsIdle() = 0;
  virtual absl::Status DoEnqueueHostKernel(const char* name, WriteList writes, std::function<int()> work) = 0;
  virtual absl::Status DoEnqueueCudaKernel(const char* name, absl::FunctionRef<int(CUstream_st*)> launch) = 0;
  virtual absl::Status DoBeginCapture() = 0;
  // Ends the capture whatever its state. `body` is what the body returned; not OK: drop the graph and return it.
  virtual absl::StatusOr<std::unique_ptr<Graph>> DoEndCapture(absl::Status body) = 0;
  // Marks the capture as failed by `why`; DoEndCapture then returns it.
  virtual void DoKillCapture(absl::Status why) = 0;

  Device& device_;
  Observer observer_;
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_STREAM_H_
