// Copies new K and V rows to their slots. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_APPEND_KV_H_
#define PRISTINE_ATTENTION_KERNELS_APPEND_KV_H_

#include <cstdint>

struct CUstream_st;

namespace pristine::attention {

struct AppendKvParams {
  const void* k_new;  // [tokens, row_bytes]
  const void* v_new;
  const int32_t* slots;  // [tokens]; outside [0, num_slots): writes nothing
  void* k;               // [num_slots, row_bytes]
  void* v;
  int64_t num_slots;
  int64_t row_bytes;  // a multiple of 4
  int32_t tokens;     // > 0
};

int AppendKvHost(const AppendKvParams& params);
int AppendKvCuda(CUstream_st* stream, const AppendKvParams& params);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_APPEND_KV_H_
