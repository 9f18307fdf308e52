// The laws that the kit holds every wrapper to, whatever it computes: a Subject is run eagerly, captured and replayed
// over its steps, under two poisons, and all that it may not do is looked for.
#ifndef PRISTINE_TESTS_KIT_LAWS_H_
#define PRISTINE_TESTS_KIT_LAWS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/attention/types.h"
#include "pristine/conformance/report.h"
#include "pristine/graph_runtime/memory.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::conformance {

using Bytes = std::vector<std::byte>;

// What fills everything that a live row must not depend on.
enum class Poison {
  kNan,      // NaN; numbers just out of range, which are mapped and hold NaN; lengths 1, indptr 0
  kMaximal,  // large finite values; the largest legal numbers. NaN alone would be hidden by min, max and comparisons
};
constexpr std::array<Poison, 2> kPoisons = {Poison::kNan, Poison::kMaximal};
const char* ToString(Poison poison);
// Of a tensor's element.
float PoisonValue(Poison poison);
// Of a bound array. A kernel that follows poisoned numbers stays within arrays and pool.
int32_t PoisonOf(Poison poison, const BoundArray& array, int32_t max_requests);

// A well-mixed hash, for values and random choices.
uint64_t Mix(uint64_t x);
// The value of one element of `dtype`; the nearest that it can have; and writing it.
double Fetch(attention::DType dtype, const std::byte* from);
double Round(attention::DType dtype, double value);
void Store(attention::DType dtype, float value, std::byte* to);
// Sets every element of `to`.
void Fill(attention::DType dtype, float value, std::byte* to, size_t bytes);

// A wrapper with the steps that it is run over. All device memory of a step is one block of bytes, its image, so that
// loading, comparing and finding stray writes are one operation each.
class Subject {
 public:
  struct Step {
    int32_t bucket = 0;
    std::vector<int32_t> lengths;  // of the requests
  };
  struct Place {
    int32_t row = 0, head = 0;
    std::string what;  // which values
  };
  virtual ~Subject() = default;

  // Ascending. Step i is for bucket i % buckets; the first of each bucket is its worst case, the second has no
  // requests.
  virtual const std::vector<int32_t>& buckets() const = 0;
  virtual const std::vector<Step>& steps() const = 0;
  virtual int32_t steps_in_flight() const = 0;
  virtual size_t image_bytes() const = 0;
  // What a step finds; and what must be there afterwards, where StrayWrite looks.
  virtual Bytes Before(size_t step, Poison poison) const = 0;
  virtual Bytes After(size_t step, Poison poison) const = 0;
  // "" if `found` differs from `expected` only where the step may write. The first other difference, otherwise.
  virtual std::string StrayWrite(size_t step, const Bytes& expected, const Bytes& found) const = 0;
  // The first of the step's results that differs between two images.
  virtual std::optional<Place> Difference(size_t step, const Bytes& a, const Bytes& b) const = 0;
  // The first of the step's results that is not what it should be.
  virtual std::optional<Place> WrongValue(size_t step, const Bytes& found) const = 0;

  virtual absl::Status Prepare(Stream& stream, size_t step) = 0;
  // Before a capture, with no step prepared.
  virtual absl::Status WarmUp(Stream& stream, int32_t bucket, DeviceSpan<std::byte> image) = 0;
  virtual absl::Status Run(Stream& stream, int32_t bucket, DeviceSpan<std::byte> image) = 0;
  virtual std::vector<BoundArray> BoundArrays() = 0;
};

// Runs everything on `stream`, which must be idle. Blocks. INVALID_ARGUMENT: an empty BoundArray. Codes of
// Device::Allocate.
absl::StatusOr<Report> CheckLaws(Stream& stream, Subject& subject);

}  // namespace pristine::conformance

#endif  // PRISTINE_TESTS_KIT_LAWS_H_
