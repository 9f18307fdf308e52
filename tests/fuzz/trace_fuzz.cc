#include <algorithm>
#include <cctype>
#include <sstream>
#include <string>
#include <vector>

#include "examples/replay_driver/trace.h"
#include "tests/fuzz/fuzz_targets.h"

namespace pristine::testing {
namespace {

using replay_driver::TraceRequest;

// A trace that can be served, or a line that says where it is not one.
void CheckParsed(const absl::StatusOr<std::vector<TraceRequest>>& trace) {
  if (!trace.ok()) {
    const std::string message(trace.status().message());
    PRISTINE_FUZZ_CHECK(absl::IsInvalidArgument(trace.status()), message.c_str());
    PRISTINE_FUZZ_CHECK(message.rfind("fuzz:", 0) == 0 && std::isdigit(message[5]), message.c_str());
    PRISTINE_FUZZ_CHECK(message.find(": expected ") != std::string::npos, message.c_str());
    PRISTINE_FUZZ_CHECK(std::all_of(message.begin(), message.end(), [](char c) { return c >= ' ' && c <= '~'; }),
                        "not printable");
    return;
  }
  PRISTINE_FUZZ_CHECK(!trace->empty() && trace->front().arrival == 0, "starts at its first arrival");
  for (size_t i = 0; i < trace->size(); ++i) {
    const TraceRequest& request = (*trace)[i];
    PRISTINE_FUZZ_CHECK(request.context >= 0 && request.context <= 1'000'000'000, "context");
    PRISTINE_FUZZ_CHECK(request.generated >= 0 && request.generated <= 1'000'000'000, "generated");
    PRISTINE_FUZZ_CHECK(i == 0 || (*trace)[i - 1].arrival <= request.arrival, "sorted");
  }
}

}  // namespace

void FuzzAzureCsv(const uint8_t* data, size_t size) {
  std::istringstream in(std::string(reinterpret_cast<const char*>(data), size));
  CheckParsed(replay_driver::ParseAzureCsv(in, "fuzz"));
}

void FuzzMooncakeJsonl(const uint8_t* data, size_t size) {
  std::istringstream in(std::string(reinterpret_cast<const char*>(data), size));
  CheckParsed(replay_driver::ParseMooncakeJsonl(in, "fuzz"));
}

}  // namespace pristine::testing
