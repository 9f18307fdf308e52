#include "pristine/attention/gdn/gates.h"

#include "absl/strings/str_cat.h"
#include "attention/gdn/check.h"
#include "attention/gdn/kernels/gates.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention::gdn {
namespace {

void GatesWrites(const GatesParams& p, WriteList& writes) {
  const size_t bytes = static_cast<size_t>(p.tokens) * p.v_heads * sizeof(float);
  writes.Add(p.g, bytes);
  writes.Add(p.beta, bytes);
}

constexpr Kernel<GatesParams> kGates = {"gdn_gates", &GatesHost, PRISTINE_CUDA(&GatesCuda), &GatesWrites};

}  // namespace

absl::Status Gates(Stream& stream, int32_t tokens, const GateInputs& inputs, DeviceSpan<float> g,
                   DeviceSpan<float> beta) {
  if (tokens < 0) {
    return absl::InvalidArgumentError(absl::StrCat("gdn_gates: tokens is ", tokens, ", must be at least 0"));
  }
  GatesParams params = {};
  PRISTINE_RETURN_IF_ERROR(CheckGates("gdn_gates", inputs, tokens, params));
  const int64_t need = int64_t{tokens} * inputs.v_heads;
  PRISTINE_RETURN_IF_ERROR(CheckTensor("gdn_gates", "g", g.address(), g.bytes(), sizeof(float), need, sizeof(float)));
  PRISTINE_RETURN_IF_ERROR(
      CheckTensor("gdn_gates", "beta", beta.address(), beta.bytes(), sizeof(float), need, sizeof(float)));
  if (tokens == 0) return absl::OkStatus();
  params.g = g.address();
  params.beta = beta.address();
  return Launch(stream, kGates, params);
}

}  // namespace pristine::attention::gdn
