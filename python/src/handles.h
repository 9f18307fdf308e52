// What Python holds: a device, and a manager with all that must live as long as it does.
#ifndef PRISTINE_PYTHON_HANDLES_H_
#define PRISTINE_PYTHON_HANDLES_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/object.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::python {

class DeviceObj : public tvm::ffi::Object {
 public:
  DeviceObj(std::unique_ptr<Device> its_device, DLDevice its_place) : device(std::move(its_device)), place(its_place) {}

  const std::unique_ptr<Device> device;
  const DLDevice place;  // where adopted tensors must be

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("pristine.Device", DeviceObj, tvm::ffi::Object);
};

class DeviceRef : public tvm::ffi::ObjectRef {
 public:
  explicit DeviceRef(tvm::ffi::ObjectPtr<DeviceObj> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(DeviceRef, tvm::ffi::ObjectRef, DeviceObj);
};

// Destroyed from the bottom up: streams, then the manager, which waits for queued work, then the tensors, whose
// deleters give the memory back, then the device.
class ManagerObj : public tvm::ffi::Object {
 public:
  explicit ManagerObj(DeviceRef device) : device_(std::move(device)) {}  // for Create
  static absl::StatusOr<tvm::ffi::ObjectPtr<ManagerObj>> Create(DeviceRef device, const ManagerOptions& options);

  // Held for the length of a call, as BufferManager does for its own: the streams and tensors here need it too.
  class Call {
   public:
    explicit Call(ManagerObj& manager);  // throws FAILED_PRECONDITION: another thread is inside one
    ~Call() { manager_.busy_.store(false, std::memory_order_release); }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    ManagerObj& manager_;
  };

  BufferManager& manager() { return *manager_; }
  // The engine's stream `native`, adopted when first seen and kept. 0: CUDA's legacy default stream; on Host the
  // manager's own stream, the only one there is.
  absl::StatusOr<Stream*> StreamOf(int64_t native);
  // Returns the buffer's id. `original` empty: the present contents, after what is queued on `native`.
  absl::StatusOr<int> Adopt(const BufferSpec& spec, const tvm::ffi::Tensor& tensor,
                            const std::optional<tvm::ffi::Tensor>& original, int64_t native);
  absl::Status Refill(int id, const tvm::ffi::Tensor& values);

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("pristine.BufferManager", ManagerObj, tvm::ffi::Object);

 private:
  friend class Call;
  struct Adopted {
    tvm::ffi::Tensor tensor;
    std::string name;
  };
  struct EngineStream {
    int64_t native;
    std::unique_ptr<Stream> stream;
  };

  const DeviceRef device_;
  std::vector<Adopted> adopted_;  // by id
  std::unique_ptr<BufferManager> manager_;
  std::vector<EngineStream> streams_;
  std::atomic<bool> busy_{false};
};

class ManagerRef : public tvm::ffi::ObjectRef {
 public:
  explicit ManagerRef(tvm::ffi::ObjectPtr<ManagerObj> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(ManagerRef, tvm::ffi::ObjectRef, ManagerObj);
};

}  // namespace pristine::python

#endif  // PRISTINE_PYTHON_HANDLES_H_
