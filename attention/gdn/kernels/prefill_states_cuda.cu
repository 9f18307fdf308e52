// The second prefill kernel: the states, chunk after chunk, and with them the output.
//
// A block is one (sequence, value head), or half of its V. Each consumer warpgroup keeps 64 rows of the state, [V, K],
// in float32 accumulators. All products are transposed, so that what one product leaves in registers is the next one's
// left operand and nothing but inputs passes through shared memory:
//   X^T = V^T - (S K^T) diag(exp G)      U^T = X^T (T diag(beta))^T
//   O^T = scale (S Q^T) diag(exp G) + U^T P^T
//   S   = exp(G_last) S + (U^T diag(exp(G_last - G))) K
// A producer warpgroup keeps kStages chunks on their way.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/prefill.h"
#include "attention/gdn/kernels/prefill_device.cuh"

namespace pristine::attention::gdn {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kStages = kPrefillStages;
constexpr int kTile = 64 * 128;  // bytes of 64 rows of 64 bfloat16, 128-byte swizzle

// One chunk in shared memory. Each part starts at a multiple of 1024 bytes, for the swizzle.
template <int kGroups>
struct Stage {
  unsigned char k[2][kTile];  // [K / 64], rows are tokens
  unsigned char q[2][kTile];
  unsigned char v[kGroups][kTile];  // of each consumer; then its output
  unsigned char record[(sizeof(ChunkRecord) + 1023) / 1024 * 1024];
  __device__ const ChunkRecord& chunk() const { return *reinterpret_cast<const ChunkRecord*>(record); }
};
template <int kGroups>
struct StatesShared {
  Stage<kGroups> stages[kStages];
  uint64_t full[kStages], empty[kStages];
};
template <int kGroups>
constexpr int SharedBytes() {
  constexpr int kBytes = PrefillStatesSharedBytes(kGroups * 64, kStages);
  static_assert(sizeof(Stage<kGroups>) % 1024 == 0 && sizeof(StatesShared<kGroups>) == kBytes && kBytes <= 232448);
  static_assert(PrefillStatesWarps(kGroups * 64) * 32 == (kGroups + 1) * kGroup);
  return kBytes;
}

#ifdef PRISTINE_GDN_PREFILL

__device__ void InitBarrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(count) : "memory");
}
__device__ void Arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
__device__ void ArriveExpecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(bytes)
               : "memory");
}
__device__ void Wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}
__device__ void CopyBulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   SharedAddress(to)),
               "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
               : "memory");
}

// Registers that wgmma reads or writes are ready.
__device__ void FenceRegisters() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// A tile's descriptor: 128-byte swizzle, 1024 bytes from eight rows to the next eight, kTile from 64 columns to the
// next.
__device__ uint64_t Descriptor(const void* tile) {
  return static_cast<uint64_t>((SharedAddress(tile) & 0x3ffff) >> 4) | static_cast<uint64_t>(kTile >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62;
}
// A descriptor `bytes` further on.
__device__ uint64_t Advance(uint64_t descriptor, int bytes) { return descriptor + static_cast<uint64_t>(bytes >> 4); }

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

template <int kGroups>
__device__ void Produce(const PrefillParams& p, StatesShared<kGroups>& shared, const PrefillSpan& span, int head,
                        int first_v) {
  const int tid = static_cast<int>(threadIdx.x) % kGroup;
  const int qk_head = head / (p.v_heads / p.qk_heads);
  const auto* const q = static_cast<const __nv_bfloat16*>(p.q) + qk_head * kDim + tid % 16 * 8;
  const auto* const k = static_cast<const __nv_bfloat16*>(p.k) + qk_head * kDim + tid % 16 * 8;
  // A row of V that this block takes is kGroups * 8 words.
  constexpr int kVWords = kGroups * 8, kVRows = kGroup / kVWords;
  const auto* const v = static_cast<const __nv_bfloat16*>(p.v) + head * kDim + first_v + tid % kVWords * 8;
  const int qk_offset = tid % 16 / 8 * kTile + tid / 16 * 128 + ((tid % 8 ^ tid / 16) << 4);
  for (int c = 0; c < span.chunks; ++c) {
    const int s = c % kStages;
    Stage<kGroups>& stage = shared.stages[s];
    if (c >= kStages) Wait(&shared.empty[s], c / kStages - 1 & 1);
    if (tid == 0) {
      ArriveExpecting(&shared.full[s], sizeof(ChunkRecord));
      const auto* const records = static_cast<const ChunkRecord*>(p.workspace);
      CopyBulk(stage.record, records + int64_t{span.first_chunk + c} * p.v_heads + head, sizeof(ChunkRecord),
               &shared.full[s]);
    }
    const int64_t token = span.begin + c * kChunk;
    const int valid = min(span.length - c * kChunk, kChunk);
    const uint32_t k_to = SharedAddress(stage.k) + qk_offset, q_to = SharedAddress(stage.q) + qk_offset;
#pragma unroll 2  // few registers: the consumers have them
    for (int i = 0; i < 8; ++i) {
      const int row = i * 8 + tid / 16;
      const int64_t at = token + min(row, valid - 1);
      CopyAsync(k_to + i * 1024, k + at * p.k_stride, row < valid);
      CopyAsync(q_to + i * 1024, q + at * p.q_stride, row < valid);
    }
#pragma unroll 2
    for (int i = 0; i < kChunk / kVRows; ++i) {
      const int row = i * kVRows + tid / kVWords, word = tid % 8;
      const int64_t at = token + min(row, valid - 1);
      CopyAsync(SharedAddress(stage.v[tid % kVWords / 8]) + row * 128 + ((word ^ (row & 7)) << 4), v + at * p.v_stride,
                row < valid);
    }
    CommitCopies();
    if (c > 0) {
      WaitForCopies<1>();
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      Arrive(&shared.full[(c - 1) % kStages]);
    }
  }
  if (span.chunks == 0) return;
  WaitForCopies<0>();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  Arrive(&shared.full[(span.chunks - 1) % kStages]);
}

__device__ float2 LoadPair(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ float2 LoadPair(const __nv_bfloat16* from) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
}
__device__ void StorePair(float* to, float2 pair) { *reinterpret_cast<float2*>(to) = pair; }
__device__ void StorePair(__nv_bfloat16* to, float2 pair) {
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

template <int kGroups, class State>
__device__ void Consume(const PrefillParams& p, StatesShared<kGroups>& shared, const PrefillSpan& span,
                        int32_t sequence, int head, int first_v) {
  const int group = static_cast<int>(threadIdx.x) / kGroup, warp = static_cast<int>(threadIdx.x) % kGroup / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
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
  // Of this lane's row in a matrix of eight tokens by eight of V, in the warp's 16 columns of its V tile.
  const int tile_row = lane / 16 * 8 + lane % 8;
  const uint32_t tile_offset = tile_row * 128 + (((warp * 2 + lane / 8 % 2) ^ (lane % 8)) << 4);

  for (int c = 0; c < span.chunks; ++c) {
    const int st = c % kStages;
    Stage<kGroups>& stage = shared.stages[st];
    const ChunkRecord& record = stage.chunk();
    const uint64_t k_tile = Descriptor(stage.k), q_tile = Descriptor(stage.q);
    uint32_t state[32];
    PackAll(s, state);
    Wait(&shared.full[st], c / kStages & 1);

    float x[32], o[32];
    FenceRegisters();
#pragma unroll
    for (int i = 0; i < 8; ++i) Multiply64(x, state + 4 * i, Advance(k_tile, i / 4 * kTile + i % 4 * 32), i > 0);
    CommitProducts();
#pragma unroll
    for (int i = 0; i < 8; ++i) Multiply64(o, state + 4 * i, Advance(q_tile, i / 4 * kTile + i % 4 * 32), i > 0);
    CommitProducts();

    const uint32_t v_tile = SharedAddress(stage.v[group]) + tile_offset;
    uint32_t v[4][4];
    float2 exp_g[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) LoadMatricesTransposed(v[i], v_tile + i * 2048);
#pragma unroll
    for (int n = 0; n < 8; ++n) exp_g[n] = LoadPair(&record.exp_g[n * 8 + lane % 4 * 2]);
    WaitForProducts<1>();
    uint32_t left[16];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 value = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v[n / 2][n % 2 * 2 + half]));
        left[n * 2 + half] =
            Pack(value.x - exp_g[n].x * x[n * 4 + half * 2], value.y - exp_g[n].y * x[n * 4 + half * 2 + 1]);
      }
    }
    float u[32];
    FenceRegisters();
#pragma unroll
    for (int i = 0; i < 4; ++i) Multiply64(u, left + 4 * i, Advance(Descriptor(record.t), i * 32), i > 0);
    CommitProducts();
    WaitForProducts<1>();
#pragma unroll
    for (int i = 0; i < 32; ++i) o[i] *= p.scale * (i % 2 == 0 ? exp_g[i / 4].x : exp_g[i / 4].y);
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
    for (int i = 0; i < 4; ++i) Multiply128Transposed(s, rest + 4 * i, Advance(k_tile, i * 2048), true);
    CommitProducts();
#pragma unroll
    for (int i = 0; i < 4; ++i) Multiply64(o, left + 4 * i, Advance(Descriptor(record.p), i * 32), true);
    CommitProducts();
    WaitForProducts<0>();

    // The output takes the place of this warp's part of V, and goes from there to memory in sectors of 32 bytes.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(v_tile + i * 2048),
                   "r"(Pack(o[8 * i], o[8 * i + 1])), "r"(Pack(o[8 * i + 2], o[8 * i + 3])),
                   "r"(Pack(o[8 * i + 4], o[8 * i + 5])), "r"(Pack(o[8 * i + 6], o[8 * i + 7]))
                   : "memory");
    }
    __syncwarp();
    const int valid = min(span.length - c * kChunk, kChunk);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = i * 16 + lane / 2, word = warp * 2 + lane % 2;
      const uint4 values = *reinterpret_cast<const uint4*>(stage.v[group] + token * 128 + ((word ^ (token & 7)) << 4));
      if (token < valid) {
        auto* const to = static_cast<__nv_bfloat16*>(p.out) +
                         ((span.begin + c * kChunk + token) * int64_t{p.v_heads} + head) * kDim + first_v + group * 64 +
                         word * 8;
        *reinterpret_cast<uint4*>(to) = values;
      }
    }
    __syncwarp();
    if (lane == 0) Arrive(&shared.empty[st]);
  }

  const int32_t slot = p.final_slots[sequence];
  if (slot < 0 || slot >= p.slots) return;
  State* const to = static_cast<State*>(p.states) + slot * p.slot_stride + int64_t{head} * kDim * kDim;
  ForStatePairs(to, row, lane, [&](State* at, int i) { StorePair(at, make_float2(s[i], s[i + 1])); });
}

#endif  // PRISTINE_GDN_PREFILL

// grid: x = v_heads * v_parts, y = sequences.
template <int kGroups, class State>
__global__ void __launch_bounds__((kGroups + 1) * kGroup, 1)
    GdnPrefillStatesKernel(const __grid_constant__ PrefillParams p) {
#ifdef PRISTINE_GDN_PREFILL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<StatesShared<kGroups>*>(memory);
  constexpr int kParts = 2 / kGroups;
  const int head = static_cast<int>(blockIdx.x) / kParts, first_v = static_cast<int>(blockIdx.x) % kParts * 64;
  const int32_t sequence = static_cast<int32_t>(blockIdx.y);
  const PrefillSpan span = SpanOf(p, sequence);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(&shared.full[i], kGroup + 1);  // each producer thread, and the copy that one of them expects
      InitBarrier(&shared.empty[i], kGroups * 4);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= kGroups * kGroup) {
    if constexpr (kGroups == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    Produce<kGroups>(p, shared, span, head, first_v);
  } else {
    if constexpr (kGroups == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Consume<kGroups, State>(p, shared, span, sequence, head, first_v);
  }
#endif
}

template <int kGroups, class State>
int SetUp() {
  return cudaFuncSetAttribute(GdnPrefillStatesKernel<kGroups, State>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              SharedBytes<kGroups>());
}

template <int kGroups, class State>
int LaunchStates(CUstream_st* stream, const PrefillParams& params) {
  const dim3 grid(static_cast<unsigned>(params.v_heads * params.v_parts), static_cast<unsigned>(params.sequences));
  GdnPrefillStatesKernel<kGroups, State><<<grid, (kGroups + 1) * kGroup, SharedBytes<kGroups>(), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

int PrefillSetUpStatesCuda() {
  for (int (*const set_up)() :
       {&SetUp<1, float>, &SetUp<1, __nv_bfloat16>, &SetUp<2, float>, &SetUp<2, __nv_bfloat16>}) {
    if (const int error = set_up(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int PrefillStatesCuda(CUstream_st* stream, const PrefillParams& params) {
  const bool wide = params.state_dtype == DType::kFloat32;
  if (params.v_parts == 2) {
    return wide ? LaunchStates<1, float>(stream, params) : LaunchStates<1, __nv_bfloat16>(stream, params);
  }
  return wide ? LaunchStates<2, float>(stream, params) : LaunchStates<2, __nv_bfloat16>(stream, params);
}

}  // namespace pristine::attention::gdn
