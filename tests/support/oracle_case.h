// A made-up decode step: queries, a KV pool with scattered pages, and what attention over it must give.
#ifndef PRISTINE_TESTS_SUPPORT_ORACLE_CASE_H_
#define PRISTINE_TESTS_SUPPORT_ORACLE_CASE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "pristine/attention/types.h"
#include "tests/support/oracle.h"

namespace pristine::testing {

struct DecodeShape {
  attention::DType dtype = attention::DType::kFloat32;
  int32_t q_heads = 4, kv_heads = 2, head_dim = 64;
  int32_t page_size = 1;
  int32_t window = 0;
  uint64_t seed = 1;
  int32_t q_len = 1;
  std::optional<attention::DType> kv_dtype = {};  // nothing: dtype
  attention::KvLayout layout = attention::KvLayout::kNHD;
  float soft_cap = 0;
  bool sinks = false;
  float k_scale = 1, v_scale = 1;
  attention::DType KvDType() const { return kv_dtype.value_or(dtype); }
  // By which results are judged: KV in 8 bits is the coarsest.
  attention::DType Precision() const { return KvDType() == dtype ? dtype : KvDType(); }
  std::string ToString() const;
};

// Query i of a row stands at position length - q_len + i. K and V of (row, position, head) come from a hash. A needle
// is a position of a row whose key carries at least half of the mass and whose value row encodes row, head, position
// and page. Slots that belong to no position are NaN, but for page 0, the dummy page, which is zeros. Pages are handed
// out in a scrambled order. Not thread-safe: keys and values of the last head asked for are kept.
class DecodeCase {
 public:
  // needles[r]: a position of row r, or -1. It may lie at or past lengths[r] as long as the row's pages hold it: such a
  // key must not be seen.
  DecodeCase(const DecodeShape& shape, const std::vector<int32_t>& lengths, const std::vector<int32_t>& needles);

  const DecodeShape& shape() const { return shape_; }
  const std::vector<int32_t>& lengths() const { return lengths_; }
  const std::vector<int32_t>& indptr() const { return indptr_; }    // pages
  const std::vector<int32_t>& indices() const { return indices_; }  // page numbers
  int32_t num_pages() const { return num_pages_; }
  int32_t rows() const { return static_cast<int32_t>(lengths_.size()); }
  std::vector<std::byte> Q() const;                // [rows, q_len, q_heads, head_dim] in dtype
  std::vector<std::byte> Pool(bool values) const;  // a pool in kv_dtype and layout
  std::vector<float> Sinks() const;                // [q_heads]; empty without

  // Attention of (row, query, q_head) over those positions of the query's window that `attended` accepts (null: all).
  OracleRow Expected(int32_t row, int32_t q_head, const std::function<bool(int32_t)>& attended = nullptr,
                     int32_t query = 0) const;

 private:
  double Scale() const;
  double Query(int32_t row, int32_t query, int32_t q_head, int32_t d) const;
  double Key(int32_t row, int32_t position, int32_t kv_head, int32_t d) const;
  double Value(int32_t row, int32_t position, int32_t kv_head, int32_t d) const;
  // Uniform with mean 0 and variance 1.
  double Noise(uint64_t what, int32_t row, int32_t position, int32_t head, int32_t d) const;

  struct HeadOfRow {
    int32_t row = -1, kv_head = -1;
    std::vector<double> keys, values;  // [length, head_dim], v_scale applied
  };
  const HeadOfRow& Head(int32_t row, int32_t kv_head) const;

  const DecodeShape shape_;
  const std::vector<int32_t> lengths_;
  const std::vector<int32_t> needles_;
  std::vector<int32_t> indptr_, indices_;
  int32_t num_pages_ = 0;
  mutable HeadOfRow head_;  // the last: all queries of its group ask for it, and making it is what takes time
};

// Conversions between doubles or floats and the bytes of a dtype.
std::vector<std::byte> ToBytes(absl::Span<const float> values, attention::DType dtype);
std::vector<float> ToFloats(absl::Span<const std::byte> bytes, attention::DType dtype);

// The positions where an off-by-one would show: first and last, both sides of the first and of the last page edge and
// of every `split` tokens' edge, both sides of the window's edge, and one past the end where the last page holds it.
std::vector<int32_t> NeedlePositions(const DecodeShape& shape, int32_t length, int32_t split);

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_SUPPORT_ORACLE_CASE_H_
