// What happens each step: BeginStep, Refill, BeforeReplay, and the runner's hooks.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <thread>

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
  PRISTINE_RETURN_IF_ERROR(call.status());
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
  PRISTINE_ASSIGN_OR_RETURN(const bool room, impl.HasRoom());
  if (!room) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "all ", impl.ends.size(), " staging slots are in flight: step ", impl.next_sequence - impl.ends.size(),
        " has not begun, and the last that has is ", impl.reports->ReadBoard().consumed, "; see WaitForSlot"));
  }
  PRISTINE_RETURN_IF_ERROR(impl.ring->Open(impl.next_sequence));
  ++impl.step;
  impl.step_open = true;
  impl.step_bucket = bucket;
  impl.step_extent = extent;
  return absl::OkStatus();
}

absl::Status BufferManager::WaitForSlot() {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  if (impl_->ring == nullptr) return absl::OkStatus();
  impl_->TakeBackUnlaunchedStep();
  PRISTINE_RETURN_IF_ERROR(impl_->WaitForRoom());
  return impl_->ring->Wait(impl_->next_sequence);
}

// Whether one more step keeps to the depth: the step that came so many before it has begun; or has ended, if a graph
// without the prologue was launched for it.
absl::StatusOr<bool> BufferManager::Impl::HasRoom() {
  if (next_sequence <= ends.size()) return true;
  const uint64_t oldest = next_sequence - ends.size();
  if (reports->ReadBoard().consumed >= oldest) return true;
  const End& end = EndOf(oldest);
  return end.sequence == oldest ? end.event->IsReached() : false;
}

absl::Status BufferManager::Impl::WaitForRoom() {
  for (;;) {
    PRISTINE_ASSIGN_OR_RETURN(const bool room, HasRoom());
    if (room) return absl::OkStatus();
    const End& end = EndOf(next_sequence - ends.size());
    if (end.sequence != next_sequence - ends.size()) return device.Synchronize();  // its end could not be marked
    if (device.deferred()) return end.event->Synchronize();
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

absl::Status BufferManager::RefillBytes(int buffer, size_t element_bytes, absl::Span<const std::byte> values,
                                        size_t size) {
  const ScopedRange range("refill");
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  Impl& impl = *impl_;
  PRISTINE_ASSIGN_OR_RETURN(BufferState* const taker, impl.Taker(buffer, element_bytes, "refill"));
  BufferState& state = *taker;
  const std::string& name = state.spec.name;
  const int64_t capacity = state.record.capacity;
  if (static_cast<int64_t>(size) > capacity) {
    return absl::OutOfRangeError(
        absl::StrCat("refill of ", name, " with ", size, " elements; the buffer holds ", capacity));
  }
  const int64_t expected = state.spec.axis.Count(impl.step_extent, capacity);
  if (state.spec.axis.unit != Axis::Unit::kPages && static_cast<int64_t>(size) != expected) {
    return absl::InvalidArgumentError(absl::StrCat("refill of ", name, " with ", size, " elements; extent ",
                                                   impl.step_extent.ToString(), " has ", expected));
  }
  if (state.deltas != nullptr) {
    state.deltas->Refill(values);
  } else {
    PRISTINE_RETURN_IF_ERROR(impl.Stage(state, values, static_cast<int64_t>(size)));
    if (!values.empty()) std::memcpy(state.values.data(), values.data(), values.size());
  }
  impl.Given(state, static_cast<int64_t>(size));
  return absl::OkStatus();
}

absl::StatusOr<BufferState*> BufferManager::Impl::Taker(int buffer, size_t element_bytes, const char* call) {
  if (Find(buffer) == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("there is no buffer ", buffer, "; ids are in [0, ", buffers.size(), ")"));
  }
  BufferState& state = *buffers[static_cast<size_t>(buffer)];
  const std::string& name = state.spec.name;
  if (state.spec.role != Role::kRefilled) {
    return absl::InvalidArgumentError(
        absl::StrCat("buffer ", name, " is ", ToString(state.spec.role), "; only refilled buffers take values"));
  }
  if (static_cast<int64_t>(element_bytes) != state.record.element_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("buffer ", name, " has elements of ", state.record.element_bytes,
                                                   " bytes; those of the ", call, " have ", element_bytes));
  }
  if (!step_open) {
    return absl::FailedPreconditionError(absl::StrCat(call, " of ", name, ": no step is open; call BeginStep first"));
  }
  if (!buffers::UsedBy(state.spec, step_bucket)) {
    return absl::FailedPreconditionError(absl::StrCat("buffer ", name, " belongs to bucket ",
                                                      state.spec.only_bucket->ToString(), "; the open step is for ",
                                                      step_bucket.ToString()));
  }
  return &state;
}

void BufferManager::Impl::Given(BufferState& buffer, int64_t count) {
  ++buffer.generation;
  buffer.step = step;
  buffer.count = count;
  buffer.extent = step_extent;
  buffer.refilled = buffer.generation;
  for (size_t i = 0; i < buffer.made_from.size(); ++i) {
    buffer.made_from[i] = Find(buffer.spec.derived_from[i])->refilled;
  }
}

absl::Status BufferManager::KeepBytes(int buffer) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
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
  if (state.deltas == nullptr) {
    const size_t bytes = static_cast<size_t>(state.count * state.record.element_bytes);
    PRISTINE_RETURN_IF_ERROR(impl.Stage(state, absl::MakeConstSpan(state.values).first(bytes), state.count));
  }
  ++state.generation;
  state.step = impl.step;
  return absl::OkStatus();
}

absl::Status BufferManager::Impl::Stage(BufferState& buffer, absl::Span<const std::byte> values, int64_t count) {
  if (absl::Status put = ring->Put(buffer.record.refilled, values, count); !put.ok()) {
    return absl::Status(put.code(), absl::StrCat("refill of ", buffer.spec.name, ": ",
                                                 std::string(put.message().data(), put.message().size())));
  }
  return absl::OkStatus();
}

// The launch that a step was armed for never happened (another hook refused it): the next step takes its number, so
// that the device sees one step armed and not two.
void BufferManager::Impl::TakeBackUnlaunchedStep() {
  if (!awaiting_launch.exchange(false)) return;
  --next_sequence;
  --replays;
  for (const int id : with_deltas) buffers[static_cast<size_t>(id)]->deltas->TakeBack(next_sequence);
}

absl::Status BufferManager::Impl::CheckOrder(Stream& stream) {
  if (last_stream == nullptr || last_stream == stream.native() || stream.capturing()) return absl::OkStatus();
  PRISTINE_ASSIGN_OR_RETURN(const bool reached, marked != nullptr ? marked->IsReached() : absl::StatusOr<bool>(false));
  const uint64_t consumed = reports->ReadBoard().consumed;
  if (reached && consumed + 1 >= next_sequence) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "step ", next_sequence - 1, " or a restore after it still runs on another stream (the last step that began is ",
      consumed, marked != nullptr ? "" : "; its end could not be marked: replay or restore there once more",
      "); one manager's replays follow each other, graphs that run at once need two managers"));
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
absl::Status BufferManager::Impl::SetInline(GraphEntry& entry, const buffers::SlotHeader& header, GraphExec& exec) {
  constexpr int kBytes = buffers::kInlineBytes[kPlace];
  if constexpr (kPlace + 1 < buffers::kInlineSizes) {
    if (entry.size > kPlace) return SetInline<kPlace + 1>(entry, header, exec);
  }
  auto& params = std::get<kPlace>(inline_params.all);
  params.base = *entry.params;
  if (header.slot < 0) {
    ring->Pack(header, entry.refilled, params.step);
  } else {
    std::memcpy(params.step, &header, sizeof(header));
  }
  std::fill(std::begin(params.salt), std::end(params.salt), header.sequence * 0x9E3779B97F4A7C15u);
  entry.carries = true;  // also if it fails: what the node holds is unknown then
  return exec.SetKernelParams(entry.node, buffers::kInlinePrologue<kBytes>, params);
}

// A launch after another size, which is another kernel, takes longer than larger parameters do: a graph keeps its size
// until many steps in a row would do with a smaller one.
void BufferManager::Impl::ChooseSize(GraphEntry& entry, size_t need) {
  constexpr int kPatience = 64;
  int size = 0;
  while (need > static_cast<size_t>(buffers::kInlineBytes[size])) ++size;
  entry.enough = std::max(entry.enough, size);
  if (size >= entry.size) {
    entry.size = size;
  } else if (++entry.smaller < kPatience) {
    return;
  } else {
    entry.size = entry.enough;
  }
  entry.smaller = 0;
  entry.enough = 0;
}

// Sets all the parameters at each step: whatever an update of the exec has made of them since does not matter.
absl::Status BufferManager::Impl::Deliver(Stream& stream, GraphEntry& entry, buffers::SlotHeader header,
                                          GraphExec* exec) {
  if (exec == nullptr || entry.node < 0) return ring->Send(stream, header);
  if (!entry.inlines) {
    PRISTINE_RETURN_IF_ERROR(PutBack(entry, *exec));
    return ring->Send(stream, header);
  }
  size_t need = ring->PackedBytes(entry.refilled);
  if (ring->value_bytes() > options.parameter_bytes || need > buffers::kInlineBytes[buffers::kInlineSizes - 1]) {
    PRISTINE_RETURN_IF_ERROR(ring->SendAhead(stream, reports->ReadBoard().consumed, header));
    need = sizeof(header);
  }
  ChooseSize(entry, need);
  return SetInline(entry, header, *exec);
}

absl::Status BufferManager::Impl::Arm(Stream& stream, int graph, const Extent& extent, GraphExec* exec) {
  GraphEntry& entry = graphs[static_cast<size_t>(graph)];
  PRISTINE_RETURN_IF_ERROR(CheckOrder(stream));
  PRISTINE_RETURN_IF_ERROR(CheckStep(entry, entry.bucket, extent));
  // Where the engine launches, it is seen here only that the step before has been queued.
  if (const uint64_t before = next_sequence - 1; before > 0 && EndOf(before).sequence != before) {
    PRISTINE_RETURN_IF_ERROR(MarkEnd(stream, before));
  }
  PRISTINE_RETURN_IF_ERROR(StageDeltas(entry, extent));
  buffers::SlotHeader header;
  header.sequence = next_sequence;
  header.bucket = entry.bucket;
  header.extent = extent;
  header.check = options.check == ManagerOptions::Check::kAlways ||
                 (options.check == ManagerOptions::Check::kSampled &&
                  next_sequence % static_cast<uint64_t>(options.sample_every) == 0);
  if (flights.capacity() > 0) {
    ForEachTail(entry.bucket, [&header](int place, const BufferState& buffer) {
      const auto* const values =
          reinterpret_cast<const int32_t*>(buffer.deltas == nullptr ? buffer.values.data() : buffer.deltas->mirror());
      header.indptr_tails[place] = buffer.count > 0 ? values[buffer.count - 1] : 0;
    });
  }
  PRISTINE_RETURN_IF_ERROR(Deliver(stream, entry, header, exec));
  ForEachWithDeltas(entry, [this](BufferState& buffer) { buffer.deltas->Sent(next_sequence); });
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
  PRISTINE_RETURN_IF_ERROR(call.status());
  if (stream.capturing()) return absl::FailedPreconditionError("BeforeReplay on a stream that is capturing");
  PRISTINE_ASSIGN_OR_RETURN(const int graph, impl_->EntryOf("", bucket));
  GraphEntry& entry = impl_->graphs[static_cast<size_t>(graph)];
  // Nothing recorded: it arms an eager RecordPrologue, which covers all.
  if (entry.chunks == 0) entry.chunks = static_cast<int>(impl_->chunks.size());
  if (!entry.recorded && entry.armed_unrecorded) {
    return absl::FailedPreconditionError(
        absl::StrCat("BeforeReplay of ", bucket.ToString(),
                     ": none of its graphs has a prologue, so nothing took the step that the last one armed; "
                     "RecordPrologue must come first in the capture"));
  }
  PRISTINE_RETURN_IF_ERROR(impl_->Arm(stream, graph, extent, entry.attached.get()));
  entry.armed_unrecorded = !entry.recorded;
  return absl::OkStatus();
}

absl::Status BufferManager::AttachExec(const Extent& bucket, void* graph, void* exec) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
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
  entry.carries = entry.inlines = false;
  if (impl.options.parameter_bytes > 0) {
    if (absl::Status tried = impl.TryInline(entry, *adopted); !tried.ok()) {
      entry.inlines = false;
      entry.node = -1;
      return absl::InvalidArgumentError(
          absl::StrCat("AttachExec: the exec takes no parameters for the graph's prologue",
                       entry.carries ? ", and holds none that work: instantiate it again: " : ": ",
                       std::string(tried.message().data(), tried.message().size())));
    }
  }
  entry.exec = adopted.get();
  entry.attached = std::move(adopted);
  return absl::OkStatus();
}

absl::Status BufferManager::DetachExec(const Extent& bucket) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  PRISTINE_ASSIGN_OR_RETURN(const int id, impl_->EntryOf("", bucket));
  GraphEntry& entry = impl_->graphs[static_cast<size_t>(id)];
  if (entry.attached == nullptr) {
    return absl::NotFoundError(absl::StrCat("DetachExec: bucket ", bucket.ToString(), " has no exec attached"));
  }
  PRISTINE_RETURN_IF_ERROR(Impl::PutBack(entry, *entry.attached));
  entry.exec = nullptr;
  entry.inlines = false;
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
  return Mark(stream, *replayed);
}

absl::Status BufferManager::Impl::Mark(Stream& stream, Event& event) {
  absl::Status status = stream.Record(event);
  marked = status.ok() ? &event : nullptr;
  return status;
}

absl::Status BufferManager::Impl::MarkEnd(Stream& stream, uint64_t sequence) {
  End& end = EndOf(sequence);
  end.sequence = 0;
  PRISTINE_RETURN_IF_ERROR(Mark(stream, *end.event));
  end.sequence = sequence;
  return absl::OkStatus();
}

// Gives the node each size of parameters once: the first use of a kernel loads it, which must not happen in a replay.
// A node that refuses one gets its steps through the ring; returns the first refusal.
absl::Status BufferManager::Impl::TryInline(GraphEntry& entry, GraphExec& exec) {
  entry.refilled = 0;
  for (int c = 0; c < entry.params->num_chunks; ++c) {
    entry.refilled += static_cast<int>(chunks[static_cast<size_t>(c)].refilled.size());
  }
  absl::Status refused;
  const auto set = [&]<int kBytes>(buffers::InlinePrologueParams<kBytes>& params) {
    params.base = *entry.params;
    const absl::Status status = exec.SetKernelParams(entry.node, buffers::kInlinePrologue<kBytes>, params);
    entry.carries |= status.ok();
    refused.Update(status);
  };
  std::apply([&](auto&... params) { (set(params), ...); }, inline_params.all);
  entry.inlines = refused.ok();
  PutBack(entry, exec).IgnoreError();
  return refused;
}

// So that the graph takes its steps from slots.
absl::Status BufferManager::Impl::PutBack(GraphEntry& entry, GraphExec& exec) {
  if (!entry.carries) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(exec.SetKernelParams(entry.node, buffers::kPrologue, *entry.params));
  entry.carries = false;
  return absl::OkStatus();
}

absl::Status BufferManager::RecordPrologue(Stream& stream, const Extent& bucket) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
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
  const int chunks_before = entry.chunks;
  if (capturing || entry.chunks == 0) entry.chunks = static_cast<int>(impl.chunks.size());
  if (absl::Status status = impl.LaunchPrologue(stream, graph); !status.ok()) {
    entry.chunks = chunks_before;  // what the engine captured before stays
    return status;
  }
  if (capturing) entry.recording = std::make_unique<buffers::PrologueParams>(impl.ReplayPrologue(entry, graph));
  entry.recorded = true;
  return absl::OkStatus();
}

absl::Status BufferManager::BeforeCapture(Stream& stream, const RunInfo& info) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  Impl& impl = *impl_;
  PRISTINE_RETURN_IF_ERROR(impl.Seal());
  PRISTINE_RETURN_IF_ERROR(impl.CheckCapacities(info.bucket, static_cast<int>(impl.chunks.size())));
  PRISTINE_ASSIGN_OR_RETURN(const int graph, impl.EntryOf(info.graph, info.bucket));
  GraphEntry& entry = impl.graphs[static_cast<size_t>(graph)];
  impl.current_graph = entry.graph;
  PRISTINE_RETURN_IF_ERROR(impl.RestoreAll(stream, info.bucket, impl.options.restore != ManagerOptions::Restore::kOff,
                                           impl.options.check != ManagerOptions::Check::kOff));
  entry.order = ++impl.runs;
  entry.replay = 0;
  return absl::OkStatus();
}

absl::Status BufferManager::RecordPrologue(Stream& stream, const RunInfo& info) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
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
  entry.inlines = entry.carries = false;
  if (entry.params == nullptr || impl_->options.parameter_bytes == 0) return;
  const std::vector<GraphNode>& nodes = info.captured->nodes();
  for (size_t i = 0; i < nodes.size() && entry.node < 0; ++i) {
    if (!nodes[i].foreign) entry.node = static_cast<int>(i);  // the first that was recorded through Stream
  }
  if (entry.node >= 0) impl_->TryInline(entry, *info.exec).IgnoreError();
}

absl::Status BufferManager::BeforeReplay(Stream& stream, const RunInfo& info) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  impl_->TakeBackUnlaunchedStep();
  PRISTINE_ASSIGN_OR_RETURN(const int graph, impl_->EntryOf(info.graph, info.bucket));
  if (impl_->graphs[static_cast<size_t>(graph)].exec != info.exec) {
    return absl::FailedPreconditionError(
        absl::StrCat("replay of ", info.graph, " ", info.bucket.ToString(),
                     ": another runner of that name captured the bucket later; on one manager, names differ"));
  }
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
  impl_->MarkEnd(stream, impl_->next_sequence - 1).IgnoreError();  // a stream that failed says so at the next call
}

}  // namespace pristine
