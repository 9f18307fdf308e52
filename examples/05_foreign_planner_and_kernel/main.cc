// A foreign planner and kernel, made safe without touching either (their habits: foreign.h).
//
// The engine owns the bound arrays; Adopt takes them in at their own address, and a WrapperContract says what the
// kernel can bear in padded rows. The same steps run with the default contract and with the right one. Then a plan that
// is older than its lengths is refused before anything is launched.
#include <cstdio>
#include <vector>

#include "examples/05_foreign_planner_and_kernel/foreign.h"
#include "examples/device_option.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/host_native.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::examples {
namespace {

constexpr int32_t kRows = 32;  // what the kernel is bound for, and runs over
constexpr int32_t kMaxLength = 512, kSlots = 64, kDummySlot = 63;

struct Outcome {
  int32_t wild_reads = 0, disagreements = 0;
  absl::Status stale;  // what became of a replay whose plan was older than its lengths
};

absl::StatusOr<Outcome> Serve(Device& device, const WrapperContract& lengths_contract,
                              const WrapperContract& slots_contract) {
  PRISTINE_ASSIGN_OR_RETURN(auto stream, device.CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(auto arrays, device.Allocate(3 * kRows * sizeof(int32_t), "engine_arrays"));
  PRISTINE_ASSIGN_OR_RETURN(auto counters, device.Allocate(2 * sizeof(int32_t), "counters"));
  PRISTINE_ASSIGN_OR_RETURN(auto manager, BufferManager::Create(device));

  BufferSpec spec = {.name = "lengths",
                     .role = Role::kRefilled,
                     .kind = Kind::kLength,
                     .axis = Axis::Requests(),
                     .limit = kMaxLength,
                     .contract = lengths_contract};
  const auto array = [&](size_t i) { return arrays.As<int32_t>().Sub(i * kRows, kRows); };
  PRISTINE_ASSIGN_OR_RETURN(auto lengths,
                            manager->Adopt<int32_t>(spec, array(0), std::vector<int32_t>(kRows, kMaxLength)));
  spec.name = "plan";
  spec.derived_from = {lengths.id};
  PRISTINE_ASSIGN_OR_RETURN(auto plan,
                            manager->Adopt<int32_t>(spec, array(1), std::vector<int32_t>(kRows, kMaxLength / 16)));
  spec = {.name = "slots",
          .role = Role::kRefilled,
          .kind = Kind::kSlot,
          .axis = Axis::Requests(),
          .limit = kSlots,
          .dummy = kDummySlot,
          .contract = slots_contract};
  const int32_t nowhere = slots_contract.negative_ok ? -1 : kDummySlot;
  PRISTINE_ASSIGN_OR_RETURN(auto slots, manager->Adopt<int32_t>(spec, array(2), std::vector<int32_t>(kRows, nowhere)));

  int32_t* const counts = counters.As<int32_t>().address();
  const foreign::Bound bound = {
      lengths.live.address(), slots.live.address(), plan.live.address(), counts, counts + 1, kRows, kMaxLength, kSlots};
  auto body = [&](Stream& s, const Extent&) -> absl::Status {
    if (device.backend() == Backend::kHost) {
      return host::EnqueueForeign(s.native(), "visit_rows", [bound] {
        for (int32_t row = 0; row < bound.rows; ++row)
          VisitRow(bound, row, bound.wild_reads[0], bound.disagreements[0]);
        return 0;
      });
    }
#ifdef PRISTINE_HAS_CUDA
    if (foreign::LaunchCuda(static_cast<CUstream_st*>(s.native()), bound) == 0) return absl::OkStatus();
#endif
    return absl::InternalError("the foreign kernel was not launched");
  };
  PRISTINE_ASSIGN_OR_RETURN(auto runner, GraphRunner::Create({.name = "decode", .buckets = {{8, 8}, {32, 32}}}, body));
  PRISTINE_RETURN_IF_ERROR(runner->AddHook(*manager));
  PRISTINE_RETURN_IF_ERROR(runner->CaptureAll(*stream));
  PRISTINE_RETURN_IF_ERROR(stream->Fill(counters.As<std::byte>(), std::byte{0}));  // what warm-ups met is not counted

  const std::vector<int32_t> step_slots = {7, 3, 9, 1, 4};
  std::vector<int32_t> planned(kRows);
  for (const std::vector<int32_t>& step : {std::vector<int32_t>{512, 17, 33}, {18, 34}, {19, 35, 1, 2, 3}}) {
    const int32_t real = static_cast<int32_t>(step.size());
    PRISTINE_ASSIGN_OR_RETURN(const Extent bucket, runner->BucketFor({real, real}));
    PRISTINE_RETURN_IF_ERROR(manager->BeginStep(bucket, {real, real}));
    PRISTINE_RETURN_IF_ERROR(manager->Refill<int32_t>(lengths, step));
    PRISTINE_RETURN_IF_ERROR(manager->Refill<int32_t>(slots, absl::MakeConstSpan(step_slots).first(real)));
    foreign::Plan(step.data(), real, planned.data());
    PRISTINE_RETURN_IF_ERROR(manager->Refill<int32_t>(plan, absl::MakeConstSpan(planned).first(real)));
    PRISTINE_RETURN_IF_ERROR(runner->Replay(*stream, bucket, {real, real}));
  }
  Outcome outcome;
  int32_t totals[2];
  PRISTINE_RETURN_IF_ERROR(
      stream->CopyToHost({reinterpret_cast<std::byte*>(totals), sizeof(totals)}, AsBytes(counters.As<int32_t>())));
  PRISTINE_RETURN_IF_ERROR(stream->Synchronize());
  outcome.wild_reads = totals[0];
  outcome.disagreements = totals[1];

  // The mistake: plan first, then let the lengths grow.
  PRISTINE_RETURN_IF_ERROR(manager->BeginStep({8, 8}, {2, 2}));
  PRISTINE_RETURN_IF_ERROR(manager->Refill<int32_t>(slots, {7, 3}));
  PRISTINE_RETURN_IF_ERROR(manager->Refill<int32_t>(plan, {1, 2}));
  PRISTINE_RETURN_IF_ERROR(manager->Refill<int32_t>(lengths, {17, 33}));
  outcome.stale = runner->Replay(*stream, {8, 8}, {2, 2});
  return outcome;
}

absl::Status Run(int argc, char** argv) {
  PRISTINE_ASSIGN_OR_RETURN(auto device, DeviceFromArgs(argc, argv));
  PRISTINE_ASSIGN_OR_RETURN(const Outcome before, Serve(*device, {}, {}));
  PRISTINE_ASSIGN_OR_RETURN(const Outcome after, Serve(*device, {.min_length = 1, .reads_tail = true},
                                                       {.negative_ok = false, .reads_tail = true}));
  std::printf("%s, three steps of a kernel that runs over all %d rows\n\n", device->name().c_str(), kRows);
  std::printf("%-40s  %10s  %13s\n", "contract", "wild reads", "disagreements");
  std::printf("%-40s  %10d  %13d\n", "default", before.wild_reads, before.disagreements);
  std::printf("%-40s  %10d  %13d\n", "min_length 1, negative_ok no, reads_tail", after.wild_reads, after.disagreements);
  std::printf("\nlengths refilled after the plan:\n  %s\n", after.stale.ToString().c_str());
  if (before.wild_reads == 0 || after.wild_reads + after.disagreements > 0)
    return absl::InternalError("unexpected counts");
  if (after.stale.code() != absl::StatusCode::kFailedPrecondition)
    return absl::InternalError("a stale plan was replayed");
  return absl::OkStatus();
}

}  // namespace
}  // namespace pristine::examples

int main(int argc, char** argv) {
  const absl::Status status = pristine::examples::Run(argc, argv);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
