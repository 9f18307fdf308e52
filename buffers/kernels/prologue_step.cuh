// Which step a launch of the prologue takes, as each thread works it out, and what parts of a buffer it means.
#ifndef PRISTINE_BUFFERS_KERNELS_PROLOGUE_STEP_CUH_
#define PRISTINE_BUFFERS_KERNELS_PROLOGUE_STEP_CUH_

#include <cstdint>

#include "buffers/kernels/prologue.h"
#include "pristine/buffers/buffer_spec.h"
#include "pristine/buffers/violation.h"

namespace pristine::buffers {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;  // that the kernels leave room for; without it ptxas spills where it need not

// What every thread works out for itself, alike: only the last block to finish changes what it reads.
struct Step {
  uint64_t newest;
  uint64_t consumed;
  uint64_t replay;           // as reports name it
  const SlotEntry* entries;  // null: nothing to place
  const std::byte* values;
  const SlotHeader* header;  // null: nobody armed it
  int32_t requests, tokens;
  bool check;
  bool not_armed, armed_twice, wrong_bucket;
};

// What the blocks that are done have found, in one number, so that the last of them knows after its one atomic: how
// many blocks, how many of them found something wrong, how many a changed kRestored buffer.
constexpr uint64_t kTurnMask = (uint64_t{1} << kTurnBits) - 1;
constexpr int kTicketBits = 20;
constexpr uint64_t kTicketMask = (uint64_t{1} << kTicketBits) - 1;
constexpr uint64_t kBlockDone = 1;
constexpr uint64_t kBlockFlawed = uint64_t{1} << kTicketBits;
constexpr uint64_t kBlockChanged = uint64_t{1} << (2 * kTicketBits);

// What one thread found in its block's tiles.
enum Found : int { kNothing = 0, kFlawed = 1, kChanged = 2 };

__device__ int32_t KindOf(Violation::Kind kind) { return static_cast<int32_t>(kind); }

// What a step's header says.
struct Armed {
  uint64_t sequence;
  int32_t bucket_requests, bucket_tokens, requests, tokens;
  uint32_t check;
  uint32_t values;
};

__device__ Armed ReadHeader(const SlotHeader& header) {
  return {header.sequence,      header.bucket.requests, header.bucket.tokens, header.extent.requests,
          header.extent.tokens, header.check,           header.values};
}

__device__ Step TakeStep(const PrologueParams& p, const SlotHeader* header, const std::byte* image, const Armed& armed,
                         uint64_t consumed) {
  Step step = {};
  step.requests = p.bucket.requests;
  step.tokens = p.bucket.tokens;
  step.newest = armed.sequence;
  step.consumed = consumed;
  step.not_armed = step.newest <= consumed;
  step.replay = step.not_armed ? consumed : step.newest;
  if (step.not_armed) return step;
  step.header = header;
  step.armed_twice = step.newest > consumed + 1;
  step.wrong_bucket = armed.bucket_requests != p.bucket.requests || armed.bucket_tokens != p.bucket.tokens;
  if (step.wrong_bucket) return step;
  step.requests = armed.requests;
  step.tokens = armed.tokens;
  step.check = armed.check != 0;
  step.entries = reinterpret_cast<const SlotEntry*>(image + kSlotTable);
  step.values = image + armed.values;
  return step;
}

// The step of a captured replay is `carried`, or that of the newest slot if that is null. By all threads.
__device__ Step FindStep(const PrologueParams& p, const std::byte* carried, uint64_t consumed) {
  if (p.mode != PrologueMode::kReplay) {
    Step step = {};
    step.requests = p.bucket.requests;
    step.tokens = p.bucket.tokens;
    step.consumed = consumed;
    return step;
  }
  const auto image = [&](int64_t slot) { return p.slots + slot * p.slot_stride; };
  if (carried != nullptr) {
    const auto& header = *reinterpret_cast<const SlotHeader*>(carried);
    return TakeStep(p, &header, header.slot < 0 ? carried : image(header.slot), ReadHeader(header), consumed);
  }
  __shared__ Armed slots[kMaxSlots];  // each loaded by a thread of its own: one round trip to memory
  if (threadIdx.x < p.num_slots) {
    slots[threadIdx.x] = ReadHeader(*reinterpret_cast<const SlotHeader*>(image(threadIdx.x)));
  }
  __syncthreads();
  uint32_t newest = 0;
  for (uint32_t i = 1; i < p.num_slots; ++i) {
    if (slots[i].sequence > slots[newest].sequence) newest = i;
  }
  return TakeStep(p, reinterpret_cast<const SlotHeader*>(image(newest)), image(newest), slots[newest], consumed);
}

__device__ bool Covers(const PrologueParams& p, const BufferRecord& record) {
  if (p.bucket.requests < 0 || record.only_requests < 0) return true;
  return record.only_requests == p.bucket.requests && record.only_tokens == p.bucket.tokens;
}

__device__ int64_t Count(const BufferRecord& record, int32_t requests, int32_t tokens) {
  const Axis::Unit unit = static_cast<Axis::Unit>(record.unit);
  if (unit == Axis::Unit::kFixed || unit == Axis::Unit::kPages) return record.capacity;
  const int64_t count = int64_t{record.per} * (unit == Axis::Unit::kTokens ? tokens : requests) +
                        (unit == Axis::Unit::kRequestsPlusOne ? 1 : 0);
  return count < 0 ? 0 : count > record.capacity ? record.capacity : count;
}

__device__ int64_t TailEnd(const PrologueParams& p, const BufferRecord& record) {
  return record.tail_to_end ? record.capacity : Count(record, p.bucket.requests, p.bucket.tokens);
}

}  // namespace
}  // namespace pristine::buffers

#endif  // PRISTINE_BUFFERS_KERNELS_PROLOGUE_STEP_CUH_
