// The mistakes that --inject makes on purpose. Each is what an engine could do by itself: a kernel node in the captured
// graph, or a misuse of a public call.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_INJECTION_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_INJECTION_H_

#include <string>
#include <utility>
#include <vector>

namespace pristine::replay_driver {

enum class Injection {
  kNone,
  // Nodes in the graph, so in every replay.
  kWritePastEnd,
  kWriteConstant,
  kUndeclaredWrite,
  kLiveSlotInPadding,
  kPoisonUnused,
  kLeakyKernel,
  // Misuses: one bad attempt ahead of a step that is then run as it should be.
  kStalePlan,
  kMissingRefill,
  kOtherBucket,
  kReusedSlot,
  kPlanMismatch,
  kDecreasingIndptr,
  kPageOutOfRange,
  kUnarmed,
  kArmedTwice,
  kMisroute,  // with --spec
};

// Names as --inject takes them; the first is "none".
std::vector<std::pair<const char*, Injection>> InjectionChoices();
const char* ToString(Injection injection);
// A line per class, "none" left out.
std::string InjectionHelp();

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_INJECTION_H_
