// GraphHook: what GraphRunner calls around captures and replays. graph_runtime never learns who implements it.
#ifndef PRISTINE_GRAPH_RUNTIME_GRAPH_HOOK_H_
#define PRISTINE_GRAPH_RUNTIME_GRAPH_HOOK_H_

#include <cstdint>

#include "absl/status/status.h"
#include "pristine/graph_runtime/extent.h"
#include "pristine/graph_runtime/signature.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine {

class Graph;
class GraphExec;

struct RunInfo {
  const char* graph = "";  // the runner's name; valid during the call
  Extent bucket;           // what the graph is captured for
  Extent extent;           // the real part of this replay; equals bucket for captures and warm-ups
  int64_t replay = 0;      // 1, 2, … over all buckets of the runner; 0 for captures and warm-ups
  // What is (Before-, AfterReplay) launched, what was (AfterCapture) made; null elsewhere. A hook may set the params of
  // nodes that it recorded.
  GraphExec* exec = nullptr;
  const Graph* captured = nullptr;  // what `exec` was made from, in AfterCapture
};

// For each bucket:  [BeforeCapture, body run eagerly] x warm-ups,  BeforeCapture,  Capture( RecordPrologue, body ),
//                   AfterCapture
// For each replay:  BeforeReplay, launch, AfterReplay.
// Called on the runner's thread, in the order hooks were added. An error stops the capture or the replay, and is
// returned.
class GraphHook {
 public:
  virtual ~GraphHook() = default;
  // Queues work that puts the world back before a warm-up or a capture. Not part of the graph.
  virtual absl::Status BeforeCapture(Stream& stream, const RunInfo& info) = 0;
  // Queues what must be at the head of the graph.
  virtual absl::Status RecordPrologue(Stream& stream, const RunInfo& info) = 0;
  // After the capture and instantiation of `info`, with what became of them.
  virtual void AfterCapture(const RunInfo& info, const absl::Status& outcome) = 0;
  // Checks and arms the replay. Nothing was launched yet.
  virtual absl::Status BeforeReplay(Stream& stream, const RunInfo& info) = 0;
  // After the launch was queued, or refused (`outcome`). Only for hooks whose BeforeReplay succeeded.
  virtual void AfterReplay(Stream& stream, const RunInfo& info, const absl::Status& outcome) = 0;
  // After AfterCapture of each capture that succeeded: adds what this hook gave the graph, for
  // GraphRunner::SignatureHash. Nothing that may differ between ranks, such as addresses. By default nothing.
  virtual void AddToSignature(const RunInfo&, Signature&) const {}
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_GRAPH_HOOK_H_
