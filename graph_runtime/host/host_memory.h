// Memory of the Host backend: allocations between guard bands, and the ranges that are sealed.
#ifndef PRISTINE_GRAPH_RUNTIME_HOST_HOST_MEMORY_H_
#define PRISTINE_GRAPH_RUNTIME_HOST_HOST_MEMORY_H_

#include <cstddef>
#include <map>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/graph_runtime/memory.h"

namespace pristine::host {

constexpr size_t kPage = 4096;

// Thread-safe. Fresh memory is 0xCB, freed memory 0xDD.
class GuardedHeap {
 public:
  // `resource` null: the process heap.
  GuardedHeap(MemoryResource* resource, size_t alignment) : resource_(resource), alignment_(alignment) {}

  absl::StatusOr<void*> Allocate(size_t bytes, const char* name);
  // Prints and aborts if a guard band is damaged.
  void Free(void* address, size_t bytes) noexcept;

 private:
  absl::StatusOr<void*> AllocateRaw(size_t bytes);
  void FreeRaw(void* address, size_t bytes) noexcept;

  MemoryResource* const resource_;
  const size_t alignment_;
  std::mutex mutex_;
  std::map<void*, std::string> names_;
};

// Page-aligned heap memory. RESOURCE_EXHAUSTED: there is none.
absl::StatusOr<void*> AllocatePages(size_t bytes);
void FreePages(void* address) noexcept;

// Thread-safe. What copies and fills must refuse, as CUDA does; kernels that write there fault.
class SealedRanges {
 public:
  void Add(const void* address, size_t bytes);
  void Remove(const void* address);
  // INVALID_ARGUMENT: [address, address + bytes) touches a sealed range.
  absl::Status CheckWritable(const char* call, const void* address, size_t bytes) const;

 private:
  mutable std::mutex mutex_;
  std::map<const std::byte*, size_t> ranges_;
};

}  // namespace pristine::host

#endif  // PRISTINE_GRAPH_RUNTIME_HOST_HOST_MEMORY_H_
