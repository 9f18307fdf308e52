// Cascade attention under the kit: each request's first half of pages and the rest are attended by themselves, and the
// two states merged, by each of the four merges. Short requests leave one side empty, padded rows both.
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

// The same where the halves of a request are rows of one decode, twice as many as there are requests, one behind the
// other; and so are their states, which the other three merges take.
class PairedWrapper : public conformance::AttentionWrapper {
 public:
  enum class Merge { kPairs, kLists, kRaggedLists };

  static absl::StatusOr<std::unique_ptr<PairedWrapper>> Create(Device& device, const AttentionShape& shape,
                                                               Merge merge) {
    std::unique_ptr<PairedWrapper> wrapper(new PairedWrapper(shape, merge));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->manager_, BufferManager::Create(device));
    const int32_t rows = 2 * shape.max_requests();
    PRISTINE_ASSIGN_OR_RETURN(wrapper->metadata_,
                              StepMetadata::Create(*wrapper->manager_, {.max_requests = rows,
                                                                        .max_tokens = rows,
                                                                        .page_size = shape.page_size,
                                                                        .num_pages = shape.num_pages(),
                                                                        .max_step_pages = 2 * shape.max_step_pages(),
                                                                        .max_length = shape.max_length}));
    // Request r's states are 2 r and 2 r + 1. Behind the real requests it is flat: nobody's states.
    PRISTINE_ASSIGN_OR_RETURN(wrapper->state_indptr_,
                              wrapper->manager_->Register<int32_t>({.name = "state_indptr",
                                                                    .role = Role::kRefilled,
                                                                    .kind = Kind::kIndptr,
                                                                    .axis = Axis::RequestsPlusOne(),
                                                                    .limit = rows},
                                                                   std::vector<int32_t>(rows + 1, 0)));
    attention::DecodePlanConfig plan = {.q_heads = shape.q_heads,
                                        .kv_heads = shape.kv_heads,
                                        .head_dim = shape.head_dim,
                                        .dtype = shape.dtype,
                                        .page_size = shape.page_size,
                                        .max_row_tokens = shape.max_length,
                                        .derived_from = {wrapper->metadata_->lengths().id}};
    for (const int32_t bucket : shape.buckets) plan.buckets.push_back(Rows(bucket));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->plan_, DecodePlan::Create(*wrapper->manager_, plan));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->decode_,
                              PagedDecode::Create(*wrapper->plan_, 1 / std::sqrt(static_cast<float>(shape.head_dim))));
    const size_t bytes = rows * wrapper->row_bytes_;
    PRISTINE_ASSIGN_OR_RETURN(wrapper->q_, device.Allocate(bytes, "q"));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->v_, device.Allocate(bytes, "states.v"));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->lse_,
                              device.Allocate(size_t{1} * rows * shape.q_heads * sizeof(LseBase2), "states.lse"));
    PRISTINE_RETURN_IF_ERROR(wrapper->manager_->Seal());
    return wrapper;
  }

  absl::Status Prepare(Stream& stream, int32_t bucket, const StepValues& step) override {
    const int32_t real = static_cast<int32_t>(step.lengths.size());
    std::vector<int32_t> lengths, indptr = {0}, state_indptr = {0};
    for (int32_t r = 0; r < real; ++r) {
      const int32_t begin = step.kv_indptr[r], end = step.kv_indptr[r + 1], middle = begin + (end - begin) / 2;
      lengths.push_back((middle - begin) * shape_.page_size);
      lengths.push_back(step.lengths[r] - lengths.back());
      indptr.insert(indptr.end(), {middle, end});
      state_indptr.push_back(2 * r + 2);
    }
    state_indptr.resize(2 * real + 1, 2 * real);
    const std::vector<int32_t> slots(2 * real, -1), positions(2 * real, 0);
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(Rows(bucket), Rows(real)));
    PRISTINE_RETURN_IF_ERROR(metadata_->Refill({.lengths = lengths,
                                                .kv_indptr = indptr,
                                                .kv_indices = step.kv_indices,
                                                .slots = slots,
                                                .positions = positions}));
    PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(state_indptr_, state_indptr));
    PRISTINE_RETURN_IF_ERROR(plan_->Plan(Rows(bucket), lengths));
    return manager_->BeforeReplay(stream, Rows(bucket), Rows(real));
  }

  absl::Status Run(Stream& stream, int32_t bucket, const AttentionTensors& t) override {
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream, Rows(bucket)));
    for (int32_t row = 0; row < 2 * bucket; ++row) {  // a request's query for both of its rows
      PRISTINE_RETURN_IF_ERROR(
          stream.Copy(q_.As<std::byte>().Sub(row * row_bytes_, row_bytes_), t.q.Sub(row / 2 * row_bytes_, row_bytes_)));
    }
    PRISTINE_RETURN_IF_ERROR(decode_->Run(stream, Rows(bucket),
                                          {.q = q_.As<const std::byte>(),
                                           .k = t.k,
                                           .v = t.v,
                                           .out = v_.As<std::byte>(),
                                           .lse = lse_.As<LseBase2>(),
                                           .kv_indptr = metadata_->kv_indptr().live,
                                           .kv_indices = metadata_->kv_indices().live,
                                           .lengths = metadata_->lengths().live}));
    const attention::MergeShape shape = {.dtype = shape_.dtype, .heads = shape_.q_heads, .head_dim = shape_.head_dim};
    const attention::MutableStates merged = {.v = t.out,
                                             .lse = {reinterpret_cast<LseBase2*>(t.lse.address()), t.lse.size()}};
    const attention::States states = {.v = v_.As<const std::byte>(), .lse = lse_.As<const LseBase2>()};
    const ReportRing reports = manager_->report_ring(Rows(bucket));
    switch (merge_) {
      case Merge::kPairs: {
        attention::States first = states, second = states;  // of every other row
        second.v = states.v.Sub(row_bytes_, states.v.size() - row_bytes_);
        second.lse = states.lse.Sub(shape.heads, states.lse.size() - shape.heads);
        first.v_stride = second.v_stride = int64_t{2} * shape.heads * shape.head_dim;
        first.lse_stride = second.lse_stride = 2 * shape.heads;
        return MergeState(stream, shape, bucket, first, second, merged, reports);
      }
      case Merge::kLists:
        return MergeStates(stream, shape, bucket, 2, states, merged, reports);
      case Merge::kRaggedLists:
        break;
    }
    return MergeRaggedStates(stream, shape, bucket, state_indptr_.live, 2 * bucket, states, merged, reports);
  }

  std::vector<BoundArray> BoundArrays() override {
    return {{Kind::kLength, metadata_->lengths().live, shape_.max_length},
            {Kind::kIndptr, metadata_->kv_indptr().live, 2 * shape_.max_step_pages()},
            {Kind::kPageTable, metadata_->kv_indices().live, shape_.num_pages()},
            {Kind::kIndptr, state_indptr_.live, 2 * shape_.max_requests()}};
  }
  BufferManager& manager() { return *manager_; }

 private:
  PairedWrapper(const AttentionShape& shape, Merge merge)
      : shape_(shape), merge_(merge), row_bytes_(attention::SizeOf(shape.dtype) * shape.q_heads * shape.head_dim) {}
  static Extent Rows(int32_t requests) { return {2 * requests, 2 * requests}; }

  const AttentionShape shape_;
  const Merge merge_;
  const size_t row_bytes_;  // of q and v
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<StepMetadata> metadata_;
  Buffer<int32_t> state_indptr_;
  std::unique_ptr<DecodePlan> plan_;
  std::unique_ptr<PagedDecode> decode_;
  DeviceBuffer q_, v_, lse_;
};

template <class BackendT>
class CascadeWrapperTest : public DeviceTest<BackendT> {
 protected:
  void ExpectConforms(const AttentionShape& shape) {
    ASSERT_OK_AND_ASSIGN(const auto wrapper, CascadeWrapper::Create(*this->device_, shape));
    ExpectClean(*wrapper, shape);
  }
  void ExpectConforms(const AttentionShape& shape, PairedWrapper::Merge merge) {
    ASSERT_OK_AND_ASSIGN(const auto wrapper, PairedWrapper::Create(*this->device_, shape, merge));
    ExpectClean(*wrapper, shape);
  }
  template <class WrapperT>
  void ExpectClean(WrapperT& wrapper, const AttentionShape& shape) {
    EXPECT_TRUE(Conforms(*this->stream_, wrapper, shape));
    ASSERT_OK_AND_ASSIGN(const std::vector<Violation> violations, wrapper.manager().Verify(*this->stream_));
    EXPECT_EQ(violations.size(), 0u) << violations[0].ToString();
    EXPECT_EQ(wrapper.manager().stats().neutralised, 0);
  }
};
TYPED_TEST_SUITE(CascadeWrapperTest, AllBackends, BackendNames);

TYPED_TEST(CascadeWrapperTest, MergedHalvesConform) {
  this->ExpectConforms({});
  this->ExpectConforms({.dtype = DType::kBFloat16, .q_heads = 8, .kv_heads = 1, .head_dim = 128, .buckets = {2, 5}});
}

TYPED_TEST(CascadeWrapperTest, PairsListsAndRaggedListsOfStatesConform) {
  using Merge = PairedWrapper::Merge;
  for (const Merge merge : {Merge::kPairs, Merge::kLists, Merge::kRaggedLists}) {
    SCOPED_TRACE(static_cast<int>(merge));
    this->ExpectConforms({.buckets = {1, 3}}, merge);
    this->ExpectConforms({.dtype = DType::kFloat16, .q_heads = 6, .kv_heads = 1, .page_size = 3, .buckets = {2}},
                         merge);
  }
}

TYPED_TEST(CascadeWrapperTest, MergedHalvesInTheNaturalBaseConform) {
  this->ExpectConforms({.page_size = 3, .max_length = 25, .buckets = {4}, .lse = AttentionShape::Lse::kNatural});
}

}  // namespace
}  // namespace pristine::testing
