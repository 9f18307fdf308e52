#include "pristine/attention/paged_prefill.h"

#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/kernels/paged_prefill.h"
#include "attention/prefill_variants.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention {
namespace {

constexpr int32_t kMaxGroup = 32;
constexpr int kMinCapability = 80;    // of CUDA devices
constexpr uintptr_t kAlignment = 16;  // of vector loads

// `span` as `need` elements of `element_bytes` each.
template <class Span>
absl::Status CheckTensor(const std::string& name, const char* what, const Span& span, size_t element_bytes,
                         int64_t need, uintptr_t alignment) {
  const int64_t size = static_cast<int64_t>(span.bytes() / element_bytes);
  if (size < need) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", what, " has ", size, " elements, needs ", need));
  }
  if (span.address() == nullptr || reinterpret_cast<uintptr_t>(span.address()) % alignment != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", what, " must be aligned to ", alignment, " bytes and not null"));
  }
  return absl::OkStatus();
}
template <class Span>
absl::Status CheckOptional(const std::string& name, const char* what, const Span& span, int64_t need) {
  return span.empty() ? absl::OkStatus() : CheckTensor(name, what, span, 4, need, 4);
}

absl::Status Validate(const PagedPrefillConfig& c) {
  const auto invalid = [&c](const char* what, auto value, const char* accepted) {
    return absl::InvalidArgumentError(absl::StrCat(c.name, ": ", what, " is ", value, ", must be ", accepted));
  };
  if (c.kv_heads < 1 || c.kv_heads > 65535) return invalid("kv_heads", c.kv_heads, "1 to 65535");
  if (c.q_heads < c.kv_heads || c.q_heads % c.kv_heads != 0 || c.q_heads / c.kv_heads > kMaxGroup) {
    return absl::InvalidArgumentError(absl::StrCat(c.name, ": q_heads is ", c.q_heads,
                                                   ", must be kv_heads = ", c.kv_heads, " times 1 to ", kMaxGroup));
  }
  if (c.page_size < 1) return invalid("page_size", c.page_size, "at least 1");
  if (c.window < 0) return invalid("window", c.window, "at least 0");
  if (!(c.scale > 0) || !std::isfinite(c.scale)) return invalid("scale", c.scale, "finite and greater than 0");
  if (!(c.soft_cap >= 0) || !std::isfinite(c.soft_cap)) return invalid("soft_cap", c.soft_cap, "finite, at least 0");
  if (c.layout != KvLayout::kNHD && c.layout != KvLayout::kHND) {
    return invalid("layout", static_cast<int32_t>(c.layout), "NHD or HND");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<PagedPrefill>> PagedPrefill::Create(Device& device, const PagedPrefillConfig& config) {
  PRISTINE_RETURN_IF_ERROR(Validate(config));
  const PrefillVariant* const variant =
      FindPrefillVariant(config.dtype, config.kv_dtype, config.head_dim, device.compute_capability());
  if (variant == nullptr) {
    return absl::UnimplementedError(absl::StrCat(config.name, ": no prefill kernel for ", ToString(config.dtype),
                                                 " with ", ToString(config.kv_dtype), " KV and head_dim ",
                                                 config.head_dim, "; there are ", PrefillVariantNames()));
  }
  return Create(device, config, *variant);
}

absl::StatusOr<std::unique_ptr<PagedPrefill>> PagedPrefill::Create(Device& device, const PagedPrefillConfig& config,
                                                                   const PrefillVariant& variant) {
  PRISTINE_RETURN_IF_ERROR(Validate(config));
  if (device.backend() == Backend::kCuda) {
    if (variant.kernel.cuda == nullptr) {
      return absl::UnimplementedError(absl::StrCat(variant.kernel.name, ": built without CUDA"));
    }
    const int capability = device.compute_capability(), only = variant.only_capability;
    if (only == 0 ? capability < kMinCapability : capability != only) {
      return absl::UnimplementedError(absl::StrCat(variant.kernel.name, ": ", device.name(), " has compute capability ",
                                                   capability, ", needs ", only == 0 ? "at least " : "",
                                                   only == 0 ? kMinCapability : only));
    }
    if (static_cast<size_t>(variant.shared_bytes) > device.shared_bytes_per_block()) {
      return absl::UnimplementedError(absl::StrCat(variant.kernel.name, ": ", device.name(), " has ",
                                                   device.shared_bytes_per_block(),
                                                   " bytes of shared memory per block, needs ", variant.shared_bytes));
    }
    if (variant.prepare != nullptr) {
      // Attributes belong to the current device; queueing on one of its streams makes this device the current one.
      PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.CreateStream());
      PRISTINE_RETURN_IF_ERROR(
          stream->EnqueueCudaKernel(variant.kernel.name, [&variant](CUstream_st*) { return variant.prepare(); }));
    }
  }
  return std::unique_ptr<PagedPrefill>(new PagedPrefill(device, config, variant));
}

const char* PagedPrefill::kernel_name() const { return variant_.kernel.name; }

absl::Status PagedPrefill::Run(Stream& stream, const Extent& bucket, const PrefillTensors& t) const {
  const PagedPrefillConfig& c = config_;
  if (&stream.device() != &device_) {
    return absl::InvalidArgumentError(
        absl::StrCat(c.name, ": the stream is of device ", stream.device().name(), ", must be of ", device_.name()));
  }
  if (bucket.tokens < 0 || bucket.requests < 0 || (bucket.requests == 0 && bucket.tokens > 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat(c.name, ": bucket is ", bucket.ToString(), ", must have requests for its tokens"));
  }
  if (bucket.tokens == 0) return absl::OkStatus();
  // More than any kernel's grid, and than rows of 32 bits.
  if ((int64_t{bucket.tokens} + bucket.requests + 1) * c.q_heads > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(
        absl::StrCat(c.name, ": bucket is ", bucket.ToString(),
                     ", must have less than 2^31 (tokens + requests + 1) * q_heads; q_heads is ", c.q_heads));
  }
  const size_t element = SizeOf(c.dtype), kv_element = SizeOf(c.kv_dtype);
  const int64_t row = int64_t{c.q_heads} * c.head_dim;
  const int64_t page = int64_t{c.page_size} * c.kv_heads * c.head_dim;
  const int64_t num_pages = static_cast<int64_t>(t.k.bytes() / kv_element) / page;
  const int64_t requests = bucket.requests;
  PRISTINE_RETURN_IF_ERROR(CheckTensor(c.name, "q", t.q, element, bucket.tokens * row, kAlignment));
  PRISTINE_RETURN_IF_ERROR(CheckTensor(c.name, "k", t.k, kv_element, page, kAlignment));
  PRISTINE_RETURN_IF_ERROR(CheckTensor(c.name, "v", t.v, kv_element, num_pages * page, kAlignment));
  PRISTINE_RETURN_IF_ERROR(CheckTensor(c.name, "out", t.out, element, bucket.tokens * row, kAlignment));
  PRISTINE_RETURN_IF_ERROR(CheckOptional(c.name, "lse", t.lse, int64_t{bucket.tokens} * c.q_heads));
  PRISTINE_RETURN_IF_ERROR(CheckOptional(c.name, "k_scale", t.k_scale, 1));
  PRISTINE_RETURN_IF_ERROR(CheckOptional(c.name, "v_scale", t.v_scale, 1));
  PRISTINE_RETURN_IF_ERROR(CheckOptional(c.name, "sinks", t.sinks, c.q_heads));
  PRISTINE_RETURN_IF_ERROR(CheckTensor(c.name, "qo_indptr", t.qo_indptr, 4, requests + 1, 4));
  PRISTINE_RETURN_IF_ERROR(CheckOptional(c.name, "lengths", t.lengths, requests));
  const bool table = !t.block_table.empty();
  if (table != (t.table_width > 0) || table == !t.kv_indptr.empty() || table == !t.kv_indices.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(c.name, ": kv_indptr has ", t.kv_indptr.size(), " elements, kv_indices ", t.kv_indices.size(),
                     ", block_table ", t.block_table.size(), " with table_width ", t.table_width,
                     "; must be kv_indptr and kv_indices alone, or block_table and table_width alone"));
  }
  if (table) {
    PRISTINE_RETURN_IF_ERROR(CheckTensor(c.name, "block_table", t.block_table, 4, requests * t.table_width, 4));
    PRISTINE_RETURN_IF_ERROR(CheckTensor(c.name, "lengths", t.lengths, 4, requests, 4));
  } else {
    PRISTINE_RETURN_IF_ERROR(CheckTensor(c.name, "kv_indptr", t.kv_indptr, 4, requests + 1, 4));
    PRISTINE_RETURN_IF_ERROR(CheckTensor(c.name, "kv_indices", t.kv_indices, 4, 1, 4));
  }
  const DeviceSpan<const int32_t>& pages = table ? t.block_table : t.kv_indices;
  const bool nhd = c.layout == KvLayout::kNHD;
  return Launch(stream, variant_.kernel,
                PagedPrefillParams{.q = t.q.address(),
                                   .kv = {.k = t.k.address(),
                                          .v = t.v.address(),
                                          .k_scale = t.k_scale.address(),
                                          .v_scale = t.v_scale.address(),
                                          .page_stride = page,
                                          .token_stride = int64_t{nhd ? c.kv_heads : 1} * c.head_dim,
                                          .head_stride = int64_t{nhd ? 1 : c.page_size} * c.head_dim,
                                          .kv_indptr = t.kv_indptr.address(),
                                          .pages = pages.address(),
                                          .pages_size = static_cast<int64_t>(pages.size()),
                                          .table_stride = t.table_width,
                                          .lengths = t.lengths.address(),
                                          .num_pages = num_pages,
                                          .page_size = c.page_size,
                                          .kv_heads = c.kv_heads},
                                   .sinks = t.sinks.address(),
                                   .qo_indptr = t.qo_indptr.address(),
                                   .out = t.out.address(),
                                   .lse = t.lse.empty() ? nullptr : reinterpret_cast<float*>(t.lse.address()),
                                   .requests = bucket.requests,
                                   .tokens = bucket.tokens,
                                   .q_heads = c.q_heads,
                                   .head_dim = c.head_dim,
                                   .window = c.window,
                                   .scale = c.scale,
                                   .soft_cap = c.soft_cap});
}

}  // namespace pristine::attention
