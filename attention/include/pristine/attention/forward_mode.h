// Route: which kernels a step runs, as one pure function of what kind of step it is, of the device and of the model's
// shape. Engines that decide this in several places have sent ragged steps to a kernel for uniform ones (sglang PR
// #24856: an illegal access); here nobody but Route chooses, and StepAttention does what it says.
#ifndef PRISTINE_ATTENTION_FORWARD_MODE_H_
#define PRISTINE_ATTENTION_FORWARD_MODE_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "pristine/attention/device_caps.h"
#include "pristine/attention/types.h"

namespace pristine::attention {

// What a step does with its requests.
enum class ForwardMode {
  kDecode,        // one new token each
  kExtend,        // new tokens behind a prefix, as many as each has: prefill, chunks of it
  kMixed,         // some decode, some extend
  kIdle,          // nobody: a rank that only takes part in collectives
  kTargetVerify,  // the target model looks at the draft's tokens, as many for each request
  kDraftExtend,   // the draft model takes in what was accepted: as many tokens as each request got
};
const char* ToString(ForwardMode mode);

enum class KernelFamily {
  kNone,     // nothing is launched
  kDecode,   // split-KV over few query tokens, the same number for each request: a constant of the graph
  kContext,  // tiles of query tokens, ragged: qo_indptr says whose they are
};
const char* ToString(KernelFamily family);

// Most query tokens of a request that the decode kernels take.
inline constexpr int32_t kMaxDecodeQLen = 16;

struct RouteConfig {
  DType dtype = DType::kBFloat16;     // of q and out
  DType kv_dtype = DType::kBFloat16;  // of the KV cache: dtype, or float8_e4m3
  int32_t q_heads = 0, kv_heads = 0;  // q_heads % kv_heads == 0
  int32_t head_dim = 0;
  int32_t page_size = 1;  // tokens
  // Query tokens of every request, a constant of the graphs that are captured for the mode. 0: requests differ, from
  // each other or from step to step.
  int32_t q_len = 1;
  // Draft extend of a fixed q_len takes the decode kernels instead, which split a long KV over the card (sglang
  // measured 4.7 % more tokens per second, for one request). Refused where requests differ.
  bool decode_draft_extend = false;
};

//   mode                        q_len           family
//   idle                        any             none, whatever else is asked
//   decode                      1               decode
//   target verify               2 … 16          decode
//   extend, mixed               any             context
//   draft extend                any             context
//     with decode_draft_extend  1 … 16          decode
//
// Does not look at anything but its arguments. INVALID_ARGUMENT: a q_len that the mode does not have, with the modes
// that do; sizes that do not fit together. UNIMPLEMENTED: the device, its driver, a dtype or a size that the family has
// no kernel for; says what was found, what there is, and what else could run it.
absl::StatusOr<KernelFamily> Route(ForwardMode mode, const DeviceCaps& caps, const RouteConfig& config);

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_FORWARD_MODE_H_
