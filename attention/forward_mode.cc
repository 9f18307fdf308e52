#include "pristine/attention/forward_mode.h"

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "attention/kernels/paged_decode.h"
#include "attention/prefill_variants.h"
#include "attention/variants.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention {
namespace {

constexpr int kMinComputeCapability = 80;  // cp.async and the 16-bit MMAs
constexpr int kBlackwell = 100;
constexpr int kBlackwellRuntime = 12080;  // the first CUDA that compiles for it
static_assert(kMaxDecodeQLen == kDecodeMaxQueries);

std::string VersionText(int version) { return absl::StrCat(version / 1000, ".", version % 1000 / 10); }

std::string Prefix(ForwardMode mode) { return absl::StrCat("route of ", ToString(mode), ": "); }

// `what` was found, `needed` is what would do, `instead` what else runs the step.
absl::Status Refuse(ForwardMode mode, const std::string& what, const std::string& needed, const std::string& instead) {
  return absl::UnimplementedError(absl::StrCat(Prefix(mode), what, "; needs ", needed, "; instead: ", instead));
}

absl::Status CheckSizes(ForwardMode mode, const RouteConfig& config) {
  const std::pair<const char*, int32_t> sizes[] = {{"q_heads", config.q_heads},
                                                   {"kv_heads", config.kv_heads},
                                                   {"head_dim", config.head_dim},
                                                   {"page_size", config.page_size}};
  for (const auto& [name, size] : sizes) {
    if (size < 1) {
      return absl::InvalidArgumentError(absl::StrCat(Prefix(mode), name, " is ", size, ", must be at least 1"));
    }
  }
  if (config.q_heads % config.kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(Prefix(mode), "q_heads is ", config.q_heads,
                                                   ", must be a multiple of kv_heads ", config.kv_heads));
  }
  return absl::OkStatus();
}

// The family by the table in the header.
absl::StatusOr<KernelFamily> FamilyOf(ForwardMode mode, const RouteConfig& config) {
  const int32_t q_len = config.q_len;
  const std::string found = q_len == 0 ? "q_len is 0 (requests differ)" : absl::StrCat("q_len is ", q_len);
  if (q_len < 0) return absl::InvalidArgumentError(absl::StrCat(Prefix(mode), found, ", must be at least 0"));
  switch (mode) {
    case ForwardMode::kIdle:
      return KernelFamily::kNone;
    case ForwardMode::kDecode:
      if (q_len == 1) return KernelFamily::kDecode;
      return absl::InvalidArgumentError(absl::StrCat(
          Prefix(mode), found, ", must be 1; several tokens each are target_verify, extend or draft_extend"));
    case ForwardMode::kTargetVerify:
      if (q_len >= 2 && q_len <= kMaxDecodeQLen) return KernelFamily::kDecode;
      return absl::InvalidArgumentError(
          absl::StrCat(Prefix(mode), found, ", must be 2 to ", kMaxDecodeQLen,
                       " and the same for every request; one token each is decode, any other number is extend"));
    case ForwardMode::kExtend:
    case ForwardMode::kMixed:
      return KernelFamily::kContext;
    case ForwardMode::kDraftExtend:
      if (!config.decode_draft_extend) return KernelFamily::kContext;
      if (q_len >= 1 && q_len <= kMaxDecodeQLen) return KernelFamily::kDecode;
      return absl::InvalidArgumentError(
          absl::StrCat(Prefix(mode), found, ": the decode kernels take 1 to ", kMaxDecodeQLen,
                       " query tokens, as many for every request as the graph was captured with, and would read past "
                       "the tokens of a request that has fewer (sglang PR #24856); instead: decode_draft_extend off, "
                       "which takes the context kernels, or the same q_len for every request"));
  }
  return absl::InvalidArgumentError(absl::StrCat("route: no such mode: ", static_cast<int>(mode)));
}

absl::Status CheckDevice(ForwardMode mode, const DeviceCaps& caps) {
  if (caps.backend == Backend::kHost) return absl::OkStatus();
  const int capability = 10 * caps.sm_major + caps.sm_minor;
  if (capability < kMinComputeCapability) {
    return Refuse(mode, absl::StrCat("the device is ", Describe(caps)), "compute capability 8.0 or later",
                  "a newer GPU, or the Host backend");
  }
  if (caps.cuda_driver_version / 1000 < caps.cuda_runtime_version / 1000) {
    return Refuse(
        mode, absl::StrCat("the device is ", Describe(caps)),
        absl::StrCat("a driver for CUDA ", VersionText(caps.cuda_runtime_version / 1000 * 1000)),
        absl::StrCat("a newer driver, a build with CUDA ", caps.cuda_driver_version / 1000, ", or the Host backend"));
  }
  if (capability >= kBlackwell && caps.cuda_runtime_version < kBlackwellRuntime) {
    return Refuse(mode, absl::StrCat("the device is ", Describe(caps)),
                  absl::StrCat("a build with CUDA ", VersionText(kBlackwellRuntime), " or later"),
                  "such a build, or the Host backend");
  }
  return absl::OkStatus();
}

// What else could run a shape that a family has no kernel for.
const char* InsteadOf(const RouteConfig& config) {
  if (config.dtype == DType::kFloat8E4M3) return "queries in 16 bits over a KV cache in float8_e4m3";
  if (config.kv_dtype != config.dtype && config.kv_dtype != DType::kFloat8E4M3) return "a KV cache in the dtype of q";
  if (config.head_dim < 256 && config.head_dim != 64 && config.head_dim != 128) {
    return "heads padded with zeros to the next head_dim of these";
  }
  return "another of these";
}

absl::Status CheckShape(ForwardMode mode, KernelFamily family, const DeviceCaps& caps, const RouteConfig& config) {
  if (config.q_heads / config.kv_heads > kDecodeMaxGroup) {
    return Refuse(mode, absl::StrCat(config.q_heads / config.kv_heads, " query heads per KV head"),
                  absl::StrCat("at most ", kDecodeMaxGroup), "KV heads repeated");
  }
  const bool decode = family == KernelFamily::kDecode;
  const DecodeVariant* const decode_variant = FindDecodeVariant(config.dtype, config.kv_dtype, config.head_dim);
  const PrefillVariant* const prefill_variant =
      FindPrefillVariant(config.dtype, config.kv_dtype, config.head_dim, 10 * caps.sm_major + caps.sm_minor);
  if (decode ? decode_variant == nullptr : prefill_variant == nullptr) {
    return Refuse(mode,
                  absl::StrCat("no ", ToString(family), " kernel for ", ToString(config.dtype), " over a KV cache in ",
                               ToString(config.kv_dtype), " with head_dim ", config.head_dim),
                  absl::StrCat("one of ", decode ? DecodeVariantNames() : PrefillVariantNames()), InsteadOf(config));
  }
  const int32_t shared_bytes = decode ? decode_variant->shared_bytes : prefill_variant->shared_bytes;
  if (caps.backend == Backend::kHost || static_cast<size_t>(shared_bytes) <= caps.shared_bytes_per_block) {
    return absl::OkStatus();
  }
  return Refuse(
      mode,
      absl::StrCat("a block of ", Describe(caps), " has ", caps.shared_bytes_per_block, " bytes of shared memory"),
      absl::StrCat(shared_bytes, " for ", decode ? decode_variant->decode.name : prefill_variant->kernel.name),
      decode ? "the context kernels (mode extend, which takes requests of any q_len), or compute capability 9.0"
             : "a device that has it, float32, or the Host backend");
}

}  // namespace

const char* ToString(ForwardMode mode) {
  switch (mode) {
    case ForwardMode::kDecode:
      return "decode";
    case ForwardMode::kExtend:
      return "extend";
    case ForwardMode::kMixed:
      return "mixed";
    case ForwardMode::kIdle:
      return "idle";
    case ForwardMode::kTargetVerify:
      return "target_verify";
    case ForwardMode::kDraftExtend:
      return "draft_extend";
  }
  return "unknown";
}

const char* ToString(KernelFamily family) {
  switch (family) {
    case KernelFamily::kNone:
      return "none";
    case KernelFamily::kDecode:
      return "decode";
    case KernelFamily::kContext:
      return "context";
  }
  return "unknown";
}

absl::StatusOr<KernelFamily> Route(ForwardMode mode, const DeviceCaps& caps, const RouteConfig& config) {
  if (mode == ForwardMode::kIdle) return KernelFamily::kNone;
  PRISTINE_RETURN_IF_ERROR(CheckSizes(mode, config));
  PRISTINE_ASSIGN_OR_RETURN(const KernelFamily family, FamilyOf(mode, config));
  PRISTINE_RETURN_IF_ERROR(CheckDevice(mode, caps));
  PRISTINE_RETURN_IF_ERROR(CheckShape(mode, family, caps, config));
  return family;
}

}  // namespace pristine::attention
