// FindPolluter: which node of a body writes where it must not.
#ifndef PRISTINE_BUFFERS_POLLUTION_H_
#define PRISTINE_BUFFERS_POLLUTION_H_

#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/buffers/buffer_manager.h"

namespace pristine {

// Restores everything for `bucket`, then runs `body` eagerly on `stream`, node by node, and compares constants,
// refilled buffers and guard bands with what they held before, after each; every violation names the node that wrote.
// Foreign work cannot be watched by itself: a change found after a node of ours that directly follows foreign work is
// charged to the latter, as "before " and that node. To learn of foreign work, `body` is captured once more (the graph
// is dropped). Works on both backends, without declarations. Slow; blocks; leaves the buffers restored. An error of
// `body` is returned.
absl::StatusOr<std::vector<Violation>> FindPolluter(BufferManager& manager, Stream& stream, const Extent& bucket,
                                                    absl::FunctionRef<absl::Status(Stream&)> body);

}  // namespace pristine

#endif  // PRISTINE_BUFFERS_POLLUTION_H_
