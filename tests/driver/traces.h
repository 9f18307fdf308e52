// Production traces are not part of the project: PRISTINE_TRACE_DIR says where they are.
#ifndef PRISTINE_TESTS_DRIVER_TRACES_H_
#define PRISTINE_TESTS_DRIVER_TRACES_H_

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>

namespace pristine::testing {

constexpr char kNoTraces[] = "PRISTINE_TRACE_DIR names no folder with this trace";

// "" if the trace is not there, which is a failure where PRISTINE_REQUIRE_TRACES=1.
inline std::string TracePath(const std::string& name) {
  const char* folder = std::getenv("PRISTINE_TRACE_DIR");
  if (folder != nullptr) {
    const std::filesystem::path path = std::filesystem::path(folder) / name;
    std::error_code error;
    if (std::filesystem::exists(path, error)) return path.string();
  }
  const char* required = std::getenv("PRISTINE_REQUIRE_TRACES");
  if (required != nullptr && std::string(required) == "1") ADD_FAILURE() << name << ": " << kNoTraces;
  return "";
}

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_DRIVER_TRACES_H_
