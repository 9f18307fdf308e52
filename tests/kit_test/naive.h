// A plain paged attention over float32, with a fault to choose: what the kit must notice. No Abseil: naive_cuda.cu
// includes this.
#ifndef PRISTINE_TESTS_KIT_TEST_NAIVE_H_
#define PRISTINE_TESTS_KIT_TEST_NAIVE_H_

#include <cmath>
#include <cstdint>

#include "pristine/graph_runtime/kernel.h"

#ifdef __CUDACC__
#define NAIVE_DEVICE __host__ __device__
#else
#define NAIVE_DEVICE
#endif

namespace pristine::testing {

enum class Fault : int32_t {
  kNone,
  // In the kernels.
  kLeaks,            // masks by multiplying with 0, which keeps NaN
  kLeaksWindow,      // the same, before its window alone
  kReadsOnePastEnd,  // one token too many
  kHidesNan,         // the same, and drops scores that are NaN
  kLeavesPageTail,   // after a full page, the next entry of the page table, which nobody wrote
  kSkipsNewest,      // one too few
  kDividesByZero,    // an empty row is 0 / 0
  kNaturalLse,       // the other base
  // In what is launched.
  kRunsMaxRows,    // the largest bucket's rows, whatever the bucket
  kMissesLastRow,  // bucket - 1 rows
  kFreezesRows,    // the rows of the step that was prepared last, baked into the graph
  kCapturesOther,  // another kernel, which sums in another order, in captures
  kLeavesCapture,  // in captures, launches on a stream that is not captured
  kFails,          // a kernel that fails the stream
  kBlocks,         // synchronizes
  // In Prepare.
  kLeavesSlotTail,  // pads nothing
  kNewArrays,       // other arrays in each step, as from an allocator: a graph keeps those of its capture
  kSkipsSameRows,   // uploads only if the number of requests changed
  kOneStagingSlot,  // overwrites what an earlier step's copy has not read yet
  kRefusesNoRequests,
};

constexpr int32_t kNaiveWindow = 11;  // of shapes that say what is attended

struct NaiveParams {
  const float *q, *k_new, *v_new;
  float *k, *v, *out, *lse;
  const int32_t *lengths, *indptr, *indices, *slots;
  int32_t rows, q_heads, kv_heads, head_dim, page_size, max_pages;
  int64_t out_elements, pool_elements;  // for what is declared as written
  float scale;
  int32_t window;  // positions attended; 0: all
  bool backwards;
  Fault fault;
};

// Stores the newest token of one row; slot -1 stores nothing.
NAIVE_DEVICE inline void AppendRow(const NaiveParams& p, int32_t row) {
  if (p.slots[row] < 0) return;
  const int64_t size = int64_t{1} * p.kv_heads * p.head_dim;
  for (int64_t i = 0; i < size; ++i) {
    p.k[p.slots[row] * size + i] = p.k_new[row * size + i];
    p.v[p.slots[row] * size + i] = p.v_new[row * size + i];
  }
}

NAIVE_DEVICE inline void AttendHead(const NaiveParams& p, int32_t row, int32_t head) {
  const int32_t length = p.lengths[row], first = p.indptr[row], pages = p.indptr[row + 1] - first;
  int32_t end = length;
  if (p.fault == Fault::kLeaks) end = pages * p.page_size;
  const bool reads_past = p.fault == Fault::kReadsOnePastEnd || p.fault == Fault::kHidesNan;
  if (reads_past && length < pages * p.page_size) end = length + 1;
  const bool full = length == pages * p.page_size && first + pages < p.max_pages;
  if (p.fault == Fault::kLeavesPageTail && length > 0 && full) end = length + 1;
  if (p.fault == Fault::kSkipsNewest && length > 1) end = length - 1;
  const int64_t place = int64_t{row} * p.q_heads + head;
  const float* q = p.q + place * p.head_dim;
  float* out = p.out + place * p.head_dim;
  const auto at = [&](int32_t i) {
    const int32_t position = p.backwards ? end - 1 - i : i;
    const int64_t slot = int64_t{p.indices[first + position / p.page_size]} * p.page_size + position % p.page_size;
    return (slot * p.kv_heads + head / (p.q_heads / p.kv_heads)) * p.head_dim;
  };
  const auto score = [&](int64_t offset) {
    float sum = 0;
    for (int32_t d = 0; d < p.head_dim; ++d) sum += q[d] * p.k[offset + d];
    return sum * p.scale;
  };
  float top = -INFINITY, sum = 0;
  const int32_t begin = p.window > 0 && length > p.window ? length - p.window : 0;  // windows are walked forwards
  for (int32_t i = begin; i < end; ++i) {
    if (i < length || p.fault != Fault::kLeaks) top = fmaxf(top, score(at(i)));
  }
  for (int32_t d = 0; d < p.head_dim; ++d) out[d] = 0;
  for (int32_t i = p.fault == Fault::kLeaksWindow ? 0 : begin; i < end; ++i) {
    const int64_t offset = at(i);
    const bool masked = (p.fault == Fault::kLeaks && i >= length) || i < begin;
    if (p.fault == Fault::kHidesNan && std::isnan(score(offset))) continue;
    const float mass = masked ? 0 : expf(score(offset) - top);
    sum += mass;
    for (int32_t d = 0; d < p.head_dim; ++d) out[d] += mass * p.v[offset + d];
  }
  for (int32_t d = 0; d < p.head_dim && (sum > 0 || p.fault == Fault::kDividesByZero); ++d) out[d] /= sum;
  p.lse[place] = sum > 0 ? top + logf(sum) : -INFINITY;
  if (p.fault != Fault::kNaturalLse && sum > 0) p.lse[place] /= 0.6931471805599453f;
}

int NaiveAppendHost(const NaiveParams& p);
int NaiveAppendCuda(CUstream_st* stream, const NaiveParams& p);
int NaiveAttendHost(const NaiveParams& p);
int NaiveAttendCuda(CUstream_st* stream, const NaiveParams& p);

inline constexpr Kernel<NaiveParams> kNaiveAppend{"naive_append", NaiveAppendHost, PRISTINE_CUDA(NaiveAppendCuda),
                                                  [](const NaiveParams& p, WriteList& writes) {
                                                    writes.Add(p.k, p.pool_elements * sizeof(float));
                                                    writes.Add(p.v, p.pool_elements * sizeof(float));
                                                  }};
inline constexpr Kernel<NaiveParams> kNaiveAttend{"naive_attend", NaiveAttendHost, PRISTINE_CUDA(NaiveAttendCuda),
                                                  [](const NaiveParams& p, WriteList& writes) {
                                                    writes.Add(p.out, p.out_elements * sizeof(float));
                                                    writes.Add(p.lse, p.out_elements / p.head_dim * sizeof(float));
                                                  }};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_KIT_TEST_NAIVE_H_
