// The wrapper that an engine would write around the foreign attention, without Pristine's buffers: arrays of its own,
// padded by hand, uploaded from pinned memory. What it takes to put it under the kit: three methods.
#ifndef PRISTINE_EXAMPLES_06_FOREIGN_WRAPPER_H_
#define PRISTINE_EXAMPLES_06_FOREIGN_WRAPPER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "pristine/conformance/attention_conformance.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::examples {

class ForeignWrapper : public conformance::AttentionWrapper {
 public:
  static absl::StatusOr<std::unique_ptr<ForeignWrapper>> Create(Device& device,
                                                                const conformance::AttentionShape& shape);

  absl::Status Prepare(Stream& stream, int32_t bucket, const attention::StepValues& step) override;
  absl::Status Run(Stream& stream, int32_t bucket, const conformance::AttentionTensors& tensors) override;
  std::vector<conformance::BoundArray> BoundArrays() override;

 private:
  // The arrays, one after the other, on the device and in each staging slot.
  struct Arrays {
    DeviceSpan<int32_t> context_lens, slot_mapping, order, block_table;
  };
  explicit ForeignWrapper(const conformance::AttentionShape& shape) : shape_(shape) {}
  int32_t blocks_per_row() const { return (shape_.max_length - 1) / shape_.page_size + 1; }
  size_t size() const { return static_cast<size_t>(shape_.max_requests()) * (3 + blocks_per_row()); }
  Arrays Split(DeviceSpan<int32_t> all) const;

  // A step's arrays wait here until their copy has run.
  struct Staging {
    PinnedBuffer memory;
    std::unique_ptr<Event> copied;
  };
  const conformance::AttentionShape shape_;
  DeviceBuffer arrays_;
  std::vector<Staging> staging_;
  size_t turn_ = 0;
};

}  // namespace pristine::examples

#endif  // PRISTINE_EXAMPLES_06_FOREIGN_WRAPPER_H_
