#include "buffers/reports.h"

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
    record.sequence = sequence;
    record.index = Load(source.index, std::memory_order_acquire);
    record.expected = Load(source.expected, std::memory_order_acquire);
    record.actual = Load(source.actual, std::memory_order_acquire);
    record.replay = Load(source.replay, std::memory_order_acquire);
    record.kind = Load(source.kind, std::memory_order_acquire);
    record.buffer = Load(source.buffer, std::memory_order_acquire);
    record.graph = Load(source.graph, std::memory_order_acquire);
    if (Load(source.sequence, std::memory_order_acquire) != sequence) continue;  // it changed under us
    ++next_;
    return true;
  }
}

void Reports::AddUndeclared(const char* buffer, const UndeclaredWrite& write, const Control& control) {
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
