// Argument checks that the GDN wrappers share.
#ifndef PRISTINE_ATTENTION_GDN_CHECK_H_
#define PRISTINE_ATTENTION_GDN_CHECK_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "attention/gdn/kernels/gates.h"
#include "pristine/attention/gdn/gates.h"

namespace pristine::attention::gdn {

// INVALID_ARGUMENT: `what` of op `op` holds fewer than `need` elements, is null or not aligned.
absl::Status CheckTensor(const char* op, const char* what, const void* address, size_t bytes, size_t element_bytes,
                         int64_t need, size_t alignment);
// Of `tokens` rows of `width` elements; sets `stride` to the rows' distance. INVALID_ARGUMENT as above, or a stride
// that is below `width`.
absl::Status CheckRows(const char* op, const char* what, const Rows& rows, size_t element_bytes, int64_t tokens,
                       int64_t width, int64_t& stride);
// Checks `inputs` for `tokens` rows and fills all of `params` but g and beta.
absl::Status CheckGates(const char* op, const GateInputs& inputs, int64_t tokens, GatesParams& params);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_CHECK_H_
