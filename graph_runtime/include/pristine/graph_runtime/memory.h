// Memory of a device: a view (DeviceSpan), three owners (DeviceBuffer, PinnedBuffer, ProtectedBuffer), and the
// interface through which an engine supplies its own allocator (MemoryResource).
#ifndef PRISTINE_GRAPH_RUNTIME_MEMORY_H_
#define PRISTINE_GRAPH_RUNTIME_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace pristine {

class CudaDevice;
class Device;
class HostDevice;
class Stream;

// A typed address range in device memory. Does not own it. Host code must not dereference address(): it is the value
// that kernel params hold, and that a captured graph then holds for ever.
template <class T>
class DeviceSpan {
 public:
  DeviceSpan() = default;
  DeviceSpan(T* address, size_t size) : address_(address), size_(size) {}
  // DeviceSpan<int> converts to DeviceSpan<const int>.
  template <class U, class = std::enable_if_t<std::is_convertible_v<U (*)[], T (*)[]>>>
  DeviceSpan(const DeviceSpan<U>& other) : address_(other.address()), size_(other.size()) {}  // NOLINT

  T* address() const { return address_; }
  size_t size() const { return size_; }  // elements
  size_t bytes() const { return size_ * sizeof(T); }
  bool empty() const { return size_ == 0; }
  // [offset, offset + size), in elements; the caller keeps it inside this span.
  DeviceSpan Sub(size_t offset, size_t size) const { return {address_ + offset, size}; }

 private:
  T* address_ = nullptr;
  size_t size_ = 0;
};

template <class T>
DeviceSpan<const std::byte> AsBytes(DeviceSpan<T> span) {
  return {reinterpret_cast<const std::byte*>(span.address()), span.bytes()};
}
template <class T>
DeviceSpan<std::byte> AsWritableBytes(DeviceSpan<T> span) {
  return {reinterpret_cast<std::byte*>(span.address()), span.bytes()};
}

// Where device memory comes from. An engine passes its own when it creates the Device; the Device must not outlive it.
// Calls come from the thread that calls Device; never during a capture.
class MemoryResource {
 public:
  virtual ~MemoryResource() = default;
  // `bytes` > 0, `alignment` a power of two up to 4096. RESOURCE_EXHAUSTED: no memory.
  virtual absl::StatusOr<void*> Allocate(size_t bytes, size_t alignment) = 0;
  virtual void Deallocate(void* address, size_t bytes) noexcept = 0;
};

// Device memory. Move-only; freed on destruction. Its Device must outlive it, and it must outlive all queued work that
// uses it and every graph that captured its address.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();

  size_t bytes() const { return bytes_; }
  template <class T>
  DeviceSpan<T> As() const {
    return {static_cast<T*>(address_), bytes_ / sizeof(T)};
  }

 private:
  friend class Device;
  Device* device_ = nullptr;
  void* address_ = nullptr;
  size_t bytes_ = 0;
};

// Page-locked host memory that kernels can read and write at device_address(), and that the host can still read after
// the device context has died. Ownership as DeviceBuffer.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(PinnedBuffer&& other) noexcept;
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept;
  ~PinnedBuffer();

  size_t bytes() const { return bytes_; }
  std::byte* host() const { return static_cast<std::byte*>(host_); }
  template <class T>
  absl::Span<T> As() const {
    return {static_cast<T*>(host_), bytes_ / sizeof(T)};
  }
  void* device_address() const { return device_address_; }

 private:
  friend class Device;
  Device* device_ = nullptr;
  void* host_ = nullptr;
  void* device_address_ = nullptr;
  size_t bytes_ = 0;
};

// What keeps sealed memory from being written.
enum class ProtectionLevel {
  kHardware,  // no writable address exists: a write faults at the writer
  kDigest,    // the platform cannot protect it; a changed byte is found by the next BufferManager::Verify
};
const char* ToString(ProtectionLevel level);

// Device memory in two states:  open --Seal()--> sealed.
// Open: Write() fills it. Sealed: nothing can write it, by any address; kernels and copies read it at address().
// CUDA: the same physical pages are mapped twice, read-only at address() and writable at an address that Seal() unmaps;
// its range stays reserved so that nothing else is ever placed there. Host: mprotect.
// Move-only; ownership as DeviceBuffer. Not thread-safe.
class ProtectedBuffer {
 public:
  ProtectedBuffer() = default;
  ProtectedBuffer(ProtectedBuffer&& other) noexcept;
  ProtectedBuffer& operator=(ProtectedBuffer&& other) noexcept;
  ~ProtectedBuffer();

  // The address that stays. Readable now and after Seal(); the same before and after.
  DeviceSpan<const std::byte> span() const { return {static_cast<const std::byte*>(address_), bytes_}; }
  size_t bytes() const { return bytes_; }  // as asked for; the mapping is rounded up to pages
  bool sealed() const { return sealed_; }
  ProtectionLevel level() const { return level_; }

  // Copies `values` to [offset, offset + values.size()). Blocks. FAILED_PRECONDITION: sealed. OUT_OF_RANGE: past
  // bytes().
  absl::Status Write(size_t offset, absl::Span<const std::byte> values);
  // Blocks until all work of the device is done, then takes the writable mapping away. FAILED_PRECONDITION: sealed
  // already. INTERNAL: the driver refused; the buffer stays open.
  absl::Status Seal();

 private:
  friend class Device;
  friend class CudaDevice;  // the backends fill in what they mapped
  friend class HostDevice;
  Device* device_ = nullptr;
  void* address_ = nullptr;   // what readers use
  void* writable_ = nullptr;  // backend's; null once sealed (where level is kHardware)
  void* backing_ = nullptr;   // backend's handle
  size_t bytes_ = 0;
  size_t mapped_ = 0;
  ProtectionLevel level_ = ProtectionLevel::kDigest;
  bool sealed_ = false;
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_MEMORY_H_
