// Where an absl::Status becomes an exception: tvm-ffi's C++ interface throws its Error and catches it at the C boundary
// of the same library, so none crosses it. The kind is the code's name, which errors.py maps to a Python class.
#ifndef PRISTINE_PYTHON_STATUS_H_
#define PRISTINE_PYTHON_STATUS_H_

#include <tvm/ffi/error.h>

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace pristine::python {

inline void ThrowIfError(const absl::Status& status) {
  if (status.ok()) return;
  throw tvm::ffi::Error("pristine." + absl::StatusCodeToString(status.code()),
                        std::string(status.message().data(), status.message().size()), "");
}

template <class T>
T Take(absl::StatusOr<T> result) {
  ThrowIfError(result.status());
  return *std::move(result);
}

}  // namespace pristine::python

#endif  // PRISTINE_PYTHON_STATUS_H_
