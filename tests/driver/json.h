// Just enough JSON to hold a report against the grammar and to look at its fields.
#ifndef PRISTINE_TESTS_DRIVER_JSON_H_
#define PRISTINE_TESTS_DRIVER_JSON_H_

#include <cstdlib>
#include <map>
#include <string>
#include <vector>

namespace pristine::testing {

struct Json {
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject } kind = Kind::kNull;
  double number = 0;  // of a bool: 0 or 1
  std::string text;
  std::vector<Json> array;
  std::map<std::string, Json> object;

  bool has(const std::string& name) const { return object.count(name) > 0; }
  const Json& operator[](const std::string& name) const {
    static const Json null;
    const auto field = object.find(name);
    return field == object.end() ? null : field->second;
  }
};

class JsonParser {
 public:
  explicit JsonParser(const std::string& text) : text_(text) {}
  bool Parse(Json& value) { return Value(value, 0) && (Skip(), at_ == text_.size()); }

 private:
  char Peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void Skip() {
    while (at_ < text_.size() && (Peek() == ' ' || Peek() == '\n')) ++at_;
  }
  bool Take(const std::string& token) {
    Skip();
    if (text_.compare(at_, token.size(), token) != 0) return false;
    at_ += token.size();
    return true;
  }
  bool String(std::string& value) {
    if (!Take("\"")) return false;
    for (; at_ < text_.size(); ++at_) {
      if (text_[at_] == '"') return ++at_, true;
      if (static_cast<unsigned char>(text_[at_]) < 0x20) return false;
      if (text_[at_] == '\\') {
        if (++at_ == text_.size()) return false;
        if (text_[at_] == 'u') {
          if (text_.find_first_not_of("0123456789abcdefABCDEF", at_ + 1) < at_ + 5) return false;
          AppendUtf8(std::strtol(text_.substr(at_ + 1, 4).c_str(), nullptr, 16), value);
          at_ += 4;
          continue;
        }
        if (std::string("\"\\/bfnrt").find(text_[at_]) == std::string::npos) return false;
      }
      value += text_[at_];
    }
    return false;
  }
  // Of the first 65,536 characters, which one escape can name.
  static void AppendUtf8(long code, std::string& value) {
    if (code < 0x80) {
      value += static_cast<char>(code);
      return;
    }
    if (code < 0x800) {
      value += static_cast<char>(0xc0 | code >> 6);
    } else {
      value += static_cast<char>(0xe0 | code >> 12);
      value += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    }
    value += static_cast<char>(0x80 | (code & 0x3f));
  }
  template <class Item>
  bool Items(const char* end, Item item) {
    if (Take(end)) return true;
    do {
      if (!item()) return false;
    } while (Take(","));
    return Take(end);
  }
  bool Value(Json& value, int depth) {
    if (depth > 10) return false;
    Skip();
    if (Peek() == '"') {
      value.kind = Json::Kind::kString;
      return String(value.text);
    }
    if (Take("{")) {
      value.kind = Json::Kind::kObject;
      return Items("}", [&] {
        std::string name;
        return String(name) && Take(":") && !value.has(name) && Value(value.object[name], depth + 1);
      });
    }
    if (Take("[")) {
      value.kind = Json::Kind::kArray;
      return Items("]", [&] { return Value(value.array.emplace_back(), depth + 1); });
    }
    if (Take("null")) return true;
    if (Take("true") || Take("false")) {
      value.kind = Json::Kind::kBool;
      value.number = text_[at_ - 2] == 'u' ? 1 : 0;
      return true;
    }
    char* end = nullptr;
    value.kind = Json::Kind::kNumber;
    value.number = std::strtod(text_.c_str() + at_, &end);
    const size_t length = end - (text_.c_str() + at_);
    // strtod also takes nan, inf and hexadecimal numbers, which JSON has not.
    const std::string number = text_.substr(at_, length);
    at_ += length;
    return length > 0 && number.find_first_not_of("0123456789+-.eE") == std::string::npos;
  }

  const std::string& text_;
  size_t at_ = 0;
};

inline bool ParseJson(const std::string& text, Json& value) { return JsonParser(text).Parse(value); }

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_DRIVER_JSON_H_
