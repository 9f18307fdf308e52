// What the trace parsers share.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_TRACE_LINE_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_TRACE_LINE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "examples/replay_driver/trace.h"

namespace pristine::replay_driver {

constexpr int32_t kMostTokens = 1'000'000'000;

// INVALID_ARGUMENT: "FILE:LINE: expected …, found …", with a printable piece of what was found.
absl::Status RefuseLine(const std::string& file, int64_t line, const std::string& expected, const std::string& found);

// Sorts by arrival, equal ones in the order given, and counts arrivals from the first.
void SortByArrival(std::vector<TraceRequest>& requests);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_TRACE_LINE_H_
