// How a backend says that its device is lost. Device makes the final status of it.
#ifndef PRISTINE_GRAPH_RUNTIME_DEVICE_LOST_H_
#define PRISTINE_GRAPH_RUNTIME_DEVICE_LOST_H_

#include <string>

#include "absl/status/status.h"

namespace pristine {

// ABORTED, and IsDeviceLost() of it is true.
absl::Status DeviceLostError(const std::string& message, const std::string& last_violation = "");

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_DEVICE_LOST_H_
