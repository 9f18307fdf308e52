#include "pristine/conformance/report.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace pristine::conformance {

const char* ToString(Finding::Kind kind) {
  switch (kind) {
    case Finding::Kind::kRefused:
      return "refused";
    case Finding::Kind::kReadsPadding:
      return "reads padding";
    case Finding::Kind::kNotRepeatable:
      return "not repeatable";
    case Finding::Kind::kCapturedDiffers:
      return "captured differs from eager";
    case Finding::Kind::kReplayDiffers:
      return "replayed differs from eager";
    case Finding::Kind::kWrongValue:
      return "wrong value";
    case Finding::Kind::kWritesOutside:
      return "writes outside";
    case Finding::Kind::kCaptureWrites:
      return "a capture writes";
  }
  return "unknown";
}

std::string Finding::ToString() const {
  const std::string place = row < 0 ? "" : absl::StrCat(" row ", row, ", head ", head, ":");
  return absl::StrCat(conformance::ToString(kind), ":", place, " ", detail, " (bucket ", bucket, ", lengths [",
                      absl::StrJoin(lengths, ", "), "])");
}

bool Report::Has(Finding::Kind kind) const {
  return std::any_of(findings.begin(), findings.end(), [&](const Finding& finding) { return finding.kind == kind; });
}

std::string Report::ToString() const {
  std::string text = absl::StrCat(steps, " steps, ", runs, " runs, ", findings.size() + more, " findings",
                                  more > 0 ? ", the first of each kind for each bucket:" : "");
  for (const Finding& finding : findings) absl::StrAppend(&text, "\n  ", finding.ToString());
  return text;
}

}  // namespace pristine::conformance
