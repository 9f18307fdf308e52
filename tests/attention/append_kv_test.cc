#include "pristine/attention/append_kv.h"

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "pristine/graph_runtime/graph.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::AppendKv;
using attention::AppendKvTensors;
using attention::DType;
using Bytes = std::vector<std::byte>;

constexpr int32_t kSlots = 12;
constexpr int32_t kTokens = 4;

std::byte Pattern(size_t i, int salt) { return static_cast<std::byte>((i * 31 + salt) % 251); }
Bytes Patterned(size_t size, int salt) {
  Bytes bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = Pattern(i, salt);
  return bytes;
}

template <class BackendT>
class AppendKvTest : public DeviceTest<BackendT> {
 protected:
  // `shift` bytes at the start of each buffer are not used.
  void Create(DType dtype, int32_t kv_heads, int32_t head_dim, size_t shift = 0) {
    row_ = size_t{1} * kv_heads * head_dim * attention::SizeOf(dtype);
    const auto make = [&](DeviceBuffer& buffer, size_t rows, const char* name, int salt) -> DeviceSpan<std::byte> {
      absl::StatusOr<DeviceBuffer> made = this->device_->Allocate(shift + rows * row_, name);
      EXPECT_OK(made);
      buffer = *std::move(made);
      EXPECT_OK(Upload(*this->stream_, buffer.template As<std::byte>(), Patterned(shift + rows * row_, salt)));
      return buffer.template As<std::byte>().Sub(shift, rows * row_);
    };
    tensors_ = {.dtype = dtype, .kv_heads = kv_heads, .head_dim = head_dim};
    tensors_.k_new = make(k_new_, kTokens, "k_new", 1);
    tensors_.v_new = make(v_new_, kTokens, "v_new", 2);
    tensors_.k = make(k_, kSlots, "k", 3);
    tensors_.v = make(v_, kSlots, "v", 4);
    absl::StatusOr<DeviceBuffer> slots = this->device_->Allocate(kTokens * sizeof(int32_t), "slots");
    ASSERT_OK(slots);
    slots_ = *std::move(slots);
    tensors_.slots = slots_.As<const int32_t>();
  }
  void SetSlots(const std::vector<int32_t>& slots) { ASSERT_OK(Upload(*this->stream_, slots_.As<int32_t>(), slots)); }
  // The pools are what they were, but for the rows that `slots` names.
  void ExpectAppended(const std::vector<int32_t>& slots) {
    ASSERT_OK_AND_ASSIGN(const Bytes k, Download(*this->stream_, tensors_.k));
    ASSERT_OK_AND_ASSIGN(const Bytes v, Download(*this->stream_, tensors_.v));
    ASSERT_OK_AND_ASSIGN(const Bytes k_new, Download(*this->stream_, tensors_.k_new));
    ASSERT_OK_AND_ASSIGN(const Bytes v_new, Download(*this->stream_, tensors_.v_new));
    for (size_t t = 0; t < slots.size(); ++t) {
      if (slots[t] < 0 || slots[t] >= kSlots) continue;
      std::copy_n(k_new.begin() + t * row_, row_, expected_k_.begin() + slots[t] * row_);
      std::copy_n(v_new.begin() + t * row_, row_, expected_v_.begin() + slots[t] * row_);
    }
    EXPECT_TRUE(k == expected_k_);
    EXPECT_TRUE(v == expected_v_);
  }
  void Remember() {
    ASSERT_OK_AND_ASSIGN(expected_k_, Download(*this->stream_, tensors_.k));
    ASSERT_OK_AND_ASSIGN(expected_v_, Download(*this->stream_, tensors_.v));
  }
  void TearDown() override {
    for (DeviceBuffer* buffer : {&k_new_, &v_new_, &k_, &v_, &slots_}) *buffer = DeviceBuffer();
    DeviceTest<BackendT>::TearDown();
  }

  size_t row_ = 0;
  DeviceBuffer k_new_, v_new_, k_, v_, slots_;
  AppendKvTensors tensors_;
  Bytes expected_k_, expected_v_;
};
TYPED_TEST_SUITE(AppendKvTest, AllBackends, BackendNames);

TYPED_TEST(AppendKvTest, WritesEachRowToItsSlotAndNothingElse) {
  const struct {
    DType dtype;
    int32_t kv_heads, head_dim;
    size_t shift;
  } cases[] = {{DType::kFloat32, 2, 64, 0},
               {DType::kBFloat16, 2, 128, 0},
               {DType::kBFloat16, 1, 6, 0},
               {DType::kFloat32, 1, 3, 4},
               {DType::kBFloat16, 2, 64, 4}};
  for (const auto& c : cases) {
    this->Create(c.dtype, c.kv_heads, c.head_dim, c.shift);
    this->Remember();
    const std::vector<int32_t> slots = {5, 0, kSlots - 1, 7};
    this->SetSlots(slots);
    ASSERT_OK(AppendKv(*this->stream_, kTokens, this->tensors_));
    this->ExpectAppended(slots);
  }
}

TYPED_TEST(AppendKvTest, SlotMinusOneWritesNothing) {
  this->Create(DType::kFloat32, 2, 64);
  this->Remember();
  const std::vector<int32_t> slots = {-1, 3, -1, -1};
  this->SetSlots(slots);
  ASSERT_OK(AppendKv(*this->stream_, kTokens, this->tensors_));
  this->ExpectAppended(slots);
}

TYPED_TEST(AppendKvTest, SlotsPastThePoolWriteNothing) {
  this->Create(DType::kBFloat16, 2, 64);
  this->Remember();
  const std::vector<int32_t> slots = {kSlots, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min(),
                                      kSlots + 1};
  this->SetSlots(slots);
  ASSERT_OK(AppendKv(*this->stream_, kTokens, this->tensors_));
  this->ExpectAppended(slots);
}

TYPED_TEST(AppendKvTest, OnlyTheFirstTokensAreAppended) {
  this->Create(DType::kFloat32, 1, 64);
  this->Remember();
  this->SetSlots({1, 2, 3, 4});
  ASSERT_OK(AppendKv(*this->stream_, 0, this->tensors_));
  this->ExpectAppended({});
  ASSERT_OK(AppendKv(*this->stream_, 2, this->tensors_));
  this->ExpectAppended({1, 2});
}

TYPED_TEST(AppendKvTest, AReplayAppendsAtTheSlotsOfItsStep) {
  this->Create(DType::kFloat32, 2, 64);
  this->Remember();
  this->SetSlots({-1, -1, -1, -1});
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& stream) {
                         return AppendKv(stream, kTokens, this->tensors_);
                       }));
  ASSERT_EQ(graph->nodes().size(), 1u);
  EXPECT_EQ(graph->nodes()[0].name, "append_kv");
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
  for (const std::vector<int32_t>& slots :
       {std::vector<int32_t>{0, 1, 2, 3}, {9, -1, 4, 10}, {-1, -1, -1, -1}, {3, 2, 1, 0}}) {
    this->SetSlots(slots);
    ASSERT_OK(exec->Launch(*this->stream_));
    this->ExpectAppended(slots);
  }
}

TYPED_TEST(AppendKvTest, WrongTensorsAreRefusedByName) {
  this->Create(DType::kFloat32, 2, 64);
  const auto refused = [&](auto change, const char* part) {
    AppendKvTensors tensors = this->tensors_;
    change(tensors);
    EXPECT_STATUS(AppendKv(*this->stream_, kTokens, tensors), kInvalidArgument, part);
  };
  refused([](auto& t) { t.k_new = t.k_new.Sub(0, t.k_new.size() - 1); }, "k_new has 2047 bytes, needs 2048");
  refused([](auto& t) { t.v_new = {}; }, "v_new has 0 bytes");
  refused([](auto& t) { t.slots = t.slots.Sub(0, 3); }, "slots has 12 bytes, needs 16");
  refused([](auto& t) { t.k = {}; }, "k has 0 bytes");
  refused([](auto& t) { t.v = t.v.Sub(0, t.v.size() - 1); }, "v has");
  refused([](auto& t) { t.k = t.k.Sub(2, t.k.size() - 512); }, "k must be aligned to 4");
  refused([](auto& t) { t.kv_heads = 0; }, "kv_heads is 0");
  refused(
      [](auto& t) {
        t.dtype = DType::kBFloat16;
        t.kv_heads = 1;
        t.head_dim = 63;
      },
      "a row has 126 bytes, must be a multiple of 4");
  EXPECT_STATUS(AppendKv(*this->stream_, -1, this->tensors_), kInvalidArgument, "tokens is -1");
}

}  // namespace
}  // namespace pristine::testing
