// Argument checks that the GDN wrappers share.
#ifndef PRISTINE_ATTENTION_GDN_CHECK_H_
#define PRISTINE_ATTENTION_GDN_CHECK_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "attention/gdn/kernels/gates.h"
#include "pristine/attention/gdn/gates.h"
#include "pristine/attention/gdn/state_pool.h"

namespace pristine::attention::gdn {

// UNIMPLEMENTED: `what` of op `op` is neither float32 nor bfloat16.
absl::Status CheckDType(const char* op, const char* what, DType dtype);
// INVALID_ARGUMENT: `what` of op `op` holds fewer than `need` elements, is null or not aligned.
absl::Status CheckTensor(const char* op, const char* what, const void* address, size_t bytes, size_t element_bytes,
                         int64_t need, size_t alignment);
// Of `tokens` rows of `width` elements; sets `stride` to the rows' distance. INVALID_ARGUMENT as above, or a stride
// that is below `width` or above 2^31. `tokens` is at most 2^31, so that no offset overflows.
absl::Status CheckRows(const char* op, const char* what, const Rows& rows, size_t element_bytes, int64_t tokens,
                       int64_t width, int64_t& stride);
// `what`, of op `op`, must hold at least `slots` slots of `v_heads` heads that its memory has room for and whose states
// 16-byte loads take. INVALID_ARGUMENT: else, or a distance between slots above 2^31 elements, so that no offset
// overflows. UNIMPLEMENTED: as CheckDType.
absl::Status CheckStates(const char* op, const char* what, const StateView& view, int32_t v_heads, int32_t slots = 1);
// Checks `inputs` for `tokens` rows and fills all of `params` but g and beta.
absl::Status CheckGates(const char* op, const GateInputs& inputs, int64_t tokens, GatesParams& params);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_CHECK_H_
