#include "graph_runtime/host/host_stream.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "graph_runtime/host/host_memory.h"
#include "pristine/graph_runtime/host_native.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::host {

absl::Status HostEvent::RefuseCaptured(const char* call) {
  if (capture_ == nullptr) return absl::OkStatus();
  absl::Status error =
      absl::FailedPreconditionError(absl::StrCat("Event::", call, ": the event was recorded in a capture"));
  capture_->Kill(error);
  return error;
}

absl::StatusOr<bool> HostEvent::DoIsReached() {
  PRISTINE_RETURN_IF_ERROR(RefuseCaptured("IsReached"));
  if (mark_.queue == nullptr) return true;
  if (!mark_.queue->Done(mark_.position)) return false;
  PRISTINE_RETURN_IF_ERROR(mark_.queue->status());
  return true;
}

absl::Status HostEvent::DoSynchronize() {
  PRISTINE_RETURN_IF_ERROR(RefuseCaptured("Synchronize"));
  if (mark_.queue == nullptr) return absl::OkStatus();
  mark_.queue->Finish(mark_.position);
  return mark_.queue->status();
}

HostStream::HostStream(Device& device, const SealedRanges& sealed, bool deferred, AccessGuard* guard)
    : Stream(device),
      sealed_(sealed),
      owns_queue_(true),
      queue_(std::make_shared<WorkQueue>(device, deferred, guard, [this](int delta) { CountCapture(delta); })) {}

HostStream::HostStream(Device& device, const SealedRanges& sealed, std::shared_ptr<WorkQueue> queue)
    : Stream(device), sealed_(sealed), owns_queue_(false), queue_(std::move(queue)) {}

HostStream::~HostStream() {
  if (owns_queue_) {
    queue_->Stop();
  } else if (queue_->capture() == nullptr) {
    queue_->FinishAll();
  }
}

absl::Status HostStream::DoCopy(void* to, const void* from, size_t bytes) {
  PRISTINE_RETURN_IF_ERROR(sealed_.CheckWritable("Copy", to, bytes));
  return queue_->Submit(MakeCopy("copy", to, from, bytes));
}

absl::Status HostStream::DoCopyFromHost(void* to, const void* from, size_t bytes) {
  PRISTINE_RETURN_IF_ERROR(sealed_.CheckWritable("CopyFromHost", to, bytes));
  return queue_->Submit(MakeCopy("copy_from_host", to, from, bytes));
}

absl::Status HostStream::DoCopyToHost(void* to, const void* from, size_t bytes) {
  return queue_->Submit(MakeCopy("copy_to_host", to, from, bytes));
}

absl::Status HostStream::DoFill(void* to, std::byte value, size_t bytes) {
  PRISTINE_RETURN_IF_ERROR(sealed_.CheckWritable("Fill", to, bytes));
  return queue_->Submit(MakeFill(to, value, bytes));
}

absl::Status HostStream::DoRecord(Event& event) {
  auto* host_event = dynamic_cast<HostEvent*>(&event);
  if (host_event == nullptr || &host_event->device_ != &device()) {
    return absl::InvalidArgumentError("Record: the event belongs to another device");
  }
  PRISTINE_RETURN_IF_ERROR(queue_->status());
  host_event->capture_ = queue_->capture();
  if (host_event->capture_ != nullptr) {
    host_event->frontier_ = queue_->frontier();
    host_event->mark_ = {};
  } else {
    host_event->mark_ = queue_->End();
  }
  return absl::OkStatus();
}

absl::Status HostStream::DoWait(Event& event) {
  auto* host_event = dynamic_cast<HostEvent*>(&event);
  if (host_event == nullptr) return absl::InvalidArgumentError("Wait: the event belongs to another backend");
  PRISTINE_RETURN_IF_ERROR(queue_->status());
  if (host_event->capture_ != nullptr) return host_event->capture_->Join(*queue_, host_event->frontier_);
  if (host_event->mark_.queue == nullptr) return absl::OkStatus();  // never recorded
  if (queue_->capture() != nullptr) {
    absl::Status error =
        absl::FailedPreconditionError("Wait while capturing: the event was recorded outside the capture");
    queue_->capture()->Kill(error);
    return error;
  }
  Task task;
  task.after = host_event->mark_;
  queue_->Push(std::move(task));
  return absl::OkStatus();
}

absl::Status HostStream::DoSynchronize() {
  queue_->FinishAll();
  return queue_->status();
}

absl::StatusOr<bool> HostStream::DoIsIdle() {
  PRISTINE_RETURN_IF_ERROR(queue_->status());
  return queue_->Done(queue_->enqueued());
}

absl::Status HostStream::DoEnqueueHostKernel(const char* name, WriteList writes, std::function<int()> work) {
  return queue_->Submit(MakeKernel(name, /*foreign=*/false, std::move(writes), std::move(work)));
}

absl::Status HostStream::DoEnqueueCudaKernel(const char* name, absl::FunctionRef<int(CUstream_st*)>) {
  return absl::UnimplementedError(absl::StrCat(name, ": a CUDA kernel cannot run on the Host backend"));
}

absl::Status HostStream::DoBeginCapture() { return CaptureState::Begin(*queue_); }

absl::StatusOr<std::unique_ptr<Graph>> HostStream::DoEndCapture(absl::Status body) {
  return CaptureState::End(*queue_, std::move(body));
}

void HostStream::DoKillCapture(absl::Status why) {
  if (queue_->capture() != nullptr) queue_->capture()->Kill(std::move(why));
}

absl::Status EnqueueForeign(void* native, const char* name, std::function<int()> work) {
  if (native == nullptr || work == nullptr) return absl::InvalidArgumentError("EnqueueForeign: null stream or work");
  return static_cast<WorkQueue*>(native)->Submit(MakeKernel(name, /*foreign=*/true, WriteList(), std::move(work)));
}

absl::Status BeginCapture(void* native) {
  if (native == nullptr) return absl::InvalidArgumentError("BeginCapture: null stream");
  return CaptureState::Begin(*static_cast<WorkQueue*>(native));
}

absl::StatusOr<std::unique_ptr<Graph>> EndCapture(void* native) {
  if (native == nullptr) return absl::InvalidArgumentError("EndCapture: null stream");
  return CaptureState::End(*static_cast<WorkQueue*>(native), absl::OkStatus());
}

}  // namespace pristine::host
