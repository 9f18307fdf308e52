// The two kernels around the gated delta net layers: what the projections would hand to them, and the comparison of two
// models' states. No Abseil, no CUDA headers.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_KERNELS_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "examples/replay_driver/gdn_config.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/kernel.h"

namespace pristine::replay_driver {

// The inputs of one layer. Row r is the token of requests[r] at positions[r], zeros where the request is -1, or what
// drafts[r] says was guessed there (TokenSeed); without `requests` that of `request` at `first` + r.
struct GdnInputsParams {
  uint64_t seed;
  int32_t layer, rows, dim, v_heads;
  attention::DType dtype;
  const int32_t* requests;   // [rows], or null
  const int32_t* positions;  // [rows]
  const int32_t* drafts;     // [rows], or null
  int32_t request, first;
  void* mixed;   // [rows, dim]
  void* a;       // [rows, v_heads]
  void* b;       // the same
  int32_t slot;  // of `request`
  // Without `requests`: gets slot, 0, rows, as the ops that take the row in read them.
  int32_t* prompt;
};

// differences[s * layers + l] = 1 where the states of layer l in slot s differ in any byte, and stays as it is
// elsewhere.
struct StateDifferencesParams {
  const std::byte *one, *other;  // [slots, layers, layer_bytes]
  int32_t slots, layers;
  int64_t layer_bytes;   // a multiple of 4
  int32_t* differences;  // [slots, layers]
};

extern const Kernel<GdnInputsParams> kGdnInputs;
extern const Kernel<StateDifferencesParams> kStateDifferences;

int LaunchGdnInputs(CUstream_st* stream, const GdnInputsParams& params);
int LaunchStateDifferences(CUstream_st* stream, const StateDifferencesParams& params);

// Element i of row `row`: first `dim` of mixed, then those of a and of b.
PRISTINE_HOST_DEVICE inline void WriteGdnInput(const GdnInputsParams& p, int64_t row, int32_t i) {
  const bool prompt = p.requests == nullptr;
  const int32_t request = prompt ? p.request : p.requests[row];
  const int32_t position = prompt ? p.first + static_cast<int32_t>(row) : p.positions[row];
  GdnTensor tensor = GdnTensor::kMixed;
  void* base = p.mixed;
  int32_t width = p.dim;
  int32_t element = i;
  if (i >= p.dim) {
    const bool is_b = i - p.dim >= p.v_heads;
    tensor = is_b ? GdnTensor::kB : GdnTensor::kA;
    base = is_b ? p.b : p.a;
    width = p.v_heads;
    element = i - p.dim - (is_b ? p.v_heads : 0);
  }
  float value = 0;
  const uint64_t seed = p.drafts == nullptr ? p.seed : TokenSeed(p.seed, p.drafts[row]);
  if (request >= 0) value = GdnElement(GdnKey(seed, request, p.layer, position, tensor), tensor, element);
  const int64_t to = row * width + element;
  if (p.dtype == attention::DType::kFloat32) {
    static_cast<float*>(base)[to] = value;
  } else {
    static_cast<uint16_t*>(base)[to] = ToBFloat16(value);
  }
  if (prompt && row == 0 && i == 0) {
    p.prompt[0] = p.slot;
    p.prompt[1] = 0;
    p.prompt[2] = p.rows;
  }
}

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_GDN_KERNELS_H_
