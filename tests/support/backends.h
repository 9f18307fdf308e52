// The backends that every suite is instantiated for, and the fixture that gives each test a device and a stream.
#ifndef PRISTINE_TESTS_SUPPORT_BACKENDS_H_
#define PRISTINE_TESTS_SUPPORT_BACKENDS_H_

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::testing {

struct HostEager {
  static constexpr const char* kName = "HostEager";
  static absl::StatusOr<std::unique_ptr<Device>> Create() {
    return CreateHostDevice({.run = HostOptions::Run::kEager, .enforce_accesses = true});
  }
};
struct HostDeferred {
  static constexpr const char* kName = "HostDeferred";
  static absl::StatusOr<std::unique_ptr<Device>> Create() {
    return CreateHostDevice({.run = HostOptions::Run::kDeferred, .enforce_accesses = true});
  }
};
struct Cuda {
  static constexpr const char* kName = "Cuda";
  static absl::StatusOr<std::unique_ptr<Device>> Create() { return CreateCudaDevice(0); }
};

#ifdef PRISTINE_HAS_CUDA
using AllBackends = ::testing::Types<HostEager, HostDeferred, Cuda>;
#else
using AllBackends = ::testing::Types<HostEager, HostDeferred>;
#endif

// Names typed tests Suite/HostEager.Case instead of Suite/0.Case.
struct BackendNames {
  template <class BackendT>
  static std::string GetName(int) {
    return BackendT::kName;
  }
};

// A missing GPU skips, and fails when PRISTINE_REQUIRE_GPU=1.
inline bool GpuRequired() {
  const char* value = std::getenv("PRISTINE_REQUIRE_GPU");
  return value != nullptr && std::string(value) == "1";
}

template <class BackendT>
class DeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Device>> device = BackendT::Create();
    if (absl::IsUnavailable(device.status()) && !GpuRequired()) {
      GTEST_SKIP() << device.status();
    }
    ASSERT_TRUE(device.ok()) << device.status();
    device_ = *std::move(device);
    absl::StatusOr<std::unique_ptr<Stream>> stream = device_->CreateStream();
    ASSERT_TRUE(stream.ok()) << stream.status();
    stream_ = *std::move(stream);
  }
  // The invariants after every test: nothing leaked, nothing left capturing.
  void TearDown() override {
    stream_.reset();
    if (device_ != nullptr) {
      EXPECT_EQ(device_->live_allocations(), 0u);
      EXPECT_EQ(device_->capturing_streams(), 0);
    }
  }
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_SUPPORT_BACKENDS_H_
