// The state behind BufferManager. Its methods are in buffer_manager.cc (set-up), buffer_manager_step.cc (each step) and
// buffer_manager_check.cc (restore and check).
#ifndef PRISTINE_BUFFERS_MANAGER_IMPL_H_
#define PRISTINE_BUFFERS_MANAGER_IMPL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "buffers/arena.h"
#include "buffers/kernels/prologue.h"
#include "buffers/reports.h"
#include "buffers/staging_ring.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph.h"

namespace pristine {

namespace buffers {

inline constexpr int kMaxBuffers = 1024;
inline constexpr int kMaxGraphs = 512;
inline constexpr int kLateRefilled = 64;  // kRefilled buffers that may be registered after the first Seal

// Passes undeclared writes to one region on to Poll.
class RegionWatcher final : public Watcher {
 public:
  RegionWatcher(Device& device, std::string name, Reports& reports, const Control* control)
      : device_(device), name_(std::move(name)), reports_(reports), control_(control) {}
  ~RegionWatcher() override { device_.Unwatch(id_); }
  absl::Status Start(const void* address, size_t bytes, size_t element_bytes);
  void OnUndeclaredWrite(const UndeclaredWrite& write) override;

 private:
  Device& device_;
  const std::string name_;
  Reports& reports_;
  const Control* const control_;
  int64_t id_ = 0;
};

struct BufferState {
  BufferSpec spec;
  BufferRecord record;
  size_t bytes = 0;
  std::vector<std::byte> original;
  std::unique_ptr<RegionWatcher> watcher;

  // kRefilled only.
  std::vector<std::byte> values;   // of the last Refill, for Keep
  int64_t count = -1;              // elements in `values`; -1: never refilled
  Extent extent;                   // they were given for
  int64_t generation = 0;          // refills and keeps
  int64_t refilled = 0;            // generation of the last Refill: a Keep does not make derived buffers stale
  int64_t step = 0;                // the last step that has values
  std::vector<int64_t> made_from;  // `refilled` of each of spec.derived_from when this one was refilled
};

struct Chunk {
  ProtectedBuffer originals;  // the table of BufferRecords, then the originals
  ChunkTable table;
  int first = 0;  // id of its first buffer
  std::vector<const BufferState*> refilled;
};

// A graph, or the eager runs of a bucket.
struct GraphEntry {
  const char* graph = "";
  Extent bucket;
  int chunks = 0;         // the first that its prologue covers; 0: not recorded
  int chunks_before = 0;  // of the last capture that succeeded: a failed recapture leaves that graph in place
  int64_t order = 0;      // of its last run among all runs; 0: none
  int64_t replay = 0;     // the step of that run; 0: a capture or warm-up

  // Of a graph whose prologue node may be given other parameters: a GraphRunner's, or an engine's that is attached.
  std::unique_ptr<PrologueParams> params;     // as captured
  std::unique_ptr<PrologueParams> recording;  // of the capture that has not ended; null: not at its head
  const GraphExec* exec = nullptr;
  std::unique_ptr<GraphExec> attached;  // null: not attached
  int node = -1;                        // in `exec`; -1: its steps come through the ring
  bool carries = false;                 // the node's parameters hold a step
};

// One of each size.
template <class Sizes>
struct InlinePrologueSet;
template <size_t... kPlaces>
struct InlinePrologueSet<std::index_sequence<kPlaces...>> {
  std::tuple<InlinePrologueParams<kInlineBytes[kPlaces]>...> all{};
};
using InlinePrologues = InlinePrologueSet<std::make_index_sequence<size_t{kInlineSizes}>>;

// What Verify and FindPolluter look at, copied back.
struct ReadBack {
  struct Of {
    int id;
    size_t offset;
  };
  struct Band {
    const GuardBand* band;
    size_t offset;
  };
  std::vector<Of> buffers;
  std::vector<Band> bands;
  std::vector<std::byte> bytes;
};

inline bool UsedBy(const BufferSpec& spec, const Extent& bucket) {
  return !spec.only_bucket.has_value() || *spec.only_bucket == bucket;
}

}  // namespace buffers

class BufferManager::Impl {
 public:
  Impl(Device& its_device, const ManagerOptions& its_options)
      : device(its_device),
        options(its_options),
        constants(its_device, "constants"),
        writable(its_device, "writable buffers") {}

  // Held for the length of a public call: finds a second thread inside one.
  class Call {
   public:
    explicit Call(Impl& impl) : impl_(impl), entered_(!impl.busy.exchange(true, std::memory_order_acquire)) {}
    ~Call() {
      if (entered_) impl_.busy.store(false, std::memory_order_release);
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    bool entered() const { return entered_; }

   private:
    Impl& impl_;
    const bool entered_;
  };

  bool sealed() const { return ring != nullptr && sealed_buffers == static_cast<int>(buffers.size()); }
  absl::Status Seal();

  // The entry of (graph, bucket), made if it is new. RESOURCE_EXHAUSTED: kMaxGraphs.
  absl::StatusOr<int> EntryOf(const char* graph, const Extent& bucket);
  int FindEntry(const char* graph, const Extent& bucket) const;  // -1: there is none
  void AddToSignature(const buffers::GraphEntry& entry, Signature& signature) const;
  // OUT_OF_RANGE: `bucket` needs more elements than a buffer of the first `chunks` chunks has.
  absl::Status CheckCapacities(const Extent& bucket, int chunks) const;

  buffers::PrologueParams Prologue(buffers::PrologueMode mode, const Extent& bucket, int chunks, int graph) const;
  absl::Status LaunchPrologue(Stream& stream, int graph);
  buffers::PrologueParams ReplayPrologue(const buffers::GraphEntry& entry, int graph) const;
  absl::Status TryInline(const buffers::GraphEntry& entry, GraphExec& exec);
  // `compare`: constants that differ from their originals are reported before they are put back.
  absl::Status RestoreAll(Stream& stream, const Extent& bucket, bool restored_too, bool compare);
  // Launches or records a prologue. A launched one counts as the manager's last work, as a replay does.
  absl::Status Run(Stream& stream, const buffers::PrologueParams& params);
  absl::Status CheckOrder(Stream& stream);
  absl::Status CheckStep(const buffers::GraphEntry& entry, const Extent& bucket, const Extent& extent) const;
  // `exec`: of the GraphRunner that launches next; null: an engine does.
  absl::Status Arm(Stream& stream, int graph, const Extent& extent, GraphExec* exec);
  // Hands the step to the prologue, in its parameters if it is small, through the ring otherwise.
  absl::Status Deliver(Stream& stream, buffers::GraphEntry& entry, buffers::SlotHeader header, GraphExec* exec);
  // In the smallest size that holds `need` bytes; one does.
  template <int kPlace = 0>
  absl::Status SetInline(buffers::GraphEntry& entry, const buffers::SlotHeader& header, size_t need, GraphExec& exec);
  void TakeBackUnlaunchedStep();
  absl::Status Stage(buffers::BufferState& buffer, absl::Span<const std::byte> values, int64_t count);
  size_t Poll(absl::Span<Violation> out);
  ReportRing Ring(int graph) const;

  // Copies constants, with `refilled_too` kRefilled buffers, and guard bands back. Blocks.
  absl::Status ReadBack(Stream& stream, bool refilled_too, buffers::ReadBack& out) const;
  static Violation Difference(Violation::Kind kind, const buffers::BufferState& buffer, const std::byte* was,
                              const std::byte* is, int64_t index);
  // Of the byte at `index` of `band`.
  Violation BandDamage(const buffers::GuardBand& band, int64_t index, std::byte was, std::byte is) const;
  void CheckBands(const buffers::ReadBack& read, std::vector<Violation>& found) const;
  absl::Status CheckOriginals(Stream& stream, std::vector<Violation>& found) const;

  const buffers::BufferState* Find(int id) const {
    return id >= 0 && id < static_cast<int>(buffers.size()) ? buffers[static_cast<size_t>(id)].get() : nullptr;
  }

  Device& device;
  const ManagerOptions options;
  std::atomic<bool> busy{false};

  std::unique_ptr<buffers::Reports> reports;
  DeviceBuffer control_memory;  // Control, chunk_tables[kMaxChunks], first_bad[kMaxBuffers]
  buffers::Control* control = nullptr;
  buffers::ChunkTable* chunk_tables = nullptr;  // of all chunks but the first
  int64_t* first_bad = nullptr;

  buffers::Arena constants;
  buffers::Arena writable;
  std::vector<buffers::Chunk> chunks;
  std::vector<std::unique_ptr<buffers::BufferState>> buffers;  // by id; those of one chunk follow each other
  int sealed_buffers = 0;
  int refilled_buffers = 0;
  size_t late_bytes = 0;  // of kRefilled buffers registered after the first Seal
  std::vector<std::unique_ptr<buffers::RegionWatcher>> protected_regions;

  std::unique_ptr<buffers::StagingRing> ring;  // from the first Seal on
  buffers::InlinePrologues inline_params;      // where they are put together
  uint64_t next_sequence = 1;                  // of the step that is armed next
  int64_t step = 0;                            // steps begun
  bool step_open = false;
  Extent step_bucket;
  Extent step_extent;
  std::atomic<bool> awaiting_launch{false};  // armed by the runner, which has not said yet what became of the launch

  std::vector<buffers::GraphEntry> graphs;  // by id; kMaxGraphs are reserved
  std::vector<std::unique_ptr<const std::string>> graph_names;
  const char* current_graph = "";  // the runner that captures, or captured last
  int64_t runs = 0;
  int64_t replays = 0;
  const void* last_stream = nullptr;  // native, of the last replay or eager prologue
  std::unique_ptr<Event> replayed;    // end of the last replay that a runner launched, or of a later eager prologue
};

absl::Status SecondThread();

}  // namespace pristine

#endif  // PRISTINE_BUFFERS_MANAGER_IMPL_H_
