"""The same with PyTorch on a GPU: inside torch.cuda.graph, on PyTorch's current stream. Skipped without one."""

import gc

import pytest

import pristine

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if pristine.__cuda__ is None:
    pytest.skip("the wheel was built without CUDA", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


class Rig:
    """lengths [4], refilled; the captured graph copies them to `seen` and adds one to `work`, which is restored."""

    def __init__(self, **options):
        self.manager = pristine.BufferManager(pristine.Device("cuda"), **options)
        self.memory = torch.full((4,), 9, dtype=torch.int32, device="cuda")
        self.work = torch.tensor([1, 2], dtype=torch.int32, device="cuda")
        self.seen = torch.zeros(4, dtype=torch.int32, device="cuda")
        self.lengths = self.manager.adopt(
            "lengths", self.memory, role="refilled", kind="length", axis=pristine.Axis.requests(), limit=100
        )
        self.manager.adopt("work", self.work, role="restored")
        self.manager.seal()

    def capture(self, **options):
        self.graph = torch.cuda.CUDAGraph(**options)
        with torch.cuda.graph(self.graph):
            self.manager.record_prologue(4)
            self.seen.copy_(self.memory)
            self.work.add_(1)

    def arm(self, *values):
        self.manager.wait_for_slot()
        self.manager.begin_step(4, len(values))
        self.manager.refill(self.lengths, ints(*values))
        self.manager.before_replay(4, len(values))


@pytest.fixture
def rig():
    rig = Rig()
    rig.capture()
    return rig


def test_a_captured_prologue_serves_each_replay(rig):
    for value in range(1, 40):
        rig.arm(value, value + 1)
        rig.graph.replay()
        assert rig.seen.tolist() == [value, value + 1, 0, 0]
        assert rig.work.tolist() == [2, 3]
    assert rig.manager.poll() == [] and rig.manager.verify() == []
    assert rig.manager.stats().replays == 39 and rig.manager.stats().neutralised == 0


def test_steps_in_flight_take_their_own_values(rig):
    seen = []
    for value in range(100):
        rig.arm(value % 100)
        rig.graph.replay()
        seen.append(rig.seen.clone())
    assert [int(each[0]) for each in seen] == [value % 100 for value in range(100)]
    assert rig.manager.verify() == []


def test_small_steps_ride_in_the_parameters_of_an_attached_graph():
    rig = Rig()
    rig.capture(keep_graph=True)
    rig.graph.instantiate()
    rig.manager.attach_graph(4, rig.graph)
    seen = []
    for value in range(100):
        rig.arm(value % 100)
        rig.graph.replay()
        seen.append(rig.seen.clone())
    assert [int(each[0]) for each in seen] == [value % 100 for value in range(100)]
    rig.manager.detach_graph(4)
    rig.arm(7, 8)
    rig.graph.replay()
    assert rig.seen.tolist() == [7, 8, 0, 0]
    assert rig.manager.verify() == [] and rig.manager.stats().neutralised == 0


def test_any_current_stream_is_used(rig):
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for value in (3, 4):
                rig.arm(value)
                rig.graph.replay()
        stream.synchronize()
        assert rig.seen.tolist() == [4, 0, 0, 0]
    assert rig.manager.verify() == []


def test_a_replay_that_nobody_armed_is_harmless_and_reported(rig):
    rig.graph.replay()
    torch.cuda.synchronize()
    assert rig.seen.tolist() == [0, 0, 0, 0]
    (report,) = rig.manager.poll()
    assert report.kind == "launched without BeforeReplay" and report.bucket == (4, 4)


def test_the_prologue_must_be_the_first_node():
    rig = Rig()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rig.work.add_(1)
        with pytest.raises(pristine.FailedPreconditionError, match="it must be the first"):
            rig.manager.record_prologue(4)
    with pytest.raises(pristine.FailedPreconditionError, match="raised first by record_prologue"):
        rig.manager.poll()


def test_pollution_of_a_constant_is_healed_and_named():
    rig = Rig(check="always")
    scale = torch.full((3,), 16.0, dtype=torch.bfloat16, device="cuda")
    rig.manager.adopt("scale", scale)
    rig.manager.seal()
    rig.capture()
    scale[1] = 7
    rig.arm(5)
    rig.graph.replay()
    torch.cuda.synchronize()
    assert scale.tolist() == [16.0] * 3
    (report,) = rig.manager.poll()
    assert (report.kind, report.buffer, report.index) == ("polluted", "scale", 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(4, dtype=torch.int32), "adopt of x: the tensor is in host memory; .* is cuda:0"),
        (lambda: torch.zeros(4, 2, dtype=torch.int32, device="cuda")[:, 0], "must be contiguous"),
        (lambda: torch.zeros(4, dtype=torch.int64, device="cuda"), "needs int32"),
        (lambda: torch.zeros(0, dtype=torch.int32, device="cuda"), "no elements"),
    ],
)
def test_wrong_tensors_are_invalid_arguments(make, message):
    rig = Rig()
    with pytest.raises(pristine.InvalidArgumentError, match=message):
        rig.manager.adopt("x", make(), kind="length")


def test_values_on_the_gpu_are_an_invalid_argument(rig):
    rig.manager.begin_step(4, 2)
    with pytest.raises(pristine.InvalidArgumentError, match="in cuda:0; values are taken from host memory"):
        rig.manager.refill(rig.lengths, ints(1, 2).cuda())
    rig.manager.refill(rig.lengths, ints(1, 2).pin_memory())
    rig.manager.before_replay(4, 2)
    rig.graph.replay()
    assert rig.seen.tolist() == [1, 2, 0, 0]


def test_adopt_sees_what_the_current_stream_has_queued():
    manager = pristine.BufferManager(pristine.Device("cuda"))
    for _ in range(10):
        memory = torch.zeros(1 << 20, dtype=torch.int32, device="cuda")
        torch.cuda._sleep(1_000_000)
        memory.fill_(5)
        manager.adopt(f"constant {_}", memory)
    manager.seal()
    assert manager.verify() == []


def test_memory_goes_back_to_pytorch_with_the_manager():
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    manager = pristine.BufferManager(pristine.Device("cuda"))
    manager.adopt("big", torch.zeros(1 << 20, device="cuda"))
    gc.collect()
    assert torch.cuda.memory_allocated() >= before + (4 << 20)
    del manager
    gc.collect()
    assert torch.cuda.memory_allocated() == before
