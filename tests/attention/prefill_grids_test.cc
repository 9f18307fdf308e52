// Parameter grids of other projects' prefill tests, over our kernels: FlashInfer's test_batch_prefill_kernels,
// test_hopper, test_trtllm_gen_attention_prefill, test_sliding_window, test_attention_sink, test_logits_cap,
// test_batch_attention and the ragged rows of test_xqa_batch_decode, FlashAttention-3's test_flash_attn_kvcache, vLLM's
// test_flash_attn. Batch sizes are ours where
// theirs repeat the same request. Host runs the small cells; CUDA compares a sample of the heads of large ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "tests/attention/prefill_rig.h"

namespace pristine::testing {
namespace {

using attention::DType;
using attention::KvLayout;

template <class BackendT>
class PrefillGridTest : public PrefillTest<BackendT> {
 protected:
  // `batch` requests of `qo` queries at the end of `kv` tokens.
  void Expect(const PrefillShape& shape, int32_t batch, int32_t qo, int32_t kv) {
    constexpr int64_t kHostWork = 30'000;  // products of query and key vectors
    if (this->on_host()) batch = 1;
    const int64_t work = int64_t{batch} * qo * shape.q_heads * kv * shape.head_dim / 64;
    if (this->on_host() && work > kHostWork) return;
    const PrefillCase step(shape, std::vector<int32_t>(batch, qo), std::vector<int32_t>(batch, kv));
    constexpr int64_t kCheckedWork = 300'000;
    this->ExpectAttention(step, {batch, batch * qo}, 1 + work / kCheckedWork);
    cells_++;
  }
  void TearDown() override {
    EXPECT_TRUE(this->IsSkipped() || cells_ > 0) << "no cell ran";
    PrefillTest<BackendT>::TearDown();
  }
  int cells_ = 0;
};
TYPED_TEST_SUITE(PrefillGridTest, AllBackends, BackendNames);

TYPED_TEST(PrefillGridTest, FlashInferBatchPrefill) {
  uint64_t seed = 5000;
  for (const auto& [kv, qo] : {std::pair{54, 37}, {54, 17}, {97, 37}, {97, 17}, {512, 127}, {2048, 577}}) {
    for (const int32_t page_size : {1, 5, 16}) {
      for (const int32_t head_dim : {64, 128, 256}) {
        for (const int32_t q_heads : {4, 32}) {
          PrefillShape shape = {
              .dtype = DType::kFloat16, .kv_dtype = DType::kFloat16, .q_heads = q_heads, .kv_heads = 4};
          shape.head_dim = head_dim;
          shape.page_size = page_size;
          shape.seed = ++seed;
          if (this->on_host() && (q_heads == 32 || seed % 3 != 0)) continue;
          this->Expect(shape, kv > 500 ? 2 : 12, qo, kv);
        }
      }
    }
  }
}

// Its two generations of kernels over the same inputs: whole prompts of lengths that fit no tile, and the end of a long
// one.
TYPED_TEST(PrefillGridTest, FlashInferHopper) {
  uint64_t seed = 5100;
  for (const int32_t length : {11, 12, 99, 1763, 9999, 32767}) {
    for (const int32_t page_size : {1, 16}) {
      for (const int32_t kv_heads : {1, 4, 8}) {
        for (const int32_t head_dim : {64, 128, 256}) {
          ++seed;
          const int32_t group = 8 / kv_heads;
          if (length > 1000 && (kv_heads != 1 || static_cast<int32_t>(seed % 2) != page_size / 16)) continue;
          PrefillShape shape = {.dtype = seed % 2 == 0 ? DType::kFloat16 : DType::kBFloat16};
          shape.kv_dtype = shape.dtype;
          shape.q_heads = length > 1000 ? 2 : kv_heads * (seed % 3 == 0 ? 1 : group);
          shape.kv_heads = kv_heads;
          shape.head_dim = head_dim;
          shape.page_size = page_size;
          shape.soft_cap = seed % 4 < 2 ? 0.0f : 30.0f;
          shape.seed = seed;
          constexpr int32_t kBatches[] = {1, 4, 8, 16};
          this->Expect(shape, length > 1000 ? 1 : kBatches[seed % 4], std::min(length, 2000), length);
        }
      }
    }
  }
}

// Up to 511 queries at the end of up to 2047 tokens, ragged, large pages included; and a long prompt by itself.
TYPED_TEST(PrefillGridTest, FlashInferTrtllmGenPrefill) {
  uint64_t seed = 5150;
  for (const int32_t page_size : {16, 32, 64, 128, 1024}) {
    for (const int32_t head_dim : {128, 256}) {
      for (const DType kv_dtype : {DType::kBFloat16, DType::kFloat8E4M3}) {
        PrefillShape shape = {.dtype = DType::kBFloat16, .kv_dtype = kv_dtype, .q_heads = 8, .kv_heads = 2};
        shape.head_dim = head_dim;
        shape.page_size = page_size;
        shape.layout = ++seed % 2 == 0 ? KvLayout::kNHD : KvLayout::kHND;
        shape.block_table = true;
        shape.seed = seed;
        if (this->on_host()) {
          this->Expect(shape, 1, 3, 70);
          continue;
        }
        this->ExpectAttention(PrefillCase(shape, {511, 1, 130, 77}, {2047, 1025, 130, 512}), {5, 800}, 31);
        this->cells_++;
      }
      PrefillShape shape = {.dtype = DType::kBFloat16, .kv_dtype = DType::kBFloat16, .q_heads = 2, .kv_heads = 1};
      shape.head_dim = head_dim;
      shape.page_size = page_size;
      shape.seed = ++seed;
      this->Expect(shape, 1, 8192, 8192);
    }
  }
}

TYPED_TEST(PrefillGridTest, FlashInferSlidingWindow) {
  uint64_t seed = 5200;
  for (const int32_t window : {13, 33, 111}) {
    for (const auto& [kv, qo] : {std::pair{64, 1}, {199, 33}, {513, 111}}) {
      for (const int32_t head_dim : {64, 128, 256}) {
        PrefillShape shape = {.dtype = DType::kFloat16, .kv_dtype = DType::kFloat16, .head_dim = head_dim};
        shape.page_size = seed % 2 == 0 ? 1 : 16;
        shape.window = window;
        shape.seed = ++seed;
        this->Expect(shape, 3, qo, kv);
      }
    }
  }
}

TYPED_TEST(PrefillGridTest, FlashInferAttentionSink) {
  uint64_t seed = 5300;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int32_t length : {1, 4, 16, 128}) {
      for (const int32_t kv_heads : {8, 32}) {
        for (const int32_t window : {0, 128}) {
          PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .q_heads = 32, .kv_heads = kv_heads, .sinks = true};
          shape.head_dim = 128;
          shape.window = window;
          shape.seed = ++seed;
          this->Expect(shape, 4, length, length);
          if (length > 4) this->Expect(shape, 4, 4, length);
        }
      }
    }
  }
}

TYPED_TEST(PrefillGridTest, FlashInferLogitsCap) {
  uint64_t seed = 5400;
  for (const int32_t length : {1, 9, 81, 729}) {
    for (const float cap : {1.0f, 30.0f, 50.0f}) {
      for (const int32_t head_dim : {128, 256}) {
        PrefillShape shape = {.dtype = DType::kFloat16, .kv_dtype = DType::kFloat16, .head_dim = head_dim};
        shape.soft_cap = cap;
        shape.spread = 4;
        shape.seed = ++seed;
        this->Expect(shape, 1, length, length);
        if (length > 81) this->Expect(shape, 1, 9, length);
      }
    }
  }
}

TYPED_TEST(PrefillGridTest, FlashInferBatchAttention) {
  uint64_t seed = 5500;
  for (const int32_t group : {1, 4, 7, 8}) {
    for (const int32_t kv_heads : {1, 4}) {
      for (const int32_t page_size : {1, 8, 16}) {
        for (const int32_t head_dim : {64, 128, 256}) {
          PrefillShape shape = {.dtype = DType::kBFloat16, .kv_dtype = DType::kFloat8E4M3, .head_dim = head_dim};
          shape.q_heads = group * kv_heads;
          shape.kv_heads = kv_heads;
          shape.page_size = page_size;
          shape.layout = seed % 2 == 0 ? KvLayout::kNHD : KvLayout::kHND;
          shape.soft_cap = seed % 3 == 0 ? 50.0f : 0.0f;
          shape.v_scale = 2;
          shape.seed = ++seed;
          if (this->on_host() && seed % 4 != 0) continue;
          this->Expect(shape, 2, 17, 146);
        }
      }
    }
  }
}

// test_xqa_batch_decode with requests of different numbers of queries, which decode kernels do not take.
TYPED_TEST(PrefillGridTest, FlashInferXqaRaggedQueries) {
  uint64_t seed = 5550;
  for (const std::vector<int32_t>& qo_lens :
       {std::vector<int32_t>{1, 3, 2, 4}, {5, 1, 3, 2}, {1, 4, 2, 3}, {5, 0, 3, 2}}) {
    for (const auto& [dtype, kv_dtype] : {std::pair{DType::kBFloat16, DType::kBFloat16},
                                          {DType::kFloat16, DType::kFloat16},
                                          {DType::kBFloat16, DType::kFloat8E4M3},
                                          {DType::kFloat16, DType::kFloat8E4M3}}) {
      for (const int32_t window : {0, 127}) {
        PrefillShape shape = {.dtype = dtype, .kv_dtype = kv_dtype, .q_heads = 12, .kv_heads = 2};
        shape.head_dim = 128;
        shape.page_size = seed % 2 == 0 ? 16 : 64;
        shape.layout = seed % 3 == 0 ? KvLayout::kNHD : KvLayout::kHND;
        shape.window = window;
        shape.sinks = seed % 5 < 2;
        shape.block_table = seed % 7 < 3;
        shape.seed = ++seed;
        if (this->on_host() && seed % 8 != 0) continue;
        const PrefillCase step(shape, qo_lens, {110, 5, 77, 64});
        this->ExpectAttention(step, {4, 16});
        this->cells_++;
      }
    }
  }
}

TYPED_TEST(PrefillGridTest, FlashAttentionKvCache) {
  uint64_t seed = 5600;
  for (const auto& [qo, kv] : {std::pair{1, 128},
                               {1, 339},
                               {3, 1024},
                               {64, 800},
                               {64, 256},
                               {3, 799},
                               {64, 2048},
                               {16, 20000},
                               {128, 128},
                               {256, 512},
                               {2048, 3577}}) {
    for (const int32_t kv_heads : {6, 2, 1}) {
      PrefillShape shape = {
          .dtype = DType::kBFloat16, .kv_dtype = DType::kBFloat16, .q_heads = 6, .kv_heads = kv_heads};
      const int32_t page_sizes[] = {1, 4, 128};
      shape.head_dim = 128;
      shape.page_size = page_sizes[seed % 3];
      shape.block_table = seed % 2 == 0;
      shape.seed = ++seed;
      this->Expect(shape, qo * kv > 100'000 ? 1 : 5, qo, kv);
    }
  }
}

TYPED_TEST(PrefillGridTest, VllmFlashAttention) {
  uint64_t seed = 5700;
  for (const auto& [q_heads, kv_heads] : {std::pair{4, 4}, {8, 2}}) {
    for (const int32_t head_dim : {128, 256}) {
      for (const int32_t window : {0, 256}) {
        for (const float cap : {0.0f, 50.0f}) {
          for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
            PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .q_heads = q_heads, .kv_heads = kv_heads};
            shape.head_dim = head_dim;
            shape.page_size = 16;
            shape.window = window;
            shape.soft_cap = cap;
            shape.seed = ++seed;
            if (this->on_host()) {
              this->Expect(shape, 1, 5, 18);
              continue;
            }
            // Its ragged step: (query, KV) lengths of each request.
            const PrefillCase step(shape, {1, 5, 129}, {1328, 18, 463});
            this->ExpectAttention(step, {3, 135}, 7);
            this->cells_++;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace pristine::testing
