// What a capture records, what kills it, and that the stream survives it.
#include <stdexcept>
#include <string>
#include <thread>

#include "tests/conformance/conformance.h"

namespace pristine::testing {
namespace {

template <class BackendT>
class CaptureConformance : public ConformanceTest<BackendT> {
 protected:
  absl::Status AddOne(Stream& stream, const DeviceBuffer& x) {
    return Launch(stream, kAddOne, {x.As<int>().address(), 1});
  }
  // Whatever a capture did, the stream works and is not capturing.
  void ExpectUsable() {
    EXPECT_FALSE(this->stream_->capturing());
    EXPECT_EQ(this->device_->capturing_streams(), 0);
    DeviceBuffer x = this->MakeInts({41});
    EXPECT_OK(AddOne(*this->stream_, x));
    EXPECT_EQ(this->Read(x), std::vector<int>{42});
    EXPECT_OK(Capture(*this->stream_, [&](Stream& stream) { return AddOne(stream, x); }));
  }
};
TYPED_TEST_SUITE(CaptureConformance, AllBackends, BackendNames);

// C6 row 1.
TYPED_TEST(CaptureConformance, CapturedWorkDoesNotRunDuringCapture) {
  DeviceBuffer x = this->MakeInts({0});
  ASSERT_OK(Capture(*this->stream_, [&](Stream& stream) { return this->AddOne(stream, x); }));
  EXPECT_EQ(this->Read(x), std::vector<int>{0});
}

// C6 row 2.
TYPED_TEST(CaptureConformance, ParamsAndAddressesAreFrozenAtCapture) {
  DeviceBuffer x = this->MakeInts({0, 0});
  SetValueParams params = {x.As<int>().address(), 0, 5};
  std::unique_ptr<GraphExec> exec = this->MakeExec([&](Stream& stream) { return Launch(stream, kSetValue, params); });
  params.index = 1;
  params.value = 9;
  ASSERT_OK(exec->Launch(*this->stream_));
  EXPECT_EQ(this->Read(x), (std::vector<int>{5, 0}));
}

// C6 row 3.
TYPED_TEST(CaptureConformance, HostMemoryOfACapturedCopyIsReadAtEachReplay) {
  DeviceBuffer x = this->MakeInts({0});
  ASSERT_OK_AND_ASSIGN(PinnedBuffer host, this->device_->AllocatePinned(2 * sizeof(int), "host"));
  const absl::Span<int> values = host.As<int>();
  const absl::Span<std::byte> in(host.host(), sizeof(int));
  const absl::Span<std::byte> out(host.host() + sizeof(int), sizeof(int));
  values[0] = 1;
  std::unique_ptr<GraphExec> exec = this->MakeExec([&](Stream& stream) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(AsWritableBytes(x.As<int>()), in));
    PRISTINE_RETURN_IF_ERROR(this->AddOne(stream, x));
    return stream.CopyToHost(out, AsBytes(x.As<int>()));
  });
  for (int i = 0; i < 5; ++i) {
    values[0] = 10 * i;
    ASSERT_OK(exec->Launch(*this->stream_));
    ASSERT_OK(this->stream_->Synchronize());
    EXPECT_EQ(values[1], 10 * i + 1);
  }
}

// C6 row 4.
TYPED_TEST(CaptureConformance, SynchronizeWhileCapturingFailsAndTheCaptureIsDead) {
  DeviceBuffer x = this->MakeInts({0});
  const absl::Status outcome = Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
                                 PRISTINE_RETURN_IF_ERROR(this->AddOne(stream, x));
                                 EXPECT_STATUS(stream.Synchronize(), kFailedPrecondition, "Synchronize");
                                 this->AddOne(stream, x).IgnoreError();
                                 return absl::OkStatus();  // the body ignores it; the capture does not
                               }).status();
  EXPECT_STATUS(outcome, kFailedPrecondition, "Synchronize");
  this->ExpectUsable();
}

// C6 row 4.
TYPED_TEST(CaptureConformance, IdleQueryWhileCapturingFailsAndTheCaptureIsDead) {
  const absl::Status outcome = Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
                                 EXPECT_STATUS(stream.IsIdle(), kFailedPrecondition, "IsIdle");
                                 return absl::OkStatus();
                               }).status();
  EXPECT_STATUS(outcome, kFailedPrecondition, "IsIdle");
  this->ExpectUsable();
}

TYPED_TEST(CaptureConformance, DeviceSynchronizeWhileCapturingFailsAndTheCaptureIsDead) {
  const absl::Status outcome = Capture(*this->stream_, [&](Stream&) -> absl::Status {
                                 EXPECT_STATUS(this->device_->Synchronize(), kFailedPrecondition, "capturing");
                                 return absl::OkStatus();
                               }).status();
  EXPECT_STATUS(outcome, kFailedPrecondition, "Device::Synchronize");
  this->ExpectUsable();
}

TYPED_TEST(CaptureConformance, AnEventRecordedInACaptureCannotBeWaitedForByTheHost) {
  std::unique_ptr<Event> event = this->MakeEvent();
  const absl::Status outcome = Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
                                 PRISTINE_RETURN_IF_ERROR(stream.Record(*event));
                                 EXPECT_STATUS(event->Synchronize(), kFailedPrecondition, "capture");
                                 return absl::OkStatus();
                               }).status();
  EXPECT_EQ(outcome.code(), absl::StatusCode::kFailedPrecondition) << outcome;
  EXPECT_STATUS(event->IsReached(), kFailedPrecondition, "capture");
  this->ExpectUsable();
  ASSERT_OK(this->stream_->Record(*event));
  EXPECT_OK(event->Synchronize());
}

// C6 row 5.
TYPED_TEST(CaptureConformance, AllocationWhileCapturingFailsAndTheCaptureIsDead) {
  const size_t before = this->device_->total_allocations();
  const absl::Status outcome =
      Capture(*this->stream_, [&](Stream&) -> absl::Status {
        EXPECT_STATUS(this->device_->Allocate(4, "late"), kFailedPrecondition, "late");
        EXPECT_STATUS(this->device_->AllocatePinned(4, "pinned"), kFailedPrecondition, "pinned");
        EXPECT_STATUS(this->device_->AllocateProtected(4, "protected"), kFailedPrecondition, "protected");
        return absl::OkStatus();
      }).status();
  EXPECT_STATUS(outcome, kFailedPrecondition, "late");
  EXPECT_EQ(this->device_->total_allocations(), before);
  this->ExpectUsable();
}

// C6 row 5: refused on other threads too, but it is not the capturing thread's fault.
TYPED_TEST(CaptureConformance, AllocationOnAnotherThreadIsRefusedAndTheCaptureGoesOn) {
  DeviceBuffer x = this->MakeInts({0});
  EXPECT_OK(Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
    std::thread([&] {
      EXPECT_STATUS(this->device_->Allocate(4, "elsewhere"), kFailedPrecondition, "elsewhere");
    }).join();
    return this->AddOne(stream, x);
  }));
  this->ExpectUsable();
}

// C6 row 6. The diamond 0 -> {1, 2} -> 3: the same edges on all backends.
TYPED_TEST(CaptureConformance, ForkAndJoinByEventsGiveTheSameEdgesOnAllBackends) {
  std::unique_ptr<Stream> side = this->MakeStream();
  std::unique_ptr<Event> fork = this->MakeEvent();
  std::unique_ptr<Event> join = this->MakeEvent();
  DeviceBuffer x = this->MakeInts({0, 0, 0});
  int* address = x.As<int>().address();
  ASSERT_OK_AND_ASSIGN(
      std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
        PRISTINE_RETURN_IF_ERROR(Launch(stream, kAddOne, {address, 1}));
        PRISTINE_RETURN_IF_ERROR(stream.Record(*fork));
        PRISTINE_RETURN_IF_ERROR(side->Wait(*fork));
        EXPECT_TRUE(side->capturing());
        EXPECT_EQ(this->device_->capturing_streams(), 2);
        PRISTINE_RETURN_IF_ERROR(Launch(*side, kCopyInts, {address + 1, address, 1}));
        PRISTINE_RETURN_IF_ERROR(stream.Copy(AsWritableBytes(x.As<int>().Sub(2, 1)), AsBytes(x.As<int>().Sub(0, 1))));
        PRISTINE_RETURN_IF_ERROR(side->Record(*join));
        PRISTINE_RETURN_IF_ERROR(stream.Wait(*join));
        return Launch(stream, kAddOne, {address, 3});
      }));
  EXPECT_FALSE(side->capturing());
  EXPECT_EQ(Names(*graph), (std::vector<std::string>{"add_one", "copy_ints", "copy", "add_one"}));
  EXPECT_EQ(graph->edges(), (std::vector<GraphEdge>{{0, 1}, {0, 2}, {1, 3}, {2, 3}}));
  EXPECT_EQ(graph->nodes()[0].kind, GraphNode::Kind::kKernel);
  EXPECT_EQ(graph->nodes()[2].kind, GraphNode::Kind::kCopy);
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<GraphExec> exec, graph->Instantiate());
  ASSERT_OK(exec->Launch(*this->stream_));
  EXPECT_EQ(this->Read(x), (std::vector<int>{2, 2, 2}));
  this->ExpectUsable();
}

// Waiting for what one depends on anyway adds an edge that a longer path implies.
TYPED_TEST(CaptureConformance, ImpliedEdgesAreLeftOut) {
  std::unique_ptr<Stream> side = this->MakeStream();
  std::unique_ptr<Event> early = this->MakeEvent();
  std::unique_ptr<Event> late = this->MakeEvent();
  DeviceBuffer x = this->MakeInts({0});
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
                         PRISTINE_RETURN_IF_ERROR(this->AddOne(stream, x));
                         PRISTINE_RETURN_IF_ERROR(stream.Record(*early));
                         PRISTINE_RETURN_IF_ERROR(this->AddOne(stream, x));
                         PRISTINE_RETURN_IF_ERROR(stream.Record(*late));
                         PRISTINE_RETURN_IF_ERROR(side->Wait(*early));
                         PRISTINE_RETURN_IF_ERROR(side->Wait(*late));
                         PRISTINE_RETURN_IF_ERROR(this->AddOne(*side, x));
                         PRISTINE_RETURN_IF_ERROR(side->Record(*late));
                         return stream.Wait(*late);
                       }));
  EXPECT_EQ(graph->edges(), (std::vector<GraphEdge>{{0, 1}, {1, 2}}));
}

// C6 row 6.
TYPED_TEST(CaptureConformance, AnUnjoinedForkFailsTheCapture) {
  std::unique_ptr<Stream> side = this->MakeStream();
  std::unique_ptr<Event> fork = this->MakeEvent();
  DeviceBuffer x = this->MakeInts({0});
  const absl::Status outcome = Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
                                 PRISTINE_RETURN_IF_ERROR(this->AddOne(stream, x));
                                 PRISTINE_RETURN_IF_ERROR(stream.Record(*fork));
                                 PRISTINE_RETURN_IF_ERROR(side->Wait(*fork));
                                 return this->AddOne(*side, x);
                               }).status();
  EXPECT_STATUS(outcome, kFailedPrecondition, "join");
  EXPECT_FALSE(side->capturing());
  ASSERT_OK(this->AddOne(*side, x));  // runs, is not recorded
  ASSERT_OK(side->Synchronize());
  EXPECT_EQ(this->Read(x), std::vector<int>{1});
  this->ExpectUsable();
}

TYPED_TEST(CaptureConformance, AWaitForWorkOutsideTheCaptureFails) {
  std::unique_ptr<Stream> side = this->MakeStream();
  std::unique_ptr<Event> event = this->MakeEvent();
  ASSERT_OK(side->Record(*event));
  const absl::Status outcome = Capture(*this->stream_, [&](Stream& stream) { return stream.Wait(*event); }).status();
  EXPECT_EQ(outcome.code(), absl::StatusCode::kFailedPrecondition) << outcome;
  EXPECT_OK(side->Synchronize());
  this->ExpectUsable();
}

// C6 row 11.
TYPED_TEST(CaptureConformance, AFailingBodyLeavesTheStreamUsable) {
  DeviceBuffer x = this->MakeInts({0});
  EXPECT_STATUS(Capture(*this->stream_,
                        [&](Stream& stream) -> absl::Status {
                          PRISTINE_RETURN_IF_ERROR(this->AddOne(stream, x));
                          return absl::AbortedError("no");
                        }),
                kAborted, "no");
  EXPECT_EQ(this->Read(x), std::vector<int>{0});
  this->ExpectUsable();
}

// C6 row 11, with an engine that uses exceptions.
TYPED_TEST(CaptureConformance, AThrowingBodyLeavesTheStreamUsable) {
  DeviceBuffer x = this->MakeInts({0});
  EXPECT_THROW(Capture(*this->stream_,
                       [&](Stream& stream) -> absl::Status {
                         PRISTINE_RETURN_IF_ERROR(this->AddOne(stream, x));
                         throw std::runtime_error("thrown");
                       })
                   .IgnoreError(),
               std::runtime_error);
  this->ExpectUsable();
}

TYPED_TEST(CaptureConformance, ANestedCaptureIsRefusedAndTheOuterOneGoesOn) {
  DeviceBuffer x = this->MakeInts({0});
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
                         EXPECT_STATUS(Capture(stream, [](Stream&) { return absl::OkStatus(); }), kFailedPrecondition,
                                       "already");
                         return this->AddOne(stream, x);
                       }));
  EXPECT_EQ(graph->nodes().size(), 1u);
}

TYPED_TEST(CaptureConformance, AnEmptyGraphLaunches) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> graph, Capture(*this->stream_, [](Stream&) { return absl::OkStatus(); }));
  EXPECT_TRUE(graph->nodes().empty());
  EXPECT_TRUE(graph->edges().empty());
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<GraphExec> exec, graph->Instantiate());
  EXPECT_OK(exec->Launch(*this->stream_));
  EXPECT_OK(this->stream_->Synchronize());
}

TYPED_TEST(CaptureConformance, NodesHaveNamesAndKindsInTheOrderRecorded) {
  DeviceBuffer x = this->MakeInts({0, 0});
  ASSERT_OK_AND_ASSIGN(PinnedBuffer host, this->device_->AllocatePinned(2 * sizeof(int), "host"));
  const DeviceSpan<std::byte> bytes = AsWritableBytes(x.As<int>());
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Graph> graph, Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
                         PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(bytes, {host.host(), 8}));
                         PRISTINE_RETURN_IF_ERROR(this->AddOne(stream, x));
                         PRISTINE_RETURN_IF_ERROR(stream.Fill(bytes, std::byte{0}));
                         PRISTINE_RETURN_IF_ERROR(stream.CopyToHost({host.host(), 8}, bytes));
                         return stream.Copy({}, {});  // no node
                       }));
  EXPECT_EQ(Names(*graph), (std::vector<std::string>{"copy_from_host", "add_one", "fill", "copy_to_host"}));
  EXPECT_EQ(graph->edges(), (std::vector<GraphEdge>{{0, 1}, {1, 2}, {2, 3}}));
  const std::vector<GraphNode>& nodes = graph->nodes();
  EXPECT_EQ(nodes[0].kind, GraphNode::Kind::kCopy);
  EXPECT_EQ(nodes[1].kind, GraphNode::Kind::kKernel);
  EXPECT_EQ(nodes[2].kind, GraphNode::Kind::kFill);
  EXPECT_EQ(nodes[3].kind, GraphNode::Kind::kCopy);
  for (const GraphNode& node : nodes) {
    EXPECT_FALSE(node.foreign) << node.name;
    EXPECT_EQ(node.native != nullptr, this->device_->backend() == Backend::kCuda) << node.name;
  }
  EXPECT_EQ(graph->ToDot("a \"step\""),
            "digraph \"a \\\"step\\\"\" {\n"
            "  node [shape=box];\n"
            "  n0 [label=\"copy_from_host\"];\n"
            "  n1 [label=\"add_one\"];\n"
            "  n2 [label=\"fill\"];\n"
            "  n3 [label=\"copy_to_host\"];\n"
            "  n0 -> n1;\n"
            "  n1 -> n2;\n"
            "  n2 -> n3;\n"
            "}\n");
}

TYPED_TEST(CaptureConformance, TheHeadOfACaptureIsKnown) {
  DeviceBuffer x = this->MakeInts({0});
  EXPECT_STATUS(this->stream_->AtCaptureHead(), kFailedPrecondition, "not capturing");
  EXPECT_OK(Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
    EXPECT_TRUE(*stream.AtCaptureHead());
    PRISTINE_RETURN_IF_ERROR(this->AddOne(stream, x));
    EXPECT_FALSE(*stream.AtCaptureHead());
    return absl::OkStatus();
  }));
}

TYPED_TEST(CaptureConformance, LaunchingAGraphIntoACaptureIsRefused) {
  DeviceBuffer x = this->MakeInts({0});
  std::unique_ptr<GraphExec> exec = this->MakeExec([&](Stream& stream) { return this->AddOne(stream, x); });
  EXPECT_STATUS(Capture(*this->stream_, [&](Stream& stream) { return exec->Launch(stream); }), kFailedPrecondition,
                "capturing");
  this->ExpectUsable();
}

TYPED_TEST(CaptureConformance, OtherStreamsWorkDuringACapture) {
  std::unique_ptr<Stream> other = this->MakeStream();
  DeviceBuffer x = this->MakeInts({0, 0});
  ASSERT_OK(Capture(*this->stream_, [&](Stream& stream) -> absl::Status {
    PRISTINE_RETURN_IF_ERROR(this->AddOne(stream, x));
    return Launch(*other, kAddOne, {x.As<int>().address() + 1, 1});
  }));
  ASSERT_OK(other->Synchronize());
  EXPECT_EQ(this->Read(x), (std::vector<int>{0, 1}));
}

}  // namespace
}  // namespace pristine::testing
