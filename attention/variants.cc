#include "attention/variants.h"

#include "absl/strings/str_cat.h"

namespace pristine::attention {
namespace {

void DecodeWrites(const PagedDecodeParams& p, WriteList& writes) {
  const size_t heads = static_cast<size_t>(p.max_items) * p.q_heads;
  writes.Add(p.partial_out, heads * p.head_dim * sizeof(float));
  writes.Add(p.partial_lse, heads * sizeof(float));
}

template <class T>
void MergeWrites(const MergeStatesParams& p, WriteList& writes) {
  const size_t heads = static_cast<size_t>(p.rows) * p.q_heads;
  writes.Add(p.out, heads * p.head_dim * sizeof(T));
  writes.Add(p.lse, heads * sizeof(LseBase2));
}

template <class T, int kHeadDim>
constexpr DecodeVariant Variant(DType dtype, const char* decode, const char* merge) {
  return {
      .dtype = dtype,
      .head_dim = kHeadDim,
      .decode = {decode, &PagedDecodeHost<T, kHeadDim>, PRISTINE_CUDA((&PagedDecodeCuda<T, kHeadDim>)), &DecodeWrites},
      .merge = {merge, &MergeStatesHost<T>, PRISTINE_CUDA(&MergeStatesCuda<T>), &MergeWrites<T>},
      .shared_bytes = DecodeSharedBytes(sizeof(T), kHeadDim),
      .prepare = PRISTINE_CUDA((&PagedDecodePrepare<T, kHeadDim>))};
}

constexpr DecodeVariant kDecodeVariants[] = {
    Variant<float, 64>(DType::kFloat32, "paged_decode_float32_64", "merge_states_float32"),
    Variant<float, 128>(DType::kFloat32, "paged_decode_float32_128", "merge_states_float32"),
    Variant<BFloat16, 64>(DType::kBFloat16, "paged_decode_bfloat16_64", "merge_states_bfloat16"),
    Variant<BFloat16, 128>(DType::kBFloat16, "paged_decode_bfloat16_128", "merge_states_bfloat16"),
};

}  // namespace

absl::Span<const DecodeVariant> DecodeVariants() { return kDecodeVariants; }

const DecodeVariant* FindDecodeVariant(DType dtype, int32_t head_dim) {
  for (const DecodeVariant& variant : kDecodeVariants) {
    if (variant.dtype == dtype && variant.head_dim == head_dim) return &variant;
  }
  return nullptr;
}

std::string DecodeVariantNames() {
  std::string names;
  for (const DecodeVariant& variant : kDecodeVariants) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", ToString(variant.dtype), " with head_dim ", variant.head_dim);
  }
  return names;
}

}  // namespace pristine::attention
