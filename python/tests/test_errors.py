"""A class per status code, with name and value in the message; contract errors, which stand until they are cleared."""

import threading

import numpy as np
import pytest
import tvm_ffi
from conftest import Rig, ints

import pristine
from pristine import Axis


def test_all_classes_are_errors_of_pristine():
    classes = [getattr(pristine, name) for name in pristine.__all__ if name.endswith("Error")]
    assert len(classes) == 12
    assert all(issubclass(each, pristine.Error) for each in classes)


def test_no_status_is_outside_the_hierarchy():
    codes = """CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED
        RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS
        UNAUTHENTICATED""".split()
    for code in codes:  # as status.h names them
        error = tvm_ffi.core.Error(f"pristine.{code}", "message", "").py_error()
        assert isinstance(error, pristine.Error) and str(error) == "message"


def test_a_lost_device_has_a_class():
    error = tvm_ffi.core.Error("pristine.ABORTED", "message", "").py_error()
    assert isinstance(error, pristine.DeviceLostError)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (np.zeros((4, 2), np.int32)[:, 0], r"adopt of x: the tensor has shape \[4\] and strides \[2\]; it must be"),
        (np.zeros(4, np.int32)[::-1], r"adopt of x: the tensor has shape \[4\] and strides \[-1\]"),
        (np.zeros(0, np.int32), "adopt of x: the tensor has no elements"),
        (np.zeros(4, np.int64), r"buffer x \(length\): elements have 8 bytes; this kind needs int32"),
        (np.zeros(4, np.float32), r"buffer x \(length\): elements have 4 bytes; this kind needs int32"),
        ([0, 0, 0, 0], "adopt of x: a list has no __dlpack__"),
        (None, "adopt of x: a NoneType has no __dlpack__"),
    ],
)
def test_a_wrong_tensor_is_an_invalid_argument_with_name_and_value(memory, message):
    rig = Rig()
    with pytest.raises(pristine.InvalidArgumentError, match=message):
        rig.adopt("x", memory)
    rig.adopt("x", np.zeros(4, np.int32))  # nothing of the refused one is left


def test_a_tensor_elsewhere_is_an_invalid_argument():
    class OnGpu:  # what DLPack says of a tensor on a GPU, without one
        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, **_):
            raise BufferError("no GPU here")

    with pytest.raises(pristine.InvalidArgumentError, match="adopt of x: its memory cannot be shared .*no GPU here"):
        Rig().adopt("x", OnGpu())


def test_read_only_memory_is_not_adopted():
    memory = np.zeros(4, np.int32)
    memory.flags.writeable = False
    with pytest.raises(pristine.InvalidArgumentError, match="adopt of x: .*readonly"):
        Rig().adopt("x", memory)


@pytest.mark.parametrize(
    ("original", "message"),
    [
        (np.zeros(3, np.int32), "adopt of x: the original has 3 elements, the tensor 4"),
        (np.zeros(4, np.int64), "adopt of x, original: the tensor's dtype is int64; the buffer holds int32"),
        (np.full(4, 101, np.int32), "buffer x .*101"),
        ("text", "adopt of x, original: a str has no __dlpack__"),
    ],
)
def test_a_wrong_original_is_an_invalid_argument(original, message):
    with pytest.raises(pristine.InvalidArgumentError, match=message):
        Rig().adopt("x", np.zeros(4, np.int32), original=original)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(2, np.int64), "refill of lengths: the tensor's dtype is int64; the buffer holds int32"),
        (np.zeros(2, np.uint32), "refill of lengths: the tensor's dtype is uint32; the buffer holds int32"),
        (np.zeros(3, np.int32), "refill of lengths with 3 elements; extent .2 requests, 2 tokens. has 2"),
        (np.zeros((2, 2), np.int32)[:, 0], "refill of lengths: .* must be contiguous"),
        ((1, 2), "refill of lengths: a tuple has no __dlpack__"),
    ],
)
def test_wrong_values_are_an_invalid_argument_and_the_step_goes_on(rig, values, message):
    rig.manager.begin_step(4, 2)
    with pytest.raises(pristine.InvalidArgumentError, match=message):
        rig.manager.refill(rig.lengths, values)
    rig.manager.refill(rig.lengths, ints(1, 2))
    rig.manager.before_replay(4, 2)
    assert rig.run() == [1, 2, 0, 0]


def test_codes_map_to_classes(rig):
    m = rig.manager
    for option in ({"check": "never"}, {"restore": "no"}, {"on_violation": "abort"}, {"staging_slots": 1},
                   {"sample_every": 0}, {"late_refill_bytes": -1}, {"parameter_bytes": -1}, {"staging_slots": 2**40}):
        with pytest.raises(pristine.InvalidArgumentError, match=next(iter(option))):
            pristine.BufferManager(rig.device, **option)
    with pytest.raises(pristine.AlreadyExistsError, match="lengths"):
        rig.adopt("lengths", np.zeros(4, np.int32))
    with pytest.raises(pristine.OutOfRangeError, match=r"\{5 requests, 5 tokens\}"):
        m.begin_step(4, 5)
    with pytest.raises(pristine.InvalidArgumentError, match=str(2**40)):
        m.begin_step(2**40, 1)
    with pytest.raises(pristine.InvalidArgumentError, match='role is "king"; one of constant, restored, refilled'):
        rig.adopt("x", np.zeros(4, np.int32), role="king")
    with pytest.raises(pristine.InvalidArgumentError, match=str(2**40)):
        rig.adopt("x", np.zeros(4, np.int32), limit=2**40)
    with pytest.raises(pristine.InvalidArgumentError, match="stream 5 on host"):
        m.record_prologue(4, stream=5)
    with pytest.raises(pristine.InvalidArgumentError, match="stream is a str"):
        m.verify(stream="s")
    with pytest.raises(pristine.ResourceExhaustedError, match="staging slot"):
        rig.adopt("x", np.zeros(1 << 20, np.int32))
    with pytest.raises(pristine.InvalidArgumentError, match="overlaps buffer lengths"):
        rig.adopt("x", rig.memory[1:3])
    assert m.contract_error is None
    rig.arm(1)
    assert rig.run() == [1, 0, 0, 0]


def test_a_buffer_of_another_manager_is_an_invalid_argument(rig):
    other = Rig().lengths
    rig.manager.begin_step(4, 1)
    for call in (rig.manager.keep, rig.manager.generation, lambda b: rig.manager.refill(b, ints(1))):
        with pytest.raises(pristine.InvalidArgumentError, match="no buffer of this manager"):
            call(other)
        with pytest.raises(pristine.InvalidArgumentError, match="no buffer of this manager"):
            call(0)


# --- contract errors ---


class Graph:
    """What attach_graph asks a captured graph for."""

    def raw_cuda_graph(self):
        return 0

    def raw_cuda_graph_exec(self):
        return 0


def test_a_graph_that_nobody_captured_is_not_attached(rig):
    with pytest.raises(pristine.NotFoundError, match="no exec attached"):
        rig.manager.detach_graph(4)
    with pytest.raises(pristine.FailedPreconditionError, match="no capture recorded the prologue"):
        rig.manager.attach_graph(4, Graph())


def calls(rig):
    """Every call of a manager but the accessors."""
    m = rig.manager
    return [
        lambda: rig.adopt("more", np.zeros(4, np.int32)),
        m.seal,
        lambda: m.begin_step(4, 1),
        lambda: m.refill(rig.lengths, ints(1)),
        lambda: m.keep(rig.lengths),
        m.wait_for_slot,
        lambda: m.record_prologue(4),
        lambda: m.before_replay(4, 1),
        m.restore,
        lambda: m.restore_all(4),
        m.poll,
        m.verify,
        lambda: m.signature_hash(4),
        lambda: m.attach_graph(4, Graph()),
        lambda: m.detach_graph(4),
    ]


def test_a_broad_except_cannot_swallow_a_contract_error(rig):
    rig.manager.begin_step(4, 1)
    try:
        rig.manager.before_replay(4, 1)  # the refill was forgotten
    except Exception:
        pass
    for call in calls(rig):
        with pytest.raises(pristine.FailedPreconditionError, match="lengths was last refilled in step 0") as error:
            call()
        assert "raised first by before_replay at" in str(error.value) and "test_errors.py" in str(error.value)
        assert str(error.value).count("raised first by") == 1
    assert "lengths" in rig.manager.contract_error
    assert rig.manager.stats().replays == 0 and rig.manager.generation(rig.lengths) == 0  # accessors still answer

    assert "lengths" in rig.manager.clear_error()
    assert rig.manager.contract_error is None and rig.manager.clear_error() is None
    rig.arm(5)
    assert rig.run() == [5, 0, 0, 0]


def test_every_call_is_under_contract_and_it_is_that_which_makes_an_error_stand(rig):
    answers = {"clear_error", "contract_error", "device", "generation", "stats"}
    public = {name for name in vars(pristine.BufferManager) if not name.startswith("_")}
    assert len(public - answers) == len(calls(rig))
    assert all(hasattr(getattr(pristine.BufferManager, name), "__wrapped__") for name in public - answers)
    with pytest.raises(pristine.FailedPreconditionError):
        rig.manager.before_replay(4, 1)
    assert pristine.BufferManager.poll.__wrapped__(rig.manager) == []  # without the contract it would go on


def test_a_stale_plan_is_a_contract_error_with_both_generations():
    rig = Rig()
    plan = rig.manager.adopt("plan", np.zeros(2, np.int32), role="refilled", derived_from=[rig.lengths])
    rig.manager.seal()
    rig.manager.begin_step(4, 1)
    rig.manager.refill(rig.lengths, ints(1))
    rig.manager.refill(plan, ints(1, 1))
    rig.manager.refill(rig.lengths, ints(2))
    message = "buffer plan was made from lengths generation 1, which is now 2"
    with pytest.raises(pristine.FailedPreconditionError, match=message):
        rig.manager.before_replay(4, 1)
    with pytest.raises(pristine.FailedPreconditionError, match=message):
        rig.manager.poll()


@pytest.mark.parametrize(
    "break_it",
    [
        lambda rig: rig.manager.before_replay(4, 1),  # no step
        lambda rig: rig.manager.refill(rig.lengths, ints(1)),  # no step
        lambda rig: (rig.manager.begin_step(2, 1), rig.manager.before_replay(4, 1)),  # another bucket
        lambda rig: (rig.manager.begin_step(4, 2), rig.manager.before_replay(4, 1)),  # another extent
        lambda rig: (rig.manager.begin_step(4, 1), rig.manager.keep(rig.lengths)),  # never refilled
    ],
)
def test_each_broken_contract_stands(rig, break_it):
    with pytest.raises(pristine.FailedPreconditionError):
        break_it(rig)
    with pytest.raises(pristine.FailedPreconditionError, match="raised first by"):
        rig.manager.begin_step(4, 1)
    rig.manager.clear_error()
    rig.arm(3)
    assert rig.run() == [3, 0, 0, 0]


def test_a_step_before_the_first_seal_is_a_contract_error():
    rig = Rig()
    with pytest.raises(pristine.FailedPreconditionError, match="nothing is sealed yet"):
        rig.manager.begin_step(4, 1)
    with pytest.raises(pristine.FailedPreconditionError, match="raised first by begin_step"):
        rig.manager.seal()


def test_a_second_thread_is_a_contract_error_and_the_interpreter_runs_on_during_blocking_calls():
    """verify and seal release the GIL: otherwise nothing could happen while they run."""
    rig = Rig()
    big = np.zeros(64 << 20, np.uint8)
    rig.manager.adopt("big", big)
    rig.manager.seal()
    refused, ticks = [], 0
    for _ in range(20):
        thread = threading.Thread(target=lambda: rig.manager.verify() if rig.manager.contract_error is None else None)
        thread.start()
        while thread.is_alive():
            ticks += 1
            try:
                rig.manager.poll()
            except pristine.FailedPreconditionError as error:
                refused.append(str(error))
                break
        thread.join()
        if refused:
            break
    assert ticks > 0 and refused and "another thread is inside a call of this BufferManager" in refused[0]
    with pytest.raises(pristine.FailedPreconditionError, match="raised first by poll"):
        rig.manager.verify()
    rig.manager.clear_error()
    assert rig.manager.verify() == []
