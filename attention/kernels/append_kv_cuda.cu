// One block per (token, K or V).
#include <cuda_runtime.h>

#include "attention/kernels/append_kv.h"

namespace pristine::attention {
namespace {

constexpr int kThreads = 128;

template <class Word>
__global__ void AppendKvKernel(const AppendKvParams p) {
  const long long token = blockIdx.x;
  const long long slot = p.slots[token];
  if (slot < 0 || slot >= p.num_slots) return;
  const long long words = p.row_bytes / static_cast<long long>(sizeof(Word));
  const Word* const from = static_cast<const Word*>(blockIdx.y == 0 ? p.k_new : p.v_new) + token * words;
  Word* const to = static_cast<Word*>(blockIdx.y == 0 ? p.k : p.v) + slot * words;
  for (long long i = threadIdx.x; i < words; i += kThreads) to[i] = from[i];
}

bool IsMultipleOf16(const AppendKvParams& p) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p.k_new) | reinterpret_cast<uintptr_t>(p.v_new) |
                         reinterpret_cast<uintptr_t>(p.k) | reinterpret_cast<uintptr_t>(p.v) |
                         static_cast<uintptr_t>(p.row_bytes);
  return bits % 16 == 0;
}

}  // namespace

int AppendKvCuda(CUstream_st* stream, const AppendKvParams& params) {
  void* arguments[] = {const_cast<AppendKvParams*>(&params)};
  const void* const kernel = IsMultipleOf16(params) ? reinterpret_cast<const void*>(&AppendKvKernel<uint4>)
                                                    : reinterpret_cast<const void*>(&AppendKvKernel<unsigned>);
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(params.tokens), 2), dim3(kThreads), arguments, 0, stream);
}

}  // namespace pristine::attention
