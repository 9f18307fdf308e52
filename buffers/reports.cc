#include "buffers/reports.h"

#include <algorithm>
#include <cstring>

#include "pristine/graph_runtime/status.h"

namespace pristine::buffers {
namespace {

constexpr size_t kBoardBytes = 256;
static_assert(sizeof(Board) <= kBoardBytes);

template <class T>
T Load(const T& field, std::memory_order order = std::memory_order_relaxed) {
  return std::atomic_ref(const_cast<T&>(field)).load(order);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Reports>> Reports::Create(Device& device) {
  auto reports = std::unique_ptr<Reports>(new Reports);
  PRISTINE_ASSIGN_OR_RETURN(reports->pinned_,
                            device.AllocatePinned(kBoardBytes + kCapacity * sizeof(ReportRecord), "reports"));
  return reports;
}

ReportRecord* Reports::records() const { return reinterpret_cast<ReportRecord*>(pinned_.host() + kBoardBytes); }

ReportRecord* Reports::device_records() const {
  return reinterpret_cast<ReportRecord*>(static_cast<std::byte*>(pinned_.device_address()) + kBoardBytes);
}

Board Reports::ReadBoard() const {
  const auto& board = *reinterpret_cast<const Board*>(pinned_.host());
  Board copy;
  copy.consumed = Load(board.consumed, std::memory_order_acquire);
  copy.restored_bytes = Load(board.restored_bytes);
  copy.expected_writes = Load(board.expected_writes);
  copy.healed = Load(board.healed);
  copy.neutralised = Load(board.neutralised);
  return copy;
}

bool Reports::NextRecord(ReportRecord& record) {
  for (;;) {
    const ReportRecord& source = records()[next_ % kCapacity];
    const uint64_t sequence = Load(source.sequence, std::memory_order_acquire);
    if (sequence < next_ + 1) return false;
    if (sequence > next_ + 1) {  // overtaken: go on with the oldest that is still there
      lost_ += static_cast<int64_t>(sequence - kCapacity - next_);
      next_ = sequence - kCapacity;
      continue;
    }
    if (!Read(sequence, record)) continue;  // it changed under us
    ++next_;
    return true;
  }
}

bool Reports::Read(uint64_t sequence, ReportRecord& record) const {
  const ReportRecord& source = records()[(sequence - 1) % kCapacity];
  record.sequence = sequence;
  record.index = Load(source.index, std::memory_order_acquire);
  record.expected = Load(source.expected, std::memory_order_acquire);
  record.actual = Load(source.actual, std::memory_order_acquire);
  record.replay = Load(source.replay, std::memory_order_acquire);
  record.kind = Load(source.kind, std::memory_order_acquire);
  record.buffer = Load(source.buffer, std::memory_order_acquire);
  record.graph = Load(source.graph, std::memory_order_acquire);
  return Load(source.sequence, std::memory_order_acquire) == sequence;
}

bool Reports::LastRecord(ReportRecord& record) const {
  uint64_t last = 0;
  for (uint32_t i = 0; i < kCapacity; ++i)
    last = std::max(last, Load(records()[i].sequence, std::memory_order_acquire));
  // Overwritten while it was read: what lies there now is later still, so the one before it is asked for next time only
  // if this one goes on changing.
  for (int attempt = 0; last > 0 && attempt < 8; ++attempt) {
    if (Read(last, record)) return true;
    last = std::max(last, Load(records()[(last - 1) % kCapacity].sequence, std::memory_order_acquire));
  }
  return false;
}

bool Reports::LastUndeclared(Violation& violation, int32_t& graph) const {
  std::lock_guard lock(last_mutex_);
  violation = last_undeclared_;
  graph = last_graph_;
  return graph != -2;
}

void Reports::AddUndeclared(const char* buffer, const UndeclaredWrite& write, const Control& control) {
  {
    std::lock_guard lock(last_mutex_);
    last_undeclared_ = {};
    last_undeclared_.kind = Violation::Kind::kUndeclaredWrite;
    last_undeclared_.buffer = buffer;
    last_undeclared_.index = static_cast<int64_t>(write.index);
    last_undeclared_.replay = static_cast<int64_t>(Load(control.current));
    write.node.copy(last_undeclared_.node, sizeof(last_undeclared_.node) - 1);
    last_graph_ = Load(control.graph);
  }
  uint64_t place = undeclared_in_.load(std::memory_order_relaxed);
  for (;;) {
    UndeclaredRecord& cell = undeclared_[place % kUndeclared];
    const uint64_t turn = cell.turn.load(std::memory_order_acquire);
    const uint64_t mine = place / kUndeclared * 2;
    if (turn < mine) {  // not read since the last lap
      lost_undeclared_.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    if (turn > mine) {
      place = undeclared_in_.load(std::memory_order_relaxed);
      continue;
    }
    if (!undeclared_in_.compare_exchange_weak(place, place + 1, std::memory_order_relaxed)) continue;
    cell.buffer = buffer;
    cell.index = static_cast<int64_t>(write.index);
    cell.replay = Load(control.current);
    cell.graph = Load(control.graph);
    const size_t length = write.node.copy(cell.node, sizeof(cell.node) - 1);
    cell.node[length] = '\0';
    cell.turn.store(mine + 1, std::memory_order_release);
    return;
  }
}

bool Reports::NextUndeclared(Violation& violation, int32_t& graph) {
  UndeclaredRecord& cell = undeclared_[undeclared_out_ % kUndeclared];
  const uint64_t mine = undeclared_out_ / kUndeclared * 2 + 1;
  if (cell.turn.load(std::memory_order_acquire) != mine) return false;
  violation = {};
  violation.kind = Violation::Kind::kUndeclaredWrite;
  violation.buffer = cell.buffer;
  violation.index = cell.index;
  violation.replay = static_cast<int64_t>(cell.replay);
  std::memcpy(violation.node, cell.node, sizeof(violation.node));
  graph = cell.graph;
  cell.turn.store(mine + 1, std::memory_order_release);
  ++undeclared_out_;
  return true;
}

}  // namespace pristine::buffers
