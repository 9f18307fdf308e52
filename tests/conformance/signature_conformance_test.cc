// GraphRunner::SignatureHash: equal where ranks captured alike, different where anything that they must share differs.
#include <functional>
#include <string>

#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/signature.h"
#include "tests/conformance/conformance.h"

namespace pristine::testing {
namespace {

constexpr Extent kSmall = {2, 2};
constexpr Extent kLarge = {8, 16};

class NumberHook final : public GraphHook {
 public:
  explicit NumberHook(int64_t number) : number_(number) {}
  absl::Status BeforeCapture(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  absl::Status RecordPrologue(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  void AfterCapture(const RunInfo&, const absl::Status&) override {}
  absl::Status BeforeReplay(Stream&, const RunInfo&) override { return absl::OkStatus(); }
  void AfterReplay(Stream&, const RunInfo&, const absl::Status&) override {}
  void AddToSignature(const RunInfo& info, Signature& signature) const override {
    EXPECT_NE(info.captured, nullptr);
    signature.AddNumber(number_);
  }

 private:
  const int64_t number_;
};

template <class BackendT>
class SignatureConformance : public ConformanceTest<BackendT> {
 protected:
  struct Fork {
    std::unique_ptr<Stream> side;
    std::unique_ptr<Event> begin, end;
  };
  using Body = std::function<absl::Status(Stream&, int* memory, const Fork&)>;
  static absl::Status TwoKernels(Stream& stream, int* memory, const Fork&) {
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {memory, 1}));
    return Launch(stream, kSetValue, {memory + 1, 0, 7});
  }
  // One rank: a device, memory and a runner of its own.
  uint64_t Rank(const Body& body, const std::string& name = "decode", const Extent& bucket = kSmall,
                const std::vector<int64_t>& hooks = {}) {
    uint64_t hash = 0;
    RunRank(body, name, bucket, hooks, hash);
    return hash;
  }
  uint64_t Usual() { return Rank(TwoKernels); }

 private:
  void RunRank(const Body& body, const std::string& name, const Extent& bucket, const std::vector<int64_t>& hooks,
               uint64_t& hash) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> device, BackendT::Create());
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> stream, device->CreateStream());
    // Each rank's memory lies elsewhere.
    ASSERT_OK_AND_ASSIGN(const DeviceBuffer elsewhere, device->Allocate(static_cast<size_t>(++ranks_) << 12, "first"));
    ASSERT_OK_AND_ASSIGN(const DeviceBuffer memory, device->Allocate(64, "ints"));
    int* const ints = memory.As<int>().address();
    Fork fork;
    ASSERT_OK_AND_ASSIGN(fork.side, device->CreateStream());
    ASSERT_OK_AND_ASSIGN(fork.begin, device->CreateEvent());
    ASSERT_OK_AND_ASSIGN(fork.end, device->CreateEvent());
    std::vector<NumberHook> made;
    for (const int64_t number : hooks) made.emplace_back(number);
    ASSERT_OK_AND_ASSIGN(
        const std::unique_ptr<GraphRunner> runner,
        GraphRunner::Create({.name = name, .buckets = {bucket}, .warmups = ranks_ % 3},
                            [&](Stream& on, const Extent&) -> absl::Status { return body(on, ints, fork); }));
    for (NumberHook& hook : made) ASSERT_OK(runner->AddHook(hook));
    ASSERT_OK(runner->CaptureAll(*stream));
    ASSERT_OK_AND_ASSIGN(hash, runner->SignatureHash(bucket));
    ASSERT_OK(stream->Synchronize());
  }
  int ranks_ = 0;
};
TYPED_TEST_SUITE(SignatureConformance, AllBackends, BackendNames);

TYPED_TEST(SignatureConformance, RanksThatCaptureAlikeHaveEqualOnes) {
  const uint64_t hash = this->Usual();
  for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(this->Usual(), hash);
}

// On every backend, in every process: a change of what goes in, or of how, is a change for every user.
TYPED_TEST(SignatureConformance, TheValueIsPinned) { EXPECT_EQ(this->Usual(), 17122907538749271401u); }

TYPED_TEST(SignatureConformance, OtherParametersOfAKernelAreTheRanksOwn) {
  EXPECT_EQ(this->Rank([](Stream& stream, int* memory, const auto&) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {memory, 3}));
    return Launch(stream, kSetValue, {memory + 4, 1, 9});
  }),
            this->Usual());
}

TYPED_TEST(SignatureConformance, EachIngredientChangesIt) {
  const auto second = [](const auto& kernel) {
    return [&kernel](Stream& stream, int* memory, const auto&) -> absl::Status {
      PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {memory, 1}));
      return Launch(stream, kernel, {memory + 1, 0, 7});
    };
  };
  const struct {
    const char* what;
    uint64_t hash;
  } others[] = {
      {"another kernel name", this->Rank(second(kSetValueUndeclared))},
      {"another order of the same kernels", this->Rank([](Stream& stream, int* memory, const auto&) -> absl::Status {
         PRISTINE_RETURN_IF_ERROR(Launch(stream, kSetValue, {memory + 1, 0, 7}));
         return Launch(stream, kAddOne, {memory, 1});
       })},
      {"a node more", this->Rank([](Stream& stream, int* memory, const auto& fork) -> absl::Status {
         PRISTINE_RETURN_IF_ERROR(SignatureConformance<TypeParam>::TwoKernels(stream, memory, fork));
         return Launch(stream, kAddOne, {memory, 1});
       })},
      {"another kind of node", this->Rank([](Stream& stream, int* memory, const auto&) -> absl::Status {
         PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {memory, 1}));
         return stream.Fill(AsWritableBytes(DeviceSpan<int>(memory + 1, 1)), std::byte{7});
       })},
      {"the same nodes side by side", this->Rank([](Stream& stream, int* memory, const auto& fork) -> absl::Status {
         PRISTINE_RETURN_IF_ERROR(stream.Record(*fork.begin));
         PRISTINE_RETURN_IF_ERROR(fork.side->Wait(*fork.begin));
         PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {memory, 1}));
         PRISTINE_RETURN_IF_ERROR(Launch(*fork.side, kSetValue, {memory + 1, 0, 7}));
         PRISTINE_RETURN_IF_ERROR(fork.side->Record(*fork.end));
         return stream.Wait(*fork.end);
       })},
      {"a foreign node", this->Rank([](Stream& stream, int* memory, const auto&) -> absl::Status {
         PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {memory, 1}));
         return EnqueueForeignAddOne(stream, {memory + 1, 1});
       })},
      {"another runner", this->Rank(this->TwoKernels, "target_verify")},
      {"another bucket", this->Rank(this->TwoKernels, "decode", kLarge)},
      {"more tokens of the same requests", this->Rank(this->TwoKernels, "decode", {2, 4})},
      {"a hook", this->Rank(this->TwoKernels, "decode", kSmall, {5})},
      {"what the hook adds", this->Rank(this->TwoKernels, "decode", kSmall, {6})},
      {"two hooks", this->Rank(this->TwoKernels, "decode", kSmall, {5, 6})},
      {"the order of two hooks", this->Rank(this->TwoKernels, "decode", kSmall, {6, 5})},
  };
  const uint64_t usual = this->Usual();
  for (const auto& other : others) EXPECT_NE(other.hash, usual) << other.what;
  for (size_t a = 0; a < std::size(others); ++a) {
    for (size_t b = 0; b < a; ++b)
      EXPECT_NE(others[a].hash, others[b].hash) << others[a].what << ", " << others[b].what;
  }
}

TYPED_TEST(SignatureConformance, OnlyCapturedBucketsHaveOne) {
  const DeviceBuffer memory = this->MakeInts({0, 0});
  int* const ints = memory.As<int>().address();
  bool more = false;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphRunner> runner,
                       GraphRunner::Create({.buckets = {kSmall, kLarge}, .warmups = 0},
                                           [&](Stream& stream, const Extent&) -> absl::Status {
                                             if (more) {
                                               PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {ints + 1, 1}));
                                             }
                                             return Launch(stream, kAddOne, {ints, 1});
                                           }));
  EXPECT_STATUS(runner->SignatureHash(kSmall), kNotFound, "not captured");
  EXPECT_STATUS(runner->SignatureHash({1, 1}), kNotFound, "no bucket");
  ASSERT_OK(runner->CaptureAll(*this->stream_));
  ASSERT_OK_AND_ASSIGN(const uint64_t small, runner->SignatureHash(kSmall));
  ASSERT_OK_AND_ASSIGN(const uint64_t large, runner->SignatureHash(kLarge));
  EXPECT_NE(small, large);
  ASSERT_OK(runner->Recapture(*this->stream_, kSmall));
  EXPECT_EQ(*runner->SignatureHash(kSmall), small) << "captured again, alike";
  more = true;
  ASSERT_OK(runner->Recapture(*this->stream_, kSmall));
  EXPECT_NE(*runner->SignatureHash(kSmall), small) << "captured again, with a node more";
  ASSERT_OK(runner->Release(kSmall));
  EXPECT_STATUS(runner->SignatureHash(kSmall), kNotFound, "not captured");
}

TEST(SignatureTest, IsFnv1aWithTheLowestByteFirst) {
  EXPECT_EQ(Signature().hash(), 0xcbf29ce484222325u);
  const auto of = [](const std::string& bytes) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const char c : bytes) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
    return hash;
  };
  EXPECT_EQ(of("a"), 0xaf63dc4c8601ec8cu) << "the published test vector";
  Signature number;
  number.AddNumber(0x0102);
  EXPECT_EQ(number.hash(), of(std::string("\x02\x01\0\0\0\0\0\0", 8)));
  Signature negative;
  negative.AddNumber(-1);
  EXPECT_EQ(negative.hash(), of(std::string(8, '\xff')));
  Signature text;
  text.AddText("ab");
  EXPECT_EQ(text.hash(), of(std::string("\2\0\0\0\0\0\0\0ab", 10)));
  Signature split, whole;
  split.AddText("a");
  split.AddText("b");
  whole.AddText("ab");
  whole.AddText("");
  EXPECT_NE(split.hash(), whole.hash());
}

}  // namespace
}  // namespace pristine::testing
