// Violation: what went wrong, where, and in which replay.
#ifndef PRISTINE_BUFFERS_VIOLATION_H_
#define PRISTINE_BUFFERS_VIOLATION_H_

#include <cstdint>
#include <string>

#include "pristine/graph_runtime/extent.h"

namespace pristine {

// Trivially copyable, so that Poll allocates nothing. Strings belong to the manager.
struct Violation {
  enum class Kind : int32_t {
    kPolluted,      // a constant differs from its original (index, expected, actual); it was healed
    kInvariant,     // a value breaks the rule of its Kind: `expected` is the bound (or the value before), `actual` the
                    // value
    kPlanMismatch,  // plan and conversion disagree at index: planned, converted
    kNotArmed,      // an engine-owned graph ran without BeforeReplay
    kArmedTwice,    // BeforeReplay ran twice for one replay
    kWrongBucket,   // the step was refilled for another bucket: expected and actual are requests (index 0) or, where
                    // those are equal, tokens (index 1)
    kGuardBand,     // bytes outside a buffer were written: index is the byte offset from its start
    kOriginalChanged,  // a sealed original was changed (only where ProtectionLevel is kDigest), or the shadow of a
                       // buffer with deltas
    kUndeclaredWrite,  // Host enforcement: `node` wrote without declaring it
    kClamped,          // a kernel clamped a value to its bound
    kInfiniteLse,   // a merge met a log-sum-exp of +inf and took the state as empty: row (index) and head (actual) of
                    // its first or second input (expected: 0 or 1)
    kMissedUpdate,  // the step changes version `expected` of a buffer with deltas; the device holds version `actual`
  };
  Kind kind = Kind::kPolluted;
  const char* buffer = "";  // name of the buffer
  int64_t index = 0;        // element of the buffer
  int64_t expected = 0;
  int64_t actual = 0;
  const char* graph = "";  // name of the runner whose graph ran; "" if not known
  Extent bucket;           // of that graph; {0, 0} if not known
  int64_t replay = 0;      // step sequence number of the manager (1, 2, …); 0: a capture or warm-up
  char node[64] = "";      // the kernel that wrote, where known

  // One line: "polluted: page_size[3] is 7, was 16 (graph decode {8 requests, 8 tokens}, replay 41, node scale_rows)"
  std::string ToString() const;
};

const char* ToString(Violation::Kind kind);

}  // namespace pristine

#endif  // PRISTINE_BUFFERS_VIOLATION_H_
