// Cascade attention under the kit: each request's first half of pages and the rest are attended by themselves, and the
// two states merged in place. Short requests leave one side empty, padded rows both.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "pristine/attention/decode_plan.h"
#include "pristine/attention/merge_states.h"
#include "pristine/attention/paged_decode.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/conformance/attention_conformance.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::DecodePlan;
using attention::DType;
using attention::LseBase2;
using attention::LseNatural;
using attention::PagedDecode;
using attention::StepMetadata;
using attention::StepValues;
using conformance::AttentionShape;
using conformance::AttentionTensors;
using conformance::BoundArray;

class CascadeWrapper : public conformance::AttentionWrapper {
 public:
  static absl::StatusOr<std::unique_ptr<CascadeWrapper>> Create(Device& device, const AttentionShape& shape) {
    std::unique_ptr<CascadeWrapper> wrapper(new CascadeWrapper(shape));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->manager_, BufferManager::Create(device));
    for (Part* part : {&wrapper->first_, &wrapper->rest_}) {
      const std::string name = part == &wrapper->first_ ? "first" : "rest";
      PRISTINE_ASSIGN_OR_RETURN(part->metadata,
                                StepMetadata::Create(*wrapper->manager_, {.name = name,
                                                                          .max_requests = shape.max_requests(),
                                                                          .max_tokens = shape.max_requests(),
                                                                          .page_size = shape.page_size,
                                                                          .num_pages = shape.num_pages(),
                                                                          .max_step_pages = shape.max_step_pages(),
                                                                          .max_length = shape.max_length}));
      attention::DecodePlanConfig plan = {.name = name + ".plan",
                                          .q_heads = shape.q_heads,
                                          .kv_heads = shape.kv_heads,
                                          .head_dim = shape.head_dim,
                                          .dtype = shape.dtype,
                                          .page_size = shape.page_size,
                                          .max_row_tokens = shape.max_length,
                                          .derived_from = {part->metadata->lengths().id}};
      for (const int32_t bucket : shape.buckets) plan.buckets.push_back({bucket, bucket});
      PRISTINE_ASSIGN_OR_RETURN(part->plan, DecodePlan::Create(*wrapper->manager_, plan));
      PRISTINE_ASSIGN_OR_RETURN(part->decode,
                                PagedDecode::Create(*part->plan, 1 / std::sqrt(static_cast<float>(shape.head_dim))));
    }
    const size_t heads = size_t{1} * shape.max_requests() * shape.q_heads;
    PRISTINE_ASSIGN_OR_RETURN(wrapper->rest_out_,
                              device.Allocate(heads * shape.head_dim * attention::SizeOf(shape.dtype), "rest.out"));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->rest_lse_, device.Allocate(heads * sizeof(LseBase2), "rest.lse"));
    PRISTINE_RETURN_IF_ERROR(wrapper->manager_->Seal());
    return wrapper;
  }

  absl::Status Prepare(Stream& stream, int32_t bucket, const StepValues& step) override {
    const int32_t real = static_cast<int32_t>(step.lengths.size());
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep({bucket, bucket}, {real, real}));
    for (Part* part : {&first_, &rest_}) {
      std::vector<int32_t> lengths, indptr = {0}, pages;
      for (int32_t r = 0; r < real; ++r) {
        const int32_t begin = step.kv_indptr[r], end = step.kv_indptr[r + 1], middle = begin + (end - begin) / 2;
        const int32_t before = (middle - begin) * shape_.page_size;  // tokens, all of full pages
        const bool is_first = part == &first_;
        lengths.push_back(is_first ? before : step.lengths[r] - before);
        for (int32_t i = is_first ? begin : middle; i < (is_first ? middle : end); ++i) {
          pages.push_back(step.kv_indices[i]);
        }
        indptr.push_back(static_cast<int32_t>(pages.size()));
      }
      PRISTINE_RETURN_IF_ERROR(part->metadata->Refill({.lengths = lengths,
                                                       .kv_indptr = indptr,
                                                       .kv_indices = pages,
                                                       .slots = step.slots,
                                                       .positions = step.positions}));
      PRISTINE_RETURN_IF_ERROR(part->plan->Plan({bucket, bucket}, lengths));
    }
    return manager_->BeforeReplay(stream, {bucket, bucket}, {real, real});
  }

  absl::Status Run(Stream& stream, int32_t bucket, const AttentionTensors& t) override {
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream, {bucket, bucket}));
    const attention::MutableStates merged = {.v = t.out,
                                             .lse = {reinterpret_cast<LseBase2*>(t.lse.address()), t.lse.size()}};
    const attention::States rest = {.v = rest_out_.As<const std::byte>(), .lse = rest_lse_.As<const LseBase2>()};
    for (const Part* part : {&first_, &rest_}) {
      const bool is_first = part == &first_;
      PRISTINE_RETURN_IF_ERROR(part->decode->Run(stream, {bucket, bucket},
                                                 {.q = t.q,
                                                  .k = t.k,
                                                  .v = t.v,
                                                  .out = is_first ? merged.v : rest_out_.As<std::byte>(),
                                                  .lse = is_first ? merged.lse : rest_lse_.As<LseBase2>(),
                                                  .kv_indptr = part->metadata->kv_indptr().live,
                                                  .kv_indices = part->metadata->kv_indices().live,
                                                  .lengths = part->metadata->lengths().live}));
    }
    PRISTINE_RETURN_IF_ERROR(
        MergeStateInPlace(stream, {.dtype = shape_.dtype, .heads = shape_.q_heads, .head_dim = shape_.head_dim}, bucket,
                          merged, rest, {}, manager_->report_ring({bucket, bucket})));
    if (shape_.lse == AttentionShape::Lse::kBase2) return absl::OkStatus();
    const size_t heads = size_t{1} * bucket * shape_.q_heads;
    return ConvertLse(stream, merged.lse.Sub(0, heads), {reinterpret_cast<LseNatural*>(t.lse.address()), heads},
                      attention::EmptyLse::kMinusInfinity);
  }

  std::vector<BoundArray> BoundArrays() override {
    std::vector<BoundArray> arrays;
    for (const Part* part : {&first_, &rest_}) {
      arrays.push_back({Kind::kLength, part->metadata->lengths().live, shape_.max_length});
      arrays.push_back({Kind::kIndptr, part->metadata->kv_indptr().live, shape_.max_step_pages()});
      arrays.push_back({Kind::kPageTable, part->metadata->kv_indices().live, shape_.num_pages()});
    }
    return arrays;
  }
  BufferManager& manager() { return *manager_; }

 private:
  struct Part {
    std::unique_ptr<StepMetadata> metadata;
    std::unique_ptr<DecodePlan> plan;
    std::unique_ptr<PagedDecode> decode;
  };
  explicit CascadeWrapper(const AttentionShape& shape) : shape_(shape) {}
  const AttentionShape shape_;
  std::unique_ptr<BufferManager> manager_;
  Part first_, rest_;
  DeviceBuffer rest_out_, rest_lse_;
};

template <class BackendT>
class CascadeWrapperTest : public DeviceTest<BackendT> {
 protected:
  void ExpectConforms(const AttentionShape& shape) {
    ASSERT_OK_AND_ASSIGN(const auto wrapper, CascadeWrapper::Create(*this->device_, shape));
    EXPECT_TRUE(Conforms(*this->stream_, *wrapper, shape));
    ASSERT_OK_AND_ASSIGN(const std::vector<Violation> violations, wrapper->manager().Verify(*this->stream_));
    EXPECT_EQ(violations.size(), 0u) << violations[0].ToString();
    EXPECT_EQ(wrapper->manager().stats().neutralised, 0);
  }
};
TYPED_TEST_SUITE(CascadeWrapperTest, AllBackends, BackendNames);

TYPED_TEST(CascadeWrapperTest, MergedHalvesConform) {
  this->ExpectConforms({});
  this->ExpectConforms({.dtype = DType::kBFloat16, .q_heads = 8, .kv_heads = 1, .head_dim = 128, .buckets = {2, 5}});
}

TYPED_TEST(CascadeWrapperTest, MergedHalvesInTheNaturalBaseConform) {
  this->ExpectConforms({.page_size = 3, .max_length = 25, .buckets = {4}, .lse = AttentionShape::Lse::kNatural});
}

}  // namespace
}  // namespace pristine::testing
