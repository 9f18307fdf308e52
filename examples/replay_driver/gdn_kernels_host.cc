#include <cstring>

#include "examples/replay_driver/gdn_kernels.h"

namespace pristine::replay_driver {
namespace {

int RunGdnInputs(const GdnInputsParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int32_t i = 0; i < p.dim + 2 * p.v_heads; ++i) WriteGdnInput(p, row, i);
  }
  return 0;
}

void WritesOfGdnInputs(const GdnInputsParams& p, WriteList& writes) {
  const size_t element_rows = static_cast<size_t>(p.rows) * attention::SizeOf(p.dtype);
  writes.Add(p.mixed, element_rows * p.dim);
  writes.Add(p.a, element_rows * p.v_heads);
  writes.Add(p.b, element_rows * p.v_heads);
  if (p.requests == nullptr) writes.Add(p.prompt, 3 * sizeof(int32_t));
}

int RunStateDifferences(const StateDifferencesParams& p) {
  for (int64_t i = 0; i < int64_t{p.slots} * p.layers; ++i) {
    const size_t at = static_cast<size_t>(i * p.layer_bytes);
    if (std::memcmp(p.one + at, p.other + at, static_cast<size_t>(p.layer_bytes)) != 0) p.differences[i] = 1;
  }
  return 0;
}

void WritesOfStateDifferences(const StateDifferencesParams& p, WriteList& writes) {
  writes.Add(p.differences, static_cast<size_t>(p.slots) * p.layers * sizeof(int32_t));
}

}  // namespace

const Kernel<GdnInputsParams> kGdnInputs = {"gdn_inputs", RunGdnInputs, PRISTINE_CUDA(LaunchGdnInputs),
                                            WritesOfGdnInputs};
const Kernel<StateDifferencesParams> kStateDifferences = {
    "state_differences", RunStateDifferences, PRISTINE_CUDA(LaunchStateDifferences), WritesOfStateDifferences};

}  // namespace pristine::replay_driver
