#include "pristine/buffers/flight_recorder.h"

#include <cstdio>

#include "absl/strings/str_cat.h"

namespace pristine {
namespace {

std::string Quoted(const char* text) {
  std::string quoted = "\"";
  for (const char* c = text; *c != '\0'; ++c) {
    if (*c == '"' || *c == '\\') {
      quoted += {'\\', *c};
    } else if (static_cast<unsigned char>(*c) < ' ') {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\u%04x", static_cast<unsigned>(*c));
      quoted += escaped;
    } else {
      quoted += *c;
    }
  }
  return quoted + "\"";
}

std::string Counts(const Extent& extent) {
  return absl::StrCat("\"requests\": ", extent.requests, ", \"tokens\": ", extent.tokens);
}

}  // namespace

const char* ToString(FlightRecord::Status status) {
  switch (status) {
    case FlightRecord::Status::kClean:
      return "clean";
    case FlightRecord::Status::kHealed:
      return "healed";
    case FlightRecord::Status::kRecorded:
      return "recorded";
    case FlightRecord::Status::kNeutralised:
      return "neutralised";
    case FlightRecord::Status::kTrapped:
      return "trapped";
  }
  return "unknown";
}

std::string ToJson(absl::Span<const FlightRecord> records) {
  std::string json = "[";
  for (const FlightRecord& record : records) {
    std::string tails;
    for (const FlightRecord::IndptrTail& tail : record.indptr_tails) {
      if (tail.buffer == nullptr) continue;
      absl::StrAppend(&tails, tails.empty() ? "" : ", ", "{\"buffer\": ", Quoted(tail.buffer),
                      ", \"value\": ", tail.value, "}");
    }
    absl::StrAppend(&json, json.size() > 1 ? ",\n " : "\n ", "{\"sequence\": ", record.sequence,
                    ", \"key\": {\"graph\": ", Quoted(record.graph), ", ", Counts(record.bucket), "}, \"extent\": ");
    absl::StrAppend(
        &json, record.extent.requests < 0 ? "null" : absl::StrCat("{", Counts(record.extent), "}"),
        ", \"indptr_tails\": [", tails, "], \"replay\": ", record.replay, ", \"status\": \"", ToString(record.status),
        "\", \"violation\": ", record.violation.has_value() ? Quoted(ToString(*record.violation)) : "null", "}");
  }
  return json + "\n]\n";
}

}  // namespace pristine
