// The part of JSON Schema that docs/replay_report.schema.json uses. A keyword that is not known is an error, so that a
// schema never promises what nobody checks.
#ifndef PRISTINE_TESTS_DRIVER_JSON_SCHEMA_H_
#define PRISTINE_TESTS_DRIVER_JSON_SCHEMA_H_

#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/driver/json.h"

namespace pristine::testing {

class JsonSchema {
 public:
  explicit JsonSchema(const Json& schema) : schema_(schema) {}
  // What is wrong with `value`, one line each with its place; empty: it is valid.
  std::vector<std::string> Check(const Json& value) {
    errors_.clear();
    Check(schema_, value, "report");
    return errors_;
  }

 private:
  using Kind = Json::Kind;
  void Fail(const std::string& place, const std::string& what) { errors_.push_back(absl::StrCat(place, ": ", what)); }

  static bool IsOf(const std::string& type, const Json& value) {
    switch (value.kind) {
      case Kind::kNull:
        return type == "null";
      case Kind::kBool:
        return type == "boolean";
      case Kind::kNumber:
        return type == "number" || (type == "integer" && value.number == std::floor(value.number));
      case Kind::kString:
        return type == "string";
      case Kind::kArray:
        return type == "array";
      case Kind::kObject:
        break;
    }
    return type == "object";
  }
  static bool Same(const Json& a, const Json& b) {  // of scalars
    return a.kind == b.kind && a.number == b.number && a.text == b.text;
  }

  void Check(const Json& schema, const Json& value, const std::string& place) {
    for (const auto& [keyword, argument] : schema.object) {
      if (keyword == "type") {
        bool found = argument.kind == Kind::kString && IsOf(argument.text, value);
        for (const Json& type : argument.array) found = found || IsOf(type.text, value);
        if (!found) Fail(place, "is of another type");
      } else if (keyword == "enum") {
        bool found = false;
        for (const Json& choice : argument.array) found = found || Same(choice, value);
        if (!found) Fail(place, "is none of enum");
      } else if (keyword == "minimum") {
        if (value.kind == Kind::kNumber && value.number < argument.number) Fail(place, "is less than minimum");
      } else if (keyword == "minItems" || keyword == "maxItems") {
        const double size = static_cast<double>(value.array.size());
        const bool broken = keyword == "minItems" ? size < argument.number : size > argument.number;
        if (value.kind == Kind::kArray && broken) Fail(place, "breaks " + keyword);
      } else if (keyword == "items") {
        for (size_t i = 0; i < value.array.size(); ++i)
          Check(argument, value.array[i], absl::StrCat(place, "[", i, "]"));
      } else if (keyword == "required") {
        for (const Json& name : argument.array) {  // says nothing of what is no object
          if (value.kind == Kind::kObject && !value.has(name.text)) Fail(place, "has no " + name.text);
        }
      } else if (keyword == "properties" || keyword == "additionalProperties") {
        continue;  // below, together
      } else if (keyword != "$schema" && keyword != "title" && keyword != "description") {
        Fail(place, "the schema has an unknown keyword " + keyword);
      }
    }
    const Json& additional = schema["additionalProperties"];
    for (const auto& [name, field] : value.object) {
      const std::string where = absl::StrCat(place, ".", name);
      if (schema["properties"].has(name)) {
        Check(schema["properties"][name], field, where);
      } else if (additional.kind == Kind::kObject) {
        Check(additional, field, where);
      } else if (additional.kind == Kind::kBool && additional.number == 0) {
        Fail(where, "is not in the schema");
      }
    }
  }

  const Json& schema_;
  std::vector<std::string> errors_;
};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_DRIVER_JSON_SCHEMA_H_
