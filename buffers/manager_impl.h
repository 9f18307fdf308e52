// The state behind BufferManager. Its methods are in buffer_manager.cc (set-up), buffer_manager_step.cc (each step) and
// buffer_manager_check.cc (restore and check).
#ifndef PRISTINE_BUFFERS_MANAGER_IMPL_H_
#define PRISTINE_BUFFERS_MANAGER_IMPL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "buffers/arena.h"
#include "buffers/deltas.h"
#include "buffers/flight_log.h"
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
  ~RegionWatcher() override { Stop(); }
  void Stop() { device_.Unwatch(std::exchange(id_, 0)); }
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
  Arena::Mark before;         // where its arena stood before it
  Arena::Mark shadow_before;  // and that of the shadows
  bool adopted = false;
  size_t late_bytes = 0;  // of ManagerOptions::late_refill_bytes

  // kRefilled only.
  std::vector<std::byte> values;   // of the last Refill, for Keep; of a buffer with deltas empty
  std::unique_ptr<Deltas> deltas;  // null: takes no deltas
  std::unique_ptr<RegionWatcher> shadow_watcher;
  int64_t count = -1;              // elements of the last values; -1: never given any
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
  int chunks = 0;                 // the first that its prologue covers; 0: not recorded
  bool recorded = false;          // the engine recorded a prologue, or ran one eagerly
  bool armed_unrecorded = false;  // and before that it armed one
  int chunks_before = 0;          // of the last capture that succeeded: a failed recapture leaves that graph in place
  int64_t order = 0;              // of its last run among all runs; 0: none
  int64_t replay = 0;             // the step of that run; 0: a capture or warm-up

  // Of a graph whose prologue node may be given other parameters: a GraphRunner's, or an engine's that is attached.
  std::unique_ptr<PrologueParams> params;     // as captured
  std::unique_ptr<PrologueParams> recording;  // of the capture that has not ended; null: not at its head
  const GraphExec* exec = nullptr;
  std::unique_ptr<GraphExec> attached;  // null: not attached
  int node = -1;                        // in `exec`; -1: not known
  bool inlines = false;                 // the node takes steps in its parameters; false: they come through the ring
  int refilled = 0;                     // kRefilled buffers of its chunks, which come first in a step's table
  int size = 0;                         // place in kInlineBytes of the parameters
  int enough = 0;                       // the largest that the steps needed since it was chosen
  int smaller = 0;                      // steps in a row that needed less
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

absl::Status SecondThread();

class BufferManager::Impl final : public Witness {
 public:
  Impl(Device& its_device, const ManagerOptions& its_options)
      : device(its_device),
        options(its_options),
        constants(its_device, "constants"),
        writable(its_device, "writable buffers"),
        shadows(its_device, "shadows") {
    device.AddWitness(this);
  }
  ~Impl() override { device.RemoveWitness(this); }

  // Of all that was ever reported, polled or not.
  std::string LastViolation() override;

  // Held for the length of a public call: finds a second thread inside one, and a device that is lost.
  class Call {
   public:
    explicit Call(Impl& impl) : impl_(impl), entered_(!impl.busy.exchange(true, std::memory_order_acquire)) {}
    ~Call() {
      if (entered_) impl_.busy.store(false, std::memory_order_release);
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    bool entered() const { return entered_; }
    absl::Status status() const { return entered_ ? impl_.device.status() : SecondThread(); }

   private:
    Impl& impl_;
    const bool entered_;
  };

  bool sealed() const { return ring != nullptr && sealed_buffers == static_cast<int>(buffers.size()); }
  absl::Status Seal();
  absl::Status SealNewBuffers();
  buffers::Arena& ArenaOf(Role role) { return role == Role::kConstant ? constants : writable; }

  // The entry of (graph, bucket), made if it is new. RESOURCE_EXHAUSTED: kMaxGraphs.
  absl::StatusOr<int> EntryOf(const char* graph, const Extent& bucket);
  int FindEntry(const char* graph, const Extent& bucket) const;  // -1: there is none
  void AddToSignature(const buffers::GraphEntry& entry, Signature& signature) const;
  // OUT_OF_RANGE: `bucket` needs more elements than a buffer of the first `chunks` chunks has.
  absl::Status CheckCapacities(const Extent& bucket, int chunks) const;

  buffers::PrologueParams Prologue(buffers::PrologueMode mode, const Extent& bucket, int chunks, int graph) const;
  absl::Status LaunchPrologue(Stream& stream, int graph);
  buffers::PrologueParams ReplayPrologue(const buffers::GraphEntry& entry, int graph) const;
  absl::Status TryInline(buffers::GraphEntry& entry, GraphExec& exec);
  static absl::Status PutBack(buffers::GraphEntry& entry, GraphExec& exec);
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
  // Sets entry.size so that it holds `need` bytes; one does.
  static void ChooseSize(buffers::GraphEntry& entry, size_t need);
  template <int kPlace = 0>
  absl::Status SetInline(buffers::GraphEntry& entry, const buffers::SlotHeader& header, GraphExec& exec);
  void TakeBackUnlaunchedStep();
  // The buffer that takes values in the open step. `call`: what is asked for, in messages.
  absl::StatusOr<buffers::BufferState*> Taker(int buffer, size_t element_bytes, const char* call);
  absl::Status Stage(buffers::BufferState& buffer, absl::Span<const std::byte> values, int64_t count);
  // `buffer` has `count` new values for the open step.
  void Given(buffers::BufferState& buffer, int64_t count);
  // Calls `body` with each buffer with deltas that the graph of `entry` takes.
  void ForEachWithDeltas(const buffers::GraphEntry& entry, absl::FunctionRef<void(buffers::BufferState& buffer)> body);
  // Puts what the open step changes into its slot.
  absl::Status StageDeltas(const buffers::GraphEntry& entry, const Extent& extent);
  size_t Poll(absl::Span<Violation> out);
  // Calls body(tail's place, buffer) for the buffers whose tails the flight recorder keeps in graphs of `bucket`.
  template <class Body>
  void ForEachTail(const Extent& bucket, Body body) const {
    int place = 0;
    for (const auto& buffer : buffers) {
      if (buffer->spec.role != Role::kRefilled || buffer->spec.kind != Kind::kIndptr) continue;
      if (buffers::UsedBy(buffer->spec, bucket)) body(place++, *buffer);
      if (place == buffers::kFlightTails) return;
    }
  }
  Violation ToViolation(const ReportRecord& record) const;
  void SetGraph(Violation& violation, int32_t graph) const;
  // Marks the end of the manager's last work.
  absl::Status Mark(Stream& stream, Event& event);
  absl::Status MarkEnd(Stream& stream, uint64_t sequence);
  absl::StatusOr<bool> HasRoom();
  absl::Status WaitForRoom();
  ReportRing Ring(int graph) const;

  // Copies constants, with `refilled_too` kRefilled buffers, and guard bands back. Blocks.
  absl::Status ReadBack(Stream& stream, bool refilled_too, buffers::ReadBack& out) const;
  static Violation Difference(Violation::Kind kind, const buffers::BufferState& buffer, const std::byte* was,
                              const std::byte* is, int64_t index);
  // Of the byte at `index` of `band`.
  Violation BandDamage(const buffers::GuardBand& band, int64_t index, std::byte was, std::byte is) const;
  void CheckBands(const buffers::ReadBack& read, std::vector<Violation>& found) const;
  absl::Status CheckOriginals(Stream& stream, std::vector<Violation>& found) const;
  absl::Status CheckShadows(Stream& stream, std::vector<Violation>& found) const;

  const buffers::BufferState* Find(int id) const {
    return id >= 0 && id < static_cast<int>(buffers.size()) ? buffers[static_cast<size_t>(id)].get() : nullptr;
  }

  Device& device;
  const ManagerOptions options;
  std::atomic<bool> busy{false};
  // Held while `reports`, `buffers` or `graphs` change, which LastViolation reads on other threads. Never in a step.
  std::mutex names_mutex;

  std::unique_ptr<buffers::Reports> reports;
  buffers::FlightLog flights;
  DeviceBuffer control_memory;  // Control, chunk_tables[kMaxChunks], first_bad[kMaxBuffers]
  buffers::Control* control = nullptr;
  buffers::ChunkTable* chunk_tables = nullptr;  // of all chunks but the first
  int64_t* first_bad = nullptr;

  buffers::Arena constants;
  buffers::Arena writable;
  buffers::Arena shadows;  // of buffers with deltas
  std::vector<buffers::Chunk> chunks;
  std::vector<std::unique_ptr<buffers::BufferState>> buffers;  // by id; those of one chunk follow each other
  std::vector<int> with_deltas;                                // ids
  int sealed_buffers = 0;
  int refilled_buffers = 0;
  size_t late_bytes = 0;  // of kRefilled buffers registered after the first Seal
  std::vector<std::unique_ptr<buffers::RegionWatcher>> protected_regions;
  std::vector<std::unique_ptr<buffers::RegionWatcher>> stopped_watchers;  // reports may still have their names

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
  Event* marked = nullptr;            // its end; null: the mark was refused
  std::unique_ptr<Event> replayed;    // end of an eager prologue
  struct End {
    std::unique_ptr<Event> event;
    uint64_t sequence = 0;  // the step whose replay it is the end of; 0: none
  };
  End& EndOf(uint64_t sequence) { return ends[sequence % ends.size()]; }
  std::vector<End> ends;  // of the last staging_slots steps
};

// Waits for copies into host memory that is about to go, whatever became of queueing the rest of them: `queued`. A wait
// that is refused is asked for once more; after a failure of the device nothing runs any longer.
absl::Status WaitForCopies(Stream& stream, const absl::Status& queued);

}  // namespace pristine

#endif  // PRISTINE_BUFFERS_MANAGER_IMPL_H_
