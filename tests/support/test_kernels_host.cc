#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "tests/support/test_kernels.h"

namespace pristine::testing {

int AddOneHost(const AddOneParams& p) {
  for (int64_t i = 0; i < p.count; ++i) ++p.values[i];
  return 0;
}

int SetValueHost(const SetValueParams& p) {
  p.values[p.index] = p.value;
  return 0;
}

int CopyIntsHost(const CopyIntsParams& p) {
  std::memcpy(p.to, p.from, static_cast<size_t>(p.count) * sizeof(int));
  return 0;
}

int LateCopyHost(const LateCopyParams& p) { return CopyIntsHost({p.to, p.from, p.count}); }

int SpinHost(const SpinParams& p) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (std::atomic_ref<int>(*p.flag).load() == 0) {
    if (std::chrono::steady_clock::now() > deadline) return 1;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return 0;
}

int FailHost(const FailParams&) { return 7; }

int TrapHost(const TrapParams&) { return kKernelTrap; }

int DelayHost(const DelayParams& p) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::nanoseconds(p.nanoseconds);
  while (std::chrono::steady_clock::now() < end) {
  }
  return 0;
}

}  // namespace pristine::testing
