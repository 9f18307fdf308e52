// A conformance kit for paged decode and target verify attention under CUDA graphs. Point it at your own wrapper, on
// either backend:
//
//   class MyWrapper : public pristine::conformance::AttentionWrapper { … Prepare, Run, BoundArrays … };
//
//   TEST(MyAttention, Conforms) {
//     pristine::conformance::AttentionShape shape = {.page_size = 16, .buckets = {1, 4, 8}};
//     MyWrapper wrapper(device, shape);
//     EXPECT_TRUE(pristine::conformance::Conforms(stream, wrapper, shape));
//   }
//
// For every bucket and its edges it makes a dozen length sets: full, one past the bucket below, one short; longest,
// shortest, rising, falling, around page edges; live requests of length 0; none but padding. Each set runs
//   - under two poisons, which cover all that a live row must not depend on: rows past the real ones, K and V of
//     unused pages and after each request's last token, outputs, and the arrays that the wrapper is bound to;
//   - eagerly, from the first launch of a captured graph, and from later replays with all other sets (of all buckets)
//     in between, in two orders, the second with several steps in flight; and once more after recapture.
// Live rows must come out bit-equal all the time, and be attention; no other byte may change. What is found is a list
// of findings; the GoogleTest layer asserts that it is empty. examples/06_conformance_kit is a whole foreign wrapper.
#ifndef PRISTINE_CONFORMANCE_ATTENTION_CONFORMANCE_H_
#define PRISTINE_CONFORMANCE_ATTENTION_CONFORMANCE_H_

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/attention/types.h"
#include "pristine/conformance/report.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::conformance {

// What the wrapper claims to support; the kit keeps within it.
struct AttentionShape {
  attention::DType dtype = attention::DType::kFloat32;  // of q, k_new, v_new and out: float32, bfloat16 or float16
  // Of k and v: dtype (nothing given), or kFloat8E4M3. Then all keys and values are such numbers, and scales are 1.
  std::optional<attention::DType> kv_dtype = {};
  int32_t q_heads = 4, kv_heads = 2, head_dim = 64;
  int32_t q_len = 1;      // query tokens of a request, its newest ones: several in target verify
  int32_t page_size = 8;  // tokens
  attention::KvLayout layout = attention::KvLayout::kNHD;  // of k and v
  int32_t max_length = 40;                                 // of a request, in tokens
  std::vector<int32_t> buckets = {1, 3, 8};                // requests, ascending
  // Of a live request: 1 where the wrapper takes no empty ones, q_len where it takes none shorter than its queries.
  int32_t min_length = 0;
  double scale = 0;                                              // of scores; 0: 1 / sqrt(head_dim)
  enum class Lse { kNone, kBase2, kNatural } lse = Lse::kBase2;  // what Run writes to AttentionTensors::lse
  // Run stores k_new and v_new at the step's slots before it attends. Otherwise it finds them stored.
  bool appends = false;
  // Whether the newest token of a request of `length` attends `position`: a window, a sparse selection. Null: all. Each
  // of several queries is asked for as if it were the newest: query i of a request for length - q_len + 1 + i. K and V
  // of positions that none of them attends are poison.
  std::function<bool(int32_t length, int32_t kv_head, int32_t position)> attended = nullptr;
  int32_t steps_in_flight = 2;  // Prepare may be called while this many - 1 earlier steps have not run yet
  uint64_t seed = 1;            // of values, pages and random lengths

  int32_t max_requests() const { return buckets.back(); }
  int32_t max_tokens() const { return max_requests() * q_len; }
  int32_t max_step_pages() const { return max_requests() * ((max_length - 1) / page_size + 1); }
  // Page 0 is the dummy page: zeros, may be written, belongs to no request. The last page belongs to none either.
  int32_t num_pages() const { return max_step_pages() + 2; }
  attention::DType stored_dtype() const { return kv_dtype.value_or(dtype); }  // of k and v
};

// Device memory of all runs: the addresses never change. One page more than num_pages() is mapped, so that a page
// number or slot just out of range reads poison instead of crashing the test.
struct AttentionTensors {
  DeviceSpan<const std::byte> q;             // [max_requests, q_len, q_heads, head_dim]
  DeviceSpan<const std::byte> k_new, v_new;  // [max_requests, q_len, kv_heads, head_dim], of the newest tokens
  DeviceSpan<std::byte> k, v;                // [num_pages, page_size, kv_heads, head_dim], or as `layout` says
  // Of queries that attend nothing, those of an empty request or before a request's first token: zeros and -inf.
  DeviceSpan<std::byte> out;  // [max_requests, q_len, q_heads, head_dim]
  DeviceSpan<float> lse;      // [max_requests, q_len, q_heads]
};

// The wrapper under test, as an engine uses it: Prepare and Run eagerly, or Run once in a capture, and then Prepare and
// a launch for each step. What Run queues follows from its arguments alone: it is captured with no step prepared since
// the last run, once after the largest steps and once after steps without requests.
class AttentionWrapper {
 public:
  virtual ~AttentionWrapper() = default;
  // The host's part: plans, pads up to `bucket` requests, queues copies. `step` holds the real part only, and only
  // during the call; a request of length 0 has no pages, and slots before a request's first token are -1. With
  // BufferManager: BeginStep, Refill, Plan, BeforeReplay.
  virtual absl::Status Prepare(Stream& stream, int32_t bucket, const attention::StepValues& step) = 0;
  // The device's part: queues kernels for `bucket` requests; captureable. With BufferManager: RecordPrologue, then the
  // kernels (and Seal before the first capture).
  virtual absl::Status Run(Stream& stream, int32_t bucket, const AttentionTensors& tensors) = 0;
  virtual std::vector<BoundArray> BoundArrays() { return {}; }
};

// Runs everything on `stream`, which must be idle. Blocks. INVALID_ARGUMENT: a shape that makes no sense. Codes of
// Device::Allocate. What the wrapper does wrong is no error but a finding.
absl::StatusOr<Report> CheckAttention(Stream& stream, AttentionWrapper& wrapper, const AttentionShape& shape);

// The GoogleTest layer: EXPECT_TRUE(Conforms(stream, wrapper, shape)).
::testing::AssertionResult Conforms(Stream& stream, AttentionWrapper& wrapper, const AttentionShape& shape);

}  // namespace pristine::conformance

#endif  // PRISTINE_CONFORMANCE_ATTENTION_CONFORMANCE_H_
