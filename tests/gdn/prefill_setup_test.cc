// The prefill at Create and at the door: its workspace, its tuning, what it refuses, and lengths that nobody should
// send.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/gdn/kernels/prefill.h"
#include "pristine/attention/gdn/prefill.h"
#include "tests/gdn/prefill_rig.h"

namespace pristine::testing {
namespace {

TYPED_TEST_SUITE(PrefillTest, AllBackends, BackendNames);

// The state is kept in float32 registers and stored once: no workspace grows with the states, none is in their place.
TYPED_TEST(PrefillTest, AllocatesAtCreateAloneAndNoState) {
  const PrefillConfig config = {.largest = {4, 512}, .qk_heads = 2, .v_heads = 4};
  const int64_t chunks = ChunkBound(4, 512);
  EXPECT_EQ(chunks, 4 + 508 / 64);
  EXPECT_EQ(PrefillWorkspaceBytes(config), chunks * 4 * (3 * 64 * 64 * 2 + 2 * 64 * 4));
  const LiveObjects before = this->device_->live();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Prefill> prefill, Prefill::Create(*this->device_, config));
  EXPECT_EQ(this->device_->live().bytes - before.bytes,
            TestFixture::kCuda ? static_cast<size_t>(PrefillWorkspaceBytes(config)) : size_t{0});
}

TYPED_TEST(PrefillTest, TakesItsTuningFromTheEnvironmentAtCreate) {
  const Batch batch = {.lengths = {40, 30}, .initial = {1, 2}, .final = {1, 2}};
  const Shape shape = {1, 2, {2, 70}};
  for (const char* const bv : {"64", "128"}) {
    {
      const ScopedVariable variable("PRISTINE_GDN_CHUNK_H_BV", bv);
      ASSERT_NO_FATAL_FAILURE(this->Make(shape, 2, 13));
    }
    const ScopedVariable later("PRISTINE_GDN_CHUNK_H_BV", "nonsense");
    ASSERT_NE(this->prefill_->tuning(), nullptr);
    EXPECT_EQ(absl::StrCat(this->prefill_->tuning()->bv), bv);
    ASSERT_NO_FATAL_FAILURE(this->Upload(batch));
    ASSERT_OK(this->Run(*this->stream_));
    ASSERT_NO_FATAL_FAILURE(this->ExpectRight());
    EXPECT_STATUS(Prefill::Create(*this->device_, this->prefill_->config()), kInvalidArgument,
                  "PRISTINE_GDN_CHUNK_H_BV is \"nonsense\"");
  }
  ASSERT_NO_FATAL_FAILURE(this->Make(shape, 2, 13));
  EXPECT_EQ(this->prefill_->tuning(), nullptr);
}

TYPED_TEST(PrefillTest, RefusesATuningThatIsNotCompiledOrFallsBack) {
  const PrefillConfig config = {.largest = {1, 64}, .qk_heads = 1, .v_heads = 1};
  const ScopedVariable variable("PRISTINE_GDN_CHUNK_H_NUM_STAGES", "4");
  const size_t allocations = this->device_->total_allocations();
  EXPECT_STATUS(Prefill::Create(*this->device_, config), kInvalidArgument,
                "gdn_prefill_states: BV 128, 16 warps, 4 stages (PRISTINE_GDN_CHUNK_H_*) is not compiled");
  EXPECT_EQ(this->device_->total_allocations(), allocations);
  std::vector<std::string> warnings;
  TuningPolicy policy(TuningPolicy::OnBadTuning::kFallBack, [&](const std::string& text) { warnings.push_back(text); });
  for (int i = 1; i <= 2; ++i) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Prefill> prefill, Prefill::Create(*this->device_, config, &policy));
    ASSERT_NE(prefill->tuning(), nullptr);
    EXPECT_EQ(*prefill->tuning(), (GdnTuning{128, 16, 3, true}));
    EXPECT_EQ(policy.fallbacks(), i);
  }
  EXPECT_EQ(warnings.size(), 1u);
}

TYPED_TEST(PrefillTest, RefusesWhatDoesNotFit) {
  Device& device = *this->device_;
  const auto create = [&](const PrefillConfig& config) { return Prefill::Create(device, config).status(); };
  EXPECT_STATUS(create({.largest = {0, 64}, .qk_heads = 1, .v_heads = 1}), kInvalidArgument, "0 requests, 64 tokens");
  EXPECT_STATUS(create({.largest = {1, 0}, .qk_heads = 1, .v_heads = 1}), kInvalidArgument, "1 requests, 0 tokens");
  EXPECT_STATUS(create({.largest = {1, 64}, .qk_heads = 3, .v_heads = 4}), kInvalidArgument,
                "qk_heads is 3 and v_heads 4");
  EXPECT_STATUS(create({.largest = {1, 64}, .qk_heads = 1, .v_heads = 1, .scale = NAN}), kInvalidArgument,
                "scale is nan");

  ASSERT_NO_FATAL_FAILURE(this->Make({1, 2, {2, 10}}, 2, 11));
  ASSERT_NO_FATAL_FAILURE(this->Upload({.lengths = {4, 6}, .initial = {1, 2}, .final = {1, 2}}));
  const PrefillTensors good = this->Tensors();
  const StateView pool = this->pool_->view();
  const auto run = [&](const Extent& bucket, const PrefillTensors& tensors, const StateView& states) {
    return this->prefill_->Run(*this->stream_, bucket, tensors, states);
  };
  EXPECT_STATUS(run({3, 10}, good, pool), kInvalidArgument,
                "{3 requests, 10 tokens}; counts must be at least 1 and fit");
  EXPECT_STATUS(run({2, 0}, good, pool), kInvalidArgument, "{2 requests, 0 tokens}");
  PrefillTensors bad = good;
  bad.q.stride = 127;
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "q has a row stride of 127");
  bad = good;
  bad.k.stride = 129;
  EXPECT_STATUS(run({2, 9}, bad, pool), kInvalidArgument, "k and its stride of 129 elements must be aligned");
  bad = good;
  bad.v.data = bad.v.data.Sub(0, 5118);
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "v has 2559 elements, needs 2560");
  bad = good;
  bad.g = bad.g.Sub(0, 19);
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "g has 19 elements, needs 20");
  bad = good;
  bad.beta = {};
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "beta has 0 elements, needs 20");
  bad = good;
  bad.cu_seqlens = bad.cu_seqlens.Sub(0, 2);
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "cu_seqlens has 2 elements, needs 3");
  bad = good;
  bad.initial_slots = {};
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "initial_slots has 0 elements, needs 2");
  bad = good;
  bad.final_slots = bad.final_slots.Sub(0, 1);
  EXPECT_STATUS(run({2, 10}, bad, pool), kInvalidArgument, "final_slots has 1 elements, needs 2");
  bad = good;
  bad.out = bad.out.Sub(2, bad.out.size() - 2);
  EXPECT_STATUS(run({2, 9}, bad, pool), kInvalidArgument, "out must be aligned to 16 bytes");
  StateView other = pool;
  other.v_heads = 1;
  EXPECT_STATUS(run({2, 10}, good, other), kInvalidArgument, "slots of 1 heads");
  other = pool;
  other.dtype = DType::kFloat16;
  EXPECT_STATUS(run({2, 10}, good, other), kUnimplemented, "states is float16");
  ASSERT_NO_FATAL_FAILURE(ForBadSlots(pool, [&](const StateView& view) {
    EXPECT_STATUS(run({2, 10}, good, view), kInvalidArgument, "states");
  }));
  other = pool;
  other.states = other.states.Sub(0, other.states.size() - 4);
  EXPECT_STATUS(run({2, 10}, good, other), kInvalidArgument, "states has");
  ASSERT_OK(run({2, 10}, good, pool));
  ASSERT_NO_FATAL_FAILURE(this->ExpectRight());
}

// cu_seqlens that no engine should send: nothing outside the tensors is touched, and the run ends.
TYPED_TEST(PrefillTest, HostileLengthsStayInsideTheTensors) {
  for (const char* const bv : TestFixture::kWays) {
    const ScopedVariable way("PRISTINE_GDN_CHUNK_H_BV", bv);
    SCOPED_TRACE(absl::StrCat("BV ", bv));
    ASSERT_NO_FATAL_FAILURE(this->Make({1, 1, {3, 70}}, 3, 12));
    const Batch batch = {.lengths = {30, 30, 10}, .initial = {1, 2, 3}, .final = {1, 2, 3}};
    constexpr int32_t kMin = std::numeric_limits<int32_t>::min(), kMax = std::numeric_limits<int32_t>::max();
    for (const std::vector<int32_t>& cu : {std::vector<int32_t>{0, kMax, kMax, kMax},
                                           {kMin, kMin, 5, 70},
                                           {50, 20, 60, 10},
                                           {70, 0, 70, 0},
                                           {0, 71, 3, kMin}}) {
      ASSERT_NO_FATAL_FAILURE(this->Upload(batch));
      ASSERT_OK(Put(*this->stream_, this->cu_seqlens_, cu));
      ASSERT_OK(this->Run(*this->stream_));
      ASSERT_OK(this->stream_->Synchronize());
      ASSERT_OK_AND_ASSIGN(const Bytes after, ReadBytes(*this->stream_, this->pool_->view().states));
      EXPECT_TRUE(std::equal(after.begin(), after.begin() + kStateElements * 4, this->state_bytes_.begin()));  // slot 0
    }
    ASSERT_NO_FATAL_FAILURE(this->Upload(batch));
    ASSERT_OK(this->Run(*this->stream_));
    ASSERT_NO_FATAL_FAILURE(this->ExpectRight());
  }
}

}  // namespace
}  // namespace pristine::testing
