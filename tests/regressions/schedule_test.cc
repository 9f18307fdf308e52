// A grid is as large as the largest schedule. Without splits, blocks behind the schedule's end ran whatever entries an
// earlier plan, or nobody, had left there: docs/culprits.md, 47.
#include <limits>
#include <type_traits>
#include <vector>

#include "attention/kernels/plan_layout.h"
#include "attention/variants.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class ScheduleRegression : public DeviceTest<BackendT> {};
TYPED_TEST_SUITE(ScheduleRegression, AllBackends, BackendNames);

TYPED_TEST(ScheduleRegression, Sglang34190EntriesBehindThePlansCountAreNotRun) {
  constexpr int32_t kRows = 3, kItems = 4, kDim = 64;
  constexpr float kUntouched = 12345;
  const attention::DecodeVariant& variant =
      *attention::FindDecodeVariant(attention::DType::kFloat32, attention::DType::kFloat32, kDim);
  if (this->device_->backend() == Backend::kCuda) {
    bool begins_early = false;
    ASSERT_EQ(variant.prepare(&begins_early), 0);
  }
  const auto put = [&](const auto& values) {
    using T = typename std::decay_t<decltype(values)>::value_type;
    absl::StatusOr<DeviceBuffer> buffer = this->device_->Allocate(values.size() * sizeof(T), "schedule");
    EXPECT_OK(buffer);
    EXPECT_OK(Upload(*this->stream_, buffer->template As<T>(), values));
    return *std::move(buffer);
  };
  // One entry, for row 0; behind it three of an earlier, larger plan. Row 2 is padding.
  const std::vector<int32_t> plan = {1, 0, 1, 1, 1, 0, 0, 2, 1, 0, 2, 0, 0, 2, 2, 0, 2};
  ASSERT_EQ(static_cast<int64_t>(plan.size()), attention::PlanWords(kRows, kItems));
  const DeviceBuffer plan_d = put(plan), indptr = put(std::vector<int32_t>{0, 2, 4, 4}),
                     indices = put(std::vector<int32_t>{0, 1, 2, 3}), lengths = put(std::vector<int32_t>{2, 2, 0}),
                     k = put(std::vector<float>(4 * kDim, 1)), v = put(std::vector<float>(4 * kDim, 1)),
                     q = put(std::vector<float>(kRows * kDim, 1)),
                     partial = put(std::vector<float>(kItems * kDim, kUntouched)),
                     partial_lse = put(std::vector<float>(kItems, kUntouched)),
                     out = put(std::vector<float>(kRows * kDim, kUntouched)),
                     lse = put(std::vector<float>(kRows, kUntouched));
  ASSERT_OK(Launch(*this->stream_, variant.decode,
                   {.q = q.template As<float>().address(),
                    .kv = {.k = k.template As<float>().address(),
                           .v = v.template As<float>().address(),
                           .k_scale = nullptr,
                           .v_scale = nullptr,
                           .page_stride = kDim,
                           .token_stride = kDim,
                           .head_stride = kDim,
                           .kv_indptr = indptr.template As<int32_t>().address(),
                           .pages = indices.template As<int32_t>().address(),
                           .pages_size = 4,
                           .table_stride = 0,
                           .lengths = lengths.template As<int32_t>().address(),
                           .num_pages = 4,
                           .page_size = 1,
                           .kv_heads = 1},
                    .plan = plan_d.template As<int32_t>().address(),
                    .sinks = nullptr,
                    .out = nullptr,
                    .lse = nullptr,
                    .partial_out = partial.template As<float>().address(),
                    .partial_lse = partial_lse.template As<float>().address(),
                    .counters = nullptr,
                    .rows = kRows,
                    .q_len = 1,
                    .q_heads = 1,
                    .head_dim = kDim,
                    .max_items = kItems,
                    .blocks = 0,
                    .most_tiles = 0,
                    .row_tokens = 0,
                    .window = 0,
                    .scale_log2 = 1,
                    .soft_cap = 0,
                    .begins_early = false}));
  ASSERT_OK(Launch(*this->stream_, variant.merge,
                   {.partial_out = partial.template As<float>().address(),
                    .partial_lse = partial_lse.template As<float>().address(),
                    .plan = plan_d.template As<int32_t>().address(),
                    .sinks = nullptr,
                    .out = out.template As<float>().address(),
                    .lse = lse.template As<attention::LseBase2>().address(),
                    .rows = kRows,
                    .q_len = 1,
                    .max_items = kItems,
                    .q_heads = 1,
                    .head_dim = kDim}));
  ASSERT_OK_AND_ASSIGN(const std::vector<float> items, Download(*this->stream_, partial_lse.template As<float>()));
  EXPECT_EQ(items, (std::vector<float>{kDim + 1, kUntouched, kUntouched, kUntouched}));
  ASSERT_OK_AND_ASSIGN(const std::vector<float> rows, Download(*this->stream_, lse.template As<float>()));
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(rows, (std::vector<float>{kDim + 1, kEmpty, kEmpty}));
}

}  // namespace
}  // namespace pristine::testing
