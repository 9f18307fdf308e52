// A table with deltas under a manager, with graphs of its own or of an engine's.
#ifndef PRISTINE_TESTS_BUFFERS_DELTAS_RIG_H_
#define PRISTINE_TESTS_BUFFERS_DELTAS_RIG_H_

#include <algorithm>
#include <string>
#include <vector>

#include "tests/buffers/buffer_fixture.h"
#include "tests/buffers/engine.h"

namespace pristine::testing {

inline constexpr Extent kSmall{2, 2};
inline constexpr Extent kLarge{4, 4};
inline constexpr int32_t kDummy = 9;
using Ints = std::vector<int32_t>;

template <class BackendT>
class DeltasRig : public BufferTest<BackendT> {
 protected:
  static constexpr size_t kTransports[] = {0, ManagerOptions::kMaxParameterBytes};

  void TearDown() override {
    if (this->stream() != nullptr) this->stream()->Synchronize().IgnoreError();
    launch_ = nullptr;
    BufferTest<BackendT>::TearDown();
  }
  static BufferSpec TableSpec(int32_t columns = 3) {
    BufferSpec spec = Spec("table", Role::kRefilled, Kind::kPageTable, Axis::Rows(columns));
    spec.limit = 100;
    spec.dummy = kDummy;
    spec.deltas = true;
    return spec;
  }
  // A table of 4 rows of 3.
  void MakeTable(size_t parameter_bytes = ManagerOptions::kMaxParameterBytes) {
    ManagerOptions options;
    options.parameter_bytes = parameter_bytes;
    this->MakeManager(options);
    table_ = this->Register(TableSpec(), Ints(12, 50));
  }
  void CaptureTable(size_t parameter_bytes = ManagerOptions::kMaxParameterBytes) {
    MakeTable(parameter_bytes);
    this->Capture({kSmall, kLarge}, kEmptyBody);
  }
  // The engine's own graph of kLarge.
  void CaptureByEngine() {
    MakeTable();
    ASSERT_OK(this->manager().Seal());
    ASSERT_OK(EngineBeginCapture(*this->stream()));
    EXPECT_OK(this->manager().RecordPrologue(*this->stream(), kLarge));
    ASSERT_OK_AND_ASSIGN(launch_, EngineEndCapture(*this->stream()));
  }
  absl::Status Update(int64_t first, const Ints& values) {
    return this->manager().template Update<int32_t>(table_, first, values);
  }
  absl::Status MoveRow(int64_t from, int64_t to) { return this->manager().MoveRow(table_, from, to); }
  absl::Status Begin(const Extent& bucket, int32_t requests) {
    return this->manager().BeginStep(bucket, {requests, requests});
  }
  absl::Status ReplayOf(const Extent& bucket, int32_t requests) { return this->Replay(bucket, {requests, requests}); }
  absl::Status Arm(int32_t requests) {
    return this->manager().BeforeReplay(*this->stream(), kLarge, {requests, requests});
  }
  Ints Table() { return this->Read(table_); }
  std::string Verified() {
    absl::StatusOr<std::vector<Violation>> found = this->manager().Verify(*this->stream());
    EXPECT_OK(found);
    return found.ok() ? Describe(*found) : "";
  }
  void ExpectClean() { EXPECT_EQ(Verified(), ""); }
  void ExpectMissed(int64_t expected, int64_t actual) {
    const std::vector<Violation> found = this->Poll();
    ASSERT_EQ(std::count_if(found.begin(), found.end(),
                            [](const Violation& v) { return v.kind == Violation::Kind::kMissedUpdate; }),
              1)
        << Describe(found);
    const Violation& missed = found.back();
    ASSERT_EQ(missed.kind, Violation::Kind::kMissedUpdate) << Describe(found);
    EXPECT_STREQ(missed.buffer, "table");
    EXPECT_EQ(missed.expected, expected);
    EXPECT_EQ(missed.actual, actual);
  }
  Buffer<int32_t> table_;
  EngineLaunch launch_;
};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_BUFFERS_DELTAS_RIG_H_
