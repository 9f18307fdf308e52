// A manager, a StepMetadata, a plan and a wrapper over one KV pool: the smallest engine that decodes. Runs the same
// body eagerly and from captured graphs.
#ifndef PRISTINE_TESTS_ATTENTION_DECODE_RIG_H_
#define PRISTINE_TESTS_ATTENTION_DECODE_RIG_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/attention/paged_decode.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/status.h"
#include "tests/support/backends.h"
#include "tests/support/oracle_case.h"

namespace pristine::testing {

// Blocking copies of whole buffers.
template <class T>
absl::Status Upload(Stream& stream, DeviceSpan<T> to, const std::vector<std::remove_const_t<T>>& values) {
  const absl::Span<const std::byte> bytes(reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T));
  PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(AsWritableBytes(to).Sub(0, bytes.size()), bytes));
  return stream.Synchronize();
}
template <class T>
absl::StatusOr<std::vector<std::remove_const_t<T>>> Download(Stream& stream, DeviceSpan<T> from) {
  std::vector<std::remove_const_t<T>> values(from.size());
  PRISTINE_RETURN_IF_ERROR(
      stream.CopyToHost({reinterpret_cast<std::byte*>(values.data()), from.bytes()}, AsBytes(from)));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return values;
}

struct RigOptions {
  std::vector<int32_t> buckets = {4};  // requests
  int32_t max_length = 512;
  int32_t num_pages = 0;
  attention::DecodeScheduler scheduler = attention::DecodeScheduler::kDevice;
  bool block_table = false;
};

class DecodeRig {
 public:
  static absl::StatusOr<std::unique_ptr<DecodeRig>> Create(Device& device, Stream& stream, const DecodeShape& shape,
                                                           const RigOptions& options) {
    std::unique_ptr<DecodeRig> rig(new DecodeRig(stream, shape));
    rig->table_stride_ = options.block_table ? (options.max_length - 1) / shape.page_size + 3 : 0;
    PRISTINE_ASSIGN_OR_RETURN(rig->manager_, BufferManager::Create(device));
    const int32_t most = options.buckets.back();
    const int32_t pages = (options.max_length - 1) / shape.page_size + 1;
    PRISTINE_ASSIGN_OR_RETURN(rig->metadata_,
                              attention::StepMetadata::Create(*rig->manager_, {.max_requests = most,
                                                                               .max_tokens = most * shape.q_len,
                                                                               .page_size = shape.page_size,
                                                                               .num_pages = options.num_pages,
                                                                               .max_step_pages = most * pages,
                                                                               .max_length = options.max_length}));
    attention::DecodePlanConfig plan = {.buckets = {},
                                        .q_len = shape.q_len,
                                        .q_heads = shape.q_heads,
                                        .kv_heads = shape.kv_heads,
                                        .head_dim = shape.head_dim,
                                        .dtype = shape.dtype,
                                        .kv_dtype = shape.kv_dtype,
                                        .layout = shape.layout,
                                        .page_size = shape.page_size,
                                        .window = shape.window,
                                        .soft_cap = shape.soft_cap,
                                        .max_row_tokens = options.max_length,
                                        .derived_from = {rig->metadata_->lengths().id},
                                        .scheduler = options.scheduler};
    for (const int32_t requests : options.buckets) plan.buckets.push_back(rig->Of(requests));
    PRISTINE_ASSIGN_OR_RETURN(rig->plan_, attention::DecodePlan::Create(*rig->manager_, plan));
    PRISTINE_ASSIGN_OR_RETURN(
        rig->decode_, attention::PagedDecode::Create(*rig->plan_, 1 / std::sqrt(static_cast<float>(shape.head_dim))));
    const size_t element = attention::SizeOf(shape.dtype);
    const size_t row = size_t{1} * shape.q_len * shape.q_heads * shape.head_dim * element;
    const size_t pool = size_t{1} * options.num_pages * shape.page_size * shape.kv_heads * shape.head_dim *
                        attention::SizeOf(shape.KvDType());
    PRISTINE_ASSIGN_OR_RETURN(rig->q_, device.Allocate(most * row, "q"));
    PRISTINE_ASSIGN_OR_RETURN(rig->out_, device.Allocate(most * row, "out"));
    PRISTINE_ASSIGN_OR_RETURN(rig->lse_, device.Allocate(row / element / shape.head_dim * most * sizeof(float), "lse"));
    PRISTINE_ASSIGN_OR_RETURN(rig->scales_, device.Allocate(2 * sizeof(float), "scales"));
    PRISTINE_ASSIGN_OR_RETURN(rig->sinks_, device.Allocate(shape.q_heads * sizeof(float), "sinks"));
    PRISTINE_ASSIGN_OR_RETURN(rig->table_,
                              device.Allocate((most * rig->table_stride_ + 1) * sizeof(int32_t), "block_table"));
    PRISTINE_ASSIGN_OR_RETURN(rig->k_, device.Allocate(pool, "k"));
    PRISTINE_ASSIGN_OR_RETURN(rig->v_, device.Allocate(pool, "v"));
    DecodeRig* const self = rig.get();
    PRISTINE_ASSIGN_OR_RETURN(
        rig->runner_, GraphRunner::Create({.buckets = plan.buckets}, [self](Stream& queue, const Extent& bucket) {
          return self->decode_->Run(queue, bucket, self->tensors);
        }));
    PRISTINE_RETURN_IF_ERROR(rig->runner_->AddHook(*rig->manager_));
    PRISTINE_RETURN_IF_ERROR(rig->manager_->Seal());
    rig->tensors = {.q = rig->q_.As<const std::byte>(),
                    .k = rig->k_.As<const std::byte>(),
                    .v = rig->v_.As<const std::byte>(),
                    .out = rig->out_.As<std::byte>(),
                    .lse = rig->lse_.As<attention::LseBase2>(),
                    .kv_indptr = rig->metadata_->kv_indptr().live,
                    .kv_indices = rig->metadata_->kv_indices().live,
                    .lengths = rig->metadata_->lengths().live};
    if (options.block_table) {
      rig->tensors.kv_indptr = {};
      rig->tensors.kv_indices = {};
      rig->tensors.block_table = rig->table_.As<const int32_t>().Sub(0, most * rig->table_stride_);
      rig->tensors.block_table_stride = rig->table_stride_;
    }
    if (shape.k_scale != 1) rig->tensors.k_scale = rig->scales_.As<const float>().Sub(0, 1);
    if (shape.v_scale != 1) rig->tensors.v_scale = rig->scales_.As<const float>().Sub(1, 1);
    if (shape.sinks) rig->tensors.sinks = rig->sinks_.As<const float>();
    return rig;
  }

  // Writes a case's queries (the rest NaN) and pool (its pages are the pool's first).
  absl::Status Load(const DecodeCase& step) {
    PRISTINE_RETURN_IF_ERROR(stream_.Fill(AsWritableBytes(q_.As<std::byte>()), std::byte{0xff}));
    PRISTINE_RETURN_IF_ERROR(Upload(stream_, q_.As<std::byte>(), step.Q()));
    PRISTINE_RETURN_IF_ERROR(SetScales(shape_.k_scale, shape_.v_scale));
    if (shape_.sinks) {
      PRISTINE_RETURN_IF_ERROR(Upload(stream_, sinks_.As<float>(), step.Sinks()));
    }
    PRISTINE_RETURN_IF_ERROR(Upload(stream_, k_.As<std::byte>(), step.Pool(false)));
    return Upload(stream_, v_.As<std::byte>(), step.Pool(true));
  }

  absl::Status SetScales(float k_scale, float v_scale) {
    return Upload(stream_, scales_.As<float>(), std::vector<float>{k_scale, v_scale});
  }
  Extent Of(int32_t requests) const { return {requests, requests * shape_.q_len}; }

  // Opens a step over the first `requests` rows of `step` and plans it; plans from `plan_lengths` where given.
  absl::Status Begin(int32_t bucket, const DecodeCase& step, int32_t requests,
                     const std::vector<int32_t>* plan_lengths = nullptr) {
    const absl::Span<const int32_t> lengths = absl::MakeConstSpan(step.lengths()).first(requests);
    const absl::Span<const int32_t> indptr = absl::MakeConstSpan(step.indptr()).first(requests + 1);
    const std::vector<int32_t> slots(requests * shape_.q_len, -1), positions(requests * shape_.q_len, 0);
    if (table_stride_ > 0) {
      PRISTINE_RETURN_IF_ERROR(Upload(stream_, table_.As<int32_t>(), Table(bucket, step, requests)));
    }
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(Of(bucket), Of(requests)));
    PRISTINE_RETURN_IF_ERROR(metadata_->Refill({.lengths = lengths,
                                                .kv_indptr = indptr,
                                                .kv_indices = absl::MakeConstSpan(step.indices()).first(indptr.back()),
                                                .slots = slots,
                                                .positions = positions}));
    PRISTINE_RETURN_IF_ERROR(stream_.Fill(out_.As<std::byte>(), std::byte{0xff}));
    PRISTINE_RETURN_IF_ERROR(stream_.Fill(lse_.As<std::byte>(), std::byte{0xff}));
    return plan_->Plan(Of(bucket), plan_lengths != nullptr ? absl::MakeConstSpan(*plan_lengths) : lengths);
  }

  absl::Status RunEagerly(int32_t bucket, int32_t requests) {
    PRISTINE_RETURN_IF_ERROR(manager_->BeforeReplay(stream_, Of(bucket), Of(requests)));
    PRISTINE_RETURN_IF_ERROR(manager_->RecordPrologue(stream_, Of(bucket)));
    PRISTINE_RETURN_IF_ERROR(decode_->Run(stream_, Of(bucket), tensors));
    return ReadBack();
  }
  // Copies the outputs to `out` and `lse`. Blocks.
  absl::Status ReadBack() {
    PRISTINE_ASSIGN_OR_RETURN(raw_out, Download(stream_, out_.As<std::byte>()));
    PRISTINE_ASSIGN_OR_RETURN(lse, Download(stream_, lse_.As<float>()));
    out = ToFloats(raw_out, shape_.dtype);
    return absl::OkStatus();
  }
  absl::Status Capture() { return runner_->CaptureAll(stream_); }
  absl::Status Replay(int32_t bucket, int32_t requests) {
    PRISTINE_RETURN_IF_ERROR(runner_->Replay(stream_, Of(bucket), Of(requests)));
    return ReadBack();
  }

  // "" if the last run's first `requests` rows are attention over `step`, and the rest of the bucket is zeros and -inf.
  // Looks at every `every`th query of every head, counted through.
  std::string Check(int32_t bucket, const DecodeCase& step, int32_t requests, int64_t every = 1) const {
    int64_t count = 0;
    for (int32_t r = 0; r < bucket; ++r) {
      for (int32_t h = 0; h < shape_.q_heads; ++h) {
        for (int32_t i = 0; i < shape_.q_len; ++i) {
          if (count++ % every != 0) continue;
          const OracleRow expected = r < requests
                                         ? step.Expected(r, h, nullptr, i)
                                         : OracleRow{.out = {}, .lse = -std::numeric_limits<double>::infinity()};
          const std::string mismatch = CheckHead(r, h, expected, i);
          if (!mismatch.empty()) return mismatch;
        }
      }
    }
    return "";
  }
  std::string CheckHead(int32_t row, int32_t head, const OracleRow& expected, int32_t query = 0) const {
    const int32_t place = (row * shape_.q_len + query) * shape_.q_heads + head;
    const std::string mismatch =
        Mismatch(expected, absl::MakeConstSpan(out).subspan(size_t{1} * place * shape_.head_dim, shape_.head_dim),
                 lse[place], shape_.Precision());
    return mismatch.empty() ? "" : absl::StrCat("row ", row, ", query ", query, ", head ", head, ": ", mismatch);
  }

  BufferManager& manager() { return *manager_; }
  attention::StepMetadata& metadata() { return *metadata_; }
  attention::DecodePlan& plan() { return *plan_; }
  attention::PagedDecode& decode() { return *decode_; }

  attention::DecodeTensors tensors;  // of every run; a test may point it elsewhere
  std::vector<float> out, lse;       // of the last run
  std::vector<std::byte> raw_out;    // the same, as bytes

 private:
  DecodeRig(Stream& stream, const DecodeShape& shape) : stream_(stream), shape_(shape) {}

  // The step's pages as a block table. What belongs to no page is wild: nobody may use it.
  std::vector<int32_t> Table(int32_t bucket, const DecodeCase& step, int32_t requests) const {
    std::vector<int32_t> table(size_t{1} * bucket * table_stride_, 2147480000);
    for (int32_t r = 0; r < requests; ++r) {
      std::copy(step.indices().begin() + step.indptr()[r], step.indices().begin() + step.indptr()[r + 1],
                table.begin() + r * table_stride_);
    }
    return table;
  }

  Stream& stream_;
  const DecodeShape shape_;
  int64_t table_stride_ = 0;
  DeviceBuffer q_, k_, v_, out_, lse_, scales_, sinks_, table_;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<attention::StepMetadata> metadata_;
  std::unique_ptr<attention::DecodePlan> plan_;
  std::unique_ptr<attention::PagedDecode> decode_;
  std::unique_ptr<GraphRunner> runner_;
};

template <class BackendT>
class DecodeRigTest : public DeviceTest<BackendT> {
 protected:
  void TearDown() override {
    rig_.reset();
    DeviceTest<BackendT>::TearDown();
  }
  // A rig with room for `step`, and the step's tensors in it.
  absl::Status Prepare(const DecodeCase& step, RigOptions options = {}) {
    rig_.reset();
    options.num_pages = std::max(options.num_pages, step.num_pages());
    options.max_length = std::max(options.max_length, *std::max_element(step.lengths().begin(), step.lengths().end()));
    PRISTINE_ASSIGN_OR_RETURN(rig_, DecodeRig::Create(*this->device_, *this->stream_, step.shape(), options));
    return rig_->Load(step);
  }
  // One eager run of the whole case; "" if it is right, where Check looks with `every`.
  std::string Run(const DecodeCase& step, int32_t bucket, RigOptions options = {}, int64_t every = 1) {
    options.buckets = {bucket};
    const absl::Status status = [&]() -> absl::Status {
      PRISTINE_RETURN_IF_ERROR(Prepare(step, options));
      PRISTINE_RETURN_IF_ERROR(rig_->Begin(bucket, step, step.rows()));
      return rig_->RunEagerly(bucket, step.rows());
    }();
    return status.ok() ? rig_->Check(bucket, step, step.rows(), every) : status.ToString();
  }
  std::unique_ptr<DecodeRig> rig_;
};
}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_ATTENTION_DECODE_RIG_H_
