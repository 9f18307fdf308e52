#include "examples/replay_driver/injector.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "examples/replay_driver/compare.h"
#include "examples/replay_driver/inject_kernels.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {
namespace {

constexpr int64_t kFirstReplay = 10;  // replays before a misuse, so that it meets a run under way

// The first live row of `out` that holds a NaN; -1: none.
int32_t FirstNanRow(const ModelConfig& config, const std::vector<std::byte>& out, int32_t live_rows) {
  const int64_t elements = int64_t{config.heads} * config.head_dim;
  for (int64_t i = 0; i < live_rows * elements; ++i) {
    if (std::isnan(Load(config.dtype, out.data(), i))) return static_cast<int32_t>(i / elements);
  }
  return -1;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Injector>> Injector::Create(Injection injection, DecodeModel& model, const KvPool& pool,
                                                           RunReport& report) {
  std::unique_ptr<Injector> injector(new Injector(injection, model, pool, report));
  PRISTINE_RETURN_IF_ERROR(injector->Register());
  model.set_extra_nodes(
      [raw = injector.get()](Stream& stream, const Extent& bucket, int32_t layer, DecodeModel::Point point) {
        return raw->AddNodes(stream, bucket, layer, point);
      });
  return injector;
}

absl::Status Injector::Register() {
  if (injection_ == Injection::kWriteConstant || injection_ == Injection::kUndeclaredWrite) {
    BufferSpec spec;
    spec.name = "rope_table";
    PRISTINE_ASSIGN_OR_RETURN(constant_, model_.manager().Register<int32_t>(spec, std::vector<int32_t>(64, 16)));
  }
  if (poisons()) {
    in_use_.assign(static_cast<size_t>(model_.config().pool_pages) + 1, 1);
    BufferSpec spec;
    spec.name = "pages_in_use";
    spec.role = Role::kRefilled;
    spec.kind = Kind::kMask;
    PRISTINE_ASSIGN_OR_RETURN(pages_in_use_, model_.manager().Register<uint8_t>(spec, in_use_));
  }
  return absl::OkStatus();
}

absl::Status Injector::AddNodes(Stream& stream, const Extent& bucket, int32_t layer, DecodeModel::Point point) {
  const bool first = layer == 0 && point == DecodeModel::Point::kInputsMade;
  const auto stray = [](const Buffer<int32_t>& buffer, int64_t index) {
    return StrayWriteParams{buffer.live.address(), buffer.live.bytes(), index, 7};
  };
  switch (injection_) {
    case Injection::kWritePastEnd: {
      const Buffer<int32_t>& buffer = model_.kv_indptr_ws();
      return first ? Launch(stream, kWritePastEnd, stray(buffer, static_cast<int64_t>(buffer.live.size())))
                   : absl::OkStatus();
    }
    case Injection::kWriteConstant:
      return first ? Launch(stream, kWriteConstant, stray(constant_, 3)) : absl::OkStatus();
    case Injection::kUndeclaredWrite:
      return first ? Launch(stream, kUndeclaredWrite, stray(constant_, 3)) : absl::OkStatus();
    case Injection::kLiveSlotInPadding: {
      if (!first) return absl::OkStatus();
      const PadSlotsParams params = {.rows = bucket.requests,
                                     .page_size = model_.config().page_size,
                                     .lengths = model_.metadata().lengths().live.address(),
                                     .kv_indices = model_.metadata().kv_indices().live.address(),
                                     .slots = model_.metadata().slots().live.address()};
      return Launch(stream, kPadSlots, params);
    }
    case Injection::kPoisonUnused:
      return point == DecodeModel::Point::kInputsMade ? AddPoison(stream, bucket, layer) : absl::OkStatus();
    case Injection::kLeakyKernel: {
      if (point == DecodeModel::Point::kInputsMade) return AddPoison(stream, bucket, layer);
      const ModelConfig& config = model_.config();
      const LeakyScaleParams params = {.requests = model_.request_ids().live.address(),
                                       .rows = bucket.requests,
                                       .row_elements = config.heads * config.head_dim,
                                       .dtype = config.dtype,
                                       .q = model_.q().address(),
                                       .out = model_.out(layer).address()};
      return Launch(stream, kLeakyScale, params);
    }
    default:
      return absl::OkStatus();
  }
}

absl::Status Injector::AddPoison(Stream& stream, const Extent& bucket, int32_t layer) {
  const ModelConfig& config = model_.config();
  const int32_t pages = config.pool_pages + 1;
  const PoisonPagesParams unused = {.in_use = pages_in_use_.live.address(),
                                    .pages = pages,
                                    .page_bytes = config.pool_bytes() / pages,
                                    .k = pool_.k(layer).address(),
                                    .v = pool_.v(layer).address()};
  PRISTINE_RETURN_IF_ERROR(Launch(stream, kPoisonPages, unused));
  const size_t q_bytes = config.q_bytes(1);
  const size_t kv_bytes = q_bytes / config.heads * config.kv_heads;
  const PoisonPaddingParams padding = {
      .requests = model_.request_ids().live.address(),
      .rows = bucket.requests,
      .tensors = {{model_.q().address(), q_bytes},
                  {model_.k_new().address(), kv_bytes},
                  {model_.v_new().address(), kv_bytes},
                  {model_.out(layer).address(), q_bytes},
                  {AsWritableBytes(model_.lse(layer)).address(), sizeof(attention::LseBase2) * config.heads}}};
  return Launch(stream, kPoisonPadding, padding);
}

absl::Status Injector::Refill(const StepInputs& inputs) {
  if (!poisons()) return absl::OkStatus();
  std::fill(in_use_.begin(), in_use_.end(), uint8_t{0});
  in_use_[0] = 1;  // the dummy page is kept finite
  for (const int32_t page : inputs.kv_indices) in_use_[static_cast<size_t>(page)] = 1;
  made_ = true;
  return model_.manager().Refill<uint8_t>(pages_in_use_, in_use_);
}

bool Injector::Due(const StepInputs& inputs, const GraphRunner& runner) const {
  return !made_ && runner.stats().replays >= kFirstReplay && Possible(inputs);
}

absl::Status Injector::BeforeStep(int64_t step, const StepInputs& inputs, Stream& stream, GraphRunner& runner) {
  made_ = true;
  PRISTINE_RETURN_IF_ERROR(Attempt(step, inputs, stream, runner));
  return stream.Synchronize();
}

bool Injector::Possible(const StepInputs& inputs) const {
  switch (injection_) {
    case Injection::kOtherBucket:
      return inputs.bucket != model_.config().buckets.back();
    case Injection::kDecreasingIndptr:
      return inputs.extent.requests >= 2;
    case Injection::kLiveSlotInPadding:
    case Injection::kLeakyKernel:
      return inputs.extent.requests < inputs.bucket.requests;
    default:
      return true;
  }
}

absl::Status Injector::Prepare(const StepInputs& inputs) {
  PRISTINE_RETURN_IF_ERROR(model_.Begin(inputs));
  PRISTINE_RETURN_IF_ERROR(model_.PlanSparse(inputs));
  return model_.FinishPlans(inputs);
}

absl::Status Injector::CountRefusal(int64_t step, const absl::Status& refused) {
  if (refused.ok()) {
    return absl::InternalError(absl::StrCat("--inject=", ToString(injection_), " in step ", step, " was not refused"));
  }
  report_.FailAt(step);
  const std::string message(refused.message());
  report_.invariant_violations.Add(absl::StrCat("refused in step ", step, ": ", message));
  report_.log.AddViolation(step, "refused", message, nullptr);
  return absl::OkStatus();
}

absl::Status Injector::Attempt(int64_t step, const StepInputs& inputs, Stream& stream, GraphRunner& runner) {
  BufferManager& manager = model_.manager();
  StepInputs bad = inputs;
  switch (injection_) {
    case Injection::kStalePlan:
      PRISTINE_RETURN_IF_ERROR(Prepare(inputs));
      PRISTINE_RETURN_IF_ERROR(manager.Refill<int32_t>(model_.metadata().lengths(), inputs.lengths));
      return CountRefusal(step, runner.Replay(stream, inputs.bucket, inputs.extent));
    case Injection::kMissingRefill:
      PRISTINE_RETURN_IF_ERROR(manager.BeginStep(inputs.bucket, inputs.extent));
      return CountRefusal(step, runner.Replay(stream, inputs.bucket, inputs.extent));
    case Injection::kOtherBucket:
      PRISTINE_RETURN_IF_ERROR(Prepare(inputs));
      return CountRefusal(step, runner.Replay(stream, model_.config().buckets.back(), inputs.extent));
    case Injection::kReusedSlot:
      return ReuseSlot(step, inputs, stream, runner);
    case Injection::kPlanMismatch:
      --bad.plan_lengths[0];
      break;
    case Injection::kDecreasingIndptr:
      bad.kv_indptr[1] = bad.kv_indptr[2] + 1;
      break;
    case Injection::kPageOutOfRange:
      bad.kv_indices[0] = model_.config().pool_pages + 1;
      break;
    case Injection::kUnarmed: {
      PRISTINE_ASSIGN_OR_RETURN(const Graph* graph, runner.graph(inputs.bucket));
      PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
      return exec->Launch(stream);
    }
    case Injection::kArmedTwice:
      PRISTINE_RETURN_IF_ERROR(Prepare(inputs));
      PRISTINE_RETURN_IF_ERROR(manager.BeforeReplay(stream, inputs.bucket, inputs.extent));
      break;
    default:
      return absl::OkStatus();
  }
  PRISTINE_RETURN_IF_ERROR(Prepare(bad));
  return runner.Replay(stream, inputs.bucket, inputs.extent);
}

absl::Status Injector::ReuseSlot(int64_t step, const StepInputs& inputs, Stream& stream, GraphRunner& runner) {
  BufferManager& manager = model_.manager();
  PRISTINE_ASSIGN_OR_RETURN(const PinnedBuffer memory, stream.device().AllocatePinned(sizeof(uint32_t), "release"));
  uint32_t& release = memory.As<uint32_t>()[0];
  const auto let_go = absl::MakeCleanup([&] {
    std::atomic_ref(release).store(1, std::memory_order_release);
    stream.Synchronize().IgnoreError();  // before the memory goes
  });
  PRISTINE_RETURN_IF_ERROR(Launch(stream, kHold, {static_cast<uint32_t*>(memory.device_address())}));
  absl::Status begun;
  // The same step over and over: it writes the same values to the same places.
  while ((begun = manager.BeginStep(inputs.bucket, inputs.extent)).ok()) {
    PRISTINE_RETURN_IF_ERROR(Prepare(inputs));
    PRISTINE_RETURN_IF_ERROR(runner.Replay(stream, inputs.bucket, inputs.extent));
  }
  PRISTINE_RETURN_IF_ERROR(CountRefusal(step, begun));
  return CountRefusal(step, manager.Refill<int32_t>(model_.metadata().lengths(), inputs.lengths));
}

absl::StatusOr<std::string> Injector::FindLeak(const StepInputs& inputs, Stream& stream) {
  if (injection_ != Injection::kLeakyKernel) return std::string();
  for (int32_t layer = 0; layer < model_.config().layers; ++layer) {
    PRISTINE_RETURN_IF_ERROR(stream.Fill(model_.out(layer), std::byte{0}));
  }
  PRISTINE_RETURN_IF_ERROR(model_.Begin(inputs));
  PRISTINE_RETURN_IF_ERROR(Refill(inputs));
  PRISTINE_RETURN_IF_ERROR(model_.PlanSparse(inputs));
  PRISTINE_RETURN_IF_ERROR(model_.FinishPlans(inputs));
  PRISTINE_RETURN_IF_ERROR(model_.manager().BeforeReplay(stream, inputs.bucket, inputs.extent));
  PRISTINE_RETURN_IF_ERROR(model_.manager().RecordPrologue(stream, inputs.bucket));
  PRISTINE_ASSIGN_OR_RETURN(OutputCopy copy, OutputCopy::Create(stream.device(), model_.config()));
  std::string leak;
  bool reading = false;  // reading queues copies, which the observer is told of too
  stream.SetObserver([&](const std::string& node) -> absl::Status {
    if (reading || !leak.empty()) return absl::OkStatus();
    reading = true;
    absl::Status copied = copy.Queue(stream, model_, inputs.bucket);
    reading = false;
    copied.Update(stream.Synchronize());
    PRISTINE_RETURN_IF_ERROR(copied);
    const Outputs outputs = copy.Read();
    for (size_t layer = 0; layer < outputs.out.size() && leak.empty(); ++layer) {
      const int32_t row = FirstNanRow(model_.config(), outputs.out[layer], inputs.extent.requests);
      if (row >= 0)
        leak = absl::StrCat("the poison run finds NaN in row ", row, " of layer ", layer, " after node ", node);
    }
    return absl::OkStatus();
  });
  const absl::Status ran = model_.Body(stream, inputs.bucket);
  stream.SetObserver(nullptr);
  PRISTINE_RETURN_IF_ERROR(ran);
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return leak;
}

absl::Status Injector::CheckMade() const {
  const bool node = injection_ <= Injection::kLeakyKernel;
  if (node || made_) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("--inject=", ToString(injection_), ": no step of ", report_.replays,
                   " was one that it can be made in; expected more than ", kFirstReplay,
                   " replays, some with two requests and some in a smaller bucket than the largest"));
}

}  // namespace pristine::replay_driver
