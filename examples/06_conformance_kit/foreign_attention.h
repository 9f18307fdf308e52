// A paged attention that is not ours, with habits of its own:
//   - page numbers come as a block table, one row of fixed width per request;
//   - a planner on the host orders the rows longest first, so that long ones start early; -1 ends the order;
//   - the kernel stores the newest key and value itself, to slot_mapping;
//   - float32, no log-sum-exp.
#ifndef PRISTINE_EXAMPLES_06_FOREIGN_ATTENTION_H_
#define PRISTINE_EXAMPLES_06_FOREIGN_ATTENTION_H_

#include <cmath>
#include <cstdint>

struct CUstream_st;

#ifdef __CUDACC__
#define FOREIGN_DEVICE __host__ __device__
#else
#define FOREIGN_DEVICE
#endif

namespace foreign {

struct Attention {
  const float *q, *new_key, *new_value;
  float *key_cache, *value_cache, *out;
  const int32_t* context_lens;  // [rows]
  const int32_t* block_table;   // [rows, blocks_per_row]
  const int32_t* slot_mapping;  // [rows]
  const int32_t* order;         // [rows] from Plan
  int32_t rows, blocks_per_row, block_size;
  int32_t heads, kv_heads, head_dim;
};

// The planner: writes [rows].
void Plan(const int32_t* context_lens, int32_t real, int32_t rows, int32_t* order);

int LaunchCuda(CUstream_st* stream, const Attention& a);

// What one thread does for the row at place `i` of the order, and one KV head with all its query heads.
FOREIGN_DEVICE inline void AttendGroup(const Attention& a, int32_t i, int32_t kv_head) {
  const int32_t row = a.order[i];
  if (row < 0) return;
  const int32_t length = a.context_lens[row], dim = a.head_dim, group = a.heads / a.kv_heads;
  if (const int64_t slot = a.slot_mapping[row]; slot >= 0) {
    for (int32_t d = 0; d < dim; ++d) {
      const int64_t from = (int64_t{row} * a.kv_heads + kv_head) * dim + d,
                    to = (slot * a.kv_heads + kv_head) * dim + d;
      a.key_cache[to] = a.new_key[from];
      a.value_cache[to] = a.new_value[from];
    }
  }
  for (int32_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const float* q = a.q + (int64_t{row} * a.heads + head) * dim;
    float* out = a.out + (int64_t{row} * a.heads + head) * dim;
    for (int32_t d = 0; d < dim; ++d) out[d] = 0;
    float top = -INFINITY, sum = 0;  // online softmax
    for (int32_t p = 0; p < length; ++p) {
      const int64_t block = a.block_table[int64_t{row} * a.blocks_per_row + p / a.block_size];
      const int64_t at = ((block * a.block_size + p % a.block_size) * a.kv_heads + kv_head) * dim;
      float score = 0;
      for (int32_t d = 0; d < dim; ++d) score += q[d] * a.key_cache[at + d];
      score /= sqrtf(static_cast<float>(dim));
      const float higher = fmaxf(top, score), shrink = expf(top - higher), mass = expf(score - higher);
      top = higher;
      sum = sum * shrink + mass;
      for (int32_t d = 0; d < dim; ++d) out[d] = out[d] * shrink + mass * a.value_cache[at + d];
    }
    for (int32_t d = 0; d < dim && sum > 0; ++d) out[d] /= sum;
  }
}

}  // namespace foreign

#endif  // PRISTINE_EXAMPLES_06_FOREIGN_ATTENTION_H_
