#include "pristine/attention/device_caps.h"

#include "absl/strings/str_cat.h"

namespace pristine::attention {

DeviceCaps CapsOf(const Device& device) {
  return {.backend = device.backend(),
          .sm_major = device.compute_capability() / 10,
          .sm_minor = device.compute_capability() % 10,
          .multiprocessors = device.multiprocessors(),
          .cuda_runtime_version = device.cuda_runtime_version(),
          .cuda_driver_version = device.cuda_driver_version(),
          .shared_bytes_per_block = device.shared_bytes_per_block()};
}

std::string Describe(const DeviceCaps& caps) {
  if (caps.backend == Backend::kHost) return "the Host backend";
  const auto version = [](int v) { return absl::StrCat(v / 1000, ".", v % 1000 / 10); };
  return absl::StrCat("compute capability ", caps.sm_major, ".", caps.sm_minor, " with CUDA ",
                      version(caps.cuda_runtime_version), " (driver ", version(caps.cuda_driver_version), ")");
}

}  // namespace pristine::attention
