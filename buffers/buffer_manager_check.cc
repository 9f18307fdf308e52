// Restoring and checking: Restore, CheckEqual, Poll, Verify, LastWriter.
#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "buffers/kernels/check_equal.h"
#include "buffers/manager_impl.h"
#include "buffers/rules.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {

using buffers::BufferState;
using buffers::Chunk;
using buffers::GraphEntry;
using buffers::GuardBand;
using buffers::PrologueMode;

absl::Status WaitForCopies(Stream& stream, const absl::Status& queued) {
  const absl::Status waited = stream.Synchronize();
  if (!waited.ok()) stream.Synchronize().IgnoreError();
  return queued.ok() ? waited : queued;
}

absl::Status BufferManager::Restore(Stream& stream) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  if (impl_->chunks.empty()) return absl::OkStatus();
  return impl_->Run(
      stream, impl_->Prologue(PrologueMode::kRestoreRestored, {-1, -1}, static_cast<int>(impl_->chunks.size()), -1));
}

absl::Status BufferManager::RestoreAll(Stream& stream, const Extent& bucket) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  return impl_->RestoreAll(stream, bucket, true, impl_->options.check != ManagerOptions::Check::kOff);
}

absl::Status BufferManager::Impl::RestoreAll(Stream& stream, const Extent& bucket, bool restored_too, bool compare) {
  if (chunks.empty()) return absl::OkStatus();
  PRISTINE_ASSIGN_OR_RETURN(const int graph, EntryOf(current_graph, bucket));
  buffers::PrologueParams params = Prologue(PrologueMode::kRestoreAll, bucket, static_cast<int>(chunks.size()), graph);
  params.restore = restored_too;
  params.compare_constants = compare;
  return Run(stream, params);
}

absl::Status BufferManager::CheckEqual(Stream& stream, const Buffer<int32_t>& expected, const Buffer<int32_t>& actual,
                                       const Extent& bucket) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  for (const int id : {expected.id, actual.id}) {
    if (impl_->Find(id) == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("CheckEqual: there is no buffer ", id, "; ids are in [0, ", impl_->buffers.size(), ")"));
    }
  }
  const BufferState& state = *impl_->Find(expected.id);
  const int64_t count = state.spec.axis.Count(bucket, state.record.capacity);
  const int64_t available = static_cast<int64_t>(std::min(expected.live.size(), actual.live.size()));
  if (count < 0 || count > available) {
    return absl::OutOfRangeError(absl::StrCat("CheckEqual of ", state.spec.name, " and ", name(actual.id), ": bucket ",
                                              bucket.ToString(), " has ", count, " elements, the shorter buffer has ",
                                              available));
  }
  PRISTINE_ASSIGN_OR_RETURN(const int graph, impl_->EntryOf(impl_->current_graph, bucket));
  buffers::CheckEqualParams params;
  params.expected = expected.live.address();
  params.actual = actual.live.address();
  params.count = count;
  params.buffer = actual.id;
  params.report_kind = static_cast<int32_t>(Violation::Kind::kPlanMismatch);
  params.ring = impl_->Ring(graph);
  return Launch(stream, buffers::kCheckEqual, params);
}

size_t BufferManager::Poll(absl::Span<Violation> out) {
  const Impl::Call call(*impl_);
  return call.entered() ? impl_->Poll(out) : 0;
}

size_t BufferManager::Impl::Poll(absl::Span<Violation> out) {
  size_t count = 0;
  for (int32_t graph = -1; count < out.size() && reports->NextUndeclared(out[count], graph); ++count) {
    SetGraph(out[count], graph);
  }
  for (ReportRecord record; count < out.size() && reports->NextRecord(record); ++count) {
    out[count] = ToViolation(record);
  }
  return count;
}

size_t BufferManager::FlightRecords(absl::Span<FlightRecord> out) const {
  const uint64_t newest = impl_->flights.Newest();
  const uint64_t kept = std::min({newest, uint64_t{impl_->flights.capacity()}, uint64_t{out.size()}});
  size_t count = 0;
  buffers::FlightEntry entry;
  for (uint64_t sequence = newest - kept + 1; sequence <= newest; ++sequence) {
    if (!impl_->flights.Read(sequence, entry)) continue;
    FlightRecord& record = out[count++];
    record = {};
    record.sequence = static_cast<int64_t>(sequence);
    if (entry.graph >= 0 && entry.graph < static_cast<int32_t>(impl_->graphs.size())) {
      record.graph = impl_->graphs[static_cast<size_t>(entry.graph)].graph;
    }
    record.bucket = entry.bucket;
    record.extent = entry.extent;
    if (entry.extent.requests >= 0) {
      impl_->ForEachTail(entry.bucket, [&](int place, const BufferState& buffer) {
        record.indptr_tails[static_cast<size_t>(place)] = {buffer.spec.name.c_str(), entry.tails[place]};
      });
    }
    record.replay = static_cast<int64_t>(entry.replay);
    record.status = static_cast<FlightRecord::Status>(entry.status);
    if (entry.violation >= 0) record.violation = static_cast<Violation::Kind>(entry.violation);
  }
  return count;
}

void BufferManager::Impl::SetGraph(Violation& violation, int32_t graph) const {
  if (graph < 0 || graph >= static_cast<int32_t>(graphs.size())) return;
  violation.graph = graphs[static_cast<size_t>(graph)].graph;
  violation.bucket = graphs[static_cast<size_t>(graph)].bucket;
}

Violation BufferManager::Impl::ToViolation(const ReportRecord& record) const {
  Violation violation;
  violation.kind = static_cast<Violation::Kind>(record.kind);
  violation.buffer = Find(record.buffer) == nullptr ? "" : Find(record.buffer)->spec.name.c_str();
  violation.index = record.index;
  violation.expected = record.expected;
  violation.actual = record.actual;
  violation.replay = static_cast<int64_t>(record.replay);
  SetGraph(violation, record.graph);
  return violation;
}

absl::Status BufferManager::Impl::ReadBack(Stream& stream, bool refilled_too, buffers::ReadBack& out) const {
  out.buffers.clear();
  size_t bytes = 0;
  const auto place = [&bytes](size_t size) {
    const size_t offset = bytes;
    bytes += size;
    return offset;
  };
  for (int id = 0; id < sealed_buffers; ++id) {
    const BufferState& buffer = *buffers[static_cast<size_t>(id)];
    const bool wanted = buffer.spec.role == Role::kConstant || (refilled_too && buffer.spec.role == Role::kRefilled);
    if (wanted) out.buffers.push_back({id, place(buffer.bytes)});
  }
  out.bands.clear();
  for (const buffers::Arena* arena : {&constants, &writable, &shadows}) {
    for (const GuardBand& band : arena->bands()) out.bands.push_back({&band, place(band.memory.size())});
  }
  out.bytes.resize(bytes);
  const absl::Span<std::byte> to = absl::MakeSpan(out.bytes);
  const auto queue = [&]() -> absl::Status {
    for (const auto& [id, offset] : out.buffers) {
      const BufferState& buffer = *buffers[static_cast<size_t>(id)];
      PRISTINE_RETURN_IF_ERROR(stream.CopyToHost(to.subspan(offset, buffer.bytes), {buffer.record.live, buffer.bytes}));
    }
    for (const auto& [band, offset] : out.bands) {
      PRISTINE_RETURN_IF_ERROR(stream.CopyToHost(to.subspan(offset, band->memory.size()), AsBytes(band->memory)));
    }
    return absl::OkStatus();
  };
  return WaitForCopies(stream, queue());
}

Violation BufferManager::Impl::Difference(Violation::Kind kind, const BufferState& buffer, const std::byte* was,
                                          const std::byte* is, int64_t index) {
  const int64_t size = buffer.record.element_bytes;
  Violation violation;
  violation.kind = kind;
  violation.buffer = buffer.spec.name.c_str();
  violation.index = index;
  violation.expected = buffers::ElementValue(was + index * size, size);
  violation.actual = buffers::ElementValue(is + index * size, size);
  return violation;
}

Violation BufferManager::Impl::BandDamage(const GuardBand& band, int64_t index, std::byte was, std::byte is) const {
  Violation violation;
  violation.kind = Violation::Kind::kGuardBand;
  violation.buffer = buffers[static_cast<size_t>(band.buffer)]->spec.name.c_str();
  violation.index = band.offset + index;
  violation.expected = static_cast<int64_t>(was);
  violation.actual = static_cast<int64_t>(is);
  return violation;
}

void BufferManager::Impl::CheckBands(const buffers::ReadBack& read, std::vector<Violation>& found) const {
  for (const auto& [band, offset] : read.bands) {
    const std::byte* const bytes = read.bytes.data() + offset;
    for (size_t i = 0; i < band->memory.size(); ++i) {
      if (bytes[i] == buffers::kGuardPattern) continue;
      found.push_back(BandDamage(*band, static_cast<int64_t>(i), buffers::kGuardPattern, bytes[i]));
      break;
    }
  }
}

absl::StatusOr<std::vector<Violation>> BufferManager::Verify(Stream& stream) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  Impl& impl = *impl_;
  // Reports are taken last: a failure before loses none.
  buffers::ReadBack read;
  PRISTINE_RETURN_IF_ERROR(impl.ReadBack(stream, false, read));
  std::vector<Violation> checked;
  for (const auto& [id, offset] : read.buffers) {
    const BufferState& buffer = *impl.buffers[static_cast<size_t>(id)];
    const std::byte* const live = read.bytes.data() + offset;
    const int64_t index =
        buffers::FirstDifference(buffer.original.data(), live, buffer.record.capacity, buffer.record.element_bytes);
    if (index != buffers::kNoIndex) {
      checked.push_back(Impl::Difference(Violation::Kind::kPolluted, buffer, buffer.original.data(), live, index));
    }
  }
  impl.CheckBands(read, checked);
  PRISTINE_RETURN_IF_ERROR(impl.CheckOriginals(stream, checked));
  PRISTINE_RETURN_IF_ERROR(impl.CheckShadows(stream, checked));

  std::vector<Violation> found(16);
  for (size_t count = 0;; found.resize(2 * found.size())) {
    count += impl.Poll(absl::MakeSpan(found).subspan(count));
    if (count < found.size()) {
      found.resize(count);
      break;
    }
  }
  found.insert(found.end(), checked.begin(), checked.end());
  return found;
}

absl::Status BufferManager::Impl::CheckOriginals(Stream& stream, std::vector<Violation>& found) const {
  std::vector<std::byte> bytes;
  for (const Chunk& chunk : chunks) {
    bytes.resize(chunk.originals.bytes());
    PRISTINE_RETURN_IF_ERROR(WaitForCopies(stream, stream.CopyToHost(absl::MakeSpan(bytes), chunk.originals.span())));
    for (int i = 0; i < chunk.table.count; ++i) {
      const BufferState& buffer = *buffers[static_cast<size_t>(chunk.first + i)];
      const std::byte* const sealed = bytes.data() + (buffer.record.original - chunk.originals.span().address());
      const int64_t index =
          buffers::FirstDifference(buffer.original.data(), sealed, buffer.record.capacity, buffer.record.element_bytes);
      if (index != buffers::kNoIndex) {
        found.push_back(Difference(Violation::Kind::kOriginalChanged, buffer, buffer.original.data(), sealed, index));
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<BufferManager::Writer> BufferManager::LastWriter(int buffer, int64_t index) const {
  const BufferState* const state = impl_->Find(buffer);
  if (state == nullptr || state->spec.role != Role::kRestored) {
    return absl::InvalidArgumentError(
        absl::StrCat("LastWriter of buffer ", buffer, " (\"", name(buffer), "\"), which is not a restored buffer"));
  }
  if (index < 0 || index >= state->record.capacity) {
    return absl::OutOfRangeError(
        absl::StrCat("LastWriter of ", state->spec.name, "[", index, "]; it has ", state->record.capacity));
  }
  const GraphEntry* last = nullptr;
  for (const GraphEntry& entry : impl_->graphs) {
    if (entry.order == 0 || !buffers::UsedBy(state->spec, entry.bucket)) continue;
    if (state->spec.axis.Count(entry.bucket, state->record.capacity) <= index) continue;
    if (last == nullptr || entry.order > last->order) last = &entry;
  }
  if (last == nullptr) {
    return absl::NotFoundError(absl::StrCat("no graph that covers ", state->spec.name, "[", index, "] ran yet"));
  }
  return Writer{last->graph, last->bucket, last->replay};
}

}  // namespace pristine
