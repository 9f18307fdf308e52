// GraphRunner: one captured graph per batch bucket, for one mode (decode, target verify, …).
//
//   auto runner = GraphRunner::Create({.name = "decode", .buckets = {{8, 8}, {32, 32}}}, body);
//   (*runner)->AddHook(manager);
//   (*runner)->CaptureAll(stream);
//   …each step:  bucket = runner.BucketFor({5, 5});  …refill and plan for it…;  runner.Replay(stream, *bucket, {5, 5});
#ifndef PRISTINE_GRAPH_RUNTIME_GRAPH_RUNNER_H_
#define PRISTINE_GRAPH_RUNTIME_GRAPH_RUNNER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/graph_runtime/extent.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/graph_hook.h"

namespace pristine {

struct RunnerOptions {
  std::string name = "decode";  // in reports and traces
  std::vector<Extent> buckets;  // both counts > 0; ascending in both, no two equal
  int warmups = 2;              // eager runs before each capture. They execute, so whatever they write is real
};

// Not thread-safe: one thread at a time.
class GraphRunner {
 public:
  // Queues the step's kernels for `bucket`. Called eagerly by warm-ups and once inside the capture.
  using Body = std::function<absl::Status(Stream& stream, const Extent& bucket)>;

  struct Stats {
    int64_t captures = 0;
    int64_t replays = 0;
    double capture_ms = 0;                   // warm-ups, capture and instantiation, over all captures
    std::vector<int64_t> replays_by_bucket;  // parallel to buckets()
  };

  // INVALID_ARGUMENT: no buckets, not ascending, a count < 1, warmups < 0, no body.
  static absl::StatusOr<std::unique_ptr<GraphRunner>> Create(RunnerOptions options, Body body);

  // Hooks must outlive the runner. FAILED_PRECONDITION: something was captured already.
  absl::Status AddHook(GraphHook& hook);

  // Captures every bucket, largest first, so that memory peaks first. Blocks. On an error, buckets captured before it
  // stay.
  absl::Status CaptureAll(Stream& stream);
  // Captures one bucket, again if it was captured; the old graph is kept if that fails, and retired if not. Blocks.
  // NOT_FOUND: not in options.buckets.
  absl::Status Recapture(Stream& stream, const Extent& bucket);
  // Drops the graph of one bucket; a launch in flight completes. NOT_FOUND: not captured.
  absl::Status Release(const Extent& bucket);

  // The smallest bucket that `extent` fits in, captured or not. INVALID_ARGUMENT: nothing to run (a count < 1).
  // OUT_OF_RANGE: larger than the largest. Does not allocate when it succeeds.
  absl::StatusOr<Extent> BucketFor(const Extent& extent) const;

  // Runs the hooks and launches the graph of `bucket`. `extent` may be {0, 0}: all padding. Does not block, allocate,
  // lock or log. NOT_FOUND: not captured. OUT_OF_RANGE: `extent` does not fit in `bucket`. INVALID_ARGUMENT: a negative
  // count. FAILED_PRECONDITION: `stream` is capturing, or a hook refused.
  absl::Status Replay(Stream& stream, const Extent& bucket, const Extent& extent);

  const std::vector<Extent>& buckets() const { return options_.buckets; }
  const Stats& stats() const { return stats_; }
  // What was captured, for inspection. NOT_FOUND: not captured. Valid until Recapture or Release.
  absl::StatusOr<const Graph*> graph(const Extent& bucket) const;
  // A number for ranks to compare before their first replay (docs/capture_semantics.md, "Ranks"): equal where they
  // captured alike, in every process and on every machine. Over the runner's name, the bucket, each node's kind and
  // name in order, the edges, and what the hooks add (BufferManager: its options, and the buffers' names, roles, kinds,
  // axes and sizes). NOT_FOUND: not captured.
  absl::StatusOr<uint64_t> SignatureHash(const Extent& bucket) const;

 private:
  struct Entry {
    std::unique_ptr<Graph> graph;  // null: not captured
    std::unique_ptr<GraphExec> exec;
    uint64_t signature = 0;
  };
  GraphRunner(RunnerOptions options, Body body);
  int IndexOf(const Extent& bucket) const;  // -1: not one of ours
  absl::Status CaptureBucket(Stream& stream, int index);
  uint64_t SignatureOf(const Graph& graph, const RunInfo& info) const;

  const RunnerOptions options_;
  const Body body_;
  std::vector<GraphHook*> hooks_;
  std::vector<Entry> entries_;  // parallel to options_.buckets
  Stats stats_;
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_GRAPH_RUNNER_H_
