// The states of one head, chunk after chunk, and with them the output: what the consumer warpgroups of both state
// kernels do. Each keeps 64 rows of the state, [V, K], in float32 accumulators. All products are transposed, so that
// what one product leaves in registers is the next one's left operand and nothing but inputs passes through shared
// memory:
//   X^T = V^T - (S K^T) diag(exp G)      U^T = X^T (T diag(beta))^T
//   O^T = scale (S Q^T) diag(exp G) + U^T P^T
//   S   = exp(G_last) S + (U^T diag(exp(G_last - G))) K
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_STATES_DEVICE_CUH_
#define PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_STATES_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/prefill.h"
#include "attention/gdn/kernels/prefill_device.cuh"

namespace pristine::attention::gdn {

inline constexpr int kGroup = 128;  // threads of a warpgroup
inline constexpr int kStages = kPrefillStages;
inline constexpr int kTile = 64 * 128;  // bytes of 64 rows of 64 bfloat16, 128-byte swizzle

// One chunk in shared memory. Each part starts at a multiple of 1024 bytes, for the swizzle.
template <int kGroups>
struct Tiles {
  unsigned char k[2][kTile];  // [K / 64], rows are tokens
  unsigned char q[2][kTile];
  unsigned char v[kGroups][kTile];  // of each consumer; then its output
};
struct RecordTile : ChunkRecord {
  unsigned char padding[-static_cast<int>(sizeof(ChunkRecord)) & 1023];
};
static_assert(sizeof(Tiles<1>) % 1024 == 0 && sizeof(RecordTile) % 1024 == 0);

#ifdef PRISTINE_GDN_PREFILL

__device__ inline void InitBarrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(count) : "memory");
}
__device__ inline void Arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
// Arrives for the thread when all its copies so far are there. Who waits and has the tensor cores read what they
// brought fences first.
__device__ inline void ArriveWithCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
__device__ inline void FenceProxies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void ArriveExpecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(bytes)
               : "memory");
}
__device__ inline void Wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}
__device__ inline void CopyBulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   SharedAddress(to)),
               "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
               : "memory");
}

// Registers that wgmma reads or writes are ready.
__device__ inline void FenceRegisters() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// A tile's descriptor: 128-byte swizzle, 1024 bytes from eight rows to the next eight, kTile from 64 columns to the
// next.
__device__ inline uint64_t Descriptor(const void* tile) {
  return static_cast<uint64_t>((SharedAddress(tile) & 0x3ffff) >> 4) | static_cast<uint64_t>(kTile >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62;
}
// A descriptor `bytes` further on.
__device__ inline uint64_t Advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// d (64 x 64) = a b^T + (accumulate ? d : 0), both 64 x 16 in shared memory.
__device__ __forceinline__ void Multiply64Shared(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
// d (64 x 64) = a (64 x 16, registers) b (16 x 64, shared memory) + (accumulate ? d : 0).
__device__ __forceinline__ void Multiply64(float (&d)[32], const uint32_t* a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
// d (64 x 128) = a (64 x 16, registers) b (16 x 128, shared memory) + (accumulate ? d : 0).
__device__ __forceinline__ void Multiply128Transposed(float (&d)[64], const uint32_t* a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

// Accumulators of eight columns are two registers of a left operand.
template <int kSize>
__device__ __forceinline__ void PackAll(const float (&from)[kSize], uint32_t (&to)[kSize / 2]) {
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) to[i] = Pack(from[2 * i], from[2 * i + 1]);
}

__device__ inline float2 LoadPair(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ inline float2 LoadPair(const __nv_bfloat16* from) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
}
__device__ inline void StorePair(float* to, float2 pair) { *reinterpret_cast<float2*>(to) = pair; }
__device__ inline void StorePair(__nv_bfloat16* to, float2 pair) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __float22bfloat162_rn(pair);
}

// The thread's part of a head's state: rows lane / 4 and 8 below, of the warp's 16.
template <class State, class F>
__device__ __forceinline__ void ForStatePairs(State* head_state, int row, int lane, const F& each) {
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      each(head_state + (row + half * 8) * kDim + n * 8 + lane % 4 * 2, n * 4 + half * 2);
    }
  }
}

// The output of a chunk from V's place in shared memory, by the threads of one warpgroup: `valid` tokens from `token`
// on, columns from first_v on. Each thread reads the words that it fills with the next chunk's.
template <int kGroups>
__device__ __forceinline__ void StoreOutput(const PrefillParams& p, const Tiles<kGroups>& tiles, int64_t token,
                                            int valid, int head, int first_v, int tid) {
  constexpr int kWords = kGroups * 8, kRows = kGroup / kWords;
  const int word = tid % kWords;
  auto* const to = static_cast<__nv_bfloat16*>(p.out) + (token * p.v_heads + head) * kDim + first_v + word * 8;
#pragma unroll 4
  for (int i = 0; i < kChunk / kRows; ++i) {
    const int row = i * kRows + tid / kWords;
    const uint4 values = *reinterpret_cast<const uint4*>(tiles.v[word / 8] + row * 128 + ((word % 8 ^ (row & 7)) << 4));
    if (row < valid) *reinterpret_cast<uint4*>(to + int64_t{row} * p.v_heads * kDim) = values;
  }
}

template <int kGroups, class State, class Shared>
__device__ void Consume(const PrefillParams& p, Shared& shared, const PrefillSpan& span, int32_t sequence, int head,
                        int first_v) {
  const int group = static_cast<int>(threadIdx.x) / kGroup, warp = static_cast<int>(threadIdx.x) % kGroup / 32;
  int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = first_v + group * 64 + warp * 16 + lane / 4;  // of V
  float s[64];
  {
    int32_t slot = p.initial_slots[sequence];
    if (slot < 0 || slot >= p.slots) slot = p.clamp_to_zero ? 0 : -1;
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = 0;
    if (slot >= 0) {
      const State* const from =
          static_cast<const State*>(p.states) + slot * p.slot_stride + int64_t{head} * kDim * kDim;
      ForStatePairs(from, row, lane, [&](const State* at, int i) {
        const float2 pair = LoadPair(at);
        s[i] = pair.x;
        s[i + 1] = pair.y;
      });
    }
  }
  for (int c = 0; c < span.chunks; ++c) {
    // Not known to be the same in each round: addresses would be kept in registers that there are not.
    asm volatile("" : "+r"(lane));
    // Of this lane's row in a matrix of eight tokens by eight of V, in the warp's 16 columns of its V tile.
    const int tile_row = lane / 16 * 8 + lane % 8;
    const uint32_t tile_offset = tile_row * 128 + (((warp * 2 + lane / 8 % 2) ^ (lane % 8)) << 4);
    const int st = c % kStages;
    Tiles<kGroups>& tiles = shared.tiles[st];
    const ChunkRecord& record = shared.records[c % Shared::kRecords];
    const uint64_t k_tile = Descriptor(tiles.k), q_tile = Descriptor(tiles.q);
    uint32_t state[32];
    PackAll(s, state);
    Wait(&shared.full[st], c / kStages & 1);
    if constexpr (kGroups == 1) FenceProxies();  // else those did who computed T and P

    float x[32], o[32];
    FenceRegisters();
#pragma unroll
    for (int i = 0; i < 8; ++i) Multiply64(x, state + 4 * i, Advance(k_tile, i / 4 * kTile + i % 4 * 32), i > 0);
    CommitProducts();
#pragma unroll
    for (int i = 0; i < 8; ++i) Multiply64(o, state + 4 * i, Advance(q_tile, i / 4 * kTile + i % 4 * 32), i > 0);
    CommitProducts();

    const uint32_t v_tile = SharedAddress(tiles.v[group]) + tile_offset;
    WaitForProducts<kGroups == 2 ? 0 : 1>();  // two have no registers for products and more
    uint32_t left[16];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t v[4];
      LoadMatricesTransposed(v, v_tile + i * 2048);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 value = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v[j]));
        const float2 exp_g = LoadPair(&record.exp_g[i * 16 + j / 2 * 8 + lane % 4 * 2]);
        const int at = i * 8 + j * 2;
        left[i * 4 + j] = Pack(value.x - exp_g.x * x[at], value.y - exp_g.y * x[at + 1]);
      }
    }
    float u[32];
    FenceRegisters();
#pragma unroll
    for (int i = 0; i < 4; ++i) Multiply64(u, left + 4 * i, Advance(Descriptor(record.t), i * 32), i > 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) Multiply64(u, left + 4 * i, Advance(Descriptor(record.t_low), i * 32), true);
    CommitProducts();
    if constexpr (kGroups == 1) WaitForProducts<1>();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 exp_g = LoadPair(&record.exp_g[n * 8 + lane % 4 * 2]);
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n * 4 + i] *= p.scale * (i % 2 == 0 ? exp_g.x : exp_g.y);
    }
    const float decay = record.exp_g[kChunk - 1];
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] *= decay;
    WaitForProducts<0>();

    uint32_t rest[16];
    PackAll(u, left);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 exp_rest = LoadPair(&record.exp_rest[n * 8 + lane % 4 * 2]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rest[n * 2 + half] = Pack(exp_rest.x * u[n * 4 + half * 2], exp_rest.y * u[n * 4 + half * 2 + 1]);
      }
    }
    FenceRegisters();
#pragma unroll
    for (int i = 0; i < 4; ++i) Multiply64(o, left + 4 * i, Advance(Descriptor(record.p), i * 32), true);
    CommitProducts();
#pragma unroll
    for (int i = 0; i < 4; ++i) Multiply128Transposed(s, rest + 4 * i, Advance(k_tile, i * 2048), true);
    CommitProducts();
    WaitForProducts<1>();
    // The output takes the place of this warp's part of V: who loads takes it from there.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(v_tile + i * 2048),
                   "r"(Pack(o[8 * i], o[8 * i + 1])), "r"(Pack(o[8 * i + 2], o[8 * i + 3])),
                   "r"(Pack(o[8 * i + 4], o[8 * i + 5])), "r"(Pack(o[8 * i + 6], o[8 * i + 7]))
                   : "memory");
    }
    WaitForProducts<0>();
    Arrive(&shared.empty[st]);  // each lane for its own
  }

  const int32_t slot = p.final_slots[sequence];
  if (slot < 0 || slot >= p.slots) return;
  State* const to = static_cast<State*>(p.states) + slot * p.slot_stride + int64_t{head} * kDim * kDim;
  ForStatePairs(to, row, lane, [&](State* at, int i) { StorePair(at, make_float2(s[i], s[i + 1])); });
}

#endif  // PRISTINE_GDN_PREFILL

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_STATES_DEVICE_CUH_
