// The tensor core prefill kernel (FlashAttention-2, arXiv:2307.08691), over mma.sync m16n8k16 (sm_80 and newer) or over
// wgmma (sm_90a alone).
//
// A block has kRows rows of one request and KV head, row = token * group + head of the group, so that heads share what
// is loaded of K and V (GQA packed on M). It walks the keys that any row attends in tiles of kKeys, copied by cp.async
// a tile ahead of their use; page numbers are read further ahead. Each warp keeps its rows' scores, probabilities and
// output in registers. Keys that are not there (before every window, behind the length, pages outside the pool) arrive
// as zeros and are masked. Late tiles, which see most keys, have the lowest block numbers.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_KERNEL_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_KERNEL_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "attention/kernels/paged_prefill_find.cuh"
#include "attention/kernels/soft_cap.cuh"
#include "attention/kernels/wgmma.cuh"

namespace pristine::attention {
namespace prefill {

constexpr int kOffsetBuffers = 3;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Which instructions multiply.
enum class Unit { kMma, kWgmma };

template <class T, class KV, int kHeadDim, Unit kUnit>
struct Tiling {
  static constexpr bool kConverts = !std::is_same_v<T, KV>;
  static constexpr int kWarps = kHeadDim == 256 ? 4 : 8;  // each with 16 rows
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTeam = kUnit == Unit::kWgmma ? 4 : 1;  // warps that multiply together
  static constexpr int kRows = kWarps * 16;
  // Of a multiprocessor, for the registers that a thread may have. mma.sync needs a few more than 128 at 128
  // dimensions.
  static constexpr int kBlocks = kUnit == Unit::kMma && kHeadDim == 128 ? 1 : 2;
  static constexpr int kKeys = kHeadDim == 256 ? 32 : 64;
  static constexpr int kRowBytes = kHeadDim * 2;                // of Q, K and V tiles
  static constexpr int kRawBytes = kHeadDim * int{sizeof(KV)};  // of a key in the pool
  static constexpr int kQBytes = kRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;  // of K, and of V
  static constexpr int kRawTileBytes = kKeys * kRawBytes;
  // Q; then two stages of K and V, or where they are converted one of K and V and one as they came.
  static constexpr int kOffsetsAt = kQBytes + (kConverts ? 2 * kTileBytes + 2 * kRawTileBytes : 4 * kTileBytes);
  static constexpr int kPagesAt = kOffsetsAt + kOffsetBuffers * kKeys * 8;
  static constexpr int kMissingAt = kPagesAt + 2 * kKeys * 4;
  static constexpr int kPositionsAt = kMissingAt + kOffsetBuffers * 2 * 4;
  static constexpr int kBlockAt = kPositionsAt + kRows * 4;
  static constexpr int kSharedBytes = kBlockAt + 48;
  static_assert(kSharedBytes <= kPrefillMmaSharedBytes, "two blocks share a multiprocessor, too");
};

// Where 16-byte chunk `chunk` of a row lies in a tile of kTileRows rows, for both units' reads without bank conflicts:
// blocks of 64 columns, one after the other, each with rows of 128 bytes whose chunks are swizzled by row % 8 (wgmma's
// 128-byte swizzle; tiles are aligned to 1024 bytes).
template <int kTileRows>
__device__ __forceinline__ constexpr int TileOffset(int row, int chunk) {
  return chunk / 8 * (kTileRows * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
// 16 bytes; zeros if `bytes` is 0.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void WaitForCopies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void LoadMatrices(uint32_t address, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}
__device__ __forceinline__ void LoadTransposed(uint32_t address, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

__device__ __forceinline__ void Multiply(Float16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void Multiply(BFloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// `low` goes to the lower address.
__device__ __forceinline__ uint32_t Pack(Float16, float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ uint32_t Pack(BFloat16, float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Probabilities of keys [16 * step, 16 * step + 16) as an A operand.
template <class T, int kCount>
__device__ __forceinline__ void PackProbabilities(T, const float (&p)[kCount][4], int step, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = Pack(T{}, p[step * 2 + i / 2][i % 2 * 2], p[step * 2 + i / 2][i % 2 * 2 + 1]);
  }
}
template <int kCount>
__device__ __forceinline__ void Clear(float (&values)[kCount][4]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) values[j][0] = values[j][1] = values[j][2] = values[j][3] = 0;
}

// Two e4m3 in the low half of `pair` as two T.
__device__ __forceinline__ uint32_t Widen(Float16, uint32_t pair) {
  uint32_t halves;
#if __CUDA_ARCH__ >= 890
  // volatile: moved into the main loop's products it costs spills.
  asm volatile("{ .reg .b16 low; cvt.u16.u32 low, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(halves) : "r"(pair));
#else
  const Float8E4M3 low = {static_cast<uint8_t>(pair)}, high = {static_cast<uint8_t>(pair >> 8)};
  halves = Pack(Float16{}, ToFloat(low), ToFloat(high));
#endif
  return halves;
}
__device__ __forceinline__ uint32_t Widen(BFloat16, uint32_t pair) {
#if __CUDA_ARCH__ >= 890
  float low, high;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(low), "=f"(high)
      : "r"(Widen(Float16{}, pair)));
  return Pack(BFloat16{}, low, high);
#else
  const Float8E4M3 low = {static_cast<uint8_t>(pair)}, high = {static_cast<uint8_t>(pair >> 8)};
  return Pack(BFloat16{}, ToFloat(low), ToFloat(high));
#endif
}

// What a block knows of its tile. In shared memory, because the main loop has no register to spare.
struct Block {
  int64_t first_page;   // into kv.pages
  int32_t first_row;    // of the request
  int32_t first_token;  // of the request, in the batch
  int32_t rows;         // of the tile
  int32_t kv_head;
  int32_t key_begin;  // a multiple of a tile of keys
  int32_t key_first;  // no row attends positions before this one; their pages may be anything
  int32_t key_end;    // nor from here on
  float scale;        // of scores, k_scale included
};
static_assert(sizeof(Block) <= 48);

// (token, head) of a row of the tile as its number in q, out and lse.
__device__ __forceinline__ int64_t PlaceOf(const PagedPrefillParams& p, const Block& block, int32_t row) {
  const uint32_t at = static_cast<uint32_t>(block.first_row + row);
  const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv.kv_heads), token = at / group;
  return (block.first_token + static_cast<int64_t>(token)) * p.q_heads + block.kv_head * group + (at - token * group);
}

// Starts to copy the page number of `position` to `to`.
__device__ __forceinline__ void CopyPage(const PagedKvView& kv, const Block& block, int32_t position, int32_t* to) {
  if (position < block.key_first || position >= block.key_end) return;
  const uint32_t page = static_cast<uint32_t>(position) / static_cast<uint32_t>(kv.page_size);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(to)),
               "l"(kv.pages + block.first_page + page));
}
// Elements from the start of the pool to `position`, which is in `page`; -1: nothing is there.
__device__ __forceinline__ int64_t OffsetOf(const PagedKvView& kv, const Block& block, int32_t position, int32_t page) {
  if (position < block.key_first || position >= block.key_end) return -1;
  if (page < 0 || page >= kv.num_pages) return -1;
  const uint32_t in_page = static_cast<uint32_t>(position) % static_cast<uint32_t>(kv.page_size);
  return page * kv.page_stride + static_cast<int64_t>(in_page) * kv.token_stride + block.kv_head * kv.head_stride;
}

template <class T, class KV, int kHeadDim, Unit kUnit>
__global__ void __launch_bounds__(Tiling<T, KV, kHeadDim, kUnit>::kThreads, Tiling<T, KV, kHeadDim, kUnit>::kBlocks)
    PagedPrefillKernel(const __grid_constant__ PagedPrefillParams p) {
  using Tiles = Tiling<T, KV, kHeadDim, kUnit>;
  constexpr int kThreads = Tiles::kThreads, kRows = Tiles::kRows;
  constexpr int kKeys = Tiles::kKeys, kRowBytes = Tiles::kRowBytes;
  constexpr int kTiles8 = kKeys / 8;  // of 8 keys
  extern __shared__ __align__(1024) unsigned char shared[];
  int64_t* const offsets = reinterpret_cast<int64_t*>(shared + Tiles::kOffsetsAt);      // [kOffsetBuffers][kKeys]
  uint32_t* const missing = reinterpret_cast<uint32_t*>(shared + Tiles::kMissingAt);    // [kOffsetBuffers][2]
  int32_t* const positions = reinterpret_cast<int32_t*>(shared + Tiles::kPositionsAt);  // [kRows]
  int32_t* const page_numbers = reinterpret_cast<int32_t*>(shared + Tiles::kPagesAt);   // [2][kKeys]
  Block& block = *reinterpret_cast<Block*>(shared + Tiles::kBlockAt);

  const int32_t thread = static_cast<int32_t>(threadIdx.x), lane = thread % 32;
  // `thread` again, so that what follows from it is computed where it is used instead of kept in registers.
  const auto thread_again = [thread] {
    int32_t again = thread;
    asm volatile("" : "+r"(again));
    return again;
  };
  constexpr int kChunks = kRowBytes / 16;  // of 16 bytes, of a row
  const uint32_t q_tile = SharedAddress(shared);
  {
    const int32_t group = p.q_heads / p.kv.kv_heads;
    const int64_t count = TileCount(p.tokens, p.requests, group, kRows);
    const int32_t kv_head = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(p.kv.kv_heads));
    const PrefillTile tile = FindTile(p, count - 1 - blockIdx.x / static_cast<unsigned>(p.kv.kv_heads), group, kRows);
    if (static_cast<int64_t>(tile.tile) * kRows >= static_cast<int64_t>(tile.qo_len) * group) return;
    const int32_t first_row = tile.tile * kRows;  // tokens * q_heads < 2^31
    const int32_t rows = min(tile.qo_len * group - first_row, kRows);
    Block here = {.first_page = 0,
                  .first_row = first_row,
                  .first_token = tile.first,
                  .rows = rows,
                  .kv_head = kv_head,
                  .key_begin = 0,
                  .key_first = 0,
                  .key_end = 0,
                  .scale = p.kv.k_scale == nullptr ? p.scale : p.scale * *p.kv.k_scale};
    const int32_t chunk = thread % kChunks;
    constexpr int kPass = kThreads / kChunks;
    if (tile.request == p.requests) {  // padded tokens
      for (int32_t row = thread / kChunks; row < rows; row += kPass) {
        const int64_t place = PlaceOf(p, here, row);
        *reinterpret_cast<uint4*>(static_cast<char*>(p.out) + place * kRowBytes + chunk * 16) = make_uint4(0, 0, 0, 0);
        if (p.lse != nullptr && chunk == 0) p.lse[place] = -INFINITY;
      }
      return;
    }
    // Rows behind the last are copies of it, and not stored.
    for (int32_t row = thread / kChunks; row < kRows; row += kPass) {
      const int64_t place = PlaceOf(p, here, min(row, rows - 1));
      CopyAsync(q_tile + TileOffset<kRows>(row, chunk), static_cast<const char*>(p.q) + place * kRowBytes + chunk * 16,
                16);
    }
    const RowPages pages = PagesOf(p.kv, tile.request);
    const int32_t length = static_cast<int32_t>(min(pages.length, static_cast<int64_t>(INT32_MAX)));
    const auto position_of = [&](int32_t row) {
      return length - tile.qo_len +
             static_cast<int32_t>(static_cast<uint32_t>(first_row + min(row, rows - 1)) / static_cast<uint32_t>(group));
    };
    if (thread < kRows) positions[thread] = position_of(thread);
    here.first_page = pages.first;
    here.key_end = max(0, position_of(rows - 1) + 1);  // <= length
    if (p.window > 0 && position_of(0) >= p.window) here.key_first = position_of(0) + 1 - p.window;
    here.key_begin = here.key_first / kKeys * kKeys;
    // Masked scores are -inf, which a scale of 0 (of underflow, too) would make NaN.
    if (here.scale == 0) here.scale = 1.2e-38f;
    if (thread == 0) block = here;
  }
  __syncthreads();
  const int32_t warp_row = thread / 32 * 16;  // the warp's; a thread has rows lane / 4 and lane / 4 + 8 of them
  const int32_t team_row = warp_row / (Tiles::kTeam * 16) * (Tiles::kTeam * 16);
  const bool team_works = team_row < block.rows;
  const int32_t tiles = (block.key_end - block.key_begin + kKeys - 1) / kKeys;

  // What a tile takes until it is there: its page numbers, then its offsets from them, then its keys and values.
  const auto copy_pages = [&](int32_t t) {
    const int32_t self = thread_again();
    if (self < kKeys) {
      CopyPage(p.kv, block, block.key_begin + t * kKeys + self, page_numbers + (t & 1) * kKeys + self);
    }
  };
  const auto find_offsets = [&](int32_t t) {
    const int32_t self = thread_again();
    const int32_t buffer = t % kOffsetBuffers;
    if (self < kKeys) {
      const int64_t offset =
          OffsetOf(p.kv, block, block.key_begin + t * kKeys + self, page_numbers[(t & 1) * kKeys + self]);
      offsets[buffer * kKeys + self] = offset;
      const bool any = __any_sync(kAllLanes, offset < 0) != 0;
      if (self % 32 == 0) missing[buffer * 2 + self / 32] = any ? 1u : 0u;
    }
  };
  const uint32_t k_at = q_tile + Tiles::kQBytes;
  const uint32_t raw_at = k_at + 2 * Tiles::kTileBytes;
  const auto copy_tile = [&](int32_t t) {
    const int32_t self = thread_again();
    constexpr int kRawChunks = Tiles::kRawBytes / 16;
    constexpr int kRawPass = kThreads / kRawChunks;
    const int32_t raw_chunk = self % kRawChunks;
    const int64_t* const tile_offsets = offsets + t % kOffsetBuffers * kKeys;
    const uint32_t k_to = Tiles::kConverts ? raw_at : k_at + static_cast<uint32_t>(t & 1) * 2 * Tiles::kTileBytes;
#pragma unroll
    for (int key = 0; key < kKeys; key += kRawPass) {
      const int32_t row = key + self / kRawChunks;
      const int64_t offset = tile_offsets[row];
      const int64_t from = (offset < 0 ? 0 : offset) * int64_t{sizeof(KV)} + raw_chunk * 16;
      const int bytes = offset < 0 ? 0 : 16;
      const uint32_t to =
          k_to + (Tiles::kConverts ? row * Tiles::kRawBytes + raw_chunk * 16 : TileOffset<kKeys>(row, raw_chunk));
      CopyAsync(to, static_cast<const char*>(p.kv.k) + from, bytes);
      CopyAsync(to + Tiles::kRawTileBytes, static_cast<const char*>(p.kv.v) + from, bytes);
    }
  };
  // Raw K and V of a tile become T.
  const auto convert_tile = [&] {
    const uint4* const raw = reinterpret_cast<const uint4*>(shared + Tiles::kQBytes + 2 * Tiles::kTileBytes);
    constexpr int kRawChunks = Tiles::kRawBytes / 16;
    for (int32_t i = thread_again(); i < 2 * kKeys * kRawChunks; i += kThreads) {
      const uint4 from = raw[i];
      const int32_t row = i / kRawChunks, to_chunk = i % kRawChunks * 2;
      unsigned char* const to = shared + Tiles::kQBytes + row / kKeys * Tiles::kTileBytes;
      *reinterpret_cast<uint4*>(to + TileOffset<kKeys>(row % kKeys, to_chunk)) =
          make_uint4(Widen(T{}, from.x), Widen(T{}, from.x >> 16), Widen(T{}, from.y), Widen(T{}, from.y >> 16));
      *reinterpret_cast<uint4*>(to + TileOffset<kKeys>(row % kKeys, to_chunk + 1)) =
          make_uint4(Widen(T{}, from.z), Widen(T{}, from.z >> 16), Widen(T{}, from.w), Widen(T{}, from.w >> 16));
    }
  };

  const bool caps = p.soft_cap > 0;
  float out[kHeadDim / 8][4] = {};
  float top[2] = {-INFINITY, -INFINITY}, mass[2] = {};  // top before score_scale

  copy_pages(0);
  copy_pages(1);
  CommitCopies();
  WaitForCopies();
  find_offsets(0);
  find_offsets(1);
  copy_pages(2);
  __syncthreads();
  if (tiles > 0) copy_tile(0);
  CommitCopies();

  for (int32_t t = 0; t < tiles; ++t) {
    WaitForCopies();
    if constexpr (kUnit == Unit::kWgmma && !Tiles::kConverts) PublishShared();
    __syncthreads();  // tile t is there, and nobody reads tile t - 1 any more
    if constexpr (Tiles::kConverts) {
      convert_tile();
      if constexpr (kUnit == Unit::kWgmma) PublishShared();
      __syncthreads();
    }
    if (t + 1 < tiles) copy_tile(t + 1);
    find_offsets(t + 2);
    copy_pages(t + 3);
    CommitCopies();

    const int32_t begin = block.key_begin + t * kKeys;
    const int32_t lowest = positions[team_row];
    const int32_t highest = positions[team_row + Tiles::kTeam * 16 - 1];
    if (team_works && begin <= highest && (p.window == 0 || lowest - begin - (kKeys - 1) < p.window)) {
      const uint32_t k_tile = k_at + (Tiles::kConverts ? 0u : static_cast<uint32_t>(t & 1) * 2 * Tiles::kTileBytes);
      const uint32_t v_tile = k_tile + Tiles::kTileBytes;
      float scores[kTiles8][4];
      if constexpr (kUnit == Unit::kWgmma) {
        FenceRegisters(scores);
        BeginProducts();
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
          MultiplyShared(T{}, scores, Rows(q_tile + TileOffset<kRows>(team_row, step % 4 * 2) + step / 4 * kRows * 128),
                         Rows(k_tile + TileOffset<kKeys>(0, step * 2)), step > 0);
        }
        EndProducts();
        FenceRegisters(scores);
      } else {
        Clear(scores);
        // Lane l addresses row l % 8 of matrix l / 8 of an ldmatrix.
        const int32_t self = thread_again(), row = self % 8, odd = self / 8 % 2, high = self / 16 % 2;
        const uint32_t q_rows = q_tile + TileOffset<kRows>(self / 32 * 16 + odd * 8 + row, high);
        const uint32_t k_rows = k_tile + TileOffset<kKeys>(high * 8 + row, odd);
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
          const uint32_t turn = step % 4 * 32;
          uint32_t a[4];
          LoadMatrices((q_rows ^ turn) + step / 4 * (kRows * 128), a);
#pragma unroll
          for (int j = 0; j < kTiles8; j += 2) {
            uint32_t b[4];
            LoadMatrices((k_rows ^ turn) + step / 4 * (kKeys * 128) + j * 8 * 128, b);
            Multiply(T{}, scores[j], a, b[0], b[1]);
            Multiply(T{}, scores[j + 1], a, b[2], b[3]);
          }
        }
      }

      if (caps) {
        const float cap = p.soft_cap * kLog2E, rate = kTanhRate * block.scale / p.soft_cap;
#pragma unroll
        for (int j = 0; j < kTiles8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) scores[j][e] = SoftCap(scores[j][e], cap, rate);
        }
      }
      const int32_t buffer = t % kOffsetBuffers;
      if (begin + kKeys - 1 > lowest || (p.window > 0 && highest - begin >= p.window) ||
          (missing[buffer * 2] | (kKeys > 32 ? missing[buffer * 2 + 1] : 0u)) != 0) {
        const int32_t self = thread_again();
#pragma unroll
        for (int j = 0; j < kTiles8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int32_t column = j * 8 + self % 4 * 2 + e % 2, key = begin + column;
            const bool there = offsets[buffer * kKeys + column] >= 0;
            const int32_t at = positions[self / 32 * 16 + e / 2 * 8 + self % 32 / 4];
            if (!there || key > at || (p.window > 0 && at - key >= p.window)) scores[j][e] = -INFINITY;
          }
        }
      }

      const float score_scale = caps ? 1.0f : block.scale * kLog2E;  // what brings scores to base 2
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float new_top = top[half];
#pragma unroll
        for (int j = 0; j < kTiles8; ++j) {
          new_top = fmaxf(new_top, fmaxf(scores[j][half * 2], scores[j][half * 2 + 1]));
        }
        new_top = fmaxf(new_top, __shfl_xor_sync(kAllLanes, new_top, 1));
        new_top = fmaxf(new_top, __shfl_xor_sync(kAllLanes, new_top, 2));
        const float shift = new_top == -INFINITY ? 0.0f : new_top * score_scale;
        const float decay = Exp2(top[half] * score_scale - shift);
        top[half] = new_top;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kTiles8; ++j) {
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            scores[j][e] = Exp2(scores[j][e] * score_scale - shift);
            sum += scores[j][e];
          }
        }
        mass[half] = mass[half] * decay + sum;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          out[j][half * 2] *= decay;
          out[j][half * 2 + 1] *= decay;
        }
      }

      if constexpr (kUnit == Unit::kWgmma) {
        uint32_t a[kKeys / 16][4];
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) PackProbabilities(T{}, scores, step, a[step]);
        FenceRegisters(out);
        BeginProducts();
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
          MultiplyRegisters(T{}, out, a[step], Columns(v_tile + step * 16 * 128, kKeys * 128));
        }
        EndProducts();
        FenceRegisters(out);
      } else {
        const int32_t self = thread_again(), row = self % 8, odd = self / 8 % 2, high = self / 16 % 2;
        const uint32_t v_rows = v_tile + TileOffset<kKeys>(odd * 8 + row, high);
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
          uint32_t a[4];
          PackProbabilities(T{}, scores, step, a);
#pragma unroll
          for (int j = 0; j < kHeadDim / 8; j += 2) {
            uint32_t b[4];
            LoadTransposed((v_rows ^ (j % 8 * 16)) + j / 8 * (kKeys * 128) + step * 16 * 128, b);
            Multiply(T{}, out[j], a, b[0], b[1]);
            Multiply(T{}, out[j + 1], a, b[2], b[3]);
          }
        }
      }
    }
  }
  WaitForCopies();
  __syncthreads();  // Q is there, and no longer read
  if (warp_row >= block.rows) return;

  const int32_t rows = block.rows;
  // Each warp writes its rows over its rows of Q, and copies them out by whole chunks.
  const float v_scale = p.kv.v_scale == nullptr ? 1.0f : *p.kv.v_scale;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t row = warp_row + half * 8 + lane / 4;
    float total = mass[half];
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    const bool empty = total == 0;
    const float score_scale = caps ? 1.0f : block.scale * kLog2E;
    float peak = top[half] * score_scale, factor = 1.0f;
    const int64_t place = PlaceOf(p, block, min(row, rows - 1));
    if (!empty && p.sinks != nullptr) {
      const float sink = p.sinks[place % p.q_heads] * kLog2E, higher = fmaxf(peak, sink);
      factor = Exp2(peak - higher);
      total = total * factor + Exp2(sink - higher);
      peak = higher;
    }
    factor = empty ? 0.0f : factor * v_scale / total;
    if (p.lse != nullptr && row < rows && lane % 4 == 0) p.lse[place] = empty ? -INFINITY : peak + log2f(total);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<uint32_t*>(shared + TileOffset<kRows>(row, j) + lane % 4 * 4) =
          Pack(T{}, out[j][half * 2] * factor, out[j][half * 2 + 1] * factor);
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int32_t i = lane; i < 16 * kChunks; i += 32) {
    const int32_t row = warp_row + i / kChunks, at = i % kChunks;
    if (row >= rows) break;
    *reinterpret_cast<uint4*>(static_cast<char*>(p.out) + PlaceOf(p, block, row) * kRowBytes + at * 16) =
        *reinterpret_cast<const uint4*>(shared + TileOffset<kRows>(row, at));
  }
}

}  // namespace prefill

template <class T, class KV, int kHeadDim, prefill::Unit kUnit>
int LaunchPagedPrefill(CUstream_st* stream, const PagedPrefillParams& params) {
  using Tiles = prefill::Tiling<T, KV, kHeadDim, kUnit>;
  void* arguments[] = {const_cast<PagedPrefillParams*>(&params)};
  const int64_t tiles = TileCount(params.tokens, params.requests, params.q_heads / params.kv.kv_heads, Tiles::kRows);
  return cudaLaunchKernel(reinterpret_cast<const void*>(&prefill::PagedPrefillKernel<T, KV, kHeadDim, kUnit>),
                          dim3(static_cast<unsigned>(tiles * params.kv.kv_heads)), dim3(Tiles::kThreads), arguments,
                          Tiles::kSharedBytes, stream);
}
template <class T, class KV, int kHeadDim, prefill::Unit kUnit>
int PreparePagedPrefill() {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(&prefill::PagedPrefillKernel<T, KV, kHeadDim, kUnit>),
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              prefill::Tiling<T, KV, kHeadDim, kUnit>::kSharedBytes);
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_KERNEL_CUH_
