#include "pristine/attention/forward_mode.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "attention/prefill_variants.h"
#include "attention/variants.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DeviceCaps;
using attention::DType;
using attention::ForwardMode;
using attention::KernelFamily;
using attention::Route;
using attention::RouteConfig;

constexpr ForwardMode kModes[] = {ForwardMode::kDecode, ForwardMode::kExtend,       ForwardMode::kMixed,
                                  ForwardMode::kIdle,   ForwardMode::kTargetVerify, ForwardMode::kDraftExtend};

constexpr DeviceCaps kH200 = {.backend = Backend::kCuda,
                              .sm_major = 9,
                              .sm_minor = 0,
                              .multiprocessors = 132,
                              .cuda_runtime_version = 13000,
                              .cuda_driver_version = 13000,
                              .shared_bytes_per_block = 232448};
constexpr DeviceCaps kSm86 = {.backend = Backend::kCuda,
                              .sm_major = 8,
                              .sm_minor = 6,
                              .multiprocessors = 84,
                              .cuda_runtime_version = 13000,
                              .cuda_driver_version = 13000,
                              .shared_bytes_per_block = 101376};
constexpr DeviceCaps kHost = {};

RouteConfig Llama(int32_t q_len, bool decode_draft_extend = false) {
  return {.q_heads = 32,
          .kv_heads = 8,
          .head_dim = 128,
          .page_size = 16,
          .q_len = q_len,
          .decode_draft_extend = decode_draft_extend};
}

void ExpectRefused(const absl::StatusOr<KernelFamily>& route, absl::StatusCode code,
                   const std::vector<std::string>& parts) {
  ASSERT_FALSE(route.ok()) << ToString(*route);
  EXPECT_EQ(route.status().code(), code) << route.status();
  for (const std::string& part : parts) {
    EXPECT_NE(std::string(route.status().message()).find(part), std::string::npos) << route.status() << "\n" << part;
  }
}

// Every mode with every kind of q_len, as the header's table has it.
TEST(Route, FollowsTheTable) {
  for (const DeviceCaps& caps : {kH200, kHost}) {
    for (const bool option : {false, true}) {
      for (int32_t q_len = 0; q_len <= 40; ++q_len) {
        for (const ForwardMode mode : kModes) {
          SCOPED_TRACE(::testing::Message() << ToString(mode) << " q_len " << q_len << " option " << option);
          const absl::StatusOr<KernelFamily> route = Route(mode, caps, Llama(q_len, option));
          const bool short_q = q_len >= 1 && q_len <= attention::kMaxDecodeQLen;
          std::optional<KernelFamily> expected;
          switch (mode) {
            case ForwardMode::kIdle:
              expected = KernelFamily::kNone;
              break;
            case ForwardMode::kDecode:
              if (q_len == 1) expected = KernelFamily::kDecode;
              break;
            case ForwardMode::kTargetVerify:
              if (q_len >= 2 && short_q) expected = KernelFamily::kDecode;
              break;
            case ForwardMode::kExtend:
            case ForwardMode::kMixed:
              expected = KernelFamily::kContext;
              break;
            case ForwardMode::kDraftExtend:
              if (!option) expected = KernelFamily::kContext;
              if (option && short_q) expected = KernelFamily::kDecode;
              break;
          }
          if (expected.has_value()) {
            ASSERT_TRUE(route.ok()) << route.status();
            EXPECT_EQ(*route, *expected);
          } else {
            EXPECT_EQ(route.status().code(), absl::StatusCode::kInvalidArgument);
          }
        }
      }
    }
  }
}

TEST(Route, ARaggedDraftExtendIsRefusedTheDecodeKernelsWithTheReasonAndWhatToDo) {
  ExpectRefused(Route(ForwardMode::kDraftExtend, kH200, Llama(0, true)), absl::StatusCode::kInvalidArgument,
                {"route of draft_extend: q_len is 0 (requests differ)", "as many for every request", "sglang PR #24856",
                 "instead: decode_draft_extend off"});
}

TEST(Route, TheOptionIsOffByDefaultAndChangesNoOtherMode) {
  EXPECT_FALSE(RouteConfig().decode_draft_extend);
  for (const ForwardMode mode : kModes) {
    if (mode == ForwardMode::kDraftExtend) continue;
    const int32_t q_len = mode == ForwardMode::kTargetVerify ? 4 : 1;
    EXPECT_EQ(*Route(mode, kH200, Llama(q_len, true)), *Route(mode, kH200, Llama(q_len, false))) << ToString(mode);
  }
}

TEST(Route, AQLenThatAModeDoesNotHaveNamesThoseThatDo) {
  ExpectRefused(Route(ForwardMode::kDecode, kH200, Llama(4)), absl::StatusCode::kInvalidArgument,
                {"route of decode: q_len is 4, must be 1", "target_verify, extend or draft_extend"});
  ExpectRefused(Route(ForwardMode::kTargetVerify, kH200, Llama(17)), absl::StatusCode::kInvalidArgument,
                {"q_len is 17, must be 2 to 16", "any other number is extend"});
  ExpectRefused(Route(ForwardMode::kTargetVerify, kH200, Llama(0)), absl::StatusCode::kInvalidArgument,
                {"q_len is 0 (requests differ)", "the same for every request"});
  ExpectRefused(Route(ForwardMode::kExtend, kH200, Llama(-1)), absl::StatusCode::kInvalidArgument,
                {"route of extend: q_len is -1, must be at least 0"});
}

TEST(Route, AnIdleStepIsNeverRefused) {
  const DeviceCaps old = {.backend = Backend::kCuda, .sm_major = 3, .cuda_runtime_version = 13000};
  EXPECT_EQ(*Route(ForwardMode::kIdle, old, {}), KernelFamily::kNone);
  EXPECT_EQ(*Route(ForwardMode::kIdle, kHost, {.q_len = -5}), KernelFamily::kNone);
}

TEST(Route, DevicesThatCannotRunItAreRefusedWithWhatCould) {
  DeviceCaps caps = kH200;
  caps.sm_major = 7;
  caps.sm_minor = 5;
  ExpectRefused(Route(ForwardMode::kDecode, caps, Llama(1)), absl::StatusCode::kUnimplemented,
                {"route of decode: the device is compute capability 7.5", "needs compute capability 8.0 or later",
                 "the Host backend"});
  caps = kH200;
  caps.cuda_driver_version = 12080;
  ExpectRefused(Route(ForwardMode::kExtend, caps, Llama(0)), absl::StatusCode::kUnimplemented,
                {"(driver 12.8)", "needs a driver for CUDA 13.0", "a build with CUDA 12"});
  caps = kH200;
  caps.sm_major = 10;
  caps.cuda_runtime_version = 12060;
  ExpectRefused(Route(ForwardMode::kTargetVerify, caps, Llama(4)), absl::StatusCode::kUnimplemented,
                {"compute capability 10.0", "needs a build with CUDA 12.8 or later"});
  // Newer ones of what is refused run: within a major version drivers and runtimes mix.
  caps.cuda_runtime_version = 12080;
  caps.cuda_driver_version = 12060;
  EXPECT_TRUE(Route(ForwardMode::kTargetVerify, caps, Llama(4)).ok());
}

TEST(Route, ShapesWithoutAKernelAreRefusedWithThoseThatHaveOne) {
  for (const DeviceCaps& caps : {kH200, kHost}) {
    RouteConfig config = Llama(1);
    config.head_dim = 96;
    ExpectRefused(Route(ForwardMode::kDecode, caps, config), absl::StatusCode::kUnimplemented,
                  {"no decode kernel for bfloat16 over a KV cache in bfloat16 with head_dim 96",
                   "bfloat16 with head_dim 128", "instead: heads padded with zeros"});
    EXPECT_EQ(Route(ForwardMode::kExtend, caps, config).status().code(), absl::StatusCode::kUnimplemented);
    config = Llama(1);
    config.dtype = config.kv_dtype = DType::kFloat8E4M3;
    ExpectRefused(Route(ForwardMode::kDecode, caps, config), absl::StatusCode::kUnimplemented,
                  {"no decode kernel for float8_e4m3", "instead: queries in 16 bits"});
    config = Llama(0);
    config.kv_dtype = DType::kFloat16;
    ExpectRefused(
        Route(ForwardMode::kDraftExtend, caps, config), absl::StatusCode::kUnimplemented,
        {"no context kernel for bfloat16 over a KV cache in float16", "instead: a KV cache in the dtype of q"});
    config = Llama(1);
    config.q_heads = 33 * 8;
    ExpectRefused(Route(ForwardMode::kDecode, caps, config), absl::StatusCode::kUnimplemented,
                  {"33 query heads per KV head", "at most 32"});
    config = Llama(1);
    config.page_size = 0;
    ExpectRefused(Route(ForwardMode::kDecode, caps, config), absl::StatusCode::kInvalidArgument,
                  {"page_size is 0, must be at least 1"});
    config = Llama(1);
    config.kv_heads = 5;
    ExpectRefused(Route(ForwardMode::kDecode, caps, config), absl::StatusCode::kInvalidArgument,
                  {"q_heads is 32, must be a multiple of kv_heads 5"});
  }
}

// Every compiled variant is routed to, and nothing else is.
TEST(Route, TakesWhatThereAreKernelsFor) {
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3};
  int64_t decode = 0, context = 0;
  for (const DType dtype : kDTypes) {
    for (const DType kv_dtype : kDTypes) {
      for (const int32_t head_dim : {32, 64, 80, 96, 128, 192, 256, 512}) {
        RouteConfig config = Llama(1);
        config.dtype = dtype;
        config.kv_dtype = kv_dtype;
        config.head_dim = head_dim;
        decode += Route(ForwardMode::kDecode, kH200, config).ok();
        context += Route(ForwardMode::kExtend, kH200, config).ok();
      }
    }
  }
  EXPECT_EQ(decode, std::ssize(attention::DecodeVariants()));
  // Some shapes have a second kernel, for one architecture alone.
  const absl::Span<const attention::PrefillVariant> variants = attention::PrefillVariants();
  EXPECT_EQ(context, std::count_if(variants.begin(), variants.end(),
                                   [](const attention::PrefillVariant& v) { return v.only_capability == 0; }));
}

// Every variant on a device whose blocks have the shared memory that it takes, and on one where not all have it.
TEST(Route, VariantsThatTakeMoreSharedMemoryThanThereIsAreRefused) {
  const auto shape = [](const auto& variant) {
    RouteConfig config = Llama(1);
    config.dtype = variant.dtype;
    config.kv_dtype = variant.kv_dtype;
    config.head_dim = variant.head_dim;
    return config;
  };
  for (const attention::DecodeVariant& variant : attention::DecodeVariants()) {
    SCOPED_TRACE(variant.decode.name);
    EXPECT_EQ(*Route(ForwardMode::kDecode, kH200, shape(variant)), KernelFamily::kDecode);
    const absl::StatusOr<KernelFamily> route = Route(ForwardMode::kDecode, kSm86, shape(variant));
    if (variant.dtype == DType::kFloat32) {
      EXPECT_OK(route);
      continue;
    }
    ExpectRefused(
        route, absl::StatusCode::kUnimplemented,
        {"a block of compute capability 8.6", "has 101376 bytes of shared memory",
         std::string(variant.head_dim <= 128 ? "needs 163840 for " : "needs 232448 for ") + variant.decode.name,
         "instead: the context kernels"});
  }
  DeviceCaps less = kSm86;
  less.shared_bytes_per_block = 48 * 1024;
  for (const attention::PrefillVariant& variant : attention::PrefillVariants()) {
    SCOPED_TRACE(variant.kernel.name);
    EXPECT_EQ(*Route(ForwardMode::kExtend, kH200, shape(variant)), KernelFamily::kContext);
    EXPECT_EQ(*Route(ForwardMode::kExtend, kSm86, shape(variant)), KernelFamily::kContext);
    EXPECT_EQ(Route(ForwardMode::kExtend, less, shape(variant)).ok(), variant.dtype == DType::kFloat32);
  }
}

TEST(Route, NamesOfModesAndFamilies) {
  EXPECT_STREQ(ToString(ForwardMode::kMixed), "mixed");
  EXPECT_STREQ(ToString(ForwardMode::kTargetVerify), "target_verify");
  EXPECT_STREQ(ToString(KernelFamily::kNone), "none");
  EXPECT_STREQ(ToString(KernelFamily::kContext), "context");
}

}  // namespace
}  // namespace pristine::testing
