// Two ways for an op to reach the states of a pool: in place, by slot; or gathered into a small tensor before and
// scattered back after, for kernels that cannot take a pool. Gathered in the pool's dtype, the results are the same bit
// for bit; in the other dtype, sums may be in another order. The second way moves every state three times instead of
// once.
#ifndef PRISTINE_ATTENTION_GDN_STATE_ACCESS_H_
#define PRISTINE_ATTENTION_GDN_STATE_ACCESS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "pristine/attention/device_caps.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention::gdn {

enum class StateAccess { kInPlace, kGatherScatter };

struct StateAccessPolicy {
  StateAccess access = StateAccess::kInPlace;
  DType gathered_dtype = DType::kFloat32;  // of the gathered tensor; of no meaning in place
  friend bool operator==(const StateAccessPolicy&, const StateAccessPolicy&) = default;
};

enum class AccessRule {
  kMeasured,     // what is fastest with this library's kernels: in place everywhere (docs/performance.md)
  kSglang22921,  // as that change chooses for FlashInfer's: in place from compute capability 10 on, else gathered to
                 // float32
};
// A function of its arguments alone.
StateAccessPolicy ChooseStateAccess(const DeviceCaps& caps, DType state_dtype, AccessRule rule = AccessRule::kMeasured);

// Each queues one kernel, captureable, whose grid follows from rows and heads alone; blocking, threads and lifetimes:
// as Gates. `gathered` is a StateView of at least `rows` slots with the pool's heads; row r's state is its slot r.
// Where the dtypes differ, values are rounded. INVALID_ARGUMENT: rows below 1 or above 65535, a view that does not fit
// its memory or the other's heads, too few slots or indices, states or indices that overlap. UNIMPLEMENTED: a dtype
// other than float32 and bfloat16.

// Copies the state of slot cache_indices[r] to row r, and writes r to gathered_indices[r], or -1 for a padded row,
// whose state in `gathered` stays as it was (under PaddedRows::kClampToZero: that of slot 0, and r). An op on
// `gathered` then takes gathered_indices for its cache_indices.
absl::Status GatherStates(Stream& stream, int32_t rows, DeviceSpan<const int32_t> cache_indices, const StateView& pool,
                          const StateView& gathered, DeviceSpan<int32_t> gathered_indices);
// Copies them back; padded rows store nothing.
absl::Status ScatterStates(Stream& stream, int32_t rows, DeviceSpan<const int32_t> cache_indices,
                           const StateView& gathered, const StateView& pool);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_STATE_ACCESS_H_
