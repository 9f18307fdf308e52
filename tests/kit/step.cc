#include "tests/kit/step.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "tests/kit/laws.h"

namespace pristine::conformance {
namespace {

using Lengths = std::vector<int32_t>;

// `below` is the next smaller bucket, 0 for the smallest.
std::vector<Lengths> LengthSets(const AttentionShape& shape, int32_t bucket, int32_t below, uint64_t seed) {
  const int32_t longest = shape.max_length, shortest = std::max(1, shape.min_length), page = shape.page_size;
  const Lengths edges = {page, 1, page + 1, longest, page - 1, 2 * page, longest - 1, 2 * page + 1};
  // Lengths of `count` requests from the edges, beginning at a place of its own.
  const auto mixed = [&](int32_t count, size_t from) {
    Lengths lengths;
    for (int32_t i = 0; i < count; ++i) {
      lengths.push_back(std::clamp(edges[(from + i) % edges.size()], shortest, longest));
    }
    return lengths;
  };
  std::vector<Lengths> sets = {
      Lengths(bucket, longest),
      {},                                 // all rows padded
      mixed(bucket, 0),                   // full
      mixed(below + 1, 2),                // the smallest step that needs this bucket
      mixed(std::max(1, bucket - 1), 5),  // one padded row
      Lengths(bucket, shortest),
      {longest},  // all but one row padded
  };
  Lengths rising;
  for (int32_t i = 0; i < bucket; ++i) rising.push_back(shortest + (longest - shortest) * i / bucket);
  sets.push_back(rising);
  sets.emplace_back(rising.rbegin(), rising.rend());
  for (int draw = 0; draw < 2; ++draw) {
    Lengths random(1 + Mix(++seed) % bucket);
    for (int32_t& length : random) length = shortest + static_cast<int32_t>(Mix(++seed) % (longest - shortest + 1));
    sets.push_back(std::move(random));
  }
  if (shape.min_length == 0) {
    Lengths holes = mixed(bucket, 3);
    for (size_t i = 0; i < holes.size(); i += 2) holes[i] = 0;
    sets.push_back(std::move(holes));
    sets.push_back(Lengths(bucket, 0));
  }
  return sets;
}

}  // namespace

std::vector<KitStep> MakeSteps(const AttentionShape& shape) {
  std::vector<std::vector<Lengths>> sets;
  for (size_t b = 0; b < shape.buckets.size(); ++b) {
    sets.push_back(LengthSets(shape, shape.buckets[b], b == 0 ? 0 : shape.buckets[b - 1], Mix(shape.seed + b)));
  }
  std::vector<KitStep> steps;
  for (size_t i = 0; i < sets[0].size(); ++i) {
    for (size_t b = 0; b < sets.size(); ++b) {
      KitStep step = {.bucket = shape.buckets[b],
                      .seed = Mix(shape.seed ^ Mix(steps.size())),
                      .lengths = sets[b][i],
                      .indptr = {0},
                      .indices = {},
                      .slots = {},
                      .positions = {}};
      std::vector<int32_t> pages(shape.num_pages() - 2);  // neither the dummy page nor the last
      std::iota(pages.begin(), pages.end(), 1);
      for (size_t p = pages.size(); p > 1; --p) std::swap(pages[p - 1], pages[Mix(step.seed + p) % p]);
      for (const int32_t length : step.lengths) {
        const int32_t r = static_cast<int32_t>(step.indptr.size()) - 1;
        const int32_t count = (length + shape.page_size - 1) / shape.page_size;
        step.indices.insert(step.indices.end(), pages.begin() + step.indptr.back(),
                            pages.begin() + step.indptr.back() + count);
        step.indptr.push_back(step.indptr.back() + count);
        for (int32_t position = length - shape.q_len; position < length; ++position) {
          step.slots.push_back(position < 0 ? -1 : static_cast<int32_t>(step.Slot(shape, r, position)));
          step.positions.push_back(std::max(0, position));
        }
      }
      steps.push_back(std::move(step));
    }
  }
  return steps;
}

}  // namespace pristine::conformance
