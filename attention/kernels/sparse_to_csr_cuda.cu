#include <cuda_runtime.h>

#include "attention/kernels/sparse_to_csr.h"
#include "pristine/buffers/violation.h"

namespace pristine::attention {
namespace {

constexpr int kScanThreads = 1024;
constexpr int kExpandThreads = 256;
constexpr int kExpandPerThread = 4;
constexpr int kExpandMaxBlocks = 1024;  // per row; longer rows are strided over
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline bool AttendsBlocks(const SparseToCsrParams& p, int length) {
  return length >= p.dense_len && length > static_cast<long long>(p.topk) * p.block;
}

__device__ inline int Clamp(int length, int max_length) { return min(max(length, 0), max_length); }

// Inclusive prefix sum over the lanes of a warp.
__device__ inline int WarpScan(int value, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

// One block walks all rows, kScanThreads at a time, and carries the sum over.
__global__ void __launch_bounds__(kScanThreads) SparseScanKernel(const SparseToCsrParams p) {
  __shared__ int warp_sums[kScanThreads / 32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int carry = 0;
  if (threadIdx.x == 0) p.indptr[0] = 0;
  for (int start = 0; start < p.rows; start += kScanThreads) {
    const int row = start + threadIdx.x;
    int count = 0;
    if (row < p.rows) {
      const int request = row / p.groups;
      const int found = p.lengths[request];
      const int length = Clamp(found, p.max_length);
      if (length != found && row % p.groups == 0) {
        Report(p.reports, static_cast<int32_t>(Violation::Kind::kClamped), p.lengths_id, request, length, found);
      }
      count = length;
      if (AttendsBlocks(p, length)) count = (p.topk - 1) * p.block + (length - 1) % p.block + 1;
    }
    int sum = WarpScan(count, lane);
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) warp_sums[lane] = WarpScan(warp_sums[lane], lane);
    __syncthreads();
    if (warp > 0) sum += warp_sums[warp - 1];
    if (row < p.rows) p.indptr[row + 1] = carry + sum;
    carry += warp_sums[kScanThreads / 32 - 1];
    __syncthreads();  // before the next round overwrites warp_sums
  }
}

// Grid: (rows, blocks per row). A function of the bucket alone: blocks past the row's length have nothing to do.
__global__ void __launch_bounds__(kExpandThreads) SparseExpandKernel(const SparseToCsrParams p) {
  const int row = blockIdx.x;
  const int request = row / p.groups;
  const int group = row % p.groups;
  const int begin = p.indptr[row];
  const int count = p.indptr[row + 1] - begin;
  const int length = Clamp(p.lengths[request], p.max_length);
  const bool blocks = AttendsBlocks(p, length);
  const long long first_page = p.page_indptr[request];
  const long long last_page =
      min(static_cast<long long>(p.page_indptr[request + 1]), static_cast<long long>(p.page_indices_size));
  const long long stride = static_cast<long long>(gridDim.y) * kExpandThreads;
  for (long long j = static_cast<long long>(blockIdx.y) * kExpandThreads + threadIdx.x; j < count; j += stride) {
    long long position = j;
    if (blocks) {
      const long long block = p.table[static_cast<long long>(row) * p.topk + j / p.block];
      position = block * p.block + j % p.block;
      if (block < 0 || position >= length) position = -1;
    }
    long long slot = static_cast<long long>(p.dummy_page) * p.page_size;
    if (position >= 0 && first_page >= 0 && first_page + position / p.page_size < last_page) {
      const long long page = p.page_indices[first_page + position / p.page_size];
      if (page >= 0 && page < p.num_pages) slot = page * p.page_size + position % p.page_size;
    }
    p.indices[begin + j] = static_cast<int>(slot * p.groups + group);
  }
}

}  // namespace

int SparseScanCuda(CUstream_st* stream, const SparseToCsrParams& params) {
  void* arguments[] = {const_cast<SparseToCsrParams*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&SparseScanKernel), dim3(1), dim3(kScanThreads), arguments, 0,
                          stream);
}

int SparseExpandCuda(CUstream_st* stream, const SparseToCsrParams& params) {
  void* arguments[] = {const_cast<SparseToCsrParams*>(&params)};
  const int per_block = kExpandThreads * kExpandPerThread;
  const int blocks = (params.row_bound - 1) / per_block + 1;
  const dim3 grid(static_cast<unsigned>(params.rows),
                  static_cast<unsigned>(blocks < kExpandMaxBlocks ? blocks : kExpandMaxBlocks));
  return cudaLaunchKernel(reinterpret_cast<const void*>(&SparseExpandKernel), grid, dim3(kExpandThreads), arguments, 0,
                          stream);
}

}  // namespace pristine::attention
