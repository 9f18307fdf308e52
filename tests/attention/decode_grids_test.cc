// Parameter grids of other projects' decode tests, over our kernels, each test named after where its grid comes from.
// Parameters that say nothing about each other take turns instead of being multiplied; buckets are as large as theirs,
// but only as many rows are real as keep a cell to some million elements of K. CUDA runs all cells and compares a
// sample of the heads of large ones; Host runs small cells.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "pristine/attention/paged_prefill.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DecodeScheduler;
using attention::DType;
using attention::KvLayout;

constexpr DType kF16 = DType::kFloat16, kBf16 = DType::kBFloat16, kF8 = DType::kFloat8E4M3;

template <class BackendT>
class DecodeGridTest : public DecodeRigTest<BackendT> {
 protected:
  bool OnHost() const { return this->device_->backend() == Backend::kHost; }
  // Differs from cell to cell, and decides what takes turns.
  uint64_t NextSeed() { return ++seed_; }
  bool Turn(uint64_t of) const { return seed_ % of == 0; }
  RigOptions Options() const {
    return {.scheduler = Turn(2) ? DecodeScheduler::kDevice : DecodeScheduler::kHost, .block_table = Turn(3)};
  }

  // The first rows of `lengths`, at least one, that keep K to `most` elements; none where that is too much for Host.
  std::vector<int32_t> Fitting(const DecodeShape& shape, std::vector<int32_t> lengths, int64_t most = 1'000'000) const {
    const int64_t token = int64_t{shape.kv_heads} * shape.head_dim;
    if (OnHost() && lengths[0] * token > 60'000) return {};
    int64_t elements = 0;
    size_t rows = 0;
    for (; rows < lengths.size(); ++rows) {
      elements += lengths[rows] * token;
      if (rows > 0 && elements > (OnHost() ? 30'000 : most)) break;
    }
    lengths.resize(rows);
    return lengths;
  }
  // Heads cost what their keys do.
  int64_t Stride(const DecodeShape& shape, const DecodeCase& step, int32_t bucket) const {
    const int64_t longest = std::max(1, *std::max_element(step.lengths().begin(), step.lengths().end()));
    const int64_t checked = 3 + (OnHost() ? 30'000 : 500'000) / (longest * shape.head_dim);
    return (int64_t{bucket} * shape.q_heads * shape.q_len / checked) | 1;  // odd: no power of two heads are skipped
  }
  void Expect(const DecodeShape& shape, const std::vector<int32_t>& lengths, const RigOptions& given,
              int64_t most = 1'000'000) {
    const std::vector<int32_t> fitting = Fitting(shape, lengths, most);
    if (fitting.empty()) return;
    const int32_t bucket = static_cast<int32_t>(lengths.size());
    std::vector<int32_t> needles(fitting.size(), -1);
    if (Turn(2) && fitting[0] > 0) needles[0] = fitting[0] - 1;
    const DecodeCase step(shape, fitting, needles);
    EXPECT_EQ(this->Run(step, bucket, given, Stride(shape, step, bucket)), "")
        << shape.ToString() << ", " << lengths.size() << " rows, the first of " << lengths[0];
    ++cells_;
  }
  // Replays `lengths` from the graph of `bucket`, over a pool of its own.
  void ExpectReplay(const DecodeShape& shape, int32_t bucket, const std::vector<int32_t>& lengths) {
    const DecodeCase step(shape, lengths, std::vector<int32_t>(lengths.size(), -1));
    ASSERT_OK(this->rig_->Load(step));
    ASSERT_OK(this->rig_->Begin(bucket, step, step.rows()));
    ASSERT_OK(this->rig_->Replay(bucket, step.rows()));
    EXPECT_EQ(this->rig_->Check(bucket, step, step.rows(), Stride(shape, step, bucket)), "")
        << shape.ToString() << ", the first row of " << lengths[0];
    ++cells_;
  }
  std::vector<int32_t> RandomLengths(int32_t rows, int32_t most) {
    std::mt19937_64 random(seed_);
    std::vector<int32_t> lengths(rows);
    for (int32_t& length : lengths) length = 1 + static_cast<int32_t>(random() % most);
    return lengths;
  }
  static std::vector<int32_t> Equal(int32_t rows, int32_t length) { return std::vector<int32_t>(rows, length); }

  void TearDown() override {
    EXPECT_TRUE(this->IsSkipped() || cells_ > 0) << "no cell ran";
    DecodeRigTest<BackendT>::TearDown();
  }
  uint64_t seed_ = 7000;
  int cells_ = 0;
};
TYPED_TEST_SUITE(DecodeGridTest, AllBackends, BackendNames);

TYPED_TEST(DecodeGridTest, FlashInferBatchDecode) {
  constexpr int32_t kBatches[] = {12, 17, 128};
  for (const int32_t length : {54, 97, 512, 2048, 16384}) {
    for (const int32_t page_size : {1, 8, 16}) {
      for (const int32_t q_heads : {4, 32}) {
        for (const int32_t head_dim : {128, 256}) {
          const uint64_t seed = this->NextSeed();
          if (this->OnHost() && !this->Turn(3)) continue;
          if (length == 16384 && (page_size == 8 || q_heads == 4)) continue;
          const DecodeShape shape = {.dtype = kF16,
                                     .q_heads = q_heads,
                                     .kv_heads = 4,
                                     .head_dim = head_dim,
                                     .page_size = page_size,
                                     .seed = seed,
                                     .kv_dtype = seed % 4 < 2 ? kF16 : kF8};
          const int32_t batch = kBatches[seed % std::size(kBatches)];
          const bool whole = batch == 128 && length == 54 && head_dim == 128;
          this->Expect(shape, this->Equal(batch, length), this->Options(), whole ? 4'000'000 : 1'000'000);
        }
      }
    }
  }
}

// Its CUDA graph variants: planned and captured with one page for each request, replayed with more and with all.
TYPED_TEST(DecodeGridTest, FlashInferGraphOfBatchDecode) {
  for (const int32_t length : {54, 2048, 16384}) {
    for (const int32_t page_size : {1, 8, 16}) {
      for (const int32_t head_dim : {128, 256}) {
        const DecodeShape shape = {.dtype = kF16,
                                   .q_heads = 32,
                                   .kv_heads = 4,
                                   .head_dim = head_dim,
                                   .page_size = page_size,
                                   .seed = this->NextSeed(),
                                   .kv_dtype = this->Turn(2) ? kF16 : kF8};
        if (this->OnHost() && head_dim == 256) continue;
        if (length == 16384 && !this->Turn(3)) continue;
        const std::vector<int32_t> all = this->Fitting(shape, this->Equal(17, length));
        if (all.empty()) continue;
        const int32_t rows = static_cast<int32_t>(all.size());
        const DecodeCase one_page(shape, this->Equal(rows, page_size), this->Equal(rows, -1));
        RigOptions options = this->Options();
        options.buckets = {17};
        options.max_length = length;
        options.num_pages = DecodeCase(shape, all, this->Equal(rows, -1)).num_pages();
        ASSERT_OK(this->Prepare(one_page, options));
        ASSERT_OK(this->rig_->Begin(17, one_page, rows));
        ASSERT_OK(this->rig_->RunEagerly(17, rows));
        EXPECT_EQ(this->rig_->Check(17, one_page, rows, 7), "");
        ASSERT_OK(this->rig_->Capture());
        for (const int32_t pages : {1, 2, 3}) {
          this->ExpectReplay(shape, 17, this->Equal(rows, std::min(length, pages * page_size)));
        }
        this->ExpectReplay(shape, 17, all);
      }
    }
  }
}

TYPED_TEST(DecodeGridTest, FlashInferGraphOfUniformMultiTokenDecode) {
  for (const int32_t batch : {4, 8}) {
    for (const int32_t q_len : {2, 3}) {
      for (const int32_t kv_heads : {2, 8}) {
        for (const int32_t group : {4, 8}) {
          if (this->OnHost() && (batch == 8 || kv_heads == 8 || group != 4 * (q_len - 1))) continue;
          const DecodeShape shape = {.dtype = kBf16,
                                     .q_heads = kv_heads * group,
                                     .kv_heads = kv_heads,
                                     .head_dim = 128,
                                     .page_size = 16,
                                     .seed = this->NextSeed(),
                                     .q_len = q_len};
          const DecodeCase captured(shape, this->Equal(batch, 129), this->Equal(batch, -1));
          RigOptions options = this->Options();
          options.buckets = {batch};
          options.max_length = 129;
          ASSERT_OK(this->Prepare(captured, options));
          ASSERT_OK(this->rig_->Capture());
          for (std::vector<int32_t> lengths : {std::vector<int32_t>{33, 17, 65, 129}, {q_len, 128, 64, 100}}) {
            if (batch == 8) lengths.insert(lengths.end(), lengths.begin(), lengths.begin() + 4);
            this->ExpectReplay(shape, batch, lengths);
          }
        }
      }
    }
  }
}

TYPED_TEST(DecodeGridTest, FlashInferTensorCoresDecode) {
  for (const int32_t group : {1, 4, 8}) {
    for (const int32_t head_dim : {128, 256}) {
      for (const int32_t page_size : {1, 8, 16}) {
        for (const int32_t length : {54, 97, 512}) {
          const uint64_t seed = this->NextSeed();
          if (this->OnHost() && !this->Turn(4)) continue;
          const DecodeShape shape = {.dtype = kF16,
                                     .q_heads = 4 * group,
                                     .kv_heads = 4,
                                     .head_dim = head_dim,
                                     .page_size = page_size,
                                     .seed = seed,
                                     .layout = seed % 2 == 0 ? KvLayout::kNHD : KvLayout::kHND};
          this->Expect(shape, this->Equal(seed % 4 < 2 ? 12 : 17, length), this->Options());
        }
      }
      for (const int32_t length : {54, 128, 999, 32789}) {  // one request
        const int32_t kv_heads = length > 1000 ? 1 : 4;
        const DecodeShape shape = {.dtype = kF16,
                                   .q_heads = kv_heads * group,
                                   .kv_heads = kv_heads,
                                   .head_dim = head_dim,
                                   .page_size = 16,
                                   .seed = this->NextSeed(),
                                   .layout = this->Turn(2) ? KvLayout::kNHD : KvLayout::kHND};
        if (length > 1000 && group * 32 != head_dim) continue;
        this->Expect(shape, {length}, this->Options());
      }
    }
  }
}

TYPED_TEST(DecodeGridTest, FlashInferSlidingWindow) {
  for (const int32_t batch : {1, 3, 13, 32}) {
    for (const int32_t length : {1, 3, 99, 199, 1999}) {
      for (const int32_t window : {33, 533}) {
        for (const int32_t head_dim : {64, 128, 256}) {
          const DecodeShape shape = {.dtype = kF16,
                                     .q_heads = 8,
                                     .kv_heads = 2,
                                     .head_dim = head_dim,
                                     .page_size = this->Turn(2) ? 1 : 16,
                                     .window = window,
                                     .seed = this->NextSeed()};
          if (this->OnHost() && length > 3 && !this->Turn(5)) continue;
          this->Expect(shape, this->Equal(batch, length), this->Options());
        }
      }
    }
  }
}

TYPED_TEST(DecodeGridTest, FlashInferLogitsCap) {
  for (const int32_t length : {1, 9, 81, 729, 33001}) {
    for (const float cap : {1.0f, 30.0f, 50.0f}) {
      for (const int32_t head_dim : {128, 256}) {
        const DecodeShape shape = {.dtype = kF16,
                                   .q_heads = 4,
                                   .kv_heads = length > 1000 ? 1 : 4,
                                   .head_dim = head_dim,
                                   .page_size = 16,
                                   .seed = this->NextSeed(),
                                   .soft_cap = cap};
        if (length > 1000 && (head_dim == 256) != (cap == 30)) continue;
        this->Expect(shape, {length}, this->Options());
      }
    }
  }
}

TYPED_TEST(DecodeGridTest, FlashInferAttentionSink) {
  for (const DType dtype : {kF16, kBf16}) {
    for (const int32_t batch : {1, 4, 16}) {
      for (const int32_t length : {1, 4, 16, 128}) {
        for (const int32_t kv_heads : {8, 32}) {
          for (const int32_t window : {0, 128}) {
            const DecodeShape shape = {.dtype = dtype,
                                       .q_heads = 32,
                                       .kv_heads = kv_heads,
                                       .head_dim = 128,
                                       .page_size = 16,
                                       .window = window,
                                       .seed = this->NextSeed(),
                                       .sinks = true};
            if (this->OnHost() && !this->Turn(3)) continue;
            this->Expect(shape, this->Equal(batch, length), this->Options());
          }
        }
      }
    }
  }
}

TYPED_TEST(DecodeGridTest, FlashInferFloat8CalibrationScale) {
  const auto expect = [this](int32_t batch, int32_t length, int32_t head_dim, int32_t page_size, int32_t kv_heads) {
    const DecodeShape shape = {.dtype = kF16,
                               .q_heads = 4 * kv_heads,
                               .kv_heads = kv_heads,
                               .head_dim = head_dim,
                               .page_size = page_size,
                               .seed = this->NextSeed(),
                               .kv_dtype = kF8,
                               .k_scale = 0.0156f,  // about max / 256 and max / 448 of their values
                               .v_scale = 0.0091f};
    if (this->OnHost() && length > 20 && !this->Turn(3)) return;
    this->Expect(shape, this->Equal(batch, length), this->Options());
  };
  for (const int32_t head_dim : {128, 256}) {
    for (const int32_t length : {7, 19, 39, 1170, 39275}) {
      if (length < 10000 || head_dim == 128) expect(1, length, head_dim, 16, length < 10000 ? 4 : 1);
    }
    for (const int32_t length : {54, 97}) {
      for (const int32_t page_size : {1, 8, 16}) {
        for (const int32_t batch : {12, 17}) expect(batch, length, head_dim, page_size, 4);
      }
    }
  }
}

// Its shapes; K and V of ours are pools of their own.
TYPED_TEST(DecodeGridTest, FlashInferNonContiguousDecode) {
  for (const int32_t batch : {1, 19, 99}) {
    for (const int32_t page_size : {1, 5}) {
      for (const int32_t kv_heads : {1, 4, 8}) {
        for (const int32_t head_dim : {64, 128, 256}) {
          const DecodeShape shape = {.dtype = kF16,
                                     .q_heads = kv_heads * (head_dim == 128 ? 8 : 1),
                                     .kv_heads = kv_heads,
                                     .head_dim = head_dim,
                                     .page_size = page_size,
                                     .seed = this->NextSeed()};
          if (this->OnHost() && !this->Turn(2)) continue;
          this->Expect(shape, this->RandomLengths(batch, 100), this->Options());
        }
      }
    }
  }
}

// FlashInfer, test_decode_prefill_lse: a case that once failed in MLC. The two families agree in outputs and LSE.
TYPED_TEST(DecodeGridTest, FlashInferDecodeAndPrefillLse) {
  const int32_t heads = this->OnHost() ? 4 : 32;
  const DecodeShape shape = {.dtype = kF16,
                             .q_heads = heads,
                             .kv_heads = heads,
                             .head_dim = 128,
                             .page_size = 16,
                             .seed = this->NextSeed(),
                             .layout = KvLayout::kHND};
  const DecodeCase step(shape, {0, 8 * 16 + 1}, {-1, -1});
  ASSERT_OK(this->Prepare(step, {.buckets = {2}}));
  ASSERT_OK(this->rig_->Begin(2, step, 2));
  ASSERT_OK(this->rig_->RunEagerly(2, 2));
  EXPECT_EQ(this->rig_->Check(2, step, 2), "");

  const attention::DecodeTensors& decode = this->rig_->tensors;
  ASSERT_OK(this->stream_->Fill(decode.out, std::byte{0xff}));
  ASSERT_OK(this->stream_->Fill(AsWritableBytes(decode.lse), std::byte{0xff}));
  ASSERT_OK_AND_ASSIGN(const DeviceBuffer qo_indptr, this->device_->Allocate(3 * sizeof(int32_t), "qo_indptr"));
  ASSERT_OK(Upload(*this->stream_, qo_indptr.As<int32_t>(), {0, 1, 2}));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<attention::PagedPrefill> prefill,
                       attention::PagedPrefill::Create(*this->device_, {.q_heads = heads,
                                                                        .kv_heads = heads,
                                                                        .head_dim = 128,
                                                                        .dtype = kF16,
                                                                        .kv_dtype = kF16,
                                                                        .layout = KvLayout::kHND,
                                                                        .page_size = 16,
                                                                        .scale = 1 / std::sqrt(128.0f)}));
  ASSERT_OK(prefill->Run(*this->stream_, {2, 2},
                         {.q = decode.q,
                          .k = decode.k,
                          .v = decode.v,
                          .out = decode.out,
                          .lse = decode.lse,
                          .qo_indptr = qo_indptr.As<const int32_t>(),
                          .kv_indptr = decode.kv_indptr,
                          .kv_indices = decode.kv_indices,
                          .lengths = decode.lengths}));
  ASSERT_OK(this->rig_->ReadBack());
  EXPECT_EQ(this->rig_->Check(2, step, 2), "");
  ++this->cells_;
}

TYPED_TEST(DecodeGridTest, FlashInferCudnnDecode) {
  for (const int32_t batch : {8, 16, 32}) {
    for (const int32_t length : {512, 8192}) {
      const int32_t kv_heads = this->OnHost() ? 1 : length > 1000 ? 2 : 8;
      const DecodeShape shape = {.dtype = kBf16,
                                 .q_heads = 4 * kv_heads,
                                 .kv_heads = kv_heads,
                                 .head_dim = this->OnHost() ? 64 : 128,
                                 .page_size = 16,
                                 .seed = this->NextSeed()};
      this->Expect(shape, this->RandomLengths(batch, length), this->Options());
    }
  }
}

// test_xqa_batch_decode and the shapes that test_trtllm_gen_attention_decode_xqa adds.
TYPED_TEST(DecodeGridTest, FlashInferXqaBatchDecode) {
  struct Shape {
    int32_t batch, q_len, page_size, kv_heads, group, head_dim = 128;
  };
  const Shape shapes[] = {{4, 4, 64, 4, 2},      {4, 2, 16, 2, 4},     {4, 3, 32, 2, 6},   {4, 1, 16, 2, 1},
                          {4, 1, 32, 2, 5},      {128, 1, 64, 2, 6},   {256, 1, 64, 4, 8}, {4, 1, 32, 2, 16},
                          {4, 4, 32, 2, 16},     {4, 5, 64, 4, 8},     {128, 2, 32, 2, 5}, {128, 3, 16, 4, 1},
                          {4, 1, 16, 2, 8, 256}, {4, 4, 64, 2, 4, 256}};
  const std::pair<DType, DType> dtypes[] = {{kBf16, kBf16}, {kF16, kF16}, {kBf16, kF8}, {kF16, kF8}};
  for (const Shape& s : shapes) {
    for (const auto& [dtype, kv_dtype] : dtypes) {
      for (const int32_t window : {0, 127}) {
        const uint64_t seed = this->NextSeed();
        if (this->OnHost() && seed % 4 != 0) continue;
        const DecodeShape shape = {.dtype = dtype,
                                   .q_heads = s.kv_heads * s.group,
                                   .kv_heads = s.kv_heads,
                                   .head_dim = s.head_dim,
                                   .page_size = s.page_size,
                                   .window = window,
                                   .seed = seed,
                                   .q_len = s.q_len,
                                   .kv_dtype = kv_dtype,
                                   .layout = seed % 3 == 0 ? KvLayout::kNHD : KvLayout::kHND,
                                   .sinks = seed % 5 < 2};
        const bool whole = s.batch == 128 && window == 0 && kv_dtype == kF8;
        this->Expect(shape, this->RandomLengths(s.batch, 110), this->Options(), whole ? 2'000'000 : 1'000'000);
      }
    }
  }
  for (const int32_t length : {300, 30000}) {  // speculation under a window
    for (const int32_t window : {63, 127}) {
      const DecodeShape shape = {.dtype = kBf16,
                                 .q_heads = 8,
                                 .kv_heads = 1,
                                 .head_dim = 128,
                                 .page_size = 32,
                                 .window = window,
                                 .seed = this->NextSeed(),
                                 .q_len = 4};
      this->Expect(shape, {length, length / 3}, this->Options());
    }
  }
}

// test_xqa: the kernel by itself.
TYPED_TEST(DecodeGridTest, FlashInferXqa) {
  for (const int32_t batch : {1, 4}) {
    for (const int32_t kv_heads : {2, 4}) {
      for (const int32_t page_size : {16, 64}) {
        for (const int32_t length : {32, 128}) {
          for (const int32_t group : {8, 16}) {
            const uint64_t seed = this->NextSeed();
            if (this->OnHost() && seed % 4 != 0) continue;
            const DecodeShape shape = {.dtype = seed % 2 == 0 ? kF16 : kBf16,
                                       .q_heads = kv_heads * group,
                                       .kv_heads = kv_heads,
                                       .head_dim = 128,
                                       .page_size = page_size,
                                       .seed = seed,
                                       .kv_dtype = seed % 3 == 0   ? kF8
                                                   : seed % 2 == 0 ? kF16
                                                                   : kBf16,
                                       .layout = seed % 5 < 2 ? KvLayout::kNHD : KvLayout::kHND,
                                       .sinks = seed % 7 < 3};
            this->Expect(shape, this->Equal(batch, length), this->Options());
          }
        }
      }
    }
  }
}

// test_trtllm_gen_attention_decode: pages of up to 1024 tokens (FlashInfer #4347: wrong above 128), one long request.
TYPED_TEST(DecodeGridTest, FlashInferTrtllmGenDecode) {
  for (const int32_t page_size : {16, 32, 64, 128, 256, 512, 1024}) {
    for (const int32_t head_dim : {128, 256}) {
      for (const int32_t length : {4096, 8192}) {
        const uint64_t seed = this->NextSeed();
        const DecodeShape shape = {.dtype = kBf16,
                                   .q_heads = 8,
                                   .kv_heads = 1,
                                   .head_dim = head_dim,
                                   .page_size = page_size,
                                   .window = seed % 3 == 0 ? 127 : 0,
                                   .seed = seed,
                                   .q_len = 1 + static_cast<int32_t>(seed % 5),
                                   .kv_dtype = seed % 4 < 2 ? kBf16 : kF8,
                                   .layout = seed % 2 == 0 ? KvLayout::kNHD : KvLayout::kHND};
        RigOptions options = this->Options();
        options.block_table = true;
        this->Expect(shape, {this->OnHost() ? length / 50 + 1 : length}, options);
      }
    }
  }
  for (const auto& [length, page_size] : {std::pair{33000, 64}, {131072, 1024}}) {
    const DecodeShape shape = {
        .dtype = kBf16, .q_heads = 8, .kv_heads = 1, .head_dim = 128, .page_size = page_size, .seed = this->NextSeed()};
    this->Expect(shape, {length}, this->Options());
  }
}

// hopper/test_flash_attn.py, test_flash_attn_kvcache: as many queries as decode takes. One split is the device's.
TYPED_TEST(DecodeGridTest, FlashAttentionKvCache) {
  for (const auto& [q_len, length] : {std::pair{1, 128}, {1, 339}, {3, 1024}, {3, 799}, {16, 20000}}) {
    for (const int32_t kv_heads : {6, 2, 1}) {
      for (const DecodeScheduler scheduler : {DecodeScheduler::kDevice, DecodeScheduler::kHost}) {
        constexpr int32_t kPageSizes[] = {1, 4, 128};
        const uint64_t seed = this->NextSeed();
        const DecodeShape shape = {.dtype = kBf16,
                                   .q_heads = 6,
                                   .kv_heads = kv_heads,
                                   .head_dim = 128,
                                   .page_size = kPageSizes[seed % 3],
                                   .seed = seed,
                                   .q_len = q_len};
        if (length == 20000 && (kv_heads == 6) != (scheduler == DecodeScheduler::kDevice)) continue;
        this->Expect(shape, this->Equal(5, length), {.scheduler = scheduler, .block_table = seed % 2 == 0});
      }
    }
  }
}

// FlashMLA, test_flash_mla_dense_decoding, over keys of our head_dim: requests without tokens, unused pages of NaN, and
// a block table whose unused columns are 2147480000.
TYPED_TEST(DecodeGridTest, FlashMlaDenseDecoding) {
  for (const int32_t batch : {1, 2, 6, 64}) {
    for (const int32_t q_len : {1, 2, 4}) {
      for (const int32_t length : {20, 140, 4096}) {
        const uint64_t seed = this->NextSeed();
        const int32_t heads[] = {1, 8, 32};
        const DecodeShape shape = {.dtype = seed % 2 == 0 ? kBf16 : kF16,
                                   .q_heads = heads[seed % 3],
                                   .kv_heads = 1,
                                   .head_dim = seed % 4 == 0 ? 256 : 128,
                                   .page_size = 64,
                                   .seed = seed,
                                   .q_len = q_len};
        std::vector<int32_t> lengths = this->RandomLengths(batch, length);
        for (size_t row = 0; row < lengths.size(); row += 3) lengths[row] = seed % 3 == 0 ? length : 0;
        RigOptions options = this->Options();
        options.block_table = true;
        this->Expect(shape, lengths, options);
      }
    }
  }
}

}  // namespace
}  // namespace pristine::testing
