"""python/examples/decode_engine.py in numpy on the Host device: the same sequence, the same bug, the same cure.

A launch on Host is the eager prologue and then the body; numpy is the body.
"""

import ast
import functools
import pathlib

import numpy as np
from decode_steps import BUCKETS, DIM, MAX_TOKENS, SLOTS, steps, wrong_rows

import pristine

STEPS = 300


class Engine:
    def init(self):
        self.kv = np.zeros((SLOTS, DIM), np.float32)
        self.x = np.zeros((BUCKETS[-1], DIM), np.float32)
        self.slots = np.zeros(BUCKETS[-1], np.int32)
        self.kv_indptr = np.zeros(BUCKETS[-1] + 1, np.int32)
        self.kv_indices = np.zeros(MAX_TOKENS, np.int32)

    def forward(self, bucket):
        self.kv[self.slots[:bucket]] = self.x[:bucket]
        output = np.zeros((bucket, DIM))
        row = np.searchsorted(self.kv_indptr[1 : bucket + 1], np.arange(MAX_TOKENS), side="right")
        for r in range(bucket):
            if np.any(row == r):
                output[r] = self.kv[self.kv_indices[row == r]].mean(axis=0, dtype=np.float64)
        return output

    def prepare(self, step):
        self.slots[: len(step.slots)] = step.slots
        self.kv_indptr[: len(step.kv_indptr)] = step.kv_indptr
        self.kv_indices[: len(step.kv_indices)] = step.kv_indices

    def replay(self, step):
        self.x[: len(step.x)] = step.x
        return self.forward(step.bucket)[: len(step.x)]


class CuredEngine(Engine):
    def init(self):
        super().init()
        self.manager = pristine.BufferManager(pristine.Device("host"), check="always")
        adopt = functools.partial(self.manager.adopt, role="refilled")
        slots = adopt("slots", self.slots, kind="slot", axis=pristine.Axis.requests(), limit=SLOTS, negative_ok=False)
        indptr = adopt("kv_indptr", self.kv_indptr, kind="indptr", axis=pristine.Axis.requests_plus_one(), limit=MAX_TOKENS)
        indices = adopt("kv_indices", self.kv_indices, kind="page_table", axis=pristine.Axis.pages(), limit=SLOTS)
        self.refilled = slots, indptr, indices
        self.manager.seal()

    def forward(self, bucket):
        self.manager.record_prologue(bucket)
        self.manager.device.synchronize()
        return super().forward(bucket)

    def prepare(self, step):
        self.manager.begin_step(step.bucket, len(step.slots))
        for buffer, values in zip(self.refilled, (step.slots, step.kv_indptr, step.kv_indices)):
            self.manager.refill(buffer, values)
        self.manager.before_replay(step.bucket, len(step.slots))


def run(engine):
    engine.init()
    wrong = 0
    for step in steps(STEPS):
        engine.prepare(step)
        wrong += wrong_rows(engine.replay(step), step)
    return wrong


def test_as_engines_have_it_rows_are_silently_wrong():
    assert run(Engine()) > STEPS / 10


def test_with_pristine_no_row_is_wrong():
    engine = CuredEngine()
    assert run(engine) == 0
    assert engine.manager.verify() == []
    assert engine.manager.stats() == (STEPS, 0, 0, 0, 0, 0)


def test_the_cure_of_the_example_is_fifteen_lines():
    """Counted as the example counts them, without PyTorch."""
    path = pathlib.Path(__file__).parent.parent / "examples" / "decode_engine.py"
    source = path.read_text()
    tree = ast.parse(source)
    (cured,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "CuredEngine")
    frame = ("class ", "def ", "super()", "return super()", "#", '"""')
    lines = [line.strip() for line in source.splitlines()[cured.lineno - 1 : cured.end_lineno]]
    lines = [line for line in lines if line and not line.startswith(frame)]
    assert len(lines) + len(["import functools", "import pristine"]) == 15, lines
