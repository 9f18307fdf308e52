#include "pristine/buffers/violation.h"

#include "absl/strings/str_cat.h"

namespace pristine {

const char* ToString(Violation::Kind kind) {
  switch (kind) {
    case Violation::Kind::kPolluted:
      return "polluted";
    case Violation::Kind::kInvariant:
      return "invalid value";
    case Violation::Kind::kPlanMismatch:
      return "plan and conversion disagree";
    case Violation::Kind::kNotArmed:
      return "launched without BeforeReplay";
    case Violation::Kind::kArmedTwice:
      return "armed more than once for one launch";
    case Violation::Kind::kWrongBucket:
      return "armed for another bucket";
    case Violation::Kind::kGuardBand:
      return "written outside the buffer";
    case Violation::Kind::kOriginalChanged:
      return "sealed original changed";
    case Violation::Kind::kUndeclaredWrite:
      return "undeclared write";
    case Violation::Kind::kClamped:
      return "clamped";
    case Violation::Kind::kInfiniteLse:
      return "log-sum-exp of +inf";
    case Violation::Kind::kMissedUpdate:
      return "update missed";
  }
  return "unknown violation";
}

std::string Violation::ToString() const {
  std::string text = absl::StrCat(pristine::ToString(kind), ": ");
  switch (kind) {
    case Kind::kNotArmed:
    case Kind::kArmedTwice:
      absl::StrAppend(&text, "expected step ", expected, ", found ", actual);
      break;
    case Kind::kWrongBucket:
      absl::StrAppend(&text, "the step is for ", actual, index == 1 ? " tokens" : " requests", ", the graph for ",
                      expected);
      break;
    case Kind::kUndeclaredWrite:
      absl::StrAppend(&text, buffer, "[", index, "]");
      break;
    case Kind::kInvariant:
    case Kind::kClamped:
      absl::StrAppend(&text, buffer, "[", index, "] is ", actual, ", bound ", expected);
      break;
    case Kind::kInfiniteLse:
      absl::StrAppend(&text, "row ", index, ", head ", actual, " of the ", expected == 0 ? "first" : "second",
                      " input of a merge");
      break;
    case Kind::kPlanMismatch:
      absl::StrAppend(&text, buffer, "[", index, "]: planned ", expected, ", converted ", actual);
      break;
    case Kind::kMissedUpdate:
      absl::StrAppend(&text, buffer, ": the step changes version ", expected, ", the device holds version ", actual,
                      "; a Refill replaces it");
      break;
    case Kind::kGuardBand:
      absl::StrAppend(&text, buffer, ", byte ", index, " from its start, is ", actual, ", was ", expected);
      break;
    case Kind::kPolluted:
    case Kind::kOriginalChanged:
      absl::StrAppend(&text, buffer, "[", index, "] is ", actual, ", was ", expected);
      break;
  }
  std::string where;
  if (bucket.requests > 0) absl::StrAppend(&where, ", graph ", graph, graph[0] == '\0' ? "" : " ", bucket.ToString());
  if (replay > 0) absl::StrAppend(&where, ", replay ", replay);
  if (node[0] != '\0') absl::StrAppend(&where, ", node ", static_cast<const char*>(node));
  if (!where.empty()) absl::StrAppend(&text, " (", where.substr(2), ")");
  return text;
}

}  // namespace pristine
