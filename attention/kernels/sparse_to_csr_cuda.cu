// One kernel: each block sums up the rows ahead of its own, which costs less than a second launch that reads the sums.
#include <cuda_runtime.h>

#include "attention/kernels/divider.h"
#include "attention/kernels/sparse_to_csr.h"
#include "pristine/buffers/violation.h"

namespace pristine::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 8 * kThreads;  // indices of a block
constexpr int kMaxTiles = 1024;      // blocks per row; longer rows are strided over
constexpr unsigned kAllLanes = 0xffffffffu;

struct SparseToCsrLaunch {
  SparseToCsrParams params;
  Divider groups, block, page_size;
};

__device__ inline bool AttendsBlocks(const SparseToCsrParams& p, int length) {
  return length >= p.dense_len && length > static_cast<long long>(p.topk) * p.block;
}

__device__ inline int Clamp(int length, int max_length) { return min(max(length, 0), max_length); }

__device__ inline int RowLength(const SparseToCsrLaunch& launch, int length) {
  const SparseToCsrParams& p = launch.params;
  if (!AttendsBlocks(p, length)) return length;
  const int before_last_block = static_cast<int>(launch.block.Quotient(length - 1)) * p.block;
  return (p.topk - 1) * p.block + length - before_last_block;
}

// Grid: (rows, tiles per row), a function of the bucket alone: tiles past the row's length have nothing to do. Where
// kWidth indices in a row share block and page, one thread makes them from one entry of each table.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) SparseToCsrKernel(const __grid_constant__ SparseToCsrLaunch launch) {
  constexpr int kPerThread = kTile / kThreads / kWidth;
  __shared__ int warp_sums[kThreads / 32];
  __shared__ int tile[kTile];
  const SparseToCsrParams& p = launch.params;
  const int row = blockIdx.x;
  const int request = static_cast<int>(launch.groups.Quotient(row));
  const int group = row - request * p.groups;
  const int found = p.lengths[request];
  const long long first_page = p.page_indptr[request];
  const long long end_page =
      min(static_cast<long long>(p.page_indptr[request + 1]), static_cast<long long>(p.page_indices_size));
  const int length = Clamp(found, p.max_length);
  const unsigned count = RowLength(launch, length);
  unsigned at = blockIdx.y * kTile;
  if (at >= count && blockIdx.y > 0) return;

  const unsigned pages = first_page < 0 || end_page < first_page ? 0 : static_cast<unsigned>(end_page - first_page);
  const int* const page_indices = p.page_indices + (pages == 0 ? 0 : first_page);
  const int* const table = p.table + static_cast<long long>(row) * p.topk;
  const bool blocks = AttendsBlocks(p, length);
  // Loads of all a thread's indices go out together, first those of the table, then those of the pages.
  const auto fill_tile = [&] {
    unsigned position[kPerThread];  // at or past `length`: does not exist
    int page[kPerThread];
#pragma unroll
    for (int u = 0; u < kPerThread; ++u) {
      const unsigned j = at + kWidth * (u * kThreads + threadIdx.x);
      position[u] = j;
      if (blocks) {
        const unsigned place = launch.block.Quotient(j);
        const int named = j < count ? table[place] : -1;
        const long long start = static_cast<long long>(named) * p.block;
        position[u] = named < 0 || start >= length ? 0xffffffffu : static_cast<unsigned>(start) + j - place * p.block;
      }
    }
#pragma unroll
    for (int u = 0; u < kPerThread; ++u) {
      const bool exists = position[u] < static_cast<unsigned>(length);
      const unsigned place = launch.page_size.Quotient(exists ? position[u] : 0);
      page[u] = exists && place < pages ? page_indices[place] : -1;
    }
    const int dummy = p.dummy_page * p.page_size * p.groups + group;
#pragma unroll
    for (int u = 0; u < kPerThread; ++u) {
      const bool valid = page[u] >= 0 && page[u] < p.num_pages;
      const unsigned in_page = position[u] - launch.page_size.Quotient(valid ? position[u] : 0) * p.page_size;
      const int index = (page[u] * p.page_size + static_cast<int>(in_page)) * p.groups + group;
      int values[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values[i] = valid && position[u] + i < static_cast<unsigned>(length) ? index + i * p.groups : dummy;
      }
      int* const to = tile + kWidth * (u * kThreads + threadIdx.x);
      if constexpr (kWidth == 4) {
        *reinterpret_cast<int4*>(to) = {values[0], values[1], values[2], values[3]};
      } else {
        *to = values[0];
      }
    }
  };

  fill_tile();
  int sum = 0;
  for (int i = threadIdx.x; i < request; i += kThreads) sum += RowLength(launch, Clamp(p.lengths[i], p.max_length));
  sum = __reduce_add_sync(kAllLanes, sum);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sums[warp];
  const int begin = sum * p.groups + group * static_cast<int>(count);
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    if (row == 0) p.indptr[0] = 0;
    p.indptr[row + 1] = begin + static_cast<int>(count);
    if (length != found && group == 0) {
      Report(p.reports, static_cast<int32_t>(Violation::Kind::kClamped), p.lengths_id, request, length, found);
    }
  }
  while (true) {
    int* const to = p.indices + begin + at;  // not aligned to more than an index
#pragma unroll
    for (int u = 0; u < kTile / kThreads; ++u) {
      const unsigned i = u * kThreads + threadIdx.x;
      if (at + i < count) to[i] = tile[i];
    }
    at += gridDim.y * kTile;
    if (at >= count) return;
    __syncthreads();  // before the tile is overwritten
    fill_tile();
    __syncthreads();
  }
}

}  // namespace

int SparseToCsrCuda(CUstream_st* stream, const SparseToCsrParams& params) {
  SparseToCsrLaunch launch = {.params = params,
                              .groups = MakeDivider(params.groups),
                              .block = MakeDivider(params.block),
                              .page_size = MakeDivider(params.page_size)};
  void* arguments[] = {&launch};
  const int tiles = (params.row_bound - 1) / kTile + 1;
  const dim3 grid(static_cast<unsigned>(params.rows), static_cast<unsigned>(tiles < kMaxTiles ? tiles : kMaxTiles));
  const bool wide = params.block % 4 == 0 && params.page_size % 4 == 0;
  const void* const kernel = wide ? reinterpret_cast<const void*>(&SparseToCsrKernel<4>)
                                  : reinterpret_cast<const void*>(&SparseToCsrKernel<1>);
  return cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, 0, stream);
}

}  // namespace pristine::attention
