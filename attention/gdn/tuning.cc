#include "pristine/attention/gdn/tuning.h"

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention::gdn {
namespace {

std::string ToText(const GdnTuning& t) {
  return absl::StrCat("BV ", t.bv, ", ", t.num_warps, " warps, ", t.num_stages, " stages");
}

bool SameTile(const GdnTuning& a, const GdnTuning& b) { return a.bv == b.bv && a.num_warps == b.num_warps; }

// Of the compiled ones with `tuning`'s tile and warps that fit, the one with the most stages; null: none.
const GdnTuning* MostStages(const GdnTuning& tuning, const TunableKernel& kernel, int64_t cap) {
  const GdnTuning* best = nullptr;
  for (const GdnTuning& c : kernel.compiled) {
    if (SameTile(c, tuning) && kernel.shared_bytes(c) <= cap && (best == nullptr || c.num_stages > best->num_stages)) {
      best = &c;
    }
  }
  return best;
}

}  // namespace

absl::StatusOr<GdnTuning> ParseGdnTuning(absl::FunctionRef<const char*(const char* name)> get,
                                         absl::Span<const GdnTuning> compiled) {
  const struct {
    const char* name;
    int32_t GdnTuning::*member;
  } variables[] = {{"PRISTINE_GDN_CHUNK_H_BV", &GdnTuning::bv},
                   {"PRISTINE_GDN_CHUNK_H_NUM_WARPS", &GdnTuning::num_warps},
                   {"PRISTINE_GDN_CHUNK_H_NUM_STAGES", &GdnTuning::num_stages}};
  const GdnTuning defaults = compiled.empty() ? GdnTuning{} : compiled.front();
  GdnTuning set = {0, 0, 0};  // 0: not set
  for (const auto& variable : variables) {
    const char* const text = get(variable.name);
    if (text == nullptr) continue;
    const char* const end = text + std::strlen(text);
    int32_t value = 0;
    const std::from_chars_result result = std::from_chars(text, end, value);
    if (result.ec != std::errc() || result.ptr != end || value < 1) {
      return absl::InvalidArgumentError(absl::StrCat(variable.name, " is \"", text,
                                                     "\"; must be a whole number of at least 1, or not set (",
                                                     defaults.*variable.member, ")"));
    }
    set.*variable.member = value;
    set.from_environment = true;
  }
  const auto completed = [&](GdnTuning tuning) {
    for (const auto& variable : variables) {
      if (set.*variable.member != 0) tuning.*variable.member = set.*variable.member;
    }
    tuning.from_environment = set.from_environment;
    return tuning;
  };
  for (const GdnTuning& c : compiled) {
    const GdnTuning tuning = completed(c);
    if (SameTile(c, tuning) && c.num_stages == tuning.num_stages) return tuning;
  }
  return completed(defaults);
}

absl::StatusOr<GdnTuning> GdnTuningFromEnvironment(absl::Span<const GdnTuning> compiled) {
  return ParseGdnTuning([](const char* name) -> const char* { return std::getenv(name); }, compiled);
}

absl::Status CheckTuning(const GdnTuning& tuning, const TunableKernel& kernel, int64_t shared_bytes_per_block) {
  const GdnTuning* found = nullptr;
  std::string compiled;
  for (const GdnTuning& c : kernel.compiled) {
    if (SameTile(c, tuning) && c.num_stages == tuning.num_stages) found = &c;
    absl::StrAppend(&compiled, compiled.empty() ? "" : "; ", ToText(c), " (", kernel.shared_bytes(c), " bytes)");
  }
  if (found != nullptr && kernel.shared_bytes(*found) <= shared_bytes_per_block) return absl::OkStatus();
  const std::string limit = shared_bytes_per_block == std::numeric_limits<int64_t>::max()
                                ? "any number of"
                                : absl::StrCat(shared_bytes_per_block);
  const GdnTuning* const most = MostStages(tuning, kernel, shared_bytes_per_block);
  const std::string stages =
      most == nullptr ? "" : absl::StrCat("; PRISTINE_GDN_CHUNK_H_NUM_STAGES may be at most ", most->num_stages);
  if (found == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(kernel.name, ": ", ToText(tuning), " (PRISTINE_GDN_CHUNK_H_*)",
                                                   " is not compiled; there is ", compiled, "; the device has ", limit,
                                                   " bytes of shared memory per block", stages));
  }
  return absl::InvalidArgumentError(
      absl::StrCat(kernel.name, ": ", ToText(tuning), " needs ", kernel.shared_bytes(*found),
                   " bytes of shared memory per block, the device has ", limit,
                   most == nullptr ? "; no number of stages fits: set PRISTINE_GDN_CHUNK_H_BV lower" : stages));
}

TuningPolicy::TuningPolicy(OnBadTuning on_bad, std::function<void(const std::string&)> warn)
    : on_bad_(on_bad), warn_(std::move(warn)) {}

absl::StatusOr<GdnTuning> TuningPolicy::Choose(const GdnTuning& asked, const TunableKernel& kernel,
                                               int64_t shared_bytes_per_block) {
  const absl::Status status = CheckTuning(asked, kernel, shared_bytes_per_block);
  if (status.ok()) return asked;
  if (on_bad_ == OnBadTuning::kError) return status;
  const GdnTuning* chosen = MostStages(asked, kernel, shared_bytes_per_block);
  for (const GdnTuning& c : kernel.compiled) {
    if (chosen == nullptr && kernel.shared_bytes(c) <= shared_bytes_per_block) chosen = &c;
  }
  if (chosen == nullptr) return status;
  if (fallbacks_++ == 0) {
    const std::string text = absl::StrCat(status.message(), "; falling back to ", ToText(*chosen));
    if (warn_ != nullptr) {
      warn_(text);
    } else {
      std::fprintf(stderr, "%s\n", text.c_str());
    }
  }
  GdnTuning result = *chosen;
  result.from_environment = asked.from_environment;
  return result;
}

}  // namespace pristine::attention::gdn
