// Four channels to a thread, 128 to a warp: a head. In a prompt each warp has a run of tokens, in batches; the inputs
// of the next batches are on their way into shared memory, each thread's own, before anything else is known. Runs are
// short, and blocks next to each other have neighbouring channels, so that what is read at a time lies close together:
// as many long runs as the device holds blocks, with nothing fetched twice, measured 15 % slower. The last runs are of
// one batch, so that all of the device ends at about the same time. What needs a state is done by blocks of its own,
// the first of the grid: a request's first three tokens, and the state that it leaves. So nobody needs a state that
// somebody else is writing, and no run waits for one.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

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
constexpr int kBatch = 8;        // tokens
constexpr int kLongBatches = 4;  // of a run that is not one of the last
constexpr int kLongTokens = kBatch * kLongBatches;
constexpr int kShortBlocks = 640;  // about as many as a device holds
constexpr int kStages = 2;         // batches that are computed or on their way
constexpr int kGateTokens = 32;    // of a block of gates

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
      : segments_(p.out, p.out_dim, first),
        norm_(first < p.out_dim[0] + p.out_dim[1] ? p.norm_head_dim : 0),
        warp_has_norm_(__any_sync(0xffffffffu, norm_ != 0) != 0) {
    channels.LoadWeights(weight_, bias_);
  }
  // Of tokens that follow each other; x starts with the three inputs before. All threads of the warp call it.
  template <int kTokens>
  __device__ void Compute(const Four<T> (&x)[kHistory + kTokens], Four<T> (&y)[kTokens]) const {
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
    if (warp_has_norm_) NormaliseHeads(y, norm_);
  }
  // A token, or several that follow each other.
  template <class Tokens>
  __device__ void Store(int64_t token, const Tokens& y) const {
    segments_.Store(token, y);
  }

 private:
  const Segments<T, kPer, kVector> segments_;
  const int norm_;  // of this thread's head
  const bool warp_has_norm_;
  float weight_[kTaps][kPer];
  float bias_[kPer];
};

// A request's tokens, or ones that are in none: [start, end) within [0, tokens).
struct Span {
  int start, end;
  bool live;  // of a request that has a slot
};

__device__ bool HasSlot(const CausalConv1dParams& p, int request) {
  const int slot = p.cache_indices[request];
  return slot >= 0 && slot < p.slots;
}

__device__ int EndOfRequests(const CausalConv1dParams& p) {
  return min(p.cu_seqlens[p.requests], static_cast<int>(p.tokens));
}

// Where token `token` is. What breaks the rule of cu_seqlens ends up without a request or in a wrong one.
__device__ Span SpanOf(const CausalConv1dParams& p, int token) {
  const int total = EndOfRequests(p);
  int request = 0;  // the first that ends behind the token
  for (int behind = p.requests; request < behind;) {
    const int middle = (request + behind) / 2;
    if (p.cu_seqlens[middle + 1] <= token) {
      request = middle + 1;
    } else {
      behind = middle;
    }
  }
  if (token >= total || request == p.requests) return {token, static_cast<int>(p.tokens), false};
  const int start = max(p.cu_seqlens[request], 0);
  if (start > token) return {token, min(start, total), false};
  return {start, min(p.cu_seqlens[request + 1], total), HasSlot(p, request)};
}

// Of a token that is in no request: zeros.
__device__ Gate GateOrZero(const GatesParams& gates, int64_t token, int head, bool live) {
  const Gate gate = GateOf(gates, token, head);  // without a branch around the loads
  return live ? gate : Gate{0, 0};
}

__device__ void StoreGate(const GatesParams& gates, int64_t token, int head, Gate gate) {
  gates.g[token * gates.v_heads + head] = gate.g;
  gates.beta[token * gates.v_heads + head] = gate.beta;
}

// Of kGateTokens tokens from `first` on.
__device__ void StoreGates(const CausalConv1dParams& p, int first) {
  constexpr int kAtOnce = 8;
  const int heads = p.gates.v_heads, count = min(kGateTokens, static_cast<int>(p.tokens) - first) * heads;
  const Span span = SpanOf(p, first);
#pragma unroll 1
  for (int start = threadIdx.x; start < count; start += kAtOnce * kThreads) {
    Gate gate[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = min(start + i * kThreads, count - 1), token = first + at / heads;
      const bool live = token < span.end ? span.live : SpanOf(p, token).live;
      gate[i] = GateOrZero(p.gates, token, at % heads, live);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = start + i * kThreads;
      if (at < count) StoreGate(p.gates, first + at / heads, at % heads, gate[i]);
    }
  }
}

// The first tokens of a request, and the state that it leaves. All threads of the warp call it.
template <class T, bool kVector>
__device__ void StartRequest(const CausalConv1dParams& p, const Channels<T, kVector>& channels,
                             const Convolution<T, kVector>& convolution, int request) {
  const int start = max(p.cu_seqlens[request], 0), end = min(p.cu_seqlens[request + 1], EndOfRequests(p));
  if (start >= end || !HasSlot(p, request)) return;
  constexpr int kTokens = kHistory + 1;  // a power of two
  Four<T> x[kHistory + kTokens] = {}, last[kHistory], y[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) x[kHistory + i] = channels.LoadX(min(start + i, end - 1));
#pragma unroll
  for (int i = 0; i < kHistory; ++i) last[i] = channels.LoadX(max(end + i - kHistory, start));
  const int slot = p.cache_indices[request];
  if (p.has_initial_state == nullptr || p.has_initial_state[request] != 0) {
    Four<T> history[kHistory] = {};
    channels.LoadState(slot, history);
#pragma unroll
    for (int i = 0; i < kHistory; ++i) x[i] = history[i];
  }
  convolution.Compute(x, y);
#pragma unroll
  for (int i = 0; i < kHistory; ++i) {
    if (start + i < end) convolution.Store(start + i, y[i]);
  }
  if (end - start == 1) {
    last[0] = x[1];
    last[1] = x[2];
  } else if (end - start == 2) {
    last[0] = x[2];
  }
  channels.StoreState(slot, last);
}

// The inputs of a run's batches, from memory into a ring of shared memory of which each thread reads what it wrote.
template <class T, bool kVector>
class Inputs {
 public:
  using Ring = Four<T>[kStages][kBatch][kThreads];

  __device__ Inputs(const Channels<T, kVector>& channels, Ring& ring, const CausalConv1dParams& p, int first,
                    int batches)
      : channels_(channels),
        ring_(ring),
        x_stride_(p.x_stride),
        first_(first),
        batches_(batches),
        all_(static_cast<int>(p.tokens)) {
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
      if (b < batches_ && token + kBatch <= all_) {
        const T* at = channels_.X(token);
#pragma unroll
        for (int i = 0; i < kBatch; ++i, at += x_stride_) Copy(&ring_[b % kStages][i][threadIdx.x], at);
      } else if (b < batches_) {
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
  const int first_, batches_, all_;
};

// The blocks of a prompt in their order: the gates, the requests' starts, the long runs, the short runs; of starts and
// runs one for each tile of channels.
struct Grid {
  explicit Grid(const CausalConv1dParams& p)
      : tiles((p.dim + kTileChannels - 1) / kTileChannels),
        gate_blocks(p.gates.g == nullptr ? 0 : (static_cast<int>(p.tokens) + kGateTokens - 1) / kGateTokens) {
    const int tokens = static_cast<int>(p.tokens);
    long_runs = std::max(tokens - kShortBlocks / tiles * kBatch, 0) / kLongTokens;
    short_runs = (tokens - long_runs * kLongTokens + kBatch - 1) / kBatch;
    blocks = (int64_t{p.requests} + long_runs + short_runs) * tiles + gate_blocks;
  }
  int tiles, gate_blocks, long_runs, short_runs;
  int64_t blocks;
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && kVector ? 5 : 4)
    CausalConvKernel(const __grid_constant__ CausalConv1dParams p, const __grid_constant__ Grid grid) {
  WaitForStream();
  const int all = static_cast<int>(p.tokens), block = static_cast<int>(blockIdx.x);
  if (block < grid.gate_blocks) {
    StoreGates(p, block * kGateTokens);
    return;
  }
  const int place = block - grid.gate_blocks;
  const int turn = place / grid.tiles - p.requests;  // of a run; below 0: of a request's start
  const bool is_long = turn < grid.long_runs;
  const int run = is_long ? turn * kLongTokens : grid.long_runs * kLongTokens + (turn - grid.long_runs) * kBatch;
  const int batches = turn < 0 ? 0 : is_long ? kLongBatches : 1;
  const int first_channel = place % grid.tiles * kTileChannels + static_cast<int>(threadIdx.x) * kPer;
  const Channels<T, kVector> channels(p, first_channel);
  __shared__ typename Inputs<T, kVector>::Ring ring;
  Inputs<T, kVector> inputs(channels, ring, p, run, batches);
  Four<T> x[kHistory + kBatch];
#pragma unroll
  for (int i = 0; i < kHistory; ++i) x[i] = channels.LoadX(max(run - kHistory + i, 0));
  const Convolution<T, kVector> convolution(p, channels, first_channel);
  if (turn < 0) {
    StartRequest(p, channels, convolution, turn + p.requests);
    return;
  }
  Span span = SpanOf(p, run);
  LetNextBegin();
#pragma unroll 1
  for (int b = 0; b < batches; ++b) {
    const int first = run + b * kBatch;
    if (first >= all) return;
    inputs.Next(b, x + kHistory);
    Four<T> y[kBatch];
    convolution.Compute(x, y);
    if (span.live && span.start + kHistory <= first && first + kBatch <= span.end) {
      convolution.Store(first, y);
    } else {
      unsigned computed = 0, zeros = 0;  // a bit a token
#pragma unroll 1
      for (int i = 0; i < kBatch && first + i < all; ++i) {
        if (first + i >= span.end) span = SpanOf(p, first + i);
        if (!span.live) zeros |= 1u << i;
        if (span.live && first + i >= span.start + kHistory) computed |= 1u << i;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if ((zeros >> i & 1) != 0) y[i] = {};
        if (((zeros | computed) >> i & 1) != 0) convolution.Store(first + i, y[i]);
      }
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
  const bool live = HasSlot(p, row);
  if (static_cast<int>(blockIdx.x) == channel_tiles) {
    const int heads = p.gates.v_heads;
    for (int i = threadIdx.x; i < p.row_tokens * heads; i += kThreads) {
      StoreGate(p.gates, first + i / heads, i % heads, GateOrZero(p.gates, first + i / heads, i % heads, live));
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
    for (int t = 0; wanted && t < p.row_tokens; ++t) convolution.Store(first + t, Four<T>{});
    return;
  }
  const int tokens = p.lengths == nullptr ? p.row_tokens : min(max(p.lengths[row], 0), p.row_tokens);
  if (tokens == 0) return;
  const int slot = p.cache_indices[row];
  Four<T> history[kHistory] = {};
  channels.LoadState(slot, history);
#pragma unroll
  for (int i = 0; i < kHistory; ++i) x[i] = history[i];
  for (int t = 0; t < tokens; ++t) {
    if (t > 0) x[kHistory] = channels.LoadX(first + t);
    if (wanted) {
      Four<T> y[1];
      convolution.Compute(x, y);
      convolution.Store(first + t, y);
    }
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
  if (p.cu_seqlens == nullptr) {
    const int tiles = (p.dim + kTileChannels - 1) / kTileChannels;
    const bool gates = p.gates.g != nullptr;
    const dim3 grid(static_cast<unsigned>(tiles + (gates ? 1 : 0)), static_cast<unsigned>(p.requests));
    return LaunchDependent(stream, CausalConvUpdateKernel<T, kVector>, grid, dim3(kThreads), 0, p);
  }
  const Grid grid(p);
  return LaunchDependent(stream, CausalConvKernel<T, kVector>, dim3(static_cast<unsigned>(grid.blocks)), dim3(kThreads),
                         0, p, grid);
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
