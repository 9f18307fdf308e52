// A kernel is data: a name, its two implementations and what it writes, over one trivially copyable Params.
// No Abseil, no CUDA headers: .cu files include this.
#ifndef PRISTINE_GRAPH_RUNTIME_KERNEL_H_
#define PRISTINE_GRAPH_RUNTIME_KERNEL_H_

#include <cstddef>
#include <type_traits>
#include <vector>

struct CUstream_st;  // what cudaStream_t points to

namespace pristine {

// The address ranges that one launch may write.
class WriteList {
 public:
  struct Range {
    const void* address;
    size_t bytes;
  };
  // Null or empty ranges are dropped.
  void Add(const void* address, size_t bytes) {
    if (address != nullptr && bytes > 0) ranges_.push_back({address, bytes});
  }
  const std::vector<Range>& ranges() const { return ranges_; }
  void Clear() { ranges_.clear(); }  // keeps its memory

 private:
  std::vector<Range> ranges_;
};

// What a Host kernel returns where a CUDA kernel would execute __trap(): the device is lost (IsDeviceLost).
inline constexpr int kKernelTrap = -0x7fffffff;

// A CUDA launch as data, of a kernel that takes its Params by value as its one parameter.
struct CudaLaunch {
  const void* function = nullptr;  // the __global__ function
  unsigned grid = 1;
  unsigned block = 1;
  size_t shared_bytes = 0;
};

// Params are copied into the graph, so that Host freezes addresses and scalars exactly as a CUDA kernel node does.
template <class Params>
struct Kernel {
  static_assert(std::is_trivially_copyable_v<Params>, "params are copied into the graph");

  const char* name;  // static storage; the node's name in graphs and reports
  // Runs on the stream's worker thread. The oracle: plain, and shares nothing with `cuda` but Params.
  // Returns 0; kKernelTrap to lose the device; any other number to fail the stream (INTERNAL, final for it), as a
  // launch that CUDA refuses does.
  int (*host)(const Params&);
  // Arithmetic and one launch. Returns a cudaError_t; null in a build without CUDA.
  int (*cuda)(CUstream_st* stream, const Params&);
  // Declares what the launch writes; the Host device enforces it (HostOptions::enforce_accesses). Never null.
  void (*writes)(const Params&, WriteList&);
  // What `cuda` launches, for GraphExec::SetKernelParams; null: not offered, or a build without CUDA.
  CudaLaunch (*cuda_launch)(const Params&) = nullptr;
};

// PRISTINE_CUDA(f) is f in a build with CUDA and null otherwise, for use in kernel tables.
#ifdef PRISTINE_HAS_CUDA
#define PRISTINE_CUDA(function) (function)
#else
#define PRISTINE_CUDA(function) nullptr
#endif

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_KERNEL_H_
