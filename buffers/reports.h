// Reports: what kernels and the access guard have to say, on its way to Poll. Everything lies in host-visible memory
// that stays readable after the device context has died.
#ifndef PRISTINE_BUFFERS_REPORTS_H_
#define PRISTINE_BUFFERS_REPORTS_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"
#include "buffers/kernels/prologue.h"
#include "pristine/buffers/report.h"
#include "pristine/buffers/violation.h"
#include "pristine/graph_runtime/device.h"

namespace pristine::buffers {

// A write that a watcher saw, as the stream's worker thread left it.
struct UndeclaredRecord {
  std::atomic<uint64_t> turn{0};  // whose turn the cell is: producer at 2 * lap, reader at 2 * lap + 1
  const char* buffer = "";
  int64_t index = 0;
  uint64_t replay = 0;
  int32_t graph = -1;
  char node[sizeof(Violation::node)] = "";
};

class Reports {
 public:
  static absl::StatusOr<std::unique_ptr<Reports>> Create(Device& device);

  // Called on worker threads. Drops the report, and counts it, when 256 wait already.
  void AddUndeclared(const char* buffer, const UndeclaredWrite& write, const Control& control);

  // The next report of a kernel; false: there is none.
  bool NextRecord(ReportRecord& record);
  // The next undeclared write, with its graph's id; false: there is none.
  bool NextUndeclared(Violation& violation, int32_t& graph);

  // The last report of a kernel, and the last undeclared write, taken or not; false: there was none. Any thread; the
  // context may be dead.
  bool LastRecord(ReportRecord& record) const;
  bool LastUndeclared(Violation& violation, int32_t& graph) const;

  int64_t lost() const { return lost_ + lost_undeclared_.load(std::memory_order_relaxed); }

  Board* device_board() const { return static_cast<Board*>(pinned_.device_address()); }
  ReportRecord* device_records() const;
  static constexpr uint32_t kCapacity = 4096;

  // A consistent-enough copy of what prologues last published.
  Board ReadBoard() const;

 private:
  Reports() = default;
  ReportRecord* records() const;
  // Whether `record` is what lies at its place, whole.
  bool Read(uint64_t sequence, ReportRecord& record) const;

  static constexpr size_t kUndeclared = 256;
  PinnedBuffer pinned_;  // Board, then kCapacity records
  uint64_t next_ = 0;    // reports read so far
  int64_t lost_ = 0;
  std::array<UndeclaredRecord, kUndeclared> undeclared_;
  std::atomic<uint64_t> undeclared_in_{0};
  uint64_t undeclared_out_ = 0;
  std::atomic<int64_t> lost_undeclared_{0};
  mutable std::mutex last_mutex_;
  Violation last_undeclared_;  // guarded by last_mutex_, as is the next
  int32_t last_graph_ = -2;    // -2: none
};

}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_REPORTS_H_
