// What of a DLPack tensor Pristine can take: contiguous, whole bytes per element, in the right place.
#ifndef PRISTINE_PYTHON_TENSORS_H_
#define PRISTINE_PYTHON_TENSORS_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/tensor.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "pristine/graph_runtime/memory.h"

namespace pristine::python {

// The elements of a tensor, which keeps the memory alive.
struct TensorView {
  std::byte* data = nullptr;
  size_t size = 0;  // elements
  DLDataType dtype{};

  size_t element_bytes() const { return dtype.bits / 8; }
  template <class T>
  DeviceSpan<T> device() const {
    return {reinterpret_cast<T*>(data), size};
  }
  template <class T>
  absl::Span<const T> host() const {
    return {reinterpret_cast<const T*>(data), size};
  }
};

// `what` begins the messages. INVALID_ARGUMENT: not in the memory of `device`, not contiguous, no elements, elements
// that are not 1, 2, 4, 8 or 16 bytes.
absl::StatusOr<TensorView> ViewOf(const std::string& what, const tvm::ffi::Tensor& tensor, DLDevice device);
// The same for host memory, pinned or not, whose elements are to be of `dtype`. May be empty.
absl::StatusOr<TensorView> HostViewOf(const std::string& what, const tvm::ffi::Tensor& tensor, DLDataType dtype);

inline bool IsInt32(DLDataType dtype) { return dtype.code == kDLInt && dtype.bits == 32; }

// Calls function.operator()<T>() for a T of as many bytes as `dtype` has: all that a manager asks of elements, but that
// integers of 32 bits are int32_t.
template <class Function>
auto WithElementOf(DLDataType dtype, const Function& function) {
  struct alignas(16) Wide {
    std::byte bytes[16];
  };
  if (IsInt32(dtype)) return function.template operator()<int32_t>();
  switch (dtype.bits) {
    case 8:
      return function.template operator()<std::byte>();
    case 16:
      return function.template operator()<uint16_t>();
    case 32:
      return function.template operator()<uint32_t>();
    case 64:
      return function.template operator()<uint64_t>();
    default:
      return function.template operator()<Wide>();
  }
}

}  // namespace pristine::python

#endif  // PRISTINE_PYTHON_TENSORS_H_
