// Target verify and what decode can do beyond the plain case, each against the oracle. The grids follow those of
// FlashInfer (uniform multi-token decode, sinks, window, logits cap, scales), XQA and FlashMLA (zero lengths, poisoned
// pages, wild table tails).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/variants.h"
#include "pristine/attention/paged_decode.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DecodeScheduler;
using attention::DecodeVariant;
using attention::DType;
using attention::KvLayout;

constexpr DecodeScheduler kSchedulers[] = {DecodeScheduler::kDevice, DecodeScheduler::kHost};
constexpr int32_t kTile = 64;  // tokens of the CUDA kernel's tile, whose edges are where rows may be cut

template <class BackendT>
class DecodeFeaturesTest : public DecodeRigTest<BackendT> {
 protected:
  bool OnHost() const { return this->device_->backend() == Backend::kHost; }
};
TYPED_TEST_SUITE(DecodeFeaturesTest, AllBackends, BackendNames);

uint64_t Seed() {
  const char* const given = std::getenv("PRISTINE_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : 20261121;
  std::printf("PRISTINE_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

TYPED_TEST(DecodeFeaturesTest, RandomCasesOfEveryVariantMatchTheOracle) {
  const uint64_t seed = Seed();
  std::mt19937_64 random(seed);
  const auto draw = [&random](int32_t low, int32_t high) {
    return low + static_cast<int32_t>(random() % static_cast<uint64_t>(high - low + 1));
  };
  const int cases = this->OnHost() ? 4 : 12;
  int counted = 0;  // goes on from variant to variant: a variant's few cases on Host need not be the others'
  for (const DecodeVariant& variant : attention::DecodeVariants()) {
    for (int n = 0; n < cases; ++n, ++counted) {
      constexpr int32_t kPageSizes[] = {1, 3, 16, 32, 64, 128};
      DecodeShape shape = {.dtype = variant.dtype,
                           .kv_heads = draw(1, 3),
                           .head_dim = variant.head_dim,
                           .page_size = kPageSizes[counted % std::size(kPageSizes)],
                           .window = random() % 3 == 0 ? draw(1, 200) : 0,
                           .seed = random(),
                           .q_len = random() % 2 == 0 ? 1 : draw(2, 16),
                           .kv_dtype = variant.kv_dtype,
                           .layout = random() % 2 == 0 ? KvLayout::kNHD : KvLayout::kHND,
                           .soft_cap = random() % 3 == 0 ? 20.0f : 0.0f,
                           .sinks = random() % 3 == 0};
      shape.q_heads = shape.kv_heads * draw(1, this->OnHost() ? 6 : 32);
      if (variant.kv_dtype == DType::kFloat8E4M3) shape.k_scale = 0.5f, shape.v_scale = 2.0f;
      const int32_t rows = draw(1, 4);
      std::vector<int32_t> lengths(rows), needles(rows, -1);
      for (int32_t r = 0; r < rows; ++r) {
        const int32_t edge = draw(1, 4) * std::max(kTile, shape.page_size) + draw(-1, 1);
        lengths[r] = random() % 5 == 0 ? 0 : random() % 2 == 0 ? edge : draw(1, this->OnHost() ? 150 : 600);
        if (n % 2 == 1 && lengths[r] > 0) needles[r] = draw(0, lengths[r] - 1);
      }
      const RigOptions options = {.scheduler = kSchedulers[n / 2 % 2], .block_table = random() % 2 == 0};
      const DecodeCase step(shape, lengths, needles);
      const int32_t bucket = rows + draw(0, 2);
      EXPECT_EQ(this->Run(step, bucket, options), "") << "case " << n << ": " << shape.ToString();
    }
  }
}

TYPED_TEST(DecodeFeaturesTest, VerifySeesAChainForEveryQueryLength) {
  for (int32_t q_len = 2; q_len <= 16; ++q_len) {
    for (const int32_t group : {1, 4, 7}) {
      if (this->OnHost() && (q_len + group / 3) % 3 != 0) continue;  // one group for each q_len
      const DecodeShape shape = {.dtype = DType::kBFloat16,
                                 .q_heads = 2 * group,
                                 .page_size = 16,
                                 .seed = 800 + static_cast<uint64_t>(q_len),
                                 .q_len = q_len};
      // Shorter than the queries, as long, one longer, and across an edge; the needle is a key that only some see.
      const std::vector<int32_t> lengths = {q_len - 1, q_len, q_len + 1, kTile + q_len / 2};
      for (const DecodeScheduler scheduler : kSchedulers) {
        EXPECT_EQ(this->Run(DecodeCase(shape, lengths, {-1, q_len - 1, 1, kTile}), 5, {.scheduler = scheduler}), "")
            << shape.ToString();
      }
    }
  }
}

TYPED_TEST(DecodeFeaturesTest, EveryGroupSizeMatchesTheOracleOnTensorCores) {
  for (int32_t group = 1; group <= 32; ++group) {
    if (this->OnHost() && group % 8 != 3) continue;
    for (const int32_t q_len : {1, 3}) {
      const DecodeShape shape = {.dtype = DType::kFloat16,
                                 .q_heads = group,
                                 .kv_heads = 1,
                                 .head_dim = group % 2 == 0 ? 128 : 256,
                                 .page_size = 16,
                                 .seed = 820 + static_cast<uint64_t>(group),
                                 .q_len = q_len};
      EXPECT_EQ(this->Run(DecodeCase(shape, {150, 5, 64}, {-1, -1, 63}), 3), "") << shape.ToString();
    }
  }
}

TYPED_TEST(DecodeFeaturesTest, AWindowCountsFromEachQuerysOwnPosition) {
  for (const int32_t window : {1, 2, 63, 64, 65, 127}) {
    if (this->OnHost() && window % 2 == 0) continue;
    const DecodeShape shape = {.dtype = DType::kBFloat16, .page_size = 16, .window = window, .seed = 840, .q_len = 4};
    for (const int32_t length : {3, 64, 129, 200}) {
      // The first key that the first query sees, and the one before it.
      const int32_t seen = std::max(0, length - 3 - window);
      for (const int32_t needle : {seen, std::max(0, seen - 1)}) {
        EXPECT_EQ(this->Run(DecodeCase(shape, {length}, {needle}), 1), "")
            << shape.ToString() << ", length " << length << ", needle " << needle;
      }
    }
  }
}

// The largest window is none, for rows that are shorter than the chain, too.
TYPED_TEST(DecodeFeaturesTest, AWindowWithoutBoundIsNone) {
  for (const int32_t q_len : {1, 16}) {
    for (const DecodeScheduler scheduler : kSchedulers) {
      const DecodeShape shape = {.dtype = DType::kBFloat16,
                                 .page_size = 16,
                                 .window = std::numeric_limits<int32_t>::max(),
                                 .seed = 845,
                                 .q_len = q_len};
      const DecodeCase step(shape, {1, 0, q_len - 1, q_len, 150}, {-1, -1, -1, -1, 0});
      EXPECT_EQ(this->Run(step, 6, {.scheduler = scheduler}), "") << shape.ToString();
    }
  }
}

TYPED_TEST(DecodeFeaturesTest, SinksTakeMassButGiveNothingWhereNothingIsAttended) {
  for (const DecodeScheduler scheduler : kSchedulers) {
    for (const int32_t q_len : {1, 3}) {
      const DecodeShape shape = {.dtype = DType::kFloat16, .page_size = 16, .seed = 850, .q_len = q_len, .sinks = true};
      EXPECT_EQ(this->Run(DecodeCase(shape, {1, 0, 130, 2}, {-1, -1, 40, -1}), 6, {.scheduler = scheduler}), "");
    }
  }
  // A sink far above all logits leaves next to nothing, and an LSE that is the sink's.
  const DecodeShape shape = {.page_size = 16, .seed = 851, .sinks = true};
  const DecodeCase step(shape, {100}, {-1});
  for (const DecodeScheduler scheduler : kSchedulers) {
    ASSERT_OK(this->Prepare(step, {.buckets = {1}, .scheduler = scheduler}));
    ASSERT_OK_AND_ASSIGN(DeviceBuffer sinks, this->device_->Allocate(shape.q_heads * sizeof(float), "sinks"));
    ASSERT_OK(Upload(*this->stream_, sinks.As<float>(), std::vector<float>(shape.q_heads, 300.0f)));
    this->rig_->tensors.sinks = sinks.As<const float>();
    ASSERT_OK(this->rig_->Begin(1, step, 1));
    ASSERT_OK(this->rig_->RunEagerly(1, 1));
    for (const float value : this->rig_->out) EXPECT_LT(std::abs(value), 1e-30f);
    for (const float lse : this->rig_->lse) EXPECT_NEAR(lse, 300.0 / std::log(2.0), 1e-3);
    this->rig_.reset();
  }
}

// A cap far above all logits leaves them as they are.
TYPED_TEST(DecodeFeaturesTest, SoftCapsBendLogits) {
  for (const float cap : {1.0f, 30.0f, 50.0f, 1e8f}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      const DecodeShape shape = {.dtype = dtype, .page_size = 16, .seed = 860, .soft_cap = cap};
      EXPECT_EQ(this->Run(DecodeCase(shape, {1, 81, 257}, {-1, 7, 256}), 3), "") << shape.ToString();
    }
  }
}

TYPED_TEST(DecodeFeaturesTest, ScalesMayChangeFromReplayToReplay) {
  DecodeShape shape = {.dtype = DType::kBFloat16,
                       .page_size = 16,
                       .seed = 870,
                       .q_len = 2,
                       .kv_dtype = DType::kFloat8E4M3,
                       .k_scale = 0.25f,
                       .v_scale = 4};
  const std::vector<int32_t> lengths = {200, 33};
  const DecodeCase first(shape, lengths, {-1, -1});
  ASSERT_OK(this->Prepare(first, {.buckets = {2}}));
  ASSERT_OK(this->rig_->Capture());
  for (const float scale : {0.25f, 1.5f, 0.25f}) {
    shape.k_scale = scale, shape.v_scale = 1 / scale;
    ASSERT_OK(this->rig_->SetScales(shape.k_scale, shape.v_scale));
    const DecodeCase step(shape, lengths, {-1, -1});
    ASSERT_OK(this->rig_->Begin(2, step, 2));
    ASSERT_OK(this->rig_->Replay(2, 2));
    EXPECT_EQ(this->rig_->Check(2, step, 2), "") << scale;
  }
}

TYPED_TEST(DecodeFeaturesTest, LargeQueriesKeepTheirRangeOverFloat8) {
  // bfloat16 reaches beyond float16, in which products with 8 bit KV are made.
  const DecodeShape shape = {
      .dtype = DType::kBFloat16, .page_size = 16, .seed = 880, .kv_dtype = DType::kFloat8E4M3, .k_scale = 0x1p-20f};
  const DecodeCase step(shape, {90}, {-1});
  ASSERT_OK(this->Prepare(step, {.buckets = {1}}));
  std::vector<std::byte> q = step.Q();
  std::vector<float> values = ToFloats(q, shape.dtype);
  for (float& value : values) value *= 0x1p20f;
  DeviceBuffer large = *this->device_->Allocate(q.size(), "large");
  ASSERT_OK(Upload(*this->stream_, large.As<std::byte>(), ToBytes(values, shape.dtype)));
  this->rig_->tensors.q = large.As<const std::byte>();
  ASSERT_OK(this->rig_->Begin(1, step, 1));
  ASSERT_OK(this->rig_->RunEagerly(1, 1));
  // The oracle's queries and scale, both as they were: the two factors cancel.
  DecodeShape plain = shape;
  plain.k_scale = 1;
  const DecodeCase expected(plain, {90}, {-1});
  for (int32_t head = 0; head < shape.q_heads; ++head) {
    EXPECT_EQ(this->rig_->CheckHead(0, head, expected.Expected(0, head)), "");
  }
  this->rig_.reset();
}

TYPED_TEST(DecodeFeaturesTest, TheHighestPageNumbersAreReached) {
  const DecodeShape shape = {.dtype = DType::kBFloat16, .page_size = 16, .seed = 890};
  const DecodeCase step(shape, {40, 100}, {39, -1});
  // The case's pages moved to the end of a larger pool; the rest of it is NaN.
  const int32_t extra = 500;
  ASSERT_OK(this->Prepare(step, {.buckets = {2}, .num_pages = step.num_pages() + extra}));
  const size_t page = size_t{2} * shape.page_size * shape.kv_heads * shape.head_dim;
  for (const bool value : {false, true}) {
    std::vector<std::byte> pool(extra * page, std::byte{0xff});
    const std::vector<std::byte> pages = step.Pool(value);
    pool.insert(pool.end(), pages.begin(), pages.end());
    const DeviceSpan<const std::byte> to = value ? this->rig_->tensors.v : this->rig_->tensors.k;
    ASSERT_OK(Upload(*this->stream_, DeviceSpan<std::byte>(const_cast<std::byte*>(to.address()), to.size()), pool));
  }
  std::vector<int32_t> indices = step.indices();
  for (int32_t& index : indices) index += extra;
  DeviceBuffer moved = *this->device_->Allocate(indices.size() * sizeof(int32_t), "moved");
  ASSERT_OK(Upload(*this->stream_, moved.As<int32_t>(), indices));
  this->rig_->tensors.kv_indices = moved.As<const int32_t>();
  ASSERT_OK(this->rig_->Begin(2, step, 2));
  ASSERT_OK(this->rig_->RunEagerly(2, 2));
  EXPECT_EQ(this->rig_->Check(2, step, 2), "");
  this->rig_.reset();
}

// A query that the window or the chain hides a key from must not meet its value either, were it NaN.
TYPED_TEST(DecodeFeaturesTest, WhatNoQueryAttendsMayBeNaN) {
  const DecodeShape shape = {.dtype = DType::kFloat16, .page_size = 64, .window = 40, .seed = 895};
  const DecodeCase step(shape, {200}, {-1});
  ASSERT_OK(this->Prepare(step, {.buckets = {1}}));
  std::vector<std::byte> pool = step.Pool(true);
  const size_t token = size_t{2} * shape.kv_heads * shape.head_dim;
  for (int32_t p = 0; p < 160; ++p) {
    const size_t at = (size_t{1} * step.indices()[p / 64] * 64 + p % 64) * token;
    std::fill_n(pool.begin() + at, token, std::byte{0xff});
  }
  const DeviceSpan<const std::byte> v = this->rig_->tensors.v;
  ASSERT_OK(Upload(*this->stream_, DeviceSpan<std::byte>(const_cast<std::byte*>(v.address()), v.size()), pool));
  ASSERT_OK(this->rig_->Begin(1, step, 1));
  ASSERT_OK(this->rig_->RunEagerly(1, 1));
  EXPECT_EQ(this->rig_->Check(1, step, 1), "");
}

// A query that is NaN makes its own result NaN and no other, whether its keys are cut up over blocks or not. Zeros and
// -inf would say that it attends nothing.
TYPED_TEST(DecodeFeaturesTest, NaNInAQueryIsNaNInItsResultAlone) {
  constexpr int32_t kHead = 1;
  for (const DType kv_dtype : {DType::kBFloat16, DType::kFloat8E4M3, DType::kFloat32}) {
    for (const DecodeScheduler scheduler : kSchedulers) {
      for (const int32_t q_len : {1, 3}) {
        const DecodeShape shape = {.dtype = kv_dtype == DType::kFloat32 ? kv_dtype : DType::kBFloat16,
                                   .page_size = 16,
                                   .seed = 897,
                                   .q_len = q_len,
                                   .kv_dtype = kv_dtype,
                                   .sinks = q_len == 3};
        const DecodeCase step(shape, {1, 40, 0, 2000}, {-1, -1, -1, -1});  // a block's, and those of many
        ASSERT_OK(this->Prepare(step, {.buckets = {4}, .scheduler = scheduler}));
        std::vector<float> values = ToFloats(step.Q(), shape.dtype);
        for (int32_t row = 0; row < step.rows(); ++row) {  // of the last query of each row
          values[(((row + 1) * q_len - 1) * shape.q_heads + kHead) * shape.head_dim + 5] = std::nanf("");
        }
        DeviceBuffer q = *this->device_->Allocate(step.Q().size(), "q");
        ASSERT_OK(Upload(*this->stream_, q.As<std::byte>(), ToBytes(values, shape.dtype)));
        this->rig_->tensors.q = q.As<const std::byte>();
        ASSERT_OK(this->rig_->Begin(4, step, 4));
        ASSERT_OK(this->rig_->RunEagerly(4, 4));
        for (int32_t place = 0; place < step.rows() * q_len * shape.q_heads; ++place) {
          const int32_t row = place / shape.q_heads / q_len, query = place / shape.q_heads % q_len;
          const int32_t head = place % shape.q_heads;
          if (head != kHead || query != q_len - 1 || step.lengths()[row] == 0) {
            EXPECT_EQ(this->rig_->CheckHead(row, head, step.Expected(row, head, nullptr, query), query), "");
            continue;
          }
          EXPECT_TRUE(std::isnan(this->rig_->lse[place])) << shape.ToString() << ", row " << row;
          for (int32_t d = 0; d < shape.head_dim; ++d) {
            ASSERT_TRUE(std::isnan(this->rig_->out[place * shape.head_dim + d])) << shape.ToString() << ", row " << row;
          }
        }
        this->rig_.reset();
      }
    }
  }
}

// Many rows, few of them long: blocks own pieces of several rows, and rows are merged from many blocks.
TYPED_TEST(DecodeFeaturesTest, UnevenBatchesAreCutUpRight) {
  if (this->OnHost()) GTEST_SKIP() << "the Host oracle cuts nothing up";
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const DecodeShape shape = {
        .dtype = dtype, .q_heads = 8, .kv_heads = 2, .head_dim = 64, .page_size = 16, .seed = 900};
    std::vector<int32_t> lengths(150, 70), needles(150, -1);
    lengths[17] = 9000, needles[17] = 8999;
    lengths[60] = 0;
    lengths[149] = 4096, needles[149] = 0;
    EXPECT_EQ(this->Run(DecodeCase(shape, lengths, needles), 160), "");
    // As long on average as the first.
    EXPECT_EQ(this->Run(DecodeCase(shape, {128, 64, 192, 128}, {-1, 63, -1, 127}), 4), "");
  }
}

// One row in many blocks, whose partial results are merged in groups and then together: the groups do not depend on who
// comes when, and the counters are left as they were found.
TYPED_TEST(DecodeFeaturesTest, LongRowsAreMergedInGroupsAlwaysAlike) {
  if (this->OnHost()) GTEST_SKIP() << "the Host oracle merges nothing";
  uint64_t seed = 940;
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const DType kv_dtype : {DType::kBFloat16, DType::kFloat8E4M3}) {
      for (const int32_t group : {1, 7, 16, 32}) {
        const DecodeShape shape = {.dtype = DType::kBFloat16,
                                   .q_heads = 2 * group,
                                   .kv_heads = 2,
                                   .head_dim = head_dim,
                                   .page_size = 16,
                                   .seed = ++seed,
                                   .q_len = 1 + static_cast<int32_t>(seed % 4),
                                   .kv_dtype = kv_dtype};
        // Alone, and where blocks go on from one row to the next.
        for (const std::vector<int32_t>& lengths : {std::vector<int32_t>{9001}, {300, 8000, 900, 77}}) {
          const int32_t rows = static_cast<int32_t>(lengths.size());
          std::vector<int32_t> needles(rows, -1);
          needles[rows / 2] = lengths[rows / 2] - 1;
          const DecodeCase step(shape, lengths, needles);
          ASSERT_EQ(this->Run(step, rows, {}, 37), "") << shape.ToString();
          const std::vector<std::byte> first = this->rig_->raw_out;
          for (int again = 0; again < 2; ++again) {
            const Extent bucket = {rows, rows * shape.q_len};
            ASSERT_OK(this->rig_->decode().Run(*this->stream_, bucket, this->rig_->tensors));
          }
          ASSERT_OK(this->rig_->ReadBack());
          EXPECT_EQ(this->rig_->raw_out, first) << shape.ToString();
        }
      }
    }
  }
}

// What a block needs grows with the rows: the largest batch that a plan accepts can be launched, too.
TYPED_TEST(DecodeFeaturesTest, TheMostRowsOfABatchAreLaunched) {
  for (const DType kv_dtype : {DType::kBFloat16, DType::kFloat8E4M3}) {
    for (const int32_t head_dim : {64, 128, 256}) {
      if (this->OnHost() && (head_dim == 64) != (kv_dtype == DType::kBFloat16)) continue;
      const DecodeShape shape = {.dtype = DType::kBFloat16,
                                 .q_heads = 1,
                                 .kv_heads = 1,
                                 .head_dim = head_dim,
                                 .page_size = 16,
                                 .seed = 905,
                                 .kv_dtype = kv_dtype};
      const int32_t rows = attention::DecodeMaxRows(head_dim);
      std::vector<int32_t> lengths(rows), needles(rows, -1);
      lengths[0] = 40, lengths[rows / 2] = 130, lengths[rows - 1] = 17;
      EXPECT_EQ(this->Run(DecodeCase(shape, lengths, needles), rows, {.max_length = 160}), "") << shape.ToString();
    }
  }
}

TYPED_TEST(DecodeFeaturesTest, EagerCapturedAndReplayedVerifyAreBitEqual) {
  const DecodeShape shape = {.dtype = DType::kBFloat16, .page_size = 16, .seed = 910, .q_len = 3};
  const std::vector<int32_t> lengths = {300, 2, 17, 512};
  const DecodeCase step(shape, lengths, {299, -1, 16, -1});
  for (const bool block_table : {false, true}) {
    ASSERT_OK(this->Prepare(step, {.buckets = {2, 4}, .block_table = block_table}));
    std::vector<std::vector<std::byte>> eager;
    for (const int32_t requests : {1, 2, 3, 4}) {
      const int32_t bucket = requests <= 2 ? 2 : 4;
      ASSERT_OK(this->rig_->Begin(bucket, step, requests));
      ASSERT_OK(this->rig_->RunEagerly(bucket, requests));
      EXPECT_EQ(this->rig_->Check(bucket, step, requests), "");
      eager.push_back(this->rig_->raw_out);
    }
    ASSERT_OK(this->rig_->Capture());
    for (const int32_t requests : {4, 1, 3, 2}) {
      const int32_t bucket = requests <= 2 ? 2 : 4;
      ASSERT_OK(this->rig_->Begin(bucket, step, requests));
      ASSERT_OK(this->rig_->Replay(bucket, requests));
      EXPECT_EQ(this->rig_->raw_out, eager[requests - 1]) << requests;
    }
  }
}

TYPED_TEST(DecodeFeaturesTest, PageTablesOfBothKindsOrNoneAreRefused) {
  const DecodeCase step({.seed = 920}, {40, 50}, {-1, -1});
  ASSERT_OK(this->Prepare(step, {.buckets = {4}, .block_table = true}));
  const attention::DecodeTensors good = this->rig_->tensors;
  const attention::StepMetadata& metadata = this->rig_->metadata();
  const auto refused = [&](auto change, const char* part) {
    attention::DecodeTensors tensors = good;
    change(tensors);
    EXPECT_STATUS(this->rig_->decode().Run(*this->stream_, {4, 4}, tensors), kInvalidArgument, part);
  };
  refused([&](auto& t) { t.kv_indices = metadata.kv_indices().live; }, "must be one kind of page table");
  refused([](auto& t) { t.lengths = {}; }, "block_table is given without lengths");
  refused([](auto& t) { t.block_table_stride = 0; }, "block_table_stride is 0");
  refused([](auto& t) { ++t.block_table_stride; }, "for each of 4 rows; block_table_stride is");
  refused([](auto& t) { t.block_table = {}; }, "kv_indptr has 0 elements");
}

}  // namespace
}  // namespace pristine::testing
