// Timing for benchmarks of kernels: graphs that are queued one after the other, and the bandwidth of copies beside
// them.
#ifndef PRISTINE_TESTS_BENCHMARKS_GRAPH_TIMER_H_
#define PRISTINE_TESTS_BENCHMARKS_GRAPH_TIMER_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/status.h"
#include "tests/benchmarks/launch_ring.h"

namespace pristine::benchmarks {

inline double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Times graph launches that are queued back to back. Events live as long as the program.
class GraphTimer {
 public:
  // Microseconds of each launch of `execs`, in turn, `samples` times in all; the first round is not counted.
  static absl::StatusOr<std::vector<double>> Time(Stream& stream, const std::vector<std::unique_ptr<GraphExec>>& execs,
                                                  int samples) {
    const cudaStream_t native = static_cast<cudaStream_t>(stream.native());
    const size_t rounds = (static_cast<size_t>(samples) + execs.size() - 1) / execs.size();
    std::vector<cudaEvent_t> events((rounds + 1) * execs.size() + 1);
    for (cudaEvent_t& event : events) PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventCreate(&event), "cudaEventCreate"));
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventRecord(events[0], native), "cudaEventRecord"));
    for (size_t i = 0; i + 1 < events.size(); ++i) {
      PRISTINE_RETURN_IF_ERROR(execs[i % execs.size()]->Launch(stream));
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventRecord(events[i + 1], native), "cudaEventRecord"));
    }
    PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
    std::vector<double> times;
    for (size_t i = execs.size(); i + 1 < events.size(); ++i) {
      float milliseconds = 0;
      PRISTINE_RETURN_IF_ERROR(
          Cuda(cudaEventElapsedTime(&milliseconds, events[i], events[i + 1]), "cudaEventElapsedTime"));
      times.push_back(1000.0 * milliseconds);
    }
    for (cudaEvent_t event : events) PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventDestroy(event), "cudaEventDestroy"));
    return times;
  }
};

// GB/s of device to device copies, read and written bytes together.
inline absl::StatusOr<double> CopyBandwidth(Device& device, Stream& stream) {
  constexpr int64_t kCopyBytes = int64_t{256} << 20;
  PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer from, device.Allocate(kCopyBytes, "from"));
  PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer to, device.Allocate(kCopyBytes, "to"));
  PRISTINE_RETURN_IF_ERROR(stream.Fill(from.As<std::byte>(), std::byte{1}));
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Graph> graph, Capture(stream, [&](Stream& capturing) {
                              return capturing.Copy(to.As<std::byte>(), from.As<const std::byte>());
                            }));
  std::vector<std::unique_ptr<GraphExec>> execs(1);
  PRISTINE_ASSIGN_OR_RETURN(execs[0], graph->Instantiate());
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<double> times, GraphTimer::Time(stream, execs, 20));
  return 2.0 * kCopyBytes / Median(times) / 1e3;
}

}  // namespace pristine::benchmarks

#endif  // PRISTINE_TESTS_BENCHMARKS_GRAPH_TIMER_H_
