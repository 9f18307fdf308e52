// Prefill: the gated delta rule over whole prompts, in chunks of 64 tokens. Per value head, with S = state [V, K]
// (recurrent.h has the same rule token by token) and, within a chunk, G = inclusive sums of g:
//   D[i, j] = exp(G_i - G_j) for i >= j, else 0
//   T  = (I + strict_lower(beta_i D[i, j] k_i.k_j))^-1
//   U  = T diag(beta) (V - diag(exp G) K S^T)
//   O  = scale (diag(exp G) Q S^T + (D o Q K^T) U)
//   S <- exp(G_last) S + (diag(exp(G_last - G)) U)^T K
// (Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", arXiv:2406.06484, and
// "Gated Delta Networks", arXiv:2412.06464.) No history is dropped, however strong the decay.
#ifndef PRISTINE_ATTENTION_GDN_PREFILL_H_
#define PRISTINE_ATTENTION_GDN_PREFILL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/attention/gdn/gates.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/attention/gdn/tuning.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/extent.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::attention::gdn {

struct PrefillConfig {
  Extent largest = {};                 // each bucket's requests (sequences) and tokens are at most these
  int32_t qk_heads = 0;                // v_heads is a multiple: value head j uses q and k of head
  int32_t v_heads = 0;                 //   j / (v_heads / qk_heads)
  float scale = 0.08838834764831845f;  // of q: 1 / sqrt(K)
};

// Sequences follow each other without gaps: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1]), none or more.
// q, k, v and out are bfloat16.
struct PrefillTensors {
  Rows q = {};                                // [tokens, qk_heads, K], normalised: QkvSplit with norm_head_dim 128
  Rows k = {};                                // the same; T is computed in half precision, which holds what keys
                                              //   of length 1 and beta in [0, 1] make
  Rows v = {};                                // [tokens, v_heads, V]
  DeviceSpan<const float> g = {};             // [tokens, v_heads], at most 0: Gates or QkvSplit
  DeviceSpan<const float> beta = {};          // [tokens, v_heads], in [0, 1]
  DeviceSpan<const int32_t> cu_seqlens = {};  // [requests + 1]; a padded tail repeats the last real value
  DeviceSpan<const Slot> initial_slots = {};  // [requests]; -1 starts from zeros
  // [requests]; -1 stores nothing. No slot twice, and none that another sequence starts from.
  DeviceSpan<const Slot> final_slots = {};
  DeviceSpan<std::byte> out = {};  // [tokens, v_heads, V]; tokens past the last sequence: zeros
};

// Thread-compatible; calls on streams that run side by side need one Prefill each: they share its workspace.
class Prefill {
 public:
  // Allocates the workspace, PrefillWorkspaceBytes(config) bytes, on a CUDA device, and sets kernel attributes there;
  // Host needs none. Blocks. `device` must outlive the Prefill, the Prefill every graph that uses it and all work
  // queued on it. Reads PRISTINE_GDN_CHUNK_H_* (tuning.h), here and never again; a configuration that is not compiled
  // or does not fit the device is an error, or replaced as `tuning` says, which is not kept. Host checks the same, but
  // has no limit on shared memory. INVALID_ARGUMENT: counts below 1, heads that do not fit each other, a scale that is
  // not finite and positive, a bad tuning. UNIMPLEMENTED, FAILED_PRECONDITION: a device that CheckGdnPrefill refuses.
  // RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<Prefill>> Create(Device& device, const PrefillConfig& config,
                                                         TuningPolicy* tuning = nullptr);

  // Queues one kernel, or two, or all three, of which cu_seqlens then lets one or two do the work; which are queued and
  // their grids follow from `bucket` and device alone and are exact for any cu_seqlens within it; captureable; does not
  // allocate or block. Final states are written in the pool's own dtype,
  // computed in float32 registers. A slot outside the pool counts as -1; under PaddedRows::kClampToZero an initial -1
  // reads slot 0. cu_seqlens that fall or leave [0, bucket.tokens] give wrong numbers, never a wild access.
  // INVALID_ARGUMENT: a bucket larger than config.largest, a tensor too small for it, misaligned (16 bytes for q, k, v,
  // out and their strides) or of a stride below its row, a pool of other heads. UNIMPLEMENTED: a pool that is neither
  // float32 nor bfloat16.
  absl::Status Run(Stream& stream, const Extent& bucket, const PrefillTensors& tensors, const StateView& states) const;

  const PrefillConfig& config() const { return config_; }
  // What runs; null: Run chooses one of PrefillStateKernel()'s by bucket and device, since no variable was set.
  const GdnTuning* tuning() const { return tuning_.has_value() ? &*tuning_ : nullptr; }

 private:
  Prefill(Device& device, const PrefillConfig& config) : device_(device), config_(config) {}
  Device& device_;
  const PrefillConfig config_;
  std::optional<GdnTuning> tuning_;
  DeviceBuffer workspace_;
};

// The configurations of the kernel that keeps the states, and its launcher's shared memory for each: for CheckTuning.
TunableKernel PrefillStateKernel();

// What Create allocates on a CUDA device: per 64 tokens and value head three 64 x 64 bfloat16 matrices and the gates.
// No state is part of it.
int64_t PrefillWorkspaceBytes(const PrefillConfig& config);

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_PREFILL_H_
