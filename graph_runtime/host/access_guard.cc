#include "graph_runtime/host/access_guard.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "graph_runtime/host/host_memory.h"
#include "graph_runtime/host/write_fault.h"

namespace pristine::host {

struct AccessGuard::Region {
  enum class State { kFree, kWatched, kEnding };

  // Read by the signal handler, without a lock. Bounds are those of the protected pages.
  std::atomic<State> state{State::kFree};
  std::atomic<std::byte*> first_page{nullptr};
  std::atomic<std::byte*> end_page{nullptr};
  Region* next = nullptr;

  // Constant while watched.
  int64_t id = 0;
  std::string name;
  size_t element_bytes = 1;
  Watcher* watcher = nullptr;
  const std::byte* begin = nullptr;
  const std::byte* end = nullptr;
  const std::byte* compared = nullptr;  // [compared, end) is compared

  // Guarded by the guard's mutex.
  int open = 0;  // running nodes that declare a write
  std::vector<std::byte> copy;

  bool watched() const { return state == State::kWatched; }
  bool HasPages() const { return first_page != end_page; }
  bool Contains(const std::byte* address) const { return first_page <= address && address < end_page; }
  int Protect(int protection) const {
    return HasPages() ? mprotect(first_page, static_cast<size_t>(end_page - first_page), protection) : 0;
  }
  size_t IndexOf(const std::byte* address) const { return static_cast<size_t>(address - begin) / element_bytes; }
};

namespace {

// The node that runs on this thread. The signal handler has no other way to find it.
thread_local AccessGuard::Node* current_node = nullptr;

bool Overlap(const void* address, size_t bytes, const std::byte* begin, const std::byte* end) {
  const auto* first = static_cast<const std::byte*>(address);
  return first < end && begin < first + bytes;
}

// The comparison reads what a misbehaving node on another stream may be writing; that race is what it looks for.
#define PRISTINE_RACY __attribute__((no_sanitize("thread")))

// The first byte of [from, from + bytes) that differs from `copy`, or `bytes`. Makes `copy` equal.
PRISTINE_RACY size_t UpdateCopy(std::byte* copy, const std::byte* from, size_t bytes) {
  constexpr size_t kWord = sizeof(uint64_t);
  size_t first = bytes;
  size_t i = 0;
  for (; i + kWord <= bytes; i += kWord) {
    uint64_t now = 0;
    uint64_t before = 0;
    __builtin_memcpy(&now, from + i, kWord);
    __builtin_memcpy(&before, copy + i, kWord);
    if (now == before) continue;
    if (first == bytes) {
      first = i;
      while (from[first] == copy[first] && first + 1 < i + kWord) ++first;
    }
    __builtin_memcpy(copy + i, &now, kWord);
  }
  for (; i < bytes; ++i) {
    if (from[i] == copy[i]) continue;
    if (first == bytes) first = i;
    copy[i] = from[i];
  }
  return first;
}

}  // namespace

AccessGuard::AccessGuard() { AddWriteFaultUser(); }

AccessGuard::~AccessGuard() { RemoveWriteFaultUser(); }

AccessGuard::Region* AccessGuard::FreeRegion() {
  for (const std::unique_ptr<Region>& region : owned_) {
    if (region->state == Region::State::kFree) return region.get();
  }
  owned_.push_back(std::make_unique<Region>());
  Region* region = owned_.back().get();
  region->next = regions_;
  regions_ = region;
  return region;
}

absl::StatusOr<int64_t> AccessGuard::Watch(const WatchedRegion& watched, Watcher* watcher) {
  std::lock_guard lock(mutex_);
  Region& region = *FreeRegion();
  region.name = watched.name;
  region.element_bytes = watched.element_bytes;
  region.watcher = watcher;
  region.begin = static_cast<const std::byte*>(watched.address);
  region.end = region.begin + watched.bytes;
  const bool aligned = reinterpret_cast<uintptr_t>(watched.address) % kPage == 0;
  const size_t page_bytes = aligned ? watched.bytes / kPage * kPage : 0;
  // The handler may look at any time: the pages become visible before they are protected.
  region.first_page = const_cast<std::byte*>(region.begin);
  region.end_page = region.first_page + page_bytes;
  region.compared = region.begin + page_bytes;
  region.copy.assign(static_cast<size_t>(region.end - region.compared), std::byte{0});
  UpdateCopy(region.copy.data(), region.compared, region.copy.size());
  region.state = Region::State::kWatched;
  region.open = static_cast<int>(
      std::count_if(running_.begin(), running_.end(), [&](const Node* node) { return node->Declares(region); }));
  if (region.open == 0 && region.Protect(PROT_READ) != 0) {
    region.state = Region::State::kFree;
    region.end_page = region.first_page.load();
    return absl::InternalError(absl::StrCat("Watch '", watched.name, "': mprotect: ", std::strerror(errno)));
  }
  return region.id = next_id_++;
}

void AccessGuard::Unwatch(int64_t id) {
  std::unique_lock lock(mutex_);
  const auto found = std::find_if(owned_.begin(), owned_.end(), [id](const std::unique_ptr<Region>& region) {
    return region->watched() && region->id == id;
  });
  if (found != owned_.end()) EndWatch(**found, lock);
}

void AccessGuard::UnwatchRange(const void* address, size_t bytes) {
  std::unique_lock lock(mutex_);
  for (size_t i = 0; i < owned_.size(); ++i) {  // the wait lets others add regions
    Region& region = *owned_[i];
    if (region.watched() && Overlap(address, bytes, region.begin, region.end)) EndWatch(region, lock);
  }
}

void AccessGuard::EndWatch(Region& region, std::unique_lock<std::mutex>& lock) {
  region.state = Region::State::kEnding;
  region.Protect(PROT_READ | PROT_WRITE);
  const uint64_t now = next_sequence_;
  ended_.wait(lock, [&] {
    return std::none_of(running_.begin(), running_.end(), [now](const Node* node) { return node->sequence_ < now; });
  });
  region.end_page = region.first_page.load();
  region.state = Region::State::kFree;
}

AccessGuard::Node::Node(AccessGuard& guard, const Op& op) : guard_(guard), op_(op) {
  std::vector<Report> reports;
  {
    std::lock_guard lock(guard_.mutex_);
    for (const std::unique_ptr<Region>& region : guard_.owned_) {
      if (!region->watched()) continue;
      // What changed until now is the doing of the nodes that run; if there are none, it is the program's own.
      if (region->open == 0 && !region->copy.empty()) {
        if (guard_.OthersRunning(*region, this)) {
          guard_.Compare(*region, reports);
        } else {
          UpdateCopy(region->copy.data(), region->compared, region->copy.size());
        }
      }
      if (Declares(*region) && region->open++ == 0) region->Protect(PROT_READ | PROT_WRITE);
    }
    sequence_ = guard_.next_sequence_++;
    guard_.running_.push_back(this);
  }
  for (const Report& report : reports) report.watcher->OnUndeclaredWrite(report.write);
  current_node = this;
}

AccessGuard::Node::~Node() {
  current_node = nullptr;
  std::vector<Report> reports;
  {
    std::lock_guard lock(guard_.mutex_);
    for (size_t i = 0; i < fault_count_; ++i) {
      const Region& region = *faults_[i].region;
      if (!region.watched()) continue;
      reports.push_back({region.watcher, {op_.name, region.name, region.IndexOf(faults_[i].address)}});
      if (region.open == 0) region.Protect(PROT_READ);
    }
    for (const std::unique_ptr<Region>& region : guard_.owned_) {
      if (!region->watched()) continue;
      if (Declares(*region)) {
        if (--region->open > 0) continue;
        region->Protect(PROT_READ);
        UpdateCopy(region->copy.data(), region->compared, region->copy.size());
      } else if (region->open == 0 && !region->copy.empty()) {
        guard_.Compare(*region, reports);
      }
    }
    finished_ = true;
  }
  for (const Report& report : reports) report.watcher->OnUndeclaredWrite(report.write);
  {
    std::lock_guard lock(guard_.mutex_);
    guard_.running_.remove(this);
  }
  guard_.ended_.notify_all();
}

bool AccessGuard::Node::Declares(const Region& region) const {
  if (op_.kind == GraphNode::Kind::kCopy || op_.kind == GraphNode::Kind::kFill) {
    return Overlap(op_.to, op_.bytes, region.begin, region.end);
  }
  const std::vector<WriteList::Range>& ranges = op_.kernel->writes.ranges();
  return std::any_of(ranges.begin(), ranges.end(), [&](const WriteList::Range& range) {
    return Overlap(range.address, range.bytes, region.begin, region.end);
  });
}

bool AccessGuard::HandleWriteFault(void* address) {
  return current_node != nullptr && current_node->OnFault(static_cast<std::byte*>(address));
}

bool AccessGuard::Node::OnFault(std::byte* address) {
  bool found = false;
  for (const Region* region = guard_.regions_; region != nullptr; region = region->next) {
    if (!region->Contains(address)) continue;
    found = true;
    // A declaring node faults when a region that shares the page has just been closed by another stream.
    if (!region->watched() || Declares(*region)) continue;
    const bool known = std::any_of(faults_.begin(), faults_.begin() + fault_count_,
                                   [region](const Fault& fault) { return fault.region == region; });
    if (!known && fault_count_ < faults_.size()) faults_[fault_count_++] = {region, address};
  }
  if (!found) return false;
  auto* page = reinterpret_cast<std::byte*>(reinterpret_cast<uintptr_t>(address) / kPage * kPage);
  return mprotect(page, kPage, PROT_READ | PROT_WRITE) == 0;
}

void AccessGuard::Compare(Region& region, std::vector<Report>& reports) {
  const size_t first = UpdateCopy(region.copy.data(), region.compared, region.copy.size());
  if (first == region.copy.size()) return;
  // A region whose pages faulted already was reported.
  const size_t index = region.IndexOf(region.compared + first);
  for (const Report& report : reports) {
    if (report.watcher == region.watcher && report.write.region == region.name) return;
  }
  reports.push_back({region.watcher, {Suspects(region), region.name, index}});
}

bool AccessGuard::OthersRunning(const Region& region, const Node* but) const {
  return std::any_of(running_.begin(), running_.end(),
                     [&](const Node* node) { return node != but && !node->finished_ && !node->Declares(region); });
}

// Comparison cannot tell apart the nodes that ran at the same time.
std::string AccessGuard::Suspects(const Region& region) const {
  std::string names;
  for (const Node* node : running_) {
    if (node->finished_ || node->Declares(region)) continue;
    absl::StrAppend(&names, names.empty() ? "" : " or ", node->op_.name);
  }
  return names;
}

}  // namespace pristine::host
