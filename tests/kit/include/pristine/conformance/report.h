// What the conformance kit finds, and what all wrappers under it have in common.
#ifndef PRISTINE_CONFORMANCE_REPORT_H_
#define PRISTINE_CONFORMANCE_REPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "pristine/buffers/buffer_spec.h"
#include "pristine/graph_runtime/memory.h"

namespace pristine::conformance {

// A device array that Prepare and Run keep up to date and that kernels read. The kit fills all of it with poison
// before each Prepare, in stream order: what kernels read must be written by Prepare or Run, padding included.
struct BoundArray {
  Kind kind = Kind::kPageTable;  // any but kMask and kOpaque
  DeviceSpan<int32_t> live;
  int32_t limit = 0;  // as BufferSpec::limit; one past it must still be mapped for pages and slots: the kit's pools are
};

struct Finding {
  enum class Kind {
    kRefused,          // an error for a legal step; or Run cannot be captured (it blocks, allocates, …)
    kReadsPadding,     // a live row depends on the poison, or is not written
    kNotRepeatable,    // the same step, run eagerly again after others, gives other bits
    kCapturedDiffers,  // the graph's first launch is not the eager run
    kReplayDiffers,    // a later replay is not: frozen at capture, or left over from steps before
    kWrongValue,       // bit-equal everywhere, and not what it should be
    kWritesOutside,    // a byte changed that is no output of the bucket: pool, inputs, rows beyond the bucket
    kCaptureWrites,    // a warm-up or a capture changed more than a step without requests may
  } kind = Kind::kRefused;
  int32_t bucket = 0;
  std::vector<int32_t> lengths;  // of the step
  int32_t row = -1, head = -1;   // of the first difference; -1: no row
  std::string detail;            // values, where, what ran before

  std::string ToString() const;  // one line
};
const char* ToString(Finding::Kind kind);

struct Report {
  std::vector<Finding> findings;  // the first of each kind for each bucket
  int32_t more = 0;               // findings left out
  int32_t steps = 0;              // length sets
  int32_t runs = 0;               // eager runs and replays

  bool Has(Finding::Kind kind) const;
  std::string ToString() const;  // a line per finding
};

}  // namespace pristine::conformance

#endif  // PRISTINE_CONFORMANCE_REPORT_H_
