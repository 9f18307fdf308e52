// Arrays on the device that no engine writes: page tables, lengths and plans of any content. Nothing wild is read or
// written, and what is left of a row is attended right. All keys, values and queries are ones, so that the result of a
// row tells how many tokens it attended.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/kernels/plan_layout.h"
#include "attention/variants.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DecodeVariant;
using attention::DType;
using attention::WorkItem;

constexpr int32_t kBig = std::numeric_limits<int32_t>::max(), kSmall = std::numeric_limits<int32_t>::min();
constexpr int32_t kRows = 3, kPages = 4, kItems = 8, kQHeads = 4, kKvHeads = 2;
constexpr int32_t kBlocks = 5;  // few: rows are split over them
constexpr int32_t kTableStride = 3;

struct Arrays {
  std::vector<int32_t> indptr;  // empty: a block table
  std::vector<int32_t> lengths;
};
const std::vector<int32_t> kIndices = {0, kBig, -1, 3, kSmall, kPages, 2, 1};
const Arrays kArrays[] = {
    {{0, 4, kSmall, kBig}, {kBig, 3, kBig}},
    {{6, 3, 2, 0}, {40, 40, 40}},
    {{-5, -1, 4, 8}, {70, 70, 70}},
    {{0, kBig, kBig, kBig}, {kBig, kBig, kBig}},
    {{kSmall, kBig, kSmall, 3}, {20, 128, 17}},
    {{0, 3, 6, 8}, {kSmall, -1, kBig}},
    {{}, {kBig, 2, kSmall}},
};

struct Plan {
  int32_t count;
  std::vector<int32_t> item_indptr;
  std::vector<WorkItem> items;
};
const std::vector<WorkItem> kWild = {{-1, 0, 4},  {kRows, 0, 4},       {kBig, 0, 4}, {0, -4, kBig},
                                     {1, 70, 60}, {2, kSmall, kSmall}, {2, 0, kBig}, {0, kSmall, 65}};
const Plan kPlans[] = {
    {kBig, {kSmall, 5, kBig, 2}, kWild},
    {8, {8, 4, 3, 0}, kWild},
    {7, {0, 4, 7, kBig}, kWild},
    {-1, {-1, -1, -1, -1}, std::vector<WorkItem>(kItems, {-1, -1, -1})},
    {kBig, {kBig, kBig, kBig, kBig}, std::vector<WorkItem>(kItems, {kBig, kBig, kBig})},
    {kSmall, {0, 8, 8, 8}, std::vector<WorkItem>(kItems, {kSmall, kSmall, kSmall})},
};

struct Config {
  int32_t q_len, window, page_size;
};
constexpr Config kConfigs[] = {{1, 0, 1}, {3, kBig, 16}, {16, 5, 3}, {1, 64, 64}, {4, 0, 16}};

// Tokens that a query attends, of those in [begin, end).
int64_t Attended(const Arrays& arrays, const Config& config, int32_t row, int32_t query, int64_t begin, int64_t end) {
  if (row < 0 || row >= kRows) return 0;
  const int64_t first = arrays.indptr.empty() ? row * kTableStride : arrays.indptr[row];
  int64_t last = arrays.indptr.empty() ? (row + 1) * kTableStride : arrays.indptr[row + 1];
  last = std::min<int64_t>(last, static_cast<int64_t>(kIndices.size()));
  if (first < 0) return 0;
  const int64_t length = std::min<int64_t>((last - first) * config.page_size, arrays.lengths[row]);
  const int64_t place = length - config.q_len + query;
  int64_t count = 0;
  for (int64_t p = std::max<int64_t>(begin, 0); p < std::min(end, length) && p <= place; ++p) {
    if (config.window > 0 && place - p >= config.window) continue;
    const int32_t page = kIndices[first + p / config.page_size];
    count += page >= 0 && page < kPages;
  }
  return count;
}

template <class BackendT>
class DecodeHostileTest : public DeviceTest<BackendT> {
 protected:
  template <class T>
  DeviceBuffer Put(const std::vector<T>& values) {
    absl::StatusOr<DeviceBuffer> buffer = this->device_->Allocate(values.size() * sizeof(T), "hostile");
    EXPECT_OK(buffer);
    EXPECT_OK(Upload(*this->stream_, buffer->template As<T>(), values));
    return *std::move(buffer);
  }
  DeviceBuffer Ones(int64_t count, DType dtype) { return Put(ToBytes(std::vector<float>(count, 1.0f), dtype)); }
  DeviceBuffer Nans(int64_t count) { return Put(std::vector<float>(count, std::nanf(""))); }

  // Runs a variant over `arrays`, with a plan or (null) without, and checks every row.
  void Check(const DecodeVariant& variant, const Arrays& arrays, const Config& config, const Plan* plan);

  bool begins_early_ = false;
};
TYPED_TEST_SUITE(DecodeHostileTest, AllBackends, BackendNames);

template <class BackendT>
void DecodeHostileTest<BackendT>::Check(const DecodeVariant& variant, const Arrays& arrays, const Config& config,
                                        const Plan* plan) {
  const int32_t dim = variant.head_dim, heads = config.q_len * kQHeads;
  std::vector<int32_t> words = {0};
  if (plan != nullptr) {
    words = {plan->count};
    words.insert(words.end(), plan->item_indptr.begin(), plan->item_indptr.end());
    for (const WorkItem& item : plan->items) words.insert(words.end(), {item.row, item.begin, item.end});
    ASSERT_EQ(static_cast<int64_t>(words.size()), attention::PlanWords(kRows, kItems));
  }
  const bool table = arrays.indptr.empty();
  const int64_t pool = int64_t{kPages} * config.page_size * kKvHeads * dim;
  const int64_t partials = plan != nullptr ? kItems * heads : 2 * kBlocks * attention::kDecodeTileRows;
  const DeviceBuffer words_d = Put(words), indptr_d = Put(table ? std::vector<int32_t>{0} : arrays.indptr),
                     indices_d = Put(kIndices), lengths_d = Put(arrays.lengths), k = Ones(pool, variant.kv_dtype),
                     v = Ones(pool, variant.kv_dtype), q = Ones(int64_t{kRows} * heads * dim, variant.dtype),
                     partial_out = Nans(partials * dim), partial_lse = Nans(partials),
                     out_d = Nans(int64_t{kRows} * heads * dim), lse_d = Nans(kRows * heads),
                     counters = Put(std::vector<uint32_t>(2 * kBlocks));
  ASSERT_OK(Launch(*this->stream_, config.q_len == 1 ? variant.decode : variant.verify,
                   {.q = q.As<std::byte>().address(),
                    .kv = {.k = k.As<std::byte>().address(),
                           .v = v.As<std::byte>().address(),
                           .k_scale = nullptr,
                           .v_scale = nullptr,
                           .page_stride = int64_t{config.page_size} * kKvHeads * dim,
                           .token_stride = kKvHeads * dim,
                           .head_stride = dim,
                           .kv_indptr = table ? nullptr : indptr_d.As<int32_t>().address(),
                           .pages = indices_d.As<int32_t>().address(),
                           .pages_size = static_cast<int64_t>(kIndices.size()),
                           .table_stride = table ? kTableStride : 0,
                           .lengths = lengths_d.As<int32_t>().address(),
                           .num_pages = kPages,
                           .page_size = config.page_size,
                           .kv_heads = kKvHeads},
                    .plan = plan != nullptr ? words_d.As<int32_t>().address() : nullptr,
                    .sinks = nullptr,
                    .out = plan != nullptr ? nullptr : out_d.As<std::byte>().address(),
                    .lse = plan != nullptr ? nullptr : lse_d.As<attention::LseBase2>().address(),
                    .partial_out = partial_out.As<float>().address(),
                    .partial_lse = partial_lse.As<float>().address(),
                    .counters = plan != nullptr ? nullptr : counters.As<uint32_t>().address(),
                    .rows = kRows,
                    .q_len = config.q_len,
                    .q_heads = kQHeads,
                    .head_dim = dim,
                    .max_items = plan != nullptr ? kItems : 0,
                    .blocks = plan != nullptr ? 0 : kBlocks,
                    .most_tiles = plan != nullptr ? 0 : 8,
                    .row_tokens = config.q_len == 1 ? 0 : 100,
                    .window = config.window,
                    .scale_log2 = 1,
                    .soft_cap = 0,
                    .begins_early = begins_early_}));
  if (plan != nullptr) {
    ASSERT_OK(Launch(*this->stream_, variant.merge,
                     {.partial_out = partial_out.As<float>().address(),
                      .partial_lse = partial_lse.As<float>().address(),
                      .plan = words_d.As<int32_t>().address(),
                      .sinks = nullptr,
                      .out = out_d.As<std::byte>().address(),
                      .lse = lse_d.As<attention::LseBase2>().address(),
                      .rows = kRows,
                      .q_len = config.q_len,
                      .max_items = kItems,
                      .q_heads = kQHeads,
                      .head_dim = dim}));
  }
  ASSERT_OK_AND_ASSIGN(const std::vector<float> lse, Download(*this->stream_, lse_d.As<float>()));
  ASSERT_OK_AND_ASSIGN(
      const std::vector<std::byte> bytes,
      Download(*this->stream_, out_d.As<std::byte>().Sub(0, lse.size() * dim * SizeOf(variant.dtype))));
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> left, Download(*this->stream_, counters.As<uint32_t>()));
  const std::vector<float> out = ToFloats(bytes, variant.dtype);
  for (int32_t place = 0; place < kRows * heads; ++place) {
    const int32_t row = place / heads, query = place % heads / kQHeads;
    int64_t count = 0;
    if (plan == nullptr) {
      count = Attended(arrays, config, row, query, 0, kBig);
    } else {
      const int32_t items = std::clamp(plan->count, 0, kItems);
      for (int32_t i = std::max(plan->item_indptr[row], 0); i < std::min(plan->item_indptr[row + 1], items); ++i) {
        const WorkItem& item = plan->items[i];
        count += Attended(arrays, config, item.row, query, item.begin, item.end);
      }
    }
    const float expected = count == 0 ? -std::numeric_limits<float>::infinity()
                                      : static_cast<float>(dim + std::log2(static_cast<double>(count)));
    if (count == 0) {
      ASSERT_EQ(lse[place], expected) << "row " << row << ", query " << query;
    } else {
      ASSERT_NEAR(lse[place], expected, 1e-3) << "row " << row << ", query " << query;
    }
    for (int32_t d = 0; d < dim; ++d) {
      ASSERT_NEAR(out[int64_t{place} * dim + d], count == 0 ? 0 : 1, 1e-2) << "row " << row << ", query " << query;
    }
  }
  EXPECT_EQ(left, std::vector<uint32_t>(2 * kBlocks)) << "the next launch's counters";
}

TYPED_TEST(DecodeHostileTest, PageTablesLengthsAndPlansOfAnyContentAreHarmless) {
  size_t next_plan = 0;
  for (const DecodeVariant& variant : attention::DecodeVariants()) {
    const bool on_host = this->device_->backend() == Backend::kHost;
    if (on_host && variant.head_dim != 64) continue;  // the oracle does nothing else there
    this->begins_early_ = false;
    if (!on_host) {
      ASSERT_EQ(variant.prepare(&this->begins_early_), 0);
    }
    for (const Config& config : kConfigs) {
      for (const Arrays& arrays : kArrays) {
        const size_t plan = next_plan++ % std::size(kPlans);
        for (const Plan* const by : {static_cast<const Plan*>(nullptr), &kPlans[plan]}) {
          SCOPED_TRACE(absl::StrCat(variant.decode.name, ", q_len ", config.q_len, ", window ", config.window,
                                    ", page_size ", config.page_size, ", arrays ", &arrays - kArrays,
                                    by == nullptr ? ", no plan" : absl::StrCat(", plan ", plan)));
          this->Check(variant, arrays, config, by);
          if (this->HasFatalFailure()) return;
        }
      }
    }
  }
}

}  // namespace
}  // namespace pristine::testing
