// The driver functions that the runtime API has no counterpart for. Found through the runtime when a device is created,
// so that nothing links libcuda and a binary starts on a machine without a driver.
#ifndef PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_DRIVER_H_
#define PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_DRIVER_H_

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace pristine {

struct CudaDriver {
  // UNAVAILABLE, naming the function: the driver is older than what we were built for.
  static absl::StatusOr<CudaDriver> Load();

  absl::Status ToStatus(CUresult result, const char* what) const;

  PFN_cuGetErrorName_v6000 get_error_name = nullptr;
  PFN_cuGetErrorString_v6000 get_error_string = nullptr;
  PFN_cuDeviceGet_v2000 device_get = nullptr;
  PFN_cuDeviceGetAttribute_v2000 device_get_attribute = nullptr;
  PFN_cuDevicePrimaryCtxRetain_v7000 primary_context_retain = nullptr;
  PFN_cuCtxGetCurrent_v4000 context_get_current = nullptr;
  PFN_cuCtxSetCurrent_v4000 context_set_current = nullptr;
  PFN_cuMemGetAllocationGranularity_v10020 memory_granularity = nullptr;
  PFN_cuMemCreate_v10020 memory_create = nullptr;
  PFN_cuMemRelease_v10020 memory_release = nullptr;
  PFN_cuMemAddressReserve_v10020 address_reserve = nullptr;
  PFN_cuMemAddressFree_v10020 address_free = nullptr;
  PFN_cuMemMap_v10020 memory_map = nullptr;
  PFN_cuMemUnmap_v10020 memory_unmap = nullptr;
  PFN_cuMemSetAccess_v10020 memory_set_access = nullptr;
  PFN_cuGraphKernelNodeGetParams_v12000 kernel_node_get_params = nullptr;
  PFN_cuFuncGetName_v12030 function_get_name = nullptr;
  PFN_cuKernelGetName_v12030 kernel_get_name = nullptr;
  PFN_cuGraphExecKernelNodeSetParams_v12000 exec_kernel_node_set_params = nullptr;
};

// Makes `context` current for a scope and puts the caller's back. Contexts, not device ordinals: cudaSetDevice would
// create a context on the caller's device if it had none yet.
class CurrentContext {
 public:
  CurrentContext(const CudaDriver& driver, CUcontext context) : driver_(driver), context_(context) {
    driver_.context_get_current(&previous_);
    if (previous_ != context_) driver_.context_set_current(context_);
  }
  ~CurrentContext() {
    if (previous_ != context_) driver_.context_set_current(previous_);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const CudaDriver& driver_;
  const CUcontext context_;
  CUcontext previous_ = nullptr;
};

// Lets this thread call what its ThreadLocal capture of one stream forbids (free memory, query an event, use another
// stream) without killing that capture. Only for calls that have nothing to do with what is being captured.
class RelaxedCaptureMode {
 public:
  explicit RelaxedCaptureMode(bool wanted = true) : wanted_(wanted) {
    if (wanted_) cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  ~RelaxedCaptureMode() {
    if (wanted_) cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  RelaxedCaptureMode(const RelaxedCaptureMode&) = delete;
  RelaxedCaptureMode& operator=(const RelaxedCaptureMode&) = delete;

 private:
  const bool wanted_;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_DRIVER_H_
