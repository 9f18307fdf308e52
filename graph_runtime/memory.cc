#include "pristine/graph_runtime/memory.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/fault_injector.h"
#include "pristine/graph_runtime/status.h"

namespace pristine {

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : device_(std::exchange(other.device_, nullptr)),
      address_(std::exchange(other.address_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  DeviceBuffer taken(std::move(other));
  std::swap(device_, taken.device_);
  std::swap(address_, taken.address_);
  std::swap(bytes_, taken.bytes_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (device_ == nullptr) return;
  device_->DoFree(address_, bytes_);
  device_->UncountAllocation(bytes_);
}

PinnedBuffer::PinnedBuffer(PinnedBuffer&& other) noexcept
    : device_(std::exchange(other.device_, nullptr)),
      host_(std::exchange(other.host_, nullptr)),
      device_address_(std::exchange(other.device_address_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& other) noexcept {
  PinnedBuffer taken(std::move(other));
  std::swap(device_, taken.device_);
  std::swap(host_, taken.host_);
  std::swap(device_address_, taken.device_address_);
  std::swap(bytes_, taken.bytes_);
  return *this;
}

PinnedBuffer::~PinnedBuffer() {
  if (device_ == nullptr) return;
  device_->DoFreePinned(host_, bytes_);
  device_->UncountAllocation(bytes_);
}

const char* ToString(ProtectionLevel level) { return level == ProtectionLevel::kHardware ? "hardware" : "digest"; }

ProtectedBuffer::ProtectedBuffer(ProtectedBuffer&& other) noexcept
    : device_(std::exchange(other.device_, nullptr)),
      address_(std::exchange(other.address_, nullptr)),
      writable_(std::exchange(other.writable_, nullptr)),
      backing_(std::exchange(other.backing_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      mapped_(std::exchange(other.mapped_, 0)),
      level_(other.level_),
      sealed_(std::exchange(other.sealed_, false)) {}

ProtectedBuffer& ProtectedBuffer::operator=(ProtectedBuffer&& other) noexcept {
  ProtectedBuffer taken(std::move(other));
  std::swap(device_, taken.device_);
  std::swap(address_, taken.address_);
  std::swap(writable_, taken.writable_);
  std::swap(backing_, taken.backing_);
  std::swap(bytes_, taken.bytes_);
  std::swap(mapped_, taken.mapped_);
  std::swap(level_, taken.level_);
  std::swap(sealed_, taken.sealed_);
  return *this;
}

ProtectedBuffer::~ProtectedBuffer() {
  if (device_ == nullptr) return;
  device_->DoFreeProtected(*this);
  device_->UncountAllocation(bytes_);
}

absl::Status ProtectedBuffer::Write(size_t offset, absl::Span<const std::byte> values) {
  if (device_ == nullptr) return absl::FailedPreconditionError("ProtectedBuffer::Write: no memory was allocated");
  if (sealed_) return absl::FailedPreconditionError("ProtectedBuffer::Write: the memory is sealed");
  if (offset > bytes_ || values.size() > bytes_ - offset) {
    return absl::OutOfRangeError(
        absl::StrCat("ProtectedBuffer::Write: ", values.size(), " bytes at ", offset, " of ", bytes_));
  }
  if (values.empty()) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(device_->RefuseWhileCapturing("ProtectedBuffer::Write"));
  PRISTINE_RETURN_IF_ERROR(device_->Admit(Operation::kWrite, "ProtectedBuffer::Write"));
  return device_->Settle("ProtectedBuffer::Write", device_->DoWriteProtected(*this, offset, values));
}

absl::Status ProtectedBuffer::Seal() {
  if (device_ == nullptr) return absl::FailedPreconditionError("ProtectedBuffer::Seal: no memory was allocated");
  if (sealed_) return absl::FailedPreconditionError("ProtectedBuffer::Seal: sealed already");
  PRISTINE_RETURN_IF_ERROR(device_->Synchronize());
  PRISTINE_RETURN_IF_ERROR(device_->Admit(Operation::kSeal, "ProtectedBuffer::Seal"));
  PRISTINE_RETURN_IF_ERROR(device_->Settle("ProtectedBuffer::Seal", device_->DoSeal(*this)));
  sealed_ = true;
  return absl::OkStatus();
}

}  // namespace pristine
