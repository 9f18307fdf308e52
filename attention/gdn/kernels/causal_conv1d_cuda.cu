// Four channels to a thread, 128 to a warp: a head. In a prompt each warp has a run of tokens, in batches; the inputs
// of the next batches are on their way into shared memory, each thread's own, before anything else is known. Runs are
// short, and blocks next to each other have neighbouring channels, so that what is read at a time lies close together:
// as many long runs as the device holds blocks, with nothing fetched twice, measured 15 % slower. A state is read and
// written by the warp that has its request's first token, and by no other: that warp computes the request's first three
// tokens, also those beyond its batch, so that nobody needs a state that somebody else is writing.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/causal_conv1d.h"
#include "attention/gdn/kernels/channels_device.cuh"
#include "attention/gdn/kernels/gates_device.cuh"
#include "attention/kernels/dependent_launch.cuh"

namespace pristine::attention::gdn {
namespace {

constexpr int kHistory = 3;
constexpr int kTaps = kHistory + 1;
constexpr int kPer = 4;  // channels of a thread
constexpr int kThreads = 128;
constexpr int kTileChannels = kThreads * kPer;
constexpr int kBatch = 8;    // tokens
constexpr int kBatches = 4;  // of a run
constexpr int kStages = 2;   // batches that are computed or on their way
constexpr int kTileTokens = kBatch * kBatches;
constexpr int kGateTokens = 32;  // of a block of gates

template <class T>
using Four = Pack<T, kPer>;

// z / (1 + exp(-z)), within a few units of float32's last place.
__device__ float Silu(float z) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
  return z * inverse;
}

// A thread's channels [first, first + kPer) of everything but the outputs. kVector as in Segments.
template <class T, bool kVector>
class Channels {
 public:
  __device__ Channels(const CausalConv1dParams& p, int first)
      // A thread without channels loads others' and stores nothing: no branch around a load.
      : p_(p), first_(kVector && first >= p.dim ? 0 : first), count_(min(kPer, p.dim - first)) {}

  __device__ Four<T> LoadX(int64_t token) const { return Load(X(token), count_); }
  __device__ const T* X(int64_t token) const { return static_cast<const T*>(p_.x) + token * p_.x_stride + first_; }
  __device__ void LoadWeights(float (&weight)[kTaps][kPer], float (&bias)[kPer]) const {
    const T* const from = static_cast<const T*>(p_.weight) + int64_t{first_} * kTaps;
#pragma unroll
    for (int w = 0; w < kTaps; ++w) {
      const Four<T> four = Load(from + w * kPer, count_ * kTaps - w * kPer);
#pragma unroll
      for (int i = 0; i < kPer; ++i) weight[(w * kPer + i) % kTaps][(w * kPer + i) / kTaps] = four.Float(i);
    }
    Four<T> four = {};
    if (p_.bias != nullptr) four = Load(static_cast<const T*>(p_.bias) + first_, count_);
#pragma unroll
    for (int i = 0; i < kPer; ++i) bias[i] = four.Float(i);
  }
  // history[0] is the oldest.
  __device__ void LoadState(int slot, Four<T> (&history)[kHistory]) const {
    const T* const from = State(slot);
#pragma unroll
    for (int w = 0; w < kHistory; ++w) {
      const Four<T> four = Load(from + w * kPer, count_ * kHistory - w * kPer);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        history[(w * kPer + i) % kHistory].SetBits((w * kPer + i) / kHistory, four.Bits(i));
      }
    }
  }
  __device__ void StoreState(int slot, const Four<T> (&history)[kHistory]) const {
    if (count_ <= 0) return;
    T* const to = State(slot);
#pragma unroll
    for (int w = 0; w < kHistory; ++w) {
      Four<T> four = {};
#pragma unroll
      for (int i = 0; i < kPer; ++i)
        four.SetBits(i, history[(w * kPer + i) % kHistory].Bits((w * kPer + i) / kHistory));
      if constexpr (kVector) {
        *reinterpret_cast<Four<T>*>(to + w * kPer) = four;
      } else {
        using Bits = typename BitsOf<T>::Type;
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          if (w * kPer + i < count_ * kHistory)
            reinterpret_cast<Bits*>(to)[w * kPer + i] = static_cast<Bits>(four.Bits(i));
        }
      }
    }
  }

 private:
  static __device__ Four<T> Load(const T* from, int count) {
    if constexpr (kVector) return *reinterpret_cast<const Four<T>*>(from);
    return LoadElements<kPer>(from, 1, count);
  }
  __device__ T* State(int slot) const {
    return static_cast<T*>(p_.states) + slot * p_.slot_stride + int64_t{first_} * kHistory;
  }

  const CausalConv1dParams& p_;
  const int first_, count_;
};

// Computes tokens of a thread's channels.
template <class T, bool kVector>
class Convolution {
 public:
  __device__ Convolution(const CausalConv1dParams& p, const Channels<T, kVector>& channels, int first)
      : segments_(p.out, p.out_dim, first), norm_(first < p.out_dim[0] + p.out_dim[1] ? p.norm_head_dim : 0) {
    channels.LoadWeights(weight_, bias_);
  }
  // kTokens tokens from `token` on; x starts with the three inputs before. All threads of the warp call it.
  template <int kTokens>
  __device__ void StoreTokens(int64_t token, const Four<T> (&x)[kHistory + kTokens]) const {
    Four<T> y[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float values[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        float sum = bias_[i];
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) sum = fmaf(weight_[tap][i], x[t + tap].Float(i), sum);
        values[i] = Silu(sum);
      }
      y[t].Set(values);
    }
    if (__any_sync(0xffffffffu, norm_ != 0)) NormaliseHeads(y, norm_);
    segments_.Store(token, y);
  }
  __device__ void StoreZeros(int64_t token) const {
    const Four<T> zeros[1] = {};
    segments_.Store(token, zeros);
  }

 private:
  const Segments<T, kPer, kVector> segments_;
  const int norm_;  // of this thread's head
  float weight_[kTaps][kPer];
  float bias_[kPer];
};

// Walks along the requests as tokens rise. What breaks the rule of cu_seqlens ends up without a request or in a wrong
// one, and within [0, tokens).
class Walk {
 public:
  // Token `token` is in request `request` or later.
  __device__ Walk(const CausalConv1dParams& p, int request, int token)
      : p_(p), total_(min(p.cu_seqlens[p.requests], static_cast<int>(p.tokens))), request_(request) {
    Enter();
    To(token);
  }
  __device__ void To(int token) {
    if (token >= total_) request_ = p_.requests;
    while (request_ < p_.requests && end_ <= token) {
      ++request_;
      Enter();
    }
  }
  // Of the token last gone to: its request, that request's tokens, and whether it is a request with a slot at all.
  __device__ int request() const { return request_; }
  __device__ int start() const { return start_; }
  __device__ int end() const { return min(end_, total_); }
  __device__ bool Live(int token) const { return request_ < p_.requests && has_slot_ && start_ <= token; }

 private:
  __device__ void Enter() {
    if (request_ >= p_.requests) return;
    start_ = max(p_.cu_seqlens[request_], 0);
    end_ = p_.cu_seqlens[request_ + 1];
    const int slot = p_.cache_indices[request_];
    has_slot_ = slot >= 0 && slot < p_.slots;
  }

  const CausalConv1dParams& p_;
  const int total_;
  int start_ = 0, end_ = 0;
  int request_;
  bool has_slot_ = false;
};

// How many requests end at or before `token`: where it walks from. All threads of the block call it.
__device__ int RequestsBefore(const CausalConv1dParams& p, int token) {
  int before = 0;
  for (int first = 0; first < p.requests; first += kThreads) {
    const int r = first + static_cast<int>(threadIdx.x);
    before += __syncthreads_count(r < p.requests && p.cu_seqlens[r + 1] <= token);
  }
  return before;
}

__device__ void StoreGate(const GatesParams& gates, int64_t token, int head, bool live) {
  const Gate gate = live ? GateOf(gates, token, head) : Gate{0, 0};
  gates.g[token * gates.v_heads + head] = gate.g;
  gates.beta[token * gates.v_heads + head] = gate.beta;
}

// Leaves what the request's first token looks back to in x, and the last three inputs of all in its state.
template <class T, bool kVector>
__device__ void StartRequest(const CausalConv1dParams& p, const Channels<T, kVector>& channels, const Walk& walk,
                             Four<T> (&x)[kTaps]) {
  const int slot = p.cache_indices[walk.request()];
  Four<T> history[kHistory] = {};
  if (p.has_initial_state == nullptr || p.has_initial_state[walk.request()] != 0) channels.LoadState(slot, history);
  const int tokens = walk.end() - walk.start();
  Four<T> last[kHistory];
#pragma unroll
  for (int i = 0; i < kHistory; ++i) {
    x[i] = history[i];
    const int at = tokens + i - kHistory;
    if (at >= 0) {
      last[i] = channels.LoadX(walk.start() + at);
    } else {
      last[i] = at == -1 ? history[2] : at == -2 ? history[1] : history[0];
    }
  }
  channels.StoreState(slot, last);
}

// A batch where a request starts or ends: token by token.
template <class T, bool kVector>
__device__ void StoreBatch(const CausalConv1dParams& p, const Channels<T, kVector>& channels,
                           const Convolution<T, kVector>& convolution, Walk walk, int first) {
  Four<T> x[kTaps];  // the last is the token's own
#pragma unroll
  for (int i = 0; i < kHistory; ++i) x[i] = channels.LoadX(max(first + i - kHistory, 0));
  bool met_start = false;  // of the request that the token is in
  for (int token = first; token < p.tokens; ++token) {
    walk.To(token);
    const bool live = walk.Live(token), early = live && token < walk.start() + kHistory;
    if (token >= first + kBatch && !(early && met_start && token > walk.start())) return;
    if (!live) {
      convolution.StoreZeros(token);
      continue;
    }
    if (token == walk.start()) {
      met_start = true;
      StartRequest(p, channels, walk, x);
    }
    x[kHistory] = channels.LoadX(token);
    if (!early || met_start) convolution.template StoreTokens<1>(token, x);
#pragma unroll
    for (int i = 0; i < kHistory; ++i) x[i] = x[i + 1];
  }
}

__device__ void StoreGates(const CausalConv1dParams& p, int first_token) {
  const int before = RequestsBefore(p, first_token);
  const int heads = p.gates.v_heads, tokens = min(kGateTokens, static_cast<int>(p.tokens) - first_token);
  const Walk walk(p, before, first_token);
  const bool one_request = walk.Live(first_token) && first_token + tokens <= walk.end();
#pragma unroll 4
  for (int i = threadIdx.x; i < tokens * heads; i += kThreads) {
    const int token = first_token + i / heads;
    StoreGate(p.gates, token, i % heads, one_request || Walk(p, before, token).Live(token));
  }
}

// The inputs of a run's batches, from memory into a ring of shared memory of which each thread reads what it wrote.
template <class T, bool kVector>
class Inputs {
 public:
  using Ring = Four<T>[kStages][kBatch][kThreads];

  __device__ Inputs(const Channels<T, kVector>& channels, Ring& ring, int64_t x_stride, int first, int all)
      : channels_(channels), ring_(ring), x_stride_(x_stride), first_(first), all_(all) {
#pragma unroll
    for (int b = 0; b < kStages; ++b) Fetch(b);
  }
  // Batch b, which is fetched; in its place the batch kStages behind it. A token outside is loaded from the edge, for
  // nothing.
  __device__ void Next(int b, Four<T>* x) {
    if constexpr (kVector) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[i] = ring_[b % kStages][i][threadIdx.x];
      Fetch(b + kStages);
    } else {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[i] = channels_.LoadX(min(first_ + b * kBatch + i, all_ - 1));
    }
  }

 private:
  __device__ void Fetch(int b) {
    if constexpr (kVector) {
      const int token = first_ + b * kBatch;
      if (b < kBatches && token + kBatch <= all_) {
        const T* at = channels_.X(token);
#pragma unroll
        for (int i = 0; i < kBatch; ++i, at += x_stride_) Copy(&ring_[b % kStages][i][threadIdx.x], at);
      } else if (b < kBatches) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          Copy(&ring_[b % kStages][i][threadIdx.x], channels_.X(min(token + i, all_ - 1)));
        }
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
  }
  static __device__ void Copy(Four<T>* to, const T* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from), "n"(sizeof(Four<T>))
                 : "memory");
  }

  const Channels<T, kVector>& channels_;
  Ring& ring_;
  const int64_t x_stride_;
  const int first_, all_;
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && kVector ? 5 : 4)
    CausalConvKernel(const __grid_constant__ CausalConv1dParams p) {
  WaitForStream();
  const int all = static_cast<int>(p.tokens);
  const int gate_blocks = p.gates.g == nullptr ? 0 : (all + kGateTokens - 1) / kGateTokens;
  const int place = static_cast<int>(blockIdx.x) - gate_blocks;
  if (place < 0) {
    StoreGates(p, static_cast<int>(blockIdx.x) * kGateTokens);
    return;
  }
  const int tiles = (p.dim + kTileChannels - 1) / kTileChannels;
  const int run = place / tiles * kTileTokens;  // its first token
  const int first_channel = place % tiles * kTileChannels + static_cast<int>(threadIdx.x) * kPer;
  const Channels<T, kVector> channels(p, first_channel);
  __shared__ typename Inputs<T, kVector>::Ring ring;
  Inputs<T, kVector> inputs(channels, ring, p.x_stride, run, all);
  Four<T> x[kHistory + kBatch];
#pragma unroll
  for (int i = 0; i < kHistory; ++i) x[i] = channels.LoadX(max(run - kHistory + i, 0));
  const Convolution<T, kVector> convolution(p, channels, first_channel);
  const int before = RequestsBefore(p, run);
  LetNextBegin();
  Walk walk(p, before, run);
#pragma unroll 1
  for (int b = 0; b < kBatches; ++b) {
    const int first = run + b * kBatch;
    if (first >= all) return;
    inputs.Next(b, x + kHistory);
    walk.To(first);
    if (walk.Live(first) && walk.start() + kHistory <= first && first + kBatch <= walk.end()) {
      convolution.template StoreTokens<kBatch>(first, x);
    } else {
      StoreBatch(p, channels, convolution, walk, first);
    }
#pragma unroll
    for (int i = 0; i < kHistory; ++i) x[i] = x[kBatch + i];
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) CausalConvUpdateKernel(const __grid_constant__ CausalConv1dParams p) {
  WaitForStream();
  const int channel_tiles = (p.dim + kTileChannels - 1) / kTileChannels;
  const int row = blockIdx.y;
  const int64_t first = int64_t{row} * p.row_tokens;
  const int slot = p.cache_indices[row];
  const bool live = slot >= 0 && slot < p.slots;
  if (static_cast<int>(blockIdx.x) == channel_tiles) {
    const int heads = p.gates.v_heads;
    for (int i = threadIdx.x; i < p.row_tokens * heads; i += kThreads) {
      StoreGate(p.gates, first + i / heads, i % heads, live);
    }
    return;
  }
  const int first_channel = static_cast<int>(blockIdx.x) * kTileChannels + static_cast<int>(threadIdx.x) * kPer;
  const Channels<T, kVector> channels(p, first_channel);
  Four<T> x[kTaps];
  x[kHistory] = channels.LoadX(first);
  const Convolution<T, kVector> convolution(p, channels, first_channel);
  const bool wanted = p.out[0] != nullptr;
  if (!live) {
    for (int t = 0; wanted && t < p.row_tokens; ++t) convolution.StoreZeros(first + t);
    return;
  }
  const int tokens = p.lengths == nullptr ? p.row_tokens : min(max(p.lengths[row], 0), p.row_tokens);
  if (tokens == 0) return;
  Four<T> history[kHistory] = {};
  channels.LoadState(slot, history);
#pragma unroll
  for (int i = 0; i < kHistory; ++i) x[i] = history[i];
  for (int t = 0; t < tokens; ++t) {
    if (t > 0) x[kHistory] = channels.LoadX(first + t);
    if (wanted) convolution.template StoreTokens<1>(first + t, x);
#pragma unroll
    for (int i = 0; i < kHistory; ++i) x[i] = history[i] = x[i + 1];
  }
  if (p.store) channels.StoreState(slot, history);
}

// Whether a thread's channels lie in one segment, at multiples of a Pack's size everywhere.
bool TakesVectors(const CausalConv1dParams& p) {
  const auto element = static_cast<int64_t>(SizeOf(p.dtype));
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) |
                   reinterpret_cast<uintptr_t>(p.bias) | reinterpret_cast<uintptr_t>(p.states);
  bits |= static_cast<uintptr_t>(p.x_stride * element) | static_cast<uintptr_t>(p.slot_stride * element);
  bool whole = p.dim % kPer == 0;
  for (int i = 0; i < 3; ++i) {
    bits |= reinterpret_cast<uintptr_t>(p.out[i]);
    whole = whole && p.out_dim[i] % kPer == 0;
  }
  return whole && bits % static_cast<uintptr_t>(kPer * element) == 0;
}

template <class T, bool kVector>
int LaunchConv(CUstream_st* stream, const CausalConv1dParams& p) {
  const int64_t tiles = (p.dim + kTileChannels - 1) / kTileChannels;
  const bool gates = p.gates.g != nullptr;
  if (p.cu_seqlens == nullptr) {
    const dim3 grid(static_cast<unsigned>(tiles + (gates ? 1 : 0)), static_cast<unsigned>(p.requests));
    return LaunchDependent(stream, CausalConvUpdateKernel<T, kVector>, grid, dim3(kThreads), 0, p);
  }
  const int64_t blocks =
      (p.tokens + kTileTokens - 1) / kTileTokens * tiles + (gates ? (p.tokens + kGateTokens - 1) / kGateTokens : 0);
  return LaunchDependent(stream, CausalConvKernel<T, kVector>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                         p);
}

}  // namespace

int CausalConv1dCuda(CUstream_st* stream, const CausalConv1dParams& params) {
  const bool vector = TakesVectors(params);
  if (params.dtype == DType::kBFloat16) {
    return vector ? LaunchConv<__nv_bfloat16, true>(stream, params) : LaunchConv<__nv_bfloat16, false>(stream, params);
  }
  return vector ? LaunchConv<float, true>(stream, params) : LaunchConv<float, false>(stream, params);
}

}  // namespace pristine::attention::gdn
