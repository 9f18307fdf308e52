// Buffers with deltas: Update, MoveRow, and what a step sends of them.
#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "buffers/manager_impl.h"
#include "buffers/rules.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {

using buffers::BufferState;
using buffers::Chunk;
using buffers::Deltas;
using buffers::GraphEntry;

namespace {

absl::Status NoDeltas(const BufferState& buffer, const char* call) {
  if (buffer.deltas != nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(call, " of ", buffer.spec.name, ", which takes whole refills only; set BufferSpec::deltas"));
}

}  // namespace

absl::Status BufferManager::UpdateBytes(int buffer, size_t element_bytes, absl::Span<const Range> ranges,
                                        absl::Span<const std::byte> values, size_t size) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  Impl& impl = *impl_;
  PRISTINE_ASSIGN_OR_RETURN(BufferState* const state, impl.Taker(buffer, element_bytes, "update"));
  PRISTINE_RETURN_IF_ERROR(NoDeltas(*state, "update"));
  const std::string& name = state->spec.name;
  const int64_t count = state->spec.axis.Count(impl.step_extent, state->record.capacity);
  int64_t left = static_cast<int64_t>(size);
  for (const Range& range : ranges) {
    if (range.count < 0 || range.count > left) {
      return absl::InvalidArgumentError(absl::StrCat("update of ", name, ": a range of ", range.count,
                                                     " elements where ", left, " of ", size, " values are left"));
    }
    if (range.first < 0 || range.first > count - range.count) {
      return absl::OutOfRangeError(absl::StrCat("update of ", name, " at [", range.first, ", +", range.count,
                                                "); extent ", impl.step_extent.ToString(), " has ", count,
                                                " elements"));
    }
    left -= range.count;
  }
  if (left != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("update of ", name, ": ", size, " values, and ranges of ", static_cast<int64_t>(size) - left));
  }
  for (const Range& range : ranges) {
    const size_t bytes = static_cast<size_t>(range.count) * element_bytes;
    state->deltas->Write(range.first, values.first(bytes));
    values.remove_prefix(bytes);
  }
  impl.Given(*state, count);
  return absl::OkStatus();
}

absl::Status BufferManager::MoveRowBytes(int buffer, size_t element_bytes, int64_t from, int64_t to) {
  const Impl::Call call(*impl_);
  PRISTINE_RETURN_IF_ERROR(call.status());
  Impl& impl = *impl_;
  PRISTINE_ASSIGN_OR_RETURN(BufferState* const state, impl.Taker(buffer, element_bytes, "move"));
  PRISTINE_RETURN_IF_ERROR(NoDeltas(*state, "move"));
  const std::string& name = state->spec.name;
  const Axis& axis = state->spec.axis;
  if (axis.unit != Axis::Unit::kRequests && axis.unit != Axis::Unit::kTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("move of row ", from, " of ", name, ": its axis counts neither requests nor tokens"));
  }
  const int64_t count = axis.Count(impl.step_extent, state->record.capacity);
  const int64_t rows = state->record.capacity / axis.per;
  if (from < 0 || from >= rows || to < 0 || to >= count / axis.per) {
    return absl::OutOfRangeError(absl::StrCat("move of row ", from, " of ", name, " to row ", to, "; there are ", rows,
                                              ", and extent ", impl.step_extent.ToString(), " has ", count / axis.per));
  }
  state->deltas->Move(from * axis.per, to * axis.per, axis.per);
  impl.Given(*state, count);
  return absl::OkStatus();
}

void BufferManager::Impl::ForEachWithDeltas(const GraphEntry& entry, absl::FunctionRef<void(BufferState&)> body) {
  if (entry.chunks == 0) return;
  const Chunk& last = chunks[static_cast<size_t>(entry.chunks) - 1];
  for (const int id : with_deltas) {
    BufferState& buffer = *buffers[static_cast<size_t>(id)];
    if (id < last.first + last.table.count && buffers::UsedBy(buffer.spec, entry.bucket)) body(buffer);
  }
}

absl::Status BufferManager::Impl::StageDeltas(const GraphEntry& entry, const Extent& extent) {
  absl::Status status;
  ForEachWithDeltas(entry, [&](BufferState& buffer) {
    const int64_t count = buffer.spec.axis.Count(extent, buffer.record.capacity);
    const absl::StatusOr<std::byte*> room = ring->Room(buffer.record.refilled, buffer.deltas->Settle(count), count);
    status.Update(room.status());
    if (room.ok()) buffer.deltas->Pack(*room);
  });
  return status;
}

DeviceSpan<const std::byte> BufferManager::shadow(int buffer) const {
  const BufferState* const state = impl_->Find(buffer);
  if (state == nullptr || state->deltas == nullptr) return {};
  return {state->record.shadow, state->bytes};
}

absl::Status BufferManager::Impl::CheckShadows(Stream& stream, std::vector<Violation>& found) const {
  const uint64_t consumed = reports->ReadBoard().consumed;
  std::vector<std::byte> bytes;
  for (const int id : with_deltas) {
    const BufferState& buffer = *buffers[static_cast<size_t>(id)];
    const Deltas& deltas = *buffer.deltas;
    if (id >= sealed_buffers || !deltas.known() || deltas.sequence() > consumed) continue;
    bytes.resize(buffers::ShadowBytes(static_cast<int64_t>(buffer.bytes)));
    const absl::Status copied = stream.CopyToHost(absl::MakeSpan(bytes), {buffer.record.shadow, bytes.size()});
    PRISTINE_RETURN_IF_ERROR(WaitForCopies(stream, copied));
    buffers::BufferRecord here = buffer.record;
    here.shadow = bytes.data();
    const int64_t tiles = (static_cast<int64_t>(buffer.bytes) + buffers::kTileBytes - 1) / buffers::kTileBytes;
    const uint64_t* const versions = buffers::ShadowVersions(here);
    const uint64_t* const missed_by =
        std::find_if(versions, versions + tiles, [&](uint64_t version) { return version != deltas.version(); });
    if (missed_by != versions + tiles) {
      Violation missed;
      missed.kind = Violation::Kind::kMissedUpdate;
      missed.buffer = buffer.spec.name.c_str();
      missed.expected = static_cast<int64_t>(deltas.version());
      missed.actual = static_cast<int64_t>(*missed_by);
      found.push_back(missed);
      continue;
    }
    const int64_t index = deltas.FirstDifference(bytes.data());
    if (index != buffers::kNoIndex) {
      found.push_back(Difference(Violation::Kind::kOriginalChanged, buffer, deltas.mirror(), bytes.data(), index));
    }
  }
  return absl::OkStatus();
}

}  // namespace pristine
