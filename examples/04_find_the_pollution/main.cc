// Find the pollution: a kernel writes one element too many, into a constant that all later replays read.
//
// The engine keeps two arrays in one allocation, `blocks` and, right behind it, `block_size`. A kernel launched for one
// row too many overwrites block_size[0]; eager mode never shows it, because an eager engine uploads block_size each
// step. Three things then happen by themselves: the prologue finds the constant changed (before it restores anything,
// which would hide the evidence), heals it, and counts it; Poll says where; FindPolluter says who.
#include <cstdio>
#include <vector>

#include "examples/04_find_the_pollution/kernels.h"
#include "examples/device_option.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/buffers/pollution.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::examples {
namespace {

constexpr int32_t kRequests = 8;
constexpr int32_t kBlockSize = 16;

int HostScaleRows(const ScaleRowsParams& p) {
  for (int32_t i = 0; i < p.count; ++i) p.rows[i] *= p.factor;
  return 0;
}
int HostCountBlocks(const CountBlocksParams& p) {
  for (int32_t i = 0; i < p.rows; ++i) p.blocks[i] = (p.lengths[i] + *p.block_size - 1) / *p.block_size;
  return 0;
}

constexpr Kernel<ScaleRowsParams> kScaleRows = {
    "scale_rows", HostScaleRows, PRISTINE_CUDA(CudaScaleRows),
    [](const ScaleRowsParams& p, WriteList& writes) { writes.Add(p.rows, p.count * sizeof(float)); }};
constexpr Kernel<CountBlocksParams> kCountBlocks = {
    "count_blocks", HostCountBlocks, PRISTINE_CUDA(CudaCountBlocks),
    [](const CountBlocksParams& p, WriteList& writes) { writes.Add(p.blocks, p.rows * sizeof(int32_t)); }};

absl::Status Run(int argc, char** argv) {
  PRISTINE_ASSIGN_OR_RETURN(auto device, DeviceFromArgs(argc, argv));
  PRISTINE_ASSIGN_OR_RETURN(auto stream, device->CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(auto engine, device->Allocate((kRequests + 1) * sizeof(int32_t), "engine_arrays"));
  PRISTINE_ASSIGN_OR_RETURN(auto hidden, device->Allocate(kRequests * sizeof(float), "hidden"));
  PRISTINE_RETURN_IF_ERROR(stream->Fill(hidden.As<std::byte>(), std::byte{0}));
  PRISTINE_ASSIGN_OR_RETURN(auto manager, BufferManager::Create(*device, {.check = ManagerOptions::Check::kAlways}));

  const std::vector<int32_t> lengths_original(kRequests, 100), blocks_original(kRequests, 7);
  PRISTINE_ASSIGN_OR_RETURN(
      auto lengths,
      manager->Register<int32_t>(
          {.name = "lengths", .role = Role::kRefilled, .kind = Kind::kLength, .axis = Axis::Requests(), .limit = 100},
          lengths_original));
  PRISTINE_ASSIGN_OR_RETURN(
      auto blocks, manager->Adopt<int32_t>({.name = "blocks", .role = Role::kRestored, .axis = Axis::Requests()},
                                           engine.As<int32_t>().Sub(0, kRequests), blocks_original));
  PRISTINE_ASSIGN_OR_RETURN(auto block_size,
                            manager->Adopt<int32_t>({.name = "block_size", .role = Role::kConstant},
                                                    engine.As<int32_t>().Sub(kRequests, 1), {kBlockSize}));

  auto body = [&](Stream& s, const Extent& bucket) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(
        Launch(s, kCountBlocks,
               {lengths.live.address(), block_size.live.address(), blocks.live.address(), bucket.requests + 1}));  // !
    return Launch(s, kScaleRows, {hidden.As<float>().address(), kRequests, 0.5f});
  };
  const Extent bucket{kRequests, kRequests};
  PRISTINE_ASSIGN_OR_RETURN(auto runner, GraphRunner::Create({.name = "decode", .buckets = {bucket}}, body));
  PRISTINE_RETURN_IF_ERROR(runner->AddHook(*manager));
  PRISTINE_RETURN_IF_ERROR(runner->CaptureAll(*stream));

  for (int32_t step = 1; step <= 3; ++step) {
    PRISTINE_RETURN_IF_ERROR(manager->BeginStep(bucket, {3, 3}));
    PRISTINE_RETURN_IF_ERROR(manager->Refill<int32_t>(lengths, {17 + step, 50, 99}));
    PRISTINE_RETURN_IF_ERROR(runner->Replay(*stream, bucket, {3, 3}));
    PRISTINE_RETURN_IF_ERROR(stream->Synchronize());
  }
  std::printf("%s\n\nfound by the prologues of three replays:\n", device->name().c_str());
  Violation violations[8];
  const size_t polled = manager->Poll(absl::MakeSpan(violations));
  for (size_t i = 0; i < polled; ++i) std::printf("  %s\n", violations[i].ToString().c_str());
  std::printf("healed %lld times\n\nfound by running the body node by node:\n",
              static_cast<long long>(manager->stats().healed));

  PRISTINE_ASSIGN_OR_RETURN(const auto found,
                            FindPolluter(*manager, *stream, bucket, [&](Stream& s) { return body(s, bucket); }));
  bool named = false;
  for (const Violation& violation : found) {
    std::printf("  %s\n", violation.ToString().c_str());
    named |= std::string(violation.node) == "count_blocks" && std::string(violation.buffer) == "block_size";
  }
  if (polled == 0 || !named) return absl::InternalError("the polluter was not found");
  return absl::OkStatus();
}

}  // namespace
}  // namespace pristine::examples

int main(int argc, char** argv) {
  const absl::Status status = pristine::examples::Run(argc, argv);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
