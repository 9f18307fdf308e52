#include "attention/gdn/check.h"

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention::gdn {

absl::Status CheckDType(const char* op, const char* what, DType dtype) {
  if (dtype == DType::kFloat32 || dtype == DType::kBFloat16) return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat(op, ": ", what, " is ", ToString(dtype), "; there are float32 and bfloat16"));
}

absl::Status CheckTensor(const char* op, const char* what, const void* address, size_t bytes, size_t element_bytes,
                         int64_t need, size_t alignment) {
  const int64_t found = static_cast<int64_t>(bytes / element_bytes);
  if (found < need) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": ", what, " has ", found, " elements, needs ", need));
  }
  if (need > 0 && (address == nullptr || reinterpret_cast<uintptr_t>(address) % alignment != 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": ", what, " must be aligned to ", alignment, " bytes and not null"));
  }
  return absl::OkStatus();
}

absl::Status CheckRows(const char* op, const char* what, const Rows& rows, size_t element_bytes, int64_t tokens,
                       int64_t width, int64_t& stride) {
  constexpr int64_t kMaxStride = int64_t{1} << 31;  // times at most 2^31 tokens: no offset overflows
  stride = rows.stride == 0 ? width : rows.stride;
  if (stride < width || stride > kMaxStride) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": ", what, " has a row stride of ", stride,
                                                   " elements; must be 0 or in [", width, ", ", kMaxStride, "]"));
  }
  const int64_t need = tokens == 0 ? 0 : (tokens - 1) * stride + width;
  return CheckTensor(op, what, rows.data.address(), rows.data.bytes(), element_bytes, need, element_bytes);
}

absl::Status CheckStates(const char* op, const char* what, const StateView& view, int32_t v_heads, int32_t slots) {
  constexpr int64_t kMaxStride = int64_t{1} << 31;
  constexpr int64_t kAlignment = 16;  // bytes, of vector loads
  PRISTINE_RETURN_IF_ERROR(CheckDType(op, what, view.dtype));
  const int64_t packed = v_heads * kStateElements;
  const int64_t vector = kAlignment / static_cast<int64_t>(SizeOf(view.dtype));
  if (v_heads < 1 || view.v_heads != v_heads || view.slots < slots || view.slots < 1 || view.slot_stride < packed ||
      view.slot_stride > kMaxStride || view.slot_stride % vector != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        op, ": ", what, " has ", view.slots, " slots of ", view.v_heads, " heads, ", view.slot_stride,
        " elements apart; needs at least ", slots, " slots of ", v_heads, " heads (at least 1), the distance in [",
        packed, ", ", kMaxStride, "] and a multiple of ", vector));
  }
  return CheckTensor(op, what, view.states.address(), view.states.bytes(), SizeOf(view.dtype),
                     (view.slots - 1) * view.slot_stride + packed, kAlignment);
}

absl::Status CheckGates(const char* op, const GateInputs& inputs, int64_t tokens, GatesParams& params) {
  if (inputs.v_heads < 1) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": v_heads is ", inputs.v_heads, ", must be at least 1"));
  }
  PRISTINE_RETURN_IF_ERROR(CheckDType(op, "dtype", inputs.dtype));
  const size_t element = SizeOf(inputs.dtype);
  PRISTINE_RETURN_IF_ERROR(CheckRows(op, "a", inputs.a, element, tokens, inputs.v_heads, params.a_stride));
  PRISTINE_RETURN_IF_ERROR(CheckRows(op, "b", inputs.b, element, tokens, inputs.v_heads, params.b_stride));
  const auto per_head = [&](const char* what, DeviceSpan<const float> span) {
    return CheckTensor(op, what, span.address(), span.bytes(), sizeof(float), inputs.v_heads, sizeof(float));
  };
  PRISTINE_RETURN_IF_ERROR(per_head("a_log", inputs.a_log));
  PRISTINE_RETURN_IF_ERROR(per_head("dt_bias", inputs.dt_bias));
  params.a = inputs.a.data.address();
  params.b = inputs.b.data.address();
  params.a_log = inputs.a_log.address();
  params.dt_bias = inputs.dt_bias.address();
  params.g = nullptr;
  params.beta = nullptr;
  params.tokens = tokens;
  params.v_heads = inputs.v_heads;
  params.dtype = inputs.dtype;
  return absl::OkStatus();
}

}  // namespace pristine::attention::gdn
