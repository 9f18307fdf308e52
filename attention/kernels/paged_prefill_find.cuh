// How a warp finds the request of a query tile, in two rounds of loads for up to 1023 requests.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_FIND_CUH_
#define PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_FIND_CUH_

#include <cstdint>

#include "attention/kernels/paged_prefill.h"
#include "attention/kernels/paged_prefill_tiles.h"

namespace pristine::attention {

struct PrefillTile {
  int32_t request;  // == p.requests: padded tokens
  int32_t first;    // token of the batch that the request starts with
  int32_t qo_len;
  int32_t tile;  // of the request; may lie behind its last
};

// All lanes of the warp call this and get the same. A qo_indptr that does not rise gives some tile within the tokens.
__device__ inline PrefillTile FindTile(const PagedPrefillParams& p, int64_t number, int32_t group, int32_t rows) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x & 31u);
  int32_t low = 0, count = p.requests + 1;  // the request is in [low, low + count)
  while (count > 1) {
    const int32_t step = (count + 31) / 32;
    const int32_t candidate = lane * step;
    bool starts = false;
    if (candidate < count) {
      const int32_t first = ClipToken(p.qo_indptr[low + candidate], p.tokens);
      starts = TileStart(first, low + candidate, group, rows) <= number;
    }
    const int32_t started = __popc(__ballot_sync(0xffffffffu, starts));
    const int32_t skipped = started > 0 ? (started - 1) * step : 0;
    low += skipped;
    count = min(step, count - skipped);
  }
  const int32_t first = ClipToken(p.qo_indptr[low], p.tokens);
  const int32_t last = low == p.requests ? p.tokens : ClipToken(p.qo_indptr[low + 1], p.tokens);
  const int64_t tile = number - TileStart(first, low, group, rows);
  return {low, first, max(last - first, 0), tile < 0 ? 0x3fffffff : static_cast<int32_t>(tile)};
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_FIND_CUH_
