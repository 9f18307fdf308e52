// How kernels report to the host: a ring in host-visible memory that stays readable after the device context has died.
// Kernels take a ReportRing by value and call Report. No Abseil, no CUDA headers.
#ifndef PRISTINE_BUFFERS_REPORT_H_
#define PRISTINE_BUFFERS_REPORT_H_

#include <atomic>
#include <cstdint>

namespace pristine {

struct ReportRecord {
  uint64_t sequence = 0;  // 1 + its place in the order of reports; written last
  int64_t index = 0;
  int64_t expected = 0;
  int64_t actual = 0;
  uint64_t replay = 0;
  int32_t kind = 0;    // Violation::Kind
  int32_t buffer = 0;  // id in the manager
  int32_t graph = 0;   // id in the manager
  int32_t unused = 0;
};

struct ReportRing {
  ReportRecord* records = nullptr;   // [capacity], host-visible
  uint64_t* count = nullptr;         // device memory: reports so far
  const uint64_t* replay = nullptr;  // device memory: the step that runs
  uint32_t capacity = 0;
  int32_t graph = 0;
};

#ifdef __CUDACC__
__host__ __device__
#endif
    inline void
    Report(const ReportRing& ring, int32_t kind, int32_t buffer, int64_t index, int64_t expected, int64_t actual) {
#ifdef __CUDA_ARCH__
  const uint64_t place = atomicAdd(reinterpret_cast<unsigned long long*>(ring.count), 1ULL);
#else
  const uint64_t place = std::atomic_ref<uint64_t>(*ring.count).fetch_add(1);
#endif
  ReportRecord& record = ring.records[place % ring.capacity];
  // The sequence is 0 while the record changes, so that a reader who is overtaken notices.
#ifdef __CUDA_ARCH__
  volatile uint64_t& sequence = record.sequence;
  sequence = 0;
  __threadfence_system();
  record.index = index;
  record.expected = expected;
  record.actual = actual;
  record.replay = *ring.replay;
  record.kind = kind;
  record.buffer = buffer;
  record.graph = ring.graph;
  __threadfence_system();
  sequence = place + 1;
#else
  const auto store = [](auto& field, auto value) { std::atomic_ref(field).store(value, std::memory_order_release); };
  store(record.sequence, uint64_t{0});
  store(record.index, index);
  store(record.expected, expected);
  store(record.actual, actual);
  store(record.replay, *ring.replay);
  store(record.kind, kind);
  store(record.buffer, buffer);
  store(record.graph, ring.graph);
  store(record.sequence, place + 1);
#endif
}

}  // namespace pristine

#endif  // PRISTINE_BUFFERS_REPORT_H_
