#include "pristine/attention/device_caps.h"

#include "tests/support/backends.h"

namespace pristine::testing {
namespace {

using attention::CapsOf;
using attention::Describe;
using attention::DeviceCaps;

template <class BackendT>
class DeviceCapsTest : public DeviceTest<BackendT> {};
TYPED_TEST_SUITE(DeviceCapsTest, AllBackends, BackendNames);

TYPED_TEST(DeviceCapsTest, AreThoseOfTheDevice) {
  const DeviceCaps caps = CapsOf(*this->device_);
  EXPECT_EQ(caps.backend, this->device_->backend());
  EXPECT_EQ(10 * caps.sm_major + caps.sm_minor, this->device_->compute_capability());
  EXPECT_EQ(caps.multiprocessors, this->device_->multiprocessors());
  if (caps.backend == Backend::kHost) {
    EXPECT_EQ(caps, (DeviceCaps{.multiprocessors = 8}));
    return;
  }
  EXPECT_GE(caps.sm_major, 5);
  EXPECT_GE(caps.cuda_runtime_version, 12000);
  EXPECT_GE(caps.cuda_driver_version, 12000);
  EXPECT_GE(caps.shared_bytes_per_block, 48u << 10);
}

TEST(DeviceCapsText, SaysWhatTheKernelChoiceDependsOn) {
  EXPECT_EQ(Describe({}), "the Host backend");
  EXPECT_EQ(Describe({.backend = Backend::kCuda,
                      .sm_major = 10,
                      .sm_minor = 3,
                      .cuda_runtime_version = 12090,
                      .cuda_driver_version = 13020}),
            "compute capability 10.3 with CUDA 12.9 (driver 13.2)");
}

}  // namespace
}  // namespace pristine::testing
