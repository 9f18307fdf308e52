#include "pristine/attention/paged_prefill.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "attention/prefill_variants.h"
#include "tests/attention/prefill_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DType;
using attention::KvLayout;
using attention::PagedPrefill;
using attention::PagedPrefillConfig;
using attention::PrefillTensors;
using attention::PrefillVariant;

template <class BackendT>
class PagedPrefillTest : public PrefillTest<BackendT> {};
TYPED_TEST_SUITE(PagedPrefillTest, AllBackends, BackendNames);

PrefillShape Shape(const PrefillVariant& variant, uint64_t seed) {
  PrefillShape shape = {
      .dtype = variant.dtype, .kv_dtype = variant.kv_dtype, .head_dim = variant.head_dim, .seed = seed};
  if (shape.scaled()) shape.k_scale = 0.75f, shape.v_scale = 1.5f;
  return shape;
}

// Every variant with random options over random ragged steps, in a bucket with padded requests and tokens; in every
// other step with needles.
TYPED_TEST(PagedPrefillTest, EveryVariantIsAttentionOverRaggedSteps) {
  uint64_t seed = 100;
  for (const PrefillVariant& variant : attention::PrefillVariants()) {
    if (variant.only_capability != 0) continue;  // run beside the one for all devices
    for (int repeat = 0; repeat < (this->on_host() ? 2 : 8); ++repeat) {
      std::mt19937_64 random(++seed);
      const auto below = [&random](int32_t n) { return static_cast<int32_t>(random() % n); };
      PrefillShape shape = Shape(variant, seed);
      shape.kv_heads = 1 + below(2);
      shape.q_heads = shape.kv_heads * (1 + below(5));
      const int32_t page_sizes[] = {1, 3, 16};
      shape.page_size = page_sizes[below(3)];
      shape.layout = below(2) == 0 ? KvLayout::kNHD : KvLayout::kHND;
      shape.window = below(2) == 0 ? 0 : 1 + below(90);
      shape.soft_cap = below(2) == 0 ? 0.0f : 3.0f;
      shape.sinks = below(2) == 0;
      shape.block_table = below(2) == 0;
      std::vector<int32_t> qo_lens, lengths, needles;
      for (int r = 0; r < 4; ++r) {
        const int32_t longest_qo[] = {2, 20, this->on_host() ? 24 : 80, 7};
        qo_lens.push_back(below(longest_qo[r]));
        lengths.push_back(qo_lens.back() + below(this->on_host() ? 40 : 150));
        needles.push_back(repeat % 2 == 1 && lengths.back() > 0 ? below(lengths.back()) : -1);
      }
      const PrefillCase step(shape, qo_lens, lengths, needles);
      this->ExpectAttention(step, {5, step.tokens() + 1 + below(40)});
    }
  }
}

// A needle where an off-by-one would show, and one query at each position around it.
TYPED_TEST(PagedPrefillTest, NeedlesAtPageAndTileEdgesAreSeenByTheQueriesBehindThem) {
  for (const auto& [dtype, head_dim, page_size] : {std::tuple{DType::kFloat32, 64, 1},
                                                   {DType::kFloat16, 64, 16},
                                                   {DType::kFloat16, 128, 1},
                                                   {DType::kBFloat16, 256, 16}}) {
    if (head_dim > 64 && this->on_host()) continue;
    for (const int32_t needle : {0, 15, 16, 63, 64, 65, 127, 128, 129, 140}) {
      PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .q_heads = 2, .kv_heads = 1, .head_dim = head_dim};
      shape.page_size = page_size;
      shape.seed = 300 + needle;
      const PrefillCase step(shape, {20, 18}, {150, std::max(18, needle + 3)}, {needle, needle});
      const int32_t token = 20 + 18 - 1;
      EXPECT_GE(step.Expected(token, 0).top_mass, 0.5);
      this->ExpectAttention(step);
    }
  }
}

TYPED_TEST(PagedPrefillTest, LengthsAtPageAndTileEdges) {
  for (const int32_t length : {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129}) {
    PrefillShape shape = {.dtype = DType::kBFloat16, .kv_dtype = DType::kBFloat16, .q_heads = 2, .kv_heads = 1};
    shape.page_size = 16;
    shape.seed = 400 + length;
    this->ExpectAttention(PrefillCase(shape, {length, 1, std::min(length, 7)}, {length, length, length}));
  }
}

TYPED_TEST(PagedPrefillTest, RequestsWithoutTokensOrQueries) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .page_size = 4, .sinks = true, .seed = 500};
    // No cache, no queries, neither; more queries than tokens: the first attend nothing.
    this->ExpectAttention(PrefillCase(shape, {3, 0, 0, 9, 2}, {0, 11, 0, 4, 6}), {7, 20});
    this->ExpectAttention(PrefillCase(shape, {0, 0}, {5, 0}), {3, 8});
    this->ExpectAttention(PrefillCase(shape, {150}, {1}));
  }
}

// A step of padding alone, and an extent without tokens, which launches nothing.
TYPED_TEST(PagedPrefillTest, IdleSteps) {
  const PrefillCase step({.seed = 510}, {4}, {9});
  ASSERT_OK(this->Prepare(step, {2, 8}));
  const PrefillCase idle({.seed = 510}, {}, {});
  ASSERT_OK(this->rig_->Begin({2, 8}, idle));
  ASSERT_OK(this->rig_->RunEagerly({2, 8}, idle));
  EXPECT_EQ(this->rig_->Check({2, 8}, idle), "");
  EXPECT_OK(this->rig_->prefill().Run(*this->stream_, {0, 0}, {}));
  EXPECT_OK(this->rig_->prefill().Run(*this->stream_, {3, 0}, {}));
  EXPECT_STATUS(this->rig_->prefill().Run(*this->stream_, {0, 3}, this->rig_->tensors), kInvalidArgument, "bucket");
}

TYPED_TEST(PagedPrefillTest, EveryGroupSize) {
  for (int32_t group = 1; group <= 32; group += this->on_host() && group >= 8 ? 8 : 1) {
    PrefillShape shape = {.dtype = DType::kFloat16, .kv_dtype = DType::kFloat16, .page_size = 8};
    shape.kv_heads = group < 8 ? 2 : 1;
    shape.q_heads = group * shape.kv_heads;
    shape.seed = 600 + group;
    this->ExpectAttention(PrefillCase(shape, {5, 1, 7}, {21, 6, 7}), {4, 15});
  }
}

TYPED_TEST(PagedPrefillTest, AWindowSeesItsLastTokensAlone) {
  for (const int32_t window : {1, 2, 13, 33, 64, 65, 111, 128}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
      PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .q_heads = 2, .page_size = 16, .window = window};
      shape.seed = 700 + window;
      // The needle leaves the window of the queries behind it.
      this->ExpectAttention(PrefillCase(shape, {70, 1}, {200, 150}, {135, 149 - window}));
    }
  }
}

// Engines free pages that every window has left: NaN in K and V, page numbers of no pool. The first key that a window
// reaches stands anywhere in the kernels' tiles of keys.
TYPED_TEST(PagedPrefillTest, WhatNoWindowReachesIsNotRead) {
  for (const auto& [dtype, kv_dtype, head_dim] : {std::tuple{DType::kFloat32, DType::kFloat32, 64},
                                                  {DType::kBFloat16, DType::kBFloat16, 64},
                                                  {DType::kFloat16, DType::kFloat8E4M3, 128},
                                                  {DType::kBFloat16, DType::kBFloat16, 256}}) {
    if (head_dim > 64 && this->on_host()) continue;
    for (const int32_t page_size : {1, 16}) {
      for (const int32_t length : {200, 190, 129, 65}) {
        PrefillShape shape = {.dtype = dtype, .kv_dtype = kv_dtype, .head_dim = head_dim, .window = 64, .seed = 720};
        shape.page_size = page_size;
        shape.block_table = length % 2 == 0;
        const PrefillCase step(shape, {1, 3, 40}, {length, length, length});
        for (const PrefillVariant* const variant : this->Runnable(shape)) {
          ASSERT_OK(this->Prepare(step, {3, step.tokens()}, variant));
          ASSERT_OK(this->rig_->Begin({3, step.tokens()}, step));
          ASSERT_OK(this->rig_->RunEagerly({3, step.tokens()}, step));
          ASSERT_EQ(this->rig_->Check({3, step.tokens()}, step), "") << variant->kernel.name << ", length " << length;
        }
      }
    }
  }
}

TYPED_TEST(PagedPrefillTest, TheWidestWindowIsNone) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
    PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .page_size = 4, .seed = 730};
    shape.window = std::numeric_limits<int32_t>::max();
    const PrefillCase step(shape, {9, 5, 150}, {3, 70, 100});  // more queries than tokens, too
    ASSERT_NO_FATAL_FAILURE(this->ExpectAttention(step));
  }
}

// What is wrong with a query shows: it does not pass for one that attends nothing.
TYPED_TEST(PagedPrefillTest, ANanQueryGivesNan) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const float soft_cap : {0.0f, 3.0f}) {
      const PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .page_size = 4, .soft_cap = soft_cap, .seed = 740};
      const PrefillCase step(shape, {2, 1}, {3, 80});
      for (const PrefillVariant* const variant : this->Runnable(shape)) {
        ASSERT_OK(this->Prepare(step, {2, 3}, variant));
        ASSERT_OK(this->rig_->Begin({2, 3}, step));
        const DeviceSpan<const std::byte> q = this->rig_->tensors.q;
        ASSERT_OK(this->stream_->Fill({const_cast<std::byte*>(q.address()), q.size()}, std::byte{0xff}));
        ASSERT_OK(this->rig_->RunEagerly({2, 3}, step));
        for (const float x : this->rig_->out) ASSERT_TRUE(std::isnan(x)) << variant->kernel.name << ": " << x;
        for (const float lse : this->rig_->lse) ASSERT_TRUE(std::isnan(lse)) << variant->kernel.name << ": " << lse;
      }
    }
  }
}

TYPED_TEST(PagedPrefillTest, BlockTableAndLayoutDoNotChangeTheResult) {
  PrefillShape shape = {.dtype = DType::kBFloat16, .kv_dtype = DType::kBFloat16, .page_size = 16, .seed = 800};
  std::vector<std::byte> first;
  for (const bool table : {false, true}) {
    for (const KvLayout layout : {KvLayout::kNHD, KvLayout::kHND}) {
      shape.block_table = table;
      shape.layout = layout;
      const PrefillCase step(shape, {40, 3, 1}, {90, 33, 64});
      this->ExpectAttention(step);
      if (first.empty()) first = this->rig_->raw_out;
      EXPECT_TRUE(this->rig_->raw_out == first) << shape.ToString();
    }
  }
}

// Scales are read by every replay; sinks too.
TYPED_TEST(PagedPrefillTest, ScalesThatChangeUnderReplay) {
  PrefillShape shape = {.dtype = DType::kFloat16, .kv_dtype = DType::kFloat8E4M3, .page_size = 4, .seed = 810};
  const std::vector<int32_t> qo_lens = {9, 2}, lengths = {30, 12};
  const Extent bucket = {3, 12};
  ASSERT_OK(this->Prepare(PrefillCase(shape, qo_lens, lengths), bucket));
  ASSERT_OK(this->rig_->Capture());
  for (const float scale : {1.0f, 0.25f, 3.0f}) {
    shape.k_scale = scale;
    shape.v_scale = 2 / scale;
    const PrefillCase step(shape, qo_lens, lengths);
    ASSERT_OK(Upload(*this->stream_, this->rig_->scales(), {shape.k_scale, shape.v_scale}));
    ASSERT_OK(this->rig_->Begin(bucket, step));
    ASSERT_OK(this->rig_->Replay(bucket, step));
    EXPECT_EQ(this->rig_->Check(bucket, step), "") << scale;
  }
}

// A scale that should not be, but often is where a calibration found nothing: everything weighs the same.
TYPED_TEST(PagedPrefillTest, AScaleOfZeroIsAnAverage) {
  PrefillShape shape = {.dtype = DType::kFloat16, .kv_dtype = DType::kFloat8E4M3, .page_size = 4, .seed = 815};
  shape.k_scale = 0;
  for (const float soft_cap : {0.0f, 3.0f}) {
    shape.soft_cap = soft_cap;
    const PrefillCase step(shape, {9, 2}, {30, 100});
    ASSERT_NO_FATAL_FAILURE(this->ExpectAttention(step));
  }
}

TYPED_TEST(PagedPrefillTest, ACapFarAboveAllLogitsLeavesThemAsTheyAre) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .page_size = 4, .soft_cap = 1e8f, .seed = 817};
    const PrefillCase step(shape, {9, 2}, {30, 100});
    ASSERT_NO_FATAL_FAILURE(this->ExpectAttention(step));
  }
}

// A chunk of a prompt at a time, with the cache filled so far, gives what the whole prompt at once gives; the last
// chunk is a decode step.
TYPED_TEST(PagedPrefillTest, ChunksGiveWhatThePromptAtOnceGives) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .page_size = 8, .seed = 820};
    constexpr int32_t kPrompt = 90;
    const PrefillCase whole(shape, {kPrompt}, {kPrompt});
    ASSERT_OK(this->Prepare(whole, {1, kPrompt}));
    PrefillRig& rig = *this->rig_;
    for (const int32_t chunk : {1, 32, 57}) {
      for (int32_t begin = 0; begin < kPrompt; begin += chunk) {
        const int32_t end = std::min(begin + chunk, kPrompt);
        const std::vector<int32_t> slots(end - begin, -1), positions(end - begin, 0);
        ASSERT_OK(rig.manager().BeginStep({1, kPrompt}, {1, end - begin}));
        ASSERT_OK(rig.metadata().Refill({.lengths = {&end, 1},
                                         .kv_indptr = std::vector<int32_t>{0, (end + 7) / 8},
                                         .kv_indices = absl::MakeConstSpan(whole.indices()).first((end + 7) / 8),
                                         .slots = slots,
                                         .positions = positions,
                                         .qo_indptr = std::vector<int32_t>{0, end - begin}}));
        const PrefillTensors all = rig.tensors;
        const size_t row = size_t{1} * shape.q_heads * shape.head_dim * attention::SizeOf(dtype);
        rig.tensors.q = all.q.Sub(begin * row, (end - begin) * row);
        const PrefillCase part(shape, {end - begin}, {end});
        // The chunk's queries lie at the front of a bucket of its own size.
        ASSERT_OK(rig.manager().BeforeReplay(*this->stream_, {1, kPrompt}, {1, end - begin}));
        ASSERT_OK(rig.manager().RecordPrologue(*this->stream_, {1, kPrompt}));
        ASSERT_OK(rig.prefill().Run(*this->stream_, {1, end - begin}, rig.tensors));
        rig.tensors = all;
        ASSERT_OK(rig.ReadBack());
        for (int32_t token = begin; token < end; ++token) {
          for (int32_t head = 0; head < shape.q_heads; ++head) {
            const size_t place = size_t{1} * (token - begin) * shape.q_heads + head;
            ASSERT_EQ(Difference(whole.Expected(token, head), &rig.out[place * shape.head_dim], rig.lse[place],
                                 whole.Tolerance()),
                      "")
                << "chunk " << chunk << ", token " << token << ", head " << head;
          }
        }
      }
    }
  }
}

// One query per request, over the decode wrapper's own tensors.
TYPED_TEST(PagedPrefillTest, OneQueryPerRequestIsADecodeStep) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const DecodeShape shape = {.dtype = dtype, .page_size = 16, .window = 70, .seed = 825};
    const DecodeCase step(shape, {1, 0, 90, 64, 129}, {-1, -1, 40, -1, 128});
    ASSERT_OK_AND_ASSIGN(const auto decode, DecodeRig::Create(*this->device_, *this->stream_, shape,
                                                              {.buckets = {5}, .num_pages = step.num_pages()}));
    ASSERT_OK(decode->Load(step));
    ASSERT_OK(decode->Begin(5, step, 5));
    ASSERT_OK(decode->RunEagerly(5, 5));
    const std::vector<float> expected = decode->out, expected_lse = decode->lse;
    ASSERT_OK_AND_ASSIGN(const DeviceBuffer qo_indptr, this->device_->Allocate(6 * 4, "qo_indptr"));
    ASSERT_OK(Upload(*this->stream_, qo_indptr.As<int32_t>(), {0, 1, 2, 3, 4, 5}));
    ASSERT_OK_AND_ASSIGN(const auto prefill, PagedPrefill::Create(*this->device_, {.q_heads = shape.q_heads,
                                                                                   .kv_heads = shape.kv_heads,
                                                                                   .head_dim = shape.head_dim,
                                                                                   .dtype = dtype,
                                                                                   .kv_dtype = dtype,
                                                                                   .page_size = shape.page_size,
                                                                                   .window = shape.window,
                                                                                   .scale = 0.125f}));
    const attention::DecodeTensors& tensors = decode->tensors;
    ASSERT_OK(prefill->Run(*this->stream_, {5, 5},
                           {.q = tensors.q,
                            .k = tensors.k,
                            .v = tensors.v,
                            .out = tensors.out,
                            .lse = tensors.lse,
                            .qo_indptr = qo_indptr.As<const int32_t>(),
                            .kv_indptr = tensors.kv_indptr,
                            .kv_indices = tensors.kv_indices,
                            .lengths = tensors.lengths}));
    ASSERT_OK(decode->ReadBack());
    for (size_t head = 0; head < expected_lse.size(); ++head) {
      const OracleRow row = {.out = {expected.begin() + head * 64, expected.begin() + (head + 1) * 64},
                             .lse = expected_lse[head]};
      EXPECT_EQ(Difference(row, &decode->out[head * 64], decode->lse[head], dtype == DType::kFloat32 ? 1e-5 : 8e-3), "")
          << "row " << head / 4 << ", head " << head % 4;
    }
  }
}

// Pages that the pool does not have are skipped, wherever they stand.
TYPED_TEST(PagedPrefillTest, PageNumbersOutsideThePoolAreSkipped) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
    const PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .page_size = 4, .block_table = true, .seed = 830};
    const PrefillCase step(shape, {30}, {100});
    for (const PrefillVariant* const variant : this->Runnable(shape)) {
      ASSERT_OK(this->Prepare(step, {1, 30}, variant));
      ASSERT_OK(this->rig_->Begin({1, 30}, step));
      const int32_t wild[] = {-1, step.num_pages(), std::numeric_limits<int32_t>::max(),
                              std::numeric_limits<int32_t>::min()};
      std::vector<int32_t> table = step.BlockTable(1, this->rig_->table_width());
      for (const int32_t page : {0, 7, 19, 24}) table[page] = wild[page % 4];
      DeviceSpan<int32_t> device(const_cast<int32_t*>(this->rig_->tensors.block_table.address()), table.size());
      ASSERT_OK(Upload(*this->stream_, device, table));
      ASSERT_OK(this->rig_->RunEagerly({1, 30}, step));
      EXPECT_EQ(this->rig_->Check({1, 30}, step,
                                  [](int32_t p) { return p / 4 != 0 && p / 4 != 7 && p / 4 != 19 && p / 4 != 24; }),
                "")
          << variant->kernel.name;
    }
  }
}

// Whatever the arrays hold, nothing outside the tensors is touched, and requests whose own entries are right are right.
TYPED_TEST(PagedPrefillTest, WildArraysHarmNothing) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const PrefillShape shape = {.dtype = dtype, .kv_dtype = dtype, .page_size = 4, .seed = 840};
    const PrefillCase step(shape, {12, 20, 8}, {40, 60, 20});
    const Extent bucket = {3, 40};
    for (const PrefillVariant* const variant : this->Runnable(shape)) {
      ASSERT_OK(this->Prepare(step, bucket, variant));
      ASSERT_OK_AND_ASSIGN(const DeviceBuffer arrays, this->device_->Allocate(64 * 4, "arrays"));
      constexpr int32_t kMax = std::numeric_limits<int32_t>::max(), kMin = std::numeric_limits<int32_t>::min();
      const std::vector<std::vector<int32_t>> qo = {{0, 12, 32, 40},    {0, kMax, kMin, 40}, {kMin, kMax, kMin, kMax},
                                                    {kMax, kMax, 0, 0}, {40, 30, 20, 10},    {0, 41, 1000, 5},
                                                    {-5, -4, -3, kMax}};
      const std::vector<std::vector<int32_t>> kv = {{0, 10, 25, 30}, {0, kMax, kMin, 30}, {kMin, kMax, kMin, kMax}};
      for (const std::vector<int32_t>& qo_indptr : qo) {
        for (const std::vector<int32_t>& kv_indptr : kv) {
          for (const int32_t length : {20, kMin, kMax}) {
            std::vector<int32_t> values(64, 0);
            std::copy(qo_indptr.begin(), qo_indptr.end(), values.begin());
            std::copy(kv_indptr.begin(), kv_indptr.end(), values.begin() + 16);
            const std::vector<int32_t> lengths = {40, 60, length};
            std::copy(lengths.begin(), lengths.end(), values.begin() + 32);
            ASSERT_OK(Upload(*this->stream_, arrays.As<int32_t>(), values));
            ASSERT_OK(this->rig_->Begin(bucket, step));
            PrefillTensors& tensors = this->rig_->tensors;
            tensors.qo_indptr = arrays.As<const int32_t>().Sub(0, 4);
            tensors.kv_indptr = arrays.As<const int32_t>().Sub(16, 4);
            tensors.lengths = arrays.As<const int32_t>().Sub(32, 3);
            ASSERT_OK(this->rig_->RunEagerly(bucket, step));
            if (&qo_indptr != &qo[0] || &kv_indptr != &kv[0]) continue;
            for (int32_t token = 0; token < 32; ++token) {
              ASSERT_EQ(Difference(step.Expected(token, 1), &this->rig_->out[(token * 4 + 1) * 64],
                                   this->rig_->lse[token * 4 + 1], step.Tolerance()),
                        "")
                  << token;
            }
          }
        }
      }
    }
  }
}

TYPED_TEST(PagedPrefillTest, LseMayBeLeftOut) {
  const PrefillCase step({.seed = 850}, {5}, {9});
  ASSERT_OK(this->Prepare(step, {1, 5}));
  ASSERT_OK(this->rig_->Begin({1, 5}, step));
  this->rig_->tensors.lse = {};
  ASSERT_OK(this->rig_->RunEagerly({1, 5}, step));
  for (const float lse : this->rig_->lse) EXPECT_TRUE(std::isnan(lse));
}

TYPED_TEST(PagedPrefillTest, TensorsThatAreTooSmallAreRefusedByName) {
  const PrefillCase step({.seed = 900}, {8, 8}, {40, 50});
  ASSERT_OK(this->Prepare(step, {2, 16}));
  const PrefillTensors good = this->rig_->tensors;
  const auto refused = [&](auto change, const char* part) {
    PrefillTensors tensors = good;
    change(tensors);
    EXPECT_STATUS(this->rig_->prefill().Run(*this->stream_, {2, 16}, tensors), kInvalidArgument, part);
  };
  refused([](auto& t) { t.q = t.q.Sub(0, t.q.size() - 4); }, "q has 4095 elements, needs 4096");
  refused([](auto& t) { t.k = t.k.Sub(4, t.k.size() - 4); }, "k must be aligned to 16");
  refused([](auto& t) { t.k = {}; }, "k has 0 elements");
  refused([](auto& t) { t.v = t.v.Sub(0, t.v.size() / 2); }, "v has");
  refused([](auto& t) { t.out = {}; }, "out has 0 elements");
  refused([](auto& t) { t.lse = t.lse.Sub(0, 63); }, "lse has 63 elements, needs 64");
  refused([](auto& t) { t.qo_indptr = t.qo_indptr.Sub(0, 2); }, "qo_indptr has 2 elements, needs 3");
  refused([](auto& t) { t.kv_indptr = t.kv_indptr.Sub(0, 2); }, "kv_indptr has 2 elements, needs 3");
  refused([](auto& t) { t.lengths = t.lengths.Sub(0, 1); }, "lengths has 1 elements, needs 2");
  refused([](auto& t) { t.kv_indices = {}; }, "kv_indices 0");
  refused([](auto& t) { t.block_table = t.kv_indices; }, "block_table");
  refused([](auto& t) { t.table_width = 3; }, "table_width 3");
  refused(
      [](auto& t) {
        t.block_table = t.kv_indices.Sub(0, 7);
        t.table_width = 4;
        t.kv_indptr = t.kv_indices = {};
      },
      "block_table has 7 elements, needs 8");
  refused(
      [](auto& t) {
        t.block_table = t.kv_indices.Sub(0, 8);
        t.table_width = 4;
        t.kv_indptr = t.kv_indices = t.lengths = {};
      },
      "lengths has 0 elements, needs 2");
  refused([](auto& t) { t.sinks = DeviceSpan<const float>(reinterpret_cast<const float*>(t.lengths.address()), 3); },
          "sinks has 3 elements, needs 4");
}

TYPED_TEST(PagedPrefillTest, ConfigurationsThatCannotRunAreRefused) {
  const PagedPrefillConfig good = {.q_heads = 4, .kv_heads = 2, .head_dim = 64, .scale = 0.125f};
  ASSERT_OK(PagedPrefill::Create(*this->device_, good));
  const auto refused = [&](auto change, const char* part) {
    PagedPrefillConfig config = good;
    change(config);
    EXPECT_STATUS(PagedPrefill::Create(*this->device_, config), kInvalidArgument, part);
  };
  constexpr float kInfinite = std::numeric_limits<float>::infinity();
  refused([](auto& c) { c.kv_heads = 0; }, "kv_heads is 0");
  refused([](auto& c) { c.q_heads = c.kv_heads = 65536; }, "kv_heads is 65536, must be 1 to 65535");
  refused([](auto& c) { c.q_heads = 3; }, "q_heads is 3");
  refused([](auto& c) { c.q_heads = 66; }, "q_heads is 66");
  refused([](auto& c) { c.page_size = 0; }, "page_size is 0");
  refused([](auto& c) { c.window = -1; }, "window is -1");
  refused([](auto& c) { c.layout = static_cast<KvLayout>(7); }, "layout is 7, must be NHD or HND");
  for (const float scale : {0.0f, -1.0f, kInfinite, std::nanf("")}) {
    refused([scale](auto& c) { c.scale = scale; }, "scale is");
  }
  for (const float cap : {-1.0f, kInfinite, std::nanf("")}) {
    refused([cap](auto& c) { c.soft_cap = cap; }, "soft_cap is");
  }
  const auto missing = [&](auto change, const char* part) {
    PagedPrefillConfig config = good;
    change(config);
    EXPECT_STATUS(PagedPrefill::Create(*this->device_, config), kUnimplemented, part);
  };
  missing([](auto& c) { c.head_dim = 96; }, "head_dim 96; there are float32 with float32 KV and head_dim 64");
  missing([](auto& c) { c.kv_dtype = DType::kFloat8E4M3; }, "float32 with float8_e4m3 KV");
  missing([](auto& c) { c.dtype = DType::kFloat16; }, "float16 with float32 KV");
}

// The largest page that a configuration may have, and buckets of more blocks than a grid has.
TYPED_TEST(PagedPrefillTest, AStreamOfAnotherDeviceIsRefused) {
  ASSERT_OK(this->Prepare(PrefillCase({.seed = 871}, {4}, {9}), {1, 4}));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> other, TypeParam::Create());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> stream, other->CreateStream());
  EXPECT_STATUS(this->rig_->prefill().Run(*stream, {1, 4}, this->rig_->tensors), kInvalidArgument,
                "the stream is of device");
}

TYPED_TEST(PagedPrefillTest, SizesThatOverflowAreRefused) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  const PrefillCase step({.seed = 905}, {8}, {40});
  ASSERT_OK(this->Prepare(step, {1, 8}));
  EXPECT_STATUS(this->rig_->prefill().Run(*this->stream_, {kMost, 8}, this->rig_->tensors), kInvalidArgument,
                "less than 2^31 (tokens + requests + 1) * q_heads");
  EXPECT_STATUS(this->rig_->prefill().Run(*this->stream_, {1, kMost}, this->rig_->tensors), kInvalidArgument,
                "less than 2^31 (tokens + requests + 1) * q_heads");
  const PagedPrefillConfig large = {
      .q_heads = 65535, .kv_heads = 65535, .head_dim = 256, .page_size = kMost, .scale = 0.125f};
  ASSERT_OK_AND_ASSIGN(const auto prefill, PagedPrefill::Create(*this->device_, large));
  EXPECT_STATUS(prefill->Run(*this->stream_, {1, 8}, this->rig_->tensors), kInvalidArgument, "q has");
}

TYPED_TEST(PagedPrefillTest, RunAllocatesNothing) {
  const PrefillCase step({.seed = 910}, {5}, {40});
  ASSERT_OK(this->Prepare(step, {1, 5}));
  ASSERT_OK(this->rig_->Begin({1, 5}, step));
  const size_t before = this->device_->total_allocations();
  ASSERT_OK(this->rig_->prefill().Run(*this->stream_, {1, 5}, this->rig_->tensors));
  EXPECT_EQ(this->device_->total_allocations(), before);
  ASSERT_OK(this->stream_->Synchronize());
}

TEST(PrefillVariants, EachIsFoundByWhatItIs) {
  for (const PrefillVariant& variant : attention::PrefillVariants()) {
    const auto found = [&variant](int32_t capability) {
      return attention::FindPrefillVariant(variant.dtype, variant.kv_dtype, variant.head_dim, capability);
    };
    EXPECT_EQ(found(variant.only_capability), &variant) << variant.kernel.name;
    // A device that nothing was made for, Host among them, gets the variant for all.
    for (const int32_t capability : {0, 80, 100}) EXPECT_EQ(found(capability)->only_capability, 0);
  }
  EXPECT_EQ(attention::FindPrefillVariant(DType::kFloat8E4M3, DType::kFloat8E4M3, 64, 90), nullptr);
}

}  // namespace
}  // namespace pristine::testing
