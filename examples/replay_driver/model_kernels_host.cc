#include "examples/replay_driver/model_kernels.h"

namespace pristine::replay_driver {
namespace {

// One head's row, or zeros for a padded one.
void WriteRow(attention::DType dtype, void* base, int64_t row, int32_t head_dim, uint64_t key, bool padding) {
  for (int32_t dim = 0; dim < head_dim; ++dim) {
    Store(dtype, base, row * head_dim + dim, padding ? 0.0f : Element(key, dim));
  }
}

int RunModelInputs(const ModelInputsParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const int32_t request = p.requests[row];
    const uint64_t seed = TokenSeed(p.seed, p.drafts == nullptr ? 0 : p.drafts[row]);
    const auto key = [&](int32_t head, Tensor tensor) {
      return RowKey(seed, request, p.layer, p.positions[row], head, tensor);
    };
    for (int32_t head = 0; head < p.heads; ++head) {
      WriteRow(p.dtype, p.q, row * p.heads + head, p.head_dim, key(head, Tensor::kQuery), request < 0);
    }
    for (int32_t head = 0; head < p.kv_heads; ++head) {
      WriteRow(p.dtype, p.k_new, row * p.kv_heads + head, p.head_dim, key(head, Tensor::kKey), request < 0);
      WriteRow(p.dtype, p.v_new, row * p.kv_heads + head, p.head_dim, key(head, Tensor::kValue), request < 0);
    }
  }
  return 0;
}

void WritesOfModelInputs(const ModelInputsParams& p, WriteList& writes) {
  const size_t row_bytes = static_cast<size_t>(p.rows) * p.head_dim * attention::SizeOf(p.dtype);
  writes.Add(p.q, row_bytes * p.heads);
  writes.Add(p.k_new, row_bytes * p.kv_heads);
  writes.Add(p.v_new, row_bytes * p.kv_heads);
}

int RunFillContext(const FillContextParams& p) {
  for (int32_t position = 0; position < p.tokens; ++position) {
    const int64_t slot = int64_t{p.pages[position / p.page_size]} * p.page_size + position % p.page_size;
    for (int32_t head = 0; head < p.kv_heads; ++head) {
      const int64_t row = slot * p.kv_heads + head;
      WriteRow(p.dtype, p.k, row, p.head_dim, RowKey(p.seed, p.request, p.layer, position, head, Tensor::kKey), false);
      WriteRow(p.dtype, p.v, row, p.head_dim, RowKey(p.seed, p.request, p.layer, position, head, Tensor::kValue),
               false);
    }
  }
  return 0;
}

void WritesOfFillContext(const FillContextParams& p, WriteList& writes) {
  writes.Add(p.k, p.pool_bytes);
  writes.Add(p.v, p.pool_bytes);
}

}  // namespace

const Kernel<ModelInputsParams> kModelInputs = {"model_inputs", RunModelInputs, PRISTINE_CUDA(LaunchModelInputs),
                                                WritesOfModelInputs};
const Kernel<FillContextParams> kFillContext = {"fill_context", RunFillContext, PRISTINE_CUDA(LaunchFillContext),
                                                WritesOfFillContext};

}  // namespace pristine::replay_driver
