// The fixture of the conformance suites: a device, a stream, and short names for what each case does.
#ifndef PRISTINE_TESTS_CONFORMANCE_CONFORMANCE_H_
#define PRISTINE_TESTS_CONFORMANCE_CONFORMANCE_H_

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/host_native.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/stream.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"
#include "tests/support/test_kernels.h"

namespace pristine::testing {

inline absl::Span<const std::byte> HostBytes(const std::vector<int>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(int)};
}
inline absl::Span<std::byte> WritableHostBytes(std::vector<int>& values) {
  return {reinterpret_cast<std::byte*>(values.data()), values.size() * sizeof(int)};
}

// A flag that kSpin waits for. Opens itself when destroyed, so that a failed test does not hang.
class Latch {
 public:
  explicit Latch(PinnedBuffer memory) : memory_(std::move(memory)) {}
  Latch(Latch&&) = default;
  ~Latch() {
    if (memory_.bytes() > 0) Open();
  }
  void Open() { std::atomic_ref<int>(memory_.As<int>()[0]).store(1); }
  SpinParams spin() const { return {static_cast<int*>(memory_.device_address())}; }

 private:
  PinnedBuffer memory_;
};

template <class BackendT>
class ConformanceTest : public DeviceTest<BackendT> {
 protected:
  // Device memory that holds `values`. Blocks.
  DeviceBuffer MakeInts(const std::vector<int>& values, const char* name = "ints") {
    absl::StatusOr<DeviceBuffer> buffer = this->device_->Allocate(values.size() * sizeof(int), name);
    EXPECT_OK(buffer);
    if (!buffer.ok()) return {};
    EXPECT_OK(this->stream_->CopyFromHost(AsWritableBytes(buffer->template As<int>()), HostBytes(values)));
    EXPECT_OK(this->stream_->Synchronize());
    return *std::move(buffer);
  }
  // What `buffer` holds after all work of `stream_`. Blocks.
  std::vector<int> Read(const DeviceBuffer& buffer) {
    std::vector<int> values(buffer.bytes() / sizeof(int));
    EXPECT_OK(this->stream_->CopyToHost(WritableHostBytes(values), AsBytes(buffer.template As<int>())));
    EXPECT_OK(this->stream_->Synchronize());
    return values;
  }
  // On CUDA a kernel's module is loaded at its first launch, which may wait for the kernel that spins: all kernels run
  // once before a latch exists.
  Latch MakeLatch() {
    DeviceBuffer ints = MakeInts({0, 0});
    int* address = ints.As<int>().address();
    absl::StatusOr<PinnedBuffer> open = this->device_->AllocatePinned(sizeof(int), "open latch");
    absl::StatusOr<PinnedBuffer> memory = this->device_->AllocatePinned(sizeof(int), "latch");
    EXPECT_OK(open);
    EXPECT_OK(memory);
    open->template As<int>()[0] = 1;
    Stream& stream = *this->stream_;
    EXPECT_OK(Launch(stream, kSpin, {static_cast<int*>(open->device_address())}));
    EXPECT_OK(Launch(stream, kAddOne, {address, 1}));
    EXPECT_OK(Launch(stream, kSetValue, {address, 0, 1}));
    EXPECT_OK(Launch(stream, kCopyInts, {address + 1, address, 1}));
    EXPECT_OK(Launch(stream, kDelay, {1}));
    EXPECT_OK(stream.Fill(AsWritableBytes(ints.As<int>()), std::byte{0}));
    EXPECT_OK(stream.Copy(AsWritableBytes(ints.As<int>().Sub(0, 1)), AsBytes(ints.As<int>().Sub(1, 1))));
    EXPECT_OK(stream.Synchronize());
    return Latch(*std::move(memory));
  }
  std::unique_ptr<Stream> MakeStream() {
    absl::StatusOr<std::unique_ptr<Stream>> stream = this->device_->CreateStream();
    EXPECT_OK(stream);
    return *std::move(stream);
  }
  std::unique_ptr<Event> MakeEvent() {
    absl::StatusOr<std::unique_ptr<Event>> event = this->device_->CreateEvent();
    EXPECT_OK(event);
    return *std::move(event);
  }
  // Captures and instantiates `body`.
  std::unique_ptr<GraphExec> MakeExec(absl::FunctionRef<absl::Status(Stream&)> body) {
    absl::StatusOr<std::unique_ptr<Graph>> graph = Capture(*this->stream_, body);
    EXPECT_OK(graph);
    if (!graph.ok()) return nullptr;
    absl::StatusOr<std::unique_ptr<GraphExec>> exec = (*graph)->Instantiate();
    EXPECT_OK(exec);
    return *std::move(exec);
  }
};

// What an engine does behind our back: kernels queued on the native stream, and its own captures.
inline absl::Status EnqueueForeignAddOne(Stream& stream, const AddOneParams& params) {
  if (stream.device().backend() == Backend::kHost) {
    return host::EnqueueForeign(stream.native(), "foreign_add", [params] { return AddOneHost(params); });
  }
#ifdef PRISTINE_HAS_CUDA
  if (AddOneCuda(static_cast<CUstream_st*>(stream.native()), params) == 0) return absl::OkStatus();
#endif
  return absl::InternalError("the foreign launch failed");
}

inline std::vector<std::string> Names(const Graph& graph) {
  std::vector<std::string> names;
  for (const GraphNode& node : graph.nodes()) names.push_back(node.name);
  return names;
}

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_CONFORMANCE_CONFORMANCE_H_
