// Life: everything that a program does with the libraries, from its first stream to FindPolluter, as phases that may
// each fail and be tried again.
#ifndef PRISTINE_TESTS_RECOVERY_LIFE_H_
#define PRISTINE_TESTS_RECOVERY_LIFE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "pristine/attention/decode_plan.h"
#include "pristine/attention/paged_decode.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/buffers/pollution.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"
#include "tests/buffers/engine.h"
#include "tests/support/oracle_case.h"
#include "tests/support/status_matchers.h"
#include "tests/support/test_kernels.h"

namespace pristine::testing {

// Heads enough for a plan of a few hundred bytes on any GPU: its size decides how a step travels.
inline constexpr DecodeShape kLifeShape = {.q_heads = 4, .kv_heads = 4, .head_dim = 64, .page_size = 4};
inline constexpr Extent kSmall = {2, 2};
inline constexpr Extent kLarge = {4, 4};

// The steps' values, and what attention over them is.
struct LifeTruth {
  LifeTruth() : step(kLifeShape, {5, 9, 3, 7}, {4, 0, -1, 6}) {
    for (int32_t row = 0; row < step.rows(); ++row) {
      for (int32_t head = 0; head < kLifeShape.q_heads; ++head) expected.push_back(step.Expected(row, head));
    }
  }
  const DecodeCase step;
  std::vector<OracleRow> expected;  // [rows, q_heads]
};

class Life {
 public:
  struct Phase {
    const char* name;
    std::function<absl::Status()> run;  // may be called again after it failed
    bool all_or_nothing;                // a failure leaves no object behind
  };

  Life(Device& device, const LifeTruth& truth) : device_(device), truth_(truth) {}
  ~Life() {
    if (stream_ != nullptr) stream_->Synchronize().IgnoreError();
  }

  std::vector<Phase> Phases() {
    return {
        {"streams", [this] { return MakeStreams(); }, false},
        {"tensors", [this] { return MakeTensors(); }, false},
        {"manager",
         [this] {
           return Make(manager_, [this] { return BufferManager::Create(device_, {.late_refill_bytes = 4096}); });
         },
         true},
        {"metadata", [this] { return MakeMetadata(); }, true},
        {"plan", [this] { return MakePlan(); }, true},
        {"decode",
         [this] { return Make(decode_, [this] { return attention::PagedDecode::Create(*plan_, 1.0f / 8); }); }, true},
        {"constant",
         [this] {
           return Add(constant_, "constant", Role::kConstant, {1, 2, 3});
         },
         true},
        {"restored",
         [this] {
           return Add(counter_, "counter", Role::kRestored, {5, 6});
         },
         true},
        {"adopted", [this] { return Adopt(); }, true},
        {"bulky", [this] { return Add(bulky_, "bulky", Role::kRefilled, std::vector<int32_t>(2048)); }, true},
        {"table", [this] { return AddTable(); }, true},
        {"protect", [this] { return manager_->Protect("k", k_.As<const std::byte>(), 4); }, true},
        {"seal", [this] { return manager_->Seal(); }, true},
        {"runner", [this] { return MakeRunner(); }, true},
        {"capture all", [this] { return runner_->CaptureAll(*stream_); }, false},
        {"replay, values in the parameters", [this] { return Step(kLarge, 3, 0); }, true},
        {"replay, values through the ring", [this] { return Step(kLarge, 4, 2000); }, true},
        {"replay, parameters again", [this] { return Step(kLarge, 1, 1); }, true},
        {"replay, smaller", [this] { return Step(kSmall, 2, 5); }, true},
        {"engine's capture", [this] { return CaptureByEngine(); }, true},
        {"engine's replay", [this] { return StepByEngine(); }, true},
        {"late buffer", [this] { return Add(late_, "late", Role::kRestored, {9}); }, true},
        {"recapture", [this] { return runner_->Recapture(*stream_, kSmall); }, false},
        {"replay, recaptured", [this] { return Step(kSmall, 1, 2); }, true},
        {"replay, first chunk only", [this] { return Step(kLarge, 2, 3); }, true},
        {"fork", [this] { return Fork(); }, true},
        {"parameters", [this] { return SetParameters(); }, true},
        {"restore", [this] { return Restore(); }, true},
        {"verify", [this] { return Verify(); }, true},
        {"find polluter", [this] { return FindNoPolluter(); }, true},
        {"release", [this] { return runner_->Release(kSmall); }, true},
        {"capture again", [this] { return runner_->Recapture(*stream_, kSmall); }, false},
        {"last replay", [this] { return Step(kSmall, 2, 0); }, true},
    };
  }

  // Whatever happened: no stream captures, originals and constants are what they were, and all that was captured before
  // replays with the right result.
  void ExpectSound() {
    EXPECT_EQ(device_.capturing_streams(), 0);
    for (const auto* stream : {&stream_, &side_, &engine_stream_}) {
      if (*stream != nullptr) {
        EXPECT_FALSE((*stream)->capturing());
      }
    }
    if (stream_ == nullptr || manager_ == nullptr) return;
    if (armed_) {
      EXPECT_OK(StepByEngine()) << "the armed step comes first";
    }
    EXPECT_OK(Verify());
    if (runner_ != nullptr && runner_->graph(kLarge).ok()) {
      EXPECT_OK(Step(kLarge, 3, 7));
    }
    if (runner_ != nullptr && runner_->graph(kSmall).ok()) {
      EXPECT_OK(Step(kSmall, 1, 1500));
    }
    if (launch_ != nullptr) {
      EXPECT_OK(StepByEngine());
    }
    EXPECT_OK(Verify());
  }

 private:
  template <class T, class Create>
  static absl::Status Make(std::unique_ptr<T>& to, Create create) {
    if (to != nullptr) return absl::OkStatus();
    PRISTINE_ASSIGN_OR_RETURN(to, create());
    return absl::OkStatus();
  }
  absl::Status MakeStreams() {
    PRISTINE_RETURN_IF_ERROR(Make(stream_, [this] { return device_.CreateStream(); }));
    PRISTINE_RETURN_IF_ERROR(Make(side_, [this] { return device_.CreateStream(); }));
    PRISTINE_RETURN_IF_ERROR(Make(engine_stream_, [this] { return device_.AdoptStream(stream_->native()); }));
    PRISTINE_RETURN_IF_ERROR(Make(forked_, [this] { return device_.CreateEvent(); }));
    return Make(joined_, [this] { return device_.CreateEvent(); });
  }

  absl::Status MakeTensors() {
    constexpr size_t kRow = size_t{kLifeShape.q_heads} * kLifeShape.head_dim * sizeof(float);
    const std::vector<std::byte> q = truth_.step.Q(), k = truth_.step.Pool(false), v = truth_.step.Pool(true);
    const auto make = [this](DeviceBuffer& buffer, size_t bytes, const char* name) -> absl::Status {
      if (buffer.bytes() > 0) return absl::OkStatus();
      PRISTINE_ASSIGN_OR_RETURN(buffer, device_.Allocate(bytes, name));
      return absl::OkStatus();
    };
    PRISTINE_RETURN_IF_ERROR(make(q_, 4 * kRow, "q"));
    PRISTINE_RETURN_IF_ERROR(make(out_, 4 * kRow, "out"));
    PRISTINE_RETURN_IF_ERROR(make(lse_, 4 * kLifeShape.q_heads * sizeof(float), "lse"));
    PRISTINE_RETURN_IF_ERROR(make(k_, k.size(), "k"));
    PRISTINE_RETURN_IF_ERROR(make(v_, v.size(), "v"));
    PRISTINE_RETURN_IF_ERROR(make(seen_, 4 * sizeof(int), "seen"));
    PRISTINE_RETURN_IF_ERROR(make(engines_, 2 * sizeof(int), "engine's"));
    const std::vector<int> values = {7, 8};
    // The host memory must outlive the copies, whatever fails.
    absl::Status status = Upload(k_, k);
    if (status.ok()) status = Upload(v_, v);
    if (status.ok()) status = Upload(q_, q);
    if (status.ok())
      status = Upload(engines_, absl::MakeConstSpan(reinterpret_cast<const std::byte*>(values.data()), 8));
    const absl::Status waited = stream_->Synchronize();
    if (status.ok()) status = waited;
    if (!waited.ok()) {
      EXPECT_OK(stream_->Synchronize());
    }
    return status;
  }
  absl::Status Upload(DeviceBuffer& to, absl::Span<const std::byte> values) {
    return stream_->CopyFromHost(to.As<std::byte>().Sub(0, values.size()), values);
  }

  absl::Status MakeMetadata() {
    return Make(metadata_, [this] {
      return attention::StepMetadata::Create(*manager_, {.max_requests = 4,
                                                         .max_tokens = 4,
                                                         .page_size = kLifeShape.page_size,
                                                         .num_pages = truth_.step.num_pages(),
                                                         .max_step_pages = 16,
                                                         .max_length = 16});
    });
  }

  absl::Status MakePlan() {
    return Make(plan_, [this] {
      return attention::DecodePlan::Create(*manager_, {.buckets = {kSmall, kLarge},
                                                       .q_heads = kLifeShape.q_heads,
                                                       .kv_heads = kLifeShape.kv_heads,
                                                       .head_dim = kLifeShape.head_dim,
                                                       .page_size = kLifeShape.page_size,
                                                       .max_row_tokens = 16,
                                                       .derived_from = {metadata_->lengths().id},
                                                       .scheduler = attention::DecodeScheduler::kHost});
    });
  }

  absl::Status Add(Buffer<int32_t>& to, const char* name, Role role, const std::vector<int32_t>& original) {
    BufferSpec spec;
    spec.name = name;
    spec.role = role;
    spec.axis = role == Role::kRefilled ? Axis::Pages() : Axis::Fixed();
    PRISTINE_ASSIGN_OR_RETURN(to, manager_->Register<int32_t>(spec, original));
    return absl::OkStatus();
  }

  absl::Status AddTable() {
    BufferSpec spec;
    spec.name = "table";
    spec.role = Role::kRefilled;
    spec.kind = Kind::kPageTable;
    spec.axis = Axis::Rows(kColumns);
    spec.dummy = kDummyPage;
    spec.deltas = true;
    PRISTINE_ASSIGN_OR_RETURN(table_, manager_->Register<int32_t>(spec, std::vector<int32_t>(4 * kColumns, 1)));
    pages_.resize(4 * kColumns);
    return absl::OkStatus();
  }
  // Changes one page, and gives the rows that this step's extent adds.
  absl::Status UpdateTable(int32_t rows) {
    const int32_t first = std::min(table_rows_, rows);
    for (size_t i = static_cast<size_t>(first * kColumns); i < static_cast<size_t>(rows * kColumns); ++i) {
      pages_[i] = ++last_page_;
    }
    pages_[1] = ++last_page_;
    const std::vector<BufferManager::Range> ranges = {{1, 1}, {first * kColumns, (rows - first) * kColumns}};
    std::vector<int32_t> values = {pages_[1]};
    values.insert(values.end(), pages_.begin() + first * kColumns, pages_.begin() + rows * kColumns);
    table_rows_ = rows;
    return manager_->Update<int32_t>(table_, ranges, values);
  }

  absl::Status Adopt() {
    BufferSpec spec;
    spec.name = "adopted";
    return manager_->Adopt<int32_t>(spec, engines_.As<int32_t>()).status();
  }

  absl::Status Body(Stream& stream, const Extent& bucket) {
    PRISTINE_RETURN_IF_ERROR(decode_->Run(stream, bucket,
                                          {.q = q_.As<const std::byte>(),
                                           .k = k_.As<const std::byte>(),
                                           .v = v_.As<const std::byte>(),
                                           .out = out_.As<std::byte>(),
                                           .lse = lse_.As<attention::LseBase2>(),
                                           .kv_indptr = metadata_->kv_indptr().live,
                                           .kv_indices = metadata_->kv_indices().live,
                                           .lengths = metadata_->lengths().live}));
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {counter_.live.address(), 2}));
    const DeviceSpan<int32_t> seen = seen_.As<int32_t>();
    PRISTINE_RETURN_IF_ERROR(stream.Fill(AsWritableBytes(seen.Sub(2, 2)), std::byte{0}));
    return stream.Copy(AsWritableBytes(seen.Sub(0, 2)), AsBytes(counter_.live));
  }

  absl::Status MakeRunner() {
    PRISTINE_ASSIGN_OR_RETURN(
        runner_, GraphRunner::Create({.buckets = {kSmall, kLarge}, .warmups = 1},
                                     [this](Stream& stream, const Extent& bucket) { return Body(stream, bucket); }));
    return runner_->AddHook(*manager_);
  }

  absl::Status Open(const Extent& bucket, int32_t rows, size_t bulk) {
    const DecodeCase& step = truth_.step;
    const absl::Span<const int32_t> lengths = absl::MakeConstSpan(step.lengths()).first(rows);
    const absl::Span<const int32_t> indptr = absl::MakeConstSpan(step.indptr()).first(rows + 1);
    const std::vector<int32_t> slots(rows, -1), positions(rows, 0), bulky(bulk, 3);
    PRISTINE_RETURN_IF_ERROR(manager_->WaitForSlot());
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(bucket, {rows, rows}));
    PRISTINE_RETURN_IF_ERROR(metadata_->Refill({.lengths = lengths,
                                                .kv_indptr = indptr,
                                                .kv_indices = absl::MakeConstSpan(step.indices()).first(indptr.back()),
                                                .slots = slots,
                                                .positions = positions}));
    PRISTINE_RETURN_IF_ERROR(manager_->Refill<int32_t>(bulky_, bulky));
    PRISTINE_RETURN_IF_ERROR(UpdateTable(rows));
    return plan_->Plan(bucket, lengths);
  }

  absl::Status Step(const Extent& bucket, int32_t rows, size_t bulk) {
    PRISTINE_RETURN_IF_ERROR(stream_->Fill(out_.As<std::byte>(), std::byte{0xff}));
    PRISTINE_RETURN_IF_ERROR(Open(bucket, rows, bulk));
    PRISTINE_RETURN_IF_ERROR(runner_->Replay(*stream_, bucket, {rows, rows}));
    return Check(bucket, rows);
  }

  absl::Status CaptureByEngine() {
    PRISTINE_RETURN_IF_ERROR(EngineBeginCapture(*engine_stream_));
    absl::Status status = manager_->RecordPrologue(*engine_stream_, kSmall);
    if (status.ok()) status = Body(*engine_stream_, kSmall);
    absl::StatusOr<EngineLaunch> launch = EngineEndCapture(*engine_stream_);
    PRISTINE_RETURN_IF_ERROR(status);
    PRISTINE_ASSIGN_OR_RETURN(launch_, std::move(launch));
    return absl::OkStatus();
  }

  absl::Status StepByEngine() {
    if (!armed_) {
      PRISTINE_RETURN_IF_ERROR(stream_->Fill(out_.As<std::byte>(), std::byte{0xff}));
      PRISTINE_RETURN_IF_ERROR(Open(kSmall, 2, 4));
      PRISTINE_RETURN_IF_ERROR(manager_->BeforeReplay(*engine_stream_, kSmall, {2, 2}));
      armed_ = true;
    }
    if (!launched_) {
      PRISTINE_RETURN_IF_ERROR(launch_(*engine_stream_));
      launched_ = true;
    }
    PRISTINE_RETURN_IF_ERROR(Check(kSmall, 2));
    armed_ = launched_ = false;
    return absl::OkStatus();
  }

  // That the last replay gave attention over the case's first `rows`, and the counter one above its original.
  absl::Status Check(const Extent& bucket, int32_t rows) {
    std::vector<float> out(out_.bytes() / sizeof(float)), lse(lse_.bytes() / sizeof(float));
    std::vector<int32_t> seen(4), table(pages_.size());
    const auto read = [this](auto& to, const DeviceBuffer& from) {
      return stream_->CopyToHost({reinterpret_cast<std::byte*>(to.data()), from.bytes()}, from.As<const std::byte>());
    };
    absl::Status status = read(out, out_);
    if (status.ok()) status = read(lse, lse_);
    if (status.ok()) status = read(seen, seen_);
    const absl::Span<std::byte> pages = {reinterpret_cast<std::byte*>(table.data()), table_.live.bytes()};
    if (status.ok()) status = stream_->CopyToHost(pages, AsBytes(table_.live));
    const absl::Status waited = stream_->Synchronize();
    if (!waited.ok()) {  // the copies must not outlive their memory
      EXPECT_OK(stream_->Synchronize());
    }
    PRISTINE_RETURN_IF_ERROR(status);
    PRISTINE_RETURN_IF_ERROR(waited);
    EXPECT_EQ(seen, (std::vector<int32_t>{6, 7, 0, 0}));
    for (int32_t i = 0; i < bucket.requests * kColumns; ++i) {
      EXPECT_EQ(table[i], i < rows * kColumns ? pages_[i] : kDummyPage) << "page " << i << " of the table";
    }
    const OracleRow nothing = {.out = {}, .lse = -std::numeric_limits<double>::infinity()};
    for (int32_t row = 0; row < bucket.requests; ++row) {
      for (int32_t head = 0; head < kLifeShape.q_heads; ++head) {
        const size_t place = static_cast<size_t>(row * kLifeShape.q_heads + head);
        EXPECT_EQ(Mismatch(row < rows ? truth_.expected[place] : nothing,
                           absl::MakeConstSpan(out).subspan(place * kLifeShape.head_dim, kLifeShape.head_dim),
                           lse[place], kLifeShape.dtype),
                  "")
            << "row " << row << ", head " << head << " of " << rows << " rows in " << bucket.ToString();
      }
    }
    return absl::OkStatus();
  }

  // Two branches that join, launched once: each adds one to a number of its own.
  absl::Status Fork() {
    int32_t* const seen = seen_.As<int32_t>().address();
    PRISTINE_RETURN_IF_ERROR(stream_->Fill(seen_.As<std::byte>(), std::byte{0}));
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Graph> graph,
                              Capture(*stream_, [&](Stream& stream) -> absl::Status {
                                PRISTINE_RETURN_IF_ERROR(stream.Record(*forked_));
                                PRISTINE_RETURN_IF_ERROR(side_->Wait(*forked_));
                                PRISTINE_RETURN_IF_ERROR(Launch(*side_, kAddOne, {seen, 1}));
                                PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {seen + 1, 1}));
                                PRISTINE_RETURN_IF_ERROR(side_->Record(*joined_));
                                return stream.Wait(*joined_);
                              }));
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
    PRISTINE_RETURN_IF_ERROR(exec->Upload(*stream_));
    PRISTINE_RETURN_IF_ERROR(exec->Launch(*stream_));
    PRISTINE_RETURN_IF_ERROR(stream_->IsIdle().status());
    return ExpectSeen({1, 1, 0, 0});
  }

  absl::Status SetParameters() {
    int32_t* const seen = seen_.As<int32_t>().address();
    PRISTINE_RETURN_IF_ERROR(stream_->Fill(seen_.As<std::byte>(), std::byte{0}));
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Graph> graph, Capture(*stream_, [&](Stream& stream) {
                                return Launch(stream, kSetValue, {seen, 0, 1});
                              }));
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
    PRISTINE_RETURN_IF_ERROR(exec->SetKernelParams(0, kSetValue, SetValueParams{seen, 1, 5}));
    PRISTINE_RETURN_IF_ERROR(exec->Launch(*stream_));
    return ExpectSeen({0, 5, 0, 0});
  }

  absl::Status ExpectSeen(const std::vector<int32_t>& expected) {
    std::vector<int32_t> seen(4);
    const absl::Status status =
        stream_->CopyToHost({reinterpret_cast<std::byte*>(seen.data()), seen_.bytes()}, seen_.As<const std::byte>());
    const absl::Status waited = stream_->Synchronize();
    if (!waited.ok()) {
      EXPECT_OK(stream_->Synchronize());
    }
    PRISTINE_RETURN_IF_ERROR(status);
    PRISTINE_RETURN_IF_ERROR(waited);
    EXPECT_EQ(seen, expected);
    return absl::OkStatus();
  }

  absl::Status Restore() {
    PRISTINE_RETURN_IF_ERROR(manager_->Restore(*stream_));
    PRISTINE_RETURN_IF_ERROR(manager_->RestoreAll(*stream_, kLarge));
    PRISTINE_RETURN_IF_ERROR(manager_->CheckEqual(*stream_, metadata_->lengths(), metadata_->lengths(), kLarge));
    return device_.Synchronize();
  }

  absl::Status Verify() {
    PRISTINE_ASSIGN_OR_RETURN(const std::vector<Violation> found, manager_->Verify(*stream_));
    for (const Violation& violation : found) ADD_FAILURE() << violation.ToString();
    return absl::OkStatus();
  }

  absl::Status FindNoPolluter() {
    PRISTINE_ASSIGN_OR_RETURN(
        const std::vector<Violation> found,
        FindPolluter(*manager_, *stream_, kSmall, [this](Stream& stream) { return Body(stream, kSmall); }));
    for (const Violation& violation : found) ADD_FAILURE() << violation.ToString();
    return absl::OkStatus();
  }

  Device& device_;
  const LifeTruth& truth_;
  DeviceBuffer q_, out_, lse_, k_, v_, seen_, engines_;
  std::unique_ptr<Stream> stream_, side_, engine_stream_;
  std::unique_ptr<Event> forked_, joined_;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<attention::StepMetadata> metadata_;
  std::unique_ptr<attention::DecodePlan> plan_;
  std::unique_ptr<attention::PagedDecode> decode_;
  Buffer<int32_t> constant_, counter_, bulky_, late_;
  static constexpr int32_t kColumns = 3, kDummyPage = 0;
  Buffer<int32_t> table_;       // takes deltas
  std::vector<int32_t> pages_;  // what it should hold
  int32_t table_rows_ = 0;      // of the last step that was tried: what the rows past it hold depends on what failed
  int32_t last_page_ = 0;
  std::unique_ptr<GraphRunner> runner_;
  EngineLaunch launch_;
  bool armed_ = false;     // the engine's next launch takes a step
  bool launched_ = false;  // and has been queued
};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_RECOVERY_LIFE_H_
