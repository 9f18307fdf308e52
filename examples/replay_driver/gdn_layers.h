// GdnLayers: the gated delta net layers of a hybrid model, with their states. Each decode model has its own, so that
// the shadow's run of a step changes nothing of the captured one's.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_LAYERS_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_LAYERS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "examples/replay_driver/model_config.h"
#include "examples/replay_driver/scheduler.h"
#include "pristine/attention/gdn/causal_conv1d.h"
#include "pristine/attention/gdn/prefill.h"
#include "pristine/attention/gdn/recurrent.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

class GdnLayers {
 public:
  // config.gdn.layers > 0. `device` must outlive this.
  static absl::StatusOr<std::unique_ptr<GdnLayers>> Create(Device& device, const ModelConfig& config);
  // About how much memory one takes.
  static int64_t Bytes(const ModelConfig& config);
  static int32_t Slots(const ModelConfig& config) { return config.max_batch(); }  // usable ones
  // Those and slot 0.
  static int32_t PoolSlots(const ModelConfig& config) { return Slots(config) + 1; }

  const attention::gdn::StatePool& pool() const { return *pool_; }

  // Takes back the slots of requests that are not in `active` any more and hands slots to those that are new, with what
  // their contexts leave in all layers queued on `stream`. Sets `slots` to those of `active`, in its order.
  absl::Status Assign(Stream& stream, absl::Span<const ActiveRequest> active, std::vector<int32_t>& slots);
  // Takes back all slots.
  absl::Status ReleaseAll();
  int64_t handed_out() const { return handed_out_; }

  // A step's numbers on the device.
  struct Step {
    DeviceSpan<const int32_t> requests, positions;  // [tokens]
    DeviceSpan<const int32_t> drafts = {};          // [tokens]; of a step that verifies
    DeviceSpan<const int32_t> slots = {};           // [rows]
  };
  // Queues layer `layer` for `rows` requests: the convolution and the delta rule. One token each; or all draft tokens,
  // which leaves the states as they are.
  absl::Status Run(Stream& stream, int32_t rows, int32_t layer, const Step& step);
  // After such a Run: takes the first accepted[r] drafts of each request into its states, in all layers.
  absl::Status Commit(Stream& stream, int32_t rows, DeviceSpan<const int32_t> slots,
                      DeviceSpan<const int32_t> accepted);
  DeviceSpan<std::byte> out(int32_t layer) const { return outs_[static_cast<size_t>(layer)].As<std::byte>(); }

  // Queues a copy of all of `other`'s states.
  absl::Status TakeStatesOf(Stream& stream, const GdnLayers& other);
  // Queues the comparison of all states with `other`'s, into differences().
  absl::Status CompareStates(Stream& stream, const GdnLayers& other);
  DeviceSpan<int32_t> differences() const { return differences_.As<int32_t>(); }  // [PoolSlots, layers]

 private:
  struct Layer {
    DeviceBuffer weight;          // of the convolution, [dim, 4]
    DeviceBuffer a_log, dt_bias;  // [v_heads]
  };
  // What goes through a layer. Drafts are kept per layer until they are committed.
  struct Tensors {
    DeviceBuffer mixed, a, b, q, k, v;
  };
  explicit GdnLayers(const ModelConfig& config) : config_(config) {}
  absl::Status MakeLayers(Device& device);
  absl::Status AllocateTensors(Device& device);
  absl::Status FillContext(Stream& stream, const ActiveRequest& request, attention::gdn::Slot slot);
  // Takes `tokens` tokens of the prompt whose inputs were made into the states of its slot.
  absl::Status TakeIn(Stream& stream, int32_t layer, int32_t tokens);
  attention::gdn::ConvInputs ConvInputsOf(int32_t layer, DeviceSpan<const int32_t> slots) const;
  attention::gdn::ConvOutputs QkvOutputs(int32_t layer) const;
  const Tensors& tensors(int32_t layer) const {
    return tensors_[config_.gdn.draft_tokens == 0 ? 0 : static_cast<size_t>(layer)];
  }
  attention::gdn::RecurrentInputs RecurrentInputsOf(int32_t layer, DeviceSpan<const int32_t> slots) const;

  const ModelConfig config_;
  std::unique_ptr<attention::gdn::StatePool> pool_;
  std::vector<Layer> layers_;
  std::vector<Tensors> tensors_;
  std::vector<DeviceBuffer> outs_;                    // per layer, [max batch * step_tokens, v_dim]
  std::unique_ptr<attention::gdn::Prefill> prefill_;  // null: not for this dtype, or not on this device
  DeviceBuffer g_, beta_, prompt_out_;                // for it
  DeviceBuffer prompt_;                               // [3] see GdnInputsParams
  DeviceBuffer differences_;
  std::map<int32_t, attention::gdn::Slot> slot_of_;  // by request
  int64_t handed_out_ = 0;
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_LAYERS_H_
