// KvPool: the KV cache of all layers, shared by the captured model and its eager shadow.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_KV_POOL_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_KV_POOL_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "examples/replay_driver/model_config.h"
#include "examples/replay_driver/scheduler.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

class KvPool {
 public:
  // All slots are NaN, so that a read of one that nobody wrote shows, but for the dummy page's, which are 0.
  static absl::StatusOr<KvPool> Create(Device& device, Stream& stream, const ModelConfig& config);

  // Queues the writing of `request`'s context, in all layers. `staging` is pinned memory for request.pages, of their
  // size, that stays as it is until that has run.
  absl::Status FillContext(Stream& stream, const ActiveRequest& request, absl::Span<int32_t> staging) const;

  DeviceSpan<std::byte> k(int32_t layer) const { return layers_[layer].k.As<std::byte>(); }
  DeviceSpan<std::byte> v(int32_t layer) const { return layers_[layer].v.As<std::byte>(); }

 private:
  explicit KvPool(const ModelConfig& config) : config_(config) {}
  struct Layer {
    DeviceBuffer k, v;
  };
  ModelConfig config_;
  std::vector<Layer> layers_;
  DeviceBuffer pages_;  // of the request that is being filled in
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_KV_POOL_H_
