// DeviceCaps: what the choice of a kernel depends on, as a value. Policies are functions of it, so that each of their
// answers is tested without the GPU it is for.
#ifndef PRISTINE_ATTENTION_DEVICE_CAPS_H_
#define PRISTINE_ATTENTION_DEVICE_CAPS_H_

#include <cstddef>
#include <string>

#include "pristine/graph_runtime/device.h"

namespace pristine::attention {

struct DeviceCaps {
  Backend backend = Backend::kHost;
  int sm_major = 0, sm_minor = 0;     // compute capability: 9 and 0 for an H200. Host: 0, as everything below but one
  int multiprocessors = 0;            // Host: 8
  int cuda_runtime_version = 0;       // as CUDA counts: 13020 for 13.2. What this library is linked with
  int cuda_driver_version = 0;        // the newest runtime that the driver serves
  size_t shared_bytes_per_block = 0;  // after opting in: 232,448 for 9.0
  friend bool operator==(const DeviceCaps&, const DeviceCaps&) = default;
};

// Reads what `device` found out when it was created; does not call the driver.
DeviceCaps CapsOf(const Device& device);

// "compute capability 9.0 with CUDA 13.0 (driver 13.2)", "the Host backend": for messages.
std::string Describe(const DeviceCaps& caps);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_DEVICE_CAPS_H_
