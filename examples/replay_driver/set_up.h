// What sessions of every kind start from: the device that a run asks for, and the shape of its model.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_SET_UP_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_SET_UP_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "examples/replay_driver/driver.h"
#include "examples/replay_driver/model_config.h"
#include "examples/replay_driver/options.h"
#include "pristine/graph_runtime/device.h"

namespace pristine::replay_driver {

ModelConfig ModelConfigOf(const Options& options);

// By --device; says on environment.err where --device=auto ended up. Codes of CreateCudaDevice and CreateHostDevice.
absl::StatusOr<std::unique_ptr<Device>> OpenDevice(const Options& options, const Environment& environment);

// RESOURCE_EXHAUSTED: `device` is Host, and this machine has less than `needed` bytes left. Host allocations are
// granted long before it runs out: better to refuse what it cannot have.
absl::Status CheckHostMemory(const Device& device, int64_t needed);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_SET_UP_H_
