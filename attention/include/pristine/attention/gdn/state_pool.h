// StatePool: the recurrent states of all requests, and their convolution states, one slot each. Slot 0 is reserved and
// never handed out: it is where a foreign kernel that clamps -1 to 0 does its harm.
#ifndef PRISTINE_ATTENTION_GDN_STATE_POOL_H_
#define PRISTINE_ATTENTION_GDN_STATE_POOL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/attention/types.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention::gdn {

inline constexpr int32_t kHeadDim = 128;  // K and V: the size of every model that ships
inline constexpr int64_t kStateElements = int64_t{kHeadDim} * kHeadDim;

inline constexpr int32_t kConvHistory = 3;  // inputs that a convolution of width 4 looks back

using Slot = int32_t;
inline constexpr Slot kNoSlot = -1;  // of padded rows

// What an op does with a row whose slot is -1 or past the pool.
enum class PaddedRows {
  kSkip,         // reads and writes no state; its output is 0
  kClampToZero,  // reads slot 0 in its place and does not store: what sglang PR #22921 does. For foreign pools
};

// How ops see a pool: [slots, v_heads, V, K], the K of one V row next to each other (transposed to FLA's default).
// Does not own it.
struct StateView {
  DType dtype = DType::kFloat32;
  int32_t v_heads = 0;
  int32_t slots = 0;
  // Elements from slot to slot: a multiple of 16 bytes, at least v_heads * V * K and at most 2^31.
  int64_t slot_stride = 0;
  DeviceSpan<std::byte> states = {};
  PaddedRows padded_rows = PaddedRows::kSkip;
};

// The last three inputs of a convolution (causal_conv1d.h): [slots, dim, 3], the oldest first. Does not own it.
struct ConvStateView {
  DType dtype = DType::kBFloat16;
  int32_t dim = 0;
  int32_t slots = 0;
  int64_t slot_stride = 0;  // elements from slot to slot, at least 3 * dim
  DeviceSpan<std::byte> states = {};
};

// What a slot holds beside the recurrent state of one layer.
struct StatePoolOptions {
  int32_t layers = 1;    // of one shape; a slot has the states of all
  int32_t conv_dim = 0;  // channels of a layer's convolution; 0: no convolution states
  DType conv_dtype = DType::kBFloat16;
};

// Used by one thread at a time.
class StatePool {
 public:
  // `slots` usable ones, numbered 1 to `slots`; all zero. Blocks. `device` must outlive the pool, the pool every graph
  // that uses it and all work queued on it. INVALID_ARGUMENT: `v_heads`, `slots` or `layers` below 1, `conv_dim` below
  // 0, more than 2^31 - 2 slots or 65536 layers, a slot of more than 2^31 elements, which no op takes. UNIMPLEMENTED: a
  // dtype other than float32 and bfloat16. RESOURCE_EXHAUSTED: no memory.
  static absl::StatusOr<std::unique_ptr<StatePool>> Create(Device& device, DType dtype, int32_t v_heads, int32_t slots,
                                                           const StatePoolOptions& options = {});

  // Hands out a free slot and queues its zeroing on `stream`, all layers and both states: the stream that its steps run
  // on, or one that they wait for. Does not block or allocate memory. FAILED_PRECONDITION: the stream is capturing:
  // every replay would zero the slot. RESOURCE_EXHAUSTED: all are taken. Codes of Stream::Fill; the slot is free then.
  absl::StatusOr<Slot> Allocate(Stream& stream);
  // Work queued for the slot may still run; what is queued later must not name it. INVALID_ARGUMENT: a slot that is not
  // handed out, 0 and -1 included.
  absl::Status Free(Slot slot);

  // Has `manager`, which must go before the pool, look after it: a write to slot 0 is reported as pollution of
  // `name`.slot0 and healed (checks as for any constant, ManagerOptions::check), and on devices that enforce accesses
  // an undeclared write to the other slots as one to `name`; of convolution states under `name`.conv. Before the first
  // capture. Codes of BufferManager::Adopt and Protect; nothing is registered then.
  absl::Status Protect(BufferManager& manager, const std::string& name) const;

  int32_t free_slots() const { return static_cast<int32_t>(free_.size()); }
  // Of layer `layer`; a view of no slots, which every op refuses, where there is no such layer or no convolution.
  StateView view(int32_t layer = 0) const;
  ConvStateView conv_view(int32_t layer = 0) const;

 private:
  StatePool() = default;
  // Both are [slots, layers, a layer's state], so that a slot is zeroed by one fill.
  DeviceBuffer memory_, conv_memory_;
  StateView view_;      // of layer 0
  ConvStateView conv_;  // of layer 0
  int32_t layers_ = 1;
  std::vector<Slot> free_;
  std::vector<bool> taken_;  // by slot
};

// A pool that an engine owns.
struct ForeignPool {
  DType dtype = DType::kFloat32;
  int32_t v_heads = 0;
  int32_t slots = 0;
  int64_t slot_stride = 0;  // elements; 0: the slots follow each other
  DeviceSpan<std::byte> states = {};
  Slot first_allocatable_slot = 1;  // the smallest that the engine's allocator hands out
};

// What ops take for `pool`; its memory stays the engine's, and must outlive every graph that uses it. INVALID_ARGUMENT:
// the memory is too small for its slots or not aligned to 16 bytes, a slot_stride that is none (see StateView), a
// negative first_allocatable_slot, or kClampToZero where slot 0 is allocatable: padded rows would then read a live
// request's state (sglang #36880). UNIMPLEMENTED as Create.
absl::StatusOr<StateView> ViewOf(const ForeignPool& pool, PaddedRows padded_rows);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_STATE_POOL_H_
