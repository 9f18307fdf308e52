// Which block of a prefill kernel works on which queries. Found on the device, so that the grid follows from the bucket
// alone. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_TILES_H_
#define PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_TILES_H_

#include <cstdint>

#include "attention/kernels/host_device.h"

namespace pristine::attention {

// Query tiles. A request has group rows for each of its tokens, row = token * group + head, and tiles of kRows rows of
// its own. Request r numbers its tiles from TileStart(r): with a = qo_indptr[r] * group and b = qo_indptr[r + 1] *
// group, floor(b / kRows) + 1 - floor(a / kRows) numbers are there for ceil((b - a) / kRows) tiles, which never need
// more. So no sum over requests is needed. `requests` itself stands for the padded tokens behind the last request.
PRISTINE_HOST_DEVICE constexpr int64_t TileStart(int64_t first_token, int64_t request, int32_t group, int32_t rows) {
  return first_token * group / rows + request;
}
// Numbers in use: what a grid covers, for any qo_indptr within `tokens`.
PRISTINE_HOST_DEVICE constexpr int64_t TileCount(int64_t tokens, int64_t requests, int32_t group, int32_t rows) {
  return TileStart(tokens, requests, group, rows) + 1;
}
PRISTINE_HOST_DEVICE inline int32_t ClipToken(int32_t token, int32_t tokens) {
  return token < 0 ? 0 : token > tokens ? tokens : token;
}

}  // namespace pristine::attention

#endif  // PRISTINE_ATTENTION_KERNELS_PAGED_PREFILL_TILES_H_
