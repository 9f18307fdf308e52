// Buckets: a graph has one shape, batches have many. So there is one graph per bucket size, a batch runs in the
// smallest that it fits in, and the rows left over are padding. The manager fills them with what is harmless for their
// kind, here length 0; were they left alone, they would hold the values of an earlier, larger batch.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "examples/02_buckets/kernels.h"
#include "examples/device_option.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::examples {
namespace {

constexpr int32_t kMaxRequests = 8;
constexpr int32_t kMaxLength = 1000;

int HostSquare(const SquareParams& p) {
  for (int32_t row = 0; row < p.rows; ++row) p.squares[row] = int64_t{p.lengths[row]} * p.lengths[row];
  return 0;
}

constexpr Kernel<SquareParams> kSquare = {
    "square", HostSquare, PRISTINE_CUDA(CudaSquare),
    [](const SquareParams& p, WriteList& writes) { writes.Add(p.squares, p.rows * sizeof(int64_t)); }};

absl::Status Run(int argc, char** argv) {
  PRISTINE_ASSIGN_OR_RETURN(auto device, DeviceFromArgs(argc, argv));
  PRISTINE_ASSIGN_OR_RETURN(auto squares, device->Allocate(kMaxRequests * sizeof(int64_t), "squares"));
  PRISTINE_ASSIGN_OR_RETURN(auto output, device->AllocatePinned(squares.bytes(), "output"));
  PRISTINE_ASSIGN_OR_RETURN(auto stream, device->CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(auto manager, BufferManager::Create(*device));
  const BufferSpec spec = {
      .name = "lengths", .role = Role::kRefilled, .kind = Kind::kLength, .axis = Axis::Requests(), .limit = kMaxLength};
  const std::vector<int32_t> worst_case(kMaxRequests, kMaxLength);
  PRISTINE_ASSIGN_OR_RETURN(auto lengths, manager->Register<int32_t>(spec, worst_case));

  auto body = [&](Stream& s, const Extent& bucket) -> absl::Status {
    const SquareParams params = {lengths.live.address(), squares.As<int64_t>().address(), bucket.requests};
    PRISTINE_RETURN_IF_ERROR(Launch(s, kSquare, params));
    return s.CopyToHost(output.As<std::byte>(), squares.As<const std::byte>());
  };
  PRISTINE_ASSIGN_OR_RETURN(auto runner,
                            GraphRunner::Create({.name = "decode", .buckets = {{2, 2}, {4, 4}, {8, 8}}}, body));
  PRISTINE_RETURN_IF_ERROR(runner->AddHook(*manager));
  PRISTINE_RETURN_IF_ERROR(runner->CaptureAll(*stream));
  std::printf("%s: %lld graphs captured, for 2, 4 and 8 requests\n\nbatch  bucket  squares of the lengths\n",
              device->name().c_str(), static_cast<long long>(runner->stats().captures));

  for (const std::vector<int32_t>& batch :
       std::vector<std::vector<int32_t>>{{11, 12, 13, 14, 15, 16, 17, 18}, {21, 22, 23}, {31}, {41, 42, 43, 44, 45}}) {
    const int32_t requests = static_cast<int32_t>(batch.size());
    const Extent extent{requests, requests};
    PRISTINE_ASSIGN_OR_RETURN(const Extent bucket, runner->BucketFor(extent));
    PRISTINE_RETURN_IF_ERROR(manager->BeginStep(bucket, extent));
    PRISTINE_RETURN_IF_ERROR(manager->Refill<int32_t>(lengths, batch));
    PRISTINE_RETURN_IF_ERROR(runner->Replay(*stream, bucket, extent));
    PRISTINE_RETURN_IF_ERROR(stream->Synchronize());

    std::string row;
    const absl::Span<const int64_t> got = output.As<int64_t>();
    for (int32_t i = 0; i < bucket.requests; ++i) {
      const int64_t length = i < requests ? batch[i] : 0;  // padding: zero, whatever an earlier batch left
      if (got[i] != length * length) return absl::DataLossError(absl::StrCat("squares[", i, "] is ", got[i]));
      absl::StrAppend(&row, " ", got[i]);
    }
    std::printf("%5d  %6d %s\n", requests, bucket.requests, row.c_str());
  }

  const absl::StatusOr<Extent> none = runner->BucketFor({0, 0});
  const absl::StatusOr<Extent> nine = runner->BucketFor({9, 9});
  std::printf("\nbatch of 0: %s\nbatch of 9: %s\n", none.status().ToString().c_str(), nine.status().ToString().c_str());
  if (!absl::IsInvalidArgument(none.status()) || !absl::IsOutOfRange(nine.status())) {
    return absl::InternalError("a batch that fits no bucket was given one");
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
