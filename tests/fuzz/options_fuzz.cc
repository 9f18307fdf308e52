#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "examples/replay_driver/options.h"
#include "tests/fuzz/fuzz_targets.h"

namespace pristine::testing {

void FuzzOptions(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  const std::vector<std::string> args = absl::StrSplit(text, '\n');
  const absl::StatusOr<replay_driver::Options> options = replay_driver::ParseOptions(args);
  if (!options.ok()) {
    const std::string message(options.status().message());
    PRISTINE_FUZZ_CHECK(absl::IsInvalidArgument(options.status()) && !message.empty(), message.c_str());
    return;
  }
  const replay_driver::Options& o = *options;
  if (o.help) return;
  // What the rest of the driver relies on without looking again.
  PRISTINE_FUZZ_CHECK(!o.buckets.empty() && o.buckets.front() >= 1 && o.buckets.back() == o.max_batch, "buckets");
  for (size_t i = 1; i < o.buckets.size(); ++i) PRISTINE_FUZZ_CHECK(o.buckets[i - 1] < o.buckets[i], "ascending");
  PRISTINE_FUZZ_CHECK(o.heads >= 1 && o.kv_heads >= 1 && o.heads % o.kv_heads == 0, "heads");
  PRISTINE_FUZZ_CHECK(o.kv_groups >= 1 && o.kv_heads % o.kv_groups == 0, "groups");
  PRISTINE_FUZZ_CHECK(o.head_dim == 64 || o.head_dim == 128, "head_dim");
  PRISTINE_FUZZ_CHECK(o.page_size >= 1 && o.kv_tokens / o.page_size >= 1, "a page");
  PRISTINE_FUZZ_CHECK(o.layers >= 2 && o.window >= 1 && o.repeat >= 1 && o.step_ms >= 1, "at least one");
  PRISTINE_FUZZ_CHECK(o.step_limit() >= 1 && o.compare_eager >= 0 && o.compare_rows >= 0, "counts");
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  PRISTINE_FUZZ_CHECK(int64_t{o.sparse_block} * o.topk_blocks * o.kv_groups * o.max_batch <= kMax, "31 bits of rows");
  PRISTINE_FUZZ_CHECK((int64_t{o.kv_tokens} + o.page_size) * o.kv_groups <= kMax, "31 bits of slots");
}

}  // namespace pristine::testing
