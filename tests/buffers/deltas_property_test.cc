// Random Refill, Update, MoveRow, Keep, dropped steps, refused replays and launches, and buckets, against a plain table
// that is kept here. Prints its seed.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>

#include "tests/buffers/buffer_fixture.h"

namespace pristine::testing {
namespace {

const std::vector<Extent> kBuckets = {{2, 3}, {5, 5}, {8, 16}};
constexpr int32_t kRequests = 9, kTokens = 17;  // of the arrays: more than the largest bucket's
constexpr int32_t kLimit = 200;

// Its elements lie across the tiles of the kernel.
struct Odd {
  int32_t words[3];
  friend bool operator==(const Odd&, const Odd&) = default;
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int32_t In(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(engine_); }
  bool Chance(int percent) { return In(1, 100) <= percent; }
  size_t At(size_t size) { return static_cast<size_t>(In(0, static_cast<int32_t>(size) - 1)); }

 private:
  std::mt19937 engine_;
};

// A buffer with deltas and what it should hold. T: int32_t or Odd.
template <class T>
struct Table {
  BufferSpec spec;
  Buffer<T> buffer;
  std::vector<T> original, table, live;
  T pad{};
  Extent given{-1, -1};  // extent of the last values
  bool broken = false;   // holds an illegal value
  DeviceSpan<T> log;     // what `live` was after each step of a batch
  std::vector<std::vector<T>> expected;

  int64_t Count(const Extent& extent) const { return spec.axis.Count(extent, static_cast<int64_t>(table.size())); }
  static T Value(int32_t number) {
    if constexpr (std::is_same_v<T, int32_t>) {
      return number;
    } else {
      return {{number, number + 1, -number}};
    }
  }
  std::vector<T> Values(int64_t count, Random& random) const {
    std::vector<T> values;
    const int32_t low = spec.kind == Kind::kLength ? 1 : 0;
    for (int64_t i = 0; i < count; ++i) values.push_back(Value(random.In(low, kLimit - 1)));
    return values;
  }
  void Store(int64_t first, const std::vector<T>& values) {
    std::copy(values.begin(), values.end(), table.begin() + first);
  }
  // The manager took the step of `extent`.
  void Armed(const Extent& extent) { std::fill(table.begin() + Count(extent), table.end(), pad); }
  void Placed(const Extent& bucket, const Extent& extent, bool harmless) {
    const int64_t real = harmless ? 0 : Count(extent);
    std::copy(table.begin(), table.begin() + real, live.begin());
    const int64_t end = spec.contract.reads_tail ? static_cast<int64_t>(live.size()) : Count(bucket);
    std::fill(live.begin() + real, live.begin() + std::max(real, end), pad);
  }
};

template <class BackendT>
class DeltasPropertyTest : public BufferTest<BackendT> {
 protected:
  static constexpr int kBatch = 4;

  void Run(uint32_t seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    ManagerOptions options;
    options.staging_slots = random.In(2, 5);
    options.parameter_bytes = static_cast<size_t>(random.In(0, 3)) * ManagerOptions::kMaxParameterBytes / 3;
    this->MakeManager(options);
    BufferManager& manager = this->manager();
    std::vector<Table<int32_t>> tables;
    std::vector<Table<Odd>> odd;
    for (int i = random.In(1, 3); i > 0; --i) AddTable(tables, random);
    if (random.Chance(50)) AddTable(odd, random);
    const auto other =
        this->Register(Spec("other", Role::kRefilled, Kind::kLength, Axis::Requests()), Ints(kRequests, 1));
    RefusingHook refuser;
    RunnerOptions runner;
    runner.buckets = kBuckets;
    runner.warmups = 1;
    ASSERT_OK_AND_ASSIGN(this->runner_, GraphRunner::Create(runner, kEmptyBody));
    ASSERT_OK(this->runner_->AddHook(manager));
    ASSERT_OK(this->runner_->AddHook(refuser));
    ASSERT_OK(this->runner_->CaptureAll(*this->stream()));
    if (random.Chance(30)) {  // a chunk of its own, which each bucket's graph takes from its next capture on
      AddTable(tables, random);
      for (const Extent& bucket : kBuckets) ASSERT_OK(this->runner_->Recapture(*this->stream(), bucket));
    }

    int replayed = 0, broken = 0;
    for (int step = 0; step < 120; ++step) {
      if (random.Chance(4)) {
        ASSERT_OK(this->runner_->Recapture(*this->stream(), kBuckets[random.At(3)]));
        ForAll(tables, odd, [](auto& table) { table.live = table.original; });
      }
      const Extent bucket = kBuckets[random.At(3)];
      const Extent extent{random.In(0, bucket.requests), random.In(0, bucket.tokens)};
      ASSERT_OK(manager.WaitForSlot());
      ASSERT_OK(manager.BeginStep(bucket, extent));
      ForAll(tables, odd, [&](auto& table) { Give(table, extent, random); });
      if (this->HasFatalFailure()) return;
      if (random.Chance(12)) continue;  // dropped
      if (random.Chance(12)) {
        EXPECT_STATUS(this->runner_->Replay(*this->stream(), bucket, extent), kFailedPrecondition, "other");
        if (random.Chance(50)) continue;
      }
      ASSERT_OK(this->Refill(other, Ints(static_cast<size_t>(extent.requests), 2)));
      refuser.refuse = random.Chance(10);
      const absl::Status status = this->runner_->Replay(*this->stream(), bucket, extent);
      ForAll(tables, odd, [&](auto& table) { table.Armed(extent); });
      if (refuser.refuse) {
        EXPECT_STATUS(status, kUnavailable, "not now");
        continue;
      }
      ASSERT_OK(status);
      bool harmless = false;
      ForAll(tables, odd, [&](auto& table) { harmless |= IsBroken(table, extent); });
      broken += harmless ? 1 : 0;
      ForAll(tables, odd, [&](auto& table) {
        table.Placed(bucket, extent, harmless);
        Log(table);
      });
      if (++replayed % kBatch == 0) CompareLogs(tables, odd);
      if (this->HasFatalFailure()) return;
      if (random.Chance(10)) {
        ASSERT_OK_AND_ASSIGN(const std::vector<Violation> found, manager.Verify(*this->stream()));
        for (const Violation& violation : found) {
          ASSERT_EQ(violation.kind, Violation::Kind::kInvariant) << Describe(found);
        }
      }
    }
    CompareLogs(tables, odd);
    EXPECT_GT(replayed, 40);
    EXPECT_EQ(manager.stats().neutralised, broken);
    this->runner_.reset();
    this->manager_.reset();
    this->memory_.clear();
  }

 private:
  using Ints = std::vector<int32_t>;

  template <class Body>
  static void ForAll(std::vector<Table<int32_t>>& tables, std::vector<Table<Odd>>& odd, Body body) {
    for (auto& table : tables) body(table);
    for (auto& table : odd) body(table);
  }

  template <class T>
  void AddTable(std::vector<Table<T>>& tables, Random& random) {
    constexpr bool kOdd = !std::is_same_v<T, int32_t>;
    Table<T> table;
    constexpr Kind kKinds[] = {Kind::kPageTable, Kind::kLength, Kind::kPosition, Kind::kOpaque};
    table.spec = Spec((kOdd ? "odd " : "table ") + std::to_string(++names_), Role::kRefilled,
                      kOdd ? Kind::kOpaque : kKinds[random.At(4)]);
    // Some are larger than a tile of the kernel.
    const int32_t columns = random.Chance(30) ? random.In(500, 700) : random.In(1, 7);
    const int shape = random.In(0, 2);
    table.spec.axis = shape == 0 ? Axis::Rows(columns) : shape == 1 ? Axis::Tokens(columns) : Axis::Fixed();
    table.spec.limit = kLimit;
    table.spec.dummy = 7;
    table.spec.contract.min_length = table.spec.kind == Kind::kLength ? 1 : 0;
    table.spec.contract.reads_tail = random.Chance(20);
    table.spec.deltas = true;
    const int32_t rows = shape == 0 ? kRequests : shape == 1 ? kTokens : 1;
    const size_t size = static_cast<size_t>(rows) * static_cast<size_t>(columns);
    if (table.spec.kind == Kind::kPageTable) table.pad = Table<T>::Value(7);
    if (table.spec.kind == Kind::kLength) table.pad = Table<T>::Value(1);
    table.original = std::vector<T>(size, Table<T>::Value(11));
    table.table = std::vector<T>(size, table.pad);
    table.live = table.original;
    table.buffer = this->template Register<T>(table.spec, table.original);
    const DeviceSpan<int32_t> log = this->EngineMemory(Ints(kBatch * size * sizeof(T) / sizeof(int32_t), -1));
    table.log = DeviceSpan<T>(reinterpret_cast<T*>(log.address()), kBatch * size);
    tables.push_back(std::move(table));
  }

  template <class T>
  void Give(Table<T>& table, const Extent& extent, Random& random) {
    BufferManager& manager = this->manager();
    const int64_t count = table.Count(extent), rows = static_cast<int64_t>(table.table.size()) / table.spec.axis.per;
    for (int calls = random.In(0, 3); calls > 0; --calls) {
      const int what = random.In(0, 9);
      if (what == 0) {
        const std::vector<T> values = table.Values(count, random);
        ASSERT_OK(manager.template Refill<T>(table.buffer, values));
        table.Store(0, values);
      } else if (what <= 3 && table.spec.axis.unit != Axis::Unit::kFixed && count > 0) {
        const int64_t per = table.spec.axis.per;
        const int64_t from = random.In(0, static_cast<int32_t>(rows) - 1);
        const int64_t to = random.In(0, static_cast<int32_t>(count / per) - 1);
        ASSERT_OK(manager.MoveRow(table.buffer, from, to));
        if (from == to) continue;
        std::copy_n(table.table.begin() + from * per, per, table.table.begin() + to * per);
        std::fill_n(table.table.begin() + from * per, per, table.pad);
      } else {
        std::vector<BufferManager::Range> ranges;
        std::vector<T> all;
        for (int i = random.In(0, 3); i > 0; --i) {
          const int64_t first = random.In(0, static_cast<int32_t>(count));
          const int64_t most = random.Chance(80) ? std::min<int64_t>(5, count - first) : count - first;
          const std::vector<T> values = table.Values(random.In(0, static_cast<int32_t>(most)), random);
          ranges.push_back({first, static_cast<int64_t>(values.size())});
          all.insert(all.end(), values.begin(), values.end());
          table.Store(first, values);
        }
        ASSERT_OK(manager.template Update<T>(table.buffer, ranges, all));
      }
      table.given = extent;
    }
    if (table.spec.kind == Kind::kPageTable && count > 0 && random.Chance(3)) {
      const std::vector<T> illegal = {Table<T>::Value(kLimit)};
      const int64_t first = random.In(0, static_cast<int32_t>(count) - 1);
      ASSERT_OK(manager.template Update<T>(table.buffer, first, illegal));
      table.Store(first, illegal);
      table.given = extent;
    }
    if (random.Chance(50) && table.given == extent) {
      ASSERT_OK(manager.Keep(table.buffer));
    } else {
      ASSERT_OK(manager.template Update<T>(table.buffer, {}, {}));
      table.given = extent;
    }
  }

  template <class T>
  static bool IsBroken(const Table<T>& table, const Extent& extent) {
    if (table.spec.kind != Kind::kPageTable) return false;
    return std::find(table.table.begin(), table.table.begin() + table.Count(extent), Table<T>::Value(kLimit)) !=
           table.table.begin() + table.Count(extent);
  }

  template <class T>
  void Log(Table<T>& table) {
    const size_t size = table.table.size();
    ASSERT_OK(this->stream()->Copy(AsWritableBytes(table.log.Sub(table.expected.size() * size, size)),
                                   AsBytes(table.buffer.live)));
    table.expected.push_back(table.live);
  }

  void CompareLogs(std::vector<Table<int32_t>>& tables, std::vector<Table<Odd>>& odd) {
    ForAll(tables, odd, [this](auto& table) {
      const auto seen = this->Read(table.log);
      const size_t size = table.table.size();
      for (size_t step = 0; step < table.expected.size(); ++step) {
        for (size_t i = 0; i < size; ++i) {
          ASSERT_TRUE(seen[step * size + i] == table.expected[step][i])
              << table.spec.name << "[" << i << "], " << table.expected.size() - step << " replays ago";
        }
      }
      table.expected.clear();
    });
  }

  int names_ = 0;
};
TYPED_TEST_SUITE(DeltasPropertyTest, AllBackends, BackendNames);

TYPED_TEST(DeltasPropertyTest, TheGraphSeesThePlainTable) {
  const char* const given = std::getenv("PRISTINE_SEED");
  const uint32_t seed = given != nullptr ? static_cast<uint32_t>(std::strtoul(given, nullptr, 10)) : 20250301;
  std::printf("PRISTINE_SEED=%u\n", seed);
  for (uint32_t i = 0; i < 10 && !this->HasFailure(); ++i) this->Run(seed + i);
}

}  // namespace
}  // namespace pristine::testing
