#include "pristine/graph_runtime/status.h"

#include "absl/strings/cord.h"
#include "absl/types/optional.h"
#include "graph_runtime/device_lost.h"

namespace pristine {
namespace {

// Its contents are the last violation.
constexpr char kDeviceLostUrl[] = "pristine/device_lost";

}  // namespace

absl::Status DeviceLostError(const std::string& message, const std::string& last_violation) {
  absl::Status status = absl::AbortedError(message);
  status.SetPayload(kDeviceLostUrl, absl::Cord(last_violation));
  return status;
}

bool IsDeviceLost(const absl::Status& status) { return status.GetPayload(kDeviceLostUrl).has_value(); }

std::string LastViolation(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kDeviceLostUrl);
  return payload.has_value() ? std::string(*payload) : std::string();
}

}  // namespace pristine
