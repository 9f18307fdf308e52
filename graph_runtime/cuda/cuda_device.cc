#include "graph_runtime/cuda/cuda_device.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "graph_runtime/cuda/cuda_graph.h"
#include "graph_runtime/cuda/cuda_status.h"
#include "graph_runtime/cuda/cuda_stream.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {
namespace {

// What kernels may count on: the widest vector access, and the granularity of the fastest copies.
constexpr size_t kAlignment = 256;

absl::Status CheckOrdinal(int ordinal) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice) count = 0;
  if (error != cudaSuccess && error != cudaErrorNoDevice) {
    return absl::UnavailableError(
        absl::StrCat("CUDA device ", ordinal, ": ", CudaStatus(error, "cudaGetDeviceCount").message()));
  }
  cudaGetLastError();
  if (ordinal >= 0 && ordinal < count) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("there is no CUDA device ", ordinal, "; this machine has ", count,
                                             count == 0   ? ""
                                             : count == 1 ? ": device 0"
                                                          : absl::StrCat(": devices 0 to ", count - 1)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> CreateCudaDevice(int ordinal, CudaOptions options) {
  return CudaDevice::Create(ordinal, options);
}

absl::StatusOr<std::unique_ptr<Device>> CudaDevice::Create(int ordinal, const CudaOptions& options) {
  PRISTINE_RETURN_IF_ERROR(CheckOrdinal(ordinal));
  PRISTINE_ASSIGN_OR_RETURN(const CudaDriver driver, CudaDriver::Load());
  CUdevice device = 0;
  PRISTINE_RETURN_IF_ERROR(driver.ToStatus(driver.device_get(&device, ordinal), "cuDeviceGet"));
  // Never released: the runtime keeps its modules in this context for as long as the process lives.
  CUcontext context = nullptr;
  if (absl::Status status =
          driver.ToStatus(driver.primary_context_retain(&context, device), "cuDevicePrimaryCtxRetain");
      !status.ok()) {
    return absl::UnavailableError(absl::StrCat("CUDA device ", ordinal, ": ", status.message()));
  }
  const CurrentContext current(driver, context);
  cudaDeviceProp properties;
  PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties"));
  int can_map_memory = 0;
  PRISTINE_RETURN_IF_ERROR(driver.ToStatus(
      driver.device_get_attribute(&can_map_memory, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device),
      "cuDeviceGetAttribute"));
  Traits traits;
  traits.name = absl::StrCat("cuda:", ordinal, " (", properties.name, ")");
  traits.multiprocessors = properties.multiProcessorCount;
  traits.capability = 10 * properties.major + properties.minor;
  traits.shared_bytes_per_block = properties.sharedMemPerBlockOptin;
  PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaRuntimeGetVersion(&traits.cuda_runtime_version), "cudaRuntimeGetVersion"));
  PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaDriverGetVersion(&traits.cuda_driver_version), "cudaDriverGetVersion"));
  traits.watch_alignment = kAlignment;
  return std::unique_ptr<Device>(
      new CudaDevice(std::move(traits), ordinal, options, driver, context, can_map_memory != 0 && options.protect));
}

CudaDevice::CudaDevice(Traits traits, int ordinal, const CudaOptions& options, const CudaDriver& driver,
                       CUcontext context, bool can_map_memory)
    : Device(Backend::kCuda, std::move(traits)),
      ordinal_(ordinal),
      memory_(options.memory),
      driver_(driver),
      context_(context),
      can_map_memory_(can_map_memory) {}

CudaDevice::~CudaDevice() {
  const CurrentContext current(driver_, context_);
  const RelaxedCaptureMode relaxed;
  for (const Retired& retired : retired_) {
    cudaEventSynchronize(retired.done);
    cudaGraphExecDestroy(retired.exec);
    cudaEventDestroy(retired.done);
  }
  cudaGetLastError();
}

void CudaDevice::Retire(cudaGraphExec_t exec, cudaEvent_t done) {
  std::lock_guard lock(mutex_);
  retired_.push_back({exec, done});
}

void CudaDevice::SweepRetired() {
  std::lock_guard lock(mutex_);
  if (retired_.empty()) return;
  const RelaxedCaptureMode relaxed;
  std::erase_if(retired_, [](const Retired& retired) {
    if (cudaEventQuery(retired.done) == cudaErrorNotReady) return false;
    cudaGraphExecDestroy(retired.exec);
    cudaEventDestroy(retired.done);
    return true;
  });
  cudaGetLastError();
}

void CudaDevice::AddAdopted(cudaStream_t stream) {
  std::lock_guard lock(mutex_);
  adopted_.push_back(stream);
}

void CudaDevice::RemoveAdopted(cudaStream_t stream) {
  std::lock_guard lock(mutex_);
  adopted_.erase(std::find(adopted_.begin(), adopted_.end(), stream));  // once per adoption
}

absl::Status CudaDevice::CheckNoAdoptedCapture(const char* what) {
  std::lock_guard lock(mutex_);
  for (cudaStream_t stream : adopted_) {
    if (CapturePosition::Of(stream).capturing()) {
      return absl::FailedPreconditionError(absl::StrCat(what, ": a stream adopted by ", name(), " is capturing"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<void*> CudaDevice::DoAllocate(size_t bytes, const char* name) {
  const CurrentContext current(driver_, context_);
  PRISTINE_RETURN_IF_ERROR(CheckNoAdoptedCapture(name));
  if (memory_ != nullptr) return memory_->Allocate(bytes, kAlignment);
  void* address = nullptr;
  if (const cudaError_t error = cudaMalloc(&address, bytes); error != cudaSuccess) {
    return CudaStatus(error, absl::StrCat(name, ": cudaMalloc of ", bytes, " bytes").c_str());
  }
  return address;
}

void CudaDevice::DoFree(void* address, size_t bytes) noexcept {
  const CurrentContext current(driver_, context_);
  const RelaxedCaptureMode relaxed;
  if (memory_ != nullptr) {
    memory_->Deallocate(address, bytes);
  } else {
    cudaFree(address);
    cudaGetLastError();
  }
}

absl::Status CudaDevice::DoAllocatePinned(size_t bytes, void** host, void** device_address) {
  const CurrentContext current(driver_, context_);
  PRISTINE_RETURN_IF_ERROR(CheckNoAdoptedCapture("pinned memory"));
  void* memory = nullptr;
  if (const cudaError_t error = cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
      error != cudaSuccess) {
    return CudaStatus(error, absl::StrCat("cudaHostAlloc of ", bytes, " bytes").c_str());
  }
  if (absl::Status status = CudaStatus(cudaHostGetDevicePointer(device_address, memory, 0), "cudaHostGetDevicePointer");
      !status.ok()) {
    cudaFreeHost(memory);
    return status;
  }
  std::memset(memory, 0, bytes);
  *host = memory;
  return absl::OkStatus();
}

void CudaDevice::DoFreePinned(void* host, size_t) noexcept {
  const CurrentContext current(driver_, context_);
  const RelaxedCaptureMode relaxed;
  cudaFreeHost(host);
  cudaGetLastError();
}

absl::StatusOr<std::unique_ptr<Stream>> CudaDevice::DoCreateStream() {
  const CurrentContext current(driver_, context_);
  const RelaxedCaptureMode relaxed;
  cudaStream_t stream = nullptr;
  // Non-blocking: work of the legacy default stream, ours or a library's, must not order our streams.
  PRISTINE_RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"));
  return std::make_unique<CudaStream>(*this, stream, /*owned=*/true);
}

absl::StatusOr<std::unique_ptr<Stream>> CudaDevice::DoAdoptStream(void* native) {
  const CurrentContext current(driver_, context_);
  const auto stream = static_cast<cudaStream_t>(native);
  int device = ordinal_;
  if (!CapturePosition::Of(stream).capturing()) {  // while capturing, ask nothing that could end the capture
    PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaStreamGetDevice(stream, &device), "cudaStreamGetDevice"));
  }
  if (device != ordinal_) {
    return absl::InvalidArgumentError(
        absl::StrCat("AdoptStream: the stream belongs to CUDA device ", device, ", not to ", name()));
  }
  return std::make_unique<CudaStream>(*this, stream, /*owned=*/false);
}

absl::StatusOr<std::unique_ptr<GraphExec>> CudaDevice::DoAdoptExec(void* graph, void* exec) {
  return AdoptedCudaExec::Create(*this, static_cast<cudaGraph_t>(graph), static_cast<cudaGraphExec_t>(exec));
}

absl::StatusOr<std::unique_ptr<Event>> CudaDevice::DoCreateEvent() {
  const CurrentContext current(driver_, context_);
  const RelaxedCaptureMode relaxed;
  cudaEvent_t event = nullptr;
  PRISTINE_RETURN_IF_ERROR(
      CudaStatus(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
  return std::make_unique<CudaEvent>(*this, event);
}

absl::Status CudaDevice::DoSynchronize() {
  const CurrentContext current(driver_, context_);
  PRISTINE_RETURN_IF_ERROR(CheckNoAdoptedCapture("Synchronize"));
  return CudaStatus(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

// A GPU cannot tell which node wrote. The prologue's comparison finds what was written.
absl::StatusOr<int64_t> CudaDevice::DoWatch(const WatchedRegion&, Watcher*) { return 0; }
void CudaDevice::DoUnwatch(int64_t) {}

}  // namespace pristine
