// SpecModel: the three steps of speculation that are captured, over one StepMetadata and one manager. A second one (the
// shadow) runs the same steps eagerly over fresh copies of everything but the KV pool.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_MODEL_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_MODEL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "examples/replay_driver/gdn_layers.h"
#include "examples/replay_driver/kv_pool.h"
#include "examples/replay_driver/spec_config.h"
#include "examples/replay_driver/spec_inputs.h"
#include "pristine/attention/step_attention.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

class SpecModel {
 public:
  // `device` and `pool`, which has config.model.layers, must outlive this. Blocks. Codes of attention::Route.
  static absl::StatusOr<std::unique_ptr<SpecModel>> Create(Device& device, Stream& stream, const SpecConfig& config,
                                                           const KvPool& pool, const ManagerOptions& options);

  // About how much Host memory one takes while it is created, the pool apart.
  static int64_t Bytes(const SpecConfig& config, int staging_slots);

  // Has the manager watch the pool for undeclared writes.
  absl::Status ProtectPool();

  // Opens the step of `inputs` and refills and plans everything for the graph of inputs.phase. INVALID_ARGUMENT: a step
  // that this graph's kernels cannot run.
  absl::Status Begin(const SpecInputs& inputs);
  // What a GraphRunner captures.
  absl::Status Body(SpecPhase phase, Stream& stream, const Extent& bucket);
  // The whole step on `stream`, node by node, without a graph.
  absl::Status RunEagerly(Stream& stream, const SpecInputs& inputs);

  // The layers that a phase runs: the target's, or the draft's.
  std::vector<int32_t> LayersOf(SpecPhase phase) const;
  // That of the phase's first layer.
  const attention::StepAttention& attention(SpecPhase phase) const { return *attention_[static_cast<size_t>(phase)]; }

  GdnLayers* gdn() const { return gdn_.get(); }  // null: not a hybrid model

  BufferManager& manager() { return *manager_; }
  const SpecConfig& config() const { return config_; }
  const attention::StepMetadata& metadata() const { return *metadata_; }
  DeviceSpan<std::byte> out(int32_t layer) const { return outputs_[layer].out.As<std::byte>(); }
  DeviceSpan<attention::LseBase2> lse(int32_t layer) const { return outputs_[layer].lse.As<attention::LseBase2>(); }

 private:
  struct Output {
    DeviceBuffer out;  // [max tokens, heads, head_dim]
    DeviceBuffer lse;  // [max tokens, heads]
  };
  SpecModel(const SpecConfig& config, const KvPool& pool) : config_(config), pool_(pool) {}
  absl::Status RegisterAll(bool checked);
  absl::Status AllocateTensors(Device& device, Stream& stream);
  absl::Status RunLayer(SpecPhase phase, int32_t layer, Stream& stream, const Extent& bucket);
  absl::Status Append(Stream& stream, int32_t layer, int32_t tokens, const DeviceBuffer& k, const DeviceBuffer& v,
                      const Buffer<int32_t>& slots);

  const SpecConfig config_;
  const KvPool& pool_;
  std::unique_ptr<GdnLayers> gdn_;          // of the target
  std::unique_ptr<BufferManager> manager_;  // goes before the states that it watches
  std::unique_ptr<attention::StepMetadata> metadata_;
  std::unique_ptr<attention::StepAttention> attention_[3];  // by phase
  std::unique_ptr<attention::StepAttention> verify_window_;
  Buffer<int32_t> token_requests_, drafts_;  // [max tokens]
  Buffer<int32_t> accepted_;                 // [max requests], of a hybrid model
  Buffer<int32_t> rejected_;                 // [T * max requests]
  DeviceBuffer q_, k_new_, v_new_;           // of the layer that runs
  DeviceBuffer nothing_;         // [T * max requests, kv_heads, head_dim] of NaN: what rolled back slots hold
  std::vector<Output> outputs_;  // per layer
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_SPEC_MODEL_H_
