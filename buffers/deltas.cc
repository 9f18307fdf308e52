#include "buffers/deltas.h"

#include <algorithm>
#include <cstring>

namespace pristine::buffers {
namespace {

size_t Size(int64_t count, int64_t element_bytes) { return static_cast<size_t>(count * element_bytes); }

// Of one element. Most have four bytes, for which memcpy and memcmp are no calls.
void CopyElement(std::byte* to, const std::byte* from, size_t bytes) {
  bytes == 4 ? std::memcpy(to, from, 4) : std::memcpy(to, from, bytes);
}
bool SameElement(const std::byte* a, const std::byte* b, size_t bytes) {
  return (bytes == 4 ? std::memcmp(a, b, 4) : std::memcmp(a, b, bytes)) == 0;
}

}  // namespace

Deltas::Deltas(const BufferRecord& record)
    : capacity_(record.capacity),
      element_bytes_(record.element_bytes),
      padding_(static_cast<size_t>(record.element_bytes)),
      mirror_(Size(record.capacity, record.element_bytes)),
      place_(static_cast<size_t>(record.capacity)) {
  if (record.integers) std::memcpy(padding_.data(), &record.pad, sizeof(record.pad));
  for (int64_t i = 0; i < capacity_; ++i)
    std::memcpy(&mirror_[Size(i, element_bytes_)], padding_.data(), padding_.size());
  const int64_t most = capacity_ * element_bytes_ / (element_bytes_ + static_cast<int64_t>(sizeof(int32_t)));
  changed_.reserve(static_cast<size_t>(most) + 1);
}

bool Deltas::Lacks(int64_t element) const {
  const auto place = static_cast<size_t>(place_[static_cast<size_t>(element)]);
  return place < changed_.size() && changed_[place] == element;
}

void Deltas::Set(int64_t element, const std::byte* value) {
  std::byte* const held = &mirror_[Size(element, element_bytes_)];
  if (SameElement(held, value, padding_.size())) return;
  CopyElement(held, value, padding_.size());
  if (all_ || Lacks(element)) return;
  if (changed_.size() == changed_.capacity()) {
    all_ = true;
    changed_.clear();
    return;
  }
  place_[static_cast<size_t>(element)] = static_cast<int32_t>(changed_.size());
  changed_.push_back(static_cast<int32_t>(element));
}

void Deltas::Refill(absl::Span<const std::byte> values) {
  all_ = true;
  changed_.clear();
  if (!values.empty()) std::memcpy(mirror_.data(), values.data(), values.size());
  used_ = std::max(used_, static_cast<int64_t>(values.size()) / element_bytes_);
}

void Deltas::Write(int64_t first, absl::Span<const std::byte> values) {
  const int64_t count = static_cast<int64_t>(values.size()) / element_bytes_;
  for (int64_t i = 0; i < count; ++i) Set(first + i, values.data() + i * element_bytes_);
  used_ = std::max(used_, first + count);
}

void Deltas::Move(int64_t from, int64_t to, int64_t count) {
  if (from == to) return;
  for (int64_t i = 0; i < count; ++i) {
    Set(to + i, &mirror_[Size(from + i, element_bytes_)]);
    Set(from + i, padding_.data());
  }
  used_ = std::max(used_, to + count);
}

size_t Deltas::Settle(int64_t count) {
  count_ = count;
  // Past the step's elements the prologue pads the shadow by itself.
  const auto lacking = [count](int32_t element) { return element < count; };
  header_.changes = static_cast<int32_t>(std::count_if(changed_.begin(), changed_.end(), lacking));
  const size_t changes = DeltaIndexBytes(header_.changes) + Size(header_.changes, element_bytes_);
  send_all_ = all_ || changes >= Size(count, element_bytes_);
  if (header_.changes == 0 && !all_) send_all_ = false;
  if (send_all_) header_.changes = kAllElements;
  header_.padded_to = send_all_ ? capacity_ : std::max(shadow_used_, count);
  header_.base = version_;
  const bool same = !send_all_ && header_.changes == 0 && shadow_used_ <= count;
  header_.version = same ? version_ : next_version_++;
  return sizeof(DeltaHeader) + (send_all_ ? Size(count, element_bytes_) : changes);
}

void Deltas::Pack(std::byte* to) {
  std::memcpy(to, &header_, sizeof(header_));
  to += sizeof(header_);
  if (send_all_) {
    std::memcpy(to, mirror_.data(), Size(count_, element_bytes_));
    return;
  }
  std::byte* values = to + DeltaIndexBytes(header_.changes);
  for (const int32_t element : changed_) {
    if (element >= count_) continue;
    std::memcpy(to, &element, sizeof(element));
    CopyElement(values, &mirror_[Size(element, element_bytes_)], padding_.size());
    to += sizeof(element);
    values += element_bytes_;
  }
}

void Deltas::Sent(uint64_t sequence) {
  if (header_.version != version_) sequence_ = sequence;
  version_ = header_.version;
  for (int64_t i = count_; i < used_; ++i) {
    CopyElement(&mirror_[Size(i, element_bytes_)], padding_.data(), padding_.size());
  }
  used_ = shadow_used_ = count_;
  all_ = false;
  changed_.clear();
}

void Deltas::TakeBack(uint64_t sequence) {
  if (sequence_ != sequence) return;
  all_ = true;
  changed_.clear();
}

int64_t Deltas::FirstDifference(const std::byte* shadow) const {
  for (int64_t i = 0; i < capacity_; ++i) {
    const size_t at = Size(i, element_bytes_);
    if (!SameElement(&mirror_[at], shadow + at, padding_.size()) && !Lacks(i)) return i;
  }
  return kNoIndex;
}

}  // namespace pristine::buffers
