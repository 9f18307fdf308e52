// Restore: a graph overwrites an array that its next replay starts from.
//
// `workspace` is what a decode wrapper is bound to: preallocated as [0, R, 2R, …], and overwritten inside the graph by
// the step's true row starts. The same steps run twice. As engines have it (Restore::kOff), each replay starts from
// what the one before left. With kRestored and the default, Restore::kGraphHead, each starts from the original.
#include <cstdio>
#include <string>
#include <vector>

#include "examples/device_option.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::examples {
namespace {

constexpr int32_t kRows = 4;
constexpr Extent kBucket = {kRows, kRows};
constexpr int32_t kWorst = 100;  // R: the most tokens of a row

using Snapshots = std::vector<std::vector<int32_t>>;

// What `workspace` held at the head of the body in each step.
absl::StatusOr<Snapshots> RunSteps(Device& device, ManagerOptions::Restore restore) {
  PRISTINE_ASSIGN_OR_RETURN(auto stream, device.CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(auto manager, BufferManager::Create(device, {.restore = restore}));
  std::vector<int32_t> worst_case;
  for (int32_t row = 0; row <= kRows; ++row) worst_case.push_back(row * kWorst);
  BufferSpec spec = {.name = "workspace",
                     .role = Role::kRestored,
                     .kind = Kind::kIndptr,
                     .axis = Axis::RequestsPlusOne(),
                     .limit = kRows * kWorst};
  PRISTINE_ASSIGN_OR_RETURN(auto workspace, manager->Register<int32_t>(spec, worst_case));
  spec.name = "row_starts";
  spec.role = Role::kRefilled;
  PRISTINE_ASSIGN_OR_RETURN(auto row_starts, manager->Register<int32_t>(spec, worst_case));
  PRISTINE_ASSIGN_OR_RETURN(auto seen, device.Allocate(workspace.live.bytes(), "seen"));

  // The body looks at the workspace and then overwrites it, as the in-graph conversion of a sparse page table does.
  auto body = [&](Stream& s, const Extent&) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(s.Copy(seen.As<std::byte>(), AsBytes(workspace.live)));
    return s.Copy(AsWritableBytes(workspace.live), AsBytes(row_starts.live));
  };
  PRISTINE_ASSIGN_OR_RETURN(auto runner, GraphRunner::Create({.name = "decode", .buckets = {kBucket}}, body));
  PRISTINE_RETURN_IF_ERROR(runner->AddHook(*manager));
  PRISTINE_RETURN_IF_ERROR(runner->CaptureAll(*stream));

  Snapshots snapshots;
  for (const std::vector<int32_t>& step : std::vector<std::vector<int32_t>>{
           {0, 70, 90, 95, 99}, {0, 30, 31, 40, 88}, {0, 5, 6, 7, 8}, {0, 60, 80, 99, 100}}) {
    PRISTINE_RETURN_IF_ERROR(manager->BeginStep(kBucket, kBucket));
    PRISTINE_RETURN_IF_ERROR(manager->Refill<int32_t>(row_starts, step));
    PRISTINE_RETURN_IF_ERROR(runner->Replay(*stream, kBucket, kBucket));
    std::vector<int32_t> values(kRows + 1);
    PRISTINE_RETURN_IF_ERROR(stream->CopyToHost({reinterpret_cast<std::byte*>(values.data()), workspace.live.bytes()},
                                                seen.As<const std::byte>()));
    PRISTINE_RETURN_IF_ERROR(stream->Synchronize());
    snapshots.push_back(values);
  }
  return snapshots;
}

std::string ToText(const std::vector<int32_t>& values) {
  std::string text;
  for (int32_t value : values) text += absl::StrCat(text.empty() ? "" : " ", value);
  return text;
}

absl::Status Run(int argc, char** argv) {
  PRISTINE_ASSIGN_OR_RETURN(auto device, DeviceFromArgs(argc, argv));
  PRISTINE_ASSIGN_OR_RETURN(const Snapshots off, RunSteps(*device, ManagerOptions::Restore::kOff));
  PRISTINE_ASSIGN_OR_RETURN(const Snapshots on, RunSteps(*device, ManagerOptions::Restore::kGraphHead));
  std::printf("%s: workspace as the body finds it; original: 0 100 200 300 400\n\n", device->name().c_str());
  std::printf("step  %-22s  restored at the graph's head\n", "never restored");
  for (size_t step = 0; step < off.size(); ++step) {
    std::printf("%4zu  %-22s  %s\n", step + 1, ToText(off[step]).c_str(), ToText(on[step]).c_str());
    if (ToText(on[step]) != "0 100 200 300 400") return absl::DataLossError("the workspace was not restored");
  }
  if (off[1] == on[1]) return absl::InternalError("without restore the second step should see the first one's values");
  return absl::OkStatus();
}

}  // namespace
}  // namespace pristine::examples

int main(int argc, char** argv) {
  const absl::Status status = pristine::examples::Run(argc, argv);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
