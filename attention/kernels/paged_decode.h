// Decode and target verify over a paged KV cache. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_H_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_H_

#include <cstdint>

#include "attention/kernels/bfloat16.h"
#include "attention/kernels/float16.h"
#include "attention/kernels/float8.h"
#include "attention/kernels/host_device.h"
#include "attention/kernels/paged_kv.h"
#include "pristine/attention/types.h"

struct CUstream_st;

namespace pristine::attention {

// With a plan, one partial result per work item, query token and head, which MergeStates makes results of; without, the
// kernel cuts the rows up by their lengths on the device and writes the results themselves.
struct PagedDecodeParams {
  const void* q;  // [rows, q_len, q_heads, head_dim]
  PagedKvView kv;
  const int32_t* plan;  // plan_layout.h; null: scheduled on the device
  const float* sinks;   // [q_heads] logits, natural log; null: none. Without a plan only, as out and lse
  void* out;            // [rows, q_len, q_heads, head_dim]; zeros where nothing is attended
  LseBase2* lse;        // [rows, q_len, q_heads]; null: not wanted
  float* partial_out;   // [max_items, q_len, q_heads, head_dim], not written where the lse is -inf; without a plan,
                        // [2 * blocks, DecodeTileRows, head_dim]
  float* partial_lse;   // [max_items, q_len, q_heads], base 2, -inf: the item attends nothing; or [2 * blocks,
                        // DecodeTileRows]
  uint32_t* counters;   // [2 * blocks] zeros, and zeros again when the kernel ends; without a plan
  int32_t rows, q_len;  // query i of a row stands at position length - q_len + i
  int32_t q_heads, head_dim;
  int32_t max_items;   // of the plan
  int32_t blocks;      // of the grid without a plan
  int32_t most_tiles;  // of a row, DecodeTiles; a longer row is cut off there. Without a plan
  int32_t row_tokens;  // that are not expected to be exceeded; longer rows are slower. 0: unknown. Without a plan
  int32_t window;      // positions seen, the query's own included; 0: all
  float scale_log2;    // scale * log2(e): scores are in base 2
  float soft_cap;      // of logits; 0: none
  bool begins_early;   // guesses what it will read while it waits for the kernel ahead (PagedDecodePrepare)
};

constexpr int32_t kDecodeMaxGroup = 32;  // query heads of a KV head
constexpr int32_t kDecodeMaxQueries = 16;

// How a score is made of q . k: linear, or bent by the cap. `k_scale` dequantises.
struct ScoreScale {
  float inner;  // score = inner * dot, or outer * tanh(inner * dot)
  float outer;  // 0: no cap
};
PRISTINE_HOST_DEVICE inline ScoreScale ScoreScaleOf(const PagedDecodeParams& p) {
  constexpr float kLog2E = 1.44269504088896340736f;
  const float linear = p.scale_log2 * (p.kv.k_scale == nullptr ? 1.0f : *p.kv.k_scale);
  if (p.soft_cap == 0.0f) return {linear, 0.0f};
  return {linear / (p.soft_cap * kLog2E), p.soft_cap * kLog2E};
}

// The positions of a row that its query `query` attends: [begin, end).
struct Visible {
  int64_t begin, end;
};
PRISTINE_HOST_DEVICE inline Visible VisibleTo(int64_t length, int32_t q_len, int32_t window, int32_t query) {
  const int64_t end = length - q_len + query + 1;
  if (end <= 0) return {0, 0};
  return {window > 0 && end > window ? end - window : 0, end};
}

// What is counted when the device schedules: tiles of tokens, at most 2^31 over all rows, KV heads and passes over the
// query heads times query tokens of a KV head, the packed rows.
PRISTINE_HOST_DEVICE constexpr int32_t DecodePassRows(int32_t head_dim, int32_t packed_rows) {
  return head_dim <= 128 && packed_rows > 16 ? 32 : 16;
}
// Tokens. Eight bits of a key and its value are so soon there that a warp takes twice as many at a time.
PRISTINE_HOST_DEVICE constexpr int32_t DecodeTile(int32_t kv_bytes, int32_t head_dim, int32_t pass_rows) {
  return kv_bytes == 1 && head_dim <= 128 && pass_rows == 16 ? 128 : 64;
}
constexpr int64_t DecodeUnits(int32_t kv_heads, int32_t head_dim, int32_t packed_rows) {
  const int32_t pass = DecodePassRows(head_dim, packed_rows);
  return int64_t{kv_heads} * ((packed_rows + pass - 1) / pass);
}

// The grid that a device schedules on, and the scratch of one of its blocks: the rows of two partial results, of at
// most so many query heads times query tokens.
constexpr int32_t kDecodeTileRows = 32;
constexpr int32_t kDecodeMaxBlocks = 1024;  // whose partial results can be merged
constexpr int32_t DecodeBlocksPerMultiprocessor(int32_t head_dim) { return head_dim <= 128 ? 2 : 1; }
// Their prefix sums are in a block's shared memory.
constexpr int32_t DecodeMaxRows(int32_t head_dim) { return head_dim <= 128 ? 8192 : 4096; }
// Of a block of the tensor core kernels, with that many rows. Devices whose blocks have less do not run them: 8.6
// and 8.9 have 99 KiB, 8.0 has 163.
constexpr int32_t DecodeMmaSharedBytes(int32_t head_dim) { return (head_dim <= 128 ? 160 : 227) * 1024; }

// T: of q and out. Kv: of k and v. attention/variants.cc lists what there is.
template <class T, class Kv, int kHeadDim>
int PagedDecodeHost(const PagedDecodeParams& params);
template <class T, class Kv, int kHeadDim>
int PagedDecodeCuda(CUstream_st* stream, const PagedDecodeParams& params);
// Sets the kernels' shared memory limit on the current device, and `begins_early` to whether their code there waits
// (dependent_launch.cuh). Returns a cudaError_t.
template <class T, class Kv, int kHeadDim>
int PagedDecodePrepare(bool* begins_early);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_H_
