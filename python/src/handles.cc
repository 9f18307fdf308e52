#include "python/src/handles.h"

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"
#include "python/src/status.h"
#include "python/src/tensors.h"

namespace pristine::python {

absl::StatusOr<tvm::ffi::ObjectPtr<ManagerObj>> ManagerObj::Create(DeviceRef device, const ManagerOptions& options) {
  tvm::ffi::ObjectPtr<ManagerObj> object = tvm::ffi::make_object<ManagerObj>(device);
  PRISTINE_ASSIGN_OR_RETURN(object->manager_, BufferManager::Create(*device->device, options));
  if (device->device->backend() == Backend::kHost) {
    PRISTINE_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device->device->CreateStream());
    object->streams_.push_back({0, std::move(stream)});
  }
  return object;
}

ManagerObj::Call::Call(ManagerObj& manager) : manager_(manager) {
  if (!manager_.busy_.exchange(true, std::memory_order_acquire)) return;
  ThrowIfError(absl::FailedPreconditionError(
      "another thread is inside a call of this BufferManager; a manager is used by one thread at a time"));
}

absl::StatusOr<Stream*> ManagerObj::StreamOf(int64_t native) {
  for (const EngineStream& known : streams_) {
    if (known.native == native) return known.stream.get();
  }
  Device& device = *device_->device;
  if (device.backend() == Backend::kHost) {
    return absl::InvalidArgumentError(
        absl::StrCat("stream ", native, " on ", device.name(), ", where a manager has one stream of its own"));
  }
  // CUDA's default stream has the handle 0, which is null; 1 names the same stream (cudaStreamLegacy).
  const auto handle = static_cast<uintptr_t>(native == 0 ? 1 : native);
  PRISTINE_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device.AdoptStream(reinterpret_cast<void*>(handle)));
  streams_.push_back({native, std::move(stream)});
  return streams_.back().stream.get();
}

absl::StatusOr<int> ManagerObj::Adopt(const BufferSpec& spec, const tvm::ffi::Tensor& tensor,
                                      const std::optional<tvm::ffi::Tensor>& original, int64_t native) {
  const std::string what = absl::StrCat("adopt of ", spec.name);
  PRISTINE_ASSIGN_OR_RETURN(const TensorView live, ViewOf(what, tensor, device_->place));
  TensorView values;
  if (original.has_value()) {
    PRISTINE_ASSIGN_OR_RETURN(values, HostViewOf(absl::StrCat(what, ", original"), *original, live.dtype));
    if (values.size != live.size) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": the original has ", values.size, " elements, the tensor ", live.size));
    }
  } else {
    PRISTINE_ASSIGN_OR_RETURN(Stream * stream, StreamOf(native));
    PRISTINE_RETURN_IF_ERROR(stream->Synchronize());
  }
  PRISTINE_ASSIGN_OR_RETURN(const int id, WithElementOf(live.dtype, [&]<class T>() -> absl::StatusOr<int> {
                              const absl::StatusOr<Buffer<T>> buffer =
                                  original.has_value() ? manager_->Adopt<T>(spec, live.device<T>(), values.host<T>())
                                                       : manager_->Adopt<T>(spec, live.device<T>());
                              if (!buffer.ok()) return buffer.status();
                              return buffer->id;
                            }));
  adopted_.push_back({tensor, spec.name});
  return id;
}

absl::Status ManagerObj::Refill(int id, const tvm::ffi::Tensor& values) {
  if (id < 0 || id >= static_cast<int>(adopted_.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("there is no buffer ", id, "; ids are in [0, ", adopted_.size(), ")"));
  }
  const Adopted& adopted = adopted_[static_cast<size_t>(id)];
  PRISTINE_ASSIGN_OR_RETURN(const TensorView view,
                            HostViewOf(absl::StrCat("refill of ", adopted.name), values, adopted.tensor.dtype()));
  return WithElementOf(view.dtype, [&]<class T>() { return manager_->Refill<T>(Buffer<T>{id, {}}, view.host<T>()); });
}

}  // namespace pristine::python
