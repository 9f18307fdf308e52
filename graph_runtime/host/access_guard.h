// AccessGuard: finds writes to watched memory by nodes that did not declare them (Device::Watch).
//
// The pages that lie wholly inside a region are write-protected except while a declaring node runs; an undeclared write
// faults, is noted, and is then let through, so that the program goes on as it would have. What does not fill a page
// is compared with a copy around each node.
#ifndef PRISTINE_GRAPH_RUNTIME_HOST_ACCESS_GUARD_H_
#define PRISTINE_GRAPH_RUNTIME_HOST_ACCESS_GUARD_H_

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "graph_runtime/host/op.h"
#include "pristine/graph_runtime/device.h"

namespace pristine::host {

// Thread-safe.
class AccessGuard {
 public:
  AccessGuard();
  ~AccessGuard();
  AccessGuard(const AccessGuard&) = delete;
  AccessGuard& operator=(const AccessGuard&) = delete;

  // INTERNAL: the memory cannot be protected.
  absl::StatusOr<int64_t> Watch(const WatchedRegion& region, Watcher* watcher);
  // Waits for running nodes.
  void Unwatch(int64_t id);
  // The memory is about to be freed: ends what still watches it.
  void UnwatchRange(const void* address, size_t bytes);

  struct Region;

  // Brackets the run of one op on a worker thread.
  class Node {
   public:
    Node(AccessGuard& guard, const Op& op);
    ~Node();
    Node(const Node&) = delete;
    Node& operator=(const Node&) = delete;

   private:
    friend class AccessGuard;
    struct Fault {
      const Region* region;
      const std::byte* address;
    };
    bool Declares(const Region& region) const;
    bool OnFault(std::byte* address);  // called in a signal handler

    AccessGuard& guard_;
    const Op& op_;
    uint64_t sequence_ = 0;
    bool finished_ = false;         // only its reports are still to be delivered
    std::array<Fault, 32> faults_;  // the first fault of each region; more regions than that go unreported
    size_t fault_count_ = 0;
  };

  // Whether the write fault at `address` on this thread was an undeclared write, now let through. Async-signal-safe.
  static bool HandleWriteFault(void* address);

 private:
  struct Report {
    Watcher* watcher;
    UndeclaredWrite write;
  };
  Region* FreeRegion();
  void EndWatch(Region& region, std::unique_lock<std::mutex>& lock);
  void Compare(Region& region, std::vector<Report>& reports);
  std::string Suspects(const Region& region) const;
  bool OthersRunning(const Region& region, const Node* but) const;

  // Regions are reused and never freed before the guard, so that the signal handler can walk them without a lock.
  std::atomic<Region*> regions_{nullptr};
  std::vector<std::unique_ptr<Region>> owned_;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::list<Node*> running_;
  uint64_t next_sequence_ = 1;
  int64_t next_id_ = 1;
};

}  // namespace pristine::host

#endif  // PRISTINE_GRAPH_RUNTIME_HOST_ACCESS_GUARD_H_
