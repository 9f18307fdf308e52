// More than 4 GB, for offsets that 32 bits do not hold.
#ifndef PRISTINE_TESTS_SUPPORT_VAST_MEMORY_H_
#define PRISTINE_TESTS_SUPPORT_VAST_MEMORY_H_

#include <sys/mman.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/status.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::testing {

// Owns what it hands out. No work that uses it may be queued when it goes.
class VastMemory {
 public:
  VastMemory() = default;
  VastMemory(const VastMemory&) = delete;
  VastMemory& operator=(const VastMemory&) = delete;
  ~VastMemory() { Clear(); }

  // Zeros; on Host address space of which only what is written becomes memory. RESOURCE_EXHAUSTED: there is none.
  absl::StatusOr<DeviceSpan<std::byte>> Get(Stream& stream, size_t bytes) {
    if (stream.device().backend() == Backend::kHost) {
      void* const address =
          mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (address == MAP_FAILED) return absl::ResourceExhaustedError("no address space");
      mapped_.emplace_back(address, bytes);
      return DeviceSpan<std::byte>(static_cast<std::byte*>(address), bytes);
    }
    PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer buffer, stream.device().Allocate(bytes, "vast"));
    buffers_.push_back(std::move(buffer));
    const DeviceSpan<std::byte> span = buffers_.back().As<std::byte>();
    PRISTINE_RETURN_IF_ERROR(stream.Fill(span, std::byte{0}));
    return span;
  }
  void Clear() {
    for (const auto& [address, bytes] : mapped_) munmap(address, bytes);
    mapped_.clear();
    buffers_.clear();
  }

 private:
  std::vector<DeviceBuffer> buffers_;
  std::vector<std::pair<void*, size_t>> mapped_;
};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_SUPPORT_VAST_MEMORY_H_
