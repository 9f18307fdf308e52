// Tuning of the prefill's state kernel from the environment: read once, when something is created, kept as a value, and
// checked against what is compiled and what the device has before any launch. Nothing here times anything: a kernel
// that updates states in place must not be tried out on live ones, so that its configuration is chosen from its shape,
// the device and these variables alone.
//
//   PRISTINE_GDN_CHUNK_H_BV           columns of V per block (32)
//   PRISTINE_GDN_CHUNK_H_NUM_WARPS    warps per block (4)
//   PRISTINE_GDN_CHUNK_H_NUM_STAGES   chunks in flight (2)
//
// The defaults in parentheses are those of the unfused state kernel (UnfusedStateSharedBytes). Where a kernel's
// compiled configurations are given, as Prefill::Create does, the defaults are theirs.
#ifndef PRISTINE_ATTENTION_GDN_TUNING_H_
#define PRISTINE_ATTENTION_GDN_TUNING_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace pristine::attention::gdn {

struct GdnTuning {
  int32_t bv = 32;
  int32_t num_warps = 4;
  int32_t num_stages = 2;
  bool from_environment = false;  // whether any variable was set; else a kernel may choose by shape
  friend bool operator==(const GdnTuning&, const GdnTuning&) = default;
};

// Reads the three variables through `get`, which returns null for one that is not set. INVALID_ARGUMENT: one that is no
// whole number of at least 1, blanks and trailing characters included; names it and quotes what it holds.
// What is not set comes from the first of `compiled` that agrees with all that is set; where none does, from the first;
// where there are none, from GdnTuning's defaults.
absl::StatusOr<GdnTuning> ParseGdnTuning(absl::FunctionRef<const char*(const char* name)> get,
                                         absl::Span<const GdnTuning> compiled = {});
// From this process's environment.
absl::StatusOr<GdnTuning> GdnTuningFromEnvironment(absl::Span<const GdnTuning> compiled = {});

// A kernel's compiled configurations, and the function that its launcher takes the shared memory of each from.
struct TunableKernel {
  const char* name = "";
  absl::Span<const GdnTuning> compiled = {};  // from_environment does not count
  int64_t (*shared_bytes)(const GdnTuning& tuning) = nullptr;
};

// What Triton's state kernel (FLA, chunk_delta_h) takes: tiles of w, k and u for each chunk in flight, all bfloat16.
constexpr int64_t UnfusedStateSharedBytes(int32_t k_dim, const GdnTuning& tuning) {
  constexpr int64_t kChunkTokens = 64, kElementBytes = 2;
  return tuning.num_stages * kChunkTokens * kElementBytes * (2 * int64_t{k_dim} + tuning.bv);
}

// INVALID_ARGUMENT: `tuning` is not compiled (lists what is, with the need of each), or needs more than
// `shared_bytes_per_block`. Says the need, the limit, and the largest number of stages that fits with the same tile and
// warps, where there is one. A limit of int64's maximum is none (Host).
absl::Status CheckTuning(const GdnTuning& tuning, const TunableKernel& kernel, int64_t shared_bytes_per_block);

// Chooses for a program that would rather run slower than not at all. Thread-compatible.
class TuningPolicy {
 public:
  enum class OnBadTuning {
    kError,
    kFallBack,  // to the compiled configuration with the same tile and warps and the most stages that fits; failing
                // that, to the first that fits
  };
  // `warn` is called with the first fallback of this policy; null: stderr.
  explicit TuningPolicy(OnBadTuning on_bad, std::function<void(const std::string&)> warn = nullptr);

  // `asked` if CheckTuning accepts it. Else as the policy says; INVALID_ARGUMENT also where nothing compiled fits.
  absl::StatusOr<GdnTuning> Choose(const GdnTuning& asked, const TunableKernel& kernel, int64_t shared_bytes_per_block);

  int64_t fallbacks() const { return fallbacks_; }

 private:
  const OnBadTuning on_bad_;
  const std::function<void(const std::string&)> warn_;
  int64_t fallbacks_ = 0;
};

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_TUNING_H_
