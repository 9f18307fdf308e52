// The naive attention as an engine would wrap it: arrays of its own, padded by itself, uploaded from pinned memory.
// With Fault::kNone it conforms; with any other it does not.
#ifndef PRISTINE_TESTS_KIT_TEST_NAIVE_WRAPPER_H_
#define PRISTINE_TESTS_KIT_TEST_NAIVE_WRAPPER_H_

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "pristine/conformance/attention_conformance.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"
#include "tests/kit_test/naive.h"
#include "tests/support/test_kernels.h"

namespace pristine::testing {

class NaiveWrapper : public conformance::AttentionWrapper {
 public:
  static absl::StatusOr<std::unique_ptr<NaiveWrapper>> Create(Device& device, const conformance::AttentionShape& shape,
                                                              Fault fault, bool tells_arrays = true) {
    std::unique_ptr<NaiveWrapper> wrapper(new NaiveWrapper(shape, fault, tells_arrays));
    const size_t bytes = wrapper->Size() * sizeof(int32_t);
    PRISTINE_ASSIGN_OR_RETURN(wrapper->device_, device.Allocate(2 * bytes, "naive.arrays"));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->staging_, device.AllocatePinned(kSlots * bytes, "naive.staging"));
    PRISTINE_ASSIGN_OR_RETURN(wrapper->other_, device.CreateStream());
    return wrapper;
  }

  absl::Status Prepare(Stream& stream, int32_t, const attention::StepValues& step) override {
    if (fault_ == Fault::kRefusesNoRequests && step.lengths.empty()) {
      return absl::InvalidArgumentError("naive: no requests");
    }
    const int32_t real = static_cast<int32_t>(step.lengths.size());
    if (fault_ == Fault::kSkipsSameRows && real == real_) return absl::OkStatus();
    real_ = real;
    if (fault_ == Fault::kNewArrays) block_ = 1 - block_;
    if (fault_ != Fault::kOneStagingSlot) slot_ = (slot_ + 1) % kSlots;
    const absl::Span<int32_t> to = staging_.As<int32_t>().subspan(slot_ * Size(), Size());
    std::fill(to.begin(), to.end(), 0);
    std::copy(step.lengths.begin(), step.lengths.end(), to.begin());
    std::fill_n(to.begin() + Indptr(), Indices() - Indptr(), step.kv_indptr.back());
    std::copy(step.kv_indptr.begin(), step.kv_indptr.end(), to.begin() + Indptr());
    std::copy(step.kv_indices.begin(), step.kv_indices.end(), to.begin() + Indices());
    std::fill_n(to.begin() + Slots(), shape_.max_requests(), -1);
    std::copy(step.slots.begin(), step.slots.end(), to.begin() + Slots());
    const auto upload = [&](size_t from, size_t end) {
      if (from == end) return absl::OkStatus();
      return stream.CopyFromHost(
          AsWritableBytes(device_.As<int32_t>().Sub(block_ * Size() + from, end - from)),
          staging_.As<std::byte>().subspan((slot_ * Size() + from) * sizeof(int32_t), (end - from) * sizeof(int32_t)));
    };
    const size_t pages_end = fault_ == Fault::kLeavesPageTail ? Indices() + step.kv_indices.size() : Slots();
    const size_t slots_end = fault_ == Fault::kLeavesSlotTail ? Slots() + real : Size();
    PRISTINE_RETURN_IF_ERROR(upload(0, pages_end));
    return upload(Slots(), slots_end);
  }

  absl::Status Run(Stream& stream, int32_t bucket, const conformance::AttentionTensors& t) override {
    const auto array = [&](size_t from) { return device_.As<int32_t>().address() + block_ * Size() + from; };
    const auto in = [](DeviceSpan<const std::byte> s) { return reinterpret_cast<const float*>(s.address()); };
    const auto out = [](DeviceSpan<std::byte> s) { return reinterpret_cast<float*>(s.address()); };
    NaiveParams params = {.q = in(t.q),
                          .k_new = in(t.k_new),
                          .v_new = in(t.v_new),
                          .k = out(t.k),
                          .v = out(t.v),
                          .out = out(t.out),
                          .lse = t.lse.address(),
                          .lengths = array(0),
                          .indptr = array(Indptr()),
                          .indices = array(Indices()),
                          .slots = array(Slots()),
                          .rows = bucket,
                          .q_heads = shape_.q_heads,
                          .kv_heads = shape_.kv_heads,
                          .head_dim = shape_.head_dim,
                          .page_size = shape_.page_size,
                          .max_pages = shape_.max_step_pages(),
                          .out_elements = static_cast<int64_t>(t.out.size() / sizeof(float)),
                          .pool_elements = static_cast<int64_t>(t.k.size() / sizeof(float)),
                          .scale = 1 / std::sqrt(static_cast<float>(shape_.head_dim)),
                          .window = shape_.attended ? kNaiveWindow : 0,
                          .backwards = fault_ == Fault::kCapturesOther && stream.capturing(),
                          .fault = fault_};
    if (fault_ == Fault::kRunsMaxRows) params.rows = shape_.max_requests();
    if (fault_ == Fault::kMissesLastRow) params.rows = bucket - 1;
    if (fault_ == Fault::kFreezesRows) params.rows = real_;
    if (fault_ == Fault::kFails) return Launch(stream, kFail, {0});
    if (shape_.appends) {
      PRISTINE_RETURN_IF_ERROR(Launch(stream, kNaiveAppend, params));
    }
    if (fault_ == Fault::kLeavesCapture && stream.capturing()) {  // what runs there instead makes no difference
      return Launch(*other_, kDelay, {.nanoseconds = 1});
    }
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kNaiveAttend, params));
    return fault_ == Fault::kBlocks ? stream.Synchronize() : absl::OkStatus();
  }

  std::vector<conformance::BoundArray> BoundArrays() override {
    if (!tells_arrays_) return {};
    const DeviceSpan<int32_t> all = device_.As<int32_t>();
    const size_t requests = shape_.max_requests();
    return {{Kind::kLength, all.Sub(0, requests), shape_.max_length},
            {Kind::kIndptr, all.Sub(Indptr(), requests + 1), shape_.max_step_pages()},
            {Kind::kPageTable, all.Sub(Indices(), Slots() - Indices()), shape_.num_pages()},
            {Kind::kSlot, all.Sub(Slots(), requests), shape_.num_pages() * shape_.page_size}};
  }

 private:
  static constexpr size_t kSlots = 4;  // more than steps are ever in flight
  NaiveWrapper(const conformance::AttentionShape& shape, Fault fault, bool tells_arrays)
      : shape_(shape), fault_(fault), tells_arrays_(tells_arrays) {}
  // One block: lengths, indptr, indices, slots.
  size_t Indptr() const { return shape_.max_requests(); }
  size_t Indices() const { return Indptr() + shape_.max_requests() + 1; }
  size_t Slots() const { return Indices() + shape_.max_step_pages(); }
  size_t Size() const { return Slots() + shape_.max_requests(); }

  const conformance::AttentionShape shape_;
  const Fault fault_;
  const bool tells_arrays_;
  DeviceBuffer device_;
  PinnedBuffer staging_;
  std::unique_ptr<Stream> other_;  // never captured
  size_t slot_ = 0;
  size_t block_ = 0;   // of the two in device_
  int32_t real_ = -1;  // requests of the step prepared last
};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_KIT_TEST_NAIVE_WRAPPER_H_
