// The fixture of the buffer suites: a manager, a runner over a body that each test gives, and short ways to look.
#ifndef PRISTINE_TESTS_BUFFERS_BUFFER_FIXTURE_H_
#define PRISTINE_TESTS_BUFFERS_BUFFER_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"
#include "tests/support/test_kernels.h"

namespace pristine::testing {

inline constexpr auto kEmptyBody = [](Stream&, const Extent&) { return absl::OkStatus(); };

inline BufferSpec Spec(const std::string& name, Role role, Kind kind = Kind::kOpaque, Axis axis = Axis::Fixed()) {
  BufferSpec spec;
  spec.name = name;
  spec.role = role;
  spec.kind = kind;
  spec.axis = axis;
  return spec;
}

// A hook that refuses a replay, after the manager (added before it) has armed its step.
class RefusingHook final : public GraphHook {
 public:
  bool refuse = false;
  absl::Status BeforeCapture(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  absl::Status RecordPrologue(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  void AfterCapture(const RunInfo&, const absl::Status&) override {}
  absl::Status BeforeReplay(Stream&, const RunInfo&) override {
    return refuse ? absl::UnavailableError("not now") : absl::OkStatus();
  }
  void AfterReplay(Stream&, const RunInfo&, const absl::Status&) override {}
};

template <class BackendT>
class BufferTest : public DeviceTest<BackendT> {
 protected:
  void TearDown() override {
    if (stream() != nullptr) stream()->Synchronize().IgnoreError();
    runner_.reset();
    manager_.reset();
    memory_.clear();
    DeviceTest<BackendT>::TearDown();
  }

  Device& device() { return *this->device_; }
  Stream* stream() { return this->stream_.get(); }
  BufferManager& manager() { return *manager_; }

  void MakeManager(ManagerOptions options = {}) {
    ASSERT_OK_AND_ASSIGN(manager_, BufferManager::Create(device(), options));
  }

  template <class T = int32_t>
  Buffer<T> Register(const BufferSpec& spec, const std::vector<T>& original) {
    absl::StatusOr<Buffer<T>> buffer = manager_->Register<T>(spec, original);
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    return buffer.ok() ? *buffer : Buffer<T>{};
  }

  absl::Status Refill(const Buffer<int32_t>& buffer, const std::vector<int32_t>& values) {
    return manager_->Refill<int32_t>(buffer, values);
  }

  // Captures `body` for `buckets`, with the manager as the hook.
  void Capture(std::vector<Extent> buckets, GraphRunner::Body body, int warmups = 1) {
    RunnerOptions options;
    options.buckets = std::move(buckets);
    options.warmups = warmups;
    ASSERT_OK_AND_ASSIGN(runner_, GraphRunner::Create(options, std::move(body)));
    ASSERT_OK(runner_->AddHook(*manager_));
    ASSERT_OK(runner_->CaptureAll(*stream()));
    ASSERT_OK(stream()->Synchronize());
  }

  // A step without refills.
  absl::Status Step(const Extent& bucket, const Extent& extent) {
    PRISTINE_RETURN_IF_ERROR(manager_->BeginStep(bucket, extent));
    return Replay(bucket, extent);
  }
  absl::Status Replay(const Extent& bucket, const Extent& extent) {
    PRISTINE_RETURN_IF_ERROR(runner_->Replay(*stream(), bucket, extent));
    return stream()->Synchronize();
  }

  template <class T>
  std::vector<T> Read(DeviceSpan<T> span) {
    std::vector<T> values(span.size());
    EXPECT_OK(
        stream()->CopyToHost({reinterpret_cast<std::byte*>(values.data()), values.size() * sizeof(T)}, AsBytes(span)));
    EXPECT_OK(stream()->Synchronize());
    return values;
  }
  template <class T>
  std::vector<T> Read(const Buffer<T>& buffer) {
    return Read(buffer.live);
  }

  // Writes `value` at an address that need not belong to a buffer, as a stray kernel would; Host's access guard is told
  // of it, so that only the checks under test can find it.
  void Overwrite(std::byte* address, std::byte value) {
    ASSERT_OK(stream()->Fill({address, 1}, value));
    ASSERT_OK(stream()->Synchronize());
  }

  std::vector<Violation> Poll() {
    std::vector<Violation> violations(64);
    violations.resize(manager_->Poll(absl::MakeSpan(violations)));
    return violations;
  }

  // Memory of the engine's own, to be adopted.
  DeviceSpan<int32_t> EngineMemory(const std::vector<int32_t>& values) {
    absl::StatusOr<DeviceBuffer> buffer = device().Allocate(values.size() * sizeof(int32_t), "engine");
    EXPECT_OK(buffer);
    if (!buffer.ok()) return {};
    memory_.push_back(*std::move(buffer));
    const DeviceSpan<int32_t> span = memory_.back().template As<int32_t>();
    EXPECT_OK(stream()->CopyFromHost(
        AsWritableBytes(span), {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(int32_t)}));
    EXPECT_OK(stream()->Synchronize());
    return span;
  }

  std::vector<DeviceBuffer> memory_;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<GraphRunner> runner_;
};

inline std::string Describe(const std::vector<Violation>& violations) {
  std::string text;
  for (const Violation& violation : violations) text += violation.ToString() + "\n";
  return text;
}

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_BUFFERS_BUFFER_FIXTURE_H_
