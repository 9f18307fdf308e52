// CaptureState: a capture in progress on the Host backend. It follows the rules of CUDA stream capture: each stream in
// the capture has a frontier, the nodes that its next node depends on; an event recorded in the capture carries the
// frontier of its stream; waiting for it adds that to the waiting stream's frontier, which thereby joins.
#ifndef PRISTINE_GRAPH_RUNTIME_HOST_CAPTURE_STATE_H_
#define PRISTINE_GRAPH_RUNTIME_HOST_CAPTURE_STATE_H_

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "graph_runtime/host/op.h"
#include "pristine/graph_runtime/graph.h"

namespace pristine::host {

class WorkQueue;

class CaptureState : public std::enable_shared_from_this<CaptureState> {
 public:
  // FAILED_PRECONDITION: `origin` is capturing.
  static absl::Status Begin(WorkQueue& origin);
  // Takes all streams out of the capture of `origin` and makes its graph; `body` as in Stream::DoEndCapture.
  // FAILED_PRECONDITION: `origin` did not begin a capture, or a fork is not joined.
  static absl::StatusOr<std::unique_ptr<Graph>> End(WorkQueue& origin, absl::Status body);

  absl::Status AddNode(WorkQueue& queue, Op op);
  // `queue` waits for an event that was recorded in this capture when its stream's frontier was `frontier`.
  // FAILED_PRECONDITION: the capture has ended, or `queue` is in another one, which is then dead.
  absl::Status Join(WorkQueue& queue, const std::vector<int>& frontier);
  // The first reason is kept, and returned by End.
  void Kill(absl::Status why);
  // A stream of the capture is being destroyed.
  void Abandon(WorkQueue& queue);

  bool empty() const { return ops_.empty(); }

 private:
  void ReleaseMembers();
  absl::Status CheckJoined(const std::vector<int>& frontier) const;

  WorkQueue* origin_ = nullptr;  // null: ended
  std::vector<WorkQueue*> members_;
  OpList ops_;
  std::vector<GraphEdge> edges_;
  absl::Status killed_;
};

}  // namespace pristine::host

#endif  // PRISTINE_GRAPH_RUNTIME_HOST_CAPTURE_STATE_H_
