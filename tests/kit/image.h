// The device memory of a step as one block of bytes, so that loading, comparing and finding stray writes are one
// operation each; and what attention over it must give.
#ifndef PRISTINE_TESTS_KIT_IMAGE_H_
#define PRISTINE_TESTS_KIT_IMAGE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "pristine/conformance/attention_conformance.h"
#include "tests/kit/laws.h"
#include "tests/kit/step.h"

namespace pristine::conformance {

// Where the tensors lie in an image; gaps between them are poison, too.
class Layout {
 public:
  struct Part {
    const char* name;
    size_t offset, bytes;  // k and v: with the page past num_pages
    attention::DType dtype;
    size_t row;  // bytes of a row (of a request, or of a page)
    size_t element() const { return attention::SizeOf(dtype); }
  };
  enum Name { kQ, kKNew, kVNew, kK, kV, kOut, kLse };

  explicit Layout(const AttentionShape& shape);
  const Part& operator[](Name name) const { return parts_[name]; }
  size_t bytes() const { return bytes_; }
  AttentionTensors Tensors(const AttentionShape& shape, DeviceSpan<std::byte> image) const;
  // "" if `after` differs from `expected` only where a step of `bucket` may write: its rows of out and lse, and the
  // dummy page. The first other difference, otherwise.
  std::string StrayWrite(const AttentionShape& shape, int32_t bucket, const std::vector<std::byte>& expected,
                         const std::vector<std::byte>& after) const;

 private:
  std::array<Part, 7> parts_;
  size_t bytes_ = 0;
};

// Values of a step: Q comes from a hash, rounded to the shape's dtype; K and V too, rounded to that of the pool.
class StepImage {
 public:
  StepImage(const AttentionShape& shape, const Layout& layout, const KitStep& step)
      : shape_(shape), layout_(layout), step_(step) {}
  // What the step finds, or (appended) what must be there afterwards but for outputs.
  std::vector<std::byte> Build(Poison poison, bool appended) const;
  // "" if out and lse of (row, query, head) in `after` are attention.
  std::string WrongValue(const std::vector<std::byte>& after, int32_t row, int32_t query, int32_t head) const;

 private:
  enum What : uint64_t { kQuery, kKey, kValue };
  // Whether any query of `row` attends `position`.
  bool Attended(int32_t row, int32_t kv_head, int32_t position) const;
  double Value(What what, int32_t row, int32_t position, int32_t head, int32_t d) const;
  void Put(std::vector<std::byte>& image, Layout::Name part, int64_t index, double value) const;
  // Where element i of [kv_heads, head_dim] of position `p` of request `r` lies in a pool.
  int64_t Place(int32_t r, int32_t p, int32_t i) const;

  const AttentionShape& shape_;
  const Layout& layout_;
  const KitStep& step_;
};

}  // namespace pristine::conformance

#endif  // PRISTINE_TESTS_KIT_IMAGE_H_
