#include "buffers/arena.h"

#include <algorithm>
#include <utility>

#include "pristine/graph_runtime/status.h"

namespace pristine::buffers {
namespace {

constexpr size_t kBlockBytes = 1u << 20;

size_t RoundUp(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

absl::StatusOr<std::byte*> Arena::Carve(size_t bytes, int buffer) {
  const size_t alignment = device_.watch_alignment();
  size_t start = RoundUp(used_ + kGuardBytes, alignment);
  if (start + bytes + kGuardBytes > bytes_) {
    start = RoundUp(kGuardBytes, alignment);
    const size_t block_bytes = std::max(kBlockBytes, RoundUp(start + bytes + kGuardBytes, alignment));
    PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer block, device_.Allocate(block_bytes, name_));
    EndBlock();
    base_ = block.As<std::byte>().address();
    bytes_ = block_bytes;
    blocks_.push_back(std::move(block));
  }
  std::byte* const address = base_ + start;
  AddBand(used_, start, last_buffer_ < 0 ? buffer : last_buffer_, last_buffer_ < 0 ? address : last_start_);
  used_ = start + bytes;
  last_buffer_ = buffer;
  last_start_ = address;
  return address;
}

void Arena::Rewind(const Mark& mark) {
  blocks_.resize(mark.blocks);
  open_bands_.resize(mark.bands);
  base_ = mark.base;
  bytes_ = mark.bytes;
  used_ = mark.used;
  last_buffer_ = mark.last_buffer;
  last_start_ = mark.last_start;
}

void Arena::AddBand(size_t begin, size_t end, int buffer, std::byte* buffer_start) {
  open_bands_.push_back({{base_ + begin, end - begin}, buffer, base_ + begin - buffer_start});
}

void Arena::EndBlock() {
  if (bytes_ > 0 && last_buffer_ >= 0) AddBand(used_, used_ + kGuardBytes, last_buffer_, last_start_);
  bytes_ = used_ = 0;
  last_buffer_ = -1;
}

absl::Status Arena::FillBands(Stream& stream) const {
  for (const GuardBand& band : open_bands_) {
    PRISTINE_RETURN_IF_ERROR(stream.Fill(band.memory, kGuardPattern));
  }
  if (bytes_ == 0 || last_buffer_ < 0) return absl::OkStatus();
  return stream.Fill({base_ + used_, kGuardBytes}, kGuardPattern);  // what EndBlock adds
}

void Arena::Close() {
  EndBlock();
  bands_.insert(bands_.end(), open_bands_.begin(), open_bands_.end());
  open_bands_.clear();
}

}  // namespace pristine::buffers
