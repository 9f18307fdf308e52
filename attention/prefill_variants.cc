#include "attention/prefill_variants.h"

#include "absl/strings/str_cat.h"

namespace pristine::attention {
namespace {

template <class T>
void PrefillWrites(const PagedPrefillParams& p, WriteList& writes) {
  const size_t heads = static_cast<size_t>(p.tokens) * p.q_heads;
  writes.Add(p.out, heads * p.head_dim * sizeof(T));
  writes.Add(p.lse, heads * sizeof(LseBase2));
}

template <class T, class KV, int kHeadDim>
constexpr PrefillVariant Mma(DType dtype, DType kv_dtype, const char* name) {
  return {.dtype = dtype,
          .kv_dtype = kv_dtype,
          .head_dim = kHeadDim,
          .only_capability = 0,
          .shared_bytes = kPrefillMmaSharedBytes,
          .kernel = {name, &PagedPrefillHost<T, KV>, PRISTINE_CUDA((&PagedPrefillMmaCuda<T, KV, kHeadDim>)),
                     &PrefillWrites<T>},
          .prepare = PRISTINE_CUDA((&PreparePagedPrefillMma<T, KV, kHeadDim>))};
}
template <class T, class KV, int kHeadDim>
constexpr PrefillVariant Wgmma(DType dtype, DType kv_dtype, const char* name) {
  return {.dtype = dtype,
          .kv_dtype = kv_dtype,
          .head_dim = kHeadDim,
          .only_capability = 90,
          .shared_bytes = kPrefillMmaSharedBytes,
          .kernel = {name, &PagedPrefillHost<T, KV>, PRISTINE_CUDA((&PagedPrefillWgmmaCuda<T, KV, kHeadDim>)),
                     &PrefillWrites<T>},
          .prepare = PRISTINE_CUDA((&PreparePagedPrefillWgmma<T, KV, kHeadDim>))};
}
template <int kHeadDim>
constexpr PrefillVariant Float32Variant(const char* name) {
  return {.dtype = DType::kFloat32,
          .kv_dtype = DType::kFloat32,
          .head_dim = kHeadDim,
          .only_capability = 0,
          .shared_bytes = 0,
          .kernel = {name, &PagedPrefillHost<float, float>, PRISTINE_CUDA(&PagedPrefillFloat32Cuda<kHeadDim>),
                     &PrefillWrites<float>},
          .prepare = nullptr};
}

constexpr DType kF16 = DType::kFloat16, kBf16 = DType::kBFloat16, kF8 = DType::kFloat8E4M3;

constexpr PrefillVariant kPrefillVariants[] = {
    Float32Variant<64>("paged_prefill_float32_64"),
    Float32Variant<128>("paged_prefill_float32_128"),
    Float32Variant<256>("paged_prefill_float32_256"),
    Mma<Float16, Float16, 64>(kF16, kF16, "paged_prefill_float16_64"),
    Mma<Float16, Float16, 128>(kF16, kF16, "paged_prefill_float16_128"),
    Mma<Float16, Float16, 256>(kF16, kF16, "paged_prefill_float16_256"),
    Mma<BFloat16, BFloat16, 64>(kBf16, kBf16, "paged_prefill_bfloat16_64"),
    Mma<BFloat16, BFloat16, 128>(kBf16, kBf16, "paged_prefill_bfloat16_128"),
    Mma<BFloat16, BFloat16, 256>(kBf16, kBf16, "paged_prefill_bfloat16_256"),
    Mma<Float16, Float8E4M3, 64>(kF16, kF8, "paged_prefill_float16_e4m3_64"),
    Mma<Float16, Float8E4M3, 128>(kF16, kF8, "paged_prefill_float16_e4m3_128"),
    Mma<Float16, Float8E4M3, 256>(kF16, kF8, "paged_prefill_float16_e4m3_256"),
    Mma<BFloat16, Float8E4M3, 64>(kBf16, kF8, "paged_prefill_bfloat16_e4m3_64"),
    Mma<BFloat16, Float8E4M3, 128>(kBf16, kF8, "paged_prefill_bfloat16_e4m3_128"),
    Mma<BFloat16, Float8E4M3, 256>(kBf16, kF8, "paged_prefill_bfloat16_e4m3_256"),
    Wgmma<Float16, Float16, 64>(kF16, kF16, "paged_prefill_float16_64_wgmma"),
    Wgmma<Float16, Float16, 128>(kF16, kF16, "paged_prefill_float16_128_wgmma"),
    Wgmma<BFloat16, BFloat16, 64>(kBf16, kBf16, "paged_prefill_bfloat16_64_wgmma"),
    Wgmma<BFloat16, BFloat16, 128>(kBf16, kBf16, "paged_prefill_bfloat16_128_wgmma"),
    Wgmma<Float16, Float8E4M3, 64>(kF16, kF8, "paged_prefill_float16_e4m3_64_wgmma"),
    Wgmma<Float16, Float8E4M3, 128>(kF16, kF8, "paged_prefill_float16_e4m3_128_wgmma"),
    Wgmma<BFloat16, Float8E4M3, 64>(kBf16, kF8, "paged_prefill_bfloat16_e4m3_64_wgmma"),
    Wgmma<BFloat16, Float8E4M3, 128>(kBf16, kF8, "paged_prefill_bfloat16_e4m3_128_wgmma"),
};

}  // namespace

absl::Span<const PrefillVariant> PrefillVariants() { return kPrefillVariants; }

const PrefillVariant* FindPrefillVariant(DType dtype, DType kv_dtype, int32_t head_dim, int32_t capability) {
  const PrefillVariant* found = nullptr;
  for (const PrefillVariant& variant : kPrefillVariants) {
    if (variant.dtype != dtype || variant.kv_dtype != kv_dtype || variant.head_dim != head_dim) continue;
    if (variant.only_capability == capability) return &variant;
    if (variant.only_capability == 0) found = &variant;
  }
  return found;
}

std::string PrefillVariantNames() {
  std::string names;
  for (const PrefillVariant& variant : kPrefillVariants) {
    if (variant.only_capability != 0) continue;  // there is one for all devices, too
    absl::StrAppend(&names, names.empty() ? "" : ", ", ToString(variant.dtype), " with ", ToString(variant.kv_dtype),
                    " KV and head_dim ", variant.head_dim);
  }
  return names;
}

}  // namespace pristine::attention
