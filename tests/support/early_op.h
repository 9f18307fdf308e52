// An op that may begin before the kernel ahead of it has ended (attention/kernels/dependent_launch.cuh), between one
// that is late and one that begins early too.
#ifndef PRISTINE_TESTS_SUPPORT_EARLY_OP_H_
#define PRISTINE_TESTS_SUPPORT_EARLY_OP_H_

#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::testing {

// Holds all memory that one op reads and writes. Stream and device must outlive it.
class EarlyOpRig {
 public:
  // For an op of at most `bytes` bytes.
  static absl::StatusOr<std::unique_ptr<EarlyOpRig>> Create(Stream& stream, size_t bytes);
  ~EarlyOpRig();

  // Memory of the op, aligned to 256 bytes: what it must find there, and what it finds if it does not wait, which it
  // must survive. As many elements each; null memory where there is no room.
  template <class T>
  DeviceSpan<T> Put(const std::vector<T>& late, const std::vector<T>& early) {
    const size_t size = late.size() < early.size() ? late.size() : early.size();
    void* const at = PutBytes(late.data(), early.data(), size * sizeof(T));
    return {static_cast<T*>(at), at == nullptr ? 0 : size};
  }
  // What the op only writes.
  template <class T>
  DeviceSpan<T> Output(size_t size) {
    const std::vector<std::byte> late(size * sizeof(T), std::byte{0xa5}), early(size * sizeof(T), std::byte{0x5a});
    return {reinterpret_cast<T*>(Put(late, early).address()), size};
  }
  void Clear();  // for the next op

  // Runs `op` behind a kernel that writes its memory late, and behind one that reads it late, both times with a reader
  // behind it that begins early itself; eagerly and replayed. "" if nobody sees anything but what they see of kernels
  // that wait for each other: op and reader what was written, the late reader nothing of what the op writes.
  std::string Check(absl::FunctionRef<absl::Status(Stream&)> op);

 private:
  EarlyOpRig(Stream& stream, size_t bytes) : stream_(stream), bytes_(bytes) {}
  void* PutBytes(const void* late, const void* early, size_t bytes);
  absl::Status RunAll(absl::FunctionRef<absl::Status(Stream&)> op, std::string& wrong);

  Stream& stream_;
  const size_t bytes_;
  DeviceBuffer memory_, staged_, ahead_, behind_;
  std::vector<std::byte> late_, early_;
};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_SUPPORT_EARLY_OP_H_
