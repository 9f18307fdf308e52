#include "pristine/attention/gdn/prefill_gate.h"

#include "absl/strings/str_cat.h"

namespace pristine::attention::gdn {
namespace {

constexpr const char* kInstead =
    "; use Verify and Commit of recurrent.h, which take up to 1024 tokens at once anywhere";

// What a compute capability's tensor cores ask for. A row without kernel is here for its message: first the CUDA that
// any kernel for it would need, then that there is none.
struct Architecture {
  int sm_major, sm_minor;
  int cuda_runtime_version;
  bool has_kernel;
};
constexpr Architecture kArchitectures[] = {{9, 0, 12000, true}, {10, 0, 13000, false}, {10, 3, 13000, false}};

absl::Status Error(absl::StatusCode code, const DeviceCaps& caps, const std::string& problem, const std::string& need,
                   const char* instead) {
  return absl::Status(code, absl::StrCat("gdn_prefill on ", Describe(caps), ": ", problem, "; needs ", need, instead));
}

absl::Status CheckDevice(const DeviceCaps& caps) {
  for (const Architecture& architecture : kArchitectures) {
    if (architecture.sm_major != caps.sm_major || architecture.sm_minor != caps.sm_minor) continue;
    if (caps.cuda_runtime_version < architecture.cuda_runtime_version) {
      return Error(absl::StatusCode::kFailedPrecondition, caps, "the CUDA runtime is too old for this capability",
                   absl::StrCat("CUDA ", architecture.cuda_runtime_version / 1000, ".0 or newer"), kInstead);
    }
    if (architecture.has_kernel) return absl::OkStatus();
  }
  return Error(absl::StatusCode::kUnimplemented, caps, "there is no kernel for this capability",
               "compute capability 9.0", kInstead);
}

}  // namespace

absl::StatusOr<GdnPrefillPath> CheckGdnPrefill(const DeviceCaps& caps, const GdnPrefillOptions& options) {
  const bool host = caps.backend == Backend::kHost;
  if (!host) {
    if (absl::Status status = CheckDevice(caps); !status.ok()) return status;
  }
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  if (options.dtype != DType::kBFloat16) {
    return Error(kUnimplemented, caps, absl::StrCat("q, k and v are ", ToString(options.dtype)), "bfloat16",
                 "; convert them, or use recurrent.h, which takes float32");
  }
  if (options.state_dtype != DType::kFloat32 && options.state_dtype != DType::kBFloat16) {
    return Error(kUnimplemented, caps, absl::StrCat("the states are ", ToString(options.state_dtype)),
                 "float32 or bfloat16", "; use a StatePool of one of these");
  }
  if (options.k_dim != kHeadDim || options.v_dim != kHeadDim) {
    return Error(kUnimplemented, caps, absl::StrCat("a head has K = ", options.k_dim, " and V = ", options.v_dim),
                 absl::StrCat("K = V = ", kHeadDim), "; pad heads with zeros to that size");
  }
  if (!host && options.shared_bytes > caps.shared_bytes_per_block) {
    return Error(absl::StatusCode::kInvalidArgument, caps,
                 absl::StrCat("this configuration takes ", options.shared_bytes, " bytes of shared memory per block"),
                 absl::StrCat("at most ", caps.shared_bytes_per_block),
                 "; use fewer stages (PRISTINE_GDN_CHUNK_H_NUM_STAGES) or a smaller tile (PRISTINE_GDN_CHUNK_H_BV)");
  }
  return host ? GdnPrefillPath::kHost : GdnPrefillPath::kSm90;
}

}  // namespace pristine::attention::gdn
