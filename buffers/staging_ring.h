// StagingRing: where a step's values wait between Refill and the prologue that places them. A pinned slot per step in
// flight, which the host fills, and a device slot for each, which a prologue reads. A small step is packed into the
// prologue's parameters instead, and its slots stay free.
#ifndef PRISTINE_BUFFERS_STAGING_RING_H_
#define PRISTINE_BUFFERS_STAGING_RING_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "buffers/kernels/prologue.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::buffers {

class StagingRing {
 public:
  // `entries`: places in each slot's entry table. `value_bytes`: room for values in each slot.
  static absl::StatusOr<std::unique_ptr<StagingRing>> Create(Device& device, int slots, int entries,
                                                             size_t value_bytes);

  // From the next Open on, the entry of `record` carries its rule.
  void Describe(const BufferRecord& record);

  // Empties the slot of step `sequence`. RESOURCE_EXHAUSTED: the copy out of it has not run yet.
  absl::Status Open(uint64_t sequence);
  // Blocks until Open(sequence) would find its slot.
  absl::Status Wait(uint64_t sequence);
  // Puts `values` into the open slot as entry `entry`; again for the same entry replaces them and gives back what they
  // occupied. RESOURCE_EXHAUSTED: full.
  absl::Status Put(int entry, absl::Span<const std::byte> values, int64_t count);
  // The same, for the caller to write `bytes` there.
  absl::StatusOr<std::byte*> Room(int entry, size_t bytes, int64_t count);
  // Blocks until no slot is being copied.
  void WaitAll();
  // What Pack writes, with a table of `entries` places.
  size_t PackedBytes(int entries) const {
    return kSlotTable + static_cast<size_t>(entries) * sizeof(SlotEntry) + value_bytes();
  }
  // Of the open slot's values.
  size_t value_bytes() const { return used_ - head_; }
  // Copies the open slot to `to`, the rest of its table left out.
  void Pack(SlotHeader header, int entries, std::byte* to) const;
  // Queues the copy of the open slot to the device; the pinned slot is busy until it has run. The next prologue that
  // takes its step from a slot takes this one.
  absl::Status Send(Stream& stream, const SlotHeader& header);
  // The same for a prologue on `stream` whose parameters hold the header; `header` comes back as it is to be there.
  // `begun`: the last step whose prologue has begun. If that is younger than the step that had the slot before, nothing
  // reads the slot any more, and the copy runs beside what `stream` does until then.
  absl::Status SendAhead(Stream& stream, uint64_t begun, SlotHeader& header);

  const std::byte* device_slots() const { return device_.As<std::byte>().address(); }
  int64_t stride() const { return static_cast<int64_t>(stride_); }
  uint32_t slots() const { return static_cast<uint32_t>(copied_.size()); }
  int entries() const { return static_cast<int>(blank_.size()); }

  // What `bytes` of values occupy.
  static size_t Footprint(size_t bytes) { return (bytes + 15) / 16 * 16; }

 private:
  explicit StagingRing(Device& device) : its_device_(device) {}
  // `mark`: whether the end of the copy could be marked.
  absl::Status Copy(Stream& stream, SlotHeader header, absl::Status& mark);
  struct Copied {
    std::unique_ptr<Event> event;  // the last copy out of the slot
    bool pending = false;          // it may not have run yet
    bool marked = true;  // by `event`; false: the mark was refused, so only the whole device can be waited for
  };
  Copied& CopiedOf(uint64_t sequence) { return copied_[sequence % copied_.size()]; }

  Device& its_device_;
  PinnedBuffer pinned_;
  DeviceBuffer device_;
  std::unique_ptr<Stream> copies_;
  std::vector<Copied> copied_;    // per slot
  std::vector<size_t> room_;      // per entry: bytes it occupies in the open slot
  std::vector<SlotEntry> blank_;  // the table of a slot just opened: no values, but each entry's rule
  size_t stride_ = 0;
  size_t head_ = 0;        // header and table
  uint64_t sequence_ = 0;  // of the open slot
  std::byte* slot_ = nullptr;
  size_t used_ = 0;
};

}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_STAGING_RING_H_
