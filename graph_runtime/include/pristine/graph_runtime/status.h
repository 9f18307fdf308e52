// Two macros for code that returns absl::Status, and the rule by which Pristine chooses a code.
//
//   INVALID_ARGUMENT     an argument is wrong whatever the state (size 0, wrong dtype, unsorted buckets)
//   OUT_OF_RANGE         a size is larger than anything that was set up
//   NOT_FOUND            the named thing does not exist (a bucket that was not captured)
//   ALREADY_EXISTS       the name is taken
//   FAILED_PRECONDITION  right call, wrong state (capturing, stale plan, missing refill); retry after mending the state
//   RESOURCE_EXHAUSTED   no memory, or every staging slot is in flight; retry later
//   DATA_LOSS            something wrote where it must not; the message names it
//   UNIMPLEMENTED        no kernel variant for this configuration, or built without CUDA; the message lists what exists
//   UNAVAILABLE          there is no such device
//   INTERNAL             the driver or a kernel failed; final for that stream
//   ABORTED              the device is lost (IsDeviceLost); final for the device, and all that was made from it
//
// Each message has the name, the value found, and what would have been accepted.
#ifndef PRISTINE_GRAPH_RUNTIME_STATUS_H_
#define PRISTINE_GRAPH_RUNTIME_STATUS_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define PRISTINE_STATUS_CONCAT_IMPL(a, b) a##b
#define PRISTINE_STATUS_CONCAT(a, b) PRISTINE_STATUS_CONCAT_IMPL(a, b)

namespace pristine {

// Whether the device is lost: a kernel faulted or trapped, or the hardware failed. On CUDA the context is dead: every
// call of the process that needs this GPU fails until a new process starts. Each later call on the device, and on what
// was made from it, returns one and the same status, with the call that saw it first, the cause, and the last violation
// that was recorded. What needs no device goes on: BufferManager::Poll, accessors, destructors.
bool IsDeviceLost(const absl::Status& status);
// The last violation recorded before the device was lost, one line for each manager that had one; "" if there was none.
std::string LastViolation(const absl::Status& status);

}  // namespace pristine

// Returns from the calling function when `expression` is not OK.
#define PRISTINE_RETURN_IF_ERROR(expression)                               \
  if (absl::Status pristine_status = (expression); pristine_status.ok()) { \
  } else                                                                   \
    return pristine_status

// PRISTINE_ASSIGN_OR_RETURN(auto stream, device.CreateStream());
#define PRISTINE_ASSIGN_OR_RETURN(declaration, expression) \
  PRISTINE_ASSIGN_OR_RETURN_IMPL(PRISTINE_STATUS_CONCAT(pristine_or_, __LINE__), declaration, expression)
#define PRISTINE_ASSIGN_OR_RETURN_IMPL(result, declaration, expression) \
  auto result = (expression);                                           \
  if (!result.ok()) return result.status();                             \
  declaration = *std::move(result)

#endif  // PRISTINE_GRAPH_RUNTIME_STATUS_H_
