"""What goes in and out of a manager."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

Role = Literal["constant", "restored", "refilled", "scratch"]
Kind = Literal["indptr", "length", "page_table", "slot", "position", "mask", "opaque"]


class DLPackTensor(Protocol):
    """numpy.ndarray, torch.Tensor, and whatever else exports its memory."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


class CapturedGraph(Protocol):
    """torch.cuda.CUDAGraph, from PyTorch 2.11 on."""

    def raw_cuda_graph(self) -> int: ...
    def raw_cuda_graph_exec(self) -> int: ...


class Extent(NamedTuple):
    """How large a step is: requests, and query tokens over all of them (in decode as many)."""

    requests: int
    tokens: int


ExtentLike = int | tuple[int, int] | Extent
"""A number of requests with one token each, or (requests, tokens)."""


def to_extent(value: ExtentLike) -> Extent:
    if isinstance(value, tuple):
        return Extent(int(value[0]), int(value[1]))
    return Extent(int(value), int(value))


class Axis(NamedTuple):
    """What elements are counted in: for a step of extent e in bucket b, [0, count(e)) are real, the rest is tail."""

    unit: str
    per: int = 1

    @classmethod
    def fixed(cls) -> Axis:
        """The whole array is real."""
        return cls("fixed")

    @classmethod
    def requests(cls, groups: int = 1) -> Axis:
        """groups * requests elements."""
        return cls("requests", groups)

    @classmethod
    def requests_plus_one(cls, groups: int = 1) -> Axis:
        """groups * requests + 1 elements."""
        return cls("requests_plus_one", groups)

    @classmethod
    def tokens(cls, per: int = 1) -> Axis:
        """per * tokens elements."""
        return cls("tokens", per)

    @classmethod
    def rows(cls, columns: int, groups: int = 1) -> Axis:
        """groups * requests rows of `columns` elements."""
        return cls("requests", groups * columns)

    @classmethod
    def pages(cls) -> Axis:
        """As many as each refill gives; the tail goes on to the end of the array."""
        return cls("pages")


@dataclass(frozen=True)
class Buffer:
    """An adopted tensor."""

    id: int
    name: str
    _owner: Any = field(repr=False)


@dataclass(frozen=True)
class Violation:
    """What went wrong on the device, where, and in which replay; str() is one line."""

    kind: str  # "polluted", "invalid value", "launched without BeforeReplay", … (docs/errors.md)
    buffer: str
    index: int  # element of the buffer
    expected: int
    actual: int
    graph: str
    bucket: Extent  # of the graph that ran; (0, 0) if not known
    replay: int  # 1, 2, …; 0: a capture or warm-up
    node: str  # the kernel that wrote, where known
    text: str

    def __str__(self) -> str:
        return self.text


class Stats(NamedTuple):
    """Counts of what has run by now."""

    replays: int  # armed
    restored_bytes: int
    expected_writes: int  # checked replays that found a restored buffer changed, as is its right
    healed: int  # constants found polluted and put back
    neutralised: int  # replays made harmless
    lost_reports: int  # overwritten before poll saw them


def to_violations(rows: Any) -> list[Violation]:
    found = []
    for kind, buffer, index, expected, actual, graph, requests, tokens, replay, node, text in rows:
        bucket = Extent(requests, tokens)
        found.append(Violation(kind, buffer, index, expected, actual, graph, bucket, replay, node, text))
    return found
