// The driver's command line.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_OPTIONS_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_OPTIONS_H_

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "examples/replay_driver/injection.h"
#include "examples/replay_driver/trace.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/attention/types.h"
#include "pristine/buffers/buffer_manager.h"

namespace pristine::replay_driver {

enum class DeviceChoice { kAuto, kHost, kCuda };
enum class PlanFrom { kLengths, kLive };
enum class Overlap { kOff, kOn, kBoth };
// With --spec: the draft model takes in what was accepted, as many tokens as each request got, or T + 1 for each.
enum class DraftExtend { kRagged, kFixed, kFixedDecode };
enum class AcceptRule { kRandom, kNone, kAll };
enum class ModelKind { kAttention, kHybrid };

struct Options {
  DeviceChoice device = DeviceChoice::kAuto;
  int32_t cuda_ordinal = 0;
  std::string trace = "synthetic";
  TraceFormat format = TraceFormat::kAzureCsv;
  int64_t steps = 0;  // 0: the default of the trace
  int32_t repeat = 1;
  int32_t step_ms = 30;
  int32_t max_batch = 32;
  std::vector<int32_t> buckets;  // empty until Parse fills the default in
  ModelKind model = ModelKind::kAttention;
  int32_t gdn_qk_heads = 1, gdn_v_heads = 2;  // of the hybrid model's GDN layers
  attention::DType dtype = attention::DType::kFloat32;
  int32_t heads = 4, kv_heads = 2, head_dim = 64;
  int32_t page_size = 1;
  int32_t kv_tokens = 131072;
  int32_t layers = 2;
  int32_t window = 512;
  int32_t sparse_block = 64, topk_blocks = 96, kv_groups = 2, dense_len = 0;
  attention::DecodeScheduler scheduler = attention::DecodeScheduler::kDevice;
  PlanFrom plan_from = PlanFrom::kLengths;
  ManagerOptions::Restore restore = ManagerOptions::Restore::kGraphHead;
  ManagerOptions::Check check = ManagerOptions::Check::kSampled;
  int64_t compare_eager = 100;  // compare in the steps whose number it divides; 0: never
  int32_t compare_rows = 64;
  Overlap overlap = Overlap::kOff;
  int32_t staging_slots = ManagerOptions().staging_slots;
  int32_t spec = 0;  // tokens drafted in a round; 0: no speculation
  DraftExtend draft_extend = DraftExtend::kRagged;
  AcceptRule accept = AcceptRule::kRandom;
  Injection inject = Injection::kNone;
  uint64_t seed = 1;
  // Files to write; empty: none.
  std::string report, html, flight_json;
  bool quiet = false;
  bool help = false;

  bool synthetic() const { return trace == "synthetic"; }
  // How many steps at most.
  int64_t step_limit() const {
    if (steps > 0) return steps;
    return synthetic() ? 1500 : std::numeric_limits<int64_t>::max();
  }
};

// INVALID_ARGUMENT: the option, the value found and what would have been accepted. `args` without the program's name.
absl::StatusOr<Options> ParseOptions(absl::Span<const std::string> args);

// What --help prints: every option with its default.
std::string HelpText();

const char* ToString(PlanFrom plan_from);
const char* ToString(DraftExtend draft_extend);
const char* ToString(ModelKind model);
const char* ToString(ManagerOptions::Restore restore);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_OPTIONS_H_
