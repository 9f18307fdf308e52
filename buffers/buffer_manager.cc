#include "pristine/buffers/buffer_manager.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "buffers/manager_impl.h"
#include "buffers/rules.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {

using buffers::BufferRecord;
using buffers::BufferState;
using buffers::Chunk;
using buffers::StagingRing;

namespace {

size_t RoundUp(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

absl::Status CheckOptions(const ManagerOptions& options) {
  if (options.staging_slots < 2 || options.staging_slots > buffers::kMaxSlots) {
    return absl::InvalidArgumentError(absl::StrCat("ManagerOptions::staging_slots is ", options.staging_slots,
                                                   "; it must be in [2, ", buffers::kMaxSlots, "]"));
  }
  if (options.sample_every < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("ManagerOptions::sample_every is ", options.sample_every, "; it must be at least 1"));
  }
  if (options.parameter_bytes > ManagerOptions::kMaxParameterBytes) {
    return absl::InvalidArgumentError(absl::StrCat("ManagerOptions::parameter_bytes is ", options.parameter_bytes,
                                                   "; at most ", ManagerOptions::kMaxParameterBytes));
  }
  constexpr size_t kMaxLate = size_t{1} << 32;
  if (options.late_refill_bytes > kMaxLate) {
    return absl::InvalidArgumentError(
        absl::StrCat("ManagerOptions::late_refill_bytes is ", options.late_refill_bytes, "; at most ", kMaxLate));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status SecondThread() {
  return absl::FailedPreconditionError(
      "another thread is inside a call of this BufferManager; a manager is used by one thread at a time");
}

absl::Status buffers::RegionWatcher::Start(const void* address, size_t bytes, size_t element_bytes) {
  PRISTINE_ASSIGN_OR_RETURN(id_, device_.Watch({name_, address, bytes, element_bytes}, this));
  return absl::OkStatus();
}

void buffers::RegionWatcher::OnUndeclaredWrite(const UndeclaredWrite& write) {
  reports_.AddUndeclared(name_.c_str(), write, *control_);
}

absl::StatusOr<std::unique_ptr<BufferManager>> BufferManager::Create(Device& device, ManagerOptions options) {
  PRISTINE_RETURN_IF_ERROR(CheckOptions(options));
  auto impl = std::make_unique<Impl>(device, options);
  impl->graphs.reserve(buffers::kMaxGraphs);
  PRISTINE_ASSIGN_OR_RETURN(impl->reports, buffers::Reports::Create(device));
  PRISTINE_ASSIGN_OR_RETURN(impl->replayed, device.CreateEvent());

  constexpr size_t kFirstBad = sizeof(buffers::Control) + buffers::kMaxChunks * sizeof(buffers::ChunkTable);
  std::vector<std::byte> initial(kFirstBad + buffers::kMaxBuffers * sizeof(int64_t));
  const buffers::Control control;
  std::memcpy(initial.data(), &control, sizeof(control));
  for (int i = 0; i < buffers::kMaxBuffers; ++i) {
    std::memcpy(&initial[kFirstBad + static_cast<size_t>(i) * sizeof(int64_t)], &buffers::kNoIndex, sizeof(int64_t));
  }
  PRISTINE_ASSIGN_OR_RETURN(impl->control_memory, device.Allocate(initial.size(), "prologue control"));
  std::byte* const address = impl->control_memory.As<std::byte>().address();
  impl->control = reinterpret_cast<buffers::Control*>(address);
  impl->chunk_tables = reinterpret_cast<buffers::ChunkTable*>(address + sizeof(control));
  impl->first_bad = reinterpret_cast<int64_t*>(address + kFirstBad);
  PRISTINE_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device.CreateStream());
  PRISTINE_RETURN_IF_ERROR(stream->CopyFromHost(impl->control_memory.As<std::byte>(), initial));
  PRISTINE_RETURN_IF_ERROR(stream->Synchronize());
  return std::unique_ptr<BufferManager>(new BufferManager(std::move(impl)));
}

BufferManager::BufferManager(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

// Queued prologues still use the memory. What a dead context answers changes nothing.
BufferManager::~BufferManager() {
  if (impl_->device.Synchronize().ok()) return;
  // A stream is capturing: what this manager queued is waited for by itself.
  impl_->replayed->Synchronize().IgnoreError();
  if (impl_->ring != nullptr) impl_->ring->WaitAll();
}

absl::StatusOr<BufferManager::Registered> BufferManager::RegisterBytes(const BufferSpec& spec, Element element,
                                                                       DeviceSpan<std::byte> live,
                                                                       absl::Span<const std::byte> original,
                                                                       size_t size) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  Impl& impl = *impl_;
  const bool adopt = live.address() != nullptr || live.size() > 0;
  if (spec.name.empty()) return absl::InvalidArgumentError("a buffer without a name; give each a unique one");
  for (const auto& other : impl.buffers) {
    if (other->spec.name == spec.name) {
      return absl::AlreadyExistsError(absl::StrCat("buffer ", spec.name, " is registered already"));
    }
  }
  if (size == 0) return absl::InvalidArgumentError(absl::StrCat("buffer ", spec.name, " has no elements"));
  if (adopt && (live.address() == nullptr || live.size() != original.size())) {
    return absl::InvalidArgumentError(absl::StrCat("buffer ", spec.name, ": adopts ", live.size(), " bytes at ",
                                                   live.address() == nullptr ? "null" : "its address",
                                                   ", and its original has ", original.size()));
  }
  const size_t alignment = std::min<size_t>(element.bytes & (~element.bytes + 1), 16);
  if (adopt && reinterpret_cast<uintptr_t>(live.address()) % alignment != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("buffer ", spec.name, ": the adopted address is not a multiple of ", alignment));
  }
  for (const auto& other : impl.buffers) {
    const std::byte* const begin = other->record.live;
    if (adopt && live.address() < begin + other->bytes && begin < live.address() + live.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("buffer ", spec.name, ": the adopted memory overlaps buffer ", other->spec.name));
    }
  }
  auto state = std::make_unique<BufferState>();
  BufferRecord& record = state->record;
  PRISTINE_RETURN_IF_ERROR(
      buffers::ResolveRules(spec, static_cast<int64_t>(size), element.bytes, element.is_int32, record));
  PRISTINE_RETURN_IF_ERROR(buffers::CheckOriginal(spec, record, original));
  for (const int id : spec.derived_from) {
    if (impl.Find(id) == nullptr) {
      return absl::NotFoundError(absl::StrCat("buffer ", spec.name, ": derived_from names ", id, "; ids are in [0, ",
                                              impl.buffers.size(), ")"));
    }
  }
  const int id = static_cast<int>(impl.buffers.size());
  if (id == buffers::kMaxBuffers) {
    return absl::ResourceExhaustedError(absl::StrCat("a manager holds at most ", buffers::kMaxBuffers, " buffers"));
  }
  const bool refilled = spec.role == Role::kRefilled;
  const size_t late = refilled && impl.ring != nullptr ? StagingRing::Footprint(original.size()) : 0;
  if (late > 0) {
    if (impl.late_bytes + late > impl.options.late_refill_bytes) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "buffer ", spec.name, " needs ", late, " bytes in each staging slot; of late_refill_bytes ",
          impl.options.late_refill_bytes, " there are ", impl.options.late_refill_bytes - impl.late_bytes, " left"));
    }
    if (impl.refilled_buffers == impl.ring->entries()) {
      return absl::ResourceExhaustedError(absl::StrCat("buffer ", spec.name, ": at most ", buffers::kLateRefilled,
                                                       " refilled buffers after the first capture"));
    }
  }

  std::byte* address = live.address();
  if (!adopt) {
    buffers::Arena& arena = spec.role == Role::kConstant ? impl.constants : impl.writable;
    PRISTINE_ASSIGN_OR_RETURN(address, arena.Carve(original.size(), id));
  }
  state->spec = spec;
  state->bytes = original.size();
  state->original.assign(original.begin(), original.end());
  record.id = id;
  record.live = address;
  if (spec.role != Role::kScratch) {
    state->watcher = std::make_unique<buffers::RegionWatcher>(impl.device, spec.name, *impl.reports, impl.control);
    const absl::Status started = state->watcher->Start(address, original.size(), element.bytes);
    if (!started.ok()) {
      if (!adopt) (spec.role == Role::kConstant ? impl.constants : impl.writable).Uncarve();
      return started;
    }
  }
  if (refilled) {
    record.refilled = impl.refilled_buffers++;
    state->values.resize(original.size());
    state->made_from.resize(spec.derived_from.size(), -1);
    impl.late_bytes += late;
  }
  impl.buffers.push_back(std::move(state));
  return Registered{id, address, size};
}

absl::StatusOr<BufferManager::Registered> BufferManager::AdoptBytes(const BufferSpec& spec, Element element,
                                                                    DeviceSpan<std::byte> live, size_t size) {
  if (live.address() == nullptr || live.size() == 0) {
    return absl::InvalidArgumentError(absl::StrCat("buffer ", spec.name, ": nothing to adopt"));
  }
  std::vector<std::byte> contents(live.size());
  if (spec.kind == Kind::kSlot && element.is_int32) {
    const int32_t pad = buffers::SlotPad(spec);
    for (size_t i = 0; i < size; ++i) std::memcpy(&contents[i * sizeof(pad)], &pad, sizeof(pad));
    return RegisterBytes(spec, element, live, contents, size);
  }
  PRISTINE_RETURN_IF_ERROR(impl_->device.Synchronize());
  PRISTINE_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, impl_->device.CreateStream());
  PRISTINE_RETURN_IF_ERROR(stream->CopyToHost(absl::MakeSpan(contents), live));
  PRISTINE_RETURN_IF_ERROR(stream->Synchronize());
  return RegisterBytes(spec, element, live, contents, size);
}

absl::Status BufferManager::Protect(const std::string& name, DeviceSpan<const std::byte> memory, size_t element_bytes) {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  if (memory.address() == nullptr || memory.empty() || element_bytes == 0) {
    return absl::InvalidArgumentError(absl::StrCat("Protect ", name, ": ", memory.size(), " bytes in elements of ",
                                                   element_bytes, "; both must be at least 1"));
  }
  auto watcher = std::make_unique<buffers::RegionWatcher>(impl_->device, name, *impl_->reports, impl_->control);
  PRISTINE_RETURN_IF_ERROR(watcher->Start(memory.address(), memory.size(), element_bytes));
  impl_->protected_regions.push_back(std::move(watcher));
  return absl::OkStatus();
}

absl::Status BufferManager::Seal() {
  const Impl::Call call(*impl_);
  if (!call.entered()) return SecondThread();
  return impl_->Seal();
}

absl::Status BufferManager::Impl::Seal() {
  if (sealed()) return absl::OkStatus();
  if (ring == nullptr) {
    size_t value_bytes = options.late_refill_bytes;
    for (const auto& buffer : buffers) {
      if (buffer->spec.role == Role::kRefilled) value_bytes += StagingRing::Footprint(buffer->bytes);
    }
    PRISTINE_ASSIGN_OR_RETURN(ring, StagingRing::Create(device, options.staging_slots,
                                                        refilled_buffers + buffers::kLateRefilled, value_bytes));
  }
  const size_t first = static_cast<size_t>(sealed_buffers);
  const size_t count = buffers.size() - first;
  if (count == 0) return absl::OkStatus();
  if (chunks.size() == buffers::kMaxChunks) {
    return absl::ResourceExhaustedError(absl::StrCat("buffers were registered and sealed ", buffers::kMaxChunks,
                                                     " times; register more of them before a capture"));
  }

  // The chunk's sealed memory: the tables, then each original.
  std::vector<size_t> offsets(count);
  const auto tiles_of = [](const BufferState& buffer) {
    return (buffer.bytes + size_t{buffers::kTileBytes} - 1) / size_t{buffers::kTileBytes};
  };
  size_t tiles = 0;
  for (size_t i = 0; i < count; ++i) tiles += tiles_of(*buffers[first + i]);
  const size_t by_tile = RoundUp(count * sizeof(BufferRecord), 256);
  size_t bytes = by_tile + RoundUp(tiles * sizeof(BufferRecord), 256);
  for (size_t i = 0; i < count; ++i) {
    offsets[i] = bytes;
    bytes += RoundUp(buffers[first + i]->bytes, 256);
  }
  Chunk chunk;
  PRISTINE_ASSIGN_OR_RETURN(chunk.originals, device.AllocateProtected(bytes, "originals"));
  const std::byte* const base = chunk.originals.span().address();
  std::vector<std::byte> contents(bytes);
  chunk.first = sealed_buffers;
  chunk.table.records = reinterpret_cast<const BufferRecord*>(base);
  chunk.table.count = static_cast<int32_t>(count);
  for (size_t i = 0; i < count; ++i) {
    BufferState& buffer = *buffers[first + i];
    buffer.record.original = base + offsets[i];
    std::memcpy(&contents[i * sizeof(BufferRecord)], &buffer.record, sizeof(BufferRecord));
    std::memcpy(&contents[offsets[i]], buffer.original.data(), buffer.bytes);
  }
  chunk.table.by_tile = reinterpret_cast<const BufferRecord*>(base + by_tile);
  for (const bool written : {true, false}) {
    for (size_t i = 0; i < count; ++i) {
      const BufferState& buffer = *buffers[first + i];
      if (written != (buffer.spec.role == Role::kRestored || buffer.spec.role == Role::kRefilled)) continue;
      BufferRecord record = buffer.record;
      for (const int64_t end = static_cast<int64_t>(tiles_of(buffer)); record.tile < end; ++record.tile) {
        std::memcpy(&contents[by_tile + static_cast<size_t>(chunk.table.tiles++) * sizeof(record)], &record,
                    sizeof(record));
      }
    }
    if (written) chunk.table.busy_tiles = chunk.table.tiles;
  }
  for (size_t i = 0; i < count; ++i) {
    if (buffers[first + i]->record.refilled < 0) continue;
    ring->Describe(buffers[first + i]->record);
    chunk.refilled.push_back(buffers[first + i].get());
  }
  PRISTINE_RETURN_IF_ERROR(chunk.originals.Write(0, contents));
  PRISTINE_RETURN_IF_ERROR(chunk.originals.Seal());

  // Live memory starts as the originals, whatever ManagerOptions::restore says later.
  PRISTINE_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device.CreateStream());
  PRISTINE_RETURN_IF_ERROR(constants.Close(*stream));
  PRISTINE_RETURN_IF_ERROR(writable.Close(*stream));
  buffers::PrologueParams params = Prologue(buffers::PrologueMode::kRestoreAll, {-1, -1}, 0, -1);
  params.first = chunk.table;
  params.num_chunks = 1;
  params.tiles = chunk.table.tiles;
  PRISTINE_RETURN_IF_ERROR(Launch(*stream, buffers::kPrologue, params));
  PRISTINE_RETURN_IF_ERROR(stream->Synchronize());
  if (!chunks.empty()) {
    const auto table = reinterpret_cast<const std::byte*>(&chunk.table);
    const DeviceSpan<std::byte> place = {reinterpret_cast<std::byte*>(&chunk_tables[chunks.size() - 1]),
                                         sizeof(chunk.table)};
    PRISTINE_RETURN_IF_ERROR(stream->CopyFromHost(place, {table, sizeof(chunk.table)}));
    PRISTINE_RETURN_IF_ERROR(stream->Synchronize());
  }
  chunks.push_back(std::move(chunk));
  sealed_buffers = static_cast<int>(buffers.size());
  return absl::OkStatus();
}

buffers::PrologueParams BufferManager::Impl::Prologue(buffers::PrologueMode mode, const Extent& bucket,
                                                      int covered_chunks, int graph) const {
  buffers::PrologueParams params;
  for (int i = 0; i < covered_chunks; ++i) {
    const buffers::ChunkTable& table = chunks[static_cast<size_t>(i)].table;
    if (i == 0) params.first = table;
    params.tiles += table.tiles;
    params.busy_tiles += table.busy_tiles;
    for (int b = 0; b < table.count; ++b) {
      const BufferState& buffer = *buffers[static_cast<size_t>(chunks[static_cast<size_t>(i)].first + b)];
      const bool used = bucket.requests < 0 || buffers::UsedBy(buffer.spec, bucket);
      if (used && buffer.spec.role == Role::kRestored) params.restored_bytes += static_cast<int64_t>(buffer.bytes);
    }
  }
  params.more = chunk_tables;
  params.num_chunks = covered_chunks;
  params.mode = mode;
  params.poison_scratch = options.poison_scratch;
  params.neutralise = options.on_violation == OnViolation::kNeutralise;
  params.trap = options.on_violation == OnViolation::kTrap;
  params.bucket = bucket;
  params.slots = ring->device_slots();
  params.slot_stride = ring->stride();
  params.num_slots = ring->slots();
  params.blocks = 2 * device.multiprocessors();
  params.control = control;
  params.first_bad = first_bad;
  params.board = reports->device_board();
  params.ring = Ring(graph);
  return params;
}

ReportRing BufferManager::Impl::Ring(int graph) const {
  return {reports->device_records(), &control->reports, &control->current, buffers::Reports::kCapacity, graph};
}

int BufferManager::Impl::FindEntry(const char* graph, const Extent& bucket) const {
  for (size_t i = 0; i < graphs.size(); ++i) {
    if (graphs[i].bucket == bucket && std::strcmp(graphs[i].graph, graph) == 0) return static_cast<int>(i);
  }
  return -1;
}

absl::StatusOr<int> BufferManager::Impl::EntryOf(const char* graph, const Extent& bucket) {
  if (const int found = FindEntry(graph, bucket); found >= 0) return found;
  if (graphs.size() == buffers::kMaxGraphs) {
    return absl::ResourceExhaustedError(absl::StrCat("a manager serves at most ", buffers::kMaxGraphs,
                                                     " graphs; no room for ", graph, " ", bucket.ToString()));
  }
  if (graph[0] != '\0') {
    graph_names.push_back(std::make_unique<const std::string>(graph));
    graph = graph_names.back()->c_str();
  } else {
    graph = "";
  }
  buffers::GraphEntry entry;
  entry.graph = graph;
  entry.bucket = bucket;
  graphs.push_back(std::move(entry));
  return static_cast<int>(graphs.size()) - 1;
}

absl::Status BufferManager::Impl::CheckCapacities(const Extent& bucket, int covered_chunks) const {
  if (bucket.requests < 1 || bucket.tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("bucket is ", bucket.ToString(), "; both counts must be at least 1"));
  }
  for (int c = 0; c < covered_chunks; ++c) {
    const Chunk& chunk = chunks[static_cast<size_t>(c)];
    for (int i = 0; i < chunk.table.count; ++i) {
      const BufferState& buffer = *buffers[static_cast<size_t>(chunk.first + i)];
      const int64_t capacity = buffer.record.capacity;
      const int64_t need = buffer.spec.axis.Count(bucket, capacity);
      if (buffers::UsedBy(buffer.spec, bucket) && need > capacity) {
        return absl::OutOfRangeError(absl::StrCat("bucket ", bucket.ToString(), " needs ", need, " elements of buffer ",
                                                  buffer.spec.name, ", which has ", capacity));
      }
    }
  }
  return absl::OkStatus();
}

int64_t BufferManager::generation(int buffer) const {
  const BufferState* const state = impl_->Find(buffer);
  return state == nullptr ? -1 : state->generation;
}

BufferManager::Stats BufferManager::stats() const {
  const buffers::Board board = impl_->reports->ReadBoard();
  Stats stats;
  stats.replays = impl_->replays;
  stats.restored_bytes = board.restored_bytes;
  stats.expected_writes = board.expected_writes;
  stats.healed = board.healed;
  stats.neutralised = board.neutralised;
  stats.lost_reports = impl_->reports->lost();
  return stats;
}

ProtectionLevel BufferManager::protection_level() const {
  if (impl_->chunks.empty()) return ProtectionLevel::kDigest;
  for (const Chunk& chunk : impl_->chunks) {
    if (chunk.originals.level() != ProtectionLevel::kHardware) return chunk.originals.level();
  }
  return ProtectionLevel::kHardware;
}

bool BufferManager::sealed() const { return impl_->sealed(); }

Device& BufferManager::device() const { return impl_->device; }

const char* BufferManager::name(int buffer) const {
  const BufferState* const state = impl_->Find(buffer);
  return state == nullptr ? "" : state->spec.name.c_str();
}

DeviceSpan<const std::byte> BufferManager::original(int buffer) const {
  const BufferState* const state = impl_->Find(buffer);
  if (state == nullptr || buffer >= impl_->sealed_buffers) return {};
  return {state->record.original, state->bytes};
}

ReportRing BufferManager::report_ring(const Extent& bucket) {
  const absl::StatusOr<int> entry = impl_->EntryOf(impl_->current_graph, bucket);
  return impl_->Ring(entry.ok() ? *entry : -1);
}

}  // namespace pristine
