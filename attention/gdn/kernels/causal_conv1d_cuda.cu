// Eight channels to a thread, 256 to a warp. In a prompt each warp has a run of tokens, whose inputs, and the three
// before, are on their way before anything else is known. A state is read and written by the warp that has its
// request's first token, and by no other: that warp computes the request's first three tokens, also those beyond its
// run, so that nobody needs a state that somebody else is writing.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/gdn/kernels/causal_conv1d.h"
#include "attention/gdn/kernels/channels_device.cuh"
#include "attention/gdn/kernels/gates_device.cuh"

namespace pristine::attention::gdn {
namespace {

constexpr int kHistory = 3;
constexpr int kWarpChannels = 32 * 8;
constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * 32;
constexpr int kRun = 8;  // tokens of a warp
constexpr int kTileTokens = kWarps * kRun;
constexpr int kUpdateThreads = 128;

// A thread's channels [first, first + 8) of everything. kVector: all of them are there, and lie in one segment, at
// addresses that are multiples of 16 bytes.
template <class T, bool kVector>
class Channels {
 public:
  __device__ Channels(const CausalConv1dParams& p, int first) : p_(p), first_(first), there_(first < p.dim) {
    if constexpr (kVector) {
      int segment = 0, at = first;
      while (segment < 2 && at >= p.out_dim[segment]) at -= p.out_dim[segment++];
      out_ = static_cast<T*>(p.out[segment]) + at;
      out_dim_ = p.out_dim[segment];
    }
    const int heads_end = p.out_dim[0] + p.out_dim[1];
    norm_ = first < heads_end ? p.norm_head_dim : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = first + i < p.dim;
      bias_[i] = exists && p.bias != nullptr ? AsFloat(static_cast<const T*>(p.bias)[first + i]) : 0;
    }
    const T* const weight = static_cast<const T*>(p.weight) + int64_t{first} * kTaps;
    if constexpr (kVector) {
      if (!there_) return;
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
        const Eight<T> eight = *reinterpret_cast<const Eight<T>*>(weight + i * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) weight_[(i * 8 + j) % kTaps][(i * 8 + j) / kTaps] = AsFloat(eight.values[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8 * kTaps; ++i) {
        weight_[i % kTaps][i / kTaps] = first + i / kTaps < p.dim ? AsFloat(weight[i]) : 0;
      }
    }
  }

  __device__ Eight<T> LoadX(int64_t token) const {
    const T* const from = static_cast<const T*>(p_.x) + token * p_.x_stride + first_;
    Eight<T> x = {};
    if constexpr (kVector) {
      if (there_) x = *reinterpret_cast<const Eight<T>*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (first_ + i < p_.dim) x.values[i] = from[i];
      }
    }
    return x;
  }

  // history[0] is the oldest.
  __device__ void LoadState(int slot, Eight<T> (&history)[kHistory]) const {
    const T* const from = State(slot);
    if constexpr (kVector) {
      if (!there_) return;
#pragma unroll
      for (int i = 0; i < kHistory; ++i) {
        const Eight<T> eight = *reinterpret_cast<const Eight<T>*>(from + i * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) history[(i * 8 + j) % kHistory].values[(i * 8 + j) / kHistory] = eight.values[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8 * kHistory; ++i) {
        if (first_ + i / kHistory < p_.dim) history[i % kHistory].values[i / kHistory] = from[i];
      }
    }
  }
  __device__ void StoreState(int slot, const Eight<T> (&history)[kHistory]) const {
    T* const to = State(slot);
    if constexpr (kVector) {
      if (!there_) return;
#pragma unroll
      for (int i = 0; i < kHistory; ++i) {
        Eight<T> eight;
#pragma unroll
        for (int j = 0; j < 8; ++j) eight.values[j] = history[(i * 8 + j) % kHistory].values[(i * 8 + j) / kHistory];
        *reinterpret_cast<Eight<T>*>(to + i * 8) = eight;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8 * kHistory; ++i) {
        if (first_ + i / kHistory < p_.dim) to[i] = history[i % kHistory].values[i / kHistory];
      }
    }
  }

  // The token whose inputs are the last of the four. All threads of the warp call it.
  __device__ void StoreToken(int64_t token, const Eight<T>& a, const Eight<T>& b, const Eight<T>& c,
                             const Eight<T>& d) const {
    Eight<T> y;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float sum = fmaf(weight_[0][i], AsFloat(a.values[i]), bias_[i]);
      sum = fmaf(weight_[1][i], AsFloat(b.values[i]), sum);
      sum = fmaf(weight_[2][i], AsFloat(c.values[i]), sum);
      sum = fmaf(weight_[3][i], AsFloat(d.values[i]), sum);
      Assign(y.values[i], __fdividef(sum, 1.f + __expf(-sum)));
    }
    // A warp has heads that are normalised beside channels that are not.
    if (__any_sync(0xffffffffu, norm_ != 0)) {
      Eight<T> normalised = y;
      NormaliseHead(normalised, p_.norm_head_dim);
      if (norm_ != 0) y = normalised;
    }
    Store(token, y);
  }
  __device__ void StoreZeros(int64_t token) const {
    Eight<T> zeros;
#pragma unroll
    for (int i = 0; i < 8; ++i) Assign(zeros.values[i], 0.f);
    Store(token, zeros);
  }

 private:
  static constexpr int kTaps = kHistory + 1;

  __device__ T* State(int slot) const {
    return static_cast<T*>(p_.states) + slot * p_.slot_stride + int64_t{first_} * kHistory;
  }
  __device__ void Store(int64_t token, const Eight<T>& y) const {
    if constexpr (kVector) {
      if (there_) *reinterpret_cast<Eight<T>*>(out_ + token * out_dim_) = y;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int segment = 0, at = first_ + i;
        if (at >= p_.dim) return;
        while (segment < 2 && at >= p_.out_dim[segment]) at -= p_.out_dim[segment++];
        static_cast<T*>(p_.out[segment])[token * p_.out_dim[segment] + at] = y.values[i];
      }
    }
  }

  const CausalConv1dParams& p_;
  int first_, norm_;
  bool there_;
  T* out_;
  int64_t out_dim_;
  float weight_[kTaps][8];
  float bias_[8];
};

__device__ bool HasSlot(const CausalConv1dParams& p, int request) {
  const int slot = p.cache_indices[request];
  return slot >= 0 && slot < p.slots;
}

// Walks along the requests as tokens rise. What breaks the rule of cu_seqlens ends up without a request or in a wrong
// one, and within [0, tokens).
class Walk {
 public:
  // Token `token` is in request `request` or later.
  __device__ Walk(const CausalConv1dParams& p, int request, int64_t token)
      : p_(p), total_(min(int64_t{p.cu_seqlens[p.requests]}, p.tokens)), request_(request) {
    Enter();
    To(token);
  }
  __device__ void To(int64_t token) {
    if (token >= total_) request_ = p_.requests;
    while (request_ < p_.requests && end_ <= token) {
      ++request_;
      Enter();
    }
    live_ = request_ < p_.requests && has_slot_ && start_ <= token;
  }
  // Of the token last gone to: whether it is one of a request with a slot; if so, that request and its tokens.
  __device__ bool live() const { return live_; }
  __device__ int request() const { return request_; }
  __device__ int64_t start() const { return start_; }
  __device__ int64_t end() const { return min(end_, total_); }

 private:
  __device__ void Enter() {
    if (request_ >= p_.requests) return;
    start_ = max(p_.cu_seqlens[request_], 0);
    end_ = p_.cu_seqlens[request_ + 1];
    has_slot_ = HasSlot(p_, request_);
  }

  const CausalConv1dParams& p_;
  const int64_t total_;
  int64_t start_ = 0, end_ = 0;
  int request_;
  bool has_slot_ = false, live_ = false;
};

// How many requests end at or before `token`: where it walks from. All threads of the block call it.
__device__ int RequestsBefore(const CausalConv1dParams& p, int64_t token) {
  int before = 0;
  for (int first = 0; first < p.requests; first += kThreads) {
    const int r = first + static_cast<int>(threadIdx.x);
    before += __syncthreads_count(r < p.requests && p.cu_seqlens[r + 1] <= token);
  }
  return before;
}

template <class T, bool kVector>
__device__ void StartRequest(const CausalConv1dParams& p, const Channels<T, kVector>& channels, const Walk& walk,
                             Eight<T> (&history)[kHistory]) {
  const int slot = p.cache_indices[walk.request()];
#pragma unroll
  for (int i = 0; i < kHistory; ++i) history[i] = {};
  if (p.has_initial_state == nullptr || p.has_initial_state[walk.request()] != 0) channels.LoadState(slot, history);
  // The last three of history and tokens.
  const int64_t tokens = walk.end() - walk.start();
  Eight<T> last[kHistory];
#pragma unroll
  for (int i = 0; i < kHistory; ++i) {
    const int64_t at = tokens + i - kHistory;
    if (at >= 0) {
      last[i] = channels.LoadX(walk.start() + at);
    } else {
      last[i] = at == -1 ? history[2] : at == -2 ? history[1] : history[0];
    }
  }
  channels.StoreState(slot, last);
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 3) CausalConvKernel(const __grid_constant__ CausalConv1dParams p) {
  const int channel_tiles = (p.dim + kWarpChannels - 1) / kWarpChannels;
  const int tiles = channel_tiles + (p.gates.g == nullptr ? 0 : 1);
  const int64_t block_token = static_cast<int64_t>(blockIdx.x / tiles) * kTileTokens;
  const int tile = blockIdx.x % tiles;
  if (tile == channel_tiles) {
    const int before = RequestsBefore(p, block_token);
    const int heads = p.gates.v_heads;
    const int tokens = static_cast<int>(min(int64_t{kTileTokens}, p.tokens - block_token));
    for (int i = threadIdx.x; i < tokens * heads; i += kThreads) {
      const int64_t token = block_token + i / heads;
      const bool live = Walk(p, before, token).live();
      const Gate gate = live ? GateOf(p.gates, token, i % heads) : Gate{0, 0};
      p.gates.g[token * heads + i % heads] = gate.g;
      p.gates.beta[token * heads + i % heads] = gate.beta;
    }
    return;
  }
  const int lane = threadIdx.x % 32;
  const int64_t first = block_token + static_cast<int>(threadIdx.x) / 32 * kRun;
  const Channels<T, kVector> channels(p, tile * kWarpChannels + lane * 8);
  Eight<T> x[kHistory + kRun];
#pragma unroll
  for (int i = 0; i < kHistory + kRun; ++i) {
    const int64_t token = first - kHistory + i;
    x[i] = {};
    if (token >= 0 && token < p.tokens) x[i] = channels.LoadX(token);
  }
  const int before = RequestsBefore(p, block_token);
  if (first >= p.tokens) return;
  Walk walk(p, before, first);
  if (walk.live() && walk.start() + kHistory <= first && first + kRun <= walk.end()) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) channels.StoreToken(first + i, x[i], x[i + 1], x[i + 2], x[i + 3]);
    return;
  }

  // Some request starts or ends here: token by token, and x once more, from the L1 cache.
  Eight<T> history[kHistory] = {};
#pragma unroll
  for (int i = 0; i < kHistory; ++i) {
    if (first + i >= kHistory) history[i] = channels.LoadX(first + i - kHistory);
  }
  bool met_start = false;  // of the request that the token is in
  for (int64_t token = first; token < p.tokens; ++token) {
    walk.To(token);
    const bool early = walk.live() && token < walk.start() + kHistory;
    if (token >= first + kRun && !(early && met_start && token > walk.start())) return;
    if (!walk.live()) {
      channels.StoreZeros(token);
      continue;
    }
    if (token == walk.start()) {
      met_start = true;
      StartRequest(p, channels, walk, history);
    }
    const Eight<T> now = channels.LoadX(token);
    if (!early || met_start) channels.StoreToken(token, history[0], history[1], history[2], now);
    history[0] = history[1];
    history[1] = history[2];
    history[2] = now;
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kUpdateThreads) CausalConvUpdateKernel(const __grid_constant__ CausalConv1dParams p) {
  constexpr int kBlockChannels = kUpdateThreads * 8;
  const int channel_tiles = (p.dim + kBlockChannels - 1) / kBlockChannels;
  const int row = blockIdx.y;
  const int64_t first = int64_t{row} * p.row_tokens;
  const int slot = p.cache_indices[row];
  const bool live = slot >= 0 && slot < p.slots;
  if (static_cast<int>(blockIdx.x) == channel_tiles) {
    const int heads = p.gates.v_heads;
    for (int i = threadIdx.x; i < p.row_tokens * heads; i += kUpdateThreads) {
      const int64_t token = first + i / heads;
      const Gate gate = live ? GateOf(p.gates, token, i % heads) : Gate{0, 0};
      p.gates.g[token * heads + i % heads] = gate.g;
      p.gates.beta[token * heads + i % heads] = gate.beta;
    }
    return;
  }
  const Channels<T, kVector> channels(
      p, static_cast<int>(blockIdx.x) * kBlockChannels + static_cast<int>(threadIdx.x) * 8);
  const bool wanted = p.out[0] != nullptr;
  if (!live) {
    for (int t = 0; wanted && t < p.row_tokens; ++t) channels.StoreZeros(first + t);
    return;
  }
  const int tokens = p.lengths == nullptr ? p.row_tokens : min(max(p.lengths[row], 0), p.row_tokens);
  if (tokens == 0) return;
  Eight<T> now = channels.LoadX(first);
  Eight<T> history[kHistory] = {};
  channels.LoadState(slot, history);
  for (int t = 0; t < tokens; ++t) {
    if (t > 0) now = channels.LoadX(first + t);
    if (wanted) channels.StoreToken(first + t, history[0], history[1], history[2], now);
    history[0] = history[1];
    history[1] = history[2];
    history[2] = now;
  }
  if (p.store) channels.StoreState(slot, history);
}

// Whether eight channels that follow each other lie in one segment, at multiples of 16 bytes everywhere.
bool TakesVectors(const CausalConv1dParams& p) {
  const auto element = static_cast<int64_t>(SizeOf(p.dtype));
  uintptr_t bits =
      reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) | reinterpret_cast<uintptr_t>(p.states);
  bits |= static_cast<uintptr_t>(p.x_stride * element) | static_cast<uintptr_t>(p.slot_stride * element);
  bool whole = p.dim % 8 == 0;
  for (int i = 0; i < 3; ++i) {
    bits |= reinterpret_cast<uintptr_t>(p.out[i]);
    whole = whole && p.out_dim[i] % 8 == 0;
  }
  return whole && bits % 16 == 0;
}

template <class T, bool kVector>
int LaunchConv(CUstream_st* stream, const CausalConv1dParams& p) {
  const unsigned gates = p.gates.g == nullptr ? 0 : 1;
  if (p.cu_seqlens == nullptr) {
    const unsigned tiles = static_cast<unsigned>((p.dim + kUpdateThreads * 8 - 1) / (kUpdateThreads * 8));
    CausalConvUpdateKernel<T, kVector>
        <<<dim3(tiles + gates, static_cast<unsigned>(p.requests)), kUpdateThreads, 0, stream>>>(p);
  } else {
    const unsigned tiles = static_cast<unsigned>((p.dim + kWarpChannels - 1) / kWarpChannels);
    const int64_t blocks = (p.tokens + kTileTokens - 1) / kTileTokens * (tiles + gates);
    CausalConvKernel<T, kVector><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
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
