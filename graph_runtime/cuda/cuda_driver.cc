#include "graph_runtime/cuda/cuda_driver.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "graph_runtime/cuda/cuda_status.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {
namespace {

// All that we call exists in CUDA 12.3, with the types that CudaDriver declares.
constexpr unsigned int kVersion = 12030;

template <class Function>
absl::Status Find(const char* name, Function* function) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &address, kVersion, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || address == nullptr) {
    int have = 0;
    cudaDriverGetVersion(&have);
    return absl::UnavailableError(absl::StrCat("the CUDA driver (", have / 1000, ".", have % 1000 / 10, ") has no ",
                                               name, " of CUDA ", kVersion / 1000, ".", kVersion % 1000 / 10,
                                               error == cudaSuccess ? "" : ": ",
                                               CudaStatus(error, "cudaGetDriverEntryPoint").message()));
  }
  *function = reinterpret_cast<Function>(address);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CudaDriver> CudaDriver::Load() {
  CudaDriver driver;
  PRISTINE_RETURN_IF_ERROR(Find("cuGetErrorName", &driver.get_error_name));
  PRISTINE_RETURN_IF_ERROR(Find("cuGetErrorString", &driver.get_error_string));
  PRISTINE_RETURN_IF_ERROR(Find("cuDeviceGet", &driver.device_get));
  PRISTINE_RETURN_IF_ERROR(Find("cuDeviceGetAttribute", &driver.device_get_attribute));
  PRISTINE_RETURN_IF_ERROR(Find("cuDevicePrimaryCtxRetain", &driver.primary_context_retain));
  PRISTINE_RETURN_IF_ERROR(Find("cuCtxGetCurrent", &driver.context_get_current));
  PRISTINE_RETURN_IF_ERROR(Find("cuCtxSetCurrent", &driver.context_set_current));
  PRISTINE_RETURN_IF_ERROR(Find("cuMemGetAllocationGranularity", &driver.memory_granularity));
  PRISTINE_RETURN_IF_ERROR(Find("cuMemCreate", &driver.memory_create));
  PRISTINE_RETURN_IF_ERROR(Find("cuMemRelease", &driver.memory_release));
  PRISTINE_RETURN_IF_ERROR(Find("cuMemAddressReserve", &driver.address_reserve));
  PRISTINE_RETURN_IF_ERROR(Find("cuMemAddressFree", &driver.address_free));
  PRISTINE_RETURN_IF_ERROR(Find("cuMemMap", &driver.memory_map));
  PRISTINE_RETURN_IF_ERROR(Find("cuMemUnmap", &driver.memory_unmap));
  PRISTINE_RETURN_IF_ERROR(Find("cuMemSetAccess", &driver.memory_set_access));
  PRISTINE_RETURN_IF_ERROR(Find("cuGraphKernelNodeGetParams", &driver.kernel_node_get_params));
  PRISTINE_RETURN_IF_ERROR(Find("cuFuncGetName", &driver.function_get_name));
  PRISTINE_RETURN_IF_ERROR(Find("cuKernelGetName", &driver.kernel_get_name));
  PRISTINE_RETURN_IF_ERROR(Find("cuGraphExecKernelNodeSetParams", &driver.exec_kernel_node_set_params));
  return driver;
}

absl::Status CudaDriver::ToStatus(CUresult result, const char* what) const {
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  const char* name = "unknown error";
  const char* text = "";
  get_error_name(result, &name);
  get_error_string(result, &text);
  const std::string message = absl::StrCat(what, ": ", name, ": ", text);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) return absl::ResourceExhaustedError(message);
  return absl::InternalError(message);
}

}  // namespace pristine
