#include "examples/replay_driver/options.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "examples/replay_driver/gdn_config.h"
#include "pristine/attention/forward_mode.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/attention/sparse_page_table.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {
namespace {

struct OptionSpec {
  const char* name;
  const char* value;  // how --help shows it; "" for a switch
  const char* text;
  std::function<absl::Status(const std::string& value, Options&)> set;
};

absl::Status Refuse(const char* name, const std::string& value, const std::string& accepted) {
  return absl::InvalidArgumentError(absl::StrCat("--", name, "=", value, ": expected ", accepted));
}

template <class T>
OptionSpec Number(const char* name, const char* value, const char* text, T Options::*member, int64_t least,
                  int64_t most) {
  return {name, value, text, [=](const std::string& given, Options& options) {
            int64_t number = 0;
            if (!absl::SimpleAtoi(given, &number) || number < least || number > most) {
              return Refuse(name, given, absl::StrCat("an integer in [", least, ", ", most, "]"));
            }
            options.*member = static_cast<T>(number);
            return absl::OkStatus();
          }};
}

template <class T>
OptionSpec Choice(const char* name, const char* value, const char* text, T Options::*member,
                  std::vector<std::pair<const char*, T>> choices) {
  return {name, value, text, [=](const std::string& given, Options& options) {
            std::string names;
            for (const auto& [choice, meaning] : choices) {
              if (given == choice) {
                options.*member = meaning;
                return absl::OkStatus();
              }
              absl::StrAppend(&names, names.empty() ? "" : ", ", choice);
            }
            return Refuse(name, given, absl::StrCat("one of ", names));
          }};
}

OptionSpec Text(const char* name, const char* value, const char* text, std::string Options::*member) {
  return {name, value, text, [=](const std::string& given, Options& options) {
            if (given.empty()) return Refuse(name, given, value);
            options.*member = given;
            return absl::OkStatus();
          }};
}

absl::Status SetDevice(const std::string& given, Options& options) {
  if (given == "auto" || given == "host") {
    options.device = given == "auto" ? DeviceChoice::kAuto : DeviceChoice::kHost;
    return absl::OkStatus();
  }
  int32_t ordinal = 0;
  const bool numbered = given.rfind("cuda:", 0) == 0;
  if (given != "cuda" && !(numbered && absl::SimpleAtoi(given.substr(5), &ordinal) && ordinal >= 0)) {
    return Refuse("device", given, "auto, host, cuda or cuda:N");
  }
  options.device = DeviceChoice::kCuda;
  options.cuda_ordinal = ordinal;
  return absl::OkStatus();
}

absl::Status SetBuckets(const std::string& given, Options& options) {
  const char* accepted = "requests per bucket, ascending, such as 1,2,4,8";
  options.buckets.clear();
  const std::vector<std::string> parts = absl::StrSplit(given, ',');
  for (const std::string& part : parts) {
    int32_t bucket = 0;
    if (!absl::SimpleAtoi(part, &bucket) || bucket < 1 ||
        (!options.buckets.empty() && bucket <= options.buckets.back())) {
      return Refuse("buckets", given, accepted);
    }
    options.buckets.push_back(bucket);
  }
  return absl::OkStatus();
}

absl::Status SetSeed(const std::string& given, Options& options) {
  if (!absl::SimpleAtoi(given, &options.seed)) return Refuse("seed", given, "an integer in [0, 2^64)");
  return absl::OkStatus();
}

// The format that the extension of `path` names; false: none.
bool FormatOf(const std::string& path, TraceFormat& format) {
  const size_t dot = path.rfind('.');
  const std::string extension = dot == std::string::npos ? "" : path.substr(dot);
  format = extension == ".jsonl" ? TraceFormat::kMooncakeJsonl : TraceFormat::kAzureCsv;
  return extension == ".jsonl" || extension == ".csv";
}

std::vector<OptionSpec> Specs() {
  using Check = ManagerOptions::Check;
  using Restore = ManagerOptions::Restore;
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  return {
      {"device", "auto|host|cuda[:N]", "where to run; auto: a GPU if there is one, else Host (auto)", SetDevice},
      Text("trace", "synthetic|FILE", "the requests: made up from --seed, or read (synthetic)", &Options::trace),
      Choice("format", "azure-csv|mooncake-jsonl", "of the trace file (by its extension: .csv, .jsonl)",
             &Options::format,
             {{"azure-csv", TraceFormat::kAzureCsv}, {"mooncake-jsonl", TraceFormat::kMooncakeJsonl}}),
      Number("steps", "N", "stop after so many steps (synthetic: 1500; a file: its end)", &Options::steps, 1,
             int64_t{1} << 40),
      Number("repeat", "N", "run the requests N times, with the same graphs (1)", &Options::repeat, 1, 1000000),
      Number("step-ms", "N", "virtual time of a step (30)", &Options::step_ms, 1, 60000),
      Number("max-batch", "N", "most requests at a time (32)", &Options::max_batch, 1, 4096),
      {"buckets", "LIST", "batch sizes to capture (powers of two below max-batch, and max-batch)", SetBuckets},
      Choice("model", "attention|hybrid",
             "hybrid: three gated delta net layers in front of each attention layer, states by slot (attention)",
             &Options::model, {{"attention", ModelKind::kAttention}, {"hybrid", ModelKind::kHybrid}}),
      Number("gdn-qk-heads", "N", "with --model=hybrid: query and key heads, of 128, of a gated delta net layer (1)",
             &Options::gdn_qk_heads, 1, 64),
      Number("gdn-v-heads", "N", "with --model=hybrid: value heads, of 128, of a gated delta net layer (2)",
             &Options::gdn_v_heads, 1, 256),
      Choice("dtype", "float32|bfloat16", "of Q, K, V and outputs (float32)", &Options::dtype,
             {{"float32", attention::DType::kFloat32}, {"bfloat16", attention::DType::kBFloat16}}),
      Number("heads", "N", "query heads (4)", &Options::heads, 1, 1024),
      Number("kv-heads", "N", "KV heads (2)", &Options::kv_heads, 1, 1024),
      Number("head-dim", "64|128", "of every head (64)", &Options::head_dim, 1, 1024),
      Number("page-size", "N", "tokens of a page (1)", &Options::page_size, 1, 65536),
      Number("kv-tokens", "N", "tokens of the KV pool (131072)", &Options::kv_tokens, 1, int64_t{1} << 28),
      Number("layers", "N", "attention layers; the last one is sliding window, the others sparse (2)", &Options::layers,
             2, 1000),
      Number("window", "N", "tokens of the sliding window (512)", &Options::window, 1, kMax),
      Number("sparse-block", "N", "tokens of a selected block (64)", &Options::sparse_block, 1, 65536),
      Number("topk-blocks", "N", "blocks that a long request attends; K = sparse-block * topk-blocks (96)",
             &Options::topk_blocks, 1, 65536),
      Number("kv-groups", "N", "KV-head groups, each a row of its own in sparse layers (2)", &Options::kv_groups, 1,
             1024),
      Number("dense-len", "N", "requests shorter than this attend everything (0)", &Options::dense_len, 0, 1 << 28),
      Choice("scheduler", "device|host",
             "who cuts the rows up for decode: the kernel, or a plan that is refilled each step (device)",
             &Options::scheduler,
             {{"device", attention::DecodeScheduler::kDevice}, {"host", attention::DecodeScheduler::kHost}}),
      Choice("plan-from", "lengths|live",
             "live repeats the engine's mistake: plan from the buffer that the graph overwrites (lengths)",
             &Options::plan_from, {{"lengths", PlanFrom::kLengths}, {"live", PlanFrom::kLive}}),
      Choice("restore", "graph|stream|off", "when kv_indptr_ws gets its original back (graph)", &Options::restore,
             {{"graph", Restore::kGraphHead}, {"stream", Restore::kStream}, {"off", Restore::kOff}}),
      Choice("check", "off|sampled|always", "compare buffers with originals; always: Host enforces accesses (sampled)",
             &Options::check, {{"off", Check::kOff}, {"sampled", Check::kSampled}, {"always", Check::kAlways}}),
      Number("compare-eager", "N", "compare with an eager run and the float64 truth in every Nth step; 0: never (100)",
             &Options::compare_eager, 0, int64_t{1} << 40),
      Number("compare-rows", "N", "(request, layer, head) triples compared with the truth (64)", &Options::compare_rows,
             0, 1 << 20),
      Choice("overlap", "off|on|both",
             "on: prepare steps while earlier ones run; both: every round without and with it, and the gain (off)",
             &Options::overlap, {{"off", Overlap::kOff}, {"on", Overlap::kOn}, {"both", Overlap::kBoth}}),
      Number("staging-slots", "N", "steps that may wait for the device with their values, 2 to 64 (4)",
             &Options::staging_slots, 2, 64),
      Number("spec", "T",
             "speculate: T captured draft steps, target verify of T tokens, 0 to T accepted, draft extend, rollback; "
             "2 to 16 (off)",
             &Options::spec, 2, attention::kMaxDecodeQLen),
      Choice("draft-extend", "ragged|fixed|fixed-decode",
             "with --spec: accepted tokens only; T + 1 tokens each; the same by the decode kernels (ragged)",
             &Options::draft_extend,
             {{"ragged", DraftExtend::kRagged},
              {"fixed", DraftExtend::kFixed},
              {"fixed-decode", DraftExtend::kFixedDecode}}),
      Choice("accept", "random|none|all", "with --spec: how many drafts hold (random)", &Options::accept,
             {{"random", AcceptRule::kRandom}, {"none", AcceptRule::kNone}, {"all", AcceptRule::kAll}}),
      Choice("inject", "CLASS",
             "one mistake, to see it caught: a node in the graph or a misuse of a call; the classes are below (none)",
             &Options::inject, InjectionChoices()),
      {"seed", "N", "of the requests, of all K, V, Q and of the samples (1)", SetSeed},
      Text("report", "FILE.json", "write a report, whatever the outcome", &Options::report),
      Text("html", "FILE.html", "write a page of the run: buckets, padding, latency, violations and their records",
           &Options::html),
      Text("flight-json", "FILE.json",
           "write what the flight recorder holds of the last replays, also of a dead device", &Options::flight_json),
      {"quiet", "", "print errors only",
       [](const std::string&, Options& options) {
         options.quiet = true;
         return absl::OkStatus();
       }},
      {"help", "", "print this",
       [](const std::string&, Options& options) {
         options.help = true;
         return absl::OkStatus();
       }},
  };
}

// Query heads that share a KV head: what the decode kernels take.
constexpr int32_t kMaxHeadGroup = 32;

// What --spec goes with.
absl::Status CheckSpec(const Options& o) {
  const auto refuse = [](const std::string& what) { return absl::InvalidArgumentError(what); };
  if (o.spec == 0) {
    if (o.draft_extend != DraftExtend::kRagged) return refuse("--draft-extend: expected --spec=T with it");
    if (o.accept != AcceptRule::kRandom) return refuse("--accept: expected --spec=T with it");
    if (o.inject == Injection::kMisroute) return refuse("--inject=misroute: expected --spec=T with it");
    return absl::OkStatus();
  }
  if (o.inject != Injection::kNone && o.inject != Injection::kMisroute) {
    return refuse(absl::StrCat("--inject=", ToString(o.inject), " with --spec: expected none or misroute"));
  }
  if (o.inject == Injection::kMisroute && o.draft_extend != DraftExtend::kRagged) {
    return refuse("--inject=misroute: expected --draft-extend=ragged; a fixed one may take the decode kernels");
  }
  if (o.draft_extend == DraftExtend::kFixedDecode && o.spec + 1 > attention::kMaxDecodeQLen) {
    return refuse(absl::StrCat("--spec=", o.spec, " with --draft-extend=fixed-decode: expected at most ",
                               attention::kMaxDecodeQLen - 1, ", as the decode kernels take ",
                               attention::kMaxDecodeQLen, " tokens of a request"));
  }
  if (o.plan_from != PlanFrom::kLengths) return refuse("--plan-from=live with --spec: expected lengths");
  if (o.restore != ManagerOptions::Restore::kGraphHead) {
    return refuse(absl::StrCat("--restore=", ToString(o.restore), " with --spec: expected graph"));
  }
  // What captures see: every request as long as a window, and as its drafts.
  const int64_t worst = std::min<int64_t>(o.kv_tokens, std::max(o.window, o.spec + 1));
  if ((worst - 1) / o.page_size + 1 > std::numeric_limits<int32_t>::max() / o.max_batch) {
    return refuse(absl::StrCat("--window=", o.window, " with --spec: expected pages of ", worst,
                               " tokens for --max-batch=", o.max_batch, " requests that fit in 31 bits"));
  }
  if (o.overlap != Overlap::kOff) {
    return refuse("--overlap with --spec: expected off; a round needs to know what the one before accepted");
  }
  return absl::OkStatus();
}

// What --model=hybrid goes with.
absl::Status CheckHybrid(const Options& o) {
  const Options unset;
  if (o.model != ModelKind::kHybrid) {
    const char* const given = o.gdn_qk_heads != unset.gdn_qk_heads ? "--gdn-qk-heads"
                              : o.gdn_v_heads != unset.gdn_v_heads ? "--gdn-v-heads"
                                                                   : nullptr;
    if (given == nullptr) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(given, ": expected --model=hybrid with it"));
  }
  if (o.gdn_v_heads % o.gdn_qk_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--gdn-v-heads=", o.gdn_v_heads, ": expected a multiple of --gdn-qk-heads, which is ", o.gdn_qk_heads));
  }
  const int64_t state = int64_t{kGdnPerAttention} * o.layers * o.gdn_v_heads * attention::gdn::kStateElements;
  if (state > int64_t{1} << 31) {
    return absl::InvalidArgumentError(
        absl::StrCat("--layers=", o.layers, " with --model=hybrid and --gdn-v-heads=", o.gdn_v_heads,
                     ": expected a state of at most 2^31 values for each request, which would have ", state));
  }
  if (o.inject != Injection::kNone) {
    return absl::InvalidArgumentError(
        absl::StrCat("--inject=", ToString(o.inject),
                     " with --model=hybrid: expected none; a step that is tried twice would move states on twice"));
  }
  return absl::OkStatus();
}

// Sizes within these bounds pass every check of the libraries, those of partial results (at most 2^29 values) included.
absl::Status CheckTogether(const Options& o) {
  // Four arrivals a second: a bound on what the generator makes.
  if (o.synthetic() && o.step_limit() > int64_t{10'000'000'000} / o.step_ms) {
    return absl::InvalidArgumentError(absl::StrCat("--steps=", o.steps, " of --step-ms=", o.step_ms,
                                                   ": expected at most 10^10 ms of a synthetic trace"));
  }
  if (o.buckets.back() != o.max_batch) {
    return absl::InvalidArgumentError(
        absl::StrCat("--buckets ends with ", o.buckets.back(), ": expected --max-batch, which is ", o.max_batch));
  }
  if (o.inject == Injection::kStalePlan && o.scheduler == attention::DecodeScheduler::kDevice) {
    return absl::InvalidArgumentError("--inject=stale-plan: expected --scheduler=host, whose plans can be stale");
  }
  if (o.heads % o.kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--heads=", o.heads, ": expected a multiple of --kv-heads, which is ", o.kv_heads));
  }
  if (o.heads / o.kv_heads > kMaxHeadGroup) {
    return absl::InvalidArgumentError(absl::StrCat("--heads=", o.heads, ": expected at most ", kMaxHeadGroup,
                                                   " times --kv-heads, which is ", o.kv_heads));
  }
  if (o.kv_heads % o.kv_groups != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--kv-groups=", o.kv_groups, ": expected a divisor of --kv-heads, which is ", o.kv_heads));
  }
  if (o.head_dim != 64 && o.head_dim != 128) {
    return absl::InvalidArgumentError(absl::StrCat("--head-dim=", o.head_dim, ": expected 64 or 128"));
  }
  if (o.kv_tokens < o.page_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("--kv-tokens=", o.kv_tokens, ": expected at least one page, which is ", o.page_size, " tokens"));
  }
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  const int64_t bound = std::max<int64_t>(o.dense_len - 1, int64_t{o.sparse_block} * o.topk_blocks);
  if (bound > kMax / o.max_batch / o.kv_groups) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rows of ", bound, " tokens (--sparse-block, --topk-blocks, --dense-len) for --max-batch=", o.max_batch,
        " requests in --kv-groups=", o.kv_groups, ": expected a product that fits in 31 bits"));
  }
  if (int64_t{o.kv_tokens} + 2 * int64_t{o.page_size} > kMax / o.kv_groups) {
    return absl::InvalidArgumentError(absl::StrCat("--kv-tokens=", o.kv_tokens, " in --kv-groups=", o.kv_groups,
                                                   ": expected a product that fits in 31 bits"));
  }
  PRISTINE_RETURN_IF_ERROR(CheckSpec(o));
  return CheckHybrid(o);
}

}  // namespace

absl::StatusOr<Options> ParseOptions(absl::Span<const std::string> args) {
  const std::vector<OptionSpec> specs = Specs();
  Options options;
  bool format_given = false;
  for (const std::string& arg : args) {
    if (arg.rfind("--", 0) != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", arg, "': expected an option --name=value; --help lists them"));
    }
    const size_t equals = arg.find('=');
    const std::string name = arg.substr(2, equals == std::string::npos ? std::string::npos : equals - 2);
    const auto spec =
        std::find_if(specs.begin(), specs.end(), [&](const OptionSpec& candidate) { return candidate.name == name; });
    if (spec == specs.end()) {
      return absl::InvalidArgumentError(absl::StrCat("--", name, ": no such option; --help lists them"));
    }
    const bool is_switch = *spec->value == '\0';
    if (is_switch != (equals == std::string::npos)) {
      return absl::InvalidArgumentError(is_switch ? absl::StrCat(arg, ": expected --", name, " without a value")
                                                  : absl::StrCat(arg, ": expected --", name, "=", spec->value));
    }
    PRISTINE_RETURN_IF_ERROR(spec->set(is_switch ? "" : arg.substr(equals + 1), options));
    format_given = format_given || name == "format";
  }
  if (options.help) return options;
  if (options.buckets.empty()) {
    for (int32_t bucket = 1; bucket < options.max_batch; bucket *= 2) options.buckets.push_back(bucket);
    options.buckets.push_back(options.max_batch);
  }
  if (!options.synthetic() && !format_given && !FormatOf(options.trace, options.format)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--trace=", options.trace, ": the extension names no format; expected .csv or .jsonl, or --format"));
  }
  PRISTINE_RETURN_IF_ERROR(CheckTogether(options));
  return options;
}

std::string HelpText() {
  std::string text =
      "replay_driver: continuous batching over a trace, one captured graph per step, checked against an eager run and\n"
      "a float64 truth.\n\n";
  for (const OptionSpec& spec : Specs()) {
    std::string left = absl::StrCat("  --", spec.name, *spec.value == '\0' ? "" : "=", spec.value);
    left.resize(std::max<size_t>(left.size() + 2, 33), ' ');
    absl::StrAppend(&text, left, spec.text, "\n");
  }
  absl::StrAppend(&text, "\nClasses of --inject:\n", InjectionHelp());
  absl::StrAppend(
      &text,
      "\nus_per_replay is the wall time from the replay call until the stream is idle: every step is waited for, as\n"
      "an engine must that reads its tokens back. With --overlap=on: until the step was seen to be done.\n"
      "PRISTINE_GDN_CHUNK_H_BV, _NUM_WARPS and _NUM_STAGES tune the prefill of --model=hybrid --dtype=bfloat16.\n"
      "Exit codes: 0 ok; 1 usage: an option, a variable or a combination that nothing here can run, an unwritable\n"
      "report; 2 input: the trace; 3 violation: a refused plan, plan and conversion at odds, memory or values that\n"
      "break a rule; 4 mismatch with the eager run or the truth; 5 device: absent, out of memory (the host's too), or\n"
      "a failed call or kernel; 6 internal: a rule of this program's own was broken. 3 outranks 4.\n");
  return text;
}

const char* ToString(ModelKind model) { return model == ModelKind::kHybrid ? "hybrid" : "attention"; }

const char* ToString(PlanFrom plan_from) { return plan_from == PlanFrom::kLive ? "live" : "lengths"; }

const char* ToString(DraftExtend draft_extend) {
  switch (draft_extend) {
    case DraftExtend::kRagged:
      return "ragged";
    case DraftExtend::kFixed:
      return "fixed";
    case DraftExtend::kFixedDecode:
      break;
  }
  return "fixed-decode";
}

const char* ToString(ManagerOptions::Restore restore) {
  switch (restore) {
    case ManagerOptions::Restore::kGraphHead:
      return "graph";
    case ManagerOptions::Restore::kStream:
      return "stream";
    case ManagerOptions::Restore::kOff:
      break;
  }
  return "off";
}

}  // namespace pristine::replay_driver
