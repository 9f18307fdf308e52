// Decode on tensor cores. The query heads of a KV head, times the query tokens, are the rows of the products ("GQA
// packed on M"), so K and V are read once for all of them. Each of a block's four warps streams 16 tokens of every
// 64-token tile through its own ring of cp.async stages: no barrier but a warp's own while a piece is worked on.
// Here are the kernel and its launcher; the work is in paged_decode_{schedule,tiles,merge,block}.cuh.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_MMA_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_MMA_CUH_

#include <cuda_runtime.h>

#include "attention/kernels/dependent_launch.cuh"
#include "attention/kernels/paged_decode.h"
#include "attention/kernels/paged_decode_block.cuh"
#include "attention/kernels/paged_decode_schedule.cuh"

namespace pristine::attention {
namespace decode_mma {

// Must not spill (cmake/hot_kernels.txt).
template <class T, class Kv, int kHeadDim, int kMTiles>
__global__ void __launch_bounds__(kThreads, DecodeBlocksPerMultiprocessor(kHeadDim))
    PagedDecodeMma(const __grid_constant__ DecodeLaunch launch) {
  extern __shared__ __align__(128) unsigned char shared[];
  Block<T, Kv, kHeadDim, kMTiles>(launch, shared).Run();
}

template <class T, class Kv, int kHeadDim, int kMTiles>
int LaunchMma(CUstream_st* stream, const PagedDecodeParams& params) {
  using S = Shape<Kv, kHeadDim, kMTiles>;
  const int group = params.q_heads / params.kv.kv_heads;
  const int passes = (group * params.q_len + S::kRows - 1) / S::kRows;
  const int units = params.kv.kv_heads * passes;
  const DecodeLaunch launch = {.p = params,
                               .group = group,
                               .rows = group * params.q_len,
                               .passes = passes,
                               .units = units,
                               .by_group = MakeDivider(group),
                               .by_passes = MakeDivider(passes),
                               .by_units = MakeDivider(units),
                               .by_page = MakeDivider(params.kv.page_size)};
  const bool planned = params.plan != nullptr;
  const dim3 grid(static_cast<unsigned>(planned ? params.max_items : params.blocks),
                  static_cast<unsigned>(planned ? units : 1));
  return LaunchDependent(stream, PagedDecodeMma<T, Kv, kHeadDim, kMTiles>, grid, dim3(kThreads),
                         SharedBytes<S>(planned ? 0 : params.rows), launch);
}

template <class T, class Kv, int kHeadDim, int kMTiles>
int PrepareMma(bool* begins_early) {
  static_assert(SharedBytes<Shape<Kv, kHeadDim, kMTiles>>(512) * DecodeBlocksPerMultiprocessor(kHeadDim) <= 227 * 1024,
                "what a multiprocessor of sm_90 has");
  static_assert(SharedBytes<Shape<Kv, kHeadDim, kMTiles>>(DecodeMaxRows(kHeadDim)) <= DecodeMmaSharedBytes(kHeadDim));
  const auto kernel = PagedDecodeMma<T, Kv, kHeadDim, kMTiles>;
  const int error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  *begins_early = CodeWaits();
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, DecodeMmaSharedBytes(kHeadDim));
}

}  // namespace decode_mma

// Two m-tiles where a pass has more rows than one, and registers for them. Where there is little to do it is sooner
// done in twice as many passes of one: they are merged in half the time, and the L2 cache hides that K and V are read
// twice.
template <class T, class Kv, int kHeadDim>
int PagedDecodeCuda(CUstream_st* stream, const PagedDecodeParams& params) {
  if constexpr (kHeadDim <= 128) {
    const int packed = params.q_heads / params.kv.kv_heads * params.q_len;
    if (packed > 16) {
      const int64_t tiles = int64_t{params.row_tokens} / 64 * params.rows * params.kv.kv_heads;
      const bool few = params.row_tokens > 0 && tiles <= int64_t{decode_mma::kFewTiles} * params.blocks;
      if (params.plan != nullptr || packed > 32 || !few) {
        return decode_mma::LaunchMma<T, Kv, kHeadDim, 2>(stream, params);
      }
      PagedDecodeParams twice = params;
      twice.most_tiles = params.most_tiles / 2;  // a row's tiles are counted once for each pass
      return decode_mma::LaunchMma<T, Kv, kHeadDim, 1>(stream, twice);
    }
  }
  return decode_mma::LaunchMma<T, Kv, kHeadDim, 1>(stream, params);
}

template <class T, class Kv, int kHeadDim>
int PagedDecodePrepare(bool* begins_early) {
  if constexpr (kHeadDim <= 128) {
    if (const int error = decode_mma::PrepareMma<T, Kv, kHeadDim, 2>(begins_early); error != cudaSuccess) return error;
  }
  return decode_mma::PrepareMma<T, Kv, kHeadDim, 1>(begins_early);
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_DECODE_MMA_CUH_
