#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"
#include "tests/fuzz/fuzz_targets.h"

namespace pristine::testing {
namespace {

constexpr int32_t kRequests = 4;
constexpr int32_t kLimit = 100;
const Extent kBuckets[] = {{2, 2}, {kRequests, kRequests}};

// The input, byte by byte; zeros once it has ended.
class Program {
 public:
  Program(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool ended() const { return at_ >= size_; }
  uint8_t Byte() { return ended() ? 0 : data_[at_++]; }
  // Mostly near the limits, where the rules are.
  int32_t Value() {
    const uint8_t byte = Byte();
    if (byte >= 0xfc) return std::array<int32_t, 4>{INT32_MIN, INT32_MAX, -2, kLimit + 1}[byte - 0xfc];
    return static_cast<int32_t>(byte) - 100;
  }

 private:
  const uint8_t* const data_;
  const size_t size_;
  size_t at_ = 0;
};

void CheckStatus(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kResourceExhausted:
      PRISTINE_FUZZ_CHECK(!status.message().empty(), "a refusal says why");
      return;
    default:
      PRISTINE_FUZZ_CHECK(false, status.ToString().c_str());
  }
}
void CheckOk(const absl::Status& status) { PRISTINE_FUZZ_CHECK(status.ok(), status.ToString().c_str()); }

struct World {
  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> stream;
  std::unique_ptr<BufferManager> manager;
  std::vector<Buffer<int32_t>> buffers;
  std::vector<BufferSpec> specs;

  World() {
    auto made = CreateHostDevice({});
    CheckOk(made.status());
    device = *std::move(made);
    auto queue = device->CreateStream();
    CheckOk(queue.status());
    stream = *std::move(queue);
    ManagerOptions options;
    options.check = ManagerOptions::Check::kAlways;
    options.late_refill_bytes = 0;
    auto created = BufferManager::Create(*device, options);
    CheckOk(created.status());
    manager = *std::move(created);
    Add("lengths", Kind::kLength, Axis::Requests(), kRequests, 1);
    Add("indptr", Kind::kIndptr, Axis::RequestsPlusOne(2), 2 * kRequests + 1, 0);
    Add("pages", Kind::kPageTable, Axis::Pages(), 16, 0);
    Add("slots", Kind::kSlot, Axis::Tokens(), kRequests, -1);
    Add("positions", Kind::kPosition, Axis::Tokens(2), 2 * kRequests, 0);
    Add("table", Kind::kPageTable, Axis::Rows(3), 3 * kRequests, 0, true);
    CheckOk(manager->Seal());
  }

  void Add(const char* name, Kind kind, Axis axis, size_t size, int32_t original, bool deltas = false) {
    BufferSpec spec;
    spec.name = name;
    spec.role = Role::kRefilled;
    spec.kind = kind;
    spec.axis = axis;
    spec.limit = kLimit;
    spec.deltas = deltas;
    auto buffer = manager->Register<int32_t>(spec, std::vector<int32_t>(size, original));
    CheckOk(buffer.status());
    buffers.push_back(*buffer);
    specs.push_back(spec);
  }

  // Whatever was refilled: what a body would read obeys the rule of its kind, over the whole bucket.
  void CheckLive(const Extent& bucket) {
    for (size_t i = 0; i < buffers.size(); ++i) {
      const DeviceSpan<int32_t> live = buffers[i].live;
      std::vector<int32_t> values(live.size());
      CheckOk(
          stream->CopyToHost(absl::MakeSpan(reinterpret_cast<std::byte*>(values.data()), live.bytes()), AsBytes(live)));
      CheckOk(stream->Synchronize());
      const Kind kind = specs[i].kind;
      const int64_t count = specs[i].axis.Count(bucket, static_cast<int64_t>(values.size()));
      for (int64_t at = 0; at < count; ++at) {
        const int32_t value = values[static_cast<size_t>(at)];
        const int32_t least = kind == Kind::kSlot ? -1 : 0;
        const int32_t most = kind == Kind::kLength || kind == Kind::kIndptr ? kLimit : kLimit - 1;
        PRISTINE_FUZZ_CHECK(value >= least && value <= most, specs[i].name.c_str());
        if (kind != Kind::kIndptr) continue;
        PRISTINE_FUZZ_CHECK(at == 0 ? value == 0 : value >= values[static_cast<size_t>(at) - 1], "indptr");
      }
    }
  }
};

}  // namespace

void FuzzRefill(const uint8_t* data, size_t size) {
  Program program(data, std::min<size_t>(size, 512));
  World world;
  BufferManager& manager = *world.manager;
  std::vector<int32_t> values;
  while (!program.ended()) {
    const uint8_t op = program.Byte();
    const Extent bucket = kBuckets[op >> 4 & 1];
    switch (op % 4) {
      case 0: {
        const int32_t requests = static_cast<int32_t>(program.Byte()) % 7 - 1;
        CheckStatus(manager.BeginStep(bucket, {requests, requests}));
        // Most programs refill everything with something of the right size, so that replays come about.
        if ((op & 0x40) != 0) break;
        for (size_t i = 0; i < world.buffers.size(); ++i) {
          const int64_t capacity = static_cast<int64_t>(world.buffers[i].live.size());
          const int64_t count = std::clamp<int64_t>(world.specs[i].axis.Count({requests, requests}, 16), 0, capacity);
          values.assign(static_cast<size_t>(count), 0);
          if ((op & 0x80) != 0) std::generate(values.begin(), values.end(), [&] { return program.Value(); });
          CheckStatus(manager.Refill<int32_t>(world.buffers[i], values));
        }
        break;
      }
      case 1: {
        Buffer<int32_t> buffer = world.buffers[op / 4 % world.buffers.size()];
        if ((op & 0x80) != 0) buffer.id = program.Value();
        values.resize(program.Byte() % 20);
        std::generate(values.begin(), values.end(), [&] { return program.Value(); });
        CheckStatus(manager.Refill<int32_t>(buffer, values));
        break;
      }
      case 2: {
        const Buffer<int32_t>& buffer = world.buffers[op / 4 % world.buffers.size()];
        if ((op & 0xC0) == 0xC0) {
          const int64_t from = program.Byte() % 8 - 1;
          CheckStatus(manager.MoveRow(buffer, from, program.Byte() % 8 - 1));
        } else if ((op & 0xC0) != 0) {
          const std::vector<BufferManager::Range> ranges = {{program.Byte() % 20 - 1, program.Byte() % 8 - 1},
                                                            {program.Byte() % 20 - 1, program.Byte() % 8 - 1}};
          values.resize(static_cast<size_t>(std::max<int64_t>(ranges[0].count + ranges[1].count, 0)));
          std::generate(values.begin(), values.end(), [&] { return program.Value(); });
          CheckStatus(manager.Update<int32_t>(buffer, ranges, values));
        } else {
          CheckStatus(manager.Keep(buffer));
        }
        break;
      }
      case 3: {
        const int32_t requests = static_cast<int32_t>(program.Byte()) % 7 - 1;
        const absl::Status armed = manager.BeforeReplay(*world.stream, bucket, {requests, requests});
        CheckStatus(armed);
        if (!armed.ok()) break;
        CheckOk(manager.RecordPrologue(*world.stream, bucket));
        world.CheckLive(bucket);
        std::array<Violation, 32> violations;
        const size_t count = manager.Poll(absl::MakeSpan(violations));
        for (size_t i = 0; i < count; ++i) {
          PRISTINE_FUZZ_CHECK(violations[i].kind == Violation::Kind::kInvariant, violations[i].ToString().c_str());
        }
        break;
      }
    }
  }
  const absl::StatusOr<std::vector<Violation>> verified = manager.Verify(*world.stream);
  CheckOk(verified.status());
  PRISTINE_FUZZ_CHECK(verified->empty(), "Verify is clean: a refill never damages memory");
}

}  // namespace pristine::testing
