#include "attention/variants.h"

#include "absl/strings/str_cat.h"

namespace pristine::attention {
namespace {

template <class T>
void DecodeWrites(const PagedDecodeParams& p, WriteList& writes) {
  if (p.plan != nullptr) {
    const size_t heads = static_cast<size_t>(p.max_items) * p.q_len * p.q_heads;
    writes.Add(p.partial_out, heads * p.head_dim * sizeof(float));
    writes.Add(p.partial_lse, heads * sizeof(float));
    return;
  }
  const size_t heads = static_cast<size_t>(p.rows) * p.q_len * p.q_heads;
  const size_t partials = size_t{2} * p.blocks * kDecodeTileRows;
  writes.Add(p.out, heads * p.head_dim * sizeof(T));
  writes.Add(p.lse, heads * sizeof(LseBase2));
  writes.Add(p.partial_out, partials * p.head_dim * sizeof(float));
  writes.Add(p.partial_lse, partials * sizeof(float));
  writes.Add(p.counters, size_t{2} * p.blocks * sizeof(uint32_t));
}

template <class T>
void MergeWrites(const MergeStatesParams& p, WriteList& writes) {
  const size_t heads = static_cast<size_t>(p.rows) * p.q_len * p.q_heads;
  writes.Add(p.out, heads * p.head_dim * sizeof(T));
  writes.Add(p.lse, heads * sizeof(LseBase2));
}

template <class T>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDTypeOf<Float16> = DType::kFloat16;
template <>
constexpr DType kDTypeOf<Float8E4M3> = DType::kFloat8E4M3;

template <class T>
constexpr Kernel<MergeStatesParams> Merge(const char* name) {
  return {name, &MergeStatesHost<T>, PRISTINE_CUDA(&MergeStatesCuda<T>), &MergeWrites<T>};
}

template <class T, class Kv, int kHeadDim>
constexpr DecodeVariant Variant(const char* decode, const char* verify, const Kernel<MergeStatesParams>& merge) {
  const auto kernel = [](const char* name) -> Kernel<PagedDecodeParams> {
    return {name, &PagedDecodeHost<T, Kv, kHeadDim>, PRISTINE_CUDA((&PagedDecodeCuda<T, Kv, kHeadDim>)),
            &DecodeWrites<T>};
  };
  return {.dtype = kDTypeOf<T>,
          .kv_dtype = kDTypeOf<Kv>,
          .head_dim = kHeadDim,
          .decode = kernel(decode),
          .verify = kernel(verify),
          .merge = merge,
          .blocks_per_multiprocessor = sizeof(T) == 4 ? 0 : DecodeBlocksPerMultiprocessor(kHeadDim),
          .shared_bytes = sizeof(T) == 4 ? 0 : DecodeMmaSharedBytes(kHeadDim),
          .prepare = PRISTINE_CUDA((&PagedDecodePrepare<T, Kv, kHeadDim>))};
}

constexpr Kernel<MergeStatesParams> kMergeFloat32 = Merge<float>("merge_states_float32");
constexpr Kernel<MergeStatesParams> kMergeBFloat16 = Merge<BFloat16>("merge_states_bfloat16");
constexpr Kernel<MergeStatesParams> kMergeFloat16 = Merge<Float16>("merge_states_float16");

#define PRISTINE_DECODE_VARIANT(T, Kv, head_dim, name, merge) \
  Variant<T, Kv, head_dim>("paged_decode_" name "_" #head_dim, "target_verify_" name "_" #head_dim, merge)

constexpr DecodeVariant kDecodeVariants[] = {
    PRISTINE_DECODE_VARIANT(float, float, 64, "float32", kMergeFloat32),
    PRISTINE_DECODE_VARIANT(float, float, 128, "float32", kMergeFloat32),
    PRISTINE_DECODE_VARIANT(BFloat16, BFloat16, 64, "bfloat16", kMergeBFloat16),
    PRISTINE_DECODE_VARIANT(BFloat16, BFloat16, 128, "bfloat16", kMergeBFloat16),
    PRISTINE_DECODE_VARIANT(BFloat16, BFloat16, 256, "bfloat16", kMergeBFloat16),
    PRISTINE_DECODE_VARIANT(Float16, Float16, 64, "float16", kMergeFloat16),
    PRISTINE_DECODE_VARIANT(Float16, Float16, 128, "float16", kMergeFloat16),
    PRISTINE_DECODE_VARIANT(Float16, Float16, 256, "float16", kMergeFloat16),
    PRISTINE_DECODE_VARIANT(BFloat16, Float8E4M3, 64, "bfloat16_float8", kMergeBFloat16),
    PRISTINE_DECODE_VARIANT(BFloat16, Float8E4M3, 128, "bfloat16_float8", kMergeBFloat16),
    PRISTINE_DECODE_VARIANT(BFloat16, Float8E4M3, 256, "bfloat16_float8", kMergeBFloat16),
    PRISTINE_DECODE_VARIANT(Float16, Float8E4M3, 64, "float16_float8", kMergeFloat16),
    PRISTINE_DECODE_VARIANT(Float16, Float8E4M3, 128, "float16_float8", kMergeFloat16),
    PRISTINE_DECODE_VARIANT(Float16, Float8E4M3, 256, "float16_float8", kMergeFloat16),
};

#undef PRISTINE_DECODE_VARIANT

}  // namespace

absl::Span<const DecodeVariant> DecodeVariants() { return kDecodeVariants; }

const DecodeVariant* FindDecodeVariant(DType dtype, DType kv_dtype, int32_t head_dim) {
  for (const DecodeVariant& variant : kDecodeVariants) {
    if (variant.dtype == dtype && variant.kv_dtype == kv_dtype && variant.head_dim == head_dim) return &variant;
  }
  return nullptr;
}

std::string DecodeVariantNames() {
  std::string names;
  for (const DecodeVariant& variant : kDecodeVariants) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", ToString(variant.dtype));
    if (variant.kv_dtype != variant.dtype) absl::StrAppend(&names, " over ", ToString(variant.kv_dtype));
    absl::StrAppend(&names, " with head_dim ", variant.head_dim);
  }
  return names;
}

}  // namespace pristine::attention
