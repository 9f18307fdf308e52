// GraphExec::SetKernelParams: which launch sees which params.
#include <atomic>

#include "tests/conformance/conformance.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class KernelParamsConformance : public ConformanceTest<BackendT> {
 protected:
  void TearDown() override {
    exec_.reset();
    graph_.reset();
    memory_ = DeviceBuffer();
    ConformanceTest<BackendT>::TearDown();
  }
  // set_value(values[0] = 1), then values[2] += 1.
  void MakeGraph() {
    ASSERT_OK_AND_ASSIGN(memory_, this->device_->Allocate(kCount * sizeof(int), "values"));
    values_ = memory_.template As<int>();
    ASSERT_OK(this->stream_->Fill(AsWritableBytes(values_), std::byte{0}));
    ASSERT_OK(this->stream_->Synchronize());
    ASSERT_OK_AND_ASSIGN(graph_, pristine::Capture(*this->stream_, [this](Stream& stream) -> absl::Status {
                           PRISTINE_RETURN_IF_ERROR(Launch(stream, kSetValue, Params(0, 1)));
                           return Launch(stream, kAddOne, {values_.address() + 2, 1});
                         }));
    ASSERT_OK_AND_ASSIGN(exec_, graph_->Instantiate());
  }
  SetValueParams Params(int64_t index, int value) { return {values_.address(), index, value}; }
  std::vector<int> Values() {
    std::vector<int> values(kCount);
    EXPECT_OK(this->stream_->CopyToHost({reinterpret_cast<std::byte*>(values.data()), kCount * sizeof(int)},
                                        AsBytes(values_)));
    EXPECT_OK(this->stream_->Synchronize());
    return values;
  }

  static constexpr size_t kCount = 64;
  DeviceBuffer memory_;
  DeviceSpan<int> values_;
  std::unique_ptr<Graph> graph_;
  std::unique_ptr<GraphExec> exec_;
};
TYPED_TEST_SUITE(KernelParamsConformance, AllBackends, BackendNames);

TYPED_TEST(KernelParamsConformance, EachLaunchKeepsTheParamsThatItWasQueuedWith) {
  this->MakeGraph();
  ASSERT_OK_AND_ASSIGN(PinnedBuffer flag, this->device_->AllocatePinned(sizeof(int), "flag"));
  ASSERT_OK(Launch(*this->stream_, kSpin, SpinParams{static_cast<int*>(flag.device_address())}));
  ASSERT_OK(this->exec_->Launch(*this->stream_));
  for (int i = 3; i < 64; ++i) {
    ASSERT_OK(this->exec_->SetKernelParams(0, kSetValue, this->Params(i, 100 + i)));
    ASSERT_OK(this->exec_->Launch(*this->stream_));
  }
  ASSERT_OK(this->exec_->Launch(*this->stream_)) << "params stay until they are set again";
  std::atomic_ref<int>(*flag.template As<int>().data()).store(1);
  const std::vector<int> values = this->Values();
  EXPECT_EQ(values[0], 1);
  EXPECT_EQ(values[1], 0);
  EXPECT_EQ(values[2], 63) << "the other node ran in every launch, as recorded";
  for (int i = 3; i < 64; ++i) EXPECT_EQ(values[i], 100 + i);
}

TYPED_TEST(KernelParamsConformance, AnotherExecOfTheGraphAndTheGraphItselfDoNotChange) {
  this->MakeGraph();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> other, this->graph_->Instantiate());
  ASSERT_OK(this->exec_->SetKernelParams(0, kSetValue, this->Params(1, 5)));
  ASSERT_OK(other->Launch(*this->stream_));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> later, this->graph_->Instantiate());
  ASSERT_OK(later->Launch(*this->stream_));
  EXPECT_EQ(this->Values()[1], 0);
  ASSERT_OK(this->exec_->Launch(*this->stream_));
  EXPECT_EQ(this->Values()[1], 5);
}

TYPED_TEST(KernelParamsConformance, ParamsCanBeSetAfterTheGraphIsGone) {
  this->MakeGraph();
  this->graph_.reset();
  ASSERT_OK(this->exec_->SetKernelParams(0, kSetValue, this->Params(1, 5)));
  ASSERT_OK(this->exec_->Launch(*this->stream_));
  EXPECT_EQ(this->Values()[1], 5);
}

TYPED_TEST(KernelParamsConformance, AnotherNodeOrKernelIsRefusedAndChangesNothing) {
  this->MakeGraph();
  EXPECT_STATUS(this->exec_->SetKernelParams(-1, kSetValue, this->Params(1, 5)), kOutOfRange, "node -1");
  EXPECT_STATUS(this->exec_->SetKernelParams(2, kSetValue, this->Params(1, 5)), kOutOfRange, "2 nodes");
  EXPECT_STATUS(this->exec_->SetKernelParams(1, kSetValue, this->Params(1, 5)), kInvalidArgument,
                "node 1 is add_one, not the kernel set_value");
  const absl::Status not_offered = this->exec_->SetKernelParams(1, kAddOne, {this->values_.address() + 1, 1});
  if (this->device_->backend() == Backend::kHost) {
    EXPECT_OK(not_offered);
  } else {
    EXPECT_STATUS(not_offered, kUnimplemented, "add_one has no cuda_launch");
  }
  ASSERT_OK(this->exec_->Launch(*this->stream_));
  EXPECT_EQ(this->Values()[0], 1);
}

}  // namespace
}  // namespace pristine::testing
