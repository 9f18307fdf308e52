#include <algorithm>
#include <atomic>
#include <cstring>

#include "buffers/kernels/prologue.h"
#include "buffers/rules.h"
#include "pristine/buffers/buffer_spec.h"
#include "pristine/buffers/violation.h"

namespace pristine::buffers {
namespace {

bool Covers(const PrologueParams& params, const BufferRecord& record) {
  if (params.bucket.requests < 0 || record.only_requests < 0) return true;
  return record.only_requests == params.bucket.requests && record.only_tokens == params.bucket.tokens;
}

int64_t Count(const BufferRecord& record, const Extent& extent) {
  const Axis axis{static_cast<Axis::Unit>(record.unit), record.per};
  return std::clamp<int64_t>(axis.Count(extent, record.capacity), 0, record.capacity);
}

template <class Body>
void ForEachBuffer(const PrologueParams& params, Body body) {
  for (int32_t c = 0; c < params.num_chunks; ++c) {
    const ChunkTable& table = TableOf(params, c);
    for (int32_t i = 0; i < table.count; ++i) {
      const BufferRecord& record = table.records[i];
      if (Covers(params, record)) body(record);
    }
  }
}

class Prologue {
 public:
  // `step`: null: the newest staging slot.
  Prologue(const PrologueParams& params, const std::byte* step)
      : params_(params),
        given_(step),
        ring_(params.ring),
        control_(*params.control),
        consumed_(control_.turn >> kTurnBits) {
    ring_.replay = &replay_;
  }

  int Run() {
    if (params_.mode == PrologueMode::kReplay) Take();
    ForEachBuffer(params_, [this](const BufferRecord& record) { Prepare(record); });
    if (violated_ && params_.neutralise) {
      ForEachBuffer(params_, [this](const BufferRecord& record) { Neutralise(record); });
      ++control_.neutralised;
    }
    Publish();
    return violated_ && params_.trap ? 1 : 0;
  }

 private:
  void Flag(Violation::Kind kind, int32_t buffer, int64_t index, int64_t expected, int64_t actual) {
    Report(ring_, static_cast<int32_t>(kind), buffer, index, expected, actual);
    if (kind != Violation::Kind::kPolluted) violated_ = true;  // a polluted constant is healed instead
  }

  const SlotHeader* Newest() const {
    if (given_ != nullptr) return reinterpret_cast<const SlotHeader*>(given_);
    const auto* newest = reinterpret_cast<const SlotHeader*>(params_.slots);
    for (uint32_t i = 1; i < params_.num_slots; ++i) {
      const auto* header = reinterpret_cast<const SlotHeader*>(params_.slots + i * params_.slot_stride);
      if (header->sequence > newest->sequence) newest = header;
    }
    return newest;
  }

  // Exactly one step must have been armed since the last one was taken.
  void Take() {
    const SlotHeader* const newest = Newest();
    const uint64_t next = consumed_ + 1;
    replay_ = std::max(newest->sequence, consumed_);
    extent_ = params_.bucket;
    if (newest->sequence < next) {
      Flag(Violation::Kind::kNotArmed, -1, 0, static_cast<int64_t>(next), static_cast<int64_t>(newest->sequence));
      return;
    }
    consumed_ = newest->sequence;
    control_.turn = consumed_ << kTurnBits;
    if (newest->sequence > next) {
      Flag(Violation::Kind::kArmedTwice, -1, 0, static_cast<int64_t>(next), static_cast<int64_t>(newest->sequence));
    }
    if (newest->bucket != params_.bucket) {
      const bool tokens = newest->bucket.requests == params_.bucket.requests;
      Flag(Violation::Kind::kWrongBucket, -1, tokens ? 1 : 0, tokens ? params_.bucket.tokens : params_.bucket.requests,
           tokens ? newest->bucket.tokens : newest->bucket.requests);
      return;
    }
    extent_ = newest->extent;
    check_ = newest->check != 0;
    const std::byte* image = reinterpret_cast<const std::byte*>(newest);
    if (given_ != nullptr && newest->slot >= 0) image = params_.slots + newest->slot * params_.slot_stride;
    entries_ = reinterpret_cast<const SlotEntry*>(image + kSlotTable);
    values_ = image + newest->values;
  }

  void Prepare(const BufferRecord& record) {
    if (params_.mode == PrologueMode::kRestoreAll) {
      if (params_.compare_constants && record.role == static_cast<int32_t>(Role::kConstant)) return Heal(record);
      if (record.role != static_cast<int32_t>(Role::kRestored) || params_.restore) Restore(record);
      return;
    }
    switch (static_cast<Role>(record.role)) {
      case Role::kConstant:
        if (check_) Heal(record);
        break;
      case Role::kRestored:
        if (params_.restore) RestoreForStep(record);
        break;
      case Role::kRefilled:
        if (entries_ != nullptr) Place(record);
        break;
      case Role::kScratch:
        if (params_.poison_scratch && params_.mode == PrologueMode::kReplay) {
          std::memset(record.live, 0xFF, static_cast<size_t>(record.capacity * record.element_bytes));
        }
        break;
    }
  }

  static void Restore(const BufferRecord& record) {
    std::memcpy(record.live, record.original, static_cast<size_t>(record.capacity * record.element_bytes));
  }

  void Heal(const BufferRecord& record) {
    const int64_t index = FirstDifference(record.live, record.original, record.capacity, record.element_bytes);
    if (index == kNoIndex) return;
    const int64_t byte = index * record.element_bytes;
    Flag(Violation::Kind::kPolluted, record.id, index, ElementValue(record.original + byte, record.element_bytes),
         ElementValue(record.live + byte, record.element_bytes));
    Restore(record);
    ++control_.healed;
  }

  void RestoreForStep(const BufferRecord& record) {
    if (check_ && FirstDifference(record.live, record.original, record.capacity, record.element_bytes) != kNoIndex) {
      changed_ = true;
    }
    Restore(record);
    control_.restored_bytes += record.capacity * record.element_bytes;
    if (params_.mode == PrologueMode::kReplay) PadTail(record, Count(record, extent_));
  }

  void Place(const BufferRecord& record) {
    const SlotEntry& entry = entries_[record.refilled];
    if (entry.offset < 0) return;
    const std::byte* const values = values_ + entry.offset;
    const int64_t real = std::min(entry.count, record.capacity);
    std::memcpy(record.live, values, static_cast<size_t>(real * record.element_bytes));
    PadTail(record, real);
    if (record.integers) Validate(record, reinterpret_cast<const int32_t*>(values), real);
  }

  int64_t TailEnd(const BufferRecord& record) const {
    return record.tail_to_end ? record.capacity : Count(record, params_.bucket);
  }

  // An indptr's tail continues its real part: not the array's last element, which belongs to another bucket.
  void PadTail(const BufferRecord& record, int64_t real) const {
    const int64_t end = TailEnd(record);
    if (real >= end) return;
    int32_t value = record.pad;
    if (record.indptr) value = real > 0 ? reinterpret_cast<const int32_t*>(record.live)[real - 1] : 0;
    FillElements(record, real, end, value);
  }

  static void FillElements(const BufferRecord& record, int64_t begin, int64_t end, int32_t value) {
    if (record.integers) {
      auto* live = reinterpret_cast<int32_t*>(record.live);
      std::fill(live + begin, live + end, value);
    } else {
      std::memset(record.live + begin * record.element_bytes, 0,
                  static_cast<size_t>((end - begin) * record.element_bytes));
    }
  }

  // Reports the first value that breaks the rule.
  void Validate(const BufferRecord& record, const int32_t* values, int64_t real) {
    for (int64_t i = 0; i < real; ++i) {
      int64_t bound = values[i];
      if (!record.indptr) {
        bound = std::clamp(values[i], record.lower, record.upper);
      } else if (i == 0) {
        bound = 0;
      } else if (values[i] < values[i - 1]) {
        bound = values[i - 1];
      }
      if (record.indptr && bound == values[i] && i == real - 1 && values[i] > record.upper) bound = record.upper;
      if (bound != values[i]) {
        Flag(Violation::Kind::kInvariant, record.id, i, bound, values[i]);
        return;
      }
    }
  }

  void Neutralise(const BufferRecord& record) const {
    const Role role = static_cast<Role>(record.role);
    if (role == Role::kRefilled || (role == Role::kRestored && params_.neutralise_restored)) {
      FillElements(record, 0, TailEnd(record), record.harmless);
    }
  }

  // What the host reads while this runs is written atomically.
  void Publish() {
    if (params_.mode != PrologueMode::kRestoreRestored) {
      std::atomic_ref(control_.current).store(replay_, std::memory_order_relaxed);
      std::atomic_ref(control_.graph).store(ring_.graph, std::memory_order_relaxed);
    }
    if (changed_) ++control_.expected_writes;
    Board& board = *params_.board;
    std::atomic_ref(board.restored_bytes).store(control_.restored_bytes, std::memory_order_relaxed);
    std::atomic_ref(board.expected_writes).store(control_.expected_writes, std::memory_order_relaxed);
    std::atomic_ref(board.healed).store(control_.healed, std::memory_order_relaxed);
    std::atomic_ref(board.neutralised).store(control_.neutralised, std::memory_order_relaxed);
    std::atomic_ref(board.consumed).store(consumed_, std::memory_order_release);
  }

  const PrologueParams& params_;
  const std::byte* const given_;
  ReportRing ring_;
  Control& control_;
  uint64_t consumed_;
  uint64_t replay_ = 0;
  const SlotEntry* entries_ = nullptr;  // null: nothing to place
  const std::byte* values_ = nullptr;
  Extent extent_;
  bool check_ = false;
  bool violated_ = false;
  bool changed_ = false;
};

}  // namespace

int PrologueHost(const PrologueParams& params) { return Prologue(params, nullptr).Run(); }

template <int kBytes>
int InlinePrologueHost(const InlinePrologueParams<kBytes>& params) {
  return Prologue(params.base, params.step).Run();
}
template int InlinePrologueHost(const InlinePrologueParams<kInlineBytes[0]>&);
template int InlinePrologueHost(const InlinePrologueParams<kInlineBytes[1]>&);
template int InlinePrologueHost(const InlinePrologueParams<kInlineBytes[2]>&);
template int InlinePrologueHost(const InlinePrologueParams<kInlineBytes[3]>&);
template int InlinePrologueHost(const InlinePrologueParams<kInlineBytes[4]>&);
template int InlinePrologueHost(const InlinePrologueParams<kInlineBytes[5]>&);
template int InlinePrologueHost(const InlinePrologueParams<kInlineBytes[6]>&);
static_assert(kInlineSizes == 7);

void PrologueWrites(const PrologueParams& params, WriteList& writes) {
  ForEachBuffer(params, [&](const BufferRecord& record) {
    const Role role = static_cast<Role>(record.role);
    const bool all = params.mode == PrologueMode::kRestoreAll;
    const bool replay = params.mode == PrologueMode::kReplay;
    const bool harmless = replay && params.neutralise && params.neutralise_restored;
    const bool may = role == Role::kRestored  ? params.restore || harmless
                     : role == Role::kScratch ? all || (replay && params.poison_scratch)
                                              : all || replay;
    if (may) writes.Add(record.live, static_cast<size_t>(record.capacity * record.element_bytes));
  });
}

}  // namespace pristine::buffers
