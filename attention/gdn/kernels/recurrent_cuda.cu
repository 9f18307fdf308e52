// One block per (request, value head, part of V). Sixteen threads share a V row of the state, so that its K numbers
// stay in registers over all tokens. A state is read once and written once: the kernel's floor is that traffic. What
// brought it near, each by a few percent: 64 bytes of the state to a thread and two warps to a block, so that what is
// on its way at once lies close together in memory and its stores follow soon; and few instructions besides, which each
// warp repeats: q and k in vectors, their norms applied to sums instead of elements, gates by approximate functions,
// the sums of several rows at once.
//
// With s the state before the decay a, both sums over K come from one pass: s.k and s.q give
//   u = beta (v - a s.k)      o = a s.q + u k.q
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/channels_device.cuh"
#include "attention/gdn/kernels/recurrent.h"
#include "attention/kernels/dependent_launch.cuh"

namespace pristine::attention::gdn {
namespace {

constexpr int kThreads = 64;
constexpr int kDim = 128;             // K and V
constexpr int kLanes = 16;            // threads of a V row
constexpr int kHalves = 32 / kLanes;  // V rows that a warp works on at once
constexpr int kPerLane = kDim / kLanes;

// V rows of a thread. Of one token, few. Of several, what a warp does for each besides its rows counts more.
template <class State>
constexpr int kDecodeRows = 8 / static_cast<int>(sizeof(State));
constexpr int kRowsOfMany = 8;

// Of a multiprocessor, that ask for their states early. More ask for so much that it is dropped again.
constexpr int kEarlyBlocks = 6;

__device__ float AsFloat(float value) { return value; }
__device__ float AsFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void Assign(float& to, float value) { to = value; }
__device__ void Assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

// A lane's part of K in T: 16-byte words of the state, a word of every lane in turn, so that a row is read in whole
// sectors. q and k are read at the same places.
template <class State, class T>
struct Part {
  static constexpr int kVector = 16 / static_cast<int>(sizeof(State));
  static constexpr int kWords = kPerLane / kVector;
  Pack<T, kVector> words[kWords];

  static __device__ int Start(int word, int lane) { return (word * kLanes + lane) * kVector; }
  __device__ float Float(int i) const { return words[i / kVector].Float(i % kVector); }
};

// kVectors: rows start at multiples of 16 bytes.
template <class State, bool kVectors, class T>
__device__ Part<State, T> LoadPart(const T* from, int lane) {
  using Part = Part<State, T>;
  Part part;
#pragma unroll
  for (int w = 0; w < Part::kWords; ++w) {
    const T* const at = from + Part::Start(w, lane);
    if constexpr (kVectors) {
      part.words[w] = *reinterpret_cast<const Pack<T, Part::kVector>*>(at);
    } else {
      part.words[w] = LoadElements<Part::kVector>(at, 1, Part::kVector);
    }
  }
  return part;
}

__device__ float SumOverRow(float value) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// The sum over a row's lanes of x[r] ends up in lane r, and in those that differ from it by multiples of kRows: with
// each step a lane keeps half of its rows and hands the other half over.
template <int kRows>
__device__ float SumRows(float (&x)[kRows]) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    if (step < kRows) {
      const bool odd = (threadIdx.x & static_cast<unsigned>(step)) != 0;
#pragma unroll
      for (int i = 0; i < kRows / (2 * step); ++i) {
        const float keep = odd ? x[2 * i + 1] : x[2 * i], give = odd ? x[2 * i] : x[2 * i + 1];
        x[i] = keep + __shfl_xor_sync(0xffffffffu, give, step);
      }
    } else {
      x[0] += __shfl_xor_sync(0xffffffffu, x[0], step);
    }
  }
  return x[0];
}

__device__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What one token brings to a thread, as it was loaded.
template <class T, class State>
struct Token {
  Part<State, T> q, k;
  float v;  // of the row that SumRows leaves to this lane
  float a, b, a_log, dt_bias;

  // exp(g) and beta (gates.h) but for a few units of float32's last place. The logarithm's error where a is far below 0
  // is one of exp(g) next to 1.
  __device__ float Decay() const {
    constexpr float kLog2E = 1.44269504f;
    const float x = a + dt_bias;
    const float softplus = x > 20.f ? x * kLog2E : Log2(1.f + Exp2(x * kLog2E));  // times log2(e)
    return Exp2(-Exp2(a_log * kLog2E) * softplus);
  }
  __device__ float Beta() const { return __frcp_rn(1.f + Exp2(b * -1.44269504f)); }
};

template <class T, class State, int kRows, bool kVectors>
__device__ Token<T, State> LoadToken(const RecurrentParams& p, int64_t token, int head, int first_v, int lane) {
  const int qk_head = head / (p.v_heads / p.qk_heads);
  Token<T, State> in;
  in.q = LoadPart<State, kVectors>(static_cast<const T*>(p.q) + token * p.q_stride + qk_head * kDim, lane);
  in.k = LoadPart<State, kVectors>(static_cast<const T*>(p.k) + token * p.k_stride + qk_head * kDim, lane);
  in.v = AsFloat(static_cast<const T*>(p.v)[token * p.v_stride + head * kDim + first_v + lane % kRows * kHalves]);
  in.a = AsFloat(static_cast<const T*>(p.gates.a)[token * p.gates.a_stride + head]);
  in.b = AsFloat(static_cast<const T*>(p.gates.b)[token * p.gates.b_stride + head]);
  in.a_log = p.gates.a_log[head];
  in.dt_bias = p.gates.dt_bias[head];
  return in;
}

// q and k of a token as numbers, and what normalises them.
template <class State>
struct QueryKey {
  template <class T>
  __device__ QueryKey(const RecurrentParams& p, const Token<T, State>& in) {
    float qq = 0, kk = 0;
    kq = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      q[i] = in.q.Float(i);
      k[i] = in.k.Float(i);
      qq += q[i] * q[i];
      kk += k[i] * k[i];
      kq += k[i] * q[i];
    }
    q_scale = p.scale * rsqrtf(SumOverRow(qq) + kNormEpsilon);
    k_scale = rsqrtf(SumOverRow(kk) + kNormEpsilon);
    kq = SumOverRow(kq) * q_scale * k_scale;
  }
  float q[kPerLane], k[kPerLane];
  float q_scale, k_scale;
  float kq;  // of the normalised
};

// Asks L2 for a state while the kernel ahead may still run: between that one's end and the first bytes of a state that
// is looked up only then, the memory has nothing to do for a microsecond. Only a hint, of an index that may change
// until then: it is read again behind the wait, and so is the state, from L2, which has what the kernel ahead has
// written. bytes: of the block, that start `first` behind the slot's.
template <class State>
__device__ void HintState(const RecurrentParams& p, int64_t row, int64_t first, int bytes) {
  int32_t index;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(index) : "l"(p.cache_indices + row));
  const int at = static_cast<int>(threadIdx.x) * 128;
  if (index < 0 || index >= p.slots || at >= bytes) return;
  const State* const state = static_cast<const State*>(p.states) + index * p.slot_stride + first;
  PrefetchL2(reinterpret_cast<const char*>(state) + at);
}

// kRows: V rows of a thread. With 64 bytes of the state to a thread, a token at most.
template <class T, class State, int kRows, bool kVectors>
__global__ void __launch_bounds__(kThreads, kRows == kDecodeRows<State> ? 18 : 8)
    GdnRecurrentKernel(const __grid_constant__ RecurrentParams p) {
  using Words = Part<State, State>;
  constexpr int kWarpRows = kRows * kHalves;
  constexpr int kParts = kDim / (kWarpRows * (kThreads / 32));
  const int head = blockIdx.x / kParts, part = blockIdx.x % kParts;
  const int64_t row = blockIdx.y;
  const int lane = threadIdx.x % kLanes;
  const int warp = part * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  const int first_v = warp * kWarpRows + static_cast<int>(threadIdx.x) % 32 / kLanes;  // and every kHalves-th
  const int own_v = first_v + lane * kHalves;                                          // of lanes below kRows
  const int64_t out_row = int64_t{p.v_heads} * kDim;
  T* const out = static_cast<T*>(p.out);
  if constexpr (kRows == kDecodeRows<State>) {
    constexpr int kBlockRows = kWarpRows * (kThreads / 32);
    static_assert(kThreads * 128 >= kBlockRows * kDim * static_cast<int>(sizeof(State)));
    if (BeginsEarly(blockIdx.y * gridDim.x + blockIdx.x, kEarlyBlocks)) {
      const int64_t first = (int64_t{head} * kDim + part * kBlockRows) * kDim;
      HintState<State>(p, row, first, kBlockRows * kDim * static_cast<int>(sizeof(State)));
    }
  }
  WaitForStream();

  const int32_t index = p.cache_indices[row];
  // Does not depend on the index: on its way before the state's address is known.
  Token<T, State> in = LoadToken<T, State, kRows, kVectors>(p, row * p.tokens, head, first_v, lane);
  const bool padded = index < 0 || index >= p.slots;
  if (padded && !p.clamp_to_zero) {
    if (out == nullptr || lane >= kRows) return;
    for (int32_t t = 0; t < p.tokens; ++t) Assign(out[(row * p.tokens + t) * out_row + head * kDim + own_v], 0.f);
    return;
  }
  const int32_t tokens = p.lengths == nullptr ? p.tokens : min(max(p.lengths[row], 0), p.tokens);
  if (tokens == 0) return;
  State* const state = static_cast<State*>(p.states) + (padded ? 0 : index) * p.slot_stride +
                       static_cast<int64_t>(head) * kDim * kDim + first_v * kDim;
  if (kRows == kDecodeRows<State>) LetNextBegin();  // for its hints
  Words words[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int w = 0; w < Words::kWords; ++w) {
      const State* const at = state + r * kHalves * kDim + Words::Start(w, lane);
      *reinterpret_cast<uint4*>(words[r].words[w].words) = __ldcs(reinterpret_cast<const uint4*>(at));
    }
  }
  QueryKey<State> qk(p, in);  // while the state is on its way
  float s[kRows][kPerLane];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) s[r][i] = words[r].Float(i);
  }

  for (int32_t t = 0;;) {
    float sk[kRows] = {}, sq[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        sk[r] += s[r][i] * qk.k[i];
        sq[r] += s[r][i] * qk.q[i];
      }
    }
    const float decay = in.Decay();
    const float u = in.Beta() * (in.v - decay * qk.k_scale * SumRows(sk));
    const float o = decay * qk.q_scale * SumRows(sq) + u * qk.kq;
    if (out != nullptr && lane < kRows) Assign(out[(row * p.tokens + t) * out_row + head * kDim + own_v], o);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float step = qk.k_scale * __shfl_sync(0xffffffffu, u, r, kLanes);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) s[r][i] = decay * s[r][i] + step * qk.k[i];
    }
    if (kRows == kDecodeRows<State> || ++t == tokens) break;
    in = LoadToken<T, State, kRows, kVectors>(p, row * p.tokens + t, head, first_v, lane);
    qk = QueryKey<State>(p, in);
  }

  if (kRows != kDecodeRows<State>) LetNextBegin();
  if (!p.store || padded) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int w = 0; w < Words::kWords; ++w) {
      Pack<State, Words::kVector> word;
      float values[Words::kVector];
#pragma unroll
      for (int j = 0; j < Words::kVector; ++j) values[j] = s[r][w * Words::kVector + j];
      word.Set(values);
      State* const at = state + r * kHalves * kDim + Words::Start(w, lane);
      __stcs(reinterpret_cast<uint4*>(at), *reinterpret_cast<const uint4*>(word.words));
    }
  }
}

// Rows of q and k are read 16 bytes at a time.
bool TakesVectors(const RecurrentParams& p) {
  const auto element = static_cast<int64_t>(SizeOf(p.gates.dtype));
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.k) |
                         static_cast<uintptr_t>(p.q_stride * element) | static_cast<uintptr_t>(p.k_stride * element);
  return bits % 16 == 0;
}

template <class T, class State, int kRows, bool kVectors>
int LaunchRows(CUstream_st* stream, const RecurrentParams& params) {
  constexpr int kParts = kDim / (kRows * kHalves * (kThreads / 32));
  const dim3 grid(static_cast<unsigned>(params.v_heads * kParts), static_cast<unsigned>(params.rows));
  return LaunchDependent(stream, GdnRecurrentKernel<T, State, kRows, kVectors>, grid, dim3(kThreads), 0, params);
}

template <class T, class State>
int LaunchRecurrent(CUstream_st* stream, const RecurrentParams& params) {
  if (!TakesVectors(params)) return LaunchRows<T, State, kRowsOfMany, false>(stream, params);
  if (params.tokens > 1) return LaunchRows<T, State, kRowsOfMany, true>(stream, params);
  return LaunchRows<T, State, kDecodeRows<State>, true>(stream, params);
}

}  // namespace

int RecurrentCuda(CUstream_st* stream, const RecurrentParams& params) {
  const bool wide = params.gates.dtype == DType::kFloat32;
  if (params.state_dtype == DType::kFloat32) {
    return wide ? LaunchRecurrent<float, float>(stream, params) : LaunchRecurrent<__nv_bfloat16, float>(stream, params);
  }
  return wide ? LaunchRecurrent<float, __nv_bfloat16>(stream, params)
              : LaunchRecurrent<__nv_bfloat16, __nv_bfloat16>(stream, params);
}

}  // namespace pristine::attention::gdn
