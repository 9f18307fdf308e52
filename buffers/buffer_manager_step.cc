// What happens each step: BeginStep, Refill, BeforeReplay, and the runner's hooks.
#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "buffers/manager_impl.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"
#include "pristine/graph_runtime/trace.h"

namespace pristine {

using buffers::BufferState;
using buffers::GraphEntry;
using buffers::PrologueMode;

absl::Status BufferManager::BeginStep(const Extent& bucket, const Extent& extent) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  Impl& impl = *impl_;
  if (extent.requests < 0 || extent.tokens < 0 || bucket.requests < 1 || bucket.tokens < 1) {
    return absl::InvalidArgumentError(absl::StrCat("a step of extent ", extent.ToString(), " in bucket ",
                                                   bucket.ToString(), "; extents are at least 0, buckets at least 1"));
  }
  if (!extent.FitsIn(bucket)) {
    return absl::OutOfRangeError(
        absl::StrCat("extent ", extent.ToString(), " does not fit in bucket ", bucket.ToString()));
  }
  if (impl.ring == nullptr) {
    return absl::FailedPreconditionError("nothing is sealed yet: capture a graph or call Seal() before the first step");
  }
  impl.TakeBackUnlaunchedStep();
  impl.step_open = false;
  PRISTINE_RETURN_IF_ERROR(impl.ring->Open(impl.next_sequence));
  ++impl.step;
  impl.step_open = true;
  impl.step_bucket = bucket;
  impl.step_extent = extent;
  return absl::OkStatus();
}

absl::Status BufferManager::WaitForSlot() {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  if (impl_->ring == nullptr) return absl::OkStatus();
  impl_->TakeBackUnlaunchedStep();
  return impl_->ring->Wait(impl_->next_sequence);
}

absl::Status BufferManager::RefillBytes(int buffer, size_t element_bytes, absl::Span<const std::byte> values,
                                        size_t size) {
  const ScopedRange range("refill");
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  Impl& impl = *impl_;
  if (impl.Find(buffer) == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("there is no buffer ", buffer, "; ids are in [0, ", impl.buffers.size(), ")"));
  }
  BufferState& state = *impl.buffers[static_cast<size_t>(buffer)];
  const std::string& name = state.spec.name;
  const int64_t capacity = state.record.capacity;
  if (state.spec.role != Role::kRefilled) {
    return absl::InvalidArgumentError(
        absl::StrCat("buffer ", name, " is ", ToString(state.spec.role), "; only refilled buffers take values"));
  }
  if (static_cast<int64_t>(element_bytes) != state.record.element_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("buffer ", name, " has elements of ", state.record.element_bytes,
                                                   " bytes; the refill's have ", element_bytes));
  }
  if (!impl.step_open) {
    return absl::FailedPreconditionError(absl::StrCat("refill of ", name, ": no step is open; call BeginStep first"));
  }
  if (!buffers::UsedBy(state.spec, impl.step_bucket)) {
    return absl::FailedPreconditionError(absl::StrCat("buffer ", name, " belongs to bucket ",
                                                      state.spec.only_bucket->ToString(), "; the open step is for ",
                                                      impl.step_bucket.ToString()));
  }
  if (static_cast<int64_t>(size) > capacity) {
    return absl::OutOfRangeError(
        absl::StrCat("refill of ", name, " with ", size, " elements; the buffer holds ", capacity));
  }
  const int64_t expected = state.spec.axis.Count(impl.step_extent, capacity);
  if (state.spec.axis.unit != Axis::Unit::kPages && static_cast<int64_t>(size) != expected) {
    return absl::InvalidArgumentError(absl::StrCat("refill of ", name, " with ", size, " elements; extent ",
                                                   impl.step_extent.ToString(), " has ", expected));
  }
  PRISTINE_RETURN_IF_ERROR(impl.Stage(state, values, static_cast<int64_t>(size)));
  if (!values.empty()) std::memcpy(state.values.data(), values.data(), values.size());
  state.count = static_cast<int64_t>(size);
  state.extent = impl.step_extent;
  state.refilled = state.generation;
  for (size_t i = 0; i < state.made_from.size(); ++i) {
    state.made_from[i] = impl.Find(state.spec.derived_from[i])->refilled;
  }
  return absl::OkStatus();
}

absl::Status BufferManager::KeepBytes(int buffer) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  Impl& impl = *impl_;
  if (impl.Find(buffer) == nullptr || impl.Find(buffer)->spec.role != Role::kRefilled) {
    return absl::InvalidArgumentError(absl::StrCat("Keep of buffer ", buffer, " (\"", name(buffer),
                                                   "\"); only refilled buffers have values to keep"));
  }
  BufferState& state = *impl.buffers[static_cast<size_t>(buffer)];
  const std::string& its_name = state.spec.name;
  if (!impl.step_open) {
    return absl::FailedPreconditionError(absl::StrCat("Keep of ", its_name, ": no step is open; call BeginStep first"));
  }
  if (!buffers::UsedBy(state.spec, impl.step_bucket)) {
    return absl::FailedPreconditionError(absl::StrCat("buffer ", its_name, " belongs to bucket ",
                                                      state.spec.only_bucket->ToString(), "; the open step is for ",
                                                      impl.step_bucket.ToString()));
  }
  if (state.count < 0) {
    return absl::FailedPreconditionError(absl::StrCat("Keep of ", its_name, ", which was never refilled"));
  }
  if (state.extent != impl.step_extent) {
    return absl::FailedPreconditionError(absl::StrCat("Keep of ", its_name, ": its values are for extent ",
                                                      state.extent.ToString(), "; the open step has ",
                                                      impl.step_extent.ToString()));
  }
  const size_t bytes = static_cast<size_t>(state.count * state.record.element_bytes);
  return impl.Stage(state, absl::MakeConstSpan(state.values).first(bytes), state.count);
}

absl::Status BufferManager::Impl::Stage(BufferState& buffer, absl::Span<const std::byte> values, int64_t count) {
  if (absl::Status put = ring->Put(buffer.record.refilled, values, count); !put.ok()) {
    return absl::Status(put.code(), absl::StrCat("refill of ", buffer.spec.name, ": ",
                                                 std::string(put.message().data(), put.message().size())));
  }
  ++buffer.generation;
  buffer.step = step;
  return absl::OkStatus();
}

// The launch that a step was armed for never happened (another hook refused it): the next step takes its number, so
// that the device sees one step armed and not two.
void BufferManager::Impl::TakeBackUnlaunchedStep() {
  if (!awaiting_launch.exchange(false)) return;
  --next_sequence;
  --replays;
}

absl::Status BufferManager::Impl::CheckOrder(Stream& stream) {
  if (last_stream == nullptr || last_stream == stream.native() || stream.capturing()) return absl::OkStatus();
  PRISTINE_ASSIGN_OR_RETURN(const bool reached, replayed->IsReached());
  const uint64_t consumed = reports->ReadBoard().consumed;
  if (reached && consumed + 1 >= next_sequence) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "step ", next_sequence - 1, " or a restore after it still runs on another stream (the last step that began is ",
      consumed, "); one manager's replays follow each other, graphs that run at once need two managers"));
}

absl::Status BufferManager::Impl::CheckStep(const GraphEntry& entry, const Extent& bucket, const Extent& extent) const {
  if (!step_open) {
    return absl::FailedPreconditionError(absl::StrCat("replay of ", bucket.ToString(), ": no step is open (", step,
                                                      " were begun); call BeginStep and refill first"));
  }
  if (step_bucket != bucket || step_extent != extent) {
    return absl::FailedPreconditionError(
        absl::StrCat("replay of bucket ", bucket.ToString(), " with extent ", extent.ToString(), ", but the open step ",
                     step, " is for bucket ", step_bucket.ToString(), " with extent ", step_extent.ToString()));
  }
  for (int c = 0; c < entry.chunks; ++c) {
    for (const BufferState* const refilled : chunks[static_cast<size_t>(c)].refilled) {
      const BufferState& buffer = *refilled;
      if (!buffers::UsedBy(buffer.spec, bucket)) continue;
      if (buffer.step != step) {
        return absl::FailedPreconditionError(absl::StrCat("buffer ", buffer.spec.name, " was last refilled in step ",
                                                          buffer.step, " (generation ", buffer.generation,
                                                          "); this is step ", step, ": Refill or Keep it"));
      }
      for (size_t d = 0; d < buffer.made_from.size(); ++d) {
        const BufferState& source = *Find(buffer.spec.derived_from[d]);
        if (buffer.made_from[d] != source.refilled) {
          return absl::FailedPreconditionError(absl::StrCat("buffer ", buffer.spec.name, " was made from ",
                                                            source.spec.name, " generation ", buffer.made_from[d],
                                                            ", which is now ", source.refilled));
        }
      }
    }
  }
  return absl::OkStatus();
}

template <int kPlace>
absl::Status BufferManager::Impl::SetInline(GraphEntry& entry, const buffers::SlotHeader& header, size_t need,
                                            GraphExec& exec) {
  constexpr int kBytes = buffers::kInlineBytes[kPlace];
  if constexpr (kPlace + 1 < buffers::kInlineSizes) {
    if (need > kBytes) return SetInline<kPlace + 1>(entry, header, need, exec);
  }
  auto& params = std::get<kPlace>(inline_params.all);
  params.base = *entry.params;
  if (header.slot < 0) {
    ring->Pack(header, refilled_buffers, params.step);
  } else {
    std::memcpy(params.step, &header, sizeof(header));
  }
  entry.carries = true;  // also if it fails: what the node holds is unknown then
  return exec.SetKernelParams(entry.node, buffers::kInlinePrologue<kBytes>, params);
}

// Sets all the parameters at each step: whatever an update of the exec has made of them since does not matter.
absl::Status BufferManager::Impl::Deliver(Stream& stream, GraphEntry& entry, buffers::SlotHeader header,
                                          GraphExec* exec) {
  if (exec == nullptr || entry.node < 0) return ring->Send(stream, header);
  const size_t need = ring->PackedBytes(refilled_buffers);
  if (ring->value_bytes() <= options.parameter_bytes && need <= buffers::kInlineBytes[buffers::kInlineSizes - 1]) {
    return SetInline(entry, header, need, *exec);
  }
  PRISTINE_RETURN_IF_ERROR(ring->SendAhead(stream, reports->ReadBoard().consumed, header));
  return SetInline(entry, header, sizeof(header), *exec);
}

absl::Status BufferManager::Impl::Arm(Stream& stream, int graph, const Extent& extent, GraphExec* exec) {
  GraphEntry& entry = graphs[static_cast<size_t>(graph)];
  PRISTINE_RETURN_IF_ERROR(CheckOrder(stream));
  PRISTINE_RETURN_IF_ERROR(CheckStep(entry, entry.bucket, extent));
  buffers::SlotHeader header;
  header.sequence = next_sequence;
  header.bucket = entry.bucket;
  header.extent = extent;
  header.check = options.check == ManagerOptions::Check::kAlways ||
                 (options.check == ManagerOptions::Check::kSampled &&
                  next_sequence % static_cast<uint64_t>(options.sample_every) == 0);
  PRISTINE_RETURN_IF_ERROR(Deliver(stream, entry, header, exec));
  entry.order = ++runs;
  entry.replay = static_cast<int64_t>(next_sequence);
  ++next_sequence;
  ++replays;
  step_open = false;
  last_stream = stream.native();
  return absl::OkStatus();
}

absl::Status BufferManager::BeforeReplay(Stream& stream, const Extent& bucket, const Extent& extent) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  if (stream.capturing()) return absl::FailedPreconditionError("BeforeReplay on a stream that is capturing");
  PRISTINE_ASSIGN_OR_RETURN(const int graph, impl_->EntryOf("", bucket));
  GraphEntry& entry = impl_->graphs[static_cast<size_t>(graph)];
  // Nothing recorded: it arms an eager RecordPrologue, which covers all.
  if (entry.chunks == 0) entry.chunks = static_cast<int>(impl_->chunks.size());
  return impl_->Arm(stream, graph, extent, entry.attached.get());
}

absl::Status BufferManager::AttachExec(const Extent& bucket, void* graph, void* exec) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  Impl& impl = *impl_;
  PRISTINE_ASSIGN_OR_RETURN(const int id, impl.EntryOf("", bucket));
  GraphEntry& entry = impl.graphs[static_cast<size_t>(id)];
  if (entry.attached != nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("AttachExec: bucket ", bucket.ToString(), " has an exec attached; DetachExec comes first"));
  }
  if (entry.recording == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("AttachExec: no capture recorded the prologue of bucket ", bucket.ToString()));
  }
  PRISTINE_ASSIGN_OR_RETURN(std::unique_ptr<GraphExec> adopted, impl.device.AdoptExec(graph, exec));
  PRISTINE_ASSIGN_OR_RETURN(entry.node, adopted->FindKernel(buffers::kPrologue, *entry.recording));
  entry.params = std::make_unique<buffers::PrologueParams>(*entry.recording);
  if (impl.options.parameter_bytes > 0) {
    if (absl::Status tried = impl.TryInline(entry, *adopted); !tried.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("AttachExec: the exec takes no parameters for the graph's prologue: ",
                       std::string(tried.message().data(), tried.message().size())));
    }
  } else {
    entry.node = -1;
  }
  entry.carries = false;
  entry.exec = adopted.get();
  entry.attached = std::move(adopted);
  return absl::OkStatus();
}

absl::Status BufferManager::DetachExec(const Extent& bucket) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  PRISTINE_ASSIGN_OR_RETURN(const int id, impl_->EntryOf("", bucket));
  GraphEntry& entry = impl_->graphs[static_cast<size_t>(id)];
  if (entry.attached == nullptr) {
    return absl::NotFoundError(absl::StrCat("DetachExec: bucket ", bucket.ToString(), " has no exec attached"));
  }
  if (entry.carries) {
    PRISTINE_RETURN_IF_ERROR(entry.attached->SetKernelParams(entry.node, buffers::kPrologue, *entry.params));
  }
  entry.carries = false;
  entry.exec = nullptr;
  entry.node = -1;
  entry.attached = nullptr;
  return absl::OkStatus();
}

absl::Status BufferManager::Impl::LaunchPrologue(Stream& stream, int graph) {
  const GraphEntry& entry = graphs[static_cast<size_t>(graph)];
  PRISTINE_RETURN_IF_ERROR(CheckCapacities(entry.bucket, entry.chunks));
  return Run(stream, ReplayPrologue(entry, graph));
}

buffers::PrologueParams BufferManager::Impl::ReplayPrologue(const GraphEntry& entry, int graph) const {
  buffers::PrologueParams params = Prologue(PrologueMode::kReplay, entry.bucket, entry.chunks, graph);
  params.restore = options.restore == ManagerOptions::Restore::kGraphHead;
  params.neutralise_restored = options.restore != ManagerOptions::Restore::kOff;
  return params;
}

absl::Status BufferManager::Impl::Run(Stream& stream, const buffers::PrologueParams& params) {
  PRISTINE_RETURN_IF_ERROR(CheckOrder(stream));
  PRISTINE_RETURN_IF_ERROR(Launch(stream, buffers::kPrologue, params));
  if (stream.capturing()) return absl::OkStatus();
  last_stream = stream.native();
  return stream.Record(*replayed);
}

// Gives the node each size of parameters once: the first use of a kernel loads it, which must not happen in a replay.
absl::Status BufferManager::Impl::TryInline(const GraphEntry& entry, GraphExec& exec) {
  const auto set = [&]<int kBytes>(buffers::InlinePrologueParams<kBytes>& params) {
    params.base = *entry.params;
    return exec.SetKernelParams(entry.node, buffers::kInlinePrologue<kBytes>, params);
  };
  absl::Status status;
  std::apply([&](auto&... params) { (status.Update(set(params)), ...); }, inline_params.all);
  status.Update(exec.SetKernelParams(entry.node, buffers::kPrologue, *entry.params));
  return status;
}

absl::Status BufferManager::RecordPrologue(Stream& stream, const Extent& bucket) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  Impl& impl = *impl_;
  const bool capturing = stream.capturing();
  if (capturing) {
    PRISTINE_ASSIGN_OR_RETURN(const bool at_head, stream.AtCaptureHead());
    if (!at_head) {
      return absl::FailedPreconditionError(absl::StrCat("prologue of bucket ", bucket.ToString(),
                                                        ": the capture has nodes already; it must be the first"));
    }
    if (!impl.sealed()) {
      return absl::FailedPreconditionError(absl::StrCat(impl.buffers.size() - static_cast<size_t>(impl.sealed_buffers),
                                                        " buffers are not sealed, and sealing blocks: call Seal() "
                                                        "before the capture begins"));
    }
  } else {
    PRISTINE_RETURN_IF_ERROR(impl.Seal());
  }
  impl.current_graph = "";
  PRISTINE_ASSIGN_OR_RETURN(const int graph, impl.EntryOf("", bucket));
  GraphEntry& entry = impl.graphs[static_cast<size_t>(graph)];
  if (entry.attached != nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("prologue of bucket ", bucket.ToString(),
                                                      ": its steps go to the exec that is attached; DetachExec first"));
  }
  if (capturing || entry.chunks == 0) entry.chunks = static_cast<int>(impl.chunks.size());
  PRISTINE_RETURN_IF_ERROR(impl.LaunchPrologue(stream, graph));
  if (capturing) entry.recording = std::make_unique<buffers::PrologueParams>(impl.ReplayPrologue(entry, graph));
  return absl::OkStatus();
}

absl::Status BufferManager::BeforeCapture(Stream& stream, const RunInfo& info) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  Impl& impl = *impl_;
  PRISTINE_RETURN_IF_ERROR(impl.Seal());
  PRISTINE_RETURN_IF_ERROR(impl.CheckCapacities(info.bucket, static_cast<int>(impl.chunks.size())));
  PRISTINE_ASSIGN_OR_RETURN(const int graph, impl.EntryOf(info.graph, info.bucket));
  GraphEntry& entry = impl.graphs[static_cast<size_t>(graph)];
  impl.current_graph = entry.graph;
  entry.order = ++impl.runs;
  entry.replay = 0;
  return impl.RestoreAll(stream, info.bucket, impl.options.restore != ManagerOptions::Restore::kOff,
                         impl.options.check != ManagerOptions::Check::kOff);
}

absl::Status BufferManager::RecordPrologue(Stream& stream, const RunInfo& info) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  PRISTINE_ASSIGN_OR_RETURN(const int graph, impl_->EntryOf(info.graph, info.bucket));
  GraphEntry& entry = impl_->graphs[static_cast<size_t>(graph)];
  entry.chunks = static_cast<int>(impl_->chunks.size());
  // Where other nodes come first, which of them is the prologue is not known: its steps come through the ring.
  PRISTINE_ASSIGN_OR_RETURN(const bool at_head, stream.AtCaptureHead());
  entry.recording = nullptr;
  if (at_head) {
    entry.recording = std::make_unique<buffers::PrologueParams>(impl_->ReplayPrologue(entry, graph));
  }
  return impl_->LaunchPrologue(stream, graph);
}

void BufferManager::AfterCapture(const RunInfo& info, const absl::Status& outcome) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return;
  const absl::StatusOr<int> graph = impl_->EntryOf(info.graph, info.bucket);
  if (!graph.ok()) return;
  GraphEntry& entry = impl_->graphs[static_cast<size_t>(*graph)];
  if (!outcome.ok()) {
    entry.chunks = entry.chunks_before;
    return;
  }
  entry.chunks_before = entry.chunks;
  entry.params = std::move(entry.recording);
  entry.exec = info.exec;
  entry.node = -1;
  entry.carries = false;
  if (entry.params == nullptr || impl_->options.parameter_bytes == 0) return;
  const std::vector<GraphNode>& nodes = info.captured->nodes();
  for (size_t i = 0; i < nodes.size() && entry.node < 0; ++i) {
    if (!nodes[i].foreign) entry.node = static_cast<int>(i);  // the first that was recorded through Stream
  }
  if (!impl_->TryInline(entry, *info.exec).ok()) entry.node = -1;
}

absl::Status BufferManager::BeforeReplay(Stream& stream, const RunInfo& info) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  impl_->TakeBackUnlaunchedStep();
  PRISTINE_ASSIGN_OR_RETURN(const int graph, impl_->EntryOf(info.graph, info.bucket));
  PRISTINE_RETURN_IF_ERROR(impl_->Arm(stream, graph, info.extent, info.exec));
  impl_->awaiting_launch = true;
  return absl::OkStatus();
}

void BufferManager::AfterReplay(Stream& stream, const RunInfo&, const absl::Status& outcome) {
  // Whoever else is inside a call: a step that was launched is not to be taken back.
  const bool launched = outcome.ok() && impl_->awaiting_launch.exchange(false);
  const Impl::Call call(*impl_);
  if (!call.entered()) return;
  if (!launched) {
    impl_->TakeBackUnlaunchedStep();
    return;
  }
  stream.Record(*impl_->replayed).IgnoreError();  // a stream that failed says so at the next call
}

}  // namespace pristine
