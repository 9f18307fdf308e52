"""An engine's CUDA graph sequence in plain PyTorch, with the bug that engines have, and the lines that remove it.

    init:            preallocate what the captured kernels read
    capture:         one graph per batch bucket
    replay-prepare:  write this step's metadata into the preallocated arrays
    replay:          graph.replay()

The bug: replay-prepare writes the real rows only. The tail of `slots` and `kv_indptr` up to the bucket stays as an
earlier, larger batch left it. A padded row then stores its stale token into a slot that belongs to another request by
now, and the stale end of `kv_indptr` falls below the real part, where the kernel's binary search expects a rising
array. Nothing fails; real rows are silently wrong.

Prints both runs over the same requests. Exit code 0: the bug showed and the cure has no wrong row. Needs a GPU, PyTorch
and a wheel with CUDA.
"""

from __future__ import annotations

import functools
import inspect
import sys

import numpy as np
import torch
from decode_steps import BUCKETS, DIM, MAX_TOKENS, SLOTS, Step, steps, wrong_rows

import pristine


class Engine:
    """As engines have it."""

    def init(self) -> None:
        most = BUCKETS[-1]
        self.kv = torch.zeros(SLOTS, DIM, device="cuda")
        self.x = torch.zeros(most, DIM, device="cuda")
        self.slots = torch.zeros(most, dtype=torch.int32, device="cuda")
        self.kv_indptr = torch.zeros(most + 1, dtype=torch.int32, device="cuda")
        self.kv_indices = torch.zeros(MAX_TOKENS, dtype=torch.int32, device="cuda")
        self.token = torch.arange(MAX_TOKENS, dtype=torch.int32, device="cuda")
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def forward(self, bucket: int) -> torch.Tensor:
        """Appends the new tokens to the KV pool, then attends uniformly: the mean over each row's KV."""
        self.kv.index_copy_(0, self.slots[:bucket].long(), self.x[:bucket])
        row = torch.searchsorted(self.kv_indptr[1 : bucket + 1].contiguous(), self.token, right=True)
        total = torch.zeros(bucket + 1, DIM, device="cuda").index_add_(0, row, self.kv[self.kv_indices.long()])
        count = torch.zeros(bucket + 1, 1, device="cuda").index_add_(0, row, torch.ones(MAX_TOKENS, 1, device="cuda"))
        return total[:bucket] / count[:bucket].clamp(min=1)

    def capture(self, bucket: int) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.forward(bucket)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.forward(bucket)
        self.graphs[bucket] = graph, output

    def prepare(self, step: Step) -> None:
        self.slots[: len(step.slots)].copy_(torch.from_numpy(step.slots))
        self.kv_indptr[: len(step.kv_indptr)].copy_(torch.from_numpy(step.kv_indptr))
        self.kv_indices[: len(step.kv_indices)].copy_(torch.from_numpy(step.kv_indices))

    def replay(self, step: Step) -> np.ndarray:
        self.x[: len(step.x)].copy_(torch.from_numpy(step.x))
        graph, output = self.graphs[step.bucket]
        graph.replay()
        return output[: len(step.x)].cpu().numpy()


class CuredEngine(Engine):
    """The same, with what its kernels read owned by a manager."""

    def init(self) -> None:
        super().init()
        self.manager = pristine.BufferManager(pristine.Device("cuda"))
        adopt = functools.partial(self.manager.adopt, role="refilled")
        # Padded rows append to the dummy slot 0 (index_copy_ cannot skip one), and have no KV.
        slots = adopt("slots", self.slots, kind="slot", axis=pristine.Axis.requests(), limit=SLOTS, negative_ok=False)
        indptr = adopt("kv_indptr", self.kv_indptr, kind="indptr", axis=pristine.Axis.requests_plus_one(), limit=MAX_TOKENS)
        indices = adopt("kv_indices", self.kv_indices, kind="page_table", axis=pristine.Axis.pages(), limit=SLOTS)
        self.refilled = slots, indptr, indices
        self.manager.seal()

    def forward(self, bucket: int) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            self.manager.record_prologue(bucket)
        return super().forward(bucket)

    def prepare(self, step: Step) -> None:
        self.manager.begin_step(step.bucket, len(step.slots))
        for buffer, values in zip(self.refilled, (step.slots, step.kv_indptr, step.kv_indices)):
            self.manager.refill(buffer, values)
        self.manager.before_replay(step.bucket, len(step.slots))


def run(engine: Engine, count: int) -> tuple[int, int, int | None]:
    """Returns rows, wrong rows, and the first step with one."""
    engine.init()
    for bucket in reversed(BUCKETS):
        engine.capture(bucket)
    rows, wrong, first = 0, 0, None
    for number, step in enumerate(steps(count)):
        engine.prepare(step)
        bad = wrong_rows(engine.replay(step), step)
        rows, wrong = rows + len(step.x), wrong + bad
        first = number if bad and first is None else first
    return rows, wrong, first


def cure() -> list[str]:
    """The lines that the cure adds to an engine: two imports, and what CuredEngine does but for its frame."""
    frame = ("class ", "def ", "super()", "return super()", "#", '"""')
    lines = [line.strip() for line in inspect.getsource(CuredEngine).splitlines()]
    return ["import functools", "import pristine", *(x for x in lines if x and not x.startswith(frame))]


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}, pristine {pristine.__version__}")
    rows, wrong, first = run(Engine(), count)
    print(f"as engines have it: {count} steps, {wrong} of {rows} rows wrong, the first in step {first}")
    cured = CuredEngine()
    rows, left, _ = run(cured, count)
    violations = cured.manager.verify()
    stats = cured.manager.stats()
    print(f"with Pristine:      {count} steps, {left} of {rows} rows wrong; {stats.replays} replays, "
          f"{stats.neutralised} neutralised, {len(violations)} violations")
    for violation in violations:
        print(f"  {violation}")
    print(f"the cure: {len(cure())} lines")
    return 0 if wrong > 0 and left == 0 and not violations and stats.replays == count else 1


if __name__ == "__main__":
    sys.exit(main())
