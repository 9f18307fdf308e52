#include "attention/merge_variants.h"

#include "absl/strings/str_cat.h"

namespace pristine::attention {
namespace {

// The last row's last byte ends the range: gaps between strided rows are covered too.
template <class T>
void OutputWrites(const MergeOutput& out, int32_t rows, int32_t heads, int32_t head_dim, const ReportRing& reports,
                  WriteList& writes) {
  const int64_t last = rows - 1;
  writes.Add(out.v, static_cast<size_t>(last * out.v_stride + int64_t{heads} * head_dim) * sizeof(T));
  writes.Add(out.lse,
             static_cast<size_t>(last * out.lse_stride + (heads - 1) * out.lse_head_stride + 1) * sizeof(float));
  writes.Add(reports.count, sizeof(*reports.count));
  writes.Add(reports.records, reports.capacity * sizeof(*reports.records));
}
template <class T, class Params>
void Writes(const Params& p, WriteList& writes) {
  OutputWrites<T>(p.out, p.rows, p.heads, p.head_dim, p.reports, writes);
}

template <class T, int kHeadDim>
constexpr MergeVariant Variant(DType dtype, const char* block_per_token, const char* token_head, const char* sets) {
  return {.dtype = dtype,
          .head_dim = kHeadDim,
          .max_heads_per_block = MaxHeadsPerBlock(dtype, kHeadDim),
          .block_per_token = {block_per_token, &MergePairHost<T>,
                              PRISTINE_CUDA((&MergePairBlockPerTokenCuda<T, kHeadDim>)), &Writes<T, MergePairParams>},
          .token_head = {token_head, &MergePairHost<T>, PRISTINE_CUDA((&MergePairTokenHeadCuda<T, kHeadDim>)),
                         &Writes<T, MergePairParams>},
          .sets = {sets, &MergeSetsHost<T>, PRISTINE_CUDA((&MergeSetsCuda<T, kHeadDim>)), &Writes<T, MergeSetsParams>}};
}

constexpr MergeVariant kMergeVariants[] = {
    Variant<float, 64>(DType::kFloat32, "merge_block_per_token_float32_64", "merge_token_head_float32_64",
                       "merge_sets_float32_64"),
    Variant<float, 128>(DType::kFloat32, "merge_block_per_token_float32_128", "merge_token_head_float32_128",
                        "merge_sets_float32_128"),
    Variant<float, 256>(DType::kFloat32, "merge_block_per_token_float32_256", "merge_token_head_float32_256",
                        "merge_sets_float32_256"),
    Variant<Float16, 64>(DType::kFloat16, "merge_block_per_token_float16_64", "merge_token_head_float16_64",
                         "merge_sets_float16_64"),
    Variant<Float16, 128>(DType::kFloat16, "merge_block_per_token_float16_128", "merge_token_head_float16_128",
                          "merge_sets_float16_128"),
    Variant<Float16, 256>(DType::kFloat16, "merge_block_per_token_float16_256", "merge_token_head_float16_256",
                          "merge_sets_float16_256"),
    Variant<BFloat16, 64>(DType::kBFloat16, "merge_block_per_token_bfloat16_64", "merge_token_head_bfloat16_64",
                          "merge_sets_bfloat16_64"),
    Variant<BFloat16, 128>(DType::kBFloat16, "merge_block_per_token_bfloat16_128", "merge_token_head_bfloat16_128",
                           "merge_sets_bfloat16_128"),
    Variant<BFloat16, 256>(DType::kBFloat16, "merge_block_per_token_bfloat16_256", "merge_token_head_bfloat16_256",
                           "merge_sets_bfloat16_256"),
};

}  // namespace

absl::Span<const MergeVariant> MergeVariants() { return kMergeVariants; }

const MergeVariant* FindMergeVariant(DType dtype, int32_t head_dim) {
  for (const MergeVariant& variant : kMergeVariants) {
    if (variant.dtype == dtype && variant.head_dim == head_dim) return &variant;
  }
  return nullptr;
}

std::string MergeVariantNames() {
  std::string names;
  for (const MergeVariant& variant : kMergeVariants) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", ToString(variant.dtype), " with head_dim ", variant.head_dim);
  }
  return names;
}

}  // namespace pristine::attention
