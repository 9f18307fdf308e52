// Kernels of a layer begin before the one ahead of them has ended. Each waits for it: for what it writes late, and with
// what it would overwrite while that one still reads.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pristine/attention/gdn/causal_conv1d.h"
#include "pristine/attention/gdn/qkv_split.h"
#include "pristine/attention/gdn/recurrent.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/support/backends.h"
#include "tests/support/early_op.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using namespace attention::gdn;  // NOLINT(build/namespaces): the suite is about that namespace

constexpr int32_t kQkHeads = 1, kVHeads = 2, kQkDim = 128, kVDim = 256, kDim = 2 * kQkDim + kVDim;
constexpr int32_t kSlots = 4;

template <class BackendT>
class EarlyGdnOpsTest : public DeviceTest<BackendT> {
 protected:
  void SetUp() override {
    DeviceTest<BackendT>::SetUp();
    if (this->IsSkipped() || this->HasFatalFailure()) return;
    ASSERT_OK_AND_ASSIGN(rig_, EarlyOpRig::Create(*this->stream_, 4 << 20));
  }
  void TearDown() override {
    rig_.reset();
    DeviceTest<BackendT>::TearDown();
  }

  // Different numbers late and early.
  DeviceSpan<std::byte> Numbers(DType dtype, int64_t count, double low = -1, double high = 1) {
    const auto size = static_cast<size_t>(count);
    const Bytes late = Encode(dtype, Uniform(random_, size, low, high));
    return rig_->Put(late, Encode(dtype, Uniform(random_, size, low, high)));
  }
  DeviceSpan<float> Floats(int64_t count) {
    const DeviceSpan<std::byte> bytes = Numbers(DType::kFloat32, count);
    return {reinterpret_cast<float*>(bytes.address()), bytes.size() / sizeof(float)};
  }
  GateInputs Gates(DType dtype, int64_t tokens) {
    return {
        dtype,           kVHeads,        {Numbers(dtype, tokens * kVHeads), 0}, {Numbers(dtype, tokens * kVHeads), 0},
        Floats(kVHeads), Floats(kVHeads)};
  }
  static DeviceSpan<const std::byte> From(DeviceSpan<const std::byte> bytes, size_t skip) {
    return bytes.Sub(skip, bytes.size() - skip);
  }
  DeviceSpan<std::byte> Output(DType dtype, int64_t count) {
    return rig_->template Output<std::byte>(static_cast<size_t>(count) * attention::SizeOf(dtype));
  }
  // Slots of three requests, one of them padded: others early, or none.
  DeviceSpan<const int32_t> Slots(bool early_padding) {
    return rig_->template Put<int32_t>(
        {3, -1, 1}, early_padding ? std::vector<int32_t>{-1, -1, -1} : std::vector<int32_t>{1, 2, 3});
  }
  // The other way round: what comes early finds slots, what waits has nothing to do but zeros.
  DeviceSpan<const int32_t> NoSlots() { return rig_->template Put<int32_t>({-1, -1, -1}, {1, 2, 3}); }

  std::unique_ptr<EarlyOpRig> rig_;
  std::mt19937_64 random_{7};
};
TYPED_TEST_SUITE(EarlyGdnOpsTest, AllBackends, BackendNames);

TYPED_TEST(EarlyGdnOpsTest, DecodeVerifyAndCommitWaitForTheKernelAhead) {
  constexpr int32_t kRows = 3;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const DType state : {DType::kFloat32, DType::kBFloat16}) {
      for (const int32_t tokens : {1, 3}) {
        for (const int64_t stride : {kDim, kDim + 1}) {  // vectors, and not
          for (const int slots : {0, 1, 2}) {
            this->rig_->Clear();
            const int64_t all = int64_t{kRows} * tokens;
            const size_t element = attention::SizeOf(dtype);
            const DeviceSpan<const std::byte> mixed = this->Numbers(dtype, all * stride);
            const RecurrentInputs inputs = {.qk_heads = kQkHeads,
                                            .q = {mixed, stride},
                                            .k = {this->From(mixed, kQkDim * element), stride},
                                            .v = {this->From(mixed, 2 * kQkDim * element), stride},
                                            .gates = this->Gates(dtype, all),
                                            .cache_indices = slots == 2 ? this->NoSlots() : this->Slots(slots == 1)};
            const StateView states = {.dtype = state,
                                      .v_heads = kVHeads,
                                      .slots = kSlots,
                                      .slot_stride = kVHeads * kStateElements,
                                      .states = this->Numbers(state, kSlots * kVHeads * kStateElements, -0.3, 0.3)};
            const DeviceSpan<std::byte> out = this->Output(dtype, all * kVDim);
            const DeviceSpan<const int32_t> accepted = this->rig_->template Put<int32_t>({2, 0, 1}, {0, 3, 0});
            SCOPED_TRACE(absl::StrCat(ToString(dtype), ", state ", ToString(state), ", ", tokens, " tokens, stride ",
                                      stride, ", slots ", slots));
            if (tokens == 1) {
              const auto decode = [&](Stream& stream) { return Decode(stream, kRows, inputs, states, out); };
              EXPECT_EQ(this->rig_->Check(decode), "");
              continue;
            }
            const auto verify = [&](Stream& stream) { return Verify(stream, kRows, tokens, inputs, states, out); };
            EXPECT_EQ(this->rig_->Check(verify), "");
            if (slots == 2) continue;  // a commit of padding writes nothing
            const auto commit = [&](Stream& stream) { return Commit(stream, kRows, tokens, inputs, states, accepted); };
            EXPECT_EQ(this->rig_->Check(commit), "");
          }
        }
      }
    }
  }
}

TYPED_TEST(EarlyGdnOpsTest, QkvSplitWaitsForTheKernelAhead) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int32_t tokens : {40, 37}) {  // of a transposed input, every channel aligned, and few
      for (const bool transposed : {false, true}) {
        for (const int32_t stride_d : {1, 2}) {
          if (transposed && stride_d != 1) continue;
          for (const bool fused : {false, true}) {
            this->rig_->Clear();
            const DeviceSpan<const std::byte> mixed = this->Numbers(dtype, int64_t{tokens} * kDim * stride_d);
            QkvSplitTensors tensors = {.dtype = dtype, .q_dim = kQkDim, .k_dim = kQkDim, .v_dim = kVDim};
            tensors.mixed = mixed;
            tensors.stride_t = transposed ? 1 : int64_t{kDim} * stride_d;
            tensors.stride_d = transposed ? tokens : stride_d;
            tensors.q = this->Output(dtype, int64_t{tokens} * kQkDim);
            tensors.k = this->Output(dtype, int64_t{tokens} * kQkDim);
            tensors.v = this->Output(dtype, int64_t{tokens} * kVDim);
            if (fused) {
              tensors.norm_head_dim = 128;
              tensors.gates = this->Gates(dtype, tokens);
              tensors.g = this->rig_->template Output<float>(static_cast<size_t>(tokens) * kVHeads);
              tensors.beta = this->rig_->template Output<float>(static_cast<size_t>(tokens) * kVHeads);
            }
            const auto split = [&](Stream& stream) { return QkvSplit(stream, tokens, tensors); };
            EXPECT_EQ(this->rig_->Check(split), "")
                << ToString(dtype) << ", " << tokens << " tokens, " << tensors.stride_t << " and " << tensors.stride_d
                << " apart" << (fused ? ", fused" : "");
          }
        }
      }
    }
  }
}

TYPED_TEST(EarlyGdnOpsTest, ConvolutionsWaitForTheKernelAhead) {
  constexpr int32_t kRows = 3, kTokens = 41, kChain = 2;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int64_t stride : {kDim, kDim + 1}) {  // vectors, and not
      for (const int slots : {0, 1, 2}) {
        for (const bool fused : {false, true}) {
          this->rig_->Clear();
          const ConvInputs inputs = {.x = {this->Numbers(dtype, kTokens * stride), stride},
                                     .weight = this->Numbers(dtype, kDim * kConvWidth),
                                     .bias = this->Numbers(dtype, kDim),
                                     .cache_indices = slots == 2 ? this->NoSlots() : this->Slots(slots == 1)};
          const ConvStateView states = {.dtype = dtype,
                                        .dim = kDim,
                                        .slots = kSlots,
                                        .slot_stride = kDim * kConvHistory,
                                        .states = this->Numbers(dtype, kSlots * kDim * kConvHistory)};
          // Early, requests without tokens.
          const ConvSequences sequences = {
              .requests = kRows, .cu_seqlens = this->rig_->template Put<int32_t>({0, 20, 22, 39}, {0, 0, 0, 0})};
          ConvOutputs outputs;
          if (fused) {
            outputs.q_dim = outputs.k_dim = kQkDim;
            outputs.v_dim = kVDim;
            outputs.q = this->Output(dtype, kTokens * kQkDim);
            outputs.k = this->Output(dtype, kTokens * kQkDim);
            outputs.v = this->Output(dtype, kTokens * kVDim);
            outputs.norm_head_dim = 128;
            outputs.gates = this->Gates(dtype, kTokens);
            outputs.g = this->rig_->template Output<float>(kTokens * kVHeads);
            outputs.beta = this->rig_->template Output<float>(kTokens * kVHeads);
          } else {
            outputs.out = this->Output(dtype, kTokens * kDim);
          }
          const DeviceSpan<const int32_t> accepted = this->rig_->template Put<int32_t>({2, 0, 1}, {0, 2, 0});
          SCOPED_TRACE(absl::StrCat(ToString(dtype), ", stride ", stride, ", slots ", slots, fused ? ", fused" : ""));
          const auto prompts = [&](Stream& stream) {
            return CausalConv1d(stream, kTokens, sequences, inputs, states, outputs);
          };
          EXPECT_EQ(this->rig_->Check(prompts), "");
          const auto update = [&](Stream& stream) {
            return CausalConv1dUpdate(stream, kRows, inputs, states, outputs);
          };
          EXPECT_EQ(this->rig_->Check(update), "");
          const auto verify = [&](Stream& stream) {
            return CausalConv1dVerify(stream, kRows, kChain, inputs, states, outputs);
          };
          EXPECT_EQ(this->rig_->Check(verify), "");
          if (slots == 2) continue;  // a commit of padding writes nothing
          const auto commit = [&](Stream& stream) {
            return CausalConv1dCommit(stream, kRows, kChain, inputs, states, accepted);
          };
          EXPECT_EQ(this->rig_->Check(commit), "");
        }
      }
    }
  }
}

}  // namespace
}  // namespace pristine::testing
