#include "buffers/staging_ring.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::buffers {

absl::StatusOr<std::unique_ptr<StagingRing>> StagingRing::Create(Device& device, int slots, int entries,
                                                                 size_t value_bytes) {
  auto ring = std::unique_ptr<StagingRing>(new StagingRing(device));
  ring->head_ = kSlotTable + static_cast<size_t>(entries) * sizeof(SlotEntry);
  ring->stride_ = (ring->head_ + value_bytes + 255) / 256 * 256;
  ring->blank_.resize(static_cast<size_t>(entries));
  ring->room_.resize(static_cast<size_t>(entries));
  const size_t bytes = ring->stride_ * static_cast<size_t>(slots);
  PRISTINE_ASSIGN_OR_RETURN(ring->pinned_, device.AllocatePinned(bytes, "staging slots"));
  PRISTINE_ASSIGN_OR_RETURN(ring->device_, device.Allocate(bytes, "staging slots on the device"));
  for (int i = 0; i < slots; ++i) {
    PRISTINE_ASSIGN_OR_RETURN(std::unique_ptr<Event> event, device.CreateEvent());
    ring->copied_.push_back({std::move(event)});
  }
  // A device slot that was never sent must not look armed.
  PRISTINE_ASSIGN_OR_RETURN(ring->copies_, device.CreateStream());
  PRISTINE_RETURN_IF_ERROR(ring->copies_->Fill(ring->device_.As<std::byte>(), std::byte{0}));
  PRISTINE_RETURN_IF_ERROR(ring->copies_->Synchronize());
  return ring;
}

void StagingRing::Describe(const BufferRecord& record) {
  SlotEntry& entry = blank_[static_cast<size_t>(record.refilled)];
  entry.buffer = record.id;
  entry.lower = record.lower;
  entry.upper = record.upper;
  entry.integers = record.integers && record.shadow == nullptr;  // changes are no values
  entry.indptr = record.indptr;
}

absl::Status StagingRing::Open(uint64_t sequence) {
  if (Copied& copied = CopiedOf(sequence); copied.pending && copied.marked) {
    PRISTINE_ASSIGN_OR_RETURN(const bool free, copied.event->IsReached());
    copied.pending = !free;
  }
  if (CopiedOf(sequence).pending) {
    return absl::ResourceExhaustedError(absl::StrCat("all ", slots(),
                                                     " staging slots are in flight: the slot for step ", sequence,
                                                     " still holds values that have not been copied; see WaitForSlot"));
  }
  sequence_ = sequence;
  slot_ = pinned_.host() + (sequence % copied_.size()) * stride_;
  used_ = head_;
  std::copy(blank_.begin(), blank_.end(), reinterpret_cast<SlotEntry*>(slot_ + kSlotTable));
  std::fill(room_.begin(), room_.end(), 0);
  return absl::OkStatus();
}

absl::Status StagingRing::Wait(uint64_t sequence) {
  Copied& copied = CopiedOf(sequence);
  if (!copied.pending) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(copied.marked ? copied.event->Synchronize() : its_device_.Synchronize());
  copied.pending = false;
  return absl::OkStatus();
}

void StagingRing::WaitAll() {
  for (const Copied& copied : copied_) copied.event->Synchronize().IgnoreError();
}

absl::Status StagingRing::Put(int entry, absl::Span<const std::byte> values, int64_t count) {
  PRISTINE_ASSIGN_OR_RETURN(std::byte* const to, Room(entry, values.size(), count));
  if (!values.empty()) std::memcpy(to, values.data(), values.size());
  return absl::OkStatus();
}

absl::StatusOr<std::byte*> StagingRing::Room(int entry, size_t bytes, int64_t count) {
  auto* const all = reinterpret_cast<SlotEntry*>(slot_ + kSlotTable);
  SlotEntry& placed = all[entry];
  size_t& room = room_[static_cast<size_t>(entry)];
  const size_t need = Footprint(std::max<size_t>(bytes, 1));  // no two entries start at one place
  if (need > room) {
    const size_t more = need - room;
    if (used_ + more > stride_) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the staging slot is full: ", more, " bytes wanted, ", stride_ - used_, " left of ", stride_));
    }
    if (placed.offset < 0) {
      placed.offset = static_cast<int64_t>(used_ - head_);
    } else {  // the entries behind it make room, so that a slot never needs more than the buffers' capacities
      std::byte* const end = slot_ + head_ + placed.offset + room;
      std::memmove(end + more, end, static_cast<size_t>(slot_ + used_ - end));
      for (size_t i = 0; i < blank_.size(); ++i) {
        if (all[i].offset > placed.offset) all[i].offset += static_cast<int64_t>(more);
      }
    }
    used_ += more;
    room = need;
  }
  placed.count = count;
  return slot_ + head_ + placed.offset;
}

void StagingRing::Pack(SlotHeader header, int entries, std::byte* to) const {
  const size_t table = static_cast<size_t>(entries) * sizeof(SlotEntry);
  header.entries = static_cast<uint16_t>(entries);
  header.values = static_cast<uint32_t>(kSlotTable + table);
  header.bytes = static_cast<uint32_t>(value_bytes());
  std::memcpy(to, &header, sizeof(header));
  std::memcpy(to + kSlotTable, slot_ + kSlotTable, table);
  std::memcpy(to + header.values, slot_ + head_, value_bytes());
}

// The copy is queued whatever becomes of its mark. A stream that failed says so at the launch.
absl::Status StagingRing::Send(Stream& stream, const SlotHeader& header) {
  absl::Status mark;
  return Copy(stream, header, mark);
}

absl::Status StagingRing::SendAhead(Stream& stream, uint64_t begun, SlotHeader& header) {
  const bool beside = begun + slots() > sequence_;
  SlotHeader none;  // a prologue that looks for the newest slot, of a step that is queued already, must not take it
  absl::Status mark;
  PRISTINE_RETURN_IF_ERROR(Copy(beside ? *copies_ : stream, none, mark));
  if (beside && !mark.ok()) return mark;  // the replay could not wait for the copy
  header.entries = static_cast<uint16_t>(blank_.size());
  header.values = static_cast<uint32_t>(head_);
  header.slot = static_cast<int32_t>(sequence_ % slots());
  return beside ? stream.Wait(*CopiedOf(sequence_).event) : absl::OkStatus();
}

absl::Status StagingRing::Copy(Stream& stream, SlotHeader header, absl::Status& mark) {
  header.entries = static_cast<uint16_t>(blank_.size());
  header.values = static_cast<uint32_t>(head_);
  std::memcpy(slot_, &header, sizeof(header));
  const size_t start = static_cast<size_t>(slot_ - pinned_.host());
  PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(device_.As<std::byte>().Sub(start, used_), {slot_, used_}));
  Copied& copied = CopiedOf(sequence_);
  copied.pending = true;
  mark = stream.Record(*copied.event);
  copied.marked = mark.ok();
  return absl::OkStatus();
}

}  // namespace pristine::buffers
