// Capture and replay: queue work once, run it many times.
//
// A capture records what the body queues and runs none of it. It freezes addresses and scalars, and reads what lies at
// the addresses afresh in each replay. So new input goes to the old place, and a scalar can never change: below, the
// host changes both, and the replays see the one and not the other.
#include <cstdio>
#include <string>

#include "absl/types/span.h"
#include "examples/01_capture_and_replay/kernels.h"
#include "examples/device_option.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::examples {
namespace {

constexpr int32_t kCount = 4;

int HostAffine(const AffineParams& p) {
  for (int32_t i = 0; i < p.count; ++i) p.y[i] = p.a * p.x[i] + p.b;
  return 0;
}

constexpr Kernel<AffineParams> kAffine = {
    "affine", HostAffine, PRISTINE_CUDA(CudaAffine),
    [](const AffineParams& p, WriteList& writes) { writes.Add(p.y, p.count * sizeof(float)); }};

absl::Status Run(int argc, char** argv) {
  PRISTINE_ASSIGN_OR_RETURN(auto device, DeviceFromArgs(argc, argv));
  PRISTINE_ASSIGN_OR_RETURN(auto x, device->Allocate(kCount * sizeof(float), "x"));
  PRISTINE_ASSIGN_OR_RETURN(auto y, device->Allocate(kCount * sizeof(float), "y"));
  PRISTINE_ASSIGN_OR_RETURN(auto input, device->AllocatePinned(x.bytes(), "input"));
  PRISTINE_ASSIGN_OR_RETURN(auto output, device->AllocatePinned(y.bytes(), "output"));
  PRISTINE_ASSIGN_OR_RETURN(auto stream, device->CreateStream());

  AffineParams params = {x.As<float>().address(), y.As<float>().address(), kCount, /*a=*/2, /*b=*/1};
  PRISTINE_ASSIGN_OR_RETURN(auto graph, Capture(*stream, [&](Stream& s) -> absl::Status {
                              PRISTINE_RETURN_IF_ERROR(s.CopyFromHost(x.As<std::byte>(), input.As<std::byte>()));
                              PRISTINE_RETURN_IF_ERROR(Launch(s, kAffine, params));
                              return s.CopyToHost(output.As<std::byte>(), y.As<const std::byte>());
                            }));
  PRISTINE_ASSIGN_OR_RETURN(auto exec, graph->Instantiate());
  std::printf("%s: captured %zu nodes, ran none of them\n\n%s\n", device->name().c_str(), graph->nodes().size(),
              graph->ToDot("capture_and_replay").c_str());

  params.a = 1000;  // too late: the graph has its own copy
  std::printf("replay  x          y = 2 * x + 1\n");
  const absl::Span<float> in = input.As<float>(), out = output.As<float>();
  for (int replay = 1; replay <= 3; ++replay) {
    for (int32_t i = 0; i < kCount; ++i) in[i] = static_cast<float>(10 * replay + i);
    PRISTINE_RETURN_IF_ERROR(exec->Launch(*stream));
    PRISTINE_RETURN_IF_ERROR(stream->Synchronize());
    std::printf("%6d  %g %g %g %g  %g %g %g %g\n", replay, in[0], in[1], in[2], in[3], out[0], out[1], out[2], out[3]);
    for (int32_t i = 0; i < kCount; ++i) {
      if (out[i] != 2 * in[i] + 1) return absl::DataLossError(absl::StrCat("y[", i, "] is ", out[i]));
    }
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace pristine::examples

int main(int argc, char** argv) {
  const absl::Status status = pristine::examples::Run(argc, argv);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
