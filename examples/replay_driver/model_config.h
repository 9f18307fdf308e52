// What the captured model, its shadow, the KV pool and the truth agree on.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_MODEL_CONFIG_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_MODEL_CONFIG_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "examples/replay_driver/gdn_config.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/attention/sparse_page_table.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/extent.h"

namespace pristine::replay_driver {

struct ModelConfig {
  uint64_t seed = 0;
  std::vector<Extent> buckets;  // ascending
  int32_t layers = 0;           // the last one is sliding window, the others are sparse
  int32_t heads = 0, kv_heads = 0, head_dim = 0;
  attention::DType dtype = attention::DType::kFloat32;
  int32_t page_size = 1;
  int32_t pool_pages = 0;  // that are handed out; the dummy page 0 comes on top
  int32_t window = 0;
  attention::SparseConfig sparse;
  GdnConfig gdn;  // kGdnPerAttention layers in front of each attention layer, or none
  attention::DecodeScheduler scheduler = attention::DecodeScheduler::kDevice;

  int32_t max_batch() const { return buckets.back().requests; }
  bool is_sparse(int32_t layer) const { return layer + 1 < layers; }
  int64_t pool_slots() const { return (int64_t{pool_pages} + 1) * page_size; }
  size_t pool_bytes() const {  // of K in one layer, and of V
    return static_cast<size_t>(pool_slots()) * kv_heads * head_dim * attention::SizeOf(dtype);
  }
  size_t q_bytes(int32_t rows) const { return static_cast<size_t>(rows) * heads * head_dim * attention::SizeOf(dtype); }
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_MODEL_CONFIG_H_
