// One kernel: each block sums up the rows ahead of its own, which costs less than a second launch that reads the sums.
#include <cuda_runtime.h>

#include "attention/kernels/divider.h"
#include "attention/kernels/sparse_to_csr.h"
#include "pristine/buffers/violation.h"

namespace pristine::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kLargeTile = 8192;        // indices of a block, where there are many
constexpr long long kManyBlocks = 512;  // of small tiles
constexpr int kMaxTiles = 1024;         // blocks per row; longer rows are strided over
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr unsigned kNowhere = 0xffffffffu;

// How a thread makes indices: kWidth in a row from one entry of the block table, kBatch times with all loads in flight.
enum class Pages {
  kShared,  // block and page_size are multiples of 4: four indices share a page
  kTokens,  // page_size is 1, block a multiple of 4
  kAny,
};
template <Pages kPages>
constexpr int kWidth = kPages == Pages::kAny ? 1 : 4;
template <Pages kPages>
constexpr int kBatch = kPages == Pages::kShared ? 4 : 8 / kWidth<kPages>;
template <Pages kPages>
constexpr int kSmallTile = kThreads* kWidth<kPages>* kBatch<kPages>;

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

// Grid: (rows, tiles per row), a function of the bucket alone: tiles past the row's length have nothing to do.
template <Pages kPages, int kTile>
__global__ void __launch_bounds__(kThreads) SparseToCsrKernel(const __grid_constant__ SparseToCsrLaunch launch) {
  constexpr int kRun = kWidth<kPages>, kRuns = kBatch<kPages>;
  __shared__ int warp_sums[kThreads / 32];
  __shared__ int tile[kTile];
  const SparseToCsrParams& p = launch.params;
  const int row = blockIdx.x;
  const int request = static_cast<int>(launch.groups.Quotient(row));
  const int group = row - request * p.groups;
  int ahead = static_cast<int>(threadIdx.x) < request ? p.lengths[threadIdx.x] : 0;
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
  const bool attends_blocks = AttendsBlocks(p, length);
  const unsigned blocks = length == 0 ? 0 : launch.block.Quotient(length - 1) + 1;
  const int dummy = p.dummy_page * p.page_size * p.groups + group;
  // Loads of a batch go out together, first those of the table, then those of the pages. They are made whether needed
  // or not: a load behind a branch would wait for the one before it.
  const auto fill_batch = [&](unsigned start, int* to) {
    unsigned position[kRuns];  // kNowhere: does not exist
    if (attends_blocks) {
      int named[kRuns];
#pragma unroll
      for (int u = 0; u < kRuns; ++u) {
        const unsigned j = start + kRun * (u * kThreads + threadIdx.x);
        named[u] = table[launch.block.Quotient(j < count ? j : 0)];
      }
#pragma unroll
      for (int u = 0; u < kRuns; ++u) {
        const unsigned j = start + kRun * (u * kThreads + threadIdx.x);
        const unsigned block = static_cast<unsigned>(named[u]);
        position[u] = j < count && block < blocks ? (block - launch.block.Quotient(j)) * p.block + j : kNowhere;
      }
    } else {
#pragma unroll
      for (int u = 0; u < kRuns; ++u) position[u] = start + kRun * (u * kThreads + threadIdx.x);
    }
    int values[kRuns][kRun];
    if constexpr (kPages == Pages::kTokens) {
      const unsigned end = min(static_cast<unsigned>(length), pages);
#pragma unroll
      for (int u = 0; u < kRuns; ++u) {
        const unsigned exist = position[u] < end ? end - position[u] : 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          values[u][i] = page_indices[static_cast<unsigned>(i) < exist ? position[u] + i : 0];
        }
      }
#pragma unroll
      for (int u = 0; u < kRuns; ++u) {
        const unsigned exist = position[u] < end ? end - position[u] : 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const unsigned page = static_cast<unsigned>(values[u][i]);
          const bool valid = static_cast<unsigned>(i) < exist && page < static_cast<unsigned>(p.num_pages);
          values[u][i] = valid ? static_cast<int>(page) * p.groups + group : dummy;
        }
      }
    } else {
      int page[kRuns];
      unsigned place[kRuns];
#pragma unroll
      for (int u = 0; u < kRuns; ++u) {
        place[u] = launch.page_size.Quotient(position[u] < static_cast<unsigned>(length) ? position[u] : 0);
        page[u] = page_indices[place[u] < pages ? place[u] : 0];
      }
#pragma unroll
      for (int u = 0; u < kRuns; ++u) {
        const bool valid = position[u] < static_cast<unsigned>(length) && place[u] < pages &&
                           static_cast<unsigned>(page[u]) < static_cast<unsigned>(p.num_pages);
        const unsigned exist = valid ? length - position[u] : 0;
        const int in_page = static_cast<int>(position[u] - place[u] * p.page_size);
        const int index = (page[u] * p.page_size + in_page) * p.groups + group;
#pragma unroll
        for (int i = 0; i < kRun; ++i) values[u][i] = static_cast<unsigned>(i) < exist ? index + i * p.groups : dummy;
      }
    }
#pragma unroll
    for (int u = 0; u < kRuns; ++u) {
      int* const run = to + kRun * (u * kThreads + threadIdx.x);
      if constexpr (kRun == 4) {
        *reinterpret_cast<int4*>(run) = {values[u][0], values[u][1], values[u][2], values[u][3]};
      } else {
        *run = values[u][0];
      }
    }
  };
  const auto fill_tile = [&] {
#pragma unroll 1
    for (unsigned i = 0; i < kTile && at + i < count; i += kSmallTile<kPages>) fill_batch(at + i, tile + i);
  };

  fill_tile();
  int sum = 0;
  for (int i = threadIdx.x; i < request; i += kThreads) {
    sum += RowLength(launch, Clamp(ahead, p.max_length));
    if (i + kThreads < request) ahead = p.lengths[i + kThreads];
  }
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
    if (count - at >= kTile) {
#pragma unroll
      for (int i = 0; i < kTile; i += kThreads) to[i + threadIdx.x] = tile[i + threadIdx.x];
    } else {
#pragma unroll
      for (int i = 0; i < kTile; i += kThreads) {
        if (i + threadIdx.x < count - at) to[i + threadIdx.x] = tile[i + threadIdx.x];
      }
    }
    at += gridDim.y * kTile;
    if (at >= count) return;
    __syncthreads();  // before the tile is overwritten
    fill_tile();
    __syncthreads();
  }
}

template <Pages kPages>
int LaunchCsr(CUstream_st* stream, const SparseToCsrParams& params) {
  SparseToCsrLaunch launch = {.params = params,
                              .groups = MakeDivider(params.groups),
                              .block = MakeDivider(params.block),
                              .page_size = MakeDivider(params.page_size)};
  void* arguments[] = {&launch};
  const auto tiles = [&](int tile) { return (params.row_bound - 1) / tile + 1; };
  // Few rows are spread over many blocks; of many, each block does more for what it must find out first.
  const int small_tiles = tiles(kSmallTile<kPages>);
  const bool large = small_tiles > 1 && static_cast<long long>(params.rows) * small_tiles > kManyBlocks;
  const void* const kernel = large ? reinterpret_cast<const void*>(&SparseToCsrKernel<kPages, kLargeTile>)
                                   : reinterpret_cast<const void*>(&SparseToCsrKernel<kPages, kSmallTile<kPages>>);
  const int per_row = large ? tiles(kLargeTile) : small_tiles;
  const dim3 grid(static_cast<unsigned>(params.rows), static_cast<unsigned>(per_row < kMaxTiles ? per_row : kMaxTiles));
  return cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, 0, stream);
}

}  // namespace

int SparseToCsrCuda(CUstream_st* stream, const SparseToCsrParams& params) {
  if (params.block % 4 == 0 && params.page_size % 4 == 0) return LaunchCsr<Pages::kShared>(stream, params);
  if (params.block % 4 == 0 && params.page_size == 1) return LaunchCsr<Pages::kTokens>(stream, params);
  return LaunchCsr<Pages::kAny>(stream, params);
}

}  // namespace pristine::attention
