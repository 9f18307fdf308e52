// The prologue: the one kernel at the head of each graph. It compares (where asked), restores originals, places the
// step's values, pads the tails and validates; the last block to finish makes the replay harmless if anything was
// wrong. POD only: the .cu file includes this.
#ifndef PRISTINE_BUFFERS_KERNELS_PROLOGUE_H_
#define PRISTINE_BUFFERS_KERNELS_PROLOGUE_H_

#include <cstddef>
#include <cstdint>

#include "pristine/buffers/report.h"
#include "pristine/graph_runtime/extent.h"
#include "pristine/graph_runtime/kernel.h"

namespace pristine::buffers {

inline constexpr int kMaxChunks = 16;
inline constexpr int kMaxSlots = 64;
inline constexpr int64_t kTileBytes = 16 << 10;  // of one buffer: what one block handles at a time

// What the kernel knows of a buffer. Rules are resolved to numbers when it is registered (rules.h).
struct alignas(16) BufferRecord {
  const std::byte* original = nullptr;
  std::byte* live = nullptr;
  int64_t capacity = 0;  // elements
  int64_t tile = 0;      // in a table of tiles: which of the buffer's
  int64_t element_bytes = 0;
  int32_t id = 0;
  int32_t refilled = -1;  // place in a slot's entry table; -1: not kRefilled
  int32_t role = 0;       // Role
  int32_t unit = 0;       // Axis::Unit
  int32_t per = 1;
  int32_t only_requests = -1;  // only graphs of this bucket use the buffer; -1: all do
  int32_t only_tokens = -1;
  int32_t lower = 0;  // smallest and largest legal value; for an indptr `upper` bounds the last one
  int32_t upper = 0;
  int32_t pad = 0;        // what the padded tail holds; an indptr repeats its last real value instead
  int32_t harmless = 0;   // what all of the bucket holds in a neutralised replay
  bool integers = false;  // int32 with a rule; otherwise bytes, which are padded with and neutralised to 0
  bool indptr = false;
  bool tail_to_end = false;  // the padded tail goes on to the end of the array
};

struct ChunkTable {
  const BufferRecord* records = nullptr;
  // A record for each tile, so that a block finds its work with one load. First those of buffers that every replay
  // writes.
  const BufferRecord* by_tile = nullptr;
  int64_t tiles = 0;
  int64_t busy_tiles = 0;
  int32_t count = 0;
};

// A step on its way to the prologue: header, entry table, values. All in a staging slot, or all in the kernel's own
// parameters, or the header in the parameters and the rest in a slot, whose own header then says 0.
struct SlotHeader {
  uint64_t sequence = 0;  // the step that armed it; 0: none yet
  Extent bucket;
  Extent extent;
  uint32_t check = 0;    // compare constants and restored buffers with their originals
  uint32_t entries = 0;  // in the table
  uint32_t values = 0;   // where the values begin, from the start of the header
  uint32_t bytes = 0;    // of values, of a step in parameters
  // Of a step in parameters: the slot that holds the table and the values; negative: they follow the header.
  int32_t slot = -1;
};
static_assert(sizeof(SlotHeader) == 48);
inline constexpr size_t kSlotTable = 48;  // where the entry table begins, from the start of the header
struct alignas(16) SlotEntry {
  int64_t offset = -1;  // of the entry's values, from the first of all, a multiple of 16; negative: none
  int64_t count = 0;    // elements
  // The buffer's rule, as in its record.
  int32_t buffer = -1;
  int32_t lower = 0;
  int32_t upper = 0;
  bool integers = false;
  bool indptr = false;
};
static_assert(sizeof(SlotEntry) == 32);

// Device memory that only prologues write.
struct Control {
  // The last step that a graph took, and below it how many blocks of the prologue that runs have begun: one atomic
  // gives a block both, and the block that finds all others begun may change it.
  uint64_t turn = 0;
  uint64_t current = 0;  // the step whose body runs; 0: a capture or warm-up
  uint64_t reports = 0;  // ReportRing::count
  int32_t graph = -1;    // of the body that runs
  uint64_t ticket = 0;   // what the blocks that are done have found (prologue_cuda.cu); not every launch counts them
  int64_t restored_bytes = 0;
  int64_t expected_writes = 0;
  int64_t healed = 0;
  int64_t neutralised = 0;
};

inline constexpr int kTurnBits = 20;

// Host-visible copy, so that the host learns of it without a call.
struct Board {
  uint64_t consumed = 0;  // the last step that began
  int64_t restored_bytes = 0;
  int64_t expected_writes = 0;
  int64_t healed = 0;
  int64_t neutralised = 0;
};

enum class PrologueMode : int32_t {
  kReplay,           // the head of a graph
  kRestoreAll,       // every buffer of the bucket = its original
  kRestoreRestored,  // every kRestored buffer = its original
};

inline constexpr int64_t kNoIndex = INT64_MAX;

struct PrologueParams {
  ChunkTable first;                  // of the first chunk, which most managers stop at
  const ChunkTable* more = nullptr;  // of the others, in device memory
  int32_t num_chunks = 0;
  PrologueMode mode = PrologueMode::kReplay;
  bool restore = true;              // whether kRestored buffers are put back
  bool neutralise_restored = true;  // whether they are made harmless with the rest
  bool compare_constants = false;   // kRestoreAll only: report constants that differ before they are put back
  bool poison_scratch = false;
  bool neutralise = true;  // what a broken rule leads to, besides a report
  bool trap = false;
  Extent bucket;  // {-1, -1}: all buffers
  const std::byte* slots = nullptr;
  int64_t slot_stride = 0;
  uint32_t num_slots = 0;
  int32_t blocks = 1;  // of the CUDA launch
  int64_t tiles = 0;   // of all chunks
  int64_t busy_tiles = 0;
  int64_t restored_bytes = 0;  // in kRestored buffers of the bucket
  Control* control = nullptr;
  int64_t* first_bad = nullptr;  // by buffer id: first index that is wrong, or kNoIndex
  Board* board = nullptr;
  ReportRing ring;
};

#ifdef __CUDACC__
__host__ __device__
#endif
    inline const ChunkTable&
    TableOf(const PrologueParams& params, int32_t chunk) {
  return chunk == 0 ? params.first : params.more[chunk - 1];
}

int PrologueHost(const PrologueParams& params);
int PrologueCuda(CUstream_st* stream, const PrologueParams& params);
CudaLaunch PrologueCudaLaunch(const PrologueParams& params);
// Reads the chunks' tables, which on Host the caller may.
void PrologueWrites(const PrologueParams& params, WriteList& writes);

// Takes its step from a staging slot: the newest one.
inline constexpr Kernel<PrologueParams> kPrologue = {"pristine_prologue", PrologueHost, PRISTINE_CUDA(PrologueCuda),
                                                     PrologueWrites, PRISTINE_CUDA(PrologueCudaLaunch)};

// Carries its step itself: nothing has to be copied to the device ahead of the launch. In a few sizes, since the cost
// of setting a node's parameters grows with theirs.
template <int kBytes>
struct InlinePrologueParams {
  PrologueParams base;
  alignas(16) std::byte step[kBytes];
};
inline constexpr int kInlineBytes[] = {512, 1024, 1536, 2560, 4608, 6656, 8960};
inline constexpr int kInlineSizes = sizeof(kInlineBytes) / sizeof(kInlineBytes[0]);

template <int kBytes>
int InlinePrologueHost(const InlinePrologueParams<kBytes>& params);
template <int kBytes>
int InlinePrologueCuda(CUstream_st* stream, const InlinePrologueParams<kBytes>& params);
template <int kBytes>
CudaLaunch InlinePrologueCudaLaunch(const InlinePrologueParams<kBytes>& params);
template <int kBytes>
void InlinePrologueWrites(const InlinePrologueParams<kBytes>& params, WriteList& writes) {
  PrologueWrites(params.base, writes);
}

// By name the same kernel: a node may be given any of them.
template <int kBytes>
inline constexpr Kernel<InlinePrologueParams<kBytes>> kInlinePrologue = {
    kPrologue.name, InlinePrologueHost<kBytes>, PRISTINE_CUDA(InlinePrologueCuda<kBytes>), InlinePrologueWrites<kBytes>,
    PRISTINE_CUDA(InlinePrologueCudaLaunch<kBytes>)};

}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_KERNELS_PROLOGUE_H_
