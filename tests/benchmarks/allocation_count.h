// Counts every C++ allocation of the program, the libraries' included.
#ifndef PRISTINE_TESTS_BENCHMARKS_ALLOCATION_COUNT_H_
#define PRISTINE_TESTS_BENCHMARKS_ALLOCATION_COUNT_H_

#include <cstdint>

namespace pristine::benchmarks {

int64_t AllocationCount();

}  // namespace pristine::benchmarks

#endif  // PRISTINE_TESTS_BENCHMARKS_ALLOCATION_COUNT_H_
