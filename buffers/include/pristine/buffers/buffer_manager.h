// BufferManager: owns the inputs that captured graphs read, together with a read-only original of each.
//
//   registering --first capture--> sealed --Register--> registering a further chunk --next capture--> sealed …
//
// Each step:   BeginStep(bucket, extent);  Refill(buffer, values)…;
//              GraphRunner::Replay (or BeforeReplay + the engine's launch)
// Each graph:  its first node is the prologue, one kernel: compare (sampled), restore originals, place the step's
//              values, pad the tails, validate; if validation fails it makes the replay harmless before the body runs.
#ifndef PRISTINE_BUFFERS_BUFFER_MANAGER_H_
#define PRISTINE_BUFFERS_BUFFER_MANAGER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "pristine/buffers/buffer_spec.h"
#include "pristine/buffers/flight_recorder.h"
#include "pristine/buffers/report.h"
#include "pristine/buffers/violation.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/graph_hook.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/signature.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine {

// A registered buffer. `live` is the address that graphs bake in; it never moves.
template <class T>
struct Buffer {
  int id = -1;
  DeviceSpan<T> live;
};

enum class OnViolation {
  kNeutralise,  // record it, and make the replay harmless: lengths minimal, indptr flat, slots -1, pages the dummy page
  kRecord,      // record it and go on
  kTrap,        // record it and trap: the device is lost, for good (IsDeviceLost in status.h)
};

struct ManagerOptions {
  enum class Check {
    kOff,
    kSampled,  // every sample_every-th replay
    kAlways,
  } check = Check::kSampled;  // compare constants with their originals in the prologue, before anything is overwritten
  int sample_every = 16;
  enum class Restore {
    kGraphHead,  // the prologue restores kRestored buffers at the head of each graph
    kStream,     // the caller does, with Restore(stream), tails as in the original; captures and warm-ups restore as
                 // always, and a violated replay is made harmless as always
    kOff,        // never, not even around warm-ups: what engines do today. For showing the bug
  } restore = Restore::kGraphHead;
  OnViolation on_violation = OnViolation::kNeutralise;
  // A step whose values take up to so many bytes travels in the parameters of the prologue's node, set before the
  // launch. A larger one is copied to the device through a staging slot, on a stream of the manager's own, and so
  // during the replay before, if what had the slot last has run by then. A step of an engine's graph that is not
  // attached (AttachExec) takes a slot whatever its size, and is copied on the replay's stream. 0: so are all steps.
  static constexpr size_t kMaxParameterBytes = 8192;
  size_t parameter_bytes = kMaxParameterBytes;
  // Depth of the overlap, 2 to 64: so many steps may be armed that the device has not begun; while a replay runs they
  // fit behind it. However a step travels; those that need a staging slot use the slots in turn.
  int staging_slots = 4;
  size_t late_refill_bytes =
      1u << 20;  // room in each staging slot for kRefilled buffers registered after the first capture
  bool poison_scratch = false;
  // How many replays the flight recorder remembers, rounded up to a power of two, 64 bytes of pinned memory each.
  // 0: off, no memory. At most kMaxFlightRecords.
  static constexpr int kMaxFlightRecords = 1 << 20;
  int flight_records = 1024;
};

// A manager is one ordered sequence: used by one thread at a time, and its replays follow each other on one stream, or
// on streams that the caller orders. Checked: a second thread inside a call, or another stream while the last replay,
// Restore or RestoreAll is still running, is FAILED_PRECONDITION. Of a graph that the engine launches by itself the
// manager sees only that its prologue has begun: its end is for the engine to order. The accessors (stats, generation,
// name, LastWriter, report_ring, …) and FindPolluter's own looks are not checked: call them from the manager's thread.
// Graphs that may run at the same time need two managers. BeginStep, Refill,
// Update, MoveRow, Keep, Replay's hooks and Poll do not allocate, lock, log or synchronize.
class BufferManager final : public GraphHook {
 public:
  // `device` must outlive the manager; the manager must outlive every graph that uses its buffers.
  // INVALID_ARGUMENT: an option out of range. RESOURCE_EXHAUSTED: no memory.
  static absl::StatusOr<std::unique_ptr<BufferManager>> Create(Device& device, ManagerOptions options = {});
  ~BufferManager() override;

  // --- set-up ---

  // Allocates a live buffer of original.size() elements. `original` is what captures and warm-ups see and what restores
  // put back: choose the worst case that kernels may meet (docs/roles_and_padding.md). It is copied before the call
  // returns. Every kind's original must obey its own rule (INVALID_ARGUMENT with index and value).
  // ALREADY_EXISTS: name taken. INVALID_ARGUMENT: empty; a kind that needs int32; a limit or axis that does not fit.
  // NOT_FOUND: an id in derived_from. RESOURCE_EXHAUSTED: no memory, more than 1024 buffers, past late_refill_bytes.
  template <class T>
  absl::StatusOr<Buffer<T>> Register(const BufferSpec& spec, absl::Span<const T> original) {
    static_assert(std::is_trivially_copyable_v<T>);
    return Typed<T>(RegisterBytes(spec, ElementOf<T>(), {nullptr, 0}, Bytes(original), original.size()));
  }
  // Registers memory that the engine owns at its own address; it must outlive the manager. Treated alike but for guard
  // bands. INVALID_ARGUMENT too: null, a size that is not the original's, misaligned for T, overlaps another buffer.
  template <class T>
  absl::StatusOr<Buffer<T>> Adopt(const BufferSpec& spec, DeviceSpan<T> live, absl::Span<const T> original) {
    static_assert(std::is_trivially_copyable_v<T>);
    return Typed<T>(RegisterBytes(spec, ElementOf<T>(), AsWritableBytes(live), Bytes(original), original.size()));
  }
  // The same with the buffer's present contents as the original; blocks while they are read back. A kSlot's original
  // is its padded value instead, whatever it holds.
  template <class T>
  absl::StatusOr<Buffer<T>> Adopt(const BufferSpec& spec, DeviceSpan<T> live) {
    static_assert(std::is_trivially_copyable_v<T>);
    return Typed<T>(AdoptBytes(spec, ElementOf<T>(), AsWritableBytes(live), live.size()));
  }
  // Takes back the registration of buffer `first` and all after it: their names are free again, their addresses are not
  // to be used. See RegistrationScope. FAILED_PRECONDITION: one of them is sealed. INVALID_ARGUMENT: not in
  // [0, registered()].
  absl::Status Unregister(int first);
  int registered() const;  // buffers; the next one has this id
  // Watches memory that is not a buffer, such as a KV pool, for undeclared writes (Device::Watch). The memory must
  // outlive the manager. Does nothing on devices that do not enforce accesses.
  absl::Status Protect(const std::string& name, DeviceSpan<const std::byte> memory, size_t element_bytes);

  // --- each step ---

  // Opens a step for `bucket` with real extent `extent`; drops an open step that was not replayed. Earlier steps may
  // still run: what is refilled and planned for this one reaches none of them. OUT_OF_RANGE: `extent` does not fit in
  // `bucket`. RESOURCE_EXHAUSTED, at once: the step that came staging_slots before it has not begun. See WaitForSlot.
  absl::Status BeginStep(const Extent& bucket, const Extent& extent);
  // Takes the real values for the open step; `values` may be reused on return. Bumps the buffer's generation.
  // FAILED_PRECONDITION: no open step. INVALID_ARGUMENT: not kRefilled; values.size() is not the axis's count for the
  // step's extent. OUT_OF_RANGE: more than the buffer holds. Values themselves are checked on the device.
  template <class T>
  absl::Status Refill(const Buffer<T>& buffer, absl::Span<const T> values) {
    return RefillBytes(buffer.id, ElementOf<T>().bytes, Bytes(values), values.size());
  }
  // Asserts that the values of the last step still hold, for the same extent. Bumps the generation as a Refill does.
  // FAILED_PRECONDITION: never refilled, or refilled for another extent.
  template <class T>
  absl::Status Keep(const Buffer<T>& buffer) {
    return KeepBytes(buffer.id);
  }
  // For buffers with BufferSpec::deltas: a step sends what changed, and the prologue applies it to a copy of the whole
  // buffer on the device, from which it places the step's part. Calls take effect on the host's copy in the order made,
  // and stay even if the step is dropped: what the device lacks goes with the next step that takes the buffer, which
  // sends all where that is less. Elements past the extent of a step that was armed hold the padding from then on, and
  // so do those that a later extent adds, until they are written.
  //
  // Writes `values` to the ranges, one after the other; no range, no change. Bumps the generation as a Refill does.
  // FAILED_PRECONDITION: no open step. INVALID_ARGUMENT: no deltas; a negative count; counts that do not add up to
  // values.size(). OUT_OF_RANGE: an element past the step's extent. Nothing is written then.
  struct Range {
    int64_t first = 0;
    int64_t count = 0;
  };
  template <class T>
  absl::Status Update(const Buffer<T>& buffer, absl::Span<const Range> ranges, absl::Span<const T> values) {
    return UpdateBytes(buffer.id, ElementOf<T>().bytes, ranges, Bytes(values), values.size());
  }
  template <class T>
  absl::Status Update(const Buffer<T>& buffer, int64_t first, absl::Span<const T> values) {
    const Range range = {first, static_cast<int64_t>(values.size())};
    return UpdateBytes(buffer.id, ElementOf<T>().bytes, {&range, 1}, Bytes(values), values.size());
  }
  // Moves a row (Axis::per elements) of requests or tokens, as engines do to close the gap of a request that is done:
  // `to` holds what `from` held, `from` the padding. `from` may lie past the step's extent. Errors as Update;
  // INVALID_ARGUMENT too: another axis.
  template <class T>
  absl::Status MoveRow(const Buffer<T>& buffer, int64_t from, int64_t to) {
    return MoveRowBytes(buffer.id, ElementOf<T>().bytes, from, to);
  }
  // Blocks until BeginStep would be granted, not longer; on HostDeferred, which has to be made to run, until that
  // earlier step's replay has ended. The only call of a step that blocks. An open step stays open. The error of a
  // stream that has failed.
  absl::Status WaitForSlot();

  // How often the buffer was refilled or kept. -1: no such buffer.
  int64_t generation(int buffer) const;

  // --- graphs that the engine captures and launches by itself (GraphRunner calls these by itself) ---

  // Queues the prologue; in a capture it must be the first node (FAILED_PRECONDITION otherwise). Outside a capture it
  // runs eagerly, for the step that BeforeReplay armed. The first one of a capture seals what is registered (blocks, so
  // call Seal() before beginning a capture; FAILED_PRECONDITION otherwise).
  absl::Status RecordPrologue(Stream& stream, const Extent& bucket);
  // Ends registration of the current chunk: uploads originals and makes them read-only. Blocks. Does nothing when there
  // is nothing new.
  absl::Status Seal();
  // Checks the open step and arms exactly one staging slot for the next launch of the graph of `bucket` on `stream`.
  // FAILED_PRECONDITION, naming both numbers: no open step, a buffer neither refilled nor kept, a step for another
  // bucket or extent, a buffer derived from an older generation of another; also the second one for a bucket without a
  // RecordPrologue, whose graph would never take the step. Nothing is queued then. Launching without it, or calling it
  // twice for one launch, is found on the device: reported and neutralised.
  absl::Status BeforeReplay(Stream& stream, const Extent& bucket, const Extent& extent);

  // Where the engine hands over the graph that it captured with RecordPrologue and the exec that it made from it
  // (cudaGraph_t and cudaGraphExec_t, in PyTorch raw_cuda_graph() and raw_cuda_graph_exec(); on Host, Graph* and
  // GraphExec*), small steps travel in the parameters of its prologue too (ManagerOptions::parameter_bytes):
  // BeforeReplay sets them for the next launch, all of them each time, so that an update of the exec between two steps
  // takes nothing away. Both must stay alive until DetachExec, and the exec must be launched from one thread. Blocks.
  // FAILED_PRECONDITION: no capture recorded this bucket's prologue, or an exec is attached already. NOT_FOUND: the
  // graph holds no prologue. INVALID_ARGUMENT: null, or the exec was not made from that graph.
  absl::Status AttachExec(const Extent& bucket, void* graph, void* exec);
  // Its steps go through staging slots again. Before the exec is destroyed, and before the bucket is captured or run
  // eagerly: RecordPrologue for it is FAILED_PRECONDITION until then. NOT_FOUND: none is attached.
  absl::Status DetachExec(const Extent& bucket);

  // --- restore and check ---

  // Queues the copy of the originals of all kRestored buffers. For Restore::kStream.
  absl::Status Restore(Stream& stream);
  // Queues the copy of all originals, of all roles: the state that captures and warm-ups see, for graphs of `bucket`.
  // Unless Check::kOff, constants are compared first: one that a warm-up polluted is reported, with replay 0.
  absl::Status RestoreAll(Stream& stream, const Extent& bucket);
  // Queues (or records) a check that `actual` equals `expected` over the bucket's part of `expected`'s axis; reports
  // kPlanMismatch at the first difference. The body goes on.
  absl::Status CheckEqual(Stream& stream, const Buffer<int32_t>& expected, const Buffer<int32_t>& actual,
                          const Extent& bucket);
  // Moves up to out.size() reports that have arrived since the last call to `out`; returns how many. Never blocks or
  // calls the driver; works after the device context has died.
  size_t Poll(absl::Span<Violation> out);
  // The newest records of the flight recorder, up to out.size() of them, oldest first; returns how many. What a replay
  // in flight is writing is left out. Never blocks, allocates or calls the driver; works after the device context has
  // died.
  size_t FlightRecords(absl::Span<FlightRecord> out) const;
  // Waits for `stream`, then compares constants with their originals, guard bands, originals with what was sealed, and
  // shadows with what they should hold after the last step that ran (not while a Refill is on its way). Does not heal.
  // Includes reports not yet polled. Empty: clean.
  absl::StatusOr<std::vector<Violation>> Verify(Stream& stream);

  // Who last ran a graph that covers `index` of a kRestored buffer: warm-ups and captures count, with replay 0.
  struct Writer {
    const char* graph = "";
    Extent bucket;
    int64_t replay = 0;
  };
  // NOT_FOUND: nothing ran.
  absl::StatusOr<Writer> LastWriter(int buffer, int64_t index) const;

  struct Stats {
    int64_t replays = 0;          // armed
    int64_t restored_bytes = 0;   // copied from originals by prologues and Restore
    int64_t expected_writes = 0;  // checked replays that found a kRestored buffer changed, as is its right
    int64_t healed = 0;           // constants found polluted and put back
    int64_t neutralised = 0;      // replays made harmless
    int64_t lost_reports = 0;     // reports overwritten before Poll saw them
  };
  // As of what has run by now. Does not block.
  Stats stats() const;
  ProtectionLevel protection_level() const;
  bool sealed() const;
  Device& device() const;
  // The name of a buffer; "" if there is none.
  const char* name(int buffer) const;
  // The sealed original of a buffer: read-only memory that stays. Empty before it is sealed.
  DeviceSpan<const std::byte> original(int buffer) const;
  // What the device holds of a buffer with BufferSpec::deltas beside the live buffer; only prologues write it. Empty
  // for others.
  DeviceSpan<const std::byte> shadow(int buffer) const;
  // The manager's part of GraphRunner::SignatureHash, for the graph of `bucket` that the engine captures by itself:
  // ranks compare it beside what they know of their nodes. Over the bucket, ManagerOptions, and the buffers that its
  // prologue covers: names, roles, kinds, axes, sizes and contracts, in order. Limits, dummies and originals are left
  // out: they follow from each rank's own memory. NOT_FOUND: no prologue was recorded for `bucket`.
  absl::StatusOr<uint64_t> SignatureHash(const Extent& bucket) const;
  // For kernels of others that report into Poll; `bucket` names the graph in the reports.
  ReportRing report_ring(const Extent& bucket);

 private:
  struct Element {
    size_t bytes;
    bool is_int32;
  };
  template <class T>
  static constexpr Element ElementOf() {
    return {sizeof(T), std::is_same_v<T, int32_t>};
  }
  template <class T>
  static absl::Span<const std::byte> Bytes(absl::Span<const T> values) {
    return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
  }
  struct Registered {
    int id;
    void* live;
    size_t size;
  };
  template <class T>
  static absl::StatusOr<Buffer<T>> Typed(absl::StatusOr<Registered> registered) {
    if (!registered.ok()) return registered.status();
    return Buffer<T>{registered->id, {static_cast<T*>(registered->live), registered->size}};
  }

  // GraphHook, for GraphRunner.
  absl::Status BeforeCapture(Stream& stream, const RunInfo& info) override;
  absl::Status RecordPrologue(Stream& stream, const RunInfo& info) override;
  void AfterCapture(const RunInfo& info, const absl::Status& outcome) override;
  absl::Status BeforeReplay(Stream& stream, const RunInfo& info) override;
  void AfterReplay(Stream& stream, const RunInfo& info, const absl::Status& outcome) override;
  void AddToSignature(const RunInfo& info, Signature& signature) const override;

  absl::StatusOr<Registered> RegisterBytes(const BufferSpec& spec, Element element, DeviceSpan<std::byte> live,
                                           absl::Span<const std::byte> original, size_t size);
  absl::StatusOr<Registered> AdoptBytes(const BufferSpec& spec, Element element, DeviceSpan<std::byte> live,
                                        size_t size);
  absl::Status RefillBytes(int buffer, size_t element_bytes, absl::Span<const std::byte> values, size_t size);
  absl::Status KeepBytes(int buffer);
  absl::Status UpdateBytes(int buffer, size_t element_bytes, absl::Span<const Range> ranges,
                           absl::Span<const std::byte> values, size_t size);
  absl::Status MoveRowBytes(int buffer, size_t element_bytes, int64_t from, int64_t to);

  friend absl::StatusOr<std::vector<Violation>> FindPolluter(BufferManager& manager, Stream& stream,
                                                             const Extent& bucket,
                                                             absl::FunctionRef<absl::Status(Stream&)> body);
  class Impl;
  explicit BufferManager(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// What a wrapper that registers several buffers holds while it does: either all of them are registered or none.
class RegistrationScope {
 public:
  explicit RegistrationScope(BufferManager& manager) : manager_(manager), first_(manager.registered()) {}
  ~RegistrationScope() {
    if (!kept_) manager_.Unregister(first_).IgnoreError();
  }
  RegistrationScope(const RegistrationScope&) = delete;
  RegistrationScope& operator=(const RegistrationScope&) = delete;
  void Keep() { kept_ = true; }

 private:
  BufferManager& manager_;
  const int first_;
  bool kept_ = false;
};

}  // namespace pristine

#endif  // PRISTINE_BUFFERS_BUFFER_MANAGER_H_
