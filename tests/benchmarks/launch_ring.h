// Timing for benchmarks: host clocks, summaries, and GPU time of launches that follow each other without a pause.
#ifndef PRISTINE_TESTS_BENCHMARKS_LAUNCH_RING_H_
#define PRISTINE_TESTS_BENCHMARKS_LAUNCH_RING_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::benchmarks {

inline absl::Status Cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

class Timer {
 public:
  double Microseconds() const {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

struct Summary {
  double min = 0, median = 0, p99 = 0;
};
inline Summary Summarize(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  return {values.front(), values[values.size() / 2], values[values.size() * 99 / 100]};
}

// Two timed events around a launch; a ring of them bounds how many launches are in flight.
class LaunchRing {
 public:
  static constexpr int kInFlight = 4;

  static absl::StatusOr<LaunchRing> Create() {
    LaunchRing ring;
    for (Launch& launch : ring.launches_) {
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventCreate(&launch.begin), "cudaEventCreate"));
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventCreate(&launch.end), "cudaEventCreate"));
    }
    return ring;
  }
  // Waits for the launch that was here before, and gives its GPU time to whom it belongs.
  absl::Status Begin(cudaStream_t stream, double* gpu_us) {
    PRISTINE_RETURN_IF_ERROR(Collect(current()));
    current().gpu_us = gpu_us;
    return Cuda(cudaEventRecord(current().begin, stream), "cudaEventRecord");
  }
  absl::Status End(cudaStream_t stream) {
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventRecord(current().end, stream), "cudaEventRecord"));
    ++next_;
    return absl::OkStatus();
  }
  absl::Status Drain() {
    for (Launch& launch : launches_) PRISTINE_RETURN_IF_ERROR(Collect(launch));
    return absl::OkStatus();
  }

 private:
  struct Launch {
    cudaEvent_t begin = nullptr;  // these live as long as the program
    cudaEvent_t end = nullptr;
    double* gpu_us = nullptr;  // null: not in flight
  };
  Launch& current() { return launches_[next_ % kInFlight]; }
  static absl::Status Collect(Launch& launch) {
    if (launch.gpu_us == nullptr) return absl::OkStatus();
    float milliseconds = 0;
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventSynchronize(launch.end), "cudaEventSynchronize"));
    PRISTINE_RETURN_IF_ERROR(
        Cuda(cudaEventElapsedTime(&milliseconds, launch.begin, launch.end), "cudaEventElapsedTime"));
    *std::exchange(launch.gpu_us, nullptr) = 1000.0 * milliseconds;
    return absl::OkStatus();
  }

  Launch launches_[kInFlight];
  int64_t next_ = 0;
};

}  // namespace pristine::benchmarks

#endif  // PRISTINE_TESTS_BENCHMARKS_LAUNCH_RING_H_
