// The one option of the small examples: --device=host (the default) or --device=cuda.
#ifndef PRISTINE_EXAMPLES_DEVICE_OPTION_H_
#define PRISTINE_EXAMPLES_DEVICE_OPTION_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/device.h"

namespace pristine::examples {

inline absl::StatusOr<std::unique_ptr<Device>> DeviceFromArgs(int argc, char** argv) {
  const std::string option = argc > 1 ? argv[1] : "--device=host";
  if (argc > 2 || (option != "--device=host" && option != "--device=cuda")) {
    return absl::InvalidArgumentError(
        absl::StrCat("unknown argument ", argv[argc - 1], "; accepted: --device=host|cuda"));
  }
  return option == "--device=cuda" ? CreateCudaDevice() : CreateHostDevice();
}

}  // namespace pristine::examples

#endif  // PRISTINE_EXAMPLES_DEVICE_OPTION_H_
