// The conformance kit on a wrapper that is not ours: one GoogleTest case per backend.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "examples/06_conformance_kit/foreign_wrapper.h"
#include "pristine/conformance/attention_conformance.h"

namespace pristine::examples {
namespace {

void ExpectConforms(Device& device) {
  // What the foreign attention claims: block tables of 16 tokens, no log-sum-exp, and that it appends by itself.
  const conformance::AttentionShape shape = {.q_heads = 8,
                                             .kv_heads = 2,
                                             .head_dim = 32,
                                             .page_size = 16,
                                             .max_length = 70,
                                             .buckets = {1, 2, 4, 7},
                                             .lse = conformance::AttentionShape::Lse::kNone,
                                             .appends = true};
  const auto stream = device.CreateStream();
  ASSERT_TRUE(stream.ok()) << stream.status();
  const auto wrapper = ForeignWrapper::Create(device, shape);
  ASSERT_TRUE(wrapper.ok()) << wrapper.status();
  EXPECT_TRUE(Conforms(**stream, **wrapper, shape));
}

TEST(ForeignAttention, ConformsOnHost) {
  // Deferred: nothing runs before something waits for it, so that code which forgets to wait is found.
  const auto device = CreateHostDevice({.run = HostOptions::Run::kDeferred});
  ASSERT_TRUE(device.ok()) << device.status();
  ExpectConforms(**device);
}

#ifdef PRISTINE_HAS_CUDA
TEST(ForeignAttention, ConformsOnCuda) {
  const auto device = CreateCudaDevice();
  const char* const required = std::getenv("PRISTINE_REQUIRE_GPU");
  if (absl::IsUnavailable(device.status()) && (required == nullptr || std::string(required) != "1")) {
    GTEST_SKIP() << device.status();
  }
  ASSERT_TRUE(device.ok()) << device.status();
  ExpectConforms(**device);
}
#endif

}  // namespace
}  // namespace pristine::examples
