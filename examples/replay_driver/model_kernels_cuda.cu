#include "examples/replay_driver/model_kernels.h"

namespace pristine::replay_driver {
namespace {

constexpr int kThreads = 256;

// A block per row; its threads walk the elements of q, k_new and v_new.
__global__ void __launch_bounds__(kThreads) ModelInputs(ModelInputsParams p) {
  const int64_t row = blockIdx.x;
  const int32_t request = p.requests[row];
  const int32_t position = p.positions[row];
  const uint64_t seed = TokenSeed(p.seed, p.drafts == nullptr ? 0 : p.drafts[row]);
  const int32_t q_elements = p.heads * p.head_dim;
  const int32_t kv_elements = p.kv_heads * p.head_dim;
  for (int32_t i = threadIdx.x; i < q_elements + 2 * kv_elements; i += kThreads) {
    Tensor tensor = Tensor::kQuery;
    void* base = p.q;
    int32_t element = i;
    int32_t row_elements = q_elements;
    if (i >= q_elements) {
      const bool value = i - q_elements >= kv_elements;
      tensor = value ? Tensor::kValue : Tensor::kKey;
      base = value ? p.v_new : p.k_new;
      element = i - q_elements - (value ? kv_elements : 0);
      row_elements = kv_elements;
    }
    float number = 0.0f;
    if (request >= 0) {
      number = Element(RowKey(seed, request, p.layer, position, element / p.head_dim, tensor), element % p.head_dim);
    }
    Store(p.dtype, base, row * row_elements + element, number);
  }
}

// A thread per element of K, which writes V's too.
__global__ void __launch_bounds__(kThreads) FillContext(FillContextParams p) {
  const int32_t row_elements = p.kv_heads * p.head_dim;
  const int64_t elements = int64_t{p.tokens} * row_elements;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const int32_t position = static_cast<int32_t>(i / row_elements);
  const int32_t element = static_cast<int32_t>(i % row_elements);
  const int32_t head = element / p.head_dim;
  const int32_t dim = element % p.head_dim;
  const int64_t slot = int64_t{p.pages[position / p.page_size]} * p.page_size + position % p.page_size;
  const int64_t to = slot * row_elements + element;
  Store(p.dtype, p.k, to, Element(RowKey(p.seed, p.request, p.layer, position, head, Tensor::kKey), dim));
  Store(p.dtype, p.v, to, Element(RowKey(p.seed, p.request, p.layer, position, head, Tensor::kValue), dim));
}

}  // namespace

int LaunchModelInputs(CUstream_st* stream, const ModelInputsParams& params) {
  ModelInputs<<<params.rows, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

int LaunchFillContext(CUstream_st* stream, const FillContextParams& params) {
  const int64_t elements = int64_t{params.tokens} * params.kv_heads * params.head_dim;
  FillContext<<<static_cast<unsigned>((elements + kThreads - 1) / kThreads), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pristine::replay_driver
