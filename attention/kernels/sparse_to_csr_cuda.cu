// One kernel that reads what it needs in two steps: lengths and block tables, then page tables. Each block sums up the
// rows ahead of its own, which costs less than a second launch that reads the sums. What a row's indices are made from
// is brought to shared memory in runs; the indices are then written in whole lines, wherever the row begins.
#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>

#include "attention/kernels/dependent_launch.cuh"
#include "attention/kernels/divider.h"
#include "attention/kernels/sparse_to_csr.h"
#include "pristine/buffers/violation.h"

namespace pristine::attention {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLine = 32;       // indices of 128 bytes
constexpr int kMaxRuns = 1024;  // of a block
constexpr int kMinPart = 1024;
constexpr int kManyBlocks = 528;
constexpr int64_t kManyIndices = int64_t{1} << 22;  // from which on memory is what they wait for

// What a run is: indices of a row that count up together.
enum class Runs {
  kSlots,  // of one block and one page: the index follows from the first one's
  kPages,  // of one block, page_size being 1: every index is an entry of the page table
};
struct Run {
  int first;  // kSlots: the first index; kPages: the first position
  int count;  // indices that exist; those after them are the dummy page's
};

static_assert(sizeof(Run) * (kMaxRuns + 2 * kLine) <= 48 << 10, "more shared memory takes an attribute");

// kVec: indices of a store. kBatch: stores of a thread whose loads are in flight together. kMany: kManyIndices and
// more.
template <Runs kRunsAre, int kIndices, int kStores, int kThreadsOfBlock, int kBlocksOfMultiprocessor, bool kManyIndices>
struct Form {
  static constexpr Runs kRuns = kRunsAre;
  static constexpr int kVec = kIndices, kBatch = kStores;
  static constexpr int kThreads = kThreadsOfBlock, kBlocks = kBlocksOfMultiprocessor;
  static constexpr bool kMany = kManyIndices;
  static constexpr int kMaxPart = kRuns == Runs::kPages && !kMany ? 2048 : INT32_MAX;
};
using AnySlots = Form<Runs::kSlots, 1, 8, 128, 16, false>;
using FewSlots = Form<Runs::kSlots, 4, 1, 128, 16, false>;  // runs of 4 or more
using ManySlots = Form<Runs::kSlots, 4, 1, 128, 16, true>;  // the same
using FewPages = Form<Runs::kPages, 4, 2, 128, 12, false>;  // the same
using ManyPages = Form<Runs::kPages, 1, 8, 256, 8, true>;

template <class F, class T>
__device__ inline void StoreTo(T* to, T value) {
  if constexpr (F::kMany) {
    __stcs(to, value);  // leaves L2 first
  } else {
    *to = value;
  }
}

struct SparseToCsrLaunch {
  SparseToCsrParams params;
  Divider groups, block, page_size, parts;
  int sparse_length;  // from which on the table is read
  int part;           // indices of a row that a block does
  int run_bits;       // a run is 2^run_bits long, a divisor of all that runs must not cross
  int lead;           // runs before the first, for the start of its line
};

__device__ inline int Clamp(int length, int max_length) { return min(max(length, 0), max_length); }

__device__ inline int RowLength(const SparseToCsrLaunch& launch, int length) {
  if (length < launch.sparse_length) return length;
  const int before_last = static_cast<int>(launch.block.Quotient(length - 1));
  return length + (launch.params.topk - 1 - before_last) * launch.params.block;
}

// Grid: parts of rows, a function of the bucket alone; parts past a row's end have nothing to do.
template <class F>
__global__ void __launch_bounds__(F::kThreads, F::kBlocks)
    SparseToCsrKernel(const __grid_constant__ SparseToCsrLaunch launch) {
  constexpr int kThreads = F::kThreads, kVec = F::kVec, kBatch = F::kBatch;
  extern __shared__ Run runs[];
  __shared__ int warp_sums[kThreads / 32];
  const SparseToCsrParams& p = launch.params;
  const int thread = threadIdx.x;
  const int run_length = 1 << launch.run_bits;
  const int row = static_cast<int>(launch.parts.Quotient(blockIdx.x));
  const int at = (static_cast<int>(blockIdx.x) - row * static_cast<int>(launch.parts.divisor)) * launch.part;
  const int request = static_cast<int>(launch.groups.Quotient(row));
  const int group = row - request * p.groups;
  const int* const table = p.table + static_cast<long long>(row) * p.topk;
  const int own_entry =
      static_cast<int>(launch.block.Quotient(static_cast<unsigned>(at) + (thread << launch.run_bits)));
  WaitForStream();

  // These loads go out together. The table is read whether the row needs it or not.
  const int ahead = thread < request ? p.lengths[thread] : 0;
  const int further = thread + kThreads < request ? p.lengths[thread + kThreads] : 0;
  const int named = own_entry < p.topk ? table[own_entry] : 0;
  const int found = p.lengths[request];
  const int first_page = p.page_indptr[request];
  const int end_page = static_cast<int>(
      min(static_cast<long long>(p.page_indptr[request + 1]), static_cast<long long>(p.page_indices_size)));
  const int length = Clamp(found, p.max_length);
  const int count = RowLength(launch, length);
  if (at >= count && at > 0) return;

  int sum = RowLength(launch, Clamp(ahead, p.max_length)) + RowLength(launch, Clamp(further, p.max_length));
  for (int i = thread + 2 * kThreads; i < request; i += kThreads) {
    sum += RowLength(launch, Clamp(p.lengths[i], p.max_length));
  }
  sum = __reduce_add_sync(kAllLanes, sum);
  if (thread % 32 == 0) warp_sums[thread / 32] = sum;

  const int size = min(launch.part, count - at);
  const int pages = first_page < 0 || end_page < first_page ? 0 : end_page - first_page;
  const int* const page_indices = p.page_indices + (pages == 0 ? 0 : first_page);
  const int dummy = p.dummy_page * p.page_size * p.groups + group;
  const int num_runs = size > 0 ? ((size - 1) >> launch.run_bits) + 1 : 0;
  if (thread < launch.lead) runs[thread] = {0, 0};
  for (int i = thread; i <= num_runs; i += kThreads) {
    Run run = {0, 0};  // what is behind the last
    if (i < num_runs) {
      const int begin = at + (i << launch.run_bits);
      const int entry = static_cast<int>(launch.block.Quotient(begin));
      unsigned block = entry;
      if (length >= launch.sparse_length) block = i == thread ? named : table[entry];
      const unsigned long long place = static_cast<unsigned long long>(block) * p.block + (begin - entry * p.block);
      if (place < static_cast<unsigned long long>(length)) {
        const int position = static_cast<int>(place);
        run.count = min(length - position, run_length);
        if constexpr (F::kRuns == Runs::kSlots) {
          const int page_place = static_cast<int>(launch.page_size.Quotient(position));
          const int page = page_place < pages ? page_indices[page_place] : -1;
          if (static_cast<unsigned>(page) >= static_cast<unsigned>(p.num_pages)) run.count = 0;
          run.first = (page * p.page_size + position - page_place * p.page_size) * p.groups + group;
        } else {
          run.count = min(run.count, pages - position);
          run.first = position;
        }
      }
    }
    runs[launch.lead + i] = run;
  }
  __syncthreads();
  LetNextBegin();
  sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sums[warp];
  const int begin = sum * p.groups + group * count;
  if (at == 0 && thread == 0) {
    if (row == 0) p.indptr[0] = 0;
    p.indptr[row + 1] = begin + count;
    if (length != found && group == 0) {
      Report(p.reports, static_cast<int32_t>(Violation::Kind::kClamped), p.lengths_id, request, length, found);
    }
  }

  // Threads begin at a line's start, ahead of the part. A thread's indices keep their places in their runs from one
  // turn to the next; of a store's, `of_first` are of one run, the others of the next.
  int* to = p.indices + begin + at;
  int j = kVec * thread - static_cast<int>(reinterpret_cast<unsigned long long>(to) / sizeof(int) % kLine);
  to += j;
  const int led = j + (launch.lead << launch.run_bits);
  const int in_run = led & (run_length - 1);
  const int of_first = run_length - in_run;
  const Run* from = runs + (led >> launch.run_bits);
  const int runs_of_turn = kVec * kThreads >> launch.run_bits;
#pragma unroll 1
  for (; j < size; j += kBatch * kVec * kThreads) {
    int values[kBatch][kVec];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const bool some = u == 0 || j + u * kVec * kThreads < size;
      const Run first = some ? from[u * runs_of_turn] : Run{0, 0};
      Run next = first;
      if (kVec > 1 && some && of_first < kVec) {
        next = from[u * runs_of_turn + 1];
        next.first -= F::kRuns == Runs::kSlots ? run_length * p.groups : run_length;
        next.count += run_length;
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const Run run = {i < of_first ? first.first : next.first, i < of_first ? first.count : next.count};
        const bool exists = in_run + i < run.count;
        if constexpr (F::kRuns == Runs::kSlots) {
          values[u][i] = exists ? run.first + (in_run + i) * p.groups : dummy;
        } else {
          values[u][i] = exists ? page_indices[run.first + in_run + i] : -1;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int first_of_store = j + u * kVec * kThreads;
      int* const store = to + u * kVec * kThreads;
      if constexpr (F::kRuns == Runs::kPages) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const bool valid = static_cast<unsigned>(values[u][i]) < static_cast<unsigned>(p.num_pages);
          values[u][i] = valid ? values[u][i] * p.groups + group : dummy;
        }
      }
      if constexpr (kVec == 4) {
        if (first_of_store >= 0 && first_of_store + kVec <= size) {
          StoreTo<F>(reinterpret_cast<int4*>(store), int4{values[u][0], values[u][1], values[u][2], values[u][3]});
          continue;
        }
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (first_of_store + i >= 0 && first_of_store + i < size) StoreTo<F>(store + i, values[u][i]);
      }
    }
    to += kBatch * kVec * kThreads;
    from += kBatch * runs_of_turn;
  }
}

constexpr int RoundUp(int64_t value, int to) { return static_cast<int>((value + to - 1) / to * to); }

// The largest power of two that divides `value`.
constexpr int TwosOf(int value) { return value & -value; }

// Runs are `run_length` long at most, a power of two.
template <class F>
int LaunchCsr(CUstream_st* stream, const SparseToCsrParams& params, int run_length) {
  constexpr int kTurn = F::kVec * F::kThreads;
  run_length = std::min(run_length, kTurn);
  // A part is a whole number of turns, and so of runs. A block must find out much before it writes, so there are no
  // more parts than it takes to fill a device: an H200 was fastest with four blocks to a multiprocessor.
  const int64_t parts_of_row = std::max<int64_t>(kManyBlocks / params.rows, 1);
  int64_t part = std::max<int64_t>(params.row_bound / parts_of_row, kMinPart);
  part = RoundUp(std::min<int64_t>({part, F::kMaxPart, params.row_bound, int64_t{kMaxRuns} * run_length}), kTurn);
  const int parts = static_cast<int>((params.row_bound - 1) / part + 1);
  SparseToCsrLaunch launch = {
      .params = params,
      .groups = MakeDivider(params.groups),
      .block = MakeDivider(params.block),
      .page_size = MakeDivider(params.page_size),
      .parts = MakeDivider(parts),
      .sparse_length = static_cast<int>(
          std::min<int64_t>(std::max<int64_t>(params.dense_len, int64_t{params.topk} * params.block + 1), INT32_MAX)),
      .part = static_cast<int>(part),
      .run_bits = 0,
      .lead = (kLine - 1) / run_length + 1};
  while (1 << launch.run_bits < run_length) ++launch.run_bits;
  return LaunchDependent(stream, SparseToCsrKernel<F>,
                         dim3(static_cast<unsigned>(params.rows) * static_cast<unsigned>(parts)), dim3(F::kThreads),
                         sizeof(Run) * static_cast<size_t>(part / run_length + launch.lead + 1), launch);
}

}  // namespace

int SparseToCsrCuda(CUstream_st* stream, const SparseToCsrParams& params) {
  const bool many = int64_t{params.rows} * params.row_bound >= kManyIndices;
  const int run_length = TwosOf(std::gcd(params.block, params.page_size));
  if (run_length >= FewSlots::kVec) {
    return many ? LaunchCsr<ManySlots>(stream, params, run_length) : LaunchCsr<FewSlots>(stream, params, run_length);
  }
  if (params.page_size > 1) return LaunchCsr<AnySlots>(stream, params, run_length);
  const int block_length = TwosOf(params.block);
  return many || block_length < FewPages::kVec ? LaunchCsr<ManyPages>(stream, params, block_length)
                                               : LaunchCsr<FewPages>(stream, params, block_length);
}

}  // namespace pristine::attention
