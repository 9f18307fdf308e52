#include "pristine/attention/append_kv.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "attention/kernels/append_kv.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention {
namespace {

void CopyWrites(const AppendKvParams& p, WriteList& writes) {
  const size_t bytes = static_cast<size_t>(p.num_slots) * p.kv_heads * p.head_dim * p.element_bytes;
  writes.Add(p.k, bytes);
  writes.Add(p.v, bytes);
}
void QuantizeWrites(const AppendKvParams& p, WriteList& writes) {
  const size_t bytes = static_cast<size_t>(p.num_slots) * p.kv_heads * p.head_dim;
  writes.Add(p.k, bytes);
  writes.Add(p.v, bytes);
}

constexpr Kernel<AppendKvParams> kAppendKv = {"append_kv", &AppendKvHost, PRISTINE_CUDA(&AppendKvCuda), &CopyWrites};

// The rows' dtypes that a float8 pool takes.
struct QuantizeVariant {
  DType dtype;
  Kernel<AppendKvParams> kernel;
};
constexpr QuantizeVariant kQuantizeVariants[] = {{DType::kFloat32,
                                                  {"append_kv_float8_float32", &AppendKvQuantizeHost<float>,
                                                   PRISTINE_CUDA(&AppendKvQuantizeCuda<float>), &QuantizeWrites}},
                                                 {DType::kBFloat16,
                                                  {"append_kv_float8_bfloat16", &AppendKvQuantizeHost<BFloat16>,
                                                   PRISTINE_CUDA(&AppendKvQuantizeCuda<BFloat16>), &QuantizeWrites}},
                                                 {DType::kFloat16,
                                                  {"append_kv_float8_float16", &AppendKvQuantizeHost<Float16>,
                                                   PRISTINE_CUDA(&AppendKvQuantizeCuda<Float16>), &QuantizeWrites}}};

// Null where there is none.
const Kernel<AppendKvParams>* FindKernel(DType dtype, DType kv_dtype) {
  if (dtype == kv_dtype) return &kAppendKv;
  if (kv_dtype != DType::kFloat8E4M3) return nullptr;
  for (const QuantizeVariant& variant : kQuantizeVariants) {
    if (variant.dtype == dtype) return &variant.kernel;
  }
  return nullptr;
}

absl::Status CheckBytes(const char* what, const void* address, size_t found, int64_t needed, size_t alignment) {
  if (static_cast<int64_t>(found) < needed) {
    return absl::InvalidArgumentError(absl::StrCat("append_kv: ", what, " has ", found, " bytes, needs ", needed));
  }
  if (needed > 0 && (address == nullptr || reinterpret_cast<uintptr_t>(address) % alignment != 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("append_kv: ", what, " must be aligned to ", alignment, " bytes and not null"));
  }
  return absl::OkStatus();
}

absl::Status CheckScale(const char* what, DeviceSpan<const float> scale, bool quantizes) {
  if (scale.empty()) return absl::OkStatus();
  if (!quantizes) {
    return absl::InvalidArgumentError(
        absl::StrCat("append_kv: ", what, " is given, must be empty: the pool has the dtype of the rows"));
  }
  return CheckBytes(what, scale.address(), scale.bytes(), sizeof(float), alignof(float));
}

// A copy moves whole words of 4 bytes, quantizing 8 elements.
absl::Status CheckShape(const AppendKvTensors& t, bool quantizes) {
  if (t.kv_heads < 1 || t.head_dim < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("append_kv: kv_heads is ", t.kv_heads, " and head_dim ", t.head_dim, ", both must be at least 1"));
  }
  const int64_t head = int64_t{t.head_dim} * static_cast<int64_t>(SizeOf(t.dtype));
  const bool hnd = t.layout == KvLayout::kHND;
  if (!hnd && t.layout != KvLayout::kNHD) {
    return absl::InvalidArgumentError(
        absl::StrCat("append_kv: layout is ", static_cast<int32_t>(t.layout), ", must be NHD or HND"));
  }
  if (hnd && t.page_size < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("append_kv: page_size is ", t.page_size, ", must be at least 1 with ", ToString(t.layout)));
  }
  constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
  if (head > kMaxInt32 / t.kv_heads || (hnd && head * t.kv_heads > kMaxInt32 / t.page_size)) {
    return absl::InvalidArgumentError(absl::StrCat("append_kv: kv_heads is ", t.kv_heads, ", head_dim ", t.head_dim,
                                                   " and page_size ", t.page_size, ", a ", hnd ? "page" : "row",
                                                   " must have fewer than 2^31 bytes"));
  }
  if (quantizes && t.head_dim % 8 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("append_kv: head_dim is ", t.head_dim, ", must be a multiple of 8 to quantize"));
  }
  const int64_t together = hnd ? head : head * t.kv_heads;
  if (together % 4 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("append_kv: a ", hnd ? "head" : "row", " has ", together, " bytes, must be a multiple of 4"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status AppendKv(Stream& stream, int32_t tokens, const AppendKvTensors& tensors) {
  if (tokens < 0) {
    return absl::InvalidArgumentError(absl::StrCat("append_kv: tokens is ", tokens, ", must be at least 0"));
  }
  const DType kv_dtype = tensors.kv_dtype.value_or(tensors.dtype);
  const Kernel<AppendKvParams>* const kernel = FindKernel(tensors.dtype, kv_dtype);
  if (kernel == nullptr) {
    return absl::UnimplementedError(absl::StrCat(
        "append_kv: no kernel from ", ToString(tensors.dtype), " to ", ToString(kv_dtype),
        "; there are copies within a dtype, and float32, bfloat16 and float16 to ", ToString(DType::kFloat8E4M3)));
  }
  const bool quantizes = kv_dtype != tensors.dtype;
  PRISTINE_RETURN_IF_ERROR(CheckShape(tensors, quantizes));
  PRISTINE_RETURN_IF_ERROR(CheckScale("k_scale", tensors.k_scale, quantizes));
  PRISTINE_RETURN_IF_ERROR(CheckScale("v_scale", tensors.v_scale, quantizes));
  if (tokens == 0) return absl::OkStatus();

  const int64_t row = int64_t{tensors.kv_heads} * tensors.head_dim;
  const bool hnd = tensors.layout == KvLayout::kHND;
  const int64_t page_size = hnd ? tensors.page_size : 1;  // which NHD does not show
  const int64_t new_bytes = tokens * row * static_cast<int64_t>(SizeOf(tensors.dtype));
  const int64_t page_bytes = page_size * row * static_cast<int64_t>(SizeOf(kv_dtype));
  const int64_t pages = static_cast<int64_t>(tensors.k.bytes()) / page_bytes;
  const size_t alignment = quantizes ? 16 : 4;
  PRISTINE_RETURN_IF_ERROR(CheckBytes("k_new", tensors.k_new.address(), tensors.k_new.bytes(), new_bytes, alignment));
  PRISTINE_RETURN_IF_ERROR(CheckBytes("v_new", tensors.v_new.address(), tensors.v_new.bytes(), new_bytes, alignment));
  PRISTINE_RETURN_IF_ERROR(
      CheckBytes("slots", tensors.slots.address(), tensors.slots.bytes(), int64_t{tokens} * 4, alignof(int32_t)));
  PRISTINE_RETURN_IF_ERROR(CheckBytes("k", tensors.k.address(), tensors.k.bytes(), page_bytes, alignment));
  PRISTINE_RETURN_IF_ERROR(CheckBytes("v", tensors.v.address(), tensors.v.bytes(), pages * page_bytes, alignment));
  return Launch(stream, *kernel,
                AppendKvParams{.k_new = tensors.k_new.address(),
                               .v_new = tensors.v_new.address(),
                               .slots = tensors.slots.address(),
                               .k = tensors.k.address(),
                               .v = tensors.v.address(),
                               .k_scale = tensors.k_scale.empty() ? nullptr : tensors.k_scale.address(),
                               .v_scale = tensors.v_scale.empty() ? nullptr : tensors.v_scale.address(),
                               .page_stride = page_size * row,
                               .token_stride = hnd ? tensors.head_dim : row,
                               .head_stride = hnd ? page_size * tensors.head_dim : tensors.head_dim,
                               .num_slots = pages * page_size,
                               .tokens = tokens,
                               .page_size = static_cast<int32_t>(page_size),
                               .kv_heads = tensors.kv_heads,
                               .head_dim = tensors.head_dim,
                               .element_bytes = static_cast<int32_t>(SizeOf(tensors.dtype))});
}

}  // namespace pristine::attention
