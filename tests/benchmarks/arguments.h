// Command lines of the benchmarks.
#ifndef PRISTINE_TESTS_BENCHMARKS_ARGUMENTS_H_
#define PRISTINE_TESTS_BENCHMARKS_ARGUMENTS_H_

#include <charconv>
#include <cstdio>
#include <cstring>
#include <string>
#include <system_error>

#include "absl/status/status.h"

namespace pristine::benchmarks {

// Whether `argument` is `prefix` and an integer of at least `minimum`, which then is `value`.
inline bool NumberArgument(const char* argument, const char* prefix, int minimum, int& value) {
  const size_t length = std::strlen(prefix);
  if (std::strncmp(argument, prefix, length) != 0) return false;
  const char* const end = argument + std::strlen(argument);
  const auto [parsed, error] = std::from_chars(argument + length, end, value);
  return error == std::errc() && parsed == end && value >= minimum;
}

// Whether `argument` is `prefix` and a text that is not empty, which then is `value`.
inline bool TextArgument(const char* argument, const char* prefix, std::string& value) {
  const size_t length = std::strlen(prefix);
  if (std::strncmp(argument, prefix, length) != 0) return false;
  value = argument + length;
  return !value.empty();
}

// A whole program. `parse` takes one argument; false: it is none of the program's. Exit status: 0; 1 wrong arguments, a
// wrong result or an error; 5 no such device.
template <class Options>
int Main(int argc, char** argv, const char* usage, bool (*parse)(const char* argument, Options& options),
         absl::Status (*run)(const Options& options)) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") == 0) {
      std::fputs(usage, stdout);
      return 0;
    }
    if (!parse(argv[i], options)) {
      std::fprintf(stderr, "unknown argument %s\n%s", argv[i], usage);
      return 1;
    }
  }
  const absl::Status status = run(options);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : absl::IsUnavailable(status) ? 5 : 1;
}

}  // namespace pristine::benchmarks

#endif  // PRISTINE_TESTS_BENCHMARKS_ARGUMENTS_H_
