// What a registered buffer is: its role, what its numbers mean, and what they are counted in. From these follow
// restore, padding, validation and the harmless state; nobody writes such rules by hand. docs/roles_and_padding.md has
// a row for each array that a real engine has.
#ifndef PRISTINE_BUFFERS_BUFFER_SPEC_H_
#define PRISTINE_BUFFERS_BUFFER_SPEC_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "pristine/graph_runtime/extent.h"

namespace pristine {

enum class Role {
  kConstant,  // equals its original at every replay. A write is pollution: reported, healed and counted
  kRestored,  // the graph may write it; the whole array is copied back from its original before each capture and replay
  kRefilled,  // new values every step; a replay without Refill or Keep is refused
  kScratch,   // no promise; filled with 0xFF (NaN) before each replay when ManagerOptions::poison_scratch is set
};

// What the numbers are. All but kOpaque and kMask are int32.
//
//   kind        live values must                     padded tail holds                    harmless value
//   kIndptr     start at 0, not decrease,            the value at the last real index     flat: 0
//               last <= limit
//   kLength     be in [min_length, limit]            contract.min_length                  contract.min_length
//   kPageTable  be in [0, limit)                     dummy                                dummy
//   kSlot       be in [-1, limit); if !negative_ok   -1, or dummy if !negative_ok         the same
//               in [0, limit)
//   kPosition   be in [0, limit)                     0                                    0
//   kMask       -                                    0 bytes                              0 bytes
//   kOpaque     -                                    0 bytes                              0 bytes
//
// Originals obey the same rules; those of a kSlot are all its padded value, so that warm-ups write nothing. Tails of
// kRestored buffers are padded by the prologue that restores them: with ManagerOptions::Restore::kStream or kOff they
// hold what the caller put there.
enum class Kind { kIndptr, kLength, kPageTable, kSlot, kPosition, kMask, kOpaque };

// What elements are counted in. For a step of real extent `e` in a bucket `b`: elements [0, Count(e)) are real,
// [Count(e), Count(b)) are the padded tail, and the rest is not read by graphs of that bucket.
struct Axis {
  enum class Unit { kFixed, kRequests, kRequestsPlusOne, kTokens, kPages } unit = Unit::kFixed;
  int32_t per = 1;  // elements per unit: groups, or groups * columns

  static Axis Fixed() { return {Unit::kFixed, 1}; }                               // the whole array is real
  static Axis Requests(int32_t groups = 1) { return {Unit::kRequests, groups}; }  // groups * requests
  static Axis RequestsPlusOne(int32_t groups = 1) { return {Unit::kRequestsPlusOne, groups}; }  // groups * requests + 1
  static Axis Tokens(int32_t per = 1) { return {Unit::kTokens, per}; }                          // per * tokens
  // As many as the refill gives; the tail goes on to the end of the array.
  static Axis Pages() { return {Unit::kPages, 1}; }
  // groups * requests rows of `columns`
  static Axis Rows(int32_t columns, int32_t groups = 1) {
    const int64_t per = int64_t{groups} * columns;
    const bool fits = groups > 0 && columns > 0 && per <= std::numeric_limits<int32_t>::max();
    return {Unit::kRequests, fits ? static_cast<int32_t>(per) : 0};  // Register refuses 0
  }

  // Elements that belong to `extent`; for kFixed and kPages `capacity`.
  int64_t Count(const Extent& extent, int64_t capacity) const {
    switch (unit) {
      case Unit::kRequests:
        return int64_t{per} * extent.requests;
      case Unit::kRequestsPlusOne:
        return int64_t{per} * extent.requests + 1;
      case Unit::kTokens:
        return int64_t{per} * extent.tokens;
      case Unit::kFixed:
      case Unit::kPages:
        break;
    }
    return capacity;
  }
};

// What the wrapper that reads a buffer can bear in padded rows. Zero is not a universal pad value: a kernel that
// computes block counts from length - 1 needs min_length 1 (vllm#35969), one that indexes with slots cannot take -1.
struct WrapperContract {
  int32_t min_length = 0;   // smallest legal kLength, of real rows too
  bool negative_ok = true;  // slot -1 is skipped; otherwise padded slots are `dummy`
  bool reads_tail = false;  // reads past the bucket, to the end of the array: then the tail is padded that far
};

struct BufferSpec {
  std::string name;  // unique in the manager; appears in every message
  Role role = Role::kConstant;
  Kind kind = Kind::kOpaque;
  Axis axis = Axis::Fixed();
  int32_t limit = std::numeric_limits<int32_t>::max();  // see Kind
  int32_t dummy =
      0;  // the page (or slot) that padding points at: declared by the engine, kept finite, never handed out
  WrapperContract contract = {};
  // Only graphs of this bucket use the buffer (a plan's workspace); others neither ask for its refill nor touch it.
  std::optional<Extent> only_bucket = std::nullopt;
  // kRefilled only: takes BufferManager::Update and MoveRow too, so that a step sends what changed. Costs a second copy
  // on the device, the shadow, and one on the host. For all kinds but kIndptr, and all axes but Pages.
  bool deltas = false;
  // Ids of the buffers that this one's values are computed from. A replay is refused if one of them was refilled later.
  std::vector<int> derived_from = {};
};

const char* ToString(Role role);
const char* ToString(Kind kind);

}  // namespace pristine

#endif  // PRISTINE_BUFFERS_BUFFER_SPEC_H_
