// Decode may begin before the kernel ahead of it has ended, and then looks at what it will need, as a guess. These
// tests make every guess wrong: all that decode reads is written by that kernel, and written late.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "pristine/attention/paged_decode.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/launch.h"
#include "tests/attention/decode_rig.h"
#include "tests/support/backends.h"
#include "tests/support/oracle_case.h"
#include "tests/support/status_matchers.h"
#include "tests/support/test_kernels.h"

namespace pristine::testing {
namespace {

using attention::DecodeScheduler;
using attention::DType;

template <class BackendT>
class DecodeEarlyTest : public DecodeRigTest<BackendT> {
 protected:
  void TearDown() override {
    graph_.reset();
    captured_.reset();
    arena_ = {};
    staged_ = {};
    behind_ = {};
    DecodeRigTest<BackendT>::TearDown();
  }

  // Room for the largest of `steps` in one arena, and a graph of three nodes: the late copy of all that decode reads,
  // decode, and a reader that begins early itself: were decode to end before the copy, it would not see the copy.
  absl::Status Build(const std::vector<DecodeCase>& steps, DecodeScheduler scheduler) {
    const DecodeCase& first = steps[0];
    rows_ = first.rows();
    RigOptions options = {.buckets = {rows_}, .max_length = 2048, .scheduler = scheduler};
    for (const DecodeCase& step : steps) {
      options.num_pages = std::max(options.num_pages, step.num_pages());
      pages_ = std::max(pages_, step.indices().size());
      pool_ = std::max(pool_, step.Pool(false).size());
    }
    PRISTINE_RETURN_IF_ERROR(this->Prepare(first, options));
    PRISTINE_ASSIGN_OR_RETURN(arena_, this->device_->Allocate(Bytes(first), "arena"));
    PRISTINE_ASSIGN_OR_RETURN(staged_, this->device_->Allocate(Bytes(first), "staged"));
    PRISTINE_ASSIGN_OR_RETURN(behind_, this->device_->Allocate(Bytes(first), "behind"));
    const DeviceSpan<const std::byte> all = arena_.template As<const std::byte>();
    const DeviceSpan<const int32_t> ints = arena_.template As<const int32_t>();
    attention::DecodeTensors& tensors = this->rig_->tensors;
    const size_t q = first.Q().size();
    tensors.q = all.Sub(0, q);
    tensors.k = all.Sub(q, pool_);
    tensors.v = all.Sub(q + pool_, pool_);
    tensors.lengths = ints.Sub(IntsAt(first), rows_);
    tensors.kv_indptr = ints.Sub(IntsAt(first) + rows_, rows_ + 1);
    tensors.kv_indices = ints.Sub(IntsAt(first) + 2 * rows_ + 1, pages_);
    PRISTINE_ASSIGN_OR_RETURN(captured_,
                              Capture(*this->stream_, [this](Stream& stream) { return this->Body(stream); }));
    PRISTINE_ASSIGN_OR_RETURN(graph_, captured_->Instantiate());
    return absl::OkStatus();
  }
  absl::Status Body(Stream& stream) {
    const DeviceSpan<int32_t> to = arena_.template As<int32_t>();
    const DeviceSpan<const int32_t> from = staged_.template As<const int32_t>();
    if (by_copy_) {
      PRISTINE_RETURN_IF_ERROR(stream.Copy(AsWritableBytes(to), AsBytes(from)));
    } else {
      PRISTINE_RETURN_IF_ERROR(Launch(stream, kLateCopy,
                                      LateCopyParams{.to = to.address(),
                                                     .from = from.address(),
                                                     .count = static_cast<int64_t>(to.size()),
                                                     .nanoseconds = 200'000}));
    }
    PRISTINE_RETURN_IF_ERROR(this->rig_->decode().Run(stream, {rows_, rows_ * q_len_}, this->rig_->tensors));
    return Launch(stream, kNextCopy,
                  {behind_.template As<int32_t>().address(), to.address(), static_cast<int64_t>(to.size())});
  }

  // Runs the step with `before` in the arena as decode finds it when it comes early. "" if the result is the step's.
  std::string RunOver(const std::vector<int32_t>& before, const DecodeCase& step, bool replayed) {
    const absl::Status status = [&]() -> absl::Status {
      PRISTINE_RETURN_IF_ERROR(this->rig_->Begin(rows_, step, rows_));
      PRISTINE_RETURN_IF_ERROR(
          this->rig_->manager().BeforeReplay(*this->stream_, {rows_, rows_ * q_len_}, {rows_, rows_ * q_len_}));
      PRISTINE_RETURN_IF_ERROR(this->rig_->manager().RecordPrologue(*this->stream_, {rows_, rows_ * q_len_}));
      PRISTINE_RETURN_IF_ERROR(Upload(*this->stream_, staged_.template As<int32_t>(), Contents(step)));
      PRISTINE_RETURN_IF_ERROR(Upload(*this->stream_, arena_.template As<int32_t>(), before));
      PRISTINE_RETURN_IF_ERROR(replayed ? graph_->Launch(*this->stream_) : Body(*this->stream_));
      PRISTINE_ASSIGN_OR_RETURN(const std::vector<int32_t> behind,
                                Download(*this->stream_, behind_.template As<int32_t>()));
      if (behind != Contents(step)) return absl::InternalError("the kernel behind decode saw what was there before");
      return this->rig_->ReadBack();
    }();
    return status.ok() ? this->rig_->Check(rows_, step, rows_) : status.ToString();
  }

  // The arena as a step wants it: queries, a pool of keys and one of values, NaN where it has no page, and the page
  // table.
  std::vector<int32_t> Contents(const DecodeCase& step) const {
    std::vector<std::byte> bytes = step.Q();
    for (const bool values : {false, true}) {
      const std::vector<std::byte> pool = step.Pool(values);
      bytes.insert(bytes.end(), pool.begin(), pool.end());
      bytes.insert(bytes.end(), pool_ - pool.size(), std::byte{0xff});
    }
    std::vector<int32_t> contents(bytes.size() / sizeof(int32_t));
    std::memcpy(contents.data(), bytes.data(), bytes.size());
    contents.insert(contents.end(), step.lengths().begin(), step.lengths().end());
    contents.insert(contents.end(), step.indptr().begin(), step.indptr().end());
    contents.insert(contents.end(), step.indices().begin(), step.indices().end());
    contents.resize(arena_.template As<const int32_t>().size(), -1);
    return contents;
  }

  int32_t q_len_ = 1;
  bool by_copy_ = false;  // which no kernel begins ahead of

  // Its place in the contents.
  size_t FirstPage(const DecodeCase& step) const { return IntsAt(step) + 2 * rows_ + 1; }

 private:
  size_t IntsAt(const DecodeCase& step) const { return (step.Q().size() + 2 * pool_) / sizeof(int32_t); }
  size_t Bytes(const DecodeCase& step) const { return (IntsAt(step) + 2 * rows_ + 1 + pages_) * sizeof(int32_t); }

  int32_t rows_ = 0;
  size_t pages_ = 0, pool_ = 0;  // the most of a step: pages, and bytes of K
  DeviceBuffer arena_, staged_, behind_;
  std::unique_ptr<Graph> captured_;
  std::unique_ptr<GraphExec> graph_;
};
TYPED_TEST_SUITE(DecodeEarlyTest, AllBackends, BackendNames);

TYPED_TEST(DecodeEarlyTest, WhatTheKernelAheadWritesLateIsWhatDecodeReads) {
  for (const DecodeScheduler scheduler : {DecodeScheduler::kDevice, DecodeScheduler::kHost}) {
    for (const DecodeShape& shape :
         {DecodeShape{.dtype = DType::kBFloat16, .head_dim = 128, .page_size = 16, .seed = 1100},
          DecodeShape{.dtype = DType::kFloat16, .head_dim = 64, .page_size = 1, .seed = 1110, .q_len = 3},
          DecodeShape{
              .dtype = DType::kBFloat16, .page_size = 24, .seed = 1120, .q_len = 9, .kv_dtype = DType::kFloat8E4M3},
          DecodeShape{.seed = 1130}}) {
      this->q_len_ = shape.q_len;
      const std::vector<DecodeCase> steps = {DecodeCase(shape, {200, 0, 64, 33}, {180, -1, 63, 0}),
                                             DecodeCase(shape, {65, 129, 0, 250}, {64, 0, -1, 249}),
                                             DecodeCase(shape, {1, 1, 1, 1}, {-1, -1, -1, -1}),
                                             DecodeCase(shape, {0, 0, 0, 0}, {-1, -1, -1, -1}),
                                             DecodeCase(shape, {256, 256, 256, 256}, {255, 0, 128, 64}),
                                             DecodeCase(shape, {256, 257, 256, 256}, {255, 256, 128, 64})};
      ASSERT_OK(this->Build(steps, scheduler));
      for (const bool replayed : {false, true}) {
        for (size_t i = 0; i < steps.size(); ++i) {
          const DecodeCase& before = steps[(i + steps.size() - 1) % steps.size()];
          EXPECT_EQ(this->RunOver(this->Contents(before), steps[i], replayed), "")
              << shape.ToString() << ", step " << i << (replayed ? ", replayed" : ", eager")
              << (scheduler == DecodeScheduler::kHost ? ", planned" : "");
        }
      }
      this->TearDown();
      this->SetUp();
    }
  }
}

// Lengths and where rows begin were right, only the pages are others: of the first row, of the last, of all.
TYPED_TEST(DecodeEarlyTest, OtherPagesOfRowsAsLongAreSeen) {
  for (const DecodeShape& shape :
       {DecodeShape{.dtype = DType::kBFloat16, .head_dim = 128, .page_size = 16, .seed = 1160},
        DecodeShape{.dtype = DType::kFloat16, .head_dim = 64, .page_size = 1, .seed = 1161, .q_len = 3},
        DecodeShape{.dtype = DType::kBFloat16,
        .head_dim = 128,
        .page_size = 8,
        .seed = 1162,
        .kv_dtype = DType::kFloat8E4M3}}) {
    this->q_len_ = shape.q_len;
    const DecodeCase step(shape, {256, 64, 31, 300}, {255, 0, 30, 299});
    ASSERT_OK(this->Build({step}, DecodeScheduler::kDevice));
    const std::vector<int32_t> after = this->Contents(step);
    const size_t first = this->FirstPage(step), end = first + step.indices().size();
    for (const bool replayed : {false, true}) {
      for (const auto& [from, to] : {std::pair{first, first + 1}, std::pair{end - 1, end}, std::pair{first, end}}) {
        std::vector<int32_t> before = after;
        for (size_t i = from; i < to; ++i) before[i] = (before[i] + 1) % step.num_pages();
        EXPECT_EQ(this->RunOver(before, step, replayed), "")
            << shape.ToString() << ", pages " << from - first << " to " << to - first;
      }
    }
    this->TearDown();
    this->SetUp();
  }
}

// What lies there before need not be a page table at all.
TYPED_TEST(DecodeEarlyTest, AnythingMayLieThereBefore) {
  const DecodeShape shape = {.dtype = DType::kBFloat16, .head_dim = 128, .page_size = 16, .seed = 1140};
  const std::vector<DecodeCase> steps = {DecodeCase(shape, {700, 0, 64, 33, 1}, {650, -1, 63, 0, -1}),
                                         DecodeCase(shape, {65, 129, 0, 900, 16}, {64, 0, -1, 899, 15})};
  ASSERT_OK(this->Build(steps, DecodeScheduler::kDevice));
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max(), kLeast = std::numeric_limits<int32_t>::min();
  std::mt19937 random(1141);
  for (int i = 0; i < 16; ++i) {
    std::vector<int32_t> before = this->Contents(steps[0]);
    for (int32_t& value : before) {
      const int32_t wild[] = {kMost, kLeast, -1, 0, 1, 100000, static_cast<int32_t>(random())};
      value = i < 7 ? wild[i] : wild[random() % 7];
    }
    EXPECT_EQ(this->RunOver(before, steps[i % 2], i % 3 != 0), "") << i;
  }
}

// Behind what is no kernel there is nothing to begin early for, and decode is as good.
TYPED_TEST(DecodeEarlyTest, BehindACopyItReadsWhatWasCopied) {
  const DecodeShape shape = {.dtype = DType::kBFloat16, .head_dim = 128, .page_size = 16, .seed = 1150};
  const std::vector<DecodeCase> steps = {DecodeCase(shape, {200, 0, 64, 33}, {180, -1, 63, 0}),
                                         DecodeCase(shape, {65, 129, 0, 250}, {64, 0, -1, 249})};
  this->by_copy_ = true;
  ASSERT_OK(this->Build(steps, DecodeScheduler::kDevice));
  for (const bool replayed : {false, true}) {
    for (const size_t i : {0, 1, 0}) {
      EXPECT_EQ(this->RunOver(this->Contents(steps[1 - i]), steps[i], replayed), "") << i;
    }
  }
}

}  // namespace
}  // namespace pristine::testing
