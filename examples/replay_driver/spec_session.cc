#include "examples/replay_driver/spec_session.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <initializer_list>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/set_up.h"
#include "examples/replay_driver/spec_compare.h"
#include "pristine/attention/device_caps.h"
#include "pristine/attention/forward_mode.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {
namespace {

using Clock = std::chrono::steady_clock;

double MillisecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

SpecConfig SpecConfigOf(const Options& options) {
  SpecConfig config;
  config.model = ModelConfigOf(options);
  ++config.model.layers;  // the draft's
  config.draft_tokens = options.spec;
  config.draft_extend = options.draft_extend;
  config.accept = options.accept;
  return config;
}

}  // namespace

SpecSession::~SpecSession() {
  if (stream_ != nullptr) (void)stream_->Synchronize();  // nothing may be in flight when its memory goes
}

absl::Status SpecSession::SetUp() {
  const SpecConfig config = SpecConfigOf(options_);
  PRISTINE_ASSIGN_OR_RETURN(device_, OpenDevice(options_, environment_));
  PRISTINE_RETURN_IF_ERROR(
      CheckHostMemory(*device_, 2 * int64_t{config.model.layers} * static_cast<int64_t>(config.model.pool_bytes()) +
                                    2 * SpecModel::Bytes(config, options_.staging_slots)));
  report_.device = device_->name();
  report_.host_emulation = device_->backend() == Backend::kHost;
  report_.spec.emplace();
  report_.spec->draft_tokens = config.draft_tokens;
  report_.spec->draft_extend = ToString(config.draft_extend);
  report_.spec->accepted_counts.resize(config.draft_tokens + 1);

  PRISTINE_ASSIGN_OR_RETURN(stream_, device_->CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(KvPool pool, KvPool::Create(*device_, *stream_, config.model));
  pool_ = std::make_unique<KvPool>(std::move(pool));
  PRISTINE_ASSIGN_OR_RETURN(pages_, device_->AllocatePinned(config.model.pool_pages * sizeof(int32_t), "pages"));

  ManagerOptions manager;
  manager.check = options_.check;
  manager.staging_slots = options_.staging_slots;
  report_.staging_slots = options_.staging_slots;
  PRISTINE_ASSIGN_OR_RETURN(model_, SpecModel::Create(*device_, *stream_, config, *pool_, manager));
  PRISTINE_ASSIGN_OR_RETURN(shadow_, SpecModel::Create(*device_, *stream_, config, *pool_, manager));
  if (options_.check != ManagerOptions::Check::kOff) {
    PRISTINE_RETURN_IF_ERROR(model_->ProtectPool());
  }
  report_.protection_level = ToString(model_->manager().protection_level());
  for (const SpecPhase phase : kSpecPhases) {
    PRISTINE_RETURN_IF_ERROR(Capture(phase));
  }
  return absl::OkStatus();
}

absl::Status SpecSession::Capture(SpecPhase phase) {
  const attention::StepAttention& attention = model_->attention(phase);
  RunnerOptions options;
  options.name = ToString(attention.config().mode);
  options.buckets = model_->config().buckets(phase);
  PRISTINE_ASSIGN_OR_RETURN(std::unique_ptr<GraphRunner> runner,
                            GraphRunner::Create(options, [this, phase](Stream& stream, const Extent& bucket) {
                              return model_->Body(phase, stream, bucket);
                            }));
  PRISTINE_RETURN_IF_ERROR(runner->AddHook(model_->manager()));
  PRISTINE_RETURN_IF_ERROR(runner->CaptureAll(*stream_));
  PRISTINE_ASSIGN_OR_RETURN(const Graph* graph, runner->graph(options.buckets.back()));
  SpecReport::Phase& captured = report_.spec->phases.emplace_back();
  captured.mode = options.name;
  captured.family = ToString(attention.family());
  for (const GraphNode& node : graph->nodes()) {
    std::vector<std::string>& names = captured.kernels;
    if (std::find(names.begin(), names.end(), node.name) == names.end()) names.push_back(node.name);
  }
  runners_.push_back(std::move(runner));
  return absl::OkStatus();
}

absl::Status SpecSession::Serve(absl::Span<const TraceRequest> trace) {
  // A draft extend begins at the last committed token: everybody has one.
  std::vector<TraceRequest> requests(trace.begin(), trace.end());
  for (TraceRequest& request : requests) request.context = std::max(request.context, 1);
  SchedulerConfig config;
  config.step_ticks = options_.step_ms * kTicksPerMs;
  config.step_limit = options_.step_limit();
  config.max_batch = options_.max_batch;
  config.page_size = options_.page_size;
  config.pool_pages = model_->config().model.pool_pages;
  config.seed = options_.seed;
  config.spare = options_.spec;

  const Clock::time_point begin = Clock::now();
  absl::Status status;
  scheduler_.emplace(requests, config);
  if (model_->gdn() != nullptr) {
    PRISTINE_RETURN_IF_ERROR(model_->gdn()->ReleaseAll());
  }
  while (status.ok() && scheduler_->NextStep()) {
    step_ = first_step_ + scheduler_->steps() - 1;
    if (!scheduler_->active().empty()) status = RunRound(scheduler_->active());
    if (environment_.terminal && !options_.quiet && scheduler_->steps() % 50 == 0) {
      environment_.err << "\rround " << step_ + 1 << ", " << report_.replays << " replays, " << scheduler_->finished()
                       << " requests finished  " << std::flush;
    }
  }
  times_.ms += MillisecondsSince(begin);
  report_.without_overlap = times_;
  for (const int32_t id : scheduler_->refused()) {
    report_.requests_refused.Add(
        absl::StrCat("request ", id, " needs ", scheduler_->PagesOf(id), " pages; the pool has ", config.pool_pages));
  }
  report_.requests_finished += scheduler_->finished();
  first_step_ += scheduler_->steps();
  report_.steps = first_step_;
  scheduler_.reset();  // it looks at `requests`
  return status;
}

absl::Status SpecSession::RunRound(absl::Span<const ActiveRequest> active) {
  const SpecConfig& config = model_->config();
  absl::Span<int32_t> pages = pages_.As<int32_t>();
  for (const ActiveRequest& request : active.last(scheduler_->entered())) {
    PRISTINE_RETURN_IF_ERROR(pool_->FillContext(*stream_, request, pages.first(request.pages.size())));
    pages.remove_prefix(request.pages.size());
  }
  std::vector<int32_t> state_slots(active.size(), -1);
  if (model_->gdn() != nullptr) {
    PRISTINE_RETURN_IF_ERROR(model_->gdn()->Assign(*stream_, active, state_slots));
  }
  SpecReport& spec = *report_.spec;
  ++spec.rounds;
  rows_.clear();
  for (const ActiveRequest& request : active) {
    SpecRow& row = rows_.emplace_back();
    row.request = request.id;
    row.committed = request.length - 1;
    row.round = static_cast<int32_t>(step_ % std::numeric_limits<int32_t>::max()) + 1;
    row.accepted = DrawAccepted(config, row.request, row.round, request.last - row.committed);
    row.state_slot = state_slots[rows_.size() - 1];
    row.pages = request.pages;
    spec.drafted += config.draft_tokens;
    spec.accepted += row.accepted;
    spec.rolled_back += config.draft_tokens - row.accepted;
    ++spec.accepted_counts[row.accepted];
    report_.tokens += row.accepted;
  }
  for (int32_t draft = 0; draft < config.draft_tokens; ++draft) {
    PRISTINE_RETURN_IF_ERROR(RunPhase(SpecPhase::kDraft, draft));
  }
  PRISTINE_RETURN_IF_ERROR(RunPhase(SpecPhase::kVerify, 0));
  if (options_.inject == Injection::kMisroute && !misrouted_) {
    PRISTINE_RETURN_IF_ERROR(Misroute());
  }
  PRISTINE_RETURN_IF_ERROR(RunPhase(SpecPhase::kDraftExtend, 0));
  for (size_t i = 0; i < rows_.size(); ++i) scheduler_->SetAdvance(i, rows_[i].accepted);
  return absl::OkStatus();
}

absl::Status SpecSession::RunPhase(SpecPhase phase, int32_t draft_step) {
  inputs_.Set(model_->config(), phase, draft_step, rows_);
  PRISTINE_ASSIGN_OR_RETURN(inputs_.bucket, runner(phase).BucketFor(inputs_.extent));
  PRISTINE_RETURN_IF_ERROR(model_->Begin(inputs_));
  const bool compares = options_.compare_eager > 0 && step_ % options_.compare_eager == 0;
  if (compares && model_->gdn() != nullptr) {
    PRISTINE_RETURN_IF_ERROR(shadow_->gdn()->TakeStatesOf(*stream_, *model_->gdn()));
  }
  const Clock::time_point begin = Clock::now();
  PRISTINE_RETURN_IF_ERROR(runner(phase).Replay(*stream_, inputs_.bucket, inputs_.extent));
  PRISTINE_RETURN_IF_ERROR(stream_->Synchronize());
  const double ms = MillisecondsSince(begin);
  times_.wait_ms += ms;
  times_.max_in_flight = 1;
  ++times_.replays;
  if (report_.replays++ > 0 && inputs_.bucket != last_bucket_) ++report_.bucket_changes;
  last_bucket_ = inputs_.bucket;
  report_.us_per_replay.push_back(1000 * ms);
  report_.log.AddReplay({step_, inputs_.extent.requests, inputs_.bucket.requests, static_cast<float>(1000 * ms)});
  if (compares) {
    const Clock::time_point compared = Clock::now();
    PRISTINE_RETURN_IF_ERROR(Compare());
    times_.compare_ms += MillisecondsSince(compared);
  }
  CollectReports();
  return absl::OkStatus();
}

absl::Status SpecSession::Compare() {
  PRISTINE_ASSIGN_OR_RETURN(const Outputs replayed, ReadOutputs(*stream_, *model_, inputs_));
  PRISTINE_RETURN_IF_ERROR(shadow_->RunEagerly(*stream_, inputs_));
  if (model_->gdn() != nullptr) {
    PRISTINE_RETURN_IF_ERROR(shadow_->gdn()->CompareStates(*stream_, *model_->gdn()));
  }
  PRISTINE_ASSIGN_OR_RETURN(const Outputs eager, ReadOutputs(*stream_, *shadow_, inputs_));
  const Comparison same = CompareSame(*model_, inputs_, replayed, eager);
  const Comparison truth = CompareTruth(*model_, inputs_, replayed, options_.compare_rows, report_.replays);
  Comparison rolled_back;
  if (inputs_.phase == SpecPhase::kDraftExtend) {
    PRISTINE_ASSIGN_OR_RETURN(rolled_back, CompareRolledBack(*stream_, *model_, *pool_, inputs_));
  }
  report_.same_mismatches += same.mismatches;
  report_.truth_mismatches += truth.mismatches + rolled_back.mismatches;
  report_.truth_rows += truth.rows + rolled_back.rows;
  report_.max_rel_rms = std::max(report_.max_rel_rms, truth.max_rel_rms);
  for (const Comparison* comparison : std::initializer_list<const Comparison*>{&same, &truth, &rolled_back}) {
    if (comparison->mismatches == 0) continue;
    report_.FailAt(step_);
    if (report_.first_mismatch.empty()) {
      report_.first_mismatch = absl::StrCat("step ", step_, ": ", comparison->first);
    }
  }
  return absl::OkStatus();
}

absl::Status SpecSession::Misroute() {
  constexpr int64_t kFirstReplay = 10;
  if (report_.replays < kFirstReplay) return absl::OkStatus();
  inputs_.Set(model_->config(), SpecPhase::kDraftExtend, 0, rows_);
  // One that fits into a graph of verify, and is not by chance what that runs.
  const int32_t verified = inputs_.extent.requests * model_->config().draft_tokens;
  if (inputs_.extent.tokens >= verified) return absl::OkStatus();
  misrouted_ = true;
  attention::RouteConfig route = model_->attention(SpecPhase::kDraftExtend).config().route;
  route.decode_draft_extend = true;
  PRISTINE_RETURN_IF_ERROR(CountRefusal(
      attention::Route(attention::ForwardMode::kDraftExtend, attention::CapsOf(*device_), route).status()));
  inputs_.phase = SpecPhase::kVerify;
  PRISTINE_ASSIGN_OR_RETURN(inputs_.bucket, runner(SpecPhase::kVerify).BucketFor(inputs_.extent));
  return CountRefusal(model_->Begin(inputs_));
}

absl::Status SpecSession::CountRefusal(const absl::Status& refused) {
  if (refused.ok()) {
    return absl::InternalError(
        absl::StrCat("--inject=", ToString(options_.inject), " in step ", step_, " was not refused"));
  }
  report_.FailAt(step_);
  const std::string message(refused.message());
  report_.invariant_violations.Add(absl::StrCat("refused in step ", step_, ": ", message));
  report_.log.AddViolation(step_, "refused", message, nullptr);
  return absl::OkStatus();
}

void SpecSession::CollectReports() {
  std::array<Violation, 32> violations;
  for (const bool shadow : {false, true}) {
    BufferManager& manager = shadow ? shadow_->manager() : model_->manager();
    size_t count = 0;
    while ((count = manager.Poll(absl::MakeSpan(violations))) > 0) {
      for (size_t i = 0; i < count; ++i) AddViolation(violations[i], shadow);
    }
  }
}

void SpecSession::AddViolation(const Violation& violation, bool shadow) {
  report_.FailAt(step_);
  report_.AddViolation(violation);
  report_.log.AddViolation(step_, violation, shadow ? shadow_->manager() : model_->manager(), shadow);
}

void SpecSession::KeepFlightRecords() {
  if (model_ == nullptr) return;
  const std::vector<FlightRecord> records = FlightRecordsOf(model_->manager());
  report_.flight_json = ToJson(records);
  report_.log.SetLastRecords(records);
}

absl::Status SpecSession::Finish() {
  const BufferManager::Stats stats = model_->manager().stats();
  report_.restored_bytes = stats.restored_bytes;
  report_.expected_writes = stats.expected_writes;
  if (model_->gdn() != nullptr) report_.state_slots_handed_out = model_->gdn()->handed_out();
  report_.captures = 0;
  report_.capture_ms = 0;
  report_.replays_by_bucket.clear();
  for (const int32_t bucket : options_.buckets) report_.replays_by_bucket.emplace_back(bucket, 0);
  for (size_t phase = 0; phase < runners_.size(); ++phase) {
    const GraphRunner::Stats& runner = runners_[phase]->stats();
    report_.captures += runner.captures;
    report_.capture_ms += runner.capture_ms;
    report_.spec->phases[phase].replays = runner.replays;
    for (size_t i = 0; i < options_.buckets.size(); ++i) {
      report_.replays_by_bucket[i].second += runner.replays_by_bucket[i];
    }
  }
  if (options_.check != ManagerOptions::Check::kOff) {
    for (const bool shadow : {false, true}) {
      BufferManager& manager = shadow ? shadow_->manager() : model_->manager();
      PRISTINE_ASSIGN_OR_RETURN(const std::vector<Violation> violations, manager.Verify(*stream_));
      for (const Violation& violation : violations) AddViolation(violation, shadow);
    }
  }
  if (options_.inject == Injection::kMisroute && !misrouted_) {
    return absl::FailedPreconditionError(
        absl::StrCat("--inject=misroute: no round of ", report_.spec->rounds,
                     " was one that it can be made in; expected more than 10 replays, some accepting few drafts"));
  }
  return absl::OkStatus();
}

}  // namespace pristine::replay_driver
