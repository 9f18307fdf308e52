// The format of the Mooncake traces: one flat JSON object per line.
#include <algorithm>
#include <cctype>
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "examples/replay_driver/trace.h"
#include "examples/replay_driver/trace_line.h"

namespace pristine::replay_driver {
namespace {

constexpr int64_t kMostMs = 1'000'000'000'000;

// One line of text, read from left to right. Every function skips blanks first and returns false where the text is not
// what it looks for.
class LineReader {
 public:
  explicit LineReader(const std::string& text) : text_(text) {}

  bool Take(char c) {
    SkipBlanks();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  bool AtEnd() {
    SkipBlanks();
    return at_ == text_.size();
  }
  // A string, escapes left as they are: no name that is looked for has one.
  bool String(std::string& value) {
    if (!Take('"')) return false;
    const size_t begin = at_;
    for (; at_ < text_.size(); ++at_) {
      if (static_cast<unsigned char>(text_[at_]) < 0x20) return false;
      if (text_[at_] == '"') {
        value = text_.substr(begin, at_++ - begin);
        return true;
      }
      if (text_[at_] == '\\') ++at_;
    }
    return false;
  }
  // What stands up to the next comma, bracket or blank.
  std::string Word() {
    SkipBlanks();
    const size_t begin = at_;
    at_ = std::min(text_.find_first_of(",]} \t", at_), text_.size());
    return text_.substr(begin, at_ - begin);
  }
  // A value that nobody asked for: a number, a string, or a list of those (the published traces have hash_ids).
  bool SkipValue() {
    if (!Take('[')) return SkipScalar();
    if (Take(']')) return true;
    do {
      if (!SkipScalar()) return false;
    } while (Take(','));
    return Take(']');
  }

 private:
  void SkipBlanks() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t')) ++at_;
  }
  bool SkipScalar() {
    SkipBlanks();
    std::string text;
    if (at_ < text_.size() && text_[at_] == '"') return String(text);
    double number = 0;
    text = Word();
    return absl::SimpleAtod(text, &number) && text.find_first_not_of("0123456789+-.eE") == std::string::npos;
  }

  const std::string& text_;
  size_t at_ = 0;
};

struct Field {
  const char* name;
  int64_t most;
  std::optional<int64_t> value;
};

}  // namespace

absl::StatusOr<std::vector<TraceRequest>> ParseMooncakeJsonl(std::istream& in, const std::string& name) {
  std::vector<TraceRequest> requests;
  std::string line;
  int64_t number = 0;
  while (std::getline(in, line)) {
    ++number;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    Field fields[] = {
        {"timestamp", kMostMs, {}}, {"input_length", kMostTokens, {}}, {"output_length", kMostTokens, {}}};
    const auto refuse_form = [&] {
      return RefuseLine(name, number,
                        R"(a flat JSON object such as {"timestamp": 0, "input_length": 6758, "output_length": 500})",
                        line);
    };
    LineReader reader(line);
    if (!reader.Take('{')) return refuse_form();
    bool more = !reader.Take('}');
    while (more) {
      std::string key;
      if (!reader.String(key) || !reader.Take(':')) return refuse_form();
      Field* const field =
          std::find_if(std::begin(fields), std::end(fields), [&key](const Field& known) { return key == known.name; });
      if (field == std::end(fields)) {
        if (!reader.SkipValue()) return refuse_form();
      } else {
        if (field->value.has_value()) return RefuseLine(name, number, absl::StrCat("\"", key, "\" once"), line);
        const std::string word = reader.Word();
        int64_t value = 0;
        // SimpleAtoi takes a sign in front, which JSON has not for +.
        if (word.empty() || !std::isdigit(static_cast<unsigned char>(word[0])) || !absl::SimpleAtoi(word, &value) ||
            value > field->most) {
          return RefuseLine(name, number, absl::StrCat("\"", key, "\" to be an integer in [0, ", field->most, "]"),
                            word);
        }
        field->value = value;
      }
      more = reader.Take(',');
      if (!more && !reader.Take('}')) return refuse_form();
    }
    if (!reader.AtEnd()) return refuse_form();
    for (const Field& field : fields) {
      if (!field.value.has_value()) return RefuseLine(name, number, absl::StrCat("a field \"", field.name, "\""), line);
    }
    requests.push_back({*fields[0].value * kTicksPerMs, static_cast<int32_t>(*fields[1].value),
                        static_cast<int32_t>(*fields[2].value)});
  }
  if (in.bad()) return absl::InvalidArgumentError(absl::StrCat(name, ":", number + 1, ": cannot be read"));
  if (requests.empty()) return RefuseLine(name, 1, "at least one request", "end of file");
  SortByArrival(requests);
  return requests;
}

}  // namespace pristine::replay_driver
