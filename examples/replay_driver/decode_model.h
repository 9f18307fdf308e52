// DecodeModel: the decode step that is captured: per layer append, sparse conversion, decode. Holds a manager, what is
// registered with it, and outputs of its own, so that a second one (the shadow) can run the same step eagerly over
// fresh copies of everything but the KV pool.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_DECODE_MODEL_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_DECODE_MODEL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "examples/replay_driver/gdn_layers.h"
#include "examples/replay_driver/kv_pool.h"
#include "examples/replay_driver/model_config.h"
#include "examples/replay_driver/step_inputs.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/attention/paged_decode.h"
#include "pristine/attention/sparse_page_table.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

class DecodeModel {
 public:
  // `device` and `pool` must outlive this.
  static absl::StatusOr<std::unique_ptr<DecodeModel>> Create(Device& device, const ModelConfig& config,
                                                             const KvPool& pool, const ManagerOptions& options);

  // About how much Host memory one takes while it is created, the pool apart.
  static int64_t Bytes(const ModelConfig& config, int staging_slots, int multiprocessors);

  // Of a hybrid model (no-ops otherwise): sets inputs.state_slots, with the states of those that are new queued on
  // `stream`; and takes all slots back.
  absl::Status AssignSlots(Stream& stream, absl::Span<const ActiveRequest> active, StepInputs& inputs);
  absl::Status ReleaseSlots();
  // Queues the taking over of `other`'s states, and their comparison. No-ops likewise.
  absl::Status TakeStatesOf(Stream& stream, const DecodeModel& other);
  absl::Status CompareStates(Stream& stream, const DecodeModel& other);
  // Only of a hybrid model.
  const GdnLayers& gdn() const { return *gdn_; }

  // Has the manager watch the pool for undeclared writes.
  absl::Status ProtectPool();

  // Opens the step and refills everything that is not planned. Waits while every staging slot is in flight.
  absl::Status Begin(const StepInputs& inputs);
  struct SlotWaits {
    int64_t count = 0;
    double ms = 0;
  };
  // How often, and for how long, Begin has waited.
  const SlotWaits& slot_waits() const { return slot_waits_; }
  // Plans the sparse layers from inputs.plan_lengths, alone, so that a refusal is the planner's. INVALID_ARGUMENT: a
  // decrease.
  absl::Status PlanSparse(const StepInputs& inputs);
  // What remains before a replay: the window plan, and kv_indptr from plan_lengths.
  absl::Status FinishPlans(const StepInputs& inputs);

  // Where a body lets somebody else queue nodes of their own.
  enum class Point { kInputsMade, kDecoded };
  using ExtraNodes = std::function<absl::Status(Stream& stream, const Extent& bucket, int32_t layer, Point point)>;
  void set_extra_nodes(ExtraNodes extra) { extra_ = std::move(extra); }

  // What a GraphRunner captures.
  absl::Status Body(Stream& stream, const Extent& bucket);
  // The whole step on `stream`, node by node, without a graph.
  absl::Status RunEagerly(Stream& stream, const StepInputs& inputs, ManagerOptions::Restore restore);

  // Reads kv_indptr_ws back at 0 … last. Blocks.
  absl::Status ReadLiveIndptr(Stream& stream, int32_t last, std::vector<int32_t>& values) const;

  BufferManager& manager() { return *manager_; }
  const ModelConfig& config() const { return config_; }
  const attention::StepMetadata& metadata() const { return *metadata_; }
  const Buffer<int32_t>& request_ids() const { return requests_; }
  DeviceSpan<std::byte> q() const { return q_.As<std::byte>(); }
  DeviceSpan<std::byte> k_new() const { return k_new_.As<std::byte>(); }
  DeviceSpan<std::byte> v_new() const { return v_new_.As<std::byte>(); }
  const Buffer<int32_t>& kv_indptr_ws() const { return sparse_->kv_indptr_ws(); }
  DeviceSpan<std::byte> out(int32_t layer) const { return outputs_[layer].out.As<std::byte>(); }
  DeviceSpan<attention::LseBase2> lse(int32_t layer) const { return outputs_[layer].lse.As<attention::LseBase2>(); }

 private:
  struct Output {
    DeviceBuffer out;  // [max batch, heads, head_dim]
    DeviceBuffer lse;  // [max batch, heads]
  };
  DecodeModel(const ModelConfig& config, const KvPool& pool) : config_(config), pool_(pool) {}
  absl::Status RegisterAll(bool checked);
  absl::Status AllocateTensors(Device& device);

  const ModelConfig config_;
  const KvPool& pool_;
  std::unique_ptr<GdnLayers> gdn_;          // null: no such layers
  std::unique_ptr<BufferManager> manager_;  // goes before the states that it watches
  std::unique_ptr<attention::StepMetadata> metadata_;
  std::unique_ptr<attention::SparsePageTable> sparse_;
  std::unique_ptr<attention::DecodePlan> sparse_plan_, window_plan_;
  std::unique_ptr<attention::PagedDecode> sparse_decode_, window_decode_;
  Buffer<int32_t> requests_;
  std::vector<Buffer<int32_t>> tables_;  // per sparse layer
  DeviceBuffer q_, k_new_, v_new_;       // of the layer that runs
  std::vector<Output> outputs_;          // per layer
  ExtraNodes extra_;                     // may be empty
  SlotWaits slot_waits_;
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_DECODE_MODEL_H_
