// What is fuzzed. Each target takes any bytes and aborts, with a message, where a promise is broken. They run under
// libFuzzer (fuzz_entry.cc, ./run fuzz) and, over the files in corpus/, as plain tests (corpus_test.cc).
#ifndef PRISTINE_TESTS_FUZZ_FUZZ_TARGETS_H_
#define PRISTINE_TESTS_FUZZ_FUZZ_TARGETS_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace pristine::testing {

void FuzzAzureCsv(const uint8_t* data, size_t size);
void FuzzMooncakeJsonl(const uint8_t* data, size_t size);
// An argument per line.
void FuzzOptions(const uint8_t* data, size_t size);
// A little program of BeginStep, Refill, Keep and replays over a manager with a buffer of each kind.
void FuzzRefill(const uint8_t* data, size_t size);

}  // namespace pristine::testing

#define PRISTINE_FUZZ_CHECK(condition, what)                                           \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, (what)); \
      std::abort();                                                                    \
    }                                                                                  \
  } while (false)

#endif  // PRISTINE_TESTS_FUZZ_FUZZ_TARGETS_H_
