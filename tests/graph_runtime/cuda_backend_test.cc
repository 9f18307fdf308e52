// What only the CUDA backend has to get right: the conformance suites cover what it shares with Host.
#ifdef PRISTINE_HAS_CUDA

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"
#include "tests/support/test_kernels.h"

namespace pristine::testing {
namespace {

class CudaBackend : public DeviceTest<Cuda> {
 protected:
  static cudaStream_t Native(Stream& stream) { return static_cast<cudaStream_t>(stream.native()); }
  DeviceBuffer MakeZeros(size_t count) {
    absl::StatusOr<DeviceBuffer> buffer = device_->Allocate(count * sizeof(int), "zeros");
    EXPECT_OK(buffer);
    EXPECT_OK(stream_->Fill(buffer->As<std::byte>(), std::byte{0}));
    EXPECT_OK(stream_->Synchronize());
    return *std::move(buffer);
  }
  int ReadFirst(const DeviceBuffer& buffer) {
    int value = -1;
    EXPECT_OK(stream_->CopyToHost({reinterpret_cast<std::byte*>(&value), sizeof(value)},
                                  buffer.As<const std::byte>().Sub(0, sizeof(value))));
    EXPECT_OK(stream_->Synchronize());
    return value;
  }
};

TEST_F(CudaBackend, ADeviceThatIsNotThereIsUnavailableAndSaysHowManyThereAre) {
  int count = 0;
  ASSERT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
  EXPECT_STATUS(CreateCudaDevice(count), kUnavailable, "this machine has " + std::to_string(count));
  EXPECT_STATUS(CreateCudaDevice(-1), kUnavailable, "no CUDA device -1");
}

TEST_F(CudaBackend, ACallLeavesTheCallersDeviceAsItWas) {
  int count = 0;
  ASSERT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
  ASSERT_OK_AND_ASSIGN(auto last, CreateCudaDevice(count - 1));
  std::thread([&] {
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    absl::StatusOr<DeviceBuffer> memory = last->Allocate(4, "elsewhere");
    EXPECT_OK(memory);
    absl::StatusOr<std::unique_ptr<Stream>> stream = last->CreateStream();
    EXPECT_OK(stream);
    EXPECT_OK((*stream)->Fill(memory->As<std::byte>(), std::byte{1}));
    EXPECT_OK((*stream)->Synchronize());
    int device = -1;
    EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
    EXPECT_EQ(device, 0);
  }).join();
}

TEST_F(CudaBackend, ForeignWorkAppearsBetweenOursByItsSymbol) {
  DeviceBuffer x = MakeZeros(4);
  int* address = x.As<int>().address();
  ASSERT_OK_AND_ASSIGN(auto graph, Capture(*stream_, [&](Stream& stream) -> absl::Status {
                         PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {address, 1}));
                         EXPECT_EQ(AddOneCuda(Native(stream), {address, 1}), cudaSuccess);
                         EXPECT_EQ(cudaMemsetAsync(address + 1, 0, 4, Native(stream)), cudaSuccess);
                         return Launch(stream, kAddOne, {address, 1});
                       }));
  ASSERT_EQ(graph->nodes().size(), 4u);
  EXPECT_EQ(graph->nodes()[0].name, "add_one");
  EXPECT_FALSE(graph->nodes()[0].foreign);
  EXPECT_TRUE(graph->nodes()[1].foreign);
  EXPECT_NE(graph->nodes()[1].name.find("AddOneKernel"), std::string::npos) << graph->nodes()[1].name;
  EXPECT_TRUE(graph->nodes()[2].foreign);
  EXPECT_EQ(graph->nodes()[2].kind, GraphNode::Kind::kFill);
  EXPECT_EQ(graph->nodes()[3].name, "add_one");
  EXPECT_EQ(graph->edges(), (std::vector<GraphEdge>{{0, 1}, {1, 2}, {2, 3}}));
  for (const GraphNode& node : graph->nodes()) EXPECT_NE(node.native, nullptr);
  ASSERT_OK_AND_ASSIGN(auto exec, graph->Instantiate());
  ASSERT_OK(exec->Launch(*stream_));
  EXPECT_EQ(ReadFirst(x), 3);
}

TEST_F(CudaBackend, AGraphThatAllocatesIsRefused) {
  ASSERT_OK_AND_ASSIGN(auto graph, Capture(*stream_, [&](Stream& stream) -> absl::Status {
                         void* memory = nullptr;
                         EXPECT_EQ(cudaMallocAsync(&memory, 256, Native(stream)), cudaSuccess);
                         EXPECT_EQ(cudaFreeAsync(memory, Native(stream)), cudaSuccess);
                         return absl::OkStatus();
                       }));
  EXPECT_STATUS(graph->Instantiate(), kFailedPrecondition, "memory");
}

TEST_F(CudaBackend, AllocationIsRefusedWhileAnAdoptedStreamCapturesAndTheCaptureLives) {
  DeviceBuffer x = MakeZeros(1);
  cudaStream_t engine = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&engine, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(engine, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  {
    ASSERT_OK_AND_ASSIGN(auto adopted, device_->AdoptStream(engine));
    EXPECT_TRUE(adopted->capturing());
    EXPECT_TRUE(*adopted->AtCaptureHead());
    EXPECT_STATUS(device_->Allocate(4, "late"), kFailedPrecondition, "late");
    EXPECT_OK(Launch(*adopted, kAddOne, {x.As<int>().address(), 1}));
    EXPECT_FALSE(*adopted->AtCaptureHead());
  }
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(engine, &graph), cudaSuccess);
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  EXPECT_EQ(cudaGraphLaunch(exec, engine), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(engine), cudaSuccess);
  EXPECT_EQ(ReadFirst(x), 1);
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(engine), cudaSuccess);
}

TEST_F(CudaBackend, AnErrorThatTheCallerLeftBehindIsNotBlamedOnALaunch) {
  DeviceBuffer x = MakeZeros(1);
  EXPECT_EQ(cudaMemcpy(nullptr, x.As<int>().address(), 4, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  EXPECT_OK(Launch(*stream_, kAddOne, {x.As<int>().address(), 1}));
  EXPECT_EQ(ReadFirst(x), 1);
}

TEST_F(CudaBackend, ARefusedLaunchIsFinalForItsStreamOnly) {
  DeviceBuffer x = MakeZeros(1);
  {
    ASSERT_OK_AND_ASSIGN(auto broken, device_->CreateStream());
    EXPECT_STATUS(Launch(*broken, kFail, {}), kInternal, "fail: cudaErrorInvalid");
    EXPECT_STATUS(broken->Synchronize(), kInternal, "fail");
  }
  EXPECT_OK(Launch(*stream_, kAddOne, {x.As<int>().address(), 1}));
  EXPECT_EQ(ReadFirst(x), 1);
}

TEST_F(CudaBackend, ALaunchRefusedInACaptureFailsTheCaptureAndNotTheStream) {
  DeviceBuffer x = MakeZeros(1);
  EXPECT_STATUS(Capture(*stream_,
                        [&](Stream& stream) -> absl::Status {
                          Launch(stream, kFail, {}).IgnoreError();
                          return absl::OkStatus();
                        }),
                kInternal, "fail");
  EXPECT_OK(Launch(*stream_, kAddOne, {x.As<int>().address(), 1}));
  EXPECT_EQ(ReadFirst(x), 1);
}

TEST_F(CudaBackend, AStreamThatJoinedACaptureCountsAsCapturing) {
  DeviceBuffer x = MakeZeros(1);
  ASSERT_OK_AND_ASSIGN(auto side, device_->CreateStream());
  ASSERT_OK_AND_ASSIGN(auto fork, device_->CreateEvent());
  ASSERT_OK_AND_ASSIGN(auto join, device_->CreateEvent());
  EXPECT_OK(Capture(*stream_, [&](Stream& stream) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(stream.Record(*fork));
    PRISTINE_RETURN_IF_ERROR(side->Wait(*fork));
    EXPECT_EQ(device_->capturing_streams(), 2);
    PRISTINE_RETURN_IF_ERROR(Launch(*side, kAddOne, {x.As<int>().address(), 1}));
    PRISTINE_RETURN_IF_ERROR(side->Record(*join));
    return stream.Wait(*join);
  }));
  EXPECT_EQ(device_->capturing_streams(), 0);
  EXPECT_OK(Launch(*side, kAddOne, {x.As<int>().address(), 1}));
  EXPECT_OK(side->Synchronize());
  EXPECT_EQ(ReadFirst(x), 1);
}

TEST_F(CudaBackend, ExecsDestroyedInFlightAreRetiredAndComplete) {
  DeviceBuffer x = MakeZeros(1);
  for (int i = 0; i < 50; ++i) {
    ASSERT_OK_AND_ASSIGN(auto graph, Capture(*stream_, [&](Stream& stream) -> absl::Status {
                           PRISTINE_RETURN_IF_ERROR(Launch(stream, kDelay, {200'000}));
                           return Launch(stream, kAddOne, {x.As<int>().address(), 1});
                         }));
    ASSERT_OK_AND_ASSIGN(auto exec, graph->Instantiate());
    ASSERT_OK(exec->Launch(*stream_));
  }
  EXPECT_EQ(ReadFirst(x), 50);
}

}  // namespace
}  // namespace pristine::testing

#endif  // PRISTINE_HAS_CUDA
