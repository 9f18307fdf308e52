// What depends on the device alone, without one.
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pristine/attention/gdn/prefill.h"
#include "pristine/attention/gdn/prefill_gate.h"
#include "pristine/attention/gdn/tuning.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DeviceCaps;
using attention::DType;
using namespace attention::gdn;  // NOLINT(build/namespaces)

DeviceCaps Gpu(int major, int minor, int runtime, size_t shared_bytes = 232448) {
  return {.backend = Backend::kCuda,
          .sm_major = major,
          .sm_minor = minor,
          .multiprocessors = 132,
          .cuda_runtime_version = runtime,
          .cuda_driver_version = 13020,
          .shared_bytes_per_block = shared_bytes};
}

TEST(PrefillGate, ChoosesThePathOfTheDevice) {
  ASSERT_OK_AND_ASSIGN(const GdnPrefillPath hopper, CheckGdnPrefill(Gpu(9, 0, 13000), {}));
  EXPECT_EQ(hopper, GdnPrefillPath::kSm90);
  ASSERT_OK_AND_ASSIGN(const GdnPrefillPath old_cuda, CheckGdnPrefill(Gpu(9, 0, 12000), {}));
  EXPECT_EQ(old_cuda, GdnPrefillPath::kSm90);
  ASSERT_OK_AND_ASSIGN(const GdnPrefillPath host, CheckGdnPrefill({}, {.shared_bytes = 1 << 30}));
  EXPECT_EQ(host, GdnPrefillPath::kHost);
  EXPECT_OK(CheckGdnPrefill(Gpu(9, 0, 13000), {.state_dtype = DType::kBFloat16, .shared_bytes = 232448}));
}

TEST(PrefillGate, SaysWhatWasFoundWhatIsNeededAndWhatToUse) {
  const auto message = [](const DeviceCaps& caps, const GdnPrefillOptions& options, absl::StatusCode code) {
    const absl::Status status = CheckGdnPrefill(caps, options).status();
    EXPECT_EQ(status.code(), code) << status;
    return std::string(status.message());
  };
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  EXPECT_EQ(message(Gpu(8, 0, 13000), {}, kUnimplemented),
            "gdn_prefill on compute capability 8.0 with CUDA 13.0 (driver 13.2): there is no kernel for this "
            "capability; needs compute capability 9.0; use Verify and Commit of recurrent.h, which take up to 1024 "
            "tokens at once anywhere");
  // Before anything else about that architecture: the CUDA that any kernel for it needs.
  EXPECT_EQ(message(Gpu(10, 0, 12090), {}, absl::StatusCode::kFailedPrecondition),
            "gdn_prefill on compute capability 10.0 with CUDA 12.9 (driver 13.2): the CUDA runtime is too old for "
            "this capability; needs CUDA 13.0 or newer; use Verify and Commit of recurrent.h, which take up to 1024 "
            "tokens at once anywhere");
  EXPECT_EQ(message(Gpu(9, 0, 11080), {}, absl::StatusCode::kFailedPrecondition),
            "gdn_prefill on compute capability 9.0 with CUDA 11.8 (driver 13.2): the CUDA runtime is too old for "
            "this capability; needs CUDA 12.0 or newer; use Verify and Commit of recurrent.h, which take up to 1024 "
            "tokens at once anywhere");
  for (const DeviceCaps& caps : {Gpu(10, 0, 13000), Gpu(10, 3, 13000), Gpu(9, 1, 13000), Gpu(12, 0, 13000)}) {
    message(caps, {}, kUnimplemented);
  }
  const std::string on = "gdn_prefill on compute capability 9.0 with CUDA 13.0 (driver 13.2): ";
  EXPECT_EQ(message(Gpu(9, 0, 13000), {.dtype = DType::kFloat32}, kUnimplemented),
            on + "q, k and v are float32; needs bfloat16; convert them, or use recurrent.h, which takes float32");
  EXPECT_EQ(message(Gpu(9, 0, 13000), {.state_dtype = DType::kFloat16}, kUnimplemented),
            on + "the states are float16; needs float32 or bfloat16; use a StatePool of one of these");
  EXPECT_EQ(message(Gpu(9, 0, 13000), {.k_dim = 256}, kUnimplemented),
            on + "a head has K = 256 and V = 128; needs K = V = 128; pad heads with zeros to that size");
  EXPECT_EQ(message(Gpu(9, 0, 13000), {.shared_bytes = 278528}, absl::StatusCode::kInvalidArgument),
            on + "this configuration takes 278528 bytes of shared memory per block; needs at most 232448; use fewer "
                 "stages (PRISTINE_GDN_CHUNK_H_NUM_STAGES) or a smaller tile (PRISTINE_GDN_CHUNK_H_BV)");
  EXPECT_EQ(message({}, {.v_dim = 64}, kUnimplemented),
            "gdn_prefill on the Host backend: a head has K = 128 and V = 64; needs K = V = 128; pad heads with zeros "
            "to that size");
}

using Variables = std::map<std::string, std::string>;

absl::StatusOr<GdnTuning> Parse(const Variables& variables, absl::Span<const GdnTuning> compiled = {}) {
  const auto get = [&](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  };
  return ParseGdnTuning(get, compiled);
}

TEST(Tuning, DefaultsAndVariables) {
  ASSERT_OK_AND_ASSIGN(const GdnTuning defaults, Parse({}));
  EXPECT_EQ(defaults, (GdnTuning{32, 4, 2, false}));
  ASSERT_OK_AND_ASSIGN(const GdnTuning set, Parse({{"PRISTINE_GDN_CHUNK_H_BV", "64"},
                                                   {"PRISTINE_GDN_CHUNK_H_NUM_WARPS", "8"},
                                                   {"PRISTINE_GDN_CHUNK_H_NUM_STAGES", "3"}}));
  EXPECT_EQ(set, (GdnTuning{64, 8, 3, true}));
  ASSERT_OK_AND_ASSIGN(const GdnTuning one, Parse({{"PRISTINE_GDN_CHUNK_H_NUM_STAGES", "4"}}));
  EXPECT_EQ(one, (GdnTuning{32, 4, 4, true}));
}

TEST(Tuning, WhatIsNotSetComesFromWhatIsCompiled) {
  const GdnTuning compiled[] = {{128, 12, 3}, {64, 8, 3}, {64, 8, 2}};
  const struct {
    Variables variables;
    GdnTuning expected;
  } rows[] = {
      {{}, {128, 12, 3, false}},
      {{{"PRISTINE_GDN_CHUNK_H_BV", "64"}}, {64, 8, 3, true}},
      {{{"PRISTINE_GDN_CHUNK_H_NUM_WARPS", "8"}}, {64, 8, 3, true}},
      {{{"PRISTINE_GDN_CHUNK_H_NUM_STAGES", "2"}}, {64, 8, 2, true}},
      {{{"PRISTINE_GDN_CHUNK_H_NUM_STAGES", "4"}}, {128, 12, 4, true}},  // CheckTuning refuses it
  };
  for (const auto& row : rows) {
    ASSERT_OK_AND_ASSIGN(const GdnTuning tuning, Parse(row.variables, compiled));
    EXPECT_EQ(tuning, row.expected);
  }
  EXPECT_STATUS(Parse({{"PRISTINE_GDN_CHUNK_H_BV", "all"}}, compiled), kInvalidArgument, "or not set (128)");
}

TEST(Tuning, RefusesWhatIsNoNumberAndNamesTheVariable) {
  for (const char* const text : {"", " 32", "32 ", "-1", "0", "+4", "3.5", "four", "0x20", "2147483648", "32,"}) {
    EXPECT_STATUS(Parse({{"PRISTINE_GDN_CHUNK_H_BV", text}}), kInvalidArgument,
                  absl::StrCat("PRISTINE_GDN_CHUNK_H_BV is \"", text,
                               "\"; must be a whole number of at least 1, or not set (32)"));
  }
  EXPECT_STATUS(Parse({{"PRISTINE_GDN_CHUNK_H_NUM_STAGES", "two"}}), kInvalidArgument,
                "PRISTINE_GDN_CHUNK_H_NUM_STAGES is \"two\"");
}

TEST(Tuning, IsReadOnce) {
  ASSERT_EQ(setenv("PRISTINE_GDN_CHUNK_H_NUM_WARPS", "8", 1), 0);
  ASSERT_OK_AND_ASSIGN(const GdnTuning tuning, GdnTuningFromEnvironment());
  ASSERT_EQ(setenv("PRISTINE_GDN_CHUNK_H_NUM_WARPS", "nonsense", 1), 0);
  EXPECT_EQ(tuning, (GdnTuning{32, 8, 2, true}));
  EXPECT_STATUS(GdnTuningFromEnvironment(), kInvalidArgument, "nonsense");
  ASSERT_EQ(unsetenv("PRISTINE_GDN_CHUNK_H_NUM_WARPS"), 0);
}

// notes of sglang PR #26206: 279 KB with 4 stages at K = V = 256, so that its default became 2.
TEST(Tuning, SharedMemoryOfTheUnfusedStateKernel) {
  const struct {
    int32_t k_dim, bv, stages;
    int64_t bytes;
  } rows[] = {{256, 32, 4, 278528}, {256, 32, 3, 208896}, {256, 32, 2, 139264}, {256, 64, 4, 294912},
              {256, 64, 3, 221184}, {256, 64, 2, 147456}, {128, 32, 2, 73728},  {128, 32, 3, 110592},
              {128, 32, 4, 147456}, {128, 64, 2, 81920},  {128, 64, 3, 122880}, {128, 64, 4, 163840}};
  for (const auto& row : rows) {
    EXPECT_EQ(UnfusedStateSharedBytes(row.k_dim, {row.bv, 4, row.stages}), row.bytes);
    EXPECT_EQ(row.bytes <= 232448, !(row.k_dim == 256 && row.stages == 4));
  }
}

TEST(Tuning, OfThePrefillAsCompiled) {
  const TunableKernel kernel = PrefillStateKernel();
  EXPECT_OK(CheckTuning({128, 16, 3}, kernel, 232448));
  EXPECT_OK(CheckTuning({64, 8, 3}, kernel, 232448));
  EXPECT_STATUS(CheckTuning({128, 16, 3}, kernel, 226895), kInvalidArgument,
                "gdn_prefill_states: BV 128, 16 warps, 3 stages needs 226896 bytes of shared memory per block, the "
                "device has 226895; no number of stages fits: set PRISTINE_GDN_CHUNK_H_BV lower");
  EXPECT_STATUS(CheckTuning({64, 8, 3}, kernel, 101376), kInvalidArgument, "needs 199728 bytes");
  EXPECT_STATUS(CheckTuning({}, kernel, 232448), kInvalidArgument,
                "BV 32, 4 warps, 2 stages (PRISTINE_GDN_CHUNK_H_*) is not compiled; there is BV 128, 16 warps, 3 "
                "stages (226896 bytes); BV 64, 8 warps, 3 stages (199728 bytes); the device has 232448 bytes of shared "
                "memory per block");
  EXPECT_STATUS(
      CheckTuning({128, 16, 4}, kernel, 232448), kInvalidArgument,
      "the device has 232448 bytes of shared memory per block; PRISTINE_GDN_CHUNK_H_NUM_STAGES may be at most "
      "3");
  // Run chooses by bucket where nothing is set: then all must fit if the first does.
  for (const GdnTuning& c : kernel.compiled) {
    EXPECT_LE(kernel.shared_bytes(c), kernel.shared_bytes(kernel.compiled.front()));
  }
}

const GdnTuning kCompiled[] = {{32, 4, 1}, {32, 4, 2}, {32, 4, 3}, {32, 4, 4}, {64, 4, 2}, {64, 4, 4}};
TunableKernel Kernel256() {
  return {"gdn_chunk_h", kCompiled, [](const GdnTuning& t) { return UnfusedStateSharedBytes(256, t); }};
}

TEST(Tuning, ErrorsSayNeedLimitAndTheMostStagesThatFit) {
  const TunableKernel kernel = Kernel256();
  EXPECT_OK(CheckTuning({32, 4, 2}, kernel, 232448));
  EXPECT_OK(CheckTuning({32, 4, 4}, kernel, 278528));
  EXPECT_STATUS(CheckTuning({32, 4, 4}, kernel, 232448), kInvalidArgument,
                "gdn_chunk_h: BV 32, 4 warps, 4 stages needs 278528 bytes of shared memory per block, the device has "
                "232448; PRISTINE_GDN_CHUNK_H_NUM_STAGES may be at most 3");
  EXPECT_STATUS(CheckTuning({64, 4, 4}, kernel, 232448), kInvalidArgument, "may be at most 2");  // 3 is not compiled
  EXPECT_STATUS(CheckTuning({64, 4, 2}, kernel, 101376), kInvalidArgument,
                "no number of stages fits: set PRISTINE_GDN_CHUNK_H_BV lower");
  EXPECT_STATUS(CheckTuning({48, 4, 2}, kernel, 232448), kInvalidArgument,
                "BV 48, 4 warps, 2 stages (PRISTINE_GDN_CHUNK_H_*) is not compiled; there is BV 32, 4 warps, 1 "
                "stages (69632 bytes); BV 32, 4 warps, 2 stages (139264 bytes)");
}

TEST(Tuning, FallsBackWhereAskedToWarnsOnceAndCounts) {
  const TunableKernel kernel = Kernel256();
  TuningPolicy strict(TuningPolicy::OnBadTuning::kError);
  EXPECT_STATUS(strict.Choose({32, 4, 4}, kernel, 232448), kInvalidArgument, "may be at most 3");
  EXPECT_EQ(strict.fallbacks(), 0);

  std::vector<std::string> warnings;
  TuningPolicy lenient(TuningPolicy::OnBadTuning::kFallBack,
                       [&](const std::string& text) { warnings.push_back(text); });
  ASSERT_OK_AND_ASSIGN(const GdnTuning good, lenient.Choose({32, 4, 3, true}, kernel, 232448));
  EXPECT_EQ(good, (GdnTuning{32, 4, 3, true}));
  EXPECT_EQ(lenient.fallbacks(), 0);
  ASSERT_OK_AND_ASSIGN(const GdnTuning fewer, lenient.Choose({32, 4, 4, true}, kernel, 232448));
  EXPECT_EQ(fewer, (GdnTuning{32, 4, 3, true}));
  ASSERT_OK_AND_ASSIGN(const GdnTuning other, lenient.Choose({48, 4, 2}, kernel, 232448));
  EXPECT_EQ(other, (GdnTuning{32, 4, 1}));
  EXPECT_EQ(lenient.fallbacks(), 2);
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_NE(warnings[0].find("needs 278528 bytes"), std::string::npos);
  EXPECT_NE(warnings[0].find("falling back to BV 32, 4 warps, 3 stages"), std::string::npos);
  EXPECT_STATUS(lenient.Choose({32, 4, 2}, kernel, 1000), kInvalidArgument, "the device has 1000");
  EXPECT_EQ(lenient.fallbacks(), 2);
}

}  // namespace
}  // namespace pristine::testing
