#include "examples/06_conformance_kit/foreign_wrapper.h"

#include <algorithm>
#include <numeric>

#include "examples/06_conformance_kit/foreign_attention.h"
#include "pristine/graph_runtime/host_native.h"
#include "pristine/graph_runtime/status.h"

namespace foreign {

void Plan(const int32_t* context_lens, int32_t real, int32_t rows, int32_t* order) {
  std::fill(order, order + rows, -1);
  std::iota(order, order + real, 0);
  std::stable_sort(order, order + real, [&](int32_t a, int32_t b) { return context_lens[a] > context_lens[b]; });
}

}  // namespace foreign

namespace pristine::examples {

absl::StatusOr<std::unique_ptr<ForeignWrapper>> ForeignWrapper::Create(Device& device,
                                                                       const conformance::AttentionShape& shape) {
  std::unique_ptr<ForeignWrapper> wrapper(new ForeignWrapper(shape));
  const size_t bytes = wrapper->size() * sizeof(int32_t);
  PRISTINE_ASSIGN_OR_RETURN(wrapper->arrays_, device.Allocate(bytes, "foreign.arrays"));
  wrapper->staging_.resize(2);
  for (Staging& staging : wrapper->staging_) {
    PRISTINE_ASSIGN_OR_RETURN(staging.memory, device.AllocatePinned(bytes, "foreign.staging"));
    PRISTINE_ASSIGN_OR_RETURN(staging.copied, device.CreateEvent());
  }
  return wrapper;
}

ForeignWrapper::Arrays ForeignWrapper::Split(DeviceSpan<int32_t> all) const {
  const size_t rows = shape_.max_requests();
  return {all.Sub(0, rows), all.Sub(rows, rows), all.Sub(2 * rows, rows), all.Sub(3 * rows, rows * blocks_per_row())};
}

// Every array is written whole: what the kernel reads in padded rows is decided here and nowhere else.
absl::Status ForeignWrapper::Prepare(Stream& stream, int32_t, const attention::StepValues& step) {
  Staging& staging = staging_[turn_++ % staging_.size()];
  PRISTINE_RETURN_IF_ERROR(staging.copied->Synchronize());
  const int32_t real = static_cast<int32_t>(step.lengths.size()), rows = shape_.max_requests();
  int32_t* const context_lens = staging.memory.As<int32_t>().data();
  int32_t* const slot_mapping = context_lens + rows;
  int32_t* const order = slot_mapping + rows;
  int32_t* const block_table = order + rows;
  std::fill(context_lens, context_lens + size(), 0);  // padded rows: length 0, the dummy page
  std::copy(step.lengths.begin(), step.lengths.end(), context_lens);
  std::fill(slot_mapping, slot_mapping + rows, -1);
  std::copy(step.slots.begin(), step.slots.end(), slot_mapping);
  foreign::Plan(context_lens, real, rows, order);
  for (int32_t row = 0; row < real; ++row) {
    std::copy(step.kv_indices.begin() + step.kv_indptr[row], step.kv_indices.begin() + step.kv_indptr[row + 1],
              block_table + row * blocks_per_row());
  }
  PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(AsWritableBytes(arrays_.As<int32_t>()), staging.memory.As<std::byte>()));
  return stream.Record(*staging.copied);
}

absl::Status ForeignWrapper::Run(Stream& stream, int32_t bucket, const conformance::AttentionTensors& t) {
  const auto in = [](DeviceSpan<const std::byte> span) { return reinterpret_cast<const float*>(span.address()); };
  const auto out = [](DeviceSpan<std::byte> span) { return reinterpret_cast<float*>(span.address()); };
  const Arrays arrays = Split(arrays_.As<int32_t>());
  const foreign::Attention attention = {.q = in(t.q),
                                        .new_key = in(t.k_new),
                                        .new_value = in(t.v_new),
                                        .key_cache = out(t.k),
                                        .value_cache = out(t.v),
                                        .out = out(t.out),
                                        .context_lens = arrays.context_lens.address(),
                                        .block_table = arrays.block_table.address(),
                                        .slot_mapping = arrays.slot_mapping.address(),
                                        .order = arrays.order.address(),
                                        .rows = bucket,
                                        .blocks_per_row = blocks_per_row(),
                                        .block_size = shape_.page_size,
                                        .heads = shape_.q_heads,
                                        .kv_heads = shape_.kv_heads,
                                        .head_dim = shape_.head_dim};
  if (stream.device().backend() == Backend::kHost) {
    return host::EnqueueForeign(stream.native(), "foreign_attention", [attention] {
      for (int32_t i = 0; i < attention.rows; ++i) {
        for (int32_t head = 0; head < attention.kv_heads; ++head) AttendGroup(attention, i, head);
      }
      return 0;
    });
  }
#ifdef PRISTINE_HAS_CUDA
  if (foreign::LaunchCuda(static_cast<CUstream_st*>(stream.native()), attention) == 0) return absl::OkStatus();
#endif
  return absl::InternalError("the foreign kernel was not launched");
}

std::vector<conformance::BoundArray> ForeignWrapper::BoundArrays() {
  const Arrays arrays = Split(arrays_.As<int32_t>());
  return {{Kind::kLength, arrays.context_lens, shape_.max_length},
          {Kind::kSlot, arrays.slot_mapping, shape_.num_pages() * shape_.page_size},
          {Kind::kPosition, arrays.order, shape_.max_requests()},
          {Kind::kPageTable, arrays.block_table, shape_.num_pages()}};
}

}  // namespace pristine::examples
