#include "pristine/buffers/pollution.h"

#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "buffers/manager_impl.h"
#include "buffers/rules.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {
namespace {

// For each node of ours, in order, whether foreign work directly precedes it. Empty if `body` cannot be captured.
std::vector<bool> FollowsForeignWork(Stream& stream, absl::FunctionRef<absl::Status(Stream&)> body) {
  std::vector<bool> follows;
  const absl::StatusOr<std::unique_ptr<Graph>> graph = Capture(stream, body);
  if (!graph.ok()) return follows;
  const std::vector<GraphNode>& nodes = (*graph)->nodes();
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].foreign) continue;
    bool after_foreign = false;
    for (const GraphEdge& edge : (*graph)->edges()) {
      if (edge.to == static_cast<int>(i) && nodes[static_cast<size_t>(edge.from)].foreign) after_foreign = true;
    }
    follows.push_back(after_foreign);
  }
  return follows;
}

// Takes the observer off again, whatever happens.
class Observing {
 public:
  Observing(Stream& stream, Stream::Observer observer) : stream_(stream) { stream.SetObserver(std::move(observer)); }
  ~Observing() { stream_.SetObserver(nullptr); }
  Observing(const Observing&) = delete;
  Observing& operator=(const Observing&) = delete;

 private:
  Stream& stream_;
};

}  // namespace

absl::StatusOr<std::vector<Violation>> FindPolluter(BufferManager& manager, Stream& stream, const Extent& bucket,
                                                    absl::FunctionRef<absl::Status(Stream&)> body) {
  BufferManager::Impl& impl = *manager.impl_;
  PRISTINE_RETURN_IF_ERROR(manager.Seal());
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  const std::vector<bool> follows_foreign = FollowsForeignWork(stream, body);

  PRISTINE_RETURN_IF_ERROR(manager.RestoreAll(stream, bucket));
  buffers::ReadBack before;
  PRISTINE_RETURN_IF_ERROR(impl.ReadBack(stream, true, before));

  std::vector<Violation> found;
  // Charges what changed since the last look to `node`.
  const auto look = [&](const std::string& node) -> absl::Status {
    buffers::ReadBack now;
    PRISTINE_RETURN_IF_ERROR(impl.ReadBack(stream, true, now));
    const size_t known = found.size();
    for (const auto& [id, offset] : now.buffers) {
      const buffers::BufferState& buffer = *impl.Find(id);
      if (!buffers::UsedBy(buffer.spec, bucket)) continue;
      const std::byte* const was = before.bytes.data() + offset;
      const std::byte* const is = now.bytes.data() + offset;
      const int64_t index = buffers::FirstDifference(was, is, buffer.record.capacity, buffer.record.element_bytes);
      if (index == buffers::kNoIndex) continue;
      found.push_back(BufferManager::Impl::Difference(Violation::Kind::kPolluted, buffer, was, is, index));
    }
    for (const auto& [band, offset] : now.bands) {
      const std::byte* const was = before.bytes.data() + offset;
      const std::byte* const is = now.bytes.data() + offset;
      const int64_t index = buffers::FirstDifference(was, is, static_cast<int64_t>(band->memory.size()), 1);
      if (index != buffers::kNoIndex) found.push_back(impl.BandDamage(*band, index, was[index], is[index]));
    }
    for (size_t i = known; i < found.size(); ++i) {
      found[i].bucket = bucket;
      const size_t length = node.copy(found[i].node, sizeof(found[i].node) - 1);
      found[i].node[length] = '\0';
    }
    before = std::move(now);
    return absl::OkStatus();
  };

  size_t node_number = 0;
  bool looking = false;  // copying back queues work of its own
  const auto after_node = [&](const std::string& node) -> absl::Status {
    if (looking) return absl::OkStatus();
    looking = true;
    const bool foreign = node_number < follows_foreign.size() && follows_foreign[node_number];
    ++node_number;
    absl::Status status = look(foreign ? absl::StrCat("before ", node) : node);
    looking = false;
    return status;
  };
  absl::Status outcome;
  {
    const Observing observing(stream, after_node);
    outcome = body(stream);
  }
  if (outcome.ok()) outcome = look("before the end of the body");

  PRISTINE_RETURN_IF_ERROR(impl.RestoreAll(stream, bucket, true, false));  // it was all found above
  for (const auto& [band, offset] : before.bands) {
    PRISTINE_RETURN_IF_ERROR(stream.Fill(band->memory, buffers::kGuardPattern));
  }
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  PRISTINE_RETURN_IF_ERROR(outcome);
  return found;
}

}  // namespace pristine
