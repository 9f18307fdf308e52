// Deltas: the host's side of a buffer with BufferSpec::deltas. It holds what the buffer should hold (the mirror) and
// which elements of it the device's shadow lacks, so that a step sends those, or all of it where that is less or where
// the shadow's state is not known. Whatever lies past
// the elements of the last step that was armed is padding, here and there.
#ifndef PRISTINE_BUFFERS_DELTAS_H_
#define PRISTINE_BUFFERS_DELTAS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "buffers/kernels/prologue.h"

namespace pristine::buffers {

class Deltas {
 public:
  explicit Deltas(const BufferRecord& record);

  // Change the mirror; elements in bounds. Do not allocate. Those that hold their value already cost the step nothing.
  void Refill(absl::Span<const std::byte> values);
  void Write(int64_t first, absl::Span<const std::byte> values);
  void Move(int64_t from, int64_t to, int64_t count);  // `from` becomes padding

  // The step to be armed has `count` elements. Returns the bytes that Pack writes.
  size_t Settle(int64_t count);
  // Writes the DeltaHeader of the step, and what belongs to it.
  void Pack(std::byte* to);
  // What was packed last is on its way, in step `sequence`; what lies past its elements is padding from now on.
  void Sent(uint64_t sequence);
  // Step `sequence` was never launched.
  void TakeBack(uint64_t sequence);

  // Whether the shadow, once step sequence() has run, holds the mirror but for what was changed since. If not, the next
  // step sends all.
  bool known() const { return !all_; }
  uint64_t version() const { return version_; }
  uint64_t sequence() const { return sequence_; }
  // The first element that should be in `shadow` and is not, or kNoIndex. Only if known().
  int64_t FirstDifference(const std::byte* shadow) const;
  const std::byte* mirror() const { return mirror_.data(); }

  // What a step may have to pack for a buffer of `bytes`.
  static size_t MostBytes(size_t bytes) { return sizeof(DeltaHeader) + bytes; }

 private:
  bool Lacks(int64_t element) const;
  void Set(int64_t element, const std::byte* value);

  const int64_t capacity_;
  const int64_t element_bytes_;
  std::vector<std::byte> padding_;  // one element
  std::vector<std::byte> mirror_;
  int64_t used_ = 0;              // elements of the mirror that may be other than padding
  bool all_ = true;               // the shadow may lack anything; `changed_` is empty then
  std::vector<int32_t> changed_;  // elements that it lacks; room for as many as are less than all of them
  std::vector<int32_t> place_;    // by element: where it is in `changed_`, if that says so too
  int64_t shadow_used_ = 0;       // `used_` of the shadow

  uint64_t version_ = 0;       // of the shadow, once what was sent has run
  uint64_t sequence_ = 0;      // of the step that brings it there
  uint64_t next_version_ = 1;  // each is used once
  // Of the step that is being packed.
  int64_t count_ = 0;
  bool send_all_ = false;
  DeltaHeader header_;
};

}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_DELTAS_H_
