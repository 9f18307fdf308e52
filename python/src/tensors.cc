#include "python/src/tensors.h"

#include <tvm/ffi/dtype.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::python {
namespace {

std::string NameOf(DLDataType dtype) { return tvm::ffi::DLDataTypeToString(dtype); }

std::string NameOf(DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
      return "host memory";
    case kDLCUDA:
      return absl::StrCat("cuda:", device.device_id);
    case kDLCUDAHost:
      return "pinned host memory";
    default:
      return absl::StrCat("DLPack device ", static_cast<int>(device.device_type), ":", device.device_id);
  }
}

absl::Status Invalid(const std::string& what, const std::string& why) {
  return absl::InvalidArgumentError(absl::StrCat(what, ": ", why));
}

absl::StatusOr<TensorView> Contiguous(const std::string& what, const tvm::ffi::Tensor& tensor) {
  const DLTensor& dl = *tensor.GetDLTensorPtr();
  if (!tensor.IsContiguous()) {
    return Invalid(what, absl::StrCat("the tensor has shape [", absl::StrJoin(absl::MakeSpan(dl.shape, dl.ndim), ", "),
                                      "] and strides [", absl::StrJoin(absl::MakeSpan(dl.strides, dl.ndim), ", "),
                                      "]; it must be contiguous"));
  }
  const int bits = dl.dtype.bits;
  if (dl.dtype.lanes != 1 || (bits != 8 && bits != 16 && bits != 32 && bits != 64 && bits != 128)) {
    return Invalid(
        what, absl::StrCat("the tensor's dtype is ", NameOf(dl.dtype), "; elements must have 1, 2, 4, 8 or 16 bytes"));
  }
  return TensorView{static_cast<std::byte*>(dl.data) + dl.byte_offset, static_cast<size_t>(tensor.numel()), dl.dtype};
}

}  // namespace

absl::StatusOr<TensorView> ViewOf(const std::string& what, const tvm::ffi::Tensor& tensor, DLDevice device) {
  const DLDevice found = tensor.GetDLTensorPtr()->device;
  if (found.device_type != device.device_type || found.device_id != device.device_id) {
    return Invalid(what,
                   absl::StrCat("the tensor is in ", NameOf(found), "; the manager's device is ", NameOf(device)));
  }
  PRISTINE_ASSIGN_OR_RETURN(TensorView view, Contiguous(what, tensor));
  if (view.size == 0) return Invalid(what, "the tensor has no elements; at least 1");
  return view;
}

absl::StatusOr<TensorView> HostViewOf(const std::string& what, const tvm::ffi::Tensor& tensor, DLDataType dtype) {
  const DLDevice found = tensor.GetDLTensorPtr()->device;
  if (found.device_type != kDLCPU && found.device_type != kDLCUDAHost) {
    return Invalid(what, absl::StrCat("the tensor is in ", NameOf(found), "; values are taken from host memory"));
  }
  PRISTINE_ASSIGN_OR_RETURN(TensorView view, Contiguous(what, tensor));
  if (view.dtype.code != dtype.code || view.dtype.bits != dtype.bits) {
    return Invalid(what,
                   absl::StrCat("the tensor's dtype is ", NameOf(view.dtype), "; the buffer holds ", NameOf(dtype)));
  }
  return view;
}

}  // namespace pristine::python
