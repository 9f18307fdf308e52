// A library that we do not own: a planner on the host and a kernel bound to arrays, with habits that bite under graphs.
//   - the kernel runs over all rows that it was bound for, whatever the batch (it reads the tail);
//   - it reads block_table[row][(length - 1) / 16], so a length of 0 reads before the table;
//   - it indexes its state cache with slots[row], so -1 reads before the cache;
//   - it follows the plan without looking back.
// Here it counts the wild reads instead of making them.
#ifndef PRISTINE_EXAMPLES_FOREIGN_H_
#define PRISTINE_EXAMPLES_FOREIGN_H_

#include <cstdint>

struct CUstream_st;

namespace foreign {

struct Bound {
  const int32_t* lengths;  // [rows]
  const int32_t* slots;    // [rows]
  const int32_t* plan;     // [rows] blocks of each row, from Plan
  int32_t* wild_reads;     // [1]
  int32_t* disagreements;  // [1] rows whose plan is not that of their length
  int32_t rows;
  int32_t max_length;
  int32_t max_slots;
};

// What the kernel does in one row.
#ifdef __CUDACC__
__host__ __device__
#endif
    inline void
    VisitRow(const Bound& b, int32_t row, int32_t& wild, int32_t& disagree) {
  const int32_t length = b.lengths[row], slot = b.slots[row];
  wild += (length < 1 || length > b.max_length) + (slot < 0 || slot >= b.max_slots);
  disagree += b.plan[row] != (length + 15) / 16;
}

inline void Plan(const int32_t* lengths, int32_t rows, int32_t* plan) {
  for (int32_t row = 0; row < rows; ++row) plan[row] = (lengths[row] + 15) / 16;
}

// Launches the kernel on a raw cudaStream_t.
int LaunchCuda(CUstream_st* stream, const Bound& bound);

}  // namespace foreign

#endif  // PRISTINE_EXAMPLES_FOREIGN_H_
