#include "examples/replay_driver/injection.h"

#include "absl/strings/str_cat.h"

namespace pristine::replay_driver {
namespace {

struct InjectionText {
  Injection injection;
  const char* name;
  const char* text;
};
constexpr InjectionText kTexts[] = {
    {Injection::kNone, "none", ""},
    {Injection::kWritePastEnd, "write-past-end", "a node writes just past kv_indptr_ws: Verify finds the guard band"},
    {Injection::kWriteConstant, "write-constant", "a node writes a constant, as it declares: found, healed"},
    {Injection::kUndeclaredWrite, "undeclared-write",
     "the same undeclared: --check=always on Host names the node at once"},
    {Injection::kLiveSlotInPadding, "live-slot-in-padding",
     "a node gives padded rows the slot of a live token: the truth differs"},
    {Injection::kPoisonUnused, "poison-unused", "nodes put NaN in every unused page and padded row: changes nothing"},
    {Injection::kLeakyKernel, "leaky-kernel",
     "a node adds 0 * padded rows, over that poison: a row and the node named"},
    {Injection::kStalePlan, "stale-plan", "lengths refilled once more after planning: replay refused"},
    {Injection::kMissingRefill, "missing-refill", "a step replayed without its refills: refused"},
    {Injection::kOtherBucket, "other-bucket", "refilled for one bucket, replayed with another: refused"},
    {Injection::kReusedSlot, "reused-slot", "one step more than there are staging slots, none waited for: refused"},
    {Injection::kPlanMismatch, "plan-mismatch", "planned one token short: plan and conversion disagree"},
    {Injection::kDecreasingIndptr, "decreasing-indptr", "kv_indptr falls: replay neutralised"},
    {Injection::kPageOutOfRange, "page-out-of-range", "a page that the pool has not: replay neutralised"},
    {Injection::kUnarmed, "unarmed", "the graph launched without BeforeReplay: neutralised"},
    {Injection::kMisroute, "misroute", "with --spec: a ragged draft extend sent to the decode kernels: refused"},
    {Injection::kArmedTwice, "armed-twice", "BeforeReplay twice for one launch: neutralised"},
};

}  // namespace

std::vector<std::pair<const char*, Injection>> InjectionChoices() {
  std::vector<std::pair<const char*, Injection>> choices;
  for (const InjectionText& text : kTexts) choices.emplace_back(text.name, text.injection);
  return choices;
}

const char* ToString(Injection injection) {
  for (const InjectionText& text : kTexts) {
    if (text.injection == injection) return text.name;
  }
  return "unknown";
}

std::string InjectionHelp() {
  std::string help;
  for (const InjectionText& text : kTexts) {
    if (text.injection == Injection::kNone) continue;
    std::string name = text.name;
    name.resize(22, ' ');
    absl::StrAppend(&help, "  ", name, text.text, "\n");
  }
  return help;
}

}  // namespace pristine::replay_driver
