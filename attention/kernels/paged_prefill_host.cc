// The oracle: online softmax in base 2, a few queries of a KV head at a time over blocks of tokens. The inner loops run
// over independent lanes, because compilers do not reorder float additions by themselves and Host runs whole traces.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "attention/kernels/paged_prefill.h"

namespace pristine::attention {
namespace {

constexpr int kRows = 64;   // (query, head) pairs that share a block of K and V
constexpr int kBlock = 32;  // tokens
constexpr int kMaxHeadDim = 256;
constexpr int kLanes = 16;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

float Dot(const float* a, const float* b, int32_t size) {
  float lanes[kLanes] = {};
  for (int32_t d = 0; d < size; d += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += a[d + j] * b[d + j];
  }
  float sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum;
}

// The softmax state of one (query, head).
struct Row {
  int64_t token;       // of the batch
  int32_t head;        // of q
  int64_t begin, end;  // positions attended
  float top;           // base 2
  float mass;
  float q[kMaxHeadDim];
  float sum[kMaxHeadDim];
};

void Decay(Row& row, float top, int32_t head_dim) {
  const float decay = std::exp2(row.top - top);
  row.mass *= decay;
  for (int32_t d = 0; d < head_dim; ++d) row.sum[d] *= decay;
  row.top = top;
}

// Adds the tokens [block, block + count) of which positions[i] are there, with rows keys[i] and values[i].
void AddBlock(const PagedPrefillParams& p, float scale, const int64_t* positions, const float (*keys)[kMaxHeadDim],
              const float (*values)[kMaxHeadDim], int count, Row& row) {
  float scores[kBlock];
  float top = row.top;
  for (int i = 0; i < count; ++i) {
    scores[i] = kMinusInfinity;
    if (positions[i] < row.begin || positions[i] >= row.end) continue;
    float score = scale * Dot(row.q, keys[i], p.head_dim);
    if (p.soft_cap > 0) score = p.soft_cap * std::tanh(score / p.soft_cap);
    scores[i] = score * kLog2E;
    top = std::isnan(scores[i]) ? scores[i] : std::max(top, scores[i]);  // NaN stays: the result is NaN
  }
  if (top == kMinusInfinity) return;
  if (top > row.top) Decay(row, top, p.head_dim);
  for (int i = 0; i < count; ++i) {
    if (positions[i] < row.begin || positions[i] >= row.end) continue;
    const float weight = std::exp2(scores[i] - top);
    row.mass += weight;
    for (int32_t d = 0; d < p.head_dim; ++d) row.sum[d] += weight * values[i][d];
  }
}

template <class T>
void Store(const PagedPrefillParams& p, float v_scale, Row& row) {
  const int64_t place = row.token * p.q_heads + row.head;
  T* const out = static_cast<T*>(p.out) + place * p.head_dim;
  const bool empty = row.mass == 0;
  if (!empty && p.sinks != nullptr) {
    const float sink = p.sinks[row.head] * kLog2E;
    Decay(row, std::max(row.top, sink), p.head_dim);
    row.mass += std::exp2(sink - row.top);
  }
  for (int32_t d = 0; d < p.head_dim; ++d) out[d] = FromFloat<T>(empty ? 0.0f : row.sum[d] / row.mass * v_scale);
  if (p.lse != nullptr) p.lse[place] = empty ? kMinusInfinity : row.top + std::log2(row.mass);
}

// Queries [begin, end) of a request whose tokens are [first, last), for one KV head.
template <class T, class KV>
void RunTile(const PagedPrefillParams& p, const RowPages& pages, int64_t first, int64_t last, int64_t begin,
             int64_t end, int32_t kv_head) {
  const float scale = p.kv.k_scale == nullptr ? p.scale : p.scale * p.kv.k_scale[0];
  const int32_t group = p.q_heads / p.kv.kv_heads;
  Row rows[kRows];
  int count = 0;
  int64_t from = pages.length, to = 0;  // positions that any of them attends
  for (int64_t token = begin; token < end; ++token) {
    const int64_t position = pages.length - (last - first) + (token - first);
    const int64_t visible = p.window > 0 ? std::max<int64_t>(0, position + 1 - p.window) : 0;
    for (int32_t h = 0; h < group; ++h) {
      Row& row = rows[count++];
      row.token = token;
      row.head = kv_head * group + h;
      row.begin = visible;
      row.end = std::max<int64_t>(0, position + 1);
      row.top = kMinusInfinity;
      row.mass = 0;
      const T* const q = static_cast<const T*>(p.q) + (token * p.q_heads + row.head) * p.head_dim;
      for (int32_t d = 0; d < p.head_dim; ++d) row.q[d] = ToFloat(q[d]);
      std::fill_n(row.sum, p.head_dim, 0.0f);
    }
    from = std::min(from, visible);
    to = std::max(to, position + 1);
  }
  float keys[kBlock][kMaxHeadDim], values[kBlock][kMaxHeadDim];
  int64_t positions[kBlock];
  for (int64_t block = from; block < to; block += kBlock) {
    int tokens = 0;
    for (int64_t position = block; position < std::min(block + kBlock, to); ++position) {
      const int64_t offset = KvOffset(p.kv, pages, position, kv_head);
      if (offset < 0) continue;
      const KV* const k = static_cast<const KV*>(p.kv.k) + offset;
      const KV* const v = static_cast<const KV*>(p.kv.v) + offset;
      for (int32_t d = 0; d < p.head_dim; ++d) keys[tokens][d] = ToFloat(k[d]);
      for (int32_t d = 0; d < p.head_dim; ++d) values[tokens][d] = ToFloat(v[d]);
      positions[tokens++] = position;
    }
    for (int i = 0; i < count; ++i) AddBlock(p, scale, positions, keys, values, tokens, rows[i]);
  }
  for (int i = 0; i < count; ++i) Store<T>(p, p.kv.v_scale == nullptr ? 1.0f : p.kv.v_scale[0], rows[i]);
}

}  // namespace

template <class T, class KV>
int PagedPrefillHost(const PagedPrefillParams& p) {
  const auto indptr = [&p](int32_t r) { return std::clamp<int64_t>(p.qo_indptr[r], 0, p.tokens); };
  const int64_t step = std::max(1, kRows / (p.q_heads / p.kv.kv_heads));
  for (int32_t r = 0; r < p.requests; ++r) {
    const RowPages pages = PagesOf(p.kv, r);
    const int64_t first = indptr(r), last = indptr(r + 1);
    for (int64_t token = first; token < last; token += step) {
      for (int32_t head = 0; head < p.kv.kv_heads; ++head) {
        RunTile<T, KV>(p, pages, first, last, token, std::min(token + step, last), head);
      }
    }
  }
  const int64_t padding = indptr(p.requests) * p.q_heads, all = int64_t{p.tokens} * p.q_heads;
  std::fill_n(static_cast<T*>(p.out) + padding * p.head_dim, (all - padding) * p.head_dim, T{});
  if (p.lse != nullptr) std::fill_n(p.lse + padding, all - padding, kMinusInfinity);
  return 0;
}

template int PagedPrefillHost<float, float>(const PagedPrefillParams&);
template int PagedPrefillHost<Float16, Float16>(const PagedPrefillParams&);
template int PagedPrefillHost<Float16, Float8E4M3>(const PagedPrefillParams&);
template int PagedPrefillHost<BFloat16, BFloat16>(const PagedPrefillParams&);
template int PagedPrefillHost<BFloat16, Float8E4M3>(const PagedPrefillParams&);

}  // namespace pristine::attention
