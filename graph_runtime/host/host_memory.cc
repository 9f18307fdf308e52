#include "graph_runtime/host/host_memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::host {
namespace {

constexpr int kFresh = 0xCB;
constexpr int kFreed = 0xDD;
constexpr std::byte kGuard{0xA5};
constexpr size_t kGuardBytes = 256;
// Allocators of the sanitizers end the process when asked for more than they can give.
constexpr size_t kLargest = size_t{1} << 40;

void CheckBand(const std::byte* band, const char* side, const std::string& name, size_t bytes) {
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (band[i] == kGuard) continue;
    std::fprintf(
        stderr,
        "pristine: guard band %s '%s' (%zu bytes) damaged at byte %zu of the band: found 0x%02x, expected 0x%02x\n",
        side, name.c_str(), bytes, i, std::to_integer<unsigned>(band[i]), std::to_integer<unsigned>(kGuard));
    std::abort();
  }
}

}  // namespace

absl::StatusOr<void*> AllocatePages(size_t bytes) {
  if (bytes > kLargest) {
    return absl::ResourceExhaustedError(absl::StrCat(bytes, " bytes; the Host backend gives at most ", kLargest));
  }
  void* address = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  if (address == nullptr) return absl::ResourceExhaustedError(absl::StrCat("no host memory for ", bytes, " bytes"));
  return address;
}

void FreePages(void* address) noexcept { std::free(address); }

absl::StatusOr<void*> GuardedHeap::AllocateRaw(size_t bytes) {
  if (resource_ == nullptr) return AllocatePages(bytes);
  PRISTINE_ASSIGN_OR_RETURN(void* address, resource_->Allocate(bytes, alignment_));
  if (address == nullptr || reinterpret_cast<uintptr_t>(address) % alignment_ != 0) {
    if (address != nullptr) resource_->Deallocate(address, bytes);
    return absl::InternalError(
        absl::StrCat("MemoryResource::Allocate(", bytes, ", ", alignment_, ") returned a null or misaligned address"));
  }
  return address;
}

void GuardedHeap::FreeRaw(void* address, size_t bytes) noexcept {
  if (resource_ == nullptr) {
    FreePages(address);
  } else {
    resource_->Deallocate(address, bytes);
  }
}

// [alignment_ bytes that end in the front band][bytes][back band]
absl::StatusOr<void*> GuardedHeap::Allocate(size_t bytes, const char* name) {
  if (bytes > kLargest) {
    return absl::ResourceExhaustedError(
        absl::StrCat(name, ": ", bytes, " bytes; the Host backend gives at most ", kLargest));
  }
  const size_t total = alignment_ + bytes + kGuardBytes;
  absl::StatusOr<void*> raw = AllocateRaw(total);
  if (!raw.ok()) return absl::Status(raw.status().code(), absl::StrCat(name, ": ", raw.status().message()));
  std::byte* base = static_cast<std::byte*>(*raw);
  std::byte* data = base + alignment_;
  std::memset(data - kGuardBytes, std::to_integer<int>(kGuard), kGuardBytes);
  std::memset(data, kFresh, bytes);
  std::memset(data + bytes, std::to_integer<int>(kGuard), kGuardBytes);
  std::lock_guard lock(mutex_);
  names_[data] = name;
  return data;
}

void GuardedHeap::Free(void* address, size_t bytes) noexcept {
  auto* data = static_cast<std::byte*>(address);
  {
    std::lock_guard lock(mutex_);
    const auto name = names_.find(address);
    CheckBand(data - kGuardBytes, "before", name->second, bytes);
    CheckBand(data + bytes, "after", name->second, bytes);
    names_.erase(name);
  }
  std::memset(data, kFreed, bytes);
  FreeRaw(data - alignment_, alignment_ + bytes + kGuardBytes);
}

void SealedRanges::Add(const void* address, size_t bytes) {
  std::lock_guard lock(mutex_);
  ranges_[static_cast<const std::byte*>(address)] = bytes;
}

void SealedRanges::Remove(const void* address) {
  std::lock_guard lock(mutex_);
  ranges_.erase(static_cast<const std::byte*>(address));
}

absl::Status SealedRanges::CheckWritable(const char* call, const void* address, size_t bytes) const {
  const auto* begin = static_cast<const std::byte*>(address);
  std::lock_guard lock(mutex_);
  const auto after = ranges_.lower_bound(begin + bytes);
  if (after == ranges_.begin()) return absl::OkStatus();
  const auto& [sealed, sealed_bytes] = *std::prev(after);
  if (sealed + sealed_bytes <= begin) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(call, ": the destination is sealed memory"));
}

}  // namespace pristine::host
