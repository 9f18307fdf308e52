#include "pristine/attention/gdn/state_pool.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "attention/gdn/check.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention::gdn {

namespace {

// Zeroed memory for `slots` slots of `elements` each.
absl::StatusOr<DeviceBuffer> MakeSlots(Device& device, Stream& stream, const char* name, DType dtype, int64_t elements,
                                       int32_t slots) {
  const size_t slot_bytes = static_cast<size_t>(elements) * SizeOf(dtype);
  if (slot_bytes > std::numeric_limits<size_t>::max() / 2 / static_cast<size_t>(slots)) {
    return absl::InvalidArgumentError(absl::StrCat("state pool: ", slots, " slots of ", slot_bytes, " bytes"));
  }
  PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer memory, device.Allocate(slot_bytes * static_cast<size_t>(slots), name));
  PRISTINE_RETURN_IF_ERROR(stream.Fill(memory.As<std::byte>(), std::byte{0}));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return memory;
}

// The memory from layer `layer` on. `elements`: of one layer in one slot.
DeviceSpan<std::byte> FromLayer(const DeviceBuffer& memory, int32_t layer, int64_t elements, DType dtype) {
  const DeviceSpan<std::byte> all = memory.As<std::byte>();
  const size_t skip = static_cast<size_t>(layer) * static_cast<size_t>(elements) * SizeOf(dtype);
  return all.Sub(skip, all.size() - skip);
}

absl::Status ZeroSlot(Stream& stream, DeviceSpan<std::byte> states, int64_t slot_stride, DType dtype, Slot slot) {
  const size_t bytes = static_cast<size_t>(slot_stride) * SizeOf(dtype);
  return stream.Fill(states.Sub(static_cast<size_t>(slot) * bytes, bytes), std::byte{0});
}

}  // namespace

absl::StatusOr<std::unique_ptr<StatePool>> StatePool::Create(Device& device, DType dtype, int32_t v_heads,
                                                             int32_t slots, const StatePoolOptions& options) {
  constexpr int32_t kMaxLayers = 1 << 16;
  constexpr int32_t kMaxSlots = std::numeric_limits<int32_t>::max() - 1;
  constexpr int64_t kMaxSlotElements = int64_t{1} << 31;  // that the ops take
  if (v_heads < 1 || slots < 1 || slots > kMaxSlots || options.layers < 1 || options.layers > kMaxLayers ||
      options.conv_dim < 0) {
    return absl::InvalidArgumentError(absl::StrCat("state pool: v_heads is ", v_heads, ", slots ", slots, ", layers ",
                                                   options.layers, " and conv_dim ", options.conv_dim,
                                                   "; v_heads must be at least 1, slots in [1, ", kMaxSlots,
                                                   "], layers in [1, ", kMaxLayers, "], conv_dim at least 0"));
  }
  const int64_t stride = options.layers * (v_heads * kStateElements);
  const int64_t conv_stride = int64_t{options.layers} * options.conv_dim * kConvHistory;
  if (stride > kMaxSlotElements || conv_stride > kMaxSlotElements) {
    return absl::InvalidArgumentError(absl::StrCat("state pool: layers is ", options.layers, ", v_heads ", v_heads,
                                                   " and conv_dim ", options.conv_dim, ": a slot has ", stride,
                                                   " elements of state and ", conv_stride,
                                                   " of convolution inputs; both must be at most ", kMaxSlotElements));
  }
  PRISTINE_RETURN_IF_ERROR(CheckDType("state pool", "dtype", dtype));
  PRISTINE_RETURN_IF_ERROR(CheckDType("state pool", "conv_dtype", options.conv_dtype));
  auto pool = std::unique_ptr<StatePool>(new StatePool);
  const int32_t all = slots + 1;  // with slot 0
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(pool->memory_, MakeSlots(device, *stream, "GDN states", dtype, stride, all));
  pool->view_ = {dtype, v_heads, all, stride, pool->memory_.As<std::byte>(), PaddedRows::kSkip};
  if (options.conv_dim > 0) {
    PRISTINE_ASSIGN_OR_RETURN(
        pool->conv_memory_, MakeSlots(device, *stream, "GDN convolution states", options.conv_dtype, conv_stride, all));
    pool->conv_ = {options.conv_dtype, options.conv_dim, all, conv_stride, pool->conv_memory_.As<std::byte>()};
  }
  pool->layers_ = options.layers;
  pool->taken_.resize(static_cast<size_t>(all));
  pool->free_.reserve(static_cast<size_t>(slots));
  for (Slot slot = slots; slot >= 1; --slot) pool->free_.push_back(slot);
  return pool;
}

StateView StatePool::view(int32_t layer) const {
  if (layer < 0 || layer >= layers_) return {};
  StateView view = view_;
  view.states = FromLayer(memory_, layer, view.slot_stride / layers_, view.dtype);
  return view;
}

ConvStateView StatePool::conv_view(int32_t layer) const {
  if (layer < 0 || layer >= layers_ || conv_.dim == 0) return {};
  ConvStateView view = conv_;
  view.states = FromLayer(conv_memory_, layer, view.slot_stride / layers_, view.dtype);
  return view;
}

absl::StatusOr<Slot> StatePool::Allocate(Stream& stream) {
  if (stream.capturing()) {  // every replay would zero the slot, whoever has it by then
    return absl::FailedPreconditionError("state pool: the stream is capturing; allocate slots outside of captures");
  }
  if (free_.empty()) {
    return absl::ResourceExhaustedError(absl::StrCat("state pool: all ", view_.slots - 1, " slots are taken"));
  }
  const Slot slot = free_.back();
  PRISTINE_RETURN_IF_ERROR(ZeroSlot(stream, view_.states, view_.slot_stride, view_.dtype, slot));
  if (conv_.dim > 0) {
    PRISTINE_RETURN_IF_ERROR(ZeroSlot(stream, conv_.states, conv_.slot_stride, conv_.dtype, slot));
  }
  free_.pop_back();
  taken_[static_cast<size_t>(slot)] = true;
  return slot;
}

absl::Status StatePool::Free(Slot slot) {
  if (slot < 1 || slot >= view_.slots || !taken_[static_cast<size_t>(slot)]) {
    return absl::InvalidArgumentError(
        absl::StrCat("state pool: slot ", slot, " is not handed out; slots are in [1, ", view_.slots, ")"));
  }
  taken_[static_cast<size_t>(slot)] = false;
  free_.push_back(slot);
  return absl::OkStatus();
}

absl::Status StatePool::Protect(BufferManager& manager, const std::string& name) const {
  // All that can be taken back first, then what watches.
  RegistrationScope registration(manager);
  const auto adopt_slot0 = [&manager](const std::string& what, const auto& view) -> absl::Status {
    const size_t slot_bytes = static_cast<size_t>(view.slot_stride) * SizeOf(view.dtype);
    const std::vector<std::byte> zeros(slot_bytes);
    const BufferSpec slot0 = {.name = what + ".slot0", .role = Role::kConstant, .kind = Kind::kOpaque};
    return manager.Adopt<std::byte>(slot0, view.states.Sub(0, slot_bytes), zeros).status();
  };
  const auto watch_others = [&manager](const std::string& what, const auto& view) {
    const size_t slot_bytes = static_cast<size_t>(view.slot_stride) * SizeOf(view.dtype);
    return manager.Protect(what, view.states.Sub(slot_bytes, view.states.size() - slot_bytes), SizeOf(view.dtype));
  };
  const bool conv = conv_.dim > 0;
  const std::string conv_name = name + ".conv";
  PRISTINE_RETURN_IF_ERROR(adopt_slot0(name, view_));
  PRISTINE_RETURN_IF_ERROR(conv ? adopt_slot0(conv_name, conv_) : absl::OkStatus());
  PRISTINE_RETURN_IF_ERROR(watch_others(name, view_));
  PRISTINE_RETURN_IF_ERROR(conv ? watch_others(conv_name, conv_) : absl::OkStatus());
  registration.Keep();
  return absl::OkStatus();
}

absl::StatusOr<StateView> ViewOf(const ForeignPool& pool, PaddedRows padded_rows) {
  const int64_t stride = pool.slot_stride == 0 ? pool.v_heads * kStateElements : pool.slot_stride;
  const StateView view = {pool.dtype, pool.v_heads, pool.slots, stride, pool.states, padded_rows};
  PRISTINE_RETURN_IF_ERROR(CheckStates("foreign state pool", "states", view, pool.v_heads));
  if (pool.first_allocatable_slot < 0) {
    return absl::InvalidArgumentError(absl::StrCat("foreign state pool: first_allocatable_slot is ",
                                                   pool.first_allocatable_slot, ", must be at least 0"));
  }
  if (padded_rows == PaddedRows::kClampToZero && pool.first_allocatable_slot == 0) {
    return absl::InvalidArgumentError(
        "foreign state pool: kClampToZero where slot 0 is allocatable: padded rows would use a live request's state; "
        "reserve slot 0 (first_allocatable_slot >= 1) or use kSkip");
  }
  return view;
}

}  // namespace pristine::attention::gdn
