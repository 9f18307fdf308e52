// Arena: live memory for buffers of one class, with guard bands between them. Grows by blocks; nothing moves.
#ifndef PRISTINE_BUFFERS_ARENA_H_
#define PRISTINE_BUFFERS_ARENA_H_

#include <cstddef>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::buffers {

inline constexpr size_t kGuardBytes = 256;
inline constexpr std::byte kGuardPattern{0xA5};

// The bytes between two buffers (at least kGuardBytes), or at an end of a block. Charged to the buffer before it; at
// the start of a block, to the one after it.
struct GuardBand {
  DeviceSpan<std::byte> memory;
  int buffer = -1;
  std::ptrdiff_t offset = 0;  // of the band, from the start of that buffer
};

class Arena {
 public:
  // `device` must outlive the arena.
  Arena(Device& device, const char* name) : device_(device), name_(name) {}

  // Room for `bytes` > 0 that stays where it is, aligned to device.watch_alignment(). RESOURCE_EXHAUSTED: no memory;
  // nothing has changed then.
  absl::StatusOr<std::byte*> Carve(size_t bytes, int buffer);

  // Where the arena stands; Rewind takes back every Carve since. No Close may lie in between.
  struct Mark {
    size_t blocks = 0;
    size_t bands = 0;
    std::byte* base = nullptr;
    size_t bytes = 0;
    size_t used = 0;
    int last_buffer = -1;
    std::byte* last_start = nullptr;
  };
  Mark mark() const { return {blocks_.size(), open_bands_.size(), base_, bytes_, used_, last_buffer_, last_start_}; }
  void Rewind(const Mark& mark);

  // Queues the filling of the bands that Close would end. Changes nothing here, so that it may fail and be tried again.
  absl::Status FillBands(Stream& stream) const;
  // Ends the current blocks, so that what comes later shares no page with what is there. The bands are filled.
  void Close();

  // Bands of all closed blocks.
  const std::vector<GuardBand>& bands() const { return bands_; }

 private:
  void AddBand(size_t begin, size_t end, int buffer, std::byte* buffer_start);
  void EndBlock();

  Device& device_;
  const char* const name_;
  std::vector<DeviceBuffer> blocks_;
  // The last block; bytes_ 0: none is open.
  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
  size_t used_ = 0;
  int last_buffer_ = -1;
  std::byte* last_start_ = nullptr;
  std::vector<GuardBand> open_bands_;  // not filled yet
  std::vector<GuardBand> bands_;
};

}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_ARENA_H_
