#include "pristine/attention/append_kv.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/kernels/float16.h"
#include "attention/kernels/float8.h"
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

// --- layouts and float8 ---

using attention::KvLayout;

struct Case {
  DType dtype;
  bool quantizes;
  KvLayout layout;
  int32_t page_size, kv_heads, head_dim;
};

// What AppendKv is defined to leave, from plain loops over (token, head, d).
template <class BackendT>
class AppendKvLayoutTest : public DeviceTest<BackendT> {
 protected:
  static constexpr int32_t kPages = 5;
  static constexpr int32_t kRows = 7;

  DeviceSpan<std::byte> Put(const Bytes& bytes, const char* name) {
    absl::StatusOr<DeviceBuffer> made = this->device_->Allocate(bytes.size(), name);
    EXPECT_OK(made);
    memory_.push_back(*std::move(made));
    EXPECT_OK(Upload(*this->stream_, memory_.back().template As<std::byte>(), bytes));
    return memory_.back().template As<std::byte>();
  }
  // Values around zero, with those that quantizing treats specially: NaN, infinity, halves, denormals, and large ones.
  static Bytes Rows(DType dtype, size_t count, uint64_t seed) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    const float special[] = {0.0f,    -0.0f,    448.0f,   464.0f,   -465.0f, 1e30f,  kInf,     -kInf,
                             0.0156f, 0.00098f, 0.00097f, -0.0029f, 1.0625f, 1.125f, -1.1875f, std::nanf("")};
    std::mt19937_64 random(seed);
    std::normal_distribution<float> value(0.0f, 3.0f);
    Bytes bytes(count * attention::SizeOf(dtype));
    for (size_t i = 0; i < count; ++i) {
      const float x = random() % 4 == 0 ? special[random() % std::size(special)] : value(random);
      const attention::Float16 half = attention::FromFloat<attention::Float16>(x);
      const attention::BFloat16 brain = attention::FromFloat<attention::BFloat16>(x);
      const void* const from = dtype == DType::kFloat32   ? static_cast<const void*>(&x)
                               : dtype == DType::kFloat16 ? static_cast<const void*>(&half)
                                                          : static_cast<const void*>(&brain);
      std::memcpy(&bytes[i * attention::SizeOf(dtype)], from, attention::SizeOf(dtype));
    }
    return bytes;
  }
  static float At(DType dtype, const Bytes& bytes, size_t i) {
    float x;
    uint16_t bits;
    std::memcpy(&x, &bytes[dtype == DType::kFloat32 ? i * 4 : 0], sizeof(x));
    std::memcpy(&bits, &bytes[i * 2], sizeof(bits));
    if (dtype == DType::kFloat16) return attention::ToFloat(attention::Float16{bits});
    if (dtype == DType::kBFloat16) return attention::ToFloat(attention::BFloat16{bits});
    return x;
  }
  static void Append(const Case& c, const Bytes& rows, const std::vector<int32_t>& slots, float scale, Bytes& pool) {
    const size_t size = c.quantizes ? 1 : attention::SizeOf(c.dtype);
    for (int64_t token = 0; token < kRows; ++token) {
      if (slots[token] < 0 || slots[token] >= kPages * c.page_size) continue;
      const int64_t page = slots[token] / c.page_size, offset = slots[token] % c.page_size;
      for (int64_t head = 0; head < c.kv_heads; ++head) {
        for (int64_t d = 0; d < c.head_dim; ++d) {
          const int64_t from = (token * c.kv_heads + head) * c.head_dim + d;
          const int64_t to = c.layout == KvLayout::kNHD
                                 ? ((page * c.page_size + offset) * c.kv_heads + head) * c.head_dim + d
                                 : ((page * c.kv_heads + head) * c.page_size + offset) * c.head_dim + d;
          if (c.quantizes) {
            const float value = At(c.dtype, rows, from) * (1.0f / scale);
            pool[to] = std::byte{attention::FromFloat<attention::Float8E4M3>(value).bits};
          } else {
            std::memcpy(&pool[to * size], &rows[from * size], size);
          }
        }
      }
    }
  }
  void TearDown() override {
    memory_.clear();
    DeviceTest<BackendT>::TearDown();
  }

  std::deque<DeviceBuffer> memory_;
};
TYPED_TEST_SUITE(AppendKvLayoutTest, AllBackends, BackendNames);

TYPED_TEST(AppendKvLayoutTest, EveryDtypeAndLayoutWritesTheBytesOfTheDefinition) {
  uint64_t seed = 20260;
  SCOPED_TRACE(seed);
  std::vector<Case> cases;
  for (const KvLayout layout : {KvLayout::kNHD, KvLayout::kHND}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const int32_t head_dim : {8, 72, 128, 256}) {
        cases.push_back({dtype, false, layout, 3, 2, head_dim});
        cases.push_back({dtype, true, layout, 3, 2, head_dim});
        cases.push_back({dtype, true, layout, 16, 5, head_dim});
      }
      cases.push_back({dtype, false, layout, 1, 3, 6});     // 4-byte words
      cases.push_back({dtype, false, layout, 16, 40, 64});  // more vectors than a block has threads
    }
  }
  for (const Case& c : cases) {
    const size_t row = size_t{1} * c.kv_heads * c.head_dim;
    const size_t pool_bytes = TestFixture::kPages * c.page_size * row * (c.quantizes ? 1 : SizeOf(c.dtype));
    const Bytes k_new = this->Rows(c.dtype, TestFixture::kRows * row, ++seed);
    const Bytes v_new = this->Rows(c.dtype, TestFixture::kRows * row, ++seed);
    Bytes k = Patterned(pool_bytes, 1), v = Patterned(pool_bytes, 2);
    const int32_t num_slots = TestFixture::kPages * c.page_size;
    const std::vector<int32_t> slots = {num_slots - 1, 0, -1, num_slots, 3, 1, std::numeric_limits<int32_t>::max()};
    const std::vector<float> scales = {0.37f, 2.5f};
    Bytes slot_bytes(slots.size() * 4), scale_bytes(8);
    std::memcpy(slot_bytes.data(), slots.data(), slot_bytes.size());
    std::memcpy(scale_bytes.data(), scales.data(), 8);
    AppendKvTensors tensors = {.dtype = c.dtype, .layout = c.layout, .page_size = c.page_size};
    tensors.kv_heads = c.kv_heads;
    tensors.head_dim = c.head_dim;
    tensors.k_new = this->Put(k_new, "k_new");
    tensors.v_new = this->Put(v_new, "v_new");
    tensors.k = this->Put(k, "k");
    tensors.v = this->Put(v, "v");
    this->Put(slot_bytes, "slots");
    tensors.slots = this->memory_.back().template As<const int32_t>();
    this->Put(scale_bytes, "scales");
    const DeviceSpan<const float> device_scales = this->memory_.back().template As<const float>();
    if (c.quantizes) {
      tensors.kv_dtype = DType::kFloat8E4M3;
      tensors.k_scale = device_scales.Sub(0, 1);
      tensors.v_scale = device_scales.Sub(1, 1);
    }
    ASSERT_OK(AppendKv(*this->stream_, TestFixture::kRows, tensors));
    this->Append(c, k_new, slots, scales[0], k);
    this->Append(c, v_new, slots, scales[1], v);
    const std::string name =
        absl::StrCat(ToString(c.dtype), c.quantizes ? " quantized " : " ", ToString(c.layout), " ", c.head_dim);
    ASSERT_OK_AND_ASSIGN(const Bytes found_k, Download(*this->stream_, tensors.k));
    ASSERT_OK_AND_ASSIGN(const Bytes found_v, Download(*this->stream_, tensors.v));
    for (size_t i = 0; i < k.size(); ++i) ASSERT_EQ(found_k[i], k[i]) << name << ", byte " << i << " of k";
    for (size_t i = 0; i < v.size(); ++i) ASSERT_EQ(found_v[i], v[i]) << name << ", byte " << i << " of v";
    this->memory_.clear();
  }
}

TYPED_TEST(AppendKvLayoutTest, AReplayReadsTheScalesOfItsStep) {
  const Case c = {DType::kBFloat16, true, KvLayout::kHND, 4, 2, 64};
  const size_t row = size_t{1} * c.kv_heads * c.head_dim;
  const Bytes rows = this->Rows(c.dtype, TestFixture::kRows * row, 5);
  Bytes k = Patterned(TestFixture::kPages * c.page_size * row, 1), v = k;
  const std::vector<int32_t> slots = {0, 5, 6, 7, 12, 19, 1};
  Bytes slot_bytes(slots.size() * 4);
  std::memcpy(slot_bytes.data(), slots.data(), slot_bytes.size());
  AppendKvTensors tensors = {.dtype = c.dtype, .kv_dtype = DType::kFloat8E4M3, .layout = c.layout, .page_size = 4};
  tensors.kv_heads = c.kv_heads;
  tensors.head_dim = c.head_dim;
  tensors.k_new = tensors.v_new = this->Put(rows, "rows");
  tensors.k = this->Put(k, "k");
  tensors.v = this->Put(v, "v");
  this->Put(slot_bytes, "slots");
  tensors.slots = this->memory_.back().template As<const int32_t>();
  this->Put(Bytes(4), "scale");
  const DeviceSpan<float> scale = this->memory_.back().template As<float>();
  tensors.k_scale = scale;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& stream) {
                         return AppendKv(stream, TestFixture::kRows, tensors);
                       }));
  ASSERT_EQ(graph->nodes().size(), 1u);
  EXPECT_EQ(graph->nodes()[0].name, "append_kv_float8_bfloat16");
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
  for (const float value : {1.0f, 0.125f, 3.0f}) {
    ASSERT_OK(Upload(*this->stream_, scale, std::vector<float>{value}));
    ASSERT_OK(exec->Launch(*this->stream_));
    this->Append(c, rows, slots, value, k);
    this->Append(c, rows, slots, 1.0f, v);  // no scale: 1
    ASSERT_OK_AND_ASSIGN(const Bytes found_k, Download(*this->stream_, tensors.k));
    ASSERT_OK_AND_ASSIGN(const Bytes found_v, Download(*this->stream_, tensors.v));
    EXPECT_TRUE(found_k == k) << value;
    EXPECT_TRUE(found_v == v) << value;
  }
}

TYPED_TEST(AppendKvTest, LayoutsDtypesAndScalesThatCannotRunAreRefusedByName) {
  this->Create(DType::kBFloat16, 2, 64);
  const auto refused = [&](auto change, absl::StatusCode code, const char* part) {
    AppendKvTensors tensors = this->tensors_;
    change(tensors);
    const absl::Status status = AppendKv(*this->stream_, kTokens, tensors);
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_NE(std::string(status.message()).find(part), std::string::npos) << status;
  };
  constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
  refused([](auto& t) { t.layout = KvLayout::kHND; }, kInvalid, "page_size is 0, must be at least 1 with HND");
  refused([](auto& t) { t.layout = static_cast<KvLayout>(7); }, kInvalid, "layout is 7, must be NHD or HND");
  refused([](auto& t) { t.kv_dtype = DType::kFloat16; }, absl::StatusCode::kUnimplemented,
          "no kernel from bfloat16 to float16; there are copies within a dtype, and float32, bfloat16 and float16 to");
  refused(
      [](auto& t) {
        t.kv_dtype = DType::kFloat8E4M3;
        t.head_dim = 60;
      },
      kInvalid, "head_dim is 60, must be a multiple of 8 to quantize");
  refused(
      [](auto& t) {
        t.v_scale = {reinterpret_cast<const float*>(t.k_new.address()), 1};
      },
      kInvalid, "v_scale is given, must be empty");
  refused(
      [](auto& t) {
        t.kv_dtype = DType::kFloat8E4M3;
        t.k = t.k.Sub(4, t.k.size() - 4);
      },
      kInvalid, "k must be aligned to 16 bytes");
  refused(
      [](auto& t) {
        t.layout = KvLayout::kHND;
        t.page_size = 1;
        t.head_dim = 5;
      },
      kInvalid, "a head has 10 bytes, must be a multiple of 4");
  refused(
      [](auto& t) {
        t.kv_heads = 1 << 20;
        t.head_dim = 1 << 20;
      },
      kInvalid, "a row must have fewer than 2^31 bytes");
}

}  // namespace
}  // namespace pristine::testing
