// How large a step is. No Abseil, no CUDA: kernels take it by value.
#ifndef PRISTINE_GRAPH_RUNTIME_EXTENT_H_
#define PRISTINE_GRAPH_RUNTIME_EXTENT_H_

#include <cstdint>
#include <string>

namespace pristine {

// Requests in a batch and query tokens over all of them. In decode both are equal; in target verify tokens is
// requests * q_len. Used for the bucket a graph was captured for, for the real part of a step, and in reports.
struct Extent {
  int32_t requests = 0;
  int32_t tokens = 0;

  friend bool operator==(const Extent& a, const Extent& b) = default;

  // Whether this fits into `bucket`: both counts must.
  bool FitsIn(const Extent& bucket) const { return requests <= bucket.requests && tokens <= bucket.tokens; }

  // "{4 requests, 4 tokens}"
  std::string ToString() const {
    std::string text = "{";
    text += std::to_string(requests);
    text += " requests, ";
    text += std::to_string(tokens);
    text += " tokens}";
    return text;
  }
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_EXTENT_H_
