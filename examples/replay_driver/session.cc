#include "examples/replay_driver/session.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/compare.h"
#include "examples/replay_driver/set_up.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {
namespace {

// Places for steps in flight. The ring of staging slots bounds them: while all slots hold values that wait for the
// device one step more runs, and the next one is prepared.
int32_t PlacesOf(const Options& options) { return options.overlap == Overlap::kOff ? 1 : options.staging_slots + 2; }

double MicrosecondsSince(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
}

// Adds to `ms` the time until it goes.
class Stopwatch {
 public:
  explicit Stopwatch(double& ms) : ms_(ms), begin_(Clock::now()) {}
  ~Stopwatch() { ms_ += std::chrono::duration<double, std::milli>(Clock::now() - begin_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  double& ms_;
  const Clock::time_point begin_;
};

int64_t HostBytes(const ModelConfig& config, const Options& options, const Device& device) {
  const int64_t pool = 2 * int64_t{config.layers} * static_cast<int64_t>(config.pool_bytes());
  const int64_t model = DecodeModel::Bytes(config, options.staging_slots, device.multiprocessors());
  const int64_t steps = StepsInFlight::Bytes(config, PlacesOf(options), options.compare_eager > 0);
  return pool + 2 * model + steps;  // the shadow is another one
}

std::string WriterText(const BufferManager& manager, int buffer, int64_t index) {
  const absl::StatusOr<BufferManager::Writer> writer = manager.LastWriter(buffer, index);
  if (!writer.ok()) return "no graph";
  return absl::StrCat("graph ", writer->graph, " ", writer->bucket.ToString(), " in replay ", writer->replay);
}

}  // namespace

Session::~Session() {
  if (stream_ != nullptr) (void)stream_->Synchronize();  // nothing may be in flight when its memory goes
}

absl::Status Session::SetUp() {
  const ModelConfig config = ModelConfigOf(options_);
  PRISTINE_ASSIGN_OR_RETURN(device_, OpenDevice(options_, environment_));
  PRISTINE_RETURN_IF_ERROR(CheckHostMemory(*device_, HostBytes(config, options_, *device_)));
  report_.device = device_->name();
  report_.host_emulation = device_->backend() == Backend::kHost;
  PRISTINE_ASSIGN_OR_RETURN(stream_, device_->CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(KvPool pool, KvPool::Create(*device_, *stream_, config));
  pool_ = std::make_unique<KvPool>(std::move(pool));

  ManagerOptions manager;
  manager.check = options_.check;
  manager.restore = options_.restore;
  manager.staging_slots = options_.staging_slots;
  report_.staging_slots = options_.staging_slots;
  if (options_.inject == Injection::kReusedSlot) manager.parameter_bytes = 0;  // no step does without a slot
  PRISTINE_ASSIGN_OR_RETURN(model_, DecodeModel::Create(*device_, config, *pool_, manager));
  PRISTINE_ASSIGN_OR_RETURN(shadow_, DecodeModel::Create(*device_, config, *pool_, manager));
  if (options_.check != ManagerOptions::Check::kOff) {
    PRISTINE_RETURN_IF_ERROR(model_->ProtectPool());
  }
  PRISTINE_ASSIGN_OR_RETURN(steps_,
                            StepsInFlight::Create(*device_, config, PlacesOf(options_), options_.compare_eager > 0));
  if (options_.inject != Injection::kNone) {
    PRISTINE_ASSIGN_OR_RETURN(injector_, Injector::Create(options_.inject, *model_, *pool_, report_));
  }
  report_.protection_level = ToString(model_->manager().protection_level());

  RunnerOptions runner;
  runner.name = "decode";
  runner.buckets = config.buckets;
  PRISTINE_ASSIGN_OR_RETURN(runner_, GraphRunner::Create(runner, [this](Stream& stream, const Extent& bucket) {
                              return model_->Body(stream, bucket);
                            }));
  PRISTINE_RETURN_IF_ERROR(runner_->AddHook(model_->manager()));
  return runner_->CaptureAll(*stream_);
}

absl::Status Session::Serve(absl::Span<const TraceRequest> trace) {
  absl::Status status;
  if (options_.overlap != Overlap::kOn) status = ServeOnce(trace, false);
  if (options_.overlap == Overlap::kOff || !status.ok() || report_.plan_refused) return status;
  return ServeOnce(trace, true);
}

absl::Status Session::ServeOnce(absl::Span<const TraceRequest> trace, bool overlap) {
  SchedulerConfig config;
  config.step_ticks = options_.step_ms * kTicksPerMs;
  config.step_limit = options_.step_limit();
  config.max_batch = options_.max_batch;
  config.page_size = options_.page_size;
  config.pool_pages = model_->config().pool_pages;
  config.seed = options_.seed;
  overlap_ = overlap;
  std::optional<ServeTimes>& total = overlap ? report_.with_overlap : report_.without_overlap;
  times_ = total.value_or(ServeTimes());
  const DecodeModel::SlotWaits before = model_->slot_waits();

  absl::Status status;
  {
    const Stopwatch all(times_.ms);
    scheduler_.emplace(trace, config);
    PRISTINE_RETURN_IF_ERROR(model_->ReleaseSlots());
    while (status.ok() && !report_.plan_refused && scheduler_->NextStep()) {
      const absl::Span<const ActiveRequest> active = scheduler_->active();
      if (!active.empty()) status = RunStep(first_step_ + scheduler_->steps() - 1, active);
      ShowProgress();
    }
    status.Update(RetireAll());
  }
  times_.ring_full += model_->slot_waits().count - before.count;
  times_.wait_ms += model_->slot_waits().ms - before.ms;
  total = times_;
  for (const int32_t id : scheduler_->refused()) {
    report_.requests_refused.Add(
        absl::StrCat("request ", id, " needs ", scheduler_->PagesOf(id), " pages; the pool has ", config.pool_pages));
  }
  report_.requests_finished += scheduler_->finished();
  first_step_ += scheduler_->steps();
  report_.steps = first_step_;
  return status;
}

absl::Status Session::RunStep(int64_t step, absl::Span<const ActiveRequest> active) {
  this_step_ = step;
  if (steps_->full()) {
    PRISTINE_RETURN_IF_ERROR(Wait([this] { return steps_->oldest().done->Synchronize(); }));
    PRISTINE_RETURN_IF_ERROR(RetireOldest());
  }
  StepInFlight& launched = steps_->next();
  absl::Span<int32_t> pages = launched.pages.As<int32_t>();
  for (const ActiveRequest& request : active.last(scheduler_->entered())) {
    PRISTINE_RETURN_IF_ERROR(pool_->FillContext(*stream_, request, pages.first(request.pages.size())));
    pages.remove_prefix(request.pages.size());
  }
  inputs_.Set(model_->config(), active);
  PRISTINE_RETURN_IF_ERROR(model_->AssignSlots(*stream_, active, inputs_));
  PRISTINE_ASSIGN_OR_RETURN(inputs_.bucket, runner_->BucketFor(inputs_.extent));
  PRISTINE_RETURN_IF_ERROR(Prepare(step));
  if (report_.plan_refused) return absl::OkStatus();
  launched.step = step;
  PRISTINE_RETURN_IF_ERROR(Launch(launched));
  // An injection may have more to say of a compared step, which it runs again: before the next one moves on.
  const bool wait = !overlap_ || (injector_ != nullptr && launched.shadow_replay > 0);
  PRISTINE_RETURN_IF_ERROR(wait ? RetireAll() : RetireDone());
  times_.max_in_flight = std::max({times_.max_in_flight, int64_t{1}, static_cast<int64_t>(steps_->size())});
  return absl::OkStatus();
}

absl::Status Session::Prepare(int64_t step) {
  if (injector_ != nullptr && injector_->Due(inputs_, *runner_)) {
    PRISTINE_RETURN_IF_ERROR(RetireAll());  // what is reported from here on is this step's
    PRISTINE_RETURN_IF_ERROR(injector_->BeforeStep(step, inputs_, *stream_, *runner_));
  }
  PRISTINE_RETURN_IF_ERROR(model_->Begin(inputs_));
  if (injector_ != nullptr) {
    PRISTINE_RETURN_IF_ERROR(injector_->Refill(inputs_));
  }
  if (options_.restore == ManagerOptions::Restore::kStream) {
    PRISTINE_RETURN_IF_ERROR(model_->manager().Restore(*stream_));
  }
  if (live()) {
    PRISTINE_RETURN_IF_ERROR(Wait([this] { return PlanFromLive(); }));
  }
  if (const absl::Status planned = model_->PlanSparse(inputs_); !planned.ok()) {
    return live() ? DescribeRefusal(step, planned) : planned;
  }
  return model_->FinishPlans(inputs_);
}

absl::Status Session::Launch(StepInFlight& launched) {
  const bool compares = options_.compare_eager > 0 && launched.step % options_.compare_eager == 0;
  if (compares) {
    PRISTINE_RETURN_IF_ERROR(shadow_->TakeStatesOf(*stream_, *model_));
  }
  const auto begin = std::chrono::steady_clock::now();
  PRISTINE_RETURN_IF_ERROR(runner_->Replay(*stream_, inputs_.bucket, inputs_.extent));
  if (environment_.after_replay) {
    PRISTINE_RETURN_IF_ERROR(environment_.after_replay(*stream_, *model_));
  }
  launched.bucket = inputs_.bucket;
  launched.extent = inputs_.extent;
  launched.replay = model_->manager().stats().replays;
  launched.shadow_replay = 0;
  launched.disagreed = false;
  launched.launched = begin;
  if (!overlap_) {
    PRISTINE_RETURN_IF_ERROR(Wait([this] { return stream_->Synchronize(); }));
    launched.us = MicrosecondsSince(begin);
  }
  if (compares) {
    PRISTINE_RETURN_IF_ERROR(QueueComparison(launched));
  }
  // Without overlap what is not compared is done by now: the event stays as it was, reached.
  if (overlap_ || launched.shadow_replay > 0) {
    PRISTINE_RETURN_IF_ERROR(stream_->Record(*launched.done));
  }
  steps_->Push();
  return absl::OkStatus();
}

// The engine's mistake: the plan's input is the buffer that the last replay's conversion wrote.
absl::Status Session::PlanFromLive() {
  const int32_t rows = inputs_.extent.requests * options_.kv_groups;
  PRISTINE_RETURN_IF_ERROR(model_->ReadLiveIndptr(*stream_, rows, live_indptr_));
  for (int32_t row = 0; row < rows; ++row) {
    // Unsigned: whatever the buffer holds, the difference is defined.
    inputs_.plan_lengths[row] =
        static_cast<int32_t>(static_cast<uint32_t>(live_indptr_[row + 1]) - static_cast<uint32_t>(live_indptr_[row]));
  }
  return absl::OkStatus();
}

// Returns `refusal` itself if it is not of a decrease.
absl::Status Session::DescribeRefusal(int64_t step, const absl::Status& refusal) {
  const auto fall =
      std::find_if(inputs_.plan_lengths.begin(), inputs_.plan_lengths.end(), [](int32_t length) { return length < 0; });
  if (!absl::IsInvalidArgument(refusal) || fall == inputs_.plan_lengths.end()) return refusal;
  const int64_t index = fall - inputs_.plan_lengths.begin();
  const BufferManager& manager = model_->manager();
  const int buffer = model_->kv_indptr_ws().id;
  report_.plan_refused = true;
  report_.FailAt(step);
  report_.exit_reason =
      absl::StrCat("step ", step, ": the planner refused ", manager.name(buffer), ", which falls from ",
                   live_indptr_[index], " at index ", index, " (last written by ", WriterText(manager, buffer, index),
                   ") to ", live_indptr_[index + 1], " at index ", index + 1, " (last written by ",
                   WriterText(manager, buffer, index + 1), "): ", std::string(refusal.message()));
  return absl::OkStatus();
}

absl::Status Session::QueueComparison(StepInFlight& compared) {
  const Stopwatch watch(times_.compare_ms);
  compared.inputs = inputs_;
  PRISTINE_RETURN_IF_ERROR(compared.replayed_copy.Queue(*stream_, *model_, inputs_.bucket));
  PRISTINE_RETURN_IF_ERROR(shadow_->RunEagerly(*stream_, inputs_, options_.restore));
  PRISTINE_RETURN_IF_ERROR(shadow_->CompareStates(*stream_, *model_));
  compared.shadow_replay = shadow_->manager().stats().replays;
  return compared.eager_copy.Queue(*stream_, *shadow_, inputs_.bucket);
}

absl::Status Session::Wait(absl::FunctionRef<absl::Status()> wait) {
  const Stopwatch watch(times_.wait_ms);
  return wait();
}

absl::Status Session::RetireAll() {
  while (steps_->size() > 0) {
    PRISTINE_RETURN_IF_ERROR(Wait([this] { return steps_->oldest().done->Synchronize(); }));
    PRISTINE_RETURN_IF_ERROR(RetireOldest());
  }
  return absl::OkStatus();
}

absl::Status Session::RetireDone() {
  while (steps_->size() > 0) {
    PRISTINE_ASSIGN_OR_RETURN(const bool done, steps_->oldest().done->IsReached());
    if (!done) break;
    PRISTINE_RETURN_IF_ERROR(RetireOldest());
  }
  return absl::OkStatus();
}

absl::Status Session::RetireOldest() {
  StepInFlight& done = steps_->oldest();
  const double us = overlap_ ? MicrosecondsSince(done.launched) : done.us;
  report_.us_per_replay.push_back(us);
  report_.log.AddReplay({done.step, done.extent.requests, done.bucket.requests, static_cast<float>(us)});
  last_step_ = done.step;
  ++times_.replays;
  ++report_.replays;
  report_.tokens += done.extent.tokens;
  if (report_.replays > 1 && done.bucket != last_bucket_) ++report_.bucket_changes;
  last_bucket_ = done.bucket;
  const absl::Status compared = done.shadow_replay > 0 ? Compare(done) : absl::OkStatus();
  CollectReports();
  if (done.disagreed) ++report_.plan_mismatch_steps;
  steps_->Pop();
  return compared;
}

absl::Status Session::Compare(const StepInFlight& done) {
  const Stopwatch watch(times_.compare_ms);
  const int64_t step = done.step;
  const Outputs replayed = done.replayed_copy.Read();
  const Comparison same = CompareSame(model_->config(), done.inputs, replayed, done.eager_copy.Read());
  const Comparison truth = CompareTruth(model_->config(), done.inputs, replayed, options_.compare_rows, step);
  report_.same_mismatches += same.mismatches;
  report_.truth_mismatches += truth.mismatches;
  report_.truth_rows += truth.rows;
  std::string leak;
  if (injector_ != nullptr && same.mismatches > 0 && report_.first_mismatch.empty()) {
    PRISTINE_ASSIGN_OR_RETURN(leak, injector_->FindLeak(done.inputs, *stream_));
  }
  report_.max_rel_rms = std::max(report_.max_rel_rms, truth.max_rel_rms);
  for (const Comparison* comparison : {&same, &truth}) {
    if (comparison->mismatches == 0) continue;
    report_.FailAt(step);
    if (report_.first_mismatch.empty()) {
      report_.first_mismatch = absl::StrCat("step ", step, ": ", comparison->first, leak.empty() ? "" : "; ", leak);
    }
  }
  return absl::OkStatus();
}

void Session::CollectReports() {
  std::array<Violation, 32> violations;
  for (const bool shadow : {false, true}) {
    BufferManager& manager = shadow ? shadow_->manager() : model_->manager();
    size_t count = 0;
    while ((count = manager.Poll(absl::MakeSpan(violations))) > 0) {
      for (size_t i = 0; i < count; ++i) {
        AddReport(violations[i], shadow ? &StepInFlight::shadow_replay : &StepInFlight::replay);
      }
    }
  }
}

void Session::AddReport(const Violation& violation, int64_t StepInFlight::*number) {
  StepInFlight* const of = steps_->FirstFrom(number, violation.replay);
  const int64_t step = of == nullptr ? this_step_ : of->step;
  report_.FailAt(step);
  const bool shadow = number == &StepInFlight::shadow_replay;
  report_.log.AddViolation(step, violation, shadow ? shadow_->manager() : model_->manager(), shadow);
  if (violation.kind != Violation::Kind::kPlanMismatch) return report_.AddViolation(violation);
  StepInFlight& disagreed = of == nullptr ? steps_->oldest() : *of;
  disagreed.disagreed = true;
  if (report_.first_plan_mismatch.empty()) {
    report_.first_plan_mismatch = absl::StrCat("step ", step, ": ", violation.ToString());
  }
}

void Session::KeepFlightRecords() {
  if (model_ == nullptr) return;
  const std::vector<FlightRecord> records = FlightRecordsOf(model_->manager());
  report_.flight_json = ToJson(records);
  report_.log.SetLastRecords(records);
}

absl::Status Session::Finish() {
  const BufferManager::Stats stats = model_->manager().stats();
  report_.restored_bytes = stats.restored_bytes;
  report_.expected_writes = stats.expected_writes;
  report_.captures = runner_->stats().captures;
  report_.capture_ms = runner_->stats().capture_ms;
  if (options_.model == ModelKind::kHybrid) report_.state_slots_handed_out = model_->gdn().handed_out();
  report_.replays_by_bucket.clear();
  for (size_t i = 0; i < runner_->buckets().size(); ++i) {
    report_.replays_by_bucket.emplace_back(runner_->buckets()[i].requests, runner_->stats().replays_by_bucket[i]);
  }
  if (options_.check != ManagerOptions::Check::kOff) {
    for (const bool shadow : {false, true}) {
      BufferManager& manager = shadow ? shadow_->manager() : model_->manager();
      PRISTINE_ASSIGN_OR_RETURN(const std::vector<Violation> violations, manager.Verify(*stream_));
      for (const Violation& violation : violations) {
        report_.FailAt(last_step_);
        report_.AddViolation(violation);
        report_.log.AddViolation(last_step_, violation, manager, shadow);
      }
    }
  }
  return injector_ == nullptr ? absl::OkStatus() : injector_->CheckMade();
}

void Session::ShowProgress() {
  if (!environment_.terminal || options_.quiet || scheduler_->steps() % 50 != 0) return;
  environment_.err << "\rstep " << first_step_ + scheduler_->steps() << ", " << report_.replays << " replays, "
                   << scheduler_->finished() << " requests finished  " << std::flush;
}

}  // namespace pristine::replay_driver
