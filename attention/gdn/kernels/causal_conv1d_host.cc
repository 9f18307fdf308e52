#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/gdn/kernels/causal_conv1d.h"
#include "attention/gdn/kernels/qkv_split.h"
#include "attention/kernels/bfloat16.h"

namespace pristine::attention::gdn {
namespace {

constexpr int kHistory = 3;

// Writes token `token` of all segments; y has `dim` channels, or is null for zeros.
template <class T>
void Store(const CausalConv1dParams& p, int64_t token, const T* y) {
  for (int i = 0; i < 3 && p.out[i] != nullptr; ++i) {
    T* const to = static_cast<T*>(p.out[i]) + token * p.out_dim[i];
    if (y == nullptr) {
      std::fill_n(to, p.out_dim[i], FromFloat<T>(0));
      continue;
    }
    std::copy_n(y, p.out_dim[i], to);
    y += p.out_dim[i];
    if (i == 2 || p.norm_head_dim == 0) continue;
    for (T* head = to; head < to + p.out_dim[i]; head += p.norm_head_dim) {
      double sum = kNormEpsilon;
      for (int32_t c = 0; c < p.norm_head_dim; ++c) sum += double{ToFloat(head[c])} * ToFloat(head[c]);
      for (int32_t c = 0; c < p.norm_head_dim; ++c) {
        head[c] = FromFloat<T>(static_cast<float>(ToFloat(head[c]) / std::sqrt(sum)));
      }
    }
  }
}

template <class T>
void Convolve(const CausalConv1dParams& p, std::vector<bool>& live) {
  const T* const x = static_cast<const T*>(p.x);
  const T* const weight = static_cast<const T*>(p.weight);
  std::vector<T> y(p.dim), window(static_cast<size_t>(p.dim) * (kHistory + 1));
  for (int32_t r = 0; r < p.requests; ++r) {
    int64_t begin = int64_t{r} * p.row_tokens, end = begin + p.row_tokens;
    if (p.cu_seqlens != nullptr) {
      begin = std::clamp<int64_t>(p.cu_seqlens[r], 0, p.tokens);
      end = std::clamp<int64_t>(p.cu_seqlens[r + 1], 0, p.tokens);
    }
    if (p.lengths != nullptr) end = begin + std::clamp(p.lengths[r], 0, p.row_tokens);
    const int32_t slot = p.cache_indices[r];
    if (slot < 0 || slot >= p.slots || begin >= end) continue;
    T* const state = static_cast<T*>(p.states) + slot * p.slot_stride;
    const bool initial = p.has_initial_state == nullptr || p.has_initial_state[r] != 0;
    for (int64_t c = 0; c < p.dim; ++c) {
      for (int j = 0; j < kHistory; ++j) {
        window[c * (kHistory + 1) + j + 1] = initial ? state[c * kHistory + j] : FromFloat<T>(0);
      }
    }
    for (int64_t t = begin; t < end; ++t) {
      live[t] = true;
      for (int64_t c = 0; c < p.dim; ++c) {
        T* const w = &window[c * (kHistory + 1)];
        std::copy(w + 1, w + kHistory + 1, w);
        w[kHistory] = x[t * p.x_stride + c];
        double sum = p.bias == nullptr ? 0 : ToFloat(static_cast<const T*>(p.bias)[c]);
        for (int j = 0; j <= kHistory; ++j) {
          sum += double{ToFloat(weight[c * (kHistory + 1) + j])} * ToFloat(w[j]);
        }
        y[c] = FromFloat<T>(static_cast<float>(sum / (1 + std::exp(-sum))));
      }
      Store(p, t, y.data());
    }
    if (!p.store) continue;
    for (int64_t c = 0; c < p.dim; ++c) {
      std::copy_n(&window[c * (kHistory + 1) + 1], kHistory, &state[c * kHistory]);
    }
  }
}

}  // namespace

int CausalConv1dHost(const CausalConv1dParams& p) {
  std::vector<bool> live(static_cast<size_t>(p.tokens));  // tokens of requests that have a slot
  const bool narrow = p.dtype == DType::kBFloat16;
  narrow ? Convolve<BFloat16>(p, live) : Convolve<float>(p, live);
  if (p.gates.g != nullptr) GatesHost(p.gates);
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (live[t]) continue;
    narrow ? Store<BFloat16>(p, t, nullptr) : Store<float>(p, t, nullptr);
    if (p.gates.g == nullptr) continue;
    std::fill_n(p.gates.g + t * p.gates.v_heads, p.gates.v_heads, 0.f);
    std::fill_n(p.gates.beta + t * p.gates.v_heads, p.gates.v_heads, 0.f);
  }
  return 0;
}

}  // namespace pristine::attention::gdn
