#include "buffers/rules.h"

#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"

namespace pristine {

const char* ToString(Role role) {
  switch (role) {
    case Role::kConstant:
      return "constant";
    case Role::kRestored:
      return "restored";
    case Role::kRefilled:
      return "refilled";
    case Role::kScratch:
      return "scratch";
  }
  return "unknown role";
}

const char* ToString(Kind kind) {
  switch (kind) {
    case Kind::kIndptr:
      return "indptr";
    case Kind::kLength:
      return "length";
    case Kind::kPageTable:
      return "page table";
    case Kind::kSlot:
      return "slot";
    case Kind::kPosition:
      return "position";
    case Kind::kMask:
      return "mask";
    case Kind::kOpaque:
      return "opaque";
  }
  return "unknown kind";
}

namespace buffers {
namespace {

absl::Status Invalid(const BufferSpec& spec, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("buffer ", spec.name, " (", ToString(spec.kind), "): ", what));
}

absl::Status CheckAxis(const BufferSpec& spec, int64_t capacity) {
  const Axis& axis = spec.axis;
  if (axis.per < 1)
    return Invalid(spec, absl::StrCat("axis counts ", axis.per, " elements per unit; it must be in [1, 2^31)"));
  const bool plus_one = axis.unit == Axis::Unit::kRequestsPlusOne;
  const bool counted = plus_one || axis.unit == Axis::Unit::kRequests || axis.unit == Axis::Unit::kTokens;
  if (counted && (capacity - (plus_one ? 1 : 0)) % axis.per != 0) {
    return Invalid(spec, absl::StrCat("has ", capacity, " elements; the axis wants a multiple of ", axis.per,
                                      plus_one ? " and one more" : ""));
  }
  if (spec.only_bucket.has_value()) {
    const Extent& bucket = *spec.only_bucket;
    if (bucket.requests < 1 || bucket.tokens < 1) {
      return Invalid(spec, absl::StrCat("only_bucket is ", bucket.ToString(), "; both counts must be at least 1"));
    }
    if (axis.Count(bucket, capacity) > capacity) {
      return Invalid(spec, absl::StrCat("has ", capacity, " elements; bucket ", bucket.ToString(), " needs ",
                                        axis.Count(bucket, capacity)));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckDeltas(const BufferSpec& spec, int64_t capacity, int64_t element_bytes) {
  if (!spec.deltas) return absl::OkStatus();
  if (spec.role != Role::kRefilled) {
    return Invalid(spec, absl::StrCat("deltas are for refilled buffers; this one is ", ToString(spec.role)));
  }
  if (spec.kind == Kind::kIndptr || spec.axis.unit == Axis::Unit::kPages) {
    return Invalid(spec, "deltas do not suit an indptr or an axis of pages, where one change moves all that follows");
  }
  if (capacity > std::numeric_limits<int32_t>::max() || element_bytes > kTileBytes) {
    return Invalid(spec, absl::StrCat("has ", capacity, " elements of ", element_bytes, " bytes; with deltas at most ",
                                      std::numeric_limits<int32_t>::max(), " of ", kTileBytes));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ResolveRules(const BufferSpec& spec, int64_t capacity, size_t element_bytes, bool is_int32,
                          BufferRecord& record) {
  record.integers = spec.kind != Kind::kMask && spec.kind != Kind::kOpaque;
  if (record.integers && !is_int32) {
    return Invalid(spec, absl::StrCat("elements have ", element_bytes, " bytes; this kind needs int32_t"));
  }
  if (absl::Status axis = CheckAxis(spec, capacity); !axis.ok()) return axis;
  absl::Status deltas = CheckDeltas(spec, capacity, static_cast<int64_t>(element_bytes));
  if (!deltas.ok()) return deltas;

  record.capacity = capacity;
  record.element_bytes = static_cast<int64_t>(element_bytes);
  record.role = static_cast<int32_t>(spec.role);
  record.unit = static_cast<int32_t>(spec.axis.unit);
  record.per = spec.axis.per;
  if (spec.only_bucket.has_value()) {
    record.only_requests = spec.only_bucket->requests;
    record.only_tokens = spec.only_bucket->tokens;
  }
  record.tail_to_end = spec.contract.reads_tail || spec.axis.unit == Axis::Unit::kPages;
  if (!record.integers) return absl::OkStatus();

  // Indices are below the limit, amounts may equal it.
  const bool amount = spec.kind == Kind::kIndptr || spec.kind == Kind::kLength;
  if (spec.limit < (amount ? 0 : 1)) {
    return Invalid(spec, absl::StrCat("limit is ", spec.limit, "; at least ", amount ? 0 : 1));
  }
  record.lower = 0;
  record.upper = amount ? spec.limit : spec.limit - 1;
  const bool dummy_used = spec.kind == Kind::kPageTable || (spec.kind == Kind::kSlot && !spec.contract.negative_ok);
  if (dummy_used && (spec.dummy < 0 || spec.dummy > record.upper)) {
    return Invalid(spec, absl::StrCat("dummy is ", spec.dummy, "; it must be in [0, ", record.upper, "]"));
  }
  switch (spec.kind) {
    case Kind::kIndptr:
      record.indptr = true;
      break;
    case Kind::kLength:
      if (spec.contract.min_length < 0 || spec.contract.min_length > spec.limit) {
        return Invalid(spec, absl::StrCat("contract.min_length is ", spec.contract.min_length,
                                          "; it must be in [0, limit ", spec.limit, "]"));
      }
      record.lower = record.pad = record.harmless = spec.contract.min_length;
      break;
    case Kind::kPageTable:
      record.pad = record.harmless = spec.dummy;
      break;
    case Kind::kSlot:
      record.lower = spec.contract.negative_ok ? -1 : 0;
      record.pad = record.harmless = SlotPad(spec);
      break;
    default:
      break;
  }
  return absl::OkStatus();
}

int32_t SlotPad(const BufferSpec& spec) { return spec.contract.negative_ok ? -1 : spec.dummy; }

absl::Status CheckOriginal(const BufferSpec& spec, const BufferRecord& record, absl::Span<const std::byte> original) {
  if (!record.integers) return absl::OkStatus();
  int64_t before = 0;
  for (int64_t i = 0; i < record.capacity; ++i) {
    int32_t value = 0;
    std::memcpy(&value, original.data() + i * sizeof(value), sizeof(value));
    if (record.indptr) {
      if (i == 0 && value != 0) {
        return Invalid(spec, absl::StrCat("original[0] is ", value, "; an indptr starts at 0"));
      }
      if (value < before) {
        return Invalid(spec, absl::StrCat("original falls from ", before, " at ", i - 1, " to ", value, " at ", i));
      }
      before = value;
    }
    const int32_t lower = record.indptr ? 0 : record.lower;
    if (value < lower || value > record.upper) {
      return Invalid(spec,
                     absl::StrCat("original[", i, "] is ", value, "; it must be in [", lower, ", ", record.upper, "]"));
    }
    if (spec.kind == Kind::kSlot && value != record.pad) {
      return Invalid(spec, absl::StrCat("original[", i, "] is ", value, "; every original of a slot must be ",
                                        record.pad, ", so that warm-ups write nothing"));
    }
  }
  return absl::OkStatus();
}

int64_t ElementValue(const std::byte* address, int64_t element_bytes) {
  if (element_bytes == sizeof(int32_t)) {
    int32_t value = 0;
    std::memcpy(&value, address, sizeof(value));
    return value;
  }
  int64_t value = 0;
  std::memcpy(&value, address, element_bytes < 8 ? static_cast<size_t>(element_bytes) : 8);
  return value;
}

int64_t FirstDifference(const std::byte* a, const std::byte* b, int64_t capacity, int64_t element_bytes) {
  const int64_t bytes = capacity * element_bytes;
  if (std::memcmp(a, b, static_cast<size_t>(bytes)) == 0) return kNoIndex;
  int64_t byte = 0;
  while (a[byte] == b[byte]) ++byte;
  return byte / element_bytes;
}

}  // namespace buffers
}  // namespace pristine
