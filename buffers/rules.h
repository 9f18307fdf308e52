// From a buffer's Kind, limit and contract to numbers: bounds, padding and the harmless value.
#ifndef PRISTINE_BUFFERS_RULES_H_
#define PRISTINE_BUFFERS_RULES_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "buffers/kernels/prologue.h"
#include "pristine/buffers/buffer_spec.h"

namespace pristine::buffers {

// Fills all of `record` that follows from `spec` alone. INVALID_ARGUMENT: limit, dummy, min_length or axis that do not
// fit together with `capacity` elements of `element_bytes`.
absl::Status ResolveRules(const BufferSpec& spec, int64_t capacity, size_t element_bytes, bool is_int32,
                          BufferRecord& record);

// What padded and original slots hold.
int32_t SlotPad(const BufferSpec& spec);

// INVALID_ARGUMENT, with index and value, unless `original` obeys the rule of its kind.
absl::Status CheckOriginal(const BufferSpec& spec, const BufferRecord& record, absl::Span<const std::byte> original);

// The element that starts at `address`, as reports show it; of elements larger than 8 bytes the first 8.
int64_t ElementValue(const std::byte* address, int64_t element_bytes);

// The first element in which the two differ, or kNoIndex.
int64_t FirstDifference(const std::byte* a, const std::byte* b, int64_t capacity, int64_t element_bytes);

}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_RULES_H_
