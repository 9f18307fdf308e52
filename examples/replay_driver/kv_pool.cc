#include "examples/replay_driver/kv_pool.h"

#include <algorithm>
#include <utility>

#include "examples/replay_driver/model_kernels.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {

absl::StatusOr<KvPool> KvPool::Create(Device& device, Stream& stream, const ModelConfig& config) {
  KvPool pool(config);
  const size_t page_bytes = config.pool_bytes() / (config.pool_pages + 1);
  for (int32_t layer = 0; layer < config.layers; ++layer) {
    PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer k, device.Allocate(config.pool_bytes(), "kv_pool.k"));
    PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer v, device.Allocate(config.pool_bytes(), "kv_pool.v"));
    for (const DeviceBuffer* buffer : {&k, &v}) {
      const DeviceSpan<std::byte> bytes = buffer->As<std::byte>();
      PRISTINE_RETURN_IF_ERROR(stream.Fill(bytes, std::byte{0xff}));
      PRISTINE_RETURN_IF_ERROR(stream.Fill(bytes.Sub(0, page_bytes), std::byte{0}));
    }
    pool.layers_.push_back({std::move(k), std::move(v)});
  }
  PRISTINE_ASSIGN_OR_RETURN(pool.pages_, device.Allocate(config.pool_pages * sizeof(int32_t), "kv_pool.pages"));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return pool;
}

absl::Status KvPool::FillContext(Stream& stream, const ActiveRequest& request, absl::Span<int32_t> staging) const {
  const int32_t context = request.length - 1;  // the step appends the last token
  if (context == 0) return absl::OkStatus();
  const DeviceSpan<int32_t> pages = pages_.As<int32_t>().Sub(0, request.pages.size());
  std::copy(request.pages.begin(), request.pages.end(), staging.begin());
  PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(
      AsWritableBytes(pages), absl::MakeConstSpan(reinterpret_cast<const std::byte*>(staging.data()), pages.bytes())));
  for (int32_t layer = 0; layer < config_.layers; ++layer) {
    const FillContextParams params = {.seed = config_.seed,
                                      .request = request.id,
                                      .layer = layer,
                                      .tokens = context,
                                      .page_size = config_.page_size,
                                      .kv_heads = config_.kv_heads,
                                      .head_dim = config_.head_dim,
                                      .dtype = config_.dtype,
                                      .pages = pages.address(),
                                      .k = k(layer).address(),
                                      .v = v(layer).address(),
                                      .pool_bytes = config_.pool_bytes()};
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kFillContext, params));
  }
  return absl::OkStatus();
}

}  // namespace pristine::replay_driver
