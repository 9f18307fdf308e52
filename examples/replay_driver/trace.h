// The requests that the driver serves: read from a file, or made up.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_TRACE_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_TRACE_H_

#include <cstdint>
#include <istream>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace pristine::replay_driver {

constexpr int64_t kTicksPerMs = 10'000;  // of 100 ns, the resolution of the Azure traces

struct TraceRequest {
  int64_t arrival = 0;  // ticks since the first arrival
  int32_t context = 0;  // tokens that are in the KV cache when the request enters
  int32_t generated = 0;
};

// Rows "2023-11-16 18:17:03.9799600,4808,10" below the header "TIMESTAMP,ContextTokens,GeneratedTokens"; LF or CRLF.
// Sorted by arrival, rows of equal time in the file's order. `name` is for messages.
// INVALID_ARGUMENT: "FILE:LINE: expected …, found …".
absl::StatusOr<std::vector<TraceRequest>> ParseAzureCsv(std::istream& in, const std::string& name);

// Lines {"timestamp": 0, "input_length": 6758, "output_length": 500}, timestamps in milliseconds; further fields may
// hold numbers, strings or lists of them. Otherwise as ParseAzureCsv.
absl::StatusOr<std::vector<TraceRequest>> ParseMooncakeJsonl(std::istream& in, const std::string& name);

enum class TraceFormat { kAzureCsv, kMooncakeJsonl };

// Opens `path` and parses it. NOT_FOUND: cannot be opened.
absl::StatusOr<std::vector<TraceRequest>> ReadTrace(const std::string& path, TraceFormat format);

// Poisson arrivals, 4 a second, over `duration` ticks (at least one request), with lengths that have the quantiles of
// the Azure code trace. The same for the same seed, everywhere.
std::vector<TraceRequest> SyntheticTrace(uint64_t seed, int64_t duration);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_TRACE_H_
