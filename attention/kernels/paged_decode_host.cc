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

struct Range {
  int64_t begin = 0, end = 0;  // positions of the row that the item attends
  int64_t first_page = 0;      // into kv_indices
};

// The item clipped to what the device holds for its row: pages, length and window.
Range Clip(const PagedDecodeParams& p, const int32_t* item) {
  const int32_t row = item[0];
  if (row < 0 || row >= p.rows) return {};
  const int64_t first = p.kv_indptr[row];
  const int64_t last = std::min<int64_t>(p.kv_indptr[row + 1], p.kv_indices_size);
  if (first < 0 || last <= first) return {};
  const int64_t stored = (last - first) * p.page_size;
  const int64_t length = p.lengths == nullptr ? stored : std::min<int64_t>(p.lengths[row], stored);
  const int64_t visible = p.window > 0 ? std::max<int64_t>(0, length - p.window) : 0;
  return {std::max<int64_t>(item[1], visible), std::min<int64_t>(item[2], length), first};
}

// Walks the positions of a row and says where each lies in the pool.
class PoolCursor {
 public:
  PoolCursor(const PagedDecodeParams& p, const Range& range, int32_t kv_head)
      : params_(p),
        kv_head_(kv_head),
        page_(p.kv_indices + range.first_page + range.begin / p.page_size),
        in_page_(range.begin % p.page_size) {}
  // The element offset of the position's row, or -1 where the page does not exist.
  int64_t Offset() const {
    const int64_t page = *page_;
    if (page < 0 || page >= params_.num_pages) return -1;
    return ((page * params_.page_size + in_page_) * params_.kv_heads + kv_head_) * params_.head_dim;
  }
  void Advance() {
    if (++in_page_ < params_.page_size) return;
    in_page_ = 0;
    ++page_;
  }

 private:
  const PagedDecodeParams& params_;
  const int32_t kv_head_;
  const int32_t* page_;
  int64_t in_page_;
};

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

// Pointers to float rows: the pool's own for float, converted into `storage` for bfloat16.
template <int kHeadDim>
const float* FloatRow(const float* row, float*) {
  return row;
}
template <int kHeadDim>
const float* FloatRow(const BFloat16* row, float* storage) {
  for (int d = 0; d < kHeadDim; ++d) storage[d] = ToFloat(row[d]);
  return storage;
}

template <class T, int kHeadDim>
void RunItem(const PagedDecodeParams& p, int32_t item, int32_t row, const Range& range, int32_t kv_head) {
  const int32_t group = p.q_heads / p.kv_heads;
  const T* k = static_cast<const T*>(p.k);
  const T* v = static_cast<const T*>(p.v);
  float q[kDecodeMaxGroup][kHeadDim], sum[kDecodeMaxGroup][kHeadDim] = {};
  float top[kDecodeMaxGroup], mass[kDecodeMaxGroup] = {};
  for (int h = 0; h < group; ++h) {
    const T* source = static_cast<const T*>(p.q) + (int64_t{row} * p.q_heads + kv_head * group + h) * kHeadDim;
    for (int d = 0; d < kHeadDim; ++d) q[h][d] = ToFloat(source[d]) * p.scale_log2;
    top[h] = kMinusInfinity;
  }
  float k_storage[kBlock][kHeadDim], v_storage[kBlock][kHeadDim], weights[kBlock];
  const float *k_rows[kBlock], *v_rows[kBlock];
  PoolCursor cursor(p, range, kv_head);
  for (int64_t block = range.begin; block < range.end; block += kBlock) {
    int count = 0;
    for (int64_t position = block; position < std::min(block + kBlock, range.end); ++position, cursor.Advance()) {
      const int64_t offset = cursor.Offset();
      if (offset < 0) continue;
      k_rows[count] = FloatRow<kHeadDim>(k + offset, k_storage[count]);
      v_rows[count] = FloatRow<kHeadDim>(v + offset, v_storage[count]);
      ++count;
    }
    if (count == 0) continue;
    for (int h = 0; h < group; ++h) {
      float new_top = top[h];
      for (int t = 0; t < count; ++t) {
        weights[t] = Dot<kHeadDim>(q[h], k_rows[t]);
        new_top = std::max(new_top, weights[t]);
      }
      const float safe_top = new_top == kMinusInfinity ? 0.0f : new_top;
      const float decay = std::exp2(top[h] - safe_top);
      float block_mass = 0;
      for (int t = 0; t < count; ++t) {
        weights[t] = std::exp2(weights[t] - safe_top);
        block_mass += weights[t];
      }
      mass[h] = mass[h] * decay + block_mass;
      if (decay != 1.0f) {
        for (int d = 0; d < kHeadDim; ++d) sum[h][d] *= decay;
      }
      AddWeighted<kHeadDim>(v_rows, weights, count, sum[h]);
      top[h] = new_top;
    }
  }
  for (int h = 0; h < group; ++h) {
    const int64_t place = int64_t{item} * p.q_heads + kv_head * group + h;
    if (mass[h] == 0) {
      p.partial_lse[place] = kMinusInfinity;
      continue;
    }
    p.partial_lse[place] = top[h] + std::log2(mass[h]);
    for (int d = 0; d < kHeadDim; ++d) p.partial_out[place * kHeadDim + d] = sum[h][d] / mass[h];
  }
}

}  // namespace

template <class T, int kHeadDim>
int PagedDecodeHost(const PagedDecodeParams& p) {
  const int32_t* items = p.plan + PlanItemsAt(p.rows);
  const int32_t count = std::min(p.plan[kPlanCount], p.max_items);
  for (int32_t i = 0; i < count; ++i) {
    const int32_t* item = items + int64_t{3} * i;
    const Range range = Clip(p, item);
    if (range.begin >= range.end) {
      for (int32_t h = 0; h < p.q_heads; ++h) p.partial_lse[int64_t{i} * p.q_heads + h] = kMinusInfinity;
      continue;
    }
    for (int32_t head = 0; head < p.kv_heads; ++head) RunItem<T, kHeadDim>(p, i, item[0], range, head);
  }
  return 0;
}

template int PagedDecodeHost<float, 64>(const PagedDecodeParams&);
template int PagedDecodeHost<float, 128>(const PagedDecodeParams&);
template int PagedDecodeHost<BFloat16, 64>(const PagedDecodeParams&);
template int PagedDecodeHost<BFloat16, 128>(const PagedDecodeParams&);

}  // namespace pristine::attention
