// Slots and rows that lie where offsets of 32 bits do not reach: the results are those of slots and rows next to each
// other, bit for bit. (sglang's recurrent kernel multiplied slot and size in 32 bits: wrong from slot 4096 on with 32
// value heads.)
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "pristine/attention/gdn/causal_conv1d.h"
#include "pristine/attention/gdn/gates.h"
#include "pristine/attention/gdn/prefill.h"
#include "pristine/attention/gdn/qkv_split.h"
#include "pristine/attention/gdn/recurrent.h"
#include "pristine/attention/gdn/state_access.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"
#include "tests/support/vast_memory.h"

namespace pristine::testing {
namespace {

using namespace attention::gdn;  // NOLINT(build/namespaces): the suite is about that namespace
using attention::SizeOf;

constexpr int32_t kQkHeads = 1, kVHeads = 2, kQkDim = 128, kVDim = 256, kDim = 2 * kQkDim + kVDim;
constexpr int32_t kSlots = 4, kRows = 3, kTokens = 2;  // tokens of each row
constexpr int64_t kMostStride = int64_t{1} << 31;      // of all that the ops take

template <class BackendT>
class GdnOffsetsTest : public DeviceTest<BackendT> {
 protected:
  void TearDown() override {
    if (this->stream_ != nullptr) this->stream_->Synchronize().IgnoreError();
    memory_.clear();
    vast_.Clear();
    DeviceTest<BackendT>::TearDown();
  }
  DeviceSpan<std::byte> Put(const Bytes& bytes) {
    absl::StatusOr<DeviceBuffer> buffer = this->device_->Allocate(bytes.size(), "array");
    EXPECT_OK(buffer);
    if (!buffer.ok()) return {};
    memory_.push_back(*std::move(buffer));
    const DeviceSpan<std::byte> span = memory_.back().template As<std::byte>().Sub(0, bytes.size());
    EXPECT_OK(this->stream_->CopyFromHost(span, bytes));
    EXPECT_OK(this->stream_->Synchronize());
    return span;
  }
  template <class T>
  DeviceSpan<T> Array(const std::vector<T>& values) {
    const auto* const bytes = reinterpret_cast<const std::byte*>(values.data());
    const DeviceSpan<std::byte> span = Put(Bytes(bytes, bytes + values.size() * sizeof(T)));
    return {reinterpret_cast<T*>(span.address()), values.size()};
  }
  Bytes Numbers(DType dtype, int64_t count, double low = -1, double high = 1) {
    return Encode(dtype, Uniform(random_, static_cast<size_t>(count), low, high));
  }
  Bytes Read(DeviceSpan<const std::byte> from) {
    absl::StatusOr<Bytes> bytes = ReadBytes(*this->stream_, from);
    EXPECT_OK(bytes);
    return bytes.ok() ? *bytes : Bytes();
  }
  // `pieces` of `bytes` lie `stride` bytes apart at `to`.
  void Spread(DeviceSpan<std::byte> to, const Bytes& bytes, size_t pieces, size_t stride) {
    const size_t size = bytes.size() / pieces;
    for (size_t i = 0; i < pieces; ++i) {
      ASSERT_OK(this->stream_->CopyFromHost(to.Sub(i * stride, size), {bytes.data() + i * size, size}));
    }
    ASSERT_OK(this->stream_->Synchronize());
  }
  Bytes Gather(DeviceSpan<std::byte> from, size_t pieces, size_t size, size_t stride) {
    Bytes all;
    for (size_t i = 0; i < pieces; ++i) {
      const Bytes piece = Read(from.Sub(i * stride, size));
      all.insert(all.end(), piece.begin(), piece.end());
    }
    return all;
  }
  GateInputs Gates(int64_t tokens) {
    const DeviceSpan<std::byte> a = Put(Numbers(DType::kBFloat16, tokens * kVHeads));
    const DeviceSpan<std::byte> b = Put(Numbers(DType::kBFloat16, tokens * kVHeads));
    return {DType::kBFloat16, kVHeads, {a, 0}, {b, 0}, Array<float>({0.5f, -1}), Array<float>({-3, 0.25f})};
  }
  // Channels of bfloat16 rows that are `stride` apart.
  static Rows Part(DeviceSpan<const std::byte> mixed, int64_t first, int64_t stride) {
    const size_t skip = static_cast<size_t>(first) * 2;
    return {mixed.Sub(skip, mixed.size() - skip), stride};
  }

  std::mt19937_64 random_{91};
  std::vector<DeviceBuffer> memory_;
  VastMemory vast_;
};
TYPED_TEST_SUITE(GdnOffsetsTest, AllBackends, BackendNames);

TYPED_TEST(GdnOffsetsTest, StatesMayLiePast4GElements) {
  constexpr int64_t kState = kVHeads * kStateElements;
  absl::StatusOr<DeviceSpan<std::byte>> vast =
      this->vast_.Get(*this->stream_, static_cast<size_t>((kSlots - 1) * kMostStride + 2 * kState) * 2);
  if (absl::IsResourceExhausted(vast.status())) GTEST_SKIP() << vast.status();
  ASSERT_OK(vast);
  const int64_t all = kRows * kTokens;
  const DeviceSpan<const std::byte> mixed = this->Put(this->Numbers(DType::kBFloat16, all * kDim));
  const DeviceSpan<const int32_t> slots = this->template Array<int32_t>({3, 1, 2});
  const DeviceSpan<const int32_t> accepted = this->template Array<int32_t>({2, 1, 2});
  const DeviceSpan<int32_t> rows = this->template Array<int32_t>({0, 0, 0});
  const RecurrentInputs inputs = {.qk_heads = kQkHeads,
                                  .q = this->Part(mixed, 0, kDim),
                                  .k = this->Part(mixed, kQkDim, kDim),
                                  .v = this->Part(mixed, 2 * kQkDim, kDim),
                                  .gates = this->Gates(all),
                                  .cache_indices = slots};
  ASSERT_OK_AND_ASSIGN(
      const std::unique_ptr<Prefill> prefill,
      Prefill::Create(*this->device_, {.largest = {kRows, kRows * kTokens}, .qk_heads = kQkHeads, .v_heads = kVHeads}));
  for (const DType state : {DType::kBFloat16, DType::kFloat32}) {
    const size_t element = SizeOf(state), slot_bytes = static_cast<size_t>(kState) * element;
    const int64_t far_stride = kMostStride * 2 / static_cast<int64_t>(element);
    const Bytes before = this->Numbers(state, kSlots * kState, -0.3, 0.3);
    const DeviceSpan<std::byte> out = this->Put(Bytes(kRows * slot_bytes));
    const StateView near = {state, kVHeads, kSlots, kState, this->Put(before), PaddedRows::kSkip};
    const StateView far = {state, kVHeads, kSlots, far_stride, *vast, PaddedRows::kSkip};
    const StateView own = {state, kVHeads, kRows, kState, out, PaddedRows::kSkip};
    const PrefillTensors prompts = {.q = inputs.q,
                                    .k = inputs.k,
                                    .v = inputs.v,
                                    .g = this->template Array<float>(std::vector<float>(all * kVHeads, -0.125f)),
                                    .beta = this->template Array<float>(std::vector<float>(all * kVHeads, 0.5f)),
                                    .cu_seqlens = this->template Array<int32_t>({0, 1, 4, 6}),
                                    .initial_slots = slots,
                                    .final_slots = slots,
                                    .out = out};
    Stream& s = *this->stream_;
    const std::pair<const char*, std::function<absl::Status(const StateView&)>> ops[] = {
        {"decode", [&](const StateView& pool) { return Decode(s, kRows, inputs, pool, out); }},
        {"verify", [&](const StateView& pool) { return Verify(s, kRows, kTokens, inputs, pool, out); }},
        {"commit", [&](const StateView& pool) { return Commit(s, kRows, kTokens, inputs, pool, accepted); }},
        {"gather", [&](const StateView& pool) { return GatherStates(s, kRows, slots, pool, own, rows); }},
        {"scatter", [&](const StateView& pool) { return ScatterStates(s, kRows, slots, own, pool); }},
        {"prefill", [&](const StateView& pool) {
           return prefill->Run(s, {kRows, kRows * kTokens}, prompts, pool);
         }}};
    for (const auto& [name, op] : ops) {
      SCOPED_TRACE(std::string(name) + ", " + ToString(state));
      Bytes outs[2], states[2];
      for (const bool is_far : {false, true}) {
        const StateView& pool = is_far ? far : near;
        const size_t stride = static_cast<size_t>(pool.slot_stride) * element;
        ASSERT_NO_FATAL_FAILURE(this->Spread(pool.states, before, kSlots, stride));
        ASSERT_OK(s.Fill(out, std::byte{0x3f}));
        ASSERT_OK(op(pool));
        outs[is_far] = this->Read(out);
        states[is_far] = this->Gather(pool.states, kSlots, slot_bytes, stride);
      }
      EXPECT_TRUE(outs[0] == outs[1]);
      EXPECT_TRUE(states[0] == states[1]);
      EXPECT_FALSE(states[0] == before && outs[0] == Bytes(outs[0].size(), std::byte{0x3f})) << "it does nothing";
    }
  }
}

TYPED_TEST(GdnOffsetsTest, ConvolutionStatesMayLiePast4GElements) {
  constexpr int64_t kState = int64_t{kDim} * kConvHistory;
  absl::StatusOr<DeviceSpan<std::byte>> vast =
      this->vast_.Get(*this->stream_, static_cast<size_t>((kSlots - 1) * kMostStride + kState) * 2);
  if (absl::IsResourceExhausted(vast.status())) GTEST_SKIP() << vast.status();
  ASSERT_OK(vast);
  const int64_t all = kRows * kTokens;
  const DeviceSpan<const std::byte> x = this->Put(this->Numbers(DType::kBFloat16, all * kDim));
  const ConvInputs inputs = {.x = this->Part(x, 0, kDim),
                             .weight = this->Put(this->Numbers(DType::kBFloat16, kDim * kConvWidth)),
                             .bias = this->Put(this->Numbers(DType::kBFloat16, kDim)),
                             .cache_indices = this->template Array<int32_t>({3, 1, 2})};
  const ConvSequences sequences = {.requests = kRows, .cu_seqlens = this->template Array<int32_t>({0, 1, 4, 6})};
  const DeviceSpan<const int32_t> accepted = this->template Array<int32_t>({2, 1, 2});
  const Bytes before = this->Numbers(DType::kBFloat16, kSlots * kState);
  const DeviceSpan<std::byte> out = this->Put(Bytes(static_cast<size_t>(all) * kDim * 2));
  const ConvOutputs outputs = {.out = out};
  const ConvStateView near = {DType::kBFloat16, kDim, kSlots, kState, this->Put(before)};
  const ConvStateView far = {DType::kBFloat16, kDim, kSlots, kMostStride, *vast};
  Stream& s = *this->stream_;
  const std::pair<const char*, std::function<absl::Status(const ConvStateView&)>> ops[] = {
      {"prompts", [&](const ConvStateView& pool) { return CausalConv1d(s, all, sequences, inputs, pool, outputs); }},
      {"update", [&](const ConvStateView& pool) { return CausalConv1dUpdate(s, kRows, inputs, pool, outputs); }},
      {"verify",
       [&](const ConvStateView& pool) { return CausalConv1dVerify(s, kRows, kTokens, inputs, pool, outputs); }},
      {"commit",
       [&](const ConvStateView& pool) { return CausalConv1dCommit(s, kRows, kTokens, inputs, pool, accepted); }}};
  for (const auto& [name, op] : ops) {
    SCOPED_TRACE(name);
    Bytes outs[2], states[2];
    for (const bool is_far : {false, true}) {
      const ConvStateView& pool = is_far ? far : near;
      const size_t stride = static_cast<size_t>(pool.slot_stride) * 2;
      ASSERT_NO_FATAL_FAILURE(this->Spread(pool.states, before, kSlots, stride));
      ASSERT_OK(s.Fill(out, std::byte{0x3f}));
      ASSERT_OK(op(pool));
      outs[is_far] = this->Read(out);
      states[is_far] = this->Gather(pool.states, kSlots, static_cast<size_t>(kState) * 2, stride);
    }
    EXPECT_TRUE(outs[0] == outs[1]);
    EXPECT_TRUE(states[0] == states[1]);
    EXPECT_FALSE(states[0] == before && outs[0] == Bytes(outs[0].size(), std::byte{0x3f})) << "it does nothing";
  }
}

// Rows of inputs, and channels of a transposed one.
TYPED_TEST(GdnOffsetsTest, RowsMayLiePast4GElements) {
  constexpr int32_t kAll = 4;
  absl::StatusOr<DeviceSpan<std::byte>> vast =
      this->vast_.Get(*this->stream_, static_cast<size_t>((kAll - 1) * kMostStride + kDim) * 2);
  if (absl::IsResourceExhausted(vast.status())) GTEST_SKIP() << vast.status();
  ASSERT_OK(vast);
  const Bytes rows = this->Numbers(DType::kBFloat16, kAll * kDim);
  const DeviceSpan<const std::byte> near = this->Put(rows), far = *vast;
  ASSERT_NO_FATAL_FAILURE(this->Spread(*vast, rows, kAll, static_cast<size_t>(kMostStride) * 2));
  const Bytes before = this->Numbers(DType::kBFloat16, kSlots * kVHeads * kStateElements, -0.3, 0.3);
  const DeviceSpan<std::byte> states = this->Put(before);
  const StateView pool = {DType::kBFloat16, kVHeads, kSlots, kVHeads * kStateElements, states, PaddedRows::kSkip};
  const Bytes conv_before = this->Numbers(DType::kBFloat16, kSlots * kDim * kConvHistory);
  const DeviceSpan<std::byte> conv_states = this->Put(conv_before);
  const ConvStateView conv_pool = {DType::kBFloat16, kDim, kSlots, kDim * kConvHistory, conv_states};
  const DeviceSpan<const std::byte> weight = this->Put(this->Numbers(DType::kBFloat16, kDim * kConvWidth));
  const DeviceSpan<const int32_t> slots = this->template Array<int32_t>({3, 2});
  const DeviceSpan<const int32_t> cu = this->template Array<int32_t>({0, 1, kAll});
  const DeviceSpan<std::byte> out = this->Put(Bytes(kAll * kDim * 2));
  const DeviceSpan<float> g = this->template Array<float>(std::vector<float>(kAll * kVHeads));
  const DeviceSpan<float> beta = this->template Array<float>(std::vector<float>(kAll * kVHeads));
  const GateInputs gates = this->Gates(kAll);
  const auto part = [&](int64_t first, int64_t dims) {
    return out.Sub(static_cast<size_t>(first) * kAll * 2, static_cast<size_t>(dims) * kAll * 2);
  };
  ASSERT_OK_AND_ASSIGN(
      const std::unique_ptr<Prefill> prefill,
      Prefill::Create(*this->device_, {.largest = {2, kAll}, .qk_heads = kQkHeads, .v_heads = kVHeads}));
  Stream& s = *this->stream_;
  using Op = std::function<absl::Status(DeviceSpan<const std::byte> mixed, int64_t stride)>;
  const std::pair<const char*, Op> ops[] = {
      {"gates",
       [&](DeviceSpan<const std::byte> mixed, int64_t stride) {
         GateInputs strided = gates;
         strided.a = this->Part(mixed, 0, stride);
         strided.b = this->Part(mixed, kVHeads, stride);
         return attention::gdn::Gates(s, kAll, strided, g, beta);
       }},
      {"split",
       [&](DeviceSpan<const std::byte> mixed, int64_t stride) {
         QkvSplitTensors t = {.q_dim = kQkDim, .k_dim = kQkDim, .v_dim = kVDim, .mixed = mixed, .stride_t = stride};
         t.q = part(0, kQkDim);
         t.k = part(kQkDim, kQkDim);
         t.v = part(2 * kQkDim, kVDim);
         return QkvSplit(s, kAll, t);
       }},
      {"split, transposed",  // its channels are the rows
       [&](DeviceSpan<const std::byte> mixed, int64_t stride) {
         QkvSplitTensors t = {.q_dim = 1, .k_dim = 1, .v_dim = 2, .mixed = mixed, .stride_t = 1, .stride_d = stride};
         t.q = out.Sub(0, kDim * 2);
         t.k = out.Sub(kDim * 2, kDim * 2);
         t.v = out.Sub(kDim * 4, kDim * 4);
         return QkvSplit(s, kDim, t);
       }},
      {"verify",
       [&](DeviceSpan<const std::byte> mixed, int64_t stride) {
         const RecurrentInputs inputs = {.qk_heads = kQkHeads,
                                         .q = this->Part(mixed, 0, stride),
                                         .k = this->Part(mixed, kQkDim, stride),
                                         .v = this->Part(mixed, 2 * kQkDim, stride),
                                         .gates = gates,
                                         .cache_indices = slots};
         return Verify(s, 2, kAll / 2, inputs, pool, out);
       }},
      {"prefill",
       [&](DeviceSpan<const std::byte> mixed, int64_t stride) {
         const PrefillTensors tensors = {.q = this->Part(mixed, 0, stride),
                                         .k = this->Part(mixed, kQkDim, stride),
                                         .v = this->Part(mixed, 2 * kQkDim, stride),
                                         .g = g,
                                         .beta = beta,
                                         .cu_seqlens = cu,
                                         .initial_slots = slots,
                                         .final_slots = slots,
                                         .out = out};
         return prefill->Run(s, {2, kAll}, tensors, pool);
       }},
      {"convolution",
       [&](DeviceSpan<const std::byte> mixed, int64_t stride) {
         const ConvInputs inputs = {.x = {mixed, stride}, .weight = weight, .cache_indices = slots};
         return CausalConv1d(s, kAll, {.requests = 2, .cu_seqlens = cu}, inputs, conv_pool, {.out = out});
       }},
      {"convolution of a chain", [&](DeviceSpan<const std::byte> mixed, int64_t stride) {
         const ConvInputs inputs = {.x = {mixed, stride}, .weight = weight, .cache_indices = slots};
         return CausalConv1dVerify(s, 2, kAll / 2, inputs, conv_pool, {.out = out});
       }}};
  for (const auto& [name, op] : ops) {
    SCOPED_TRACE(name);
    Bytes found[2];
    for (const bool is_far : {false, true}) {
      ASSERT_OK(s.CopyFromHost(states, before));
      ASSERT_OK(s.CopyFromHost(conv_states, conv_before));
      ASSERT_OK(s.Fill(out, std::byte{0x3f}));
      ASSERT_OK(is_far ? op(far, kMostStride) : op(near, kDim));
      for (const DeviceSpan<const std::byte> span :
           {DeviceSpan<const std::byte>(out), AsBytes(g), AsBytes(beta), DeviceSpan<const std::byte>(states),
            DeviceSpan<const std::byte>(conv_states)}) {
        const Bytes bytes = this->Read(span);
        found[is_far].insert(found[is_far].end(), bytes.begin(), bytes.end());
      }
    }
    EXPECT_TRUE(found[0] == found[1]);
  }
}

}  // namespace
}  // namespace pristine::testing
