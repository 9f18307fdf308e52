// Protected memory on CUDA: the same physical pages mapped twice. Readers get the read-only mapping from the start; the
// writable one lasts until Seal.
#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "graph_runtime/cuda/cuda_device.h"
#include "graph_runtime/cuda/cuda_status.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {
namespace {

CUdeviceptr Pointer(const void* address) { return reinterpret_cast<CUdeviceptr>(address); }
void* Address(CUdeviceptr pointer) { return reinterpret_cast<void*>(pointer); }  // NOLINT: device addresses are numbers

CUmemAllocationProp PropertiesOf(int ordinal) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = ordinal;
  return properties;
}

// One of the two mappings, undone unless kept.
class Mapping {
 public:
  Mapping(const CudaDriver& driver, size_t bytes) : driver_(driver), bytes_(bytes) {}
  ~Mapping() {
    if (mapped_) driver_.memory_unmap(range_, bytes_);
    if (range_ != 0) driver_.address_free(range_, bytes_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  absl::Status Map(CUmemGenericAllocationHandle pages, int ordinal, CUmemAccess_flags access) {
    PRISTINE_RETURN_IF_ERROR(
        driver_.ToStatus(driver_.address_reserve(&range_, bytes_, 0, 0, 0), "cuMemAddressReserve"));
    PRISTINE_RETURN_IF_ERROR(driver_.ToStatus(driver_.memory_map(range_, bytes_, 0, pages, 0), "cuMemMap"));
    mapped_ = true;
    CUmemAccessDesc descriptor = {};
    descriptor.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    descriptor.location.id = ordinal;
    descriptor.flags = access;
    return driver_.ToStatus(driver_.memory_set_access(range_, bytes_, &descriptor, 1), "cuMemSetAccess");
  }
  void* Keep() {
    mapped_ = false;
    return Address(std::exchange(range_, 0));
  }

 private:
  const CudaDriver& driver_;
  const size_t bytes_;
  CUdeviceptr range_ = 0;
  bool mapped_ = false;
};

}  // namespace

absl::Status CudaDevice::DoAllocateProtected(size_t bytes, ProtectedBuffer& buffer) {
  const CurrentContext current(driver_, context_);
  if (!can_map_memory_) {
    PRISTINE_ASSIGN_OR_RETURN(buffer.address_, DoAllocate(bytes, "protected memory"));
    buffer.writable_ = buffer.address_;
    buffer.mapped_ = bytes;
    buffer.level_ = ProtectionLevel::kDigest;
    return absl::OkStatus();
  }
  PRISTINE_RETURN_IF_ERROR(CheckNoAdoptedCapture("protected memory"));
  const CUmemAllocationProp properties = PropertiesOf(ordinal_);
  size_t granularity = 0;
  PRISTINE_RETURN_IF_ERROR(
      driver_.ToStatus(driver_.memory_granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                       "cuMemGetAllocationGranularity"));
  if (bytes > SIZE_MAX - granularity) {
    return absl::ResourceExhaustedError(absl::StrCat("protected memory of ", bytes, " bytes"));
  }
  const size_t mapped = (bytes + granularity - 1) / granularity * granularity;
  CUmemGenericAllocationHandle pages = 0;
  PRISTINE_RETURN_IF_ERROR(driver_.ToStatus(driver_.memory_create(&pages, mapped, &properties, 0),
                                            absl::StrCat("cuMemCreate of ", mapped, " bytes").c_str()));
  Mapping readable(driver_, mapped);
  Mapping writable(driver_, mapped);
  absl::Status status = readable.Map(pages, ordinal_, CU_MEM_ACCESS_FLAGS_PROT_READ);
  if (status.ok()) status = writable.Map(pages, ordinal_, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  // The mappings keep the pages. Without the handle nobody can map them a third time.
  status.Update(driver_.ToStatus(driver_.memory_release(pages), "cuMemRelease"));
  PRISTINE_RETURN_IF_ERROR(status);
  buffer.address_ = readable.Keep();
  buffer.writable_ = writable.Keep();
  buffer.backing_ = buffer.writable_;  // the reserved range, which outlives the mapping
  buffer.mapped_ = mapped;
  buffer.level_ = ProtectionLevel::kHardware;
  return absl::OkStatus();
}

absl::Status CudaDevice::DoWriteProtected(ProtectedBuffer& buffer, size_t offset, absl::Span<const std::byte> values) {
  const CurrentContext current(driver_, context_);
  const RelaxedCaptureMode relaxed;
  PRISTINE_RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(static_cast<std::byte*>(buffer.writable_) + offset, values.data(),
                                                      values.size(), cudaMemcpyHostToDevice, cudaStreamPerThread),
                                      "cudaMemcpyAsync"));
  return CudaStatus(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize");
}

// ProtectedBuffer::Seal has waited for all work of the device.
absl::Status CudaDevice::DoSeal(ProtectedBuffer& buffer) {
  const CurrentContext current(driver_, context_);
  if (buffer.level_ != ProtectionLevel::kHardware) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(
      driver_.ToStatus(driver_.memory_unmap(Pointer(buffer.writable_), buffer.mapped_), "cuMemUnmap"));
  buffer.writable_ = nullptr;
  return absl::OkStatus();
}

void CudaDevice::DoFreeProtected(ProtectedBuffer& buffer) noexcept {
  const CurrentContext current(driver_, context_);
  const RelaxedCaptureMode relaxed;
  if (buffer.level_ != ProtectionLevel::kHardware) {
    DoFree(buffer.address_, buffer.mapped_);
    return;
  }
  if (buffer.writable_ != nullptr) driver_.memory_unmap(Pointer(buffer.writable_), buffer.mapped_);
  driver_.memory_unmap(Pointer(buffer.address_), buffer.mapped_);
  driver_.address_free(Pointer(buffer.backing_), buffer.mapped_);
  driver_.address_free(Pointer(buffer.address_), buffer.mapped_);
}

}  // namespace pristine
