#include "pristine/graph_runtime/graph_runner.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"
#include "pristine/graph_runtime/trace.h"

namespace pristine {
namespace {

absl::Status CheckOptions(const RunnerOptions& options) {
  if (options.buckets.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("GraphRunner '", options.name, "': no buckets; at least one"));
  }
  if (options.warmups < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("GraphRunner '", options.name, "': warmups is ", options.warmups, "; at least 0"));
  }
  for (size_t i = 0; i < options.buckets.size(); ++i) {
    const Extent& bucket = options.buckets[i];
    if (bucket.requests < 1 || bucket.tokens < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("GraphRunner '", options.name, "': bucket ", bucket.ToString(), "; both counts at least 1"));
    }
    if (i > 0 && (bucket == options.buckets[i - 1] || !options.buckets[i - 1].FitsIn(bucket))) {
      return absl::InvalidArgumentError(absl::StrCat("GraphRunner '", options.name, "': bucket ", bucket.ToString(),
                                                     " after ", options.buckets[i - 1].ToString(),
                                                     "; buckets must ascend in both counts, no two equal"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<GraphRunner>> GraphRunner::Create(RunnerOptions options, Body body) {
  PRISTINE_RETURN_IF_ERROR(CheckOptions(options));
  if (body == nullptr) return absl::InvalidArgumentError(absl::StrCat("GraphRunner '", options.name, "': no body"));
  return std::unique_ptr<GraphRunner>(new GraphRunner(std::move(options), std::move(body)));
}

GraphRunner::GraphRunner(RunnerOptions options, Body body)
    : options_(std::move(options)), body_(std::move(body)), entries_(options_.buckets.size()) {
  stats_.replays_by_bucket.resize(options_.buckets.size());
}

absl::Status GraphRunner::AddHook(GraphHook& hook) {
  if (stats_.captures > 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("AddHook: '", options_.name, "' has captured graphs that the hook knows nothing of"));
  }
  hooks_.push_back(&hook);
  return absl::OkStatus();
}

absl::Status GraphRunner::CaptureAll(Stream& stream) {
  for (int i = static_cast<int>(entries_.size()) - 1; i >= 0; --i) PRISTINE_RETURN_IF_ERROR(CaptureBucket(stream, i));
  return absl::OkStatus();
}

absl::Status GraphRunner::Recapture(Stream& stream, const Extent& bucket) {
  const int index = IndexOf(bucket);
  if (index < 0) {
    return absl::NotFoundError(absl::StrCat("Recapture: '", options_.name, "' has no bucket ", bucket.ToString()));
  }
  return CaptureBucket(stream, index);
}

absl::Status GraphRunner::CaptureBucket(Stream& stream, int index) {
  if (stream.capturing()) {
    return absl::FailedPreconditionError(absl::StrCat("'", options_.name, "': the stream is capturing already"));
  }
  const ScopedRange range("capture");
  const auto start = std::chrono::steady_clock::now();
  const Extent& bucket = options_.buckets[index];
  const RunInfo info = {options_.name.c_str(), bucket, bucket, 0, nullptr, nullptr};
  Entry made;
  const auto before_capture = [&]() -> absl::Status {
    for (GraphHook* hook : hooks_) PRISTINE_RETURN_IF_ERROR(hook->BeforeCapture(stream, info));
    return absl::OkStatus();
  };
  const auto record = [&](Stream& recording) -> absl::Status {
    for (GraphHook* hook : hooks_) PRISTINE_RETURN_IF_ERROR(hook->RecordPrologue(recording, info));
    return body_(recording, bucket);
  };
  const auto capture = [&]() -> absl::Status {
    for (int i = 0; i < options_.warmups; ++i) {
      PRISTINE_RETURN_IF_ERROR(before_capture());
      PRISTINE_RETURN_IF_ERROR(body_(stream, bucket));
      PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
    }
    PRISTINE_RETURN_IF_ERROR(before_capture());
    PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
    PRISTINE_ASSIGN_OR_RETURN(made.graph, Capture(stream, record));
    PRISTINE_ASSIGN_OR_RETURN(made.exec, made.graph->Instantiate());
    return absl::OkStatus();
  };
  const absl::Status outcome = capture();
  RunInfo captured = info;
  if (outcome.ok()) {
    captured.exec = made.exec.get();
    captured.captured = made.graph.get();
    entries_[index] = std::move(made);
    ++stats_.captures;
  }
  stats_.capture_ms += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  for (GraphHook* hook : hooks_) hook->AfterCapture(captured, outcome);
  if (outcome.ok()) entries_[index].signature = SignatureOf(*captured.captured, captured);
  return outcome;
}

uint64_t GraphRunner::SignatureOf(const Graph& graph, const RunInfo& info) const {
  Signature signature;
  signature.AddText(options_.name);
  signature.AddNumber(info.bucket.requests);
  signature.AddNumber(info.bucket.tokens);
  signature.AddNumber(static_cast<int64_t>(graph.nodes().size()));
  for (const GraphNode& node : graph.nodes()) {
    signature.AddNumber(static_cast<int64_t>(node.kind));
    signature.AddNumber(node.foreign ? 1 : 0);
    signature.AddText(node.name);
  }
  signature.AddNumber(static_cast<int64_t>(graph.edges().size()));
  for (const GraphEdge& edge : graph.edges()) {
    signature.AddNumber(edge.from);
    signature.AddNumber(edge.to);
  }
  signature.AddNumber(static_cast<int64_t>(hooks_.size()));
  for (const GraphHook* hook : hooks_) hook->AddToSignature(info, signature);
  return signature.hash();
}

absl::Status GraphRunner::Release(const Extent& bucket) {
  PRISTINE_RETURN_IF_ERROR(graph(bucket).status());
  entries_[IndexOf(bucket)] = Entry();
  return absl::OkStatus();
}

absl::StatusOr<Extent> GraphRunner::BucketFor(const Extent& extent) const {
  if (extent.requests < 1 || extent.tokens < 1) {
    return absl::InvalidArgumentError(absl::StrCat("'", options_.name, "': nothing to run for ", extent.ToString(),
                                                   "; both counts at least 1 (a named bucket can be replayed with 0)"));
  }
  for (const Extent& bucket : options_.buckets) {
    if (extent.FitsIn(bucket)) return bucket;
  }
  return absl::OutOfRangeError(absl::StrCat("'", options_.name, "': ", extent.ToString(),
                                            " is larger than the largest bucket ", options_.buckets.back().ToString()));
}

absl::Status GraphRunner::Replay(Stream& stream, const Extent& bucket, const Extent& extent) {
  const ScopedRange range("replay");
  if (extent.requests < 0 || extent.tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("Replay: '", options_.name, "': ", extent.ToString(), "; counts must not be negative"));
  }
  const int index = IndexOf(bucket);
  if (index < 0 || entries_[index].exec == nullptr) return graph(bucket).status();
  if (!extent.FitsIn(bucket)) {
    return absl::OutOfRangeError(absl::StrCat("Replay: '", options_.name, "': ", extent.ToString(),
                                              " does not fit in the bucket ", bucket.ToString()));
  }
  if (stream.capturing()) {
    return absl::FailedPreconditionError(absl::StrCat("Replay: '", options_.name, "': the stream is capturing"));
  }
  const RunInfo info = {options_.name.c_str(), bucket, extent, stats_.replays + 1, entries_[index].exec.get(), nullptr};
  absl::Status outcome;
  size_t ready = 0;  // hooks that agreed, and are owed an AfterReplay
  while (ready < hooks_.size()) {
    outcome = hooks_[ready]->BeforeReplay(stream, info);
    if (!outcome.ok()) break;
    ++ready;
  }
  if (outcome.ok()) outcome = entries_[index].exec->Launch(stream, /*capturing=*/false);
  if (outcome.ok()) {
    ++stats_.replays;
    ++stats_.replays_by_bucket[index];
  }
  for (size_t i = 0; i < ready; ++i) hooks_[i]->AfterReplay(stream, info, outcome);
  return outcome;
}

absl::StatusOr<const Graph*> GraphRunner::graph(const Extent& bucket) const {
  const int index = IndexOf(bucket);
  if (index < 0) {
    return absl::NotFoundError(absl::StrCat("'", options_.name, "' has no bucket ", bucket.ToString()));
  }
  if (entries_[index].graph == nullptr) {
    return absl::NotFoundError(absl::StrCat("'", options_.name, "': bucket ", bucket.ToString(), " was not captured"));
  }
  return entries_[index].graph.get();
}

absl::StatusOr<uint64_t> GraphRunner::SignatureHash(const Extent& bucket) const {
  PRISTINE_RETURN_IF_ERROR(graph(bucket).status());
  return entries_[IndexOf(bucket)].signature;
}

int GraphRunner::IndexOf(const Extent& bucket) const {
  for (size_t i = 0; i < options_.buckets.size(); ++i) {
    if (options_.buckets[i] == bucket) return static_cast<int>(i);
  }
  return -1;
}

}  // namespace pristine
