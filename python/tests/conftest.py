"""What the tests share. They run against the installed package: `./run wheel --test`."""

import pathlib
import sys

import numpy as np
import pytest

import pristine

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


class Rig:
    """A manager with one refilled array, `lengths` [4], on the Host device."""

    def __init__(self, **options: object) -> None:
        self.device = pristine.Device("host")
        self.manager = pristine.BufferManager(self.device, **options)
        self.memory = np.zeros(4, np.int32)
        self.lengths = self.adopt("lengths", self.memory)

    def adopt(self, name: str, memory: np.ndarray, **spec: object) -> pristine.Buffer:
        spec = {"role": "refilled", "kind": "length", "axis": pristine.Axis.requests(), "limit": 100, **spec}
        return self.manager.adopt(name, memory, **spec)

    def arm(self, *values: int, bucket: int = 4) -> None:
        self.manager.begin_step(bucket, len(values))
        self.manager.refill(self.lengths, ints(*values))
        self.manager.before_replay(bucket, len(values))

    def run(self, bucket: int = 4) -> list[int]:
        """The prologue, eagerly; then what a kernel would read."""
        self.manager.record_prologue(bucket)
        self.device.synchronize()
        return self.memory.tolist()


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.manager.seal()
    return rig
