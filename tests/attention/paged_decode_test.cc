#include "pristine/attention/paged_decode.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "attention/variants.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DecodeScheduler;
using attention::DecodeVariant;
using attention::DType;

template <class BackendT>
class PagedDecodeTest : public DecodeRigTest<BackendT> {};
TYPED_TEST_SUITE(PagedDecodeTest, AllBackends, BackendNames);

const std::vector<int32_t> kNoNeedles = {-1, -1, -1, -1};

// One of each kind of CUDA kernel.
struct KernelKind {
  DType dtype, kv_dtype;
};
constexpr KernelKind kKernelKinds[] = {
    {DType::kFloat32, DType::kFloat32}, {DType::kBFloat16, DType::kBFloat16}, {DType::kFloat16, DType::kFloat8E4M3}};

// --- all variants, page sizes, groups and windows ---

TYPED_TEST(PagedDecodeTest, EveryVariantPageSizeAndWindowMatchesTheOracle) {
  uint64_t seed = 100;
  for (const DecodeVariant& variant : attention::DecodeVariants()) {
    for (const int32_t page_size : {1, 3, 16, 64}) {
      for (const int32_t window : {0, 1, 100}) {
        if (++seed % 5 != 0 && this->device_->backend() == Backend::kHost) continue;  // the oracle itself is slow there
        const DecodeShape shape = {.dtype = variant.dtype,
                                   .q_heads = 4,
                                   .kv_heads = 2,
                                   .head_dim = variant.head_dim,
                                   .page_size = page_size,
                                   .window = window,
                                   .seed = seed,
                                   .kv_dtype = variant.kv_dtype};
        const RigOptions options = {.scheduler = seed % 3 == 0 ? DecodeScheduler::kHost : DecodeScheduler::kDevice};
        const std::vector<int32_t> lengths = {1, page_size, 333, 0};
        EXPECT_EQ(this->Run(DecodeCase(shape, lengths, kNoNeedles), 5, options), "") << shape.ToString();
        // The same with needles: on the last key, the first key of the last page, the first key seen.
        const int32_t visible = window > 0 ? 333 - window : 332 / page_size * page_size;
        EXPECT_EQ(this->Run(DecodeCase(shape, lengths, {0, page_size - 1, visible, -1}), 4, options), "")
            << shape.ToString();
      }
    }
  }
}

TYPED_TEST(PagedDecodeTest, EveryGroupSizeMatchesTheOracle) {
  uint64_t seed = 200;
  for (const int32_t group : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32}) {
    for (const int32_t kv_heads : {1, 3}) {
      const DecodeShape shape = {.dtype = group % 2 == 0 ? DType::kBFloat16 : DType::kFloat32,
                                 .q_heads = group * kv_heads,
                                 .kv_heads = kv_heads,
                                 .head_dim = 64,
                                 .page_size = 4,
                                 .seed = ++seed};
      EXPECT_EQ(this->Run(DecodeCase(shape, {70, 150}, {-1, -1}), 2), "") << shape.ToString();
      EXPECT_EQ(this->Run(DecodeCase(shape, {70, 150}, {69, 128}), 2), "") << shape.ToString();
    }
  }
}

TYPED_TEST(PagedDecodeTest, NeedlesAtEveryEdgeAreFoundOrNotSeenAsTheyShould) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int32_t page_size : {1, 16, 24}) {
      for (const int32_t window : {0, 200}) {
        const DecodeShape shape = {.dtype = dtype, .page_size = page_size, .window = window, .seed = 300};
        const int32_t length = 323;
        // With one row in a bucket of one, this device cuts it into items of the smallest size.
        const attention::DecodePlanConfig probe = {.buckets = {},
                                                   .q_heads = 4,
                                                   .kv_heads = 2,
                                                   .page_size = page_size,
                                                   .window = window,
                                                   .max_row_tokens = length,
                                                   .derived_from = {}};
        const int processors = this->device_->multiprocessors();
        std::vector<attention::WorkItem> items(attention::MaxItems(probe, {1, 1}, processors));
        std::vector<int32_t> indptr(2);
        ASSERT_OK(
            attention::PlanItems(probe, {1, 1}, processors, {length}, absl::MakeSpan(items), absl::MakeSpan(indptr)));
        ASSERT_GT(indptr[1], 1) << "the row is not split";
        for (const int32_t needle : NeedlePositions(shape, length, items[0].end - items[0].begin)) {
          const DecodeCase step(shape, {length}, {needle});
          const bool visible = needle < length && (window == 0 || needle >= length - window);
          EXPECT_EQ(step.Expected(0, 0).top_mass >= 0.5, visible) << needle;
          for (const DecodeScheduler scheduler : {DecodeScheduler::kHost, DecodeScheduler::kDevice}) {
            EXPECT_EQ(this->Run(step, 1, {.scheduler = scheduler}), "") << shape.ToString() << ", needle " << needle;
          }
        }
      }
    }
  }
}

TYPED_TEST(PagedDecodeTest, RandomRaggedBatchesMatchTheOracle) {
  constexpr uint64_t kSeed = 41;
  std::mt19937_64 random(kSeed);
  for (int n = 0; n < 24; ++n) {
    DecodeShape shape = {.dtype = random() % 2 == 0 ? DType::kFloat32 : DType::kBFloat16,
                         .kv_heads = 1 << random() % 2,
                         .head_dim = random() % 2 == 0 ? 64 : 128,
                         .page_size = 1 + static_cast<int32_t>(random() % 20),
                         .window = random() % 2 == 0 ? 0 : 1 + static_cast<int32_t>(random() % 300),
                         .seed = random()};
    shape.q_heads = shape.kv_heads * (1 + static_cast<int32_t>(random() % 4));
    const int32_t rows = 1 + static_cast<int32_t>(random() % 6);
    std::vector<int32_t> lengths(rows), needles(rows);
    for (int32_t r = 0; r < rows; ++r) {
      lengths[r] = random() % 6 == 0 ? 0 : 1 + static_cast<int32_t>(random() % 400);
      needles[r] = n % 2 == 0 || lengths[r] == 0 ? -1 : static_cast<int32_t>(random() % lengths[r]);
    }
    EXPECT_EQ(this->Run(DecodeCase(shape, lengths, needles), rows + static_cast<int32_t>(random() % 3)), "")
        << "seed " << kSeed << ", case " << n << ": " << shape.ToString();
  }
}

// --- graphs ---

TYPED_TEST(PagedDecodeTest, EagerCapturedAndReplayedAreBitEqualAtEveryBucketEdge) {
  for (const KernelKind& kind : kKernelKinds) {
    const DecodeShape shape = {.dtype = kind.dtype, .page_size = 16, .seed = 400, .kv_dtype = kind.kv_dtype};
    const std::vector<int32_t> lengths = {300, 1, 17, 512, 0, 64, 255, 33};
    const DecodeCase step(shape, lengths, {299, -1, 16, -1, -1, 0, -1, -1});
    ASSERT_OK(this->Prepare(step, {.buckets = {1, 2, 4, 8}}));
    DecodeRig& rig = *this->rig_;
    const struct {
      int32_t bucket, requests;
    } edges[] = {{1, 0}, {1, 1}, {2, 1}, {2, 2}, {4, 3}, {4, 4}, {8, 5}, {8, 7}, {8, 8}, {8, 0}};
    std::vector<std::vector<std::byte>> eager_out;
    std::vector<std::vector<float>> eager_lse;
    for (const auto& edge : edges) {
      ASSERT_OK(rig.Begin(edge.bucket, step, edge.requests));
      ASSERT_OK(rig.RunEagerly(edge.bucket, edge.requests));
      EXPECT_EQ(rig.Check(edge.bucket, step, edge.requests), "") << edge.bucket << " " << edge.requests;
      eager_out.push_back(rig.raw_out);
      eager_lse.push_back(rig.lse);
    }
    ASSERT_OK(rig.Capture());  // with worst-case lengths, none of which is replayed
    const auto replay = [&](size_t i) {
      const auto& edge = edges[i];
      ASSERT_OK(rig.Begin(edge.bucket, step, edge.requests));
      ASSERT_OK(rig.Replay(edge.bucket, edge.requests));
      EXPECT_EQ(rig.raw_out, eager_out[i]) << edge.bucket << " " << edge.requests;
      EXPECT_EQ(0, std::memcmp(rig.lse.data(), eager_lse[i].data(), rig.lse.size() * sizeof(float)));
    };
    for (size_t i = 0; i < std::size(edges); ++i) replay(i);
    for (size_t i = std::size(edges); i-- > 0;) replay(i);
    std::vector<Violation> violations(8);
    EXPECT_EQ(rig.manager().Poll(absl::MakeSpan(violations)), 0u);
  }
}

TYPED_TEST(PagedDecodeTest, AReplayOfPaddingAloneGivesZerosAndMinusInfinity) {
  for (const KernelKind& kind : kKernelKinds) {
    const DecodeShape shape = {.dtype = kind.dtype, .seed = 401, .kv_dtype = kind.kv_dtype};
    const DecodeCase step(shape, {40, 50}, {-1, -1});
    ASSERT_OK(this->Prepare(step, {.buckets = {4}}));
    ASSERT_OK(this->rig_->Capture());
    ASSERT_OK(this->rig_->Begin(4, step, 0));
    ASSERT_OK(this->rig_->Replay(4, 0));
    EXPECT_EQ(this->rig_->Check(4, step, 0), "");
  }
}

TYPED_TEST(PagedDecodeTest, APlanOlderThanTheLengthsIsRefused) {
  const DecodeCase step({.seed = 402}, {40, 50}, {-1, -1});
  ASSERT_OK(this->Prepare(step, {.buckets = {4}, .scheduler = DecodeScheduler::kHost}));
  ASSERT_OK(this->rig_->Capture());
  ASSERT_OK(this->rig_->Begin(4, step, 2));
  ASSERT_OK(this->rig_->manager().Refill(this->rig_->metadata().lengths(), absl::MakeConstSpan(step.lengths())));
  EXPECT_STATUS(this->rig_->Replay(4, 2), kFailedPrecondition, "plan");
}

// --- hostile inputs ---

TYPED_TEST(PagedDecodeTest, PagesOutsideThePoolAreSkipped) {
  for (const KernelKind& kind : kKernelKinds) {
    for (const int32_t page_size : {1, 16}) {
      const DecodeShape shape = {.dtype = kind.dtype, .page_size = page_size, .seed = 500, .kv_dtype = kind.kv_dtype};
      const DecodeCase step(shape, {200, 100}, {-1, 99});
      ASSERT_OK(this->Prepare(step, {.buckets = {2}}));
      std::vector<int32_t> indices = step.indices();
      const int32_t bad[] = {-1, step.num_pages(), std::numeric_limits<int32_t>::max(),
                             std::numeric_limits<int32_t>::min()};
      for (int i = 0; i < 4; ++i) indices[2 * i + 1] = bad[i];
      ASSERT_OK_AND_ASSIGN(DeviceBuffer hostile, this->device_->Allocate(indices.size() * sizeof(int32_t), "hostile"));
      ASSERT_OK(Upload(*this->stream_, hostile.As<int32_t>(), indices));
      this->rig_->tensors.kv_indices = hostile.As<const int32_t>();
      ASSERT_OK(this->rig_->Begin(2, step, 2));
      ASSERT_OK(this->rig_->RunEagerly(2, 2));
      for (int32_t row = 0; row < 2; ++row) {
        const auto attended = [&](int32_t position) {
          const int32_t place = step.indptr()[row] + position / page_size;
          return indices[place] == step.indices()[place];
        };
        for (int32_t head = 0; head < shape.q_heads; ++head) {
          EXPECT_EQ(this->rig_->CheckHead(row, head, step.Expected(row, head, attended)), "");
        }
      }
      this->rig_.reset();
    }
  }
}

TYPED_TEST(PagedDecodeTest, ARowWhosePagesAreAllOutsideThePoolIsEmpty) {
  for (const KernelKind& kind : kKernelKinds) {
    const DecodeShape shape = {.dtype = kind.dtype, .seed = 501, .kv_dtype = kind.kv_dtype};
    const DecodeCase step(shape, {200}, {-1});
    ASSERT_OK(this->Prepare(step, {.buckets = {1}}));
    ASSERT_OK_AND_ASSIGN(DeviceBuffer hostile, this->device_->Allocate(200 * sizeof(int32_t), "hostile"));
    ASSERT_OK(Upload(*this->stream_, hostile.As<int32_t>(), std::vector<int32_t>(200, -7)));
    this->rig_->tensors.kv_indices = hostile.As<const int32_t>();
    ASSERT_OK(this->rig_->Begin(1, step, 1));
    ASSERT_OK(this->rig_->RunEagerly(1, 1));
    const OracleRow empty = {.out = {}, .lse = -std::numeric_limits<double>::infinity()};
    for (int32_t head = 0; head < shape.q_heads; ++head) EXPECT_EQ(this->rig_->CheckHead(0, head, empty), "");
    this->rig_.reset();
  }
}

TYPED_TEST(PagedDecodeTest, DeviceLengthsThatLieAreClippedToThePages) {
  for (const KernelKind& kind : kKernelKinds) {
    const DecodeShape shape = {.dtype = kind.dtype, .page_size = 16, .seed = 502, .kv_dtype = kind.kv_dtype};
    const DecodeCase step(shape, {160, 64, 32, 48}, kNoNeedles);  // whole pages, so that every slot of a row is defined
    ASSERT_OK(this->Prepare(step, {.buckets = {4}}));
    ASSERT_OK_AND_ASSIGN(DeviceBuffer lies, this->device_->Allocate(4 * sizeof(int32_t), "lies"));
    ASSERT_OK(Upload(*this->stream_, lies.As<int32_t>(), {std::numeric_limits<int32_t>::max(), 10, -5, 0}));
    this->rig_->tensors.lengths = lies.As<const int32_t>();
    const std::vector<int32_t> planned = {512, 512, 512, 512};  // the plan lies too
    ASSERT_OK(this->rig_->Begin(4, step, 4, &planned));
    ASSERT_OK(this->rig_->RunEagerly(4, 4));
    const OracleRow empty = {.out = {}, .lse = -std::numeric_limits<double>::infinity()};
    for (int32_t head = 0; head < shape.q_heads; ++head) {
      EXPECT_EQ(this->rig_->CheckHead(0, head, step.Expected(0, head)), "");
      EXPECT_EQ(this->rig_->CheckHead(1, head, step.Expected(1, head, [](int32_t p) { return p < 10; })), "");
      EXPECT_EQ(this->rig_->CheckHead(2, head, empty), "");
      EXPECT_EQ(this->rig_->CheckHead(3, head, empty), "");
    }
    this->rig_.reset();
  }
}

TYPED_TEST(PagedDecodeTest, WithoutLengthsARowIsAllOfItsPages) {
  for (const KernelKind& kind : kKernelKinds) {
    const DecodeShape shape = {.dtype = kind.dtype, .page_size = 16, .seed = 503, .kv_dtype = kind.kv_dtype};
    const DecodeCase step(shape, {160, 64}, {-1, 63});
    ASSERT_OK(this->Prepare(step, {.buckets = {3}}));
    this->rig_->tensors.lengths = {};
    this->rig_->tensors.lse = {};
    ASSERT_OK(this->rig_->Begin(3, step, 2));
    ASSERT_OK(this->rig_->RunEagerly(3, 2));
    for (int32_t row = 0; row < 2; ++row) {
      for (int32_t head = 0; head < shape.q_heads; ++head) {
        OracleRow expected = step.Expected(row, head);
        this->rig_->lse[row * shape.q_heads + head] = static_cast<float>(expected.lse);  // not asked for
        EXPECT_EQ(this->rig_->CheckHead(row, head, expected), "");
      }
    }
  }
}

// --- the comparison finds what is wrong, at 16K tokens ---

constexpr int32_t kLong = 16384;

template <class BackendT>
class DecodeMutantTest : public PagedDecodeTest<BackendT> {
 protected:
  // Runs the case right and with `mutate` applied to the rig before the run; the first must be accepted and the second
  // refused.
  template <class Mutate>
  void ExpectDetected(const DecodeShape& shape, int32_t needle, Mutate mutate) {
    const DecodeCase step(shape, {kLong, 64}, {needle, -1});
    ASSERT_EQ(this->Run(step, 2), "");
    ASSERT_OK(mutate(*this->rig_, step));
    ASSERT_OK(this->rig_->Begin(2, step, 2));
    ASSERT_OK(this->rig_->RunEagerly(2, 2));
    ExpectWrong(step, needle);
    this->rig_.reset();
  }
  // The first head of the long row is wrong for its value, not for a NaN that nobody should have read.
  void ExpectWrong(const DecodeCase& step, int32_t needle) {
    EXPECT_NE(this->rig_->CheckHead(0, 0, step.Expected(0, 0)), "") << step.shape().ToString() << ", needle " << needle;
    for (int32_t d = 0; d < step.shape().head_dim; ++d) EXPECT_TRUE(std::isfinite(this->rig_->out[d])) << d;
    EXPECT_TRUE(std::isfinite(this->rig_->lse[0]));
  }
  DeviceBuffer changed_;
  // The kernels alone over the rig's tensors, with a plan made by hand for two rows.
  absl::Status RunPlan(const DecodeShape& shape, const std::vector<int32_t>& indptr,
                       const std::vector<attention::WorkItem>& items) {
    std::vector<int32_t> plan = {static_cast<int32_t>(items.size())};
    plan.insert(plan.end(), indptr.begin(), indptr.end());
    for (const attention::WorkItem& item : items) plan.insert(plan.end(), {item.row, item.begin, item.end});
    PRISTINE_RETURN_IF_ERROR(Put(plan));
    const int32_t max_items = static_cast<int32_t>(items.size());
    const size_t partials = size_t{1} * max_items * shape.q_heads;
    PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer partial_out,
                              this->device_->Allocate(partials * shape.head_dim * sizeof(float), "partial_out"));
    PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer partial_lse,
                              this->device_->Allocate(partials * sizeof(float), "partial_lse"));
    const attention::DecodeTensors& tensors = this->rig_->tensors;
    const DecodeVariant& variant = *attention::FindDecodeVariant(shape.dtype, shape.KvDType(), shape.head_dim);
    PRISTINE_RETURN_IF_ERROR(Launch(
        *this->stream_, variant.decode,
        {.q = tensors.q.address(),
         .kv = {.k = tensors.k.address(),
                .v = tensors.v.address(),
                .k_scale = nullptr,
                .v_scale = nullptr,
                .page_stride = shape.page_size * shape.kv_heads * shape.head_dim,
                .token_stride = shape.kv_heads * shape.head_dim,
                .head_stride = shape.head_dim,
                .kv_indptr = tensors.kv_indptr.address(),
                .pages = tensors.kv_indices.address(),
                .pages_size = static_cast<int64_t>(tensors.kv_indices.size()),
                .table_stride = 0,
                .lengths = tensors.lengths.address(),
                .num_pages = static_cast<int64_t>(tensors.k.bytes() / (attention::SizeOf(shape.dtype) * shape.kv_heads *
                                                                       shape.head_dim * shape.page_size)),
                .page_size = shape.page_size,
                .kv_heads = shape.kv_heads},
         .plan = changed_.As<int32_t>().address(),
         .sinks = nullptr,
         .out = nullptr,
         .lse = nullptr,
         .partial_out = partial_out.As<float>().address(),
         .partial_lse = partial_lse.As<float>().address(),
         .counters = nullptr,
         .rows = 2,
         .q_len = 1,
         .q_heads = shape.q_heads,
         .head_dim = shape.head_dim,
         .max_items = max_items,
         .blocks = 0,
         .most_tiles = 0,
         .row_tokens = 0,
         .window = shape.window,
         .scale_log2 = static_cast<float>(std::log2(std::exp(1.0)) / std::sqrt(shape.head_dim)),
         .soft_cap = 0,
         .begins_early = false}));
    PRISTINE_RETURN_IF_ERROR(Launch(*this->stream_, variant.merge,
                                    {.partial_out = partial_out.As<float>().address(),
                                     .partial_lse = partial_lse.As<float>().address(),
                                     .plan = changed_.As<int32_t>().address(),
                                     .sinks = nullptr,
                                     .out = tensors.out.address(),
                                     .lse = tensors.lse.address(),
                                     .rows = 2,
                                     .q_len = 1,
                                     .max_items = max_items,
                                     .q_heads = shape.q_heads,
                                     .head_dim = shape.head_dim}));
    return this->rig_->ReadBack();
  }
  void TearDown() override {
    changed_ = DeviceBuffer();
    PagedDecodeTest<BackendT>::TearDown();
  }
  absl::Status Put(const std::vector<int32_t>& values) {
    changed_ = DeviceBuffer();
    PRISTINE_ASSIGN_OR_RETURN(changed_, this->device_->Allocate(values.size() * sizeof(int32_t), "changed"));
    return Upload(*this->stream_, changed_.As<int32_t>(), values);
  }
};
TYPED_TEST_SUITE(DecodeMutantTest, AllBackends, BackendNames);

DecodeShape Mutant(DType dtype) { return {.dtype = dtype, .q_heads = 2, .page_size = 16, .seed = 600}; }

TYPED_TEST(DecodeMutantTest, AnOffByOneLengthIsDetected) {
  const auto shorter = [&](DecodeRig& rig, const DecodeCase& step) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(this->Put({kLong - 1, step.lengths()[1]}));
    rig.tensors.lengths = this->changed_.template As<const int32_t>();
    return absl::OkStatus();
  };
  this->ExpectDetected(Mutant(DType::kFloat32), -1, shorter);
  this->ExpectDetected(Mutant(DType::kFloat32), kLong - 1, shorter);
  this->ExpectDetected(Mutant(DType::kBFloat16), kLong - 1, shorter);
}

TYPED_TEST(DecodeMutantTest, ASwappedPageIsDetected) {
  const auto swap = [&](DecodeRig& rig, const DecodeCase& step) -> absl::Status {
    std::vector<int32_t> indices = step.indices();
    std::swap(indices[500], indices[step.indptr()[1]]);  // a page of row 0 and one of row 1
    PRISTINE_RETURN_IF_ERROR(this->Put(indices));
    rig.tensors.kv_indices = this->changed_.template As<const int32_t>();
    return absl::OkStatus();
  };
  this->ExpectDetected(Mutant(DType::kFloat32), -1, swap);
  this->ExpectDetected(Mutant(DType::kFloat32), 500 * 16 + 7, swap);
  this->ExpectDetected(Mutant(DType::kBFloat16), 500 * 16 + 7, swap);
}

TYPED_TEST(DecodeMutantTest, AWrongHeadGroupIsDetected) {
  const auto shift = [&](DecodeRig& rig, const DecodeCase& step) -> absl::Status {
    // One head further on: head 0 reads head 1's keys and values, the last one the next slot's first.
    const size_t head = step.shape().head_dim * attention::SizeOf(step.shape().dtype);
    const size_t page = head * step.shape().kv_heads * step.shape().page_size;
    rig.tensors.k = rig.tensors.k.Sub(head, rig.tensors.k.size() - page);
    rig.tensors.v = rig.tensors.v.Sub(head, rig.tensors.v.size() - page);
    return absl::OkStatus();
  };
  for (const int32_t needle : {-1, 9000}) {
    this->ExpectDetected(Mutant(DType::kFloat32), needle, shift);
    this->ExpectDetected(Mutant(DType::kBFloat16), needle, shift);
  }
}

// An item in the middle of a plan that covers everything is not there: neither planned nor merged.
TYPED_TEST(DecodeMutantTest, AMissingSplitIsDetected) {
  const struct {
    DType dtype;
    bool needle;
  } cases[] = {{DType::kFloat32, false}, {DType::kFloat32, true}, {DType::kBFloat16, true}};
  for (const auto& [dtype, needle] : cases) {
    const DecodeShape shape = Mutant(dtype);
    const int processors = this->device_->multiprocessors();
    const attention::DecodePlanConfig config = {.buckets = {},
                                                .q_heads = shape.q_heads,
                                                .kv_heads = shape.kv_heads,
                                                .page_size = shape.page_size,
                                                .max_row_tokens = kLong,
                                                .derived_from = {}};
    std::vector<attention::WorkItem> items(attention::MaxItems(config, {2, 2}, processors));
    std::vector<int32_t> indptr(3);
    ASSERT_OK_AND_ASSIGN(const int32_t count, attention::PlanItems(config, {2, 2}, processors, {kLong, 64},
                                                                   absl::MakeSpan(items), absl::MakeSpan(indptr)));
    items.resize(count);
    ASSERT_GT(indptr[1], 2) << "row 0 has no middle item";
    const int32_t middle = indptr[1] / 2;
    const int32_t position = needle ? (items[middle].begin + items[middle].end) / 2 : -1;
    const DecodeCase step(shape, {kLong, 64}, {position, -1});
    ASSERT_OK(this->Prepare(step, {.buckets = {2}}));
    ASSERT_OK(this->rig_->Begin(2, step, 2));
    ASSERT_OK(this->rig_->RunEagerly(2, 2));  // places the step's values
    ASSERT_OK(this->RunPlan(shape, indptr, items));
    ASSERT_EQ(this->rig_->Check(2, step, 2), "") << "the plan is whole";
    items.erase(items.begin() + middle);
    ASSERT_OK(this->RunPlan(shape, {0, indptr[1] - 1, indptr[2] - 1}, items));
    this->ExpectWrong(step, position);
    this->rig_.reset();
  }
}

// --- misuse ---

TYPED_TEST(PagedDecodeTest, TensorsThatAreTooSmallAreRefusedByName) {
  const DecodeCase step({.seed = 700}, {40, 50}, {-1, -1});
  ASSERT_OK(this->Prepare(step, {.buckets = {4}}));
  const attention::DecodeTensors good = this->rig_->tensors;
  const auto refused = [&](auto change, const char* part) {
    attention::DecodeTensors tensors = good;
    change(tensors);
    EXPECT_STATUS(this->rig_->decode().Run(*this->stream_, {4, 4}, tensors), kInvalidArgument, part);
  };
  refused([](auto& t) { t.q = t.q.Sub(0, t.q.size() - 4); }, "q has 1023 elements, needs 1024");
  refused([](auto& t) { t.q = t.q.Sub(4, t.q.size() - 4); }, "q has");
  refused([](auto& t) { t.k = t.k.Sub(4, t.k.size() - 4); }, "k must be aligned to 16");
  refused([](auto& t) { t.k = {}; }, "k has 0 elements");
  refused([](auto& t) { t.v = t.v.Sub(0, t.v.size() / 2); }, "v has");
  refused([](auto& t) { t.out = {}; }, "out has 0 elements");
  refused([](auto& t) { t.lse = t.lse.Sub(0, 15); }, "lse has 15 elements, needs 16");
  refused([](auto& t) { t.kv_indptr = t.kv_indptr.Sub(0, 4); }, "kv_indptr has 4 elements, needs 5");
  refused([](auto& t) { t.lengths = t.lengths.Sub(0, 3); }, "lengths has 3 elements, needs 4");
  EXPECT_STATUS(this->rig_->decode().Run(*this->stream_, {5, 5}, good), kNotFound, "{5 requests, 5 tokens}");
}

TYPED_TEST(PagedDecodeTest, AStreamOfAnotherDeviceIsRefused) {
  ASSERT_OK(this->Prepare(DecodeCase({.seed = 702}, {40}, {-1}), {.buckets = {4}}));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> other, TypeParam::Create());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> stream, other->CreateStream());
  EXPECT_STATUS(this->rig_->decode().Run(*stream, {4, 4}, this->rig_->tensors), kInvalidArgument,
                "the stream is of device");
}

TYPED_TEST(PagedDecodeTest, AScaleThatIsNotPositiveIsRefused) {
  const DecodeCase step({.seed = 701}, {4}, {-1});
  ASSERT_OK(this->Prepare(step, {.buckets = {1}}));
  for (const float scale : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::nanf("")}) {
    EXPECT_STATUS(attention::PagedDecode::Create(this->rig_->plan(), scale), kInvalidArgument, "scale");
  }
}

TYPED_TEST(PagedDecodeTest, RunAllocatesNothing) {
  const DecodeCase step({.seed = 702}, {40}, {-1});
  ASSERT_OK(this->Prepare(step, {.buckets = {1}}));
  ASSERT_OK(this->rig_->Begin(1, step, 1));
  const size_t before = this->device_->total_allocations();
  ASSERT_OK(this->rig_->decode().Run(*this->stream_, {1, 1}, this->rig_->tensors));
  EXPECT_EQ(this->device_->total_allocations(), before);
  ASSERT_OK(this->stream_->Synchronize());
}

TEST(DecodeVariants, EachIsFoundByWhatItIs) {
  for (const DecodeVariant& variant : attention::DecodeVariants()) {
    EXPECT_EQ(attention::FindDecodeVariant(variant.dtype, variant.kv_dtype, variant.head_dim), &variant);
    EXPECT_STRNE(variant.decode.name, variant.verify.name);
    EXPECT_LE(variant.shared_bytes, 227 * 1024) << variant.decode.name << ": more than a block of sm_90 has";
  }
  EXPECT_EQ(attention::FindDecodeVariant(DType::kFloat32, DType::kFloat32, 96), nullptr);
  EXPECT_EQ(attention::FindDecodeVariant(DType::kFloat32, DType::kFloat8E4M3, 64), nullptr);
  EXPECT_EQ(attention::FindDecodeVariant(DType::kBFloat16, DType::kFloat16, 64), nullptr);
}

}  // namespace
}  // namespace pristine::testing
