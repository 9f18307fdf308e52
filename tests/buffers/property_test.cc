// Random managers, steps and pollution against a model that is written here, element by element, from the comments of
// buffer_spec.h. Prints its seed.
#include <algorithm>
#include <cstdlib>
#include <random>

#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

using Ints = std::vector<int32_t>;
const std::vector<Extent> kBuckets = {{1, 2}, {3, 6}, {7, 7}, {8, 16}};

struct Model {
  BufferSpec spec;
  Buffer<int32_t> buffer;
  Ints original;
  Ints live;
  Ints values;  // of the step
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int32_t In(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(engine_); }
  bool Chance(int percent) { return In(1, 100) <= percent; }

 private:
  std::mt19937 engine_;
};

int64_t CountOf(const Axis& axis, const Extent& extent, int64_t capacity) {
  if (axis.unit == Axis::Unit::kRequests) return int64_t{axis.per} * extent.requests;
  if (axis.unit == Axis::Unit::kRequestsPlusOne) return int64_t{axis.per} * extent.requests + 1;
  if (axis.unit == Axis::Unit::kTokens) return int64_t{axis.per} * extent.tokens;
  return capacity;
}

int32_t Lowest(const BufferSpec& spec) {
  if (spec.kind == Kind::kLength) return spec.contract.min_length;
  return spec.kind == Kind::kSlot && spec.contract.negative_ok ? -1 : 0;
}
int32_t Highest(const BufferSpec& spec) {
  return spec.kind == Kind::kLength || spec.kind == Kind::kIndptr ? spec.limit : spec.limit - 1;
}
bool Ruled(const BufferSpec& spec) { return spec.kind != Kind::kOpaque; }

Ints LegalValues(const BufferSpec& spec, int64_t count, Random& random) {
  Ints values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(Ruled(spec) ? random.In(Lowest(spec), Highest(spec)) : random.In(-1000, 1000));
  }
  if (spec.kind == Kind::kIndptr) {
    std::sort(values.begin(), values.end());
    if (!values.empty()) values[0] = 0;
  }
  return values;
}

BufferSpec RandomSpec(int number, Random& random) {
  BufferSpec spec;
  spec.name = "buffer " + std::to_string(number);
  spec.role = static_cast<Role>(random.In(0, 2));
  constexpr Kind kKinds[] = {Kind::kIndptr, Kind::kLength,   Kind::kPageTable,
                             Kind::kSlot,   Kind::kPosition, Kind::kOpaque};
  spec.kind = kKinds[random.In(0, 5)];
  const int32_t per = random.In(1, 3);
  const Axis axes[] = {Axis::Fixed(), Axis::Requests(per), Axis::RequestsPlusOne(per), Axis::Tokens(per),
                       Axis::Pages()};
  spec.axis = axes[random.In(0, 4)];
  spec.limit = random.In(50, 500);
  spec.dummy = random.In(0, 40);
  spec.contract.min_length = random.In(0, 2);
  spec.contract.negative_ok = random.Chance(60);
  spec.contract.reads_tail = random.Chance(20);
  if (random.Chance(20)) spec.only_bucket = kBuckets[static_cast<size_t>(random.In(0, 3))];
  return spec;
}

int64_t RandomCapacity(const Axis& axis, Random& random) {
  const int64_t units = random.In(16, 24);
  if (axis.unit == Axis::Unit::kRequestsPlusOne) return axis.per * units + 1;
  if (axis.unit == Axis::Unit::kFixed || axis.unit == Axis::Unit::kPages) {
    return random.Chance(20) ? random.In(4000, 9000) : random.In(1, 40);  // one tile holds 4096
  }
  return axis.per * units;
}

// What the live array holds after the prologue of `bucket` for `extent`.
void Predict(Model& model, const Extent& bucket, const Extent& extent, bool harmless) {
  const BufferSpec& spec = model.spec;
  const int64_t capacity = static_cast<int64_t>(model.live.size());
  if (spec.only_bucket.has_value() && *spec.only_bucket != bucket) return;
  int64_t real = CountOf(spec.axis, extent, capacity);
  int64_t end = CountOf(spec.axis, bucket, capacity);
  if (spec.contract.reads_tail || spec.axis.unit == Axis::Unit::kPages) end = capacity;
  if (spec.role == Role::kRefilled) {
    real = static_cast<int64_t>(model.values.size());
    std::copy(model.values.begin(), model.values.end(), model.live.begin());
  } else {
    model.live = model.original;
    if (spec.role == Role::kConstant) return;
  }
  int32_t pad = 0;
  if (spec.kind == Kind::kLength) pad = spec.contract.min_length;
  if (spec.kind == Kind::kPageTable) pad = spec.dummy;
  if (spec.kind == Kind::kSlot) pad = spec.contract.negative_ok ? -1 : spec.dummy;
  if (spec.kind == Kind::kIndptr && real > 0 && !harmless) pad = model.live[static_cast<size_t>(real - 1)];
  for (int64_t i = harmless ? 0 : real; i < end; ++i) model.live[static_cast<size_t>(i)] = pad;
}

template <class BackendT>
class PropertyTest : public BufferTest<BackendT> {
 protected:
  void Run(uint32_t seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    ManagerOptions options;
    options.check = ManagerOptions::Check::kAlways;
    options.staging_slots = random.In(2, 5);
    // Each step goes the one way or the other by its size.
    options.parameter_bytes = static_cast<size_t>(random.In(0, 3)) * ManagerOptions::kMaxParameterBytes / 3;
    this->MakeManager(options);
    std::vector<Model> models;
    const int count = random.In(1, 30);
    for (int i = 0; i < count; ++i) {
      Model model;
      model.spec = RandomSpec(i, random);
      model.original = LegalValues(model.spec, RandomCapacity(model.spec.axis, random), random);
      if (model.spec.kind == Kind::kSlot) {
        std::fill(model.original.begin(), model.original.end(),
                  model.spec.contract.negative_ok ? -1 : model.spec.dummy);
      }
      model.live = model.original;
      if (random.Chance(25)) {
        const DeviceSpan<int32_t> memory = this->EngineMemory(Ints(model.original.size() + 1, 77));
        const DeviceSpan<int32_t> span = memory.Sub(1, model.original.size());  // not aligned to more than an element
        absl::StatusOr<Buffer<int32_t>> buffer =
            this->manager().template Adopt<int32_t>(model.spec, span, model.original);
        ASSERT_OK(buffer);
        model.buffer = *buffer;
      } else {
        model.buffer = this->Register(model.spec, model.original);
      }
      models.push_back(model);
    }
    this->Capture(kBuckets, kEmptyBody, 0);
    for (int step = 0; step < 20; ++step) RunStep(models, random);
    ASSERT_OK_AND_ASSIGN(const std::vector<Violation> found, this->manager().Verify(*this->stream()));
    EXPECT_EQ(Describe(found), "");
    this->runner_.reset();
    this->manager_.reset();
    this->memory_.clear();
  }

  void RunStep(std::vector<Model>& models, Random& random) {
    const Extent bucket = kBuckets[static_cast<size_t>(random.In(0, 3))];
    const Extent extent{random.In(0, bucket.requests), random.In(0, bucket.tokens)};
    SCOPED_TRACE("bucket " + bucket.ToString() + " extent " + extent.ToString());
    ASSERT_OK(this->manager().BeginStep(bucket, extent));
    size_t broken = 0, polluted = 0;
    for (Model& model : models) {
      const BufferSpec& spec = model.spec;
      if (spec.only_bucket.has_value() && *spec.only_bucket != bucket) continue;
      const int64_t capacity = static_cast<int64_t>(model.live.size());
      if (spec.role == Role::kRefilled) {
        int64_t real = CountOf(spec.axis, extent, capacity);
        if (spec.axis.unit == Axis::Unit::kPages) real = random.In(0, static_cast<int32_t>(capacity));
        model.values = LegalValues(spec, real, random);
        if (Ruled(spec) && real > 0 && random.Chance(2)) {
          ++broken;
          const int32_t illegal = random.Chance(50) ? Lowest(spec) - 1 : Highest(spec) + 1;
          model.values[static_cast<size_t>(spec.kind == Kind::kIndptr ? real - 1 : random.In(0, int32_t(real) - 1))] =
              illegal;
        }
        ASSERT_OK(this->Refill(model.buffer, model.values));
      } else if (random.Chance(10)) {
        if (spec.role == Role::kConstant) ++polluted;
        const size_t at = static_cast<size_t>(random.In(0, static_cast<int32_t>(capacity) - 1));
        const std::byte* const old = reinterpret_cast<const std::byte*>(&model.original[at]);
        this->Overwrite(AsWritableBytes(model.buffer.live).address() + at * 4, *old ^ std::byte{0x55});
      }
    }
    for (Model& model : models) Predict(model, bucket, extent, broken > 0);
    ASSERT_OK(this->Replay(bucket, extent));
    for (const Model& model : models) {
      ASSERT_EQ(this->Read(model.buffer), model.live)
          << model.spec.name << ", a " << ToString(model.spec.role) << " " << ToString(model.spec.kind);
    }
    const std::vector<Violation> found = this->Poll();
    const auto count = [&found](Violation::Kind kind) {
      return static_cast<size_t>(
          std::count_if(found.begin(), found.end(), [kind](const Violation& v) { return v.kind == kind; }));
    };
    EXPECT_EQ(count(Violation::Kind::kInvariant), broken) << Describe(found);
    EXPECT_EQ(count(Violation::Kind::kPolluted), polluted) << Describe(found);
    EXPECT_EQ(found.size(), broken + polluted) << Describe(found);
  }
};
TYPED_TEST_SUITE(PropertyTest, AllBackends, BackendNames);

TYPED_TEST(PropertyTest, EveryPrologueDoesWhatTheCommentsSay) {
  const char* const given = std::getenv("PRISTINE_SEED");
  const uint32_t seed = given != nullptr ? static_cast<uint32_t>(std::strtoul(given, nullptr, 10)) : 20240601;
  std::printf("PRISTINE_SEED=%u\n", seed);
  for (uint32_t i = 0; i < 12 && !this->HasFailure(); ++i) this->Run(seed + i);
}

}  // namespace
}  // namespace pristine::testing
