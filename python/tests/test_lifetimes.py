"""Who keeps what alive."""

import gc
import weakref

import numpy as np
import pytest
from conftest import Rig, ints

import pristine


class Tracked(np.ndarray):
    """An array whose death can be watched."""


def tracked(count: int) -> tuple[Tracked, weakref.ref]:
    array = np.zeros(count, np.int32).view(Tracked)
    return array, weakref.ref(array)


def test_the_manager_keeps_adopted_tensors_and_gives_them_back():
    manager = pristine.BufferManager(pristine.Device("host"))
    array, alive = tracked(4)
    buffer = manager.adopt("lengths", array, role="refilled", kind="length", axis=pristine.Axis.requests())
    manager.seal()
    del array
    gc.collect()
    assert alive() is not None
    manager.begin_step(4, 1)
    manager.refill(buffer, ints(7))
    manager.before_replay(4, 1)
    manager.record_prologue(4)
    manager.device.synchronize()
    assert alive().tolist() == [7, 0, 0, 0]
    del manager
    gc.collect()
    assert alive() is not None, "a Buffer keeps its manager"
    del buffer
    gc.collect()
    assert alive() is None, "the DLPack deleter ran"


def test_a_refused_tensor_is_given_back_at_once():
    rig = Rig()
    array, alive = tracked(8)
    with pytest.raises(pristine.InvalidArgumentError):
        rig.adopt("x", array[::2])
    del array
    gc.collect()
    assert alive() is None


def test_values_and_originals_are_copied_before_the_call_returns():
    rig = Rig()
    original, original_alive = tracked(4)
    rig.adopt("more", np.zeros(4, np.int32), role="restored", original=original)
    rig.manager.seal()
    values, values_alive = tracked(2)
    rig.manager.begin_step(4, 2)
    values[:] = 5
    rig.manager.refill(rig.lengths, values)
    values[:] = 9
    del values, original
    gc.collect()
    assert values_alive() is None and original_alive() is None
    rig.manager.before_replay(4, 2)
    assert rig.run() == [5, 5, 0, 0]


def test_a_manager_that_dies_with_work_queued_waits_for_it():
    for _ in range(20):
        rig = Rig()
        rig.manager.seal()
        rig.arm(1, 2, 3, 4)
        rig.manager.record_prologue(4)
        memory = rig.memory
        del rig
        gc.collect()
        assert memory.tolist() == [1, 2, 3, 4]


def test_a_manager_keeps_its_device():
    manager = pristine.BufferManager(pristine.Device("host"))
    manager._device = None
    gc.collect()
    manager._device = pristine.Device("host")
    assert manager.verify() == []


def test_a_contract_error_keeps_no_frames():
    rig = Rig()
    rig.manager.seal()

    def swallowed() -> weakref.ref:
        local, alive = tracked(4)
        try:
            rig.manager.before_replay(4, len(local))
        except pristine.Error:
            pass
        return alive

    alive = swallowed()
    gc.collect()
    assert alive() is None and rig.manager.contract_error is not None
