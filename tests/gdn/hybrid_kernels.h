// What a small decoder needs besides the library's layers, over float32 and one thread per result. No Abseil:
// hybrid_kernels_cuda.cu includes this.
#ifndef PRISTINE_TESTS_GDN_HYBRID_KERNELS_H_
#define PRISTINE_TESTS_GDN_HYBRID_KERNELS_H_

#include <cmath>
#include <cstdint>

#include "pristine/graph_runtime/kernel.h"

#ifdef __CUDACC__
#define HYBRID_DEVICE __host__ __device__
#else
#define HYBRID_DEVICE
#endif

namespace pristine::testing {

// y[row] = table[tokens[row]], zeros for a token that is none.
struct EmbedParams {
  const int32_t* tokens;  // [rows]
  const float* table;     // [vocabulary, width]
  float* y;               // [rows, width]
  int32_t rows, width, vocabulary;
};
HYBRID_DEVICE inline void EmbedElement(const EmbedParams& p, int64_t row, int32_t i) {
  const int32_t token = p.tokens[row];
  const bool none = token < 0 || token >= p.vocabulary;
  p.y[row * p.width + i] = none ? 0 : p.table[int64_t{token} * p.width + i];
}

// y = x w^T, with x divided by its root mean square, or y += where that is asked for.
struct DenseParams {
  const float* x;  // [rows, in]
  const float* w;  // [out, in]
  float* y;        // [rows, out]
  int32_t rows, in, out;
  bool normalise, add;
};
HYBRID_DEVICE inline void DenseElement(const DenseParams& p, int64_t row, int32_t o) {
  const float* const x = p.x + row * p.in;
  float sum = 0, squares = 0;
  for (int32_t i = 0; i < p.in; ++i) {
    sum += p.w[int64_t{o} * p.in + i] * x[i];
    squares += x[i] * x[i];
  }
  if (p.normalise) sum /= sqrtf(squares / static_cast<float>(p.in) + 1e-6f);
  float* const y = p.y + row * p.out + o;
  *y = p.add ? *y + sum : sum;
}

// The first index of the largest.
struct ArgmaxParams {
  const float* x;  // [rows, width]
  int32_t* y;      // [rows]
  int32_t rows, width;
};
HYBRID_DEVICE inline void ArgmaxRow(const ArgmaxParams& p, int64_t row) {
  const float* const x = p.x + row * p.width;
  int32_t best = 0;
  for (int32_t i = 1; i < p.width; ++i) best = x[i] > x[best] ? i : best;
  p.y[row] = best;
}

int EmbedHost(const EmbedParams& p);
int EmbedCuda(CUstream_st* stream, const EmbedParams& p);
int DenseHost(const DenseParams& p);
int DenseCuda(CUstream_st* stream, const DenseParams& p);
int ArgmaxHost(const ArgmaxParams& p);
int ArgmaxCuda(CUstream_st* stream, const ArgmaxParams& p);

inline constexpr Kernel<EmbedParams> kEmbed{
    "embed", EmbedHost, PRISTINE_CUDA(EmbedCuda),
    [](const EmbedParams& p, WriteList& writes) { writes.Add(p.y, sizeof(float) * p.rows * p.width); }};
inline constexpr Kernel<DenseParams> kDense{
    "dense", DenseHost, PRISTINE_CUDA(DenseCuda),
    [](const DenseParams& p, WriteList& writes) { writes.Add(p.y, sizeof(float) * p.rows * p.out); }};
inline constexpr Kernel<ArgmaxParams> kArgmax{
    "argmax", ArgmaxHost, PRISTINE_CUDA(ArgmaxCuda),
    [](const ArgmaxParams& p, WriteList& writes) { writes.Add(p.y, sizeof(int32_t) * p.rows); }};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_GDN_HYBRID_KERNELS_H_
