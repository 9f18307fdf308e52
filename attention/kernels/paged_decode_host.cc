// The oracle: online softmax in base 2 over blocks of tokens. The inner loops run over independent lanes, because
// compilers do not reorder float additions by themselves and Host runs whole traces.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "attention/kernels/paged_decode.h"
#include "attention/kernels/plan_layout.h"

namespace pristine::attention {
namespace {

constexpr int kBlock = 64;  // tokens scored before their values are added
constexpr int kLanes = 16;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

template <int kHeadDim>
float Dot(const float* a, const float* b) {
  float lanes[kLanes] = {};
  for (int d = 0; d < kHeadDim; d += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += a[d + j] * b[d + j];
  }
  float sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum;
}

// sum += weight * value over `count` value rows, four rows at a time so that `sum` is loaded a quarter as often.
template <int kHeadDim>
void AddWeighted(const float* const* values, const float* weights, int count, float* sum) {
  int t = 0;
  for (; t + 4 <= count; t += 4) {
    const float *v0 = values[t], *v1 = values[t + 1], *v2 = values[t + 2], *v3 = values[t + 3];
    const float w0 = weights[t], w1 = weights[t + 1], w2 = weights[t + 2], w3 = weights[t + 3];
    for (int d = 0; d < kHeadDim; ++d) sum[d] += (w0 * v0[d] + w1 * v1[d]) + (w2 * v2[d] + w3 * v3[d]);
  }
  for (; t < count; ++t) {
    for (int d = 0; d < kHeadDim; ++d) sum[d] += weights[t] * values[t][d];
  }
}

// Pointers to float rows: the pool's own for float, converted into `storage` for others.
template <int kHeadDim>
const float* FloatRow(const float* row, float*) {
  return row;
}
template <int kHeadDim, class Kv>
const float* FloatRow(const Kv* row, float* storage) {
  for (int d = 0; d < kHeadDim; ++d) storage[d] = ToFloat(row[d]);
  return storage;
}

// The query heads of one KV head and one query token.
template <int kHeadDim>
struct State {
  float q[kDecodeMaxGroup][kHeadDim];
  float sum[kDecodeMaxGroup][kHeadDim] = {};  // over mass: the result
  float top[kDecodeMaxGroup];
  float mass[kDecodeMaxGroup] = {};  // 0: nothing is attended

  float Lse(int h) const { return mass[h] == 0 ? kMinusInfinity : top[h] + std::log2(mass[h]); }
};

// Where a query stands: row, token of the row, KV head.
struct Query {
  int32_t row, token, kv_head;
};

template <class T, class Kv, int kHeadDim>
void Attend(const PagedDecodeParams& p, const Query& query, const RowPages& pages, int64_t begin, int64_t end,
            State<kHeadDim>& state) {
  const int32_t group = p.q_heads / p.kv.kv_heads;
  const Kv* const k = static_cast<const Kv*>(p.kv.k);
  const Kv* const v = static_cast<const Kv*>(p.kv.v);
  const int64_t first_head = (int64_t{query.row} * p.q_len + query.token) * p.q_heads + query.kv_head * group;
  for (int h = 0; h < group; ++h) {
    const T* source = static_cast<const T*>(p.q) + (first_head + h) * kHeadDim;
    for (int d = 0; d < kHeadDim; ++d) state.q[h][d] = ToFloat(source[d]);
    state.top[h] = kMinusInfinity;
  }
  const Visible visible = VisibleTo(pages.length, p.q_len, p.window, query.token);
  begin = std::max(begin, visible.begin);
  end = std::min(end, visible.end);
  const ScoreScale scale = ScoreScaleOf(p);
  const float v_scale = p.kv.v_scale == nullptr ? 1.0f : *p.kv.v_scale;

  float k_storage[kBlock][kHeadDim], v_storage[kBlock][kHeadDim], weights[kBlock];
  const float *k_rows[kBlock], *v_rows[kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    int count = 0;
    for (int64_t position = block; position < std::min(block + kBlock, end); ++position) {
      const int64_t offset = KvOffset(p.kv, pages, position, query.kv_head);
      if (offset < 0) continue;
      k_rows[count] = FloatRow<kHeadDim>(k + offset, k_storage[count]);
      v_rows[count] = FloatRow<kHeadDim>(v + offset, v_storage[count]);
      ++count;
    }
    if (count == 0) continue;
    for (int h = 0; h < group; ++h) {
      float new_top = state.top[h];
      for (int t = 0; t < count; ++t) {
        const float inner = scale.inner * Dot<kHeadDim>(state.q[h], k_rows[t]);
        weights[t] = scale.outer == 0 ? inner : scale.outer * std::tanh(inner);
        new_top = std::max(new_top, weights[t]);
      }
      const float safe_top = new_top == kMinusInfinity ? 0.0f : new_top;
      const float decay = std::exp2(state.top[h] - safe_top);
      float block_mass = 0;
      for (int t = 0; t < count; ++t) {
        weights[t] = std::exp2(weights[t] - safe_top);
        block_mass += weights[t];
      }
      state.mass[h] = state.mass[h] * decay + block_mass;
      if (decay != 1.0f) {
        for (int d = 0; d < kHeadDim; ++d) state.sum[h][d] *= decay;
      }
      AddWeighted<kHeadDim>(v_rows, weights, count, state.sum[h]);
      state.top[h] = new_top;
    }
  }
  for (int h = 0; h < group; ++h) {
    for (int d = 0; d < kHeadDim; ++d) state.sum[h][d] *= v_scale;
  }
}

template <class T, class Kv, int kHeadDim>
void RunItems(const PagedDecodeParams& p) {
  const int32_t group = p.q_heads / p.kv.kv_heads;
  const int32_t* items = p.plan + PlanItemsAt(p.rows);
  const int32_t count = std::min(p.plan[kPlanCount], p.max_items);
  for (int32_t i = 0; i < count; ++i) {
    const int32_t* item = items + int64_t{3} * i;
    const int64_t first = int64_t{i} * p.q_len * p.q_heads;
    const bool in_range = item[0] >= 0 && item[0] < p.rows;
    const RowPages pages = in_range ? PagesOf(p.kv, item[0]) : RowPages{0, 0};
    if (std::max(item[1], 0) >= std::min<int64_t>(item[2], pages.length)) {
      std::fill_n(p.partial_lse + first, int64_t{p.q_len} * p.q_heads, kMinusInfinity);
      continue;
    }
    for (int32_t token = 0; token < p.q_len; ++token) {
      for (int32_t kv_head = 0; kv_head < p.kv.kv_heads; ++kv_head) {
        State<kHeadDim> state;
        Attend<T, Kv, kHeadDim>(p, {item[0], token, kv_head}, pages, item[1], item[2], state);
        for (int h = 0; h < group; ++h) {
          const int64_t place = first + token * p.q_heads + kv_head * group + h;
          p.partial_lse[place] = state.Lse(h);
          if (state.mass[h] == 0) continue;
          for (int d = 0; d < kHeadDim; ++d) p.partial_out[place * kHeadDim + d] = state.sum[h][d] / state.mass[h];
        }
      }
    }
  }
}

template <class T, class Kv, int kHeadDim>
void RunRows(const PagedDecodeParams& p) {
  constexpr float kLog2E = 1.44269504088896340736f;
  const int32_t group = p.q_heads / p.kv.kv_heads;
  for (int32_t row = 0; row < p.rows; ++row) {
    const RowPages pages = PagesOf(p.kv, row);
    for (int32_t token = 0; token < p.q_len; ++token) {
      for (int32_t kv_head = 0; kv_head < p.kv.kv_heads; ++kv_head) {
        State<kHeadDim> state;
        Attend<T, Kv, kHeadDim>(p, {row, token, kv_head}, pages, 0, pages.length, state);
        for (int h = 0; h < group; ++h) {
          const int32_t head = kv_head * group + h;
          // A sink takes part of the mass of those that attend anything.
          if (state.mass[h] != 0 && p.sinks != nullptr) {
            const float sink = p.sinks[head] * kLog2E;
            const float top = std::max(state.top[h], sink);
            const float decay = std::exp2(state.top[h] - top);
            state.mass[h] = state.mass[h] * decay + std::exp2(sink - top);
            for (int d = 0; d < kHeadDim; ++d) state.sum[h][d] *= decay;
            state.top[h] = top;
          }
          const int64_t place = (int64_t{row} * p.q_len + token) * p.q_heads + head;
          T* const out = static_cast<T*>(p.out) + place * kHeadDim;
          for (int d = 0; d < kHeadDim; ++d) {
            out[d] = FromFloat<T>(state.mass[h] == 0 ? 0.0f : state.sum[h][d] / state.mass[h]);
          }
          if (p.lse != nullptr) p.lse[place].value = state.Lse(h);
        }
      }
    }
  }
}

}  // namespace

template <class T, class Kv, int kHeadDim>
int PagedDecodeHost(const PagedDecodeParams& p) {
  if (p.plan != nullptr) {
    RunItems<T, Kv, kHeadDim>(p);
  } else {
    RunRows<T, Kv, kHeadDim>(p);
  }
  return 0;
}

template int PagedDecodeHost<float, float, 64>(const PagedDecodeParams&);
template int PagedDecodeHost<float, float, 128>(const PagedDecodeParams&);
template int PagedDecodeHost<BFloat16, BFloat16, 64>(const PagedDecodeParams&);
template int PagedDecodeHost<BFloat16, BFloat16, 128>(const PagedDecodeParams&);
template int PagedDecodeHost<BFloat16, BFloat16, 256>(const PagedDecodeParams&);
template int PagedDecodeHost<Float16, Float16, 64>(const PagedDecodeParams&);
template int PagedDecodeHost<Float16, Float16, 128>(const PagedDecodeParams&);
template int PagedDecodeHost<Float16, Float16, 256>(const PagedDecodeParams&);
template int PagedDecodeHost<BFloat16, Float8E4M3, 64>(const PagedDecodeParams&);
template int PagedDecodeHost<BFloat16, Float8E4M3, 128>(const PagedDecodeParams&);
template int PagedDecodeHost<BFloat16, Float8E4M3, 256>(const PagedDecodeParams&);
template int PagedDecodeHost<Float16, Float8E4M3, 64>(const PagedDecodeParams&);
template int PagedDecodeHost<Float16, Float8E4M3, 128>(const PagedDecodeParams&);
template int PagedDecodeHost<Float16, Float8E4M3, 256>(const PagedDecodeParams&);

}  // namespace pristine::attention
