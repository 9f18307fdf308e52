"""A small continuous batch: what a scheduler hands to each decode step, and what the step must compute.

Attention is uniform here (the mean over a request's KV), so that the truth is one line of numpy and a wrong page,
length or row shows at once. Page size 1: a page is a slot of the KV pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BUCKETS = (2, 4, 8)
MAX_TOKENS = 256  # KV of all requests of a step
SLOTS = 320  # of the KV pool; slot 0 is the dummy: finite, never handed out
DIM = 32


@dataclass
class Step:
    bucket: int
    x: np.ndarray  # [requests, DIM] float32: the new token of each request
    slots: np.ndarray  # [requests] int32: where its KV goes
    kv_indptr: np.ndarray  # [requests + 1] int32
    kv_indices: np.ndarray  # [kv_indptr[-1]] int32: the slots of each request, the new one included
    truth: np.ndarray  # [requests, DIM] float64


def steps(count: int, seed: int = 7) -> Iterator[Step]:
    """`count` steps. Requests come, grow by one token per step, and go; their slots are handed out again at once."""
    random = np.random.default_rng(seed)
    free = list(range(SLOTS - 1, 0, -1))  # last freed, first used, as real allocators have it
    running: list[tuple[list[int], list[np.ndarray]]] = []
    for _ in range(count):
        for index in reversed(range(len(running))):
            slots, _ = running[index]
            if random.random() < 0.15 or len(slots) == MAX_TOKENS // BUCKETS[-1]:
                free += running.pop(index)[0]
        while not running or (len(running) < BUCKETS[-1] and random.random() < 0.4):
            running.append(([], []))
        for slots, values in running:
            slots.append(free.pop())
            values.append(random.standard_normal(DIM).astype(np.float32))
        yield Step(
            bucket=next(b for b in BUCKETS if b >= len(running)),
            x=np.stack([values[-1] for _, values in running]),
            slots=np.array([slots[-1] for slots, _ in running], np.int32),
            kv_indptr=np.cumsum([0] + [len(slots) for slots, _ in running], dtype=np.int32),
            kv_indices=np.concatenate([np.array(slots, np.int32) for slots, _ in running]),
            truth=np.stack([np.mean(np.stack(values), axis=0, dtype=np.float64) for _, values in running]),
        )


def wrong_rows(output: np.ndarray, step: Step) -> int:
    """Rows that differ from the truth by more than rounding."""
    return int(np.sum(~np.all(np.abs(output.astype(np.float64) - step.truth) < 1e-4, axis=1)))
