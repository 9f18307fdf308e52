// The CUDA device: memory, streams and events of one GPU, the captures that are in progress on it, and the execs that
// were destroyed while they ran.
#ifndef PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_DEVICE_H_
#define PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_DEVICE_H_

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "graph_runtime/cuda/cuda_capture.h"
#include "graph_runtime/cuda/cuda_driver.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/memory.h"

namespace pristine {

class CudaDevice final : public Device {
 public:
  static absl::StatusOr<std::unique_ptr<Device>> Create(int ordinal, const CudaOptions& options);
  ~CudaDevice() override;

  const CudaDriver& driver() const { return driver_; }
  CUcontext context() const { return context_; }
  CaptureTable& captures() { return captures_; }

  // Keeps `exec`, which runs until `done` is reached, and destroys both later.
  void Retire(cudaGraphExec_t exec, cudaEvent_t done);
  // Destroys retired execs that are done. Does not block.
  void SweepRetired();

  // The engine may begin a capture on a stream that we adopted without telling us.
  void AddAdopted(cudaStream_t stream);
  void RemoveAdopted(cudaStream_t stream);

 private:
  struct Retired {
    cudaGraphExec_t exec;
    cudaEvent_t done;
  };
  CudaDevice(Traits traits, int ordinal, const CudaOptions& options, const CudaDriver& driver, CUcontext context,
             bool can_map_memory);

  absl::StatusOr<void*> DoAllocate(size_t bytes, const char* name) override;
  void DoFree(void* address, size_t bytes) noexcept override;
  absl::Status DoAllocatePinned(size_t bytes, void** host, void** device_address) override;
  void DoFreePinned(void* host, size_t bytes) noexcept override;
  absl::Status DoAllocateProtected(size_t bytes, ProtectedBuffer& buffer) override;
  absl::Status DoWriteProtected(ProtectedBuffer& buffer, size_t offset, absl::Span<const std::byte> values) override;
  absl::Status DoSeal(ProtectedBuffer& buffer) override;
  void DoFreeProtected(ProtectedBuffer& buffer) noexcept override;
  absl::StatusOr<std::unique_ptr<Stream>> DoCreateStream() override;
  absl::StatusOr<std::unique_ptr<Stream>> DoAdoptStream(void* native) override;
  absl::StatusOr<std::unique_ptr<GraphExec>> DoAdoptExec(void* graph, void* exec) override;
  absl::StatusOr<std::unique_ptr<Event>> DoCreateEvent() override;
  absl::Status DoSynchronize() override;
  absl::StatusOr<int64_t> DoWatch(const WatchedRegion& region, Watcher* watcher) override;
  void DoUnwatch(int64_t id) override;

  // A call that CUDA forbids while capturing would kill the engine's capture: refuse it first.
  absl::Status CheckNoAdoptedCapture(const char* what);

  const int ordinal_;
  MemoryResource* const memory_;
  const CudaDriver driver_;
  const CUcontext context_;  // the device's primary context
  const bool can_map_memory_;
  CaptureTable captures_;
  std::mutex mutex_;
  std::vector<Retired> retired_;       // guarded by mutex_
  std::vector<cudaStream_t> adopted_;  // guarded by mutex_
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_CUDA_CUDA_DEVICE_H_
