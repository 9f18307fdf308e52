// Merging partial attention results: two states per row, in place with a mask, N per row, a ragged number per row; and
// the conversion of log-sum-exps from and to the natural base.
//
// A state of (row, head) is attention over some of the row's keys: v, normalised by the state's own mass, and lse, the
// log2 of that mass. Over all of a row's states:
//   lse = log2 sum_i 2^lse_i,   v = sum_i 2^(lse_i - lse) v_i
// lse -inf marks an empty state: its weight is 0 and its v does not enter, whatever lies there. A row whose states are
// all empty, or that has none, becomes zeros and -inf. +inf is what some stacks write for an empty row, and ConvertLse
// takes it; a merge reports it (Violation::Kind::kInfiniteLse) and goes on as if it were -inf. NaN stays NaN.
//
// All calls queue one kernel and may be captured: its grid follows from the arguments, never from device values. They
// allocate nothing and do not block; memory must stay valid until the kernel, or the last replay, has run. Sums are
// float, in the order of the states: equal inputs give equal bits. Thread-safe on different streams.
#ifndef PRISTINE_ATTENTION_MERGE_STATES_H_
#define PRISTINE_ATTENTION_MERGE_STATES_H_

#include <cstdint>

#include "absl/status/status.h"
#include "pristine/attention/types.h"
#include "pristine/buffers/report.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention {

struct MergeShape {
  DType dtype = DType::kFloat32;  // of v
  int32_t heads = 0;              // 1 … 65535; any number has a kernel
  int32_t head_dim = 0;           // 64, 128 or 256
};

// Strides are in elements of their array; 0 stands for dense. FlashAttention's LSEs, [heads, rows], have an lse_stride
// of 1 and an lse_head_stride of rows.
struct States {
  DeviceSpan<const std::byte> v = {};   // [rows, heads, head_dim]; address and rows aligned to 16 bytes
  DeviceSpan<const LseBase2> lse = {};  // [rows, heads]
  int64_t v_stride = 0;                 // from row to row, at least heads * head_dim
  int64_t lse_stride = 0;               // from row to row
  int64_t lse_head_stride = 0;          // from head to head
};
struct MutableStates {
  DeviceSpan<std::byte> v = {};
  DeviceSpan<LseBase2> lse = {};  // may be empty where it is an output only: then it is not written
  int64_t v_stride = 0;
  int64_t lse_stride = 0;
  int64_t lse_head_stride = 0;
};

// What the four merges share: `rows` may be 0. `reports` is BufferManager::report_ring of the graph's bucket.
// INVALID_ARGUMENT: a size out of range; strides that put two outputs at one place; a tensor too small, null or
// misaligned (name, size, need); `reports` empty, because an error that nobody can see is none. UNIMPLEMENTED: no
// kernel for dtype and head_dim; the message lists those there are.

// out = a + b, row by row. `out` must not overlap the inputs.
absl::Status MergeState(Stream& stream, const MergeShape& shape, int32_t rows, const States& a, const States& b,
                        const MutableStates& out, const ReportRing& reports);

// a += b in the rows whose mask is not 0; the others keep a untouched. `mask`: [rows]; empty: all rows. A mask
// registered as Kind::kMask is 0 in padded rows.
absl::Status MergeStateInPlace(Stream& stream, const MergeShape& shape, int32_t rows, const MutableStates& a,
                               const States& b, DeviceSpan<const uint8_t> mask, const ReportRing& reports);

// out[r] merges states [r * states_per_row, (r + 1) * states_per_row). `states` has rows * states_per_row rows.
absl::Status MergeStates(Stream& stream, const MergeShape& shape, int32_t rows, int32_t states_per_row,
                         const States& states, const MutableStates& out, const ReportRing& reports);

// out[r] merges states [indptr[r], indptr[r + 1]), each bound clipped to [0, num_states]: a wrong indptr gives wrong
// numbers, never a wild read. `states` has num_states rows. `indptr`: [rows + 1], registered as Kind::kIndptr: its tail
// is then flat, and padded rows become zeros and -inf.
absl::Status MergeRaggedStates(Stream& stream, const MergeShape& shape, int32_t rows, DeviceSpan<const int32_t> indptr,
                               int32_t num_states, const States& states, const MutableStates& out,
                               const ReportRing& reports);

// What a stack writes as the LSE of a row that attends nothing: most of them -inf; FlashMLA +inf, as does
// FlashAttention 3 where the whole batch has no keys.
enum class EmptyLse { kMinusInfinity, kPlusInfinity };

// Converts [n] values between bases; dense, any layout. -inf is an empty row whatever `empty` says; +inf where `empty`
// is kMinusInfinity stays +inf, for the merge to report. `to` may be the same memory as `from`. Queues one kernel, as
// above. INVALID_ARGUMENT: sizes that differ; null or misaligned.
absl::Status ConvertLse(Stream& stream, DeviceSpan<const LseNatural> from, EmptyLse empty, DeviceSpan<LseBase2> to);
// `empty`: what empty rows become.
absl::Status ConvertLse(Stream& stream, DeviceSpan<const LseBase2> from, DeviceSpan<LseNatural> to, EmptyLse empty);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_MERGE_STATES_H_
