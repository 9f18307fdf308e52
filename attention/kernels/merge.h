// The merge kernels: two states per row, a list of states per row, and the conversion of log-sum-exps. A state is
// attention over part of the keys: v normalised by its own mass, lse that mass's log2. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_MERGE_H_
#define PRISTINE_ATTENTION_KERNELS_MERGE_H_

#include <cstdint>

#include "attention/kernels/float16.h"
#include "attention/kernels/host_device.h"
#include "pristine/buffers/report.h"

struct CUstream_st;

namespace pristine::attention {

// Element (row, head, d) of v is at row * v_stride + head * head_dim + d; element (row, head) of lse at
// row * lse_stride + head * lse_head_stride.
struct MergeInput {
  const void* v;     // its values are not used where lse is -inf
  const float* lse;  // base 2; -inf: empty; +inf: reported and taken as empty
  int64_t v_stride, lse_stride, lse_head_stride;
};
struct MergeOutput {
  void* v;     // zeros where all states are empty
  float* lse;  // -inf there; null: not wanted
  int64_t v_stride, lse_stride, lse_head_stride;
};

struct MergePairParams {
  MergeInput a, b;
  MergeOutput out;      // may be a itself
  const uint8_t* mask;  // [rows]; 0: nothing of this row of `out` is written. Null: all rows are merged
  int32_t rows, heads, head_dim;
  ReportRing reports;
};

struct MergeSetsParams {
  MergeInput states;      // [num_states] rows
  MergeOutput out;        // [rows]
  const int32_t* indptr;  // [rows + 1]: row r merges states [indptr[r], indptr[r + 1]), clipped to [0, num_states)
                          // Null: [r * states_per_row, (r + 1) * states_per_row)
  int64_t num_states;
  int32_t states_per_row;
  int32_t rows, heads, head_dim;
  ReportRing reports;
};

struct ConvertLseParams {
  const float* from;  // [count]
  float* to;          // [count]; may be `from`
  int64_t count;
  float factor;      // log2(e) or ln(2)
  float empty_from;  // what an empty row looks like in `from`; -inf is one in any case
  float empty_to;    // what it becomes
};

// What the shape of a block follows from: elements of one thread (at least 16 bytes, and few enough threads that a head
// fits into a warp), and threads of one head.
constexpr int32_t kMergeMaxThreads = 1024;
PRISTINE_HOST_DEVICE constexpr int32_t MergeVec(int32_t element_bytes, int32_t head_dim) {
  return 16 / element_bytes > head_dim / 32 ? 16 / element_bytes : head_dim / 32;
}
PRISTINE_HOST_DEVICE constexpr int32_t MergeLanes(int32_t element_bytes, int32_t head_dim) {
  return head_dim / MergeVec(element_bytes, head_dim);
}

// Instantiated for T in {float, Float16, BFloat16} and kHeadDim in {64, 128, 256}.
template <class T>
int MergePairHost(const MergePairParams& params);
template <class T>
int MergeSetsHost(const MergeSetsParams& params);
int ConvertLseHost(const ConvertLseParams& params);

// A block per token, all heads in it: heads * MergeLanes must be at most kMergeMaxThreads.
template <class T, int kHeadDim>
int MergePairBlockPerTokenCuda(CUstream_st* stream, const MergePairParams& params);
// A grid over tokens and groups of heads: any number of heads.
template <class T, int kHeadDim>
int MergePairTokenHeadCuda(CUstream_st* stream, const MergePairParams& params);
template <class T, int kHeadDim>
int MergeSetsCuda(CUstream_st* stream, const MergeSetsParams& params);
int ConvertLseCuda(CUstream_st* stream, const ConvertLseParams& params);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_MERGE_H_
