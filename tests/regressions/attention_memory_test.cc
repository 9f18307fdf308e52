// Bugs of attention kernels that read what they must not, or wrote where 32 bits wrapped.
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "pristine/attention/append_kv.h"
#include "tests/attention/decode_rig.h"
#include "tests/attention/prefill_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"
#include "tests/support/vast_memory.h"

namespace pristine::testing {
namespace {

using attention::AppendKv;
using attention::AppendKvTensors;
using attention::DecodeScheduler;
using attention::DType;
using attention::KvLayout;
using Bytes = std::vector<std::byte>;
using Ints = std::vector<int32_t>;

// Both ways to cut rows up, each over kernels that split them: float32 has none that do so on the device.
struct Planner {
  DecodeScheduler scheduler;
  DType dtype;
};
constexpr Planner kPlanners[] = {{DecodeScheduler::kHost, DType::kFloat32},
                                 {DecodeScheduler::kDevice, DType::kBFloat16}};
const char* Name(const Planner& planner) { return planner.scheduler == DecodeScheduler::kHost ? "host" : "device"; }

template <class BackendT>
class AttentionMemoryRegression : public DeviceTest<BackendT> {
 protected:
  void TearDown() override {
    rig_.reset();
    memory_.clear();
    vast_.Clear();
    DeviceTest<BackendT>::TearDown();
  }
  template <class T>
  DeviceSpan<T> Put(const std::vector<T>& values) {
    absl::StatusOr<DeviceBuffer> buffer = this->device_->Allocate(values.size() * sizeof(T), "array");
    EXPECT_OK(buffer);
    memory_.push_back(*std::move(buffer));
    EXPECT_OK(Upload(*this->stream_, memory_.back().template As<T>(), values));
    return memory_.back().template As<T>();
  }
  // Empty: there is none.
  DeviceSpan<std::byte> Vast(size_t bytes) {
    absl::StatusOr<DeviceSpan<std::byte>> span = vast_.Get(*this->stream_, bytes);
    if (absl::IsResourceExhausted(span.status())) return {};
    EXPECT_OK(span);
    return span.ok() ? *span : DeviceSpan<std::byte>();
  }

  std::unique_ptr<DecodeRig> rig_;
  std::vector<DeviceBuffer> memory_;
  VastMemory vast_;
};
TYPED_TEST_SUITE(AttentionMemoryRegression, AllBackends, BackendNames);

// A row's page table is wider than its length needs: behind ceil(length / page_size) are numbers of pages that belong
// to somebody else by now, and FlashMLA's tests put 2147480000 there. Neither may be read, not even ahead of need.
TYPED_TEST(AttentionMemoryRegression, FlashMlaStalePageTableColumnsAreNotRead) {
  for (const Planner& planner : kPlanners) {
    constexpr int32_t kColumns = 40, kRows = 4, kPageSize = 16;
    const DecodeShape shape = {.dtype = planner.dtype, .page_size = kPageSize, .seed = 821};
    this->rig_.reset();
    ASSERT_OK_AND_ASSIGN(
        this->rig_,
        DecodeRig::Create(*this->device_, *this->stream_, shape,
                          {.buckets = {kRows}, .max_length = 640, .num_pages = 200, .scheduler = planner.scheduler}));
    DecodeRig& rig = *this->rig_;
    const DeviceSpan<int32_t> indptr = this->Put(Ints{0, kColumns, 2 * kColumns, 3 * kColumns, 4 * kColumns});
    const DeviceSpan<int32_t> indices = this->Put(Ints(kRows * kColumns, 0));
    rig.tensors.kv_indptr = indptr;
    rig.tensors.kv_indices = indices;
    ASSERT_OK(rig.Capture());
    for (const Ints& lengths : {Ints{600, 33, 16, 17}, {1, 15, 640, 0}, {16, 32, 48, 1}}) {
      const DecodeCase step(shape, lengths, Ints(kRows, -1));
      for (const int32_t stale : {2147480000, -1, 0x7fffffff, 199}) {  // page 199 is NaN
        Ints table(kRows * kColumns, stale);
        for (int32_t r = 0; r < kRows; ++r) {
          std::copy(step.indices().begin() + step.indptr()[r], step.indices().begin() + step.indptr()[r + 1],
                    table.begin() + r * kColumns);
        }
        ASSERT_OK(this->stream_->Fill({const_cast<std::byte*>(rig.tensors.k.address()), rig.tensors.k.size()},
                                      std::byte{0xff}));
        ASSERT_OK(this->stream_->Fill({const_cast<std::byte*>(rig.tensors.v.address()), rig.tensors.v.size()},
                                      std::byte{0xff}));
        ASSERT_OK(rig.Load(step));
        ASSERT_OK(Upload(*this->stream_, indices, table));
        ASSERT_OK(rig.Begin(kRows, step, kRows));
        ASSERT_OK(rig.Replay(kRows, kRows));
        ASSERT_EQ(rig.Check(kRows, step, kRows), "") << Name(planner) << ", " << stale;
      }
    }
  }
}

// FlashAttention #1745, #2374: clean inputs, NaN in the output. Scores of slots behind the last token were masked, and
// their weight of 0 was multiplied with the NaN that V held there.
TYPED_TEST(AttentionMemoryRegression, FlashAttention1745NanInUnusedVRowsStaysThere) {
  for (const Planner& planner : kPlanners) {
    const DecodeShape shape = {.dtype = planner.dtype, .page_size = 64, .seed = 822};
    for (const int32_t length : {1, 63, 64, 65, 127, 200, 449}) {
      const DecodeCase step(shape, {length, 64, length + 1, 3}, Ints(4, -1));
      this->rig_.reset();
      ASSERT_OK_AND_ASSIGN(
          this->rig_,
          DecodeRig::Create(*this->device_, *this->stream_, shape,
                            {.buckets = {4}, .max_length = 450, .num_pages = 40, .scheduler = planner.scheduler}));
      DecodeRig& rig = *this->rig_;
      ASSERT_OK(rig.Capture());
      ASSERT_OK(rig.Load(step));
      // K is clean everywhere, so that nothing but V can be the cause.
      std::vector<float> k = ToFloats(step.Pool(false), shape.dtype);
      for (float& x : k) x = std::isnan(x) ? 0.0f : x;
      ASSERT_OK(Upload<std::byte>(*this->stream_,
                                  {const_cast<std::byte*>(rig.tensors.k.address()), rig.tensors.k.size()},
                                  ToBytes(k, shape.dtype)));
      ASSERT_OK(rig.Begin(4, step, 4));
      ASSERT_OK(rig.Replay(4, 4));
      ASSERT_EQ(rig.Check(4, step, 4), "") << Name(planner) << ", " << length;
    }
  }
}

// sgl-kernel's merge wrapped at 2^32 elements; the same in a KV pool shows once it has four million slots.
TYPED_TEST(AttentionMemoryRegression, SglKernel32BitOffsetsOfAPoolPast4GElementsDoNotWrap) {
  constexpr int32_t kHeads = 8, kDim = 128, kPageSize = 16;
  constexpr int64_t kRow = kHeads * kDim;                                  // elements
  constexpr int64_t kSlots = ((int64_t{1} << 32) / kRow) + 4 * kPageSize;  // 4 pages past 2^32 elements
  const DeviceSpan<std::byte> k = this->Vast(kSlots * kRow * 2), v = this->Vast(kSlots * kRow * 2);
  if (k.empty() || v.empty()) GTEST_SKIP() << "this machine does not give " << 2 * k.size() << " bytes";
  // At 2^31 bytes, 2^31 elements, and 2^32 elements and a little more.
  const Ints slots = {(1 << 20) + 1, (1 << 21) + 2, (1 << 22) + 3, static_cast<int32_t>(kSlots - 1)};
  std::vector<uint16_t> rows(slots.size() * kRow);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint16_t>(i % 65521 + 1);
  const DeviceSpan<uint16_t> k_new = this->Put(rows);
  std::reverse(rows.begin(), rows.end());
  const DeviceSpan<uint16_t> v_new = this->Put(rows);
  AppendKvTensors tensors = {.dtype = DType::kBFloat16, .page_size = kPageSize};
  tensors.kv_heads = kHeads;
  tensors.head_dim = kDim;
  tensors.k_new = AsBytes(DeviceSpan<const uint16_t>(k_new));
  tensors.v_new = AsBytes(DeviceSpan<const uint16_t>(v_new));
  tensors.slots = this->Put(slots);
  tensors.k = k;
  tensors.v = v;
  for (const KvLayout layout : {KvLayout::kNHD, KvLayout::kHND}) {
    tensors.layout = layout;
    ASSERT_OK(AppendKv(*this->stream_, static_cast<int32_t>(slots.size()), tensors));
    for (size_t t = 0; t < slots.size(); ++t) {
      for (int64_t head = 0; head < kHeads; ++head) {
        const int64_t page = slots[t] / kPageSize, offset = slots[t] % kPageSize;
        const int64_t at = layout == KvLayout::kNHD ? slots[t] * kRow + head * kDim
                                                    : ((page * kHeads + head) * kPageSize + offset) * kDim;
        const auto read = [&](DeviceSpan<std::byte> pool, int64_t element) {
          absl::StatusOr<Bytes> bytes = Download(*this->stream_, pool.Sub(element * 2, kDim * 2));
          EXPECT_OK(bytes);
          std::vector<uint16_t> values(kDim);
          std::memcpy(values.data(), bytes->data(), kDim * 2);
          return values;
        };
        const auto row = [&](const DeviceSpan<uint16_t>& from) {
          absl::StatusOr<std::vector<uint16_t>> values =
              Download(*this->stream_, from.Sub((t * kHeads + head) * kDim, kDim));
          EXPECT_OK(values);
          return *values;
        };
        ASSERT_EQ(read(k, at), row(k_new)) << ToString(layout) << ", token " << t << ", head " << head;
        ASSERT_EQ(read(v, at), row(v_new)) << ToString(layout) << ", token " << t << ", head " << head;
        // Where the row would be, had its offset wrapped.
        for (const int64_t wrapped :
             {at % (int64_t{1} << 32), at % (int64_t{1} << 31), at * 2 % (int64_t{1} << 32) / 2}) {
          if (wrapped != at) {
            ASSERT_EQ(read(k, wrapped), std::vector<uint16_t>(kDim, 0)) << "token " << t << ", head " << head;
          }
        }
      }
    }
  }
}

TYPED_TEST(AttentionMemoryRegression, SglKernel32BitOffsetsOfADecodePast4GElementsDoNotWrap) {
  const DecodeShape shape = {.dtype = DType::kBFloat16, .page_size = 16, .seed = 823};
  const size_t page = size_t{2} * shape.page_size * shape.kv_heads * shape.head_dim;  // bytes
  const DecodeCase step(shape, {40, 100, 7, 64}, Ints(4, -1));
  // Every page of the step lies past 2^32 elements; where offsets of 32 bits would look there is NaN.
  const int64_t first = (int64_t{1} << 33) / static_cast<int64_t>(page);
  const size_t bytes = (first + step.num_pages()) * page;
  const DeviceSpan<std::byte> k = this->Vast(bytes), v = this->Vast(bytes);
  if (k.empty() || v.empty()) GTEST_SKIP() << "this machine does not give " << 2 * bytes << " bytes";
  ASSERT_OK_AND_ASSIGN(this->rig_,
                       DecodeRig::Create(*this->device_, *this->stream_, shape,
                                         {.buckets = {4}, .max_length = 128, .num_pages = step.num_pages()}));
  DecodeRig& rig = *this->rig_;
  Ints far(step.indices());
  for (int32_t& number : far) number += static_cast<int32_t>(first);
  rig.tensors.k = k;
  rig.tensors.v = v;
  rig.tensors.kv_indices = this->Put(far);
  ASSERT_OK(rig.Load(step));
  for (const bool values : {false, true}) {
    const DeviceSpan<std::byte> pool = values ? v : k;
    const Bytes pages = step.Pool(values);
    ASSERT_OK(this->stream_->Fill(pool.Sub(0, pages.size()), std::byte{0xff}));
    ASSERT_OK(this->stream_->Fill(pool.Sub(size_t{1} << 32, pages.size()), std::byte{0xff}));
    ASSERT_OK(Upload(*this->stream_, pool.Sub(first * page, pages.size()), pages));
  }
  ASSERT_OK(rig.Begin(4, step, 4));
  ASSERT_OK(rig.RunEagerly(4, 4));
  EXPECT_EQ(rig.Check(4, step, 4), "");
}

TYPED_TEST(AttentionMemoryRegression, SglKernel32BitOffsetsOfAPrefillPast4GElementsDoNotWrap) {
  PrefillShape shape = {.dtype = DType::kBFloat16, .kv_dtype = DType::kBFloat16, .page_size = 16, .seed = 824};
  const size_t page = size_t{2} * shape.page_size * shape.kv_heads * shape.head_dim;  // bytes
  const int64_t first = (int64_t{1} << 33) / static_cast<int64_t>(page);
  const PrefillCase size_of(shape, {40, 7, 1, 33}, {100, 7, 64, 40});
  const size_t bytes = (first + size_of.num_pages()) * page;
  const DeviceSpan<std::byte> k = this->Vast(bytes), v = this->Vast(bytes);
  if (k.empty() || v.empty()) GTEST_SKIP() << "this machine does not give " << 2 * bytes << " bytes";
  // Every page of the step lies past 2^32 elements; where offsets of 32 bits would look there is NaN.
  for (const KvLayout layout : {KvLayout::kNHD, KvLayout::kHND}) {
    shape.layout = layout;
    const PrefillCase step(shape, {40, 7, 1, 33}, {100, 7, 64, 40});
    const Extent bucket = {5, 90};
    for (const bool values : {false, true}) {
      const DeviceSpan<std::byte> pool = values ? v : k;
      const Bytes pages = step.Pool(values);
      ASSERT_OK(this->stream_->Fill(pool.Sub(0, pages.size()), std::byte{0xff}));
      ASSERT_OK(this->stream_->Fill(pool.Sub(size_t{1} << 32, pages.size()), std::byte{0xff}));
      ASSERT_OK(Upload(*this->stream_, pool.Sub(first * page, pages.size()), pages));
    }
    Ints far(step.indices());
    for (int32_t& number : far) number += static_cast<int32_t>(first);
    const DeviceSpan<int32_t> far_indices = this->Put(far);
    for (const attention::PrefillVariant* const variant : RunnableVariants(*this->device_, shape)) {
      SCOPED_TRACE(absl::StrCat(variant->kernel.name, ": ", shape.ToString()));
      ASSERT_OK_AND_ASSIGN(
          const std::unique_ptr<PrefillRig> rig,
          PrefillRig::Create(
              *this->device_, *this->stream_, shape,
              {.buckets = {bucket}, .max_length = 100, .num_pages = step.num_pages(), .variant = variant}));
      ASSERT_OK(rig->Load(step));
      rig->tensors.k = k;
      rig->tensors.v = v;
      rig->tensors.kv_indices = far_indices;
      ASSERT_OK(rig->Begin(bucket, step));
      ASSERT_OK(rig->RunEagerly(bucket, step));
      EXPECT_EQ(rig->Check(bucket, step), "");
    }
  }
}

}  // namespace
}  // namespace pristine::testing
