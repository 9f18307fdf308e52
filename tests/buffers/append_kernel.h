// A cache append in miniature: pool[slots[i]] = value for i < count, and slot -1 writes nothing. No Abseil:
// append_kernel.cu includes this.
#ifndef PRISTINE_TESTS_BUFFERS_APPEND_KERNEL_H_
#define PRISTINE_TESTS_BUFFERS_APPEND_KERNEL_H_

#include <cstdint>

#include "pristine/graph_runtime/kernel.h"

namespace pristine::testing {

struct AppendParams {
  int32_t* pool;
  int64_t pool_size;
  const int32_t* slots;
  int64_t count;
  int32_t value;
};
inline int AppendHost(const AppendParams& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.slots[i] >= 0) p.pool[p.slots[i]] = p.value;
  }
  return 0;
}
int AppendCuda(CUstream_st* stream, const AppendParams& p);

inline constexpr Kernel<AppendParams> kAppend{
    "append", AppendHost, PRISTINE_CUDA(AppendCuda),
    [](const AppendParams& p, WriteList& writes) { writes.Add(p.pool, p.pool_size * sizeof(int32_t)); }};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_BUFFERS_APPEND_KERNEL_H_
