// Every call that can fail does, one at a time: nothing is left half done, and trying again works.
#include <cstdio>
#include <iterator>
#include <map>
#include <set>

#include "tests/recovery/life.h"
#include "tests/recovery/nth_fault.h"
#include "tests/support/backends.h"

namespace pristine::testing {
namespace {

constexpr Operation kAll[] = {Operation::kAllocate, Operation::kCreate,    Operation::kWatch,
                              Operation::kWrite,    Operation::kSeal,      Operation::kCopy,
                              Operation::kLaunch,   Operation::kEvent,     Operation::kSynchronize,
                              Operation::kQuery,    Operation::kCapture,   Operation::kInstantiate,
                              Operation::kUpload,   Operation::kSetParams, Operation::kGraphLaunch};
static_assert(std::size(kAll) == kOperations);

// A graph of somebody else on the same device, that goes on whatever happens to the life beside it.
class Bystander {
 public:
  static std::unique_ptr<Bystander> Create(Device& device) {
    std::unique_ptr<Bystander> bystander(new Bystander);
    EXPECT_OK(bystander->SetUp(device));
    return bystander;
  }
  // "" or what is wrong.
  std::string Replay() {
    int32_t value = 0;
    absl::Status status = exec_->Launch(*stream_);
    status.Update(stream_->CopyToHost({reinterpret_cast<std::byte*>(&value), sizeof(value)}, memory_.As<std::byte>()));
    status.Update(stream_->Synchronize());
    if (!status.ok()) return status.ToString();
    ++replays_;
    return value == replays_ ? "" : "counted wrong";
  }

 private:
  absl::Status SetUp(Device& device) {
    PRISTINE_ASSIGN_OR_RETURN(stream_, device.CreateStream());
    PRISTINE_ASSIGN_OR_RETURN(memory_, device.Allocate(sizeof(int32_t), "bystander"));
    PRISTINE_RETURN_IF_ERROR(stream_->Fill(memory_.As<std::byte>(), std::byte{0}));
    PRISTINE_ASSIGN_OR_RETURN(graph_, Capture(*stream_, [this](Stream& stream) {
                                return Launch(stream, kAddOne, {memory_.As<int32_t>().address(), 1});
                              }));
    PRISTINE_ASSIGN_OR_RETURN(exec_, graph_->Instantiate());
    return stream_->Synchronize();
  }
  DeviceBuffer memory_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Graph> graph_;
  std::unique_ptr<GraphExec> exec_;
  int32_t replays_ = 0;
};

enum class Then {
  kLook,     // at everything, then try again
  kRetry,    // at once
  kAbandon,  // the life, as it is
};

// Of the points, how many a test goes on by. ThreadSanitizer makes a life ten times as long.
#if defined(__SANITIZE_THREAD__)
constexpr int kEvery = 4;
#else
constexpr int kEvery = 1;
#endif

// The errors that the libraries deal with by themselves, and how. All else is returned to the caller.
bool MayBeDealtWith(Operation operation, const std::string& phase) {
  const bool replays = phase.find("replay") != std::string::npos;
  const bool captures = phase.find("capture") != std::string::npos;
  // The mark behind a copy or a replay is refused: the slot, or the other stream, waits for more than it must.
  if (operation == Operation::kEvent) return replays;
  // A graph whose prologue does not take its steps as parameters gets them through the ring.
  if (operation == Operation::kSetParams) return captures;
  // FindPolluter looks for foreign work in a capture of its own, and does without.
  if (phase == "find polluter") return operation != Operation::kSynchronize;
  return false;
}

template <class BackendT>
class InjectionTest : public DeviceTest<BackendT> {
 protected:
  // One life in which the n-th point of `operation` fails. Whether it was reached.
  bool Run(Operation operation, int n, Then then) {
    Device& device = *this->device_;
    const LiveObjects before_life = device.live();
    NthFault fault(operation, n);
    {
      Life life(device, truth_);
      device.SetFaultInjector(&fault);
      for (const Life::Phase& phase : life.Phases()) {
        SCOPED_TRACE(absl::StrCat(phase.name, ", ", ToString(operation), " ", n));
        const bool hit_before = fault.hit();
        const LiveObjects before = device.live();
        absl::Status status = phase.run();
        if (hit_before || !fault.hit()) {
          EXPECT_OK(status);
        } else if (status.ok()) {
          EXPECT_TRUE(MayBeDealtWith(operation, phase.name)) << fault.Text() << " was not returned";
          ++dealt_with_[absl::StrCat(ToString(operation), ", ", fault.what(), ": ", phase.name)];
        } else {
          EXPECT_STATUS(status, kUnavailable, fault.Text());
          EXPECT_EQ(device.capturing_streams(), 0);
          if (phase.all_or_nothing) {
            EXPECT_TRUE(device.live() == before) << "left something behind";
          }
          if (then == Then::kAbandon) break;
          if (then == Then::kLook) {
            const Injecting none(device, nullptr, &fault);
            EXPECT_EQ(bystander_->Replay(), "");
            life.ExpectSound();
          }
          EXPECT_OK(phase.run()) << "tried again";
        }
        if (::testing::Test::HasFailure()) break;
      }
      device.SetFaultInjector(nullptr);
      if (then != Then::kAbandon && !::testing::Test::HasFailure()) life.ExpectSound();
    }
    EXPECT_TRUE(device.live() == before_life) << "leaked after " << fault.Text();
    EXPECT_EQ(device.capturing_streams(), 0);
    EXPECT_EQ(bystander_->Replay(), "");
    return fault.hit();
  }

  void RunAll(Then then) {
    const int first = 1 + static_cast<int>(then) % kEvery;
    bystander_ = Bystander::Create(*this->device_);
    int lives = 0;
    for (const Operation operation : kAll) {
      for (int n = first; Run(operation, n, then) && !::testing::Test::HasFailure(); n += kEvery) ++lives;
      if (::testing::Test::HasFailure()) break;
    }
    bystander_ = nullptr;
    std::printf("%d points failed, each in a life of its own\n", lives);
    for (const auto& [what, times] : dealt_with_) std::printf("  dealt with: %s (%d)\n", what.c_str(), times);
  }

  LifeTruth truth_;
  std::unique_ptr<Bystander> bystander_;
  std::map<std::string, int> dealt_with_;
};
TYPED_TEST_SUITE(InjectionTest, AllBackends, BackendNames);

TYPED_TEST(InjectionTest, AfterAnyFailureAllElseGoesOnAndARetryWorks) { this->RunAll(Then::kLook); }
TYPED_TEST(InjectionTest, ARetryAtOnceWorks) { this->RunAll(Then::kRetry); }
TYPED_TEST(InjectionTest, WhatIsAbandonedAfterAFailureLeavesNothing) { this->RunAll(Then::kAbandon); }

// How many points more than HostEager a backend reaches, and why.
struct More {
  int points = 0;
  const char* reason = "";
};
More MoreThanHost(const Device& device, Operation operation) {
  if (device.backend() == Backend::kHost) return {};
  switch (operation) {
    case Operation::kCreate:
    case Operation::kLaunch:
      return {1, "PagedDecode::Create sets its kernels' attributes, as if it launched them, on a stream of its own"};
    case Operation::kInstantiate:
      return {-1, "the engine instantiates its graph by CUDA's own call"};
    case Operation::kGraphLaunch:
      return {-1, "the engine launches its graph by CUDA's own call"};
    default:
      return {};
  }
}

TYPED_TEST(InjectionTest, ReachesThePointsThatHostReaches) {
  const auto count = [this](Device& device) {
    NthFault counter;
    Life life(device, this->truth_);
    const Injecting injecting(device, &counter);
    for (const Life::Phase& phase : life.Phases()) EXPECT_OK(phase.run()) << phase.name;
    return counter;
  };
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> host, HostEager::Create());
  const NthFault on_host = count(*host);
  const NthFault here = count(*this->device_);
  std::printf("| operation | host (eager) | %s | |\n|---|---|---|---|\n", this->device_->name().c_str());
  int total = 0, total_host = 0;
  for (const Operation operation : kAll) {
    const int expected = on_host.reached(operation), reached = here.reached(operation);
    const More more = MoreThanHost(*this->device_, operation);
    std::printf("| %s | %d | %d | %s |\n", ToString(operation), expected, reached, more.reason);
    EXPECT_GT(expected, 0) << ToString(operation) << ": the life never gets there";
    EXPECT_EQ(reached, expected + more.points) << ToString(operation);
    total += reached;
    total_host += expected;
  }
  std::printf("| all | %d | %d | |\n", total_host, total);
}

}  // namespace
}  // namespace pristine::testing
