#include "graph_runtime/host/capture_state.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "graph_runtime/host/host_graph.h"
#include "graph_runtime/host/work_queue.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::host {

absl::Status CaptureState::Begin(WorkQueue& origin) {
  PRISTINE_RETURN_IF_ERROR(origin.status());
  if (origin.capture() != nullptr) return absl::FailedPreconditionError("the stream is capturing already");
  auto capture = std::make_shared<CaptureState>();
  capture->origin_ = &origin;
  capture->members_.push_back(&origin);
  origin.EnterCapture(capture, {});
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Graph>> CaptureState::End(WorkQueue& origin, absl::Status body) {
  const std::shared_ptr<CaptureState> capture = origin.capture();
  if (capture == nullptr || capture->origin_ != &origin) {
    PRISTINE_RETURN_IF_ERROR(body);
    return absl::FailedPreconditionError(capture == nullptr ? "the stream is not capturing"
                                                            : "the capture was begun on another stream");
  }
  const std::vector<int> frontier = origin.frontier();
  capture->ReleaseMembers();
  PRISTINE_RETURN_IF_ERROR(body);
  PRISTINE_RETURN_IF_ERROR(capture->killed_);
  PRISTINE_RETURN_IF_ERROR(capture->CheckJoined(frontier));
  return MakeHostGraph(origin.device(), std::move(capture->ops_), std::move(capture->edges_));
}

absl::Status CaptureState::AddNode(WorkQueue& queue, Op op) {
  PRISTINE_RETURN_IF_ERROR(killed_);
  const int node = static_cast<int>(ops_.size());
  for (const int dependency : queue.frontier()) edges_.push_back({dependency, node});
  ops_.push_back(std::move(op));
  queue.frontier().assign(1, node);
  return absl::OkStatus();
}

absl::Status CaptureState::Join(WorkQueue& queue, const std::vector<int>& frontier) {
  if (origin_ == nullptr) {
    return absl::FailedPreconditionError("Wait: the event was recorded in a capture that has ended");
  }
  if (&queue.device() != &origin_->device()) {
    return absl::InvalidArgumentError("Wait: the event was recorded in a capture on another device");
  }
  if (queue.capture() == nullptr) {
    queue.EnterCapture(shared_from_this(), frontier);
    members_.push_back(&queue);
    return absl::OkStatus();
  }
  if (queue.capture().get() != this) {
    absl::Status error = absl::FailedPreconditionError("Wait: the event was recorded in another capture");
    queue.capture()->Kill(error);
    return error;
  }
  std::vector<int>& mine = queue.frontier();
  mine.insert(mine.end(), frontier.begin(), frontier.end());
  std::sort(mine.begin(), mine.end());
  mine.erase(std::unique(mine.begin(), mine.end()), mine.end());
  return absl::OkStatus();
}

void CaptureState::Kill(absl::Status why) {
  if (killed_.ok()) killed_ = std::move(why);
}

void CaptureState::Abandon(WorkQueue& queue) {
  Kill(absl::FailedPreconditionError("a stream of the capture was destroyed"));
  if (origin_ == &queue) {
    ReleaseMembers();
    return;
  }
  members_.erase(std::find(members_.begin(), members_.end(), &queue));
  queue.LeaveCapture();
}

void CaptureState::ReleaseMembers() {
  const std::shared_ptr<CaptureState> self = shared_from_this();  // members hold the last references
  for (WorkQueue* member : members_) member->LeaveCapture();
  members_.clear();
  origin_ = nullptr;
}

absl::Status CaptureState::CheckJoined(const std::vector<int>& frontier) const {
  std::vector<bool> joined(ops_.size(), false);
  for (const int node : frontier) joined[node] = true;
  // Recorded order is topological, and edges_ is in the order of their targets.
  for (auto edge = edges_.rbegin(); edge != edges_.rend(); ++edge) {
    if (joined[edge->to]) joined[edge->from] = true;
  }
  for (size_t i = 0; i < ops_.size(); ++i) {
    if (!joined[i]) {
      return absl::FailedPreconditionError(
          absl::StrCat("capture: node ", i, " (", ops_[i].name,
                       ") is on a forked stream that was not joined; the origin stream must wait for an event of it"));
    }
  }
  return absl::OkStatus();
}

}  // namespace pristine::host
