"""BufferManager: the metadata that captured graphs read, with a read-only original of each array."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, cast

import tvm_ffi

from pristine import _ffi
from pristine._device import Device
from pristine._types import (
    Axis,
    Buffer,
    CapturedGraph,
    DLPackTensor,
    Extent,
    ExtentLike,
    Kind,
    Role,
    Stats,
    Violation,
    to_extent,
    to_violations,
)
from pristine.errors import FailedPreconditionError, InvalidArgumentError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _under_contract(
    method: Callable[Concatenate[BufferManager, _P], _R],
) -> Callable[Concatenate[BufferManager, _P], _R]:
    """Refuses the call while a contract error stands, and remembers the one that the call raises."""

    @functools.wraps(method)
    def call(self: BufferManager, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if self._contract_error is not None:
            raise FailedPreconditionError(self._contract_error)
        try:
            return method(self, *args, **kwargs)
        except FailedPreconditionError as error:
            caller = sys._getframe(1)
            # Only text: the exception itself would keep the frames' tensors alive.
            self._contract_error = (
                f"{error} (raised first by {method.__name__} at {caller.f_code.co_filename}:{caller.f_lineno}; "
                "every call raises it again until clear_error)"
            )
            raise

    return cast("Callable[Concatenate[BufferManager, _P], _R]", call)


def _tensor(what: str, value: DLPackTensor) -> tvm_ffi.Tensor:
    if not hasattr(value, "__dlpack__"):
        raise InvalidArgumentError(f"{what}: a {type(value).__name__} has no __dlpack__, as numpy's and torch's have")
    try:
        return tvm_ffi.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{what}: its memory cannot be shared through DLPack: {error}") from error


class BufferManager:
    """Owns the contents of the arrays that graphs read.

    Each step: `begin_step`, `refill` of every refilled buffer, `before_replay`, the engine's launch. Each graph: its
    first node is the prologue (`record_prologue`), one kernel that compares, restores, places the step's values, pads
    the tails and validates; if that fails, it makes the replay harmless before the body runs.

    Adopted tensors stay alive as long as the manager and its buffers. The manager must outlive every graph that its
    prologue is in, and the streams it is used on must outlive the manager (PyTorch's do). One thread at a time, and its
    replays follow each other on one stream.

    A `FailedPreconditionError` is a contract error: the engine broke the contract with the manager (a stale plan, a
    missing refill, a step for another bucket, a second thread, a prologue that is not the first node, …). Every later
    call raises it again until `clear_error`, so that a broad ``except`` cannot swallow it; only `contract_error`,
    `generation` and `stats` still answer. Other errors do not stand: a wrong argument changed nothing, a full ring is
    to be tried again, and what the driver reports (`InternalError`) comes from every later call anyway.

    Parameters
    ----------
    device
        Kept alive. Adopted tensors must be in its memory (Host: in host memory).
    check
        How often constants are compared with their originals in the prologue: every `sample_every`-th replay, or all.
    restore
        Who puts restored buffers back: the prologue, the caller with `restore`, or nobody (what engines do today).
    on_violation
        What a replay that fails validation does: run harmlessly, go on, or trap (final for the CUDA context).
    parameter_bytes
        Steps of at most so many bytes travel in the parameters of attached graphs (`attach_graph`). 0: none does.
    staging_slots
        Steps that may wait in slots, 2 to 64.
    late_refill_bytes
        Room in each staging slot for refilled buffers adopted after the first `seal`.
    poison_scratch
        Fill scratch buffers with NaN before each replay.
    """

    def __init__(
        self,
        device: Device,
        *,
        check: Literal["off", "sampled", "always"] = "sampled",
        sample_every: int = 16,
        restore: Literal["graph_head", "stream", "off"] = "graph_head",
        on_violation: Literal["neutralise", "record", "trap"] = "neutralise",
        parameter_bytes: int = 8192,
        staging_slots: int = 4,
        late_refill_bytes: int = 1 << 20,
        poison_scratch: bool = False,
    ) -> None:
        self._contract_error: str | None = None
        self._device = device
        self._attached: dict[Extent, CapturedGraph] = {}
        self._handle = _ffi.create_manager(
            device._handle,
            check,
            sample_every,
            restore,
            on_violation,
            parameter_bytes,
            staging_slots,
            late_refill_bytes,
            poison_scratch,
        )

    @property
    def device(self) -> Device:
        return self._device

    # --- contract errors ---

    @property
    def contract_error(self) -> str | None:
        """The contract error that stands: what the next call will raise. None: there is none."""
        return self._contract_error

    def clear_error(self) -> str | None:
        """Ends the contract error that stands and returns its text. The next `begin_step` starts afresh."""
        error, self._contract_error = self._contract_error, None
        return error

    # --- set-up ---

    @_under_contract
    def adopt(
        self,
        name: str,
        tensor: DLPackTensor,
        *,
        role: Role = "constant",
        kind: Kind = "opaque",
        axis: Axis = Axis.fixed(),
        original: DLPackTensor | None = None,
        limit: int = 2**31 - 1,
        dummy: int = 0,
        min_length: int = 0,
        negative_ok: bool = True,
        reads_tail: bool = False,
        only_bucket: ExtentLike | None = None,
        derived_from: Sequence[Buffer] = (),
        stream: Any = None,
    ) -> Buffer:
        """Takes over the contents of `tensor`, at its own address. Blocks.

        Parameters
        ----------
        name
            Unique; in every message.
        tensor
            Contiguous, on the manager's device. int32 unless `kind` is "mask" or "opaque".
        role, kind, axis
            Who may write it, what its numbers are, what they are counted in (docs/roles_and_padding.md). From these
            follow restore, padding, validation and the harmless state.
        original
            Host memory, of the tensor's dtype and size: what captures and warm-ups see and what restores put back, the
            worst case that kernels may meet. None: the tensor's present contents, after what is queued on `stream`.
        limit, dummy
            Bound of the values, and what padding points at: see the kinds.
        min_length, negative_ok, reads_tail
            What the kernel that reads it can bear in padded rows.
        only_bucket
            Only graphs of this bucket use it.
        derived_from
            Buffers that its values are computed from; a replay is refused if one of them was refilled later.

        Raises
        ------
        InvalidArgumentError
            The tensor is elsewhere, not contiguous, empty, of another dtype; the original breaks its kind's rule; the
            memory overlaps another buffer's.
        AlreadyExistsError
            The name is taken.
        """
        what = f"adopt of {name}"
        for other in derived_from:
            self._check_owner(f"{what}, derived_from", other)
        return Buffer(
            _ffi.adopt(
                self._handle,
                name,
                _tensor(what, tensor),
                None if original is None else _tensor(f"{what}, original", original),
                self._device.stream_handle(stream),
                role,
                kind,
                axis.unit,
                axis.per,
                limit,
                dummy,
                min_length,
                negative_ok,
                reads_tail,
                [] if only_bucket is None else list(to_extent(only_bucket)),
                [other.id for other in derived_from],
            ),
            name,
            self._handle,
        )

    @_under_contract
    def seal(self) -> None:
        """Uploads the originals of what was adopted and makes them read-only. Blocks; call it before a capture."""
        _ffi.seal(self._handle)

    # --- each step ---

    @_under_contract
    def begin_step(self, bucket: ExtentLike, extent: ExtentLike) -> None:
        """Opens a step of real size `extent` for the graph of `bucket`; drops an open one that was not replayed.

        Raises
        ------
        ResourceExhaustedError
            Every staging slot is in flight; `wait_for_slot` waits for one.
        OutOfRangeError
            `extent` does not fit in `bucket`.
        """
        _ffi.begin_step(self._handle, *to_extent(bucket), *to_extent(extent))

    @_under_contract
    def refill(self, buffer: Buffer, values: DLPackTensor) -> None:
        """Takes the real values for the open step: host memory of the buffer's dtype, as many as its axis says.

        `values` may be reused at once. Nothing is queued: the step's values travel with `before_replay`.
        """
        self._check_owner("refill", buffer)
        _ffi.refill(self._handle, buffer.id, _tensor(f"refill of {buffer.name}", values))

    @_under_contract
    def keep(self, buffer: Buffer) -> None:
        """Says that the values of the last step still hold, for the same extent."""
        self._check_owner("keep", buffer)
        _ffi.keep(self._handle, buffer.id)

    @_under_contract
    def wait_for_slot(self) -> None:
        """Blocks until `begin_step` would find a staging slot."""
        _ffi.wait_for_slot(self._handle)

    @_under_contract
    def record_prologue(self, bucket: ExtentLike, *, stream: Any = None) -> None:
        """Queues the prologue for `bucket`. In a capture, such as ``torch.cuda.graph``, it must be the first node.

        Outside a capture it runs eagerly, for the step that `before_replay` armed. `stream`: PyTorch's current one.
        """
        _ffi.record_prologue(self._handle, self._device.stream_handle(stream), *to_extent(bucket))

    @_under_contract
    def before_replay(self, bucket: ExtentLike, extent: ExtentLike, *, stream: Any = None) -> None:
        """Checks the open step and arms the next launch of the graph of `bucket` on `stream` (PyTorch's current one).

        Raises
        ------
        FailedPreconditionError
            No open step, a buffer neither refilled nor kept, a step for another bucket or extent, a buffer made from an
            older generation of another. Nothing is queued then; the message has both numbers.
        """
        _ffi.before_replay(self._handle, self._device.stream_handle(stream), *to_extent(bucket), *to_extent(extent))

    @_under_contract
    def attach_graph(self, bucket: ExtentLike, graph: CapturedGraph) -> None:
        """Lets small steps ride in the parameters of the prologue of `graph`: no copy ahead of the launch. Blocks.

        Parameters
        ----------
        graph
            A ``torch.cuda.CUDAGraph(keep_graph=True)`` that was captured with `record_prologue` for `bucket` first, and
            instantiated. Kept alive until `detach_graph`; call that before it is instantiated again or captured anew.

        Raises
        ------
        FailedPreconditionError
            No capture recorded this bucket's prologue, or a graph is attached to it already.
        NotFoundError
            The graph holds no prologue.
        """
        extent = to_extent(bucket)
        _ffi.attach_exec(self._handle, *extent, graph.raw_cuda_graph(), graph.raw_cuda_graph_exec())
        self._attached[extent] = graph

    @_under_contract
    def detach_graph(self, bucket: ExtentLike) -> None:
        """Steps of `bucket` are copied ahead of the launch again. `NotFoundError`: none is attached."""
        extent = to_extent(bucket)
        _ffi.detach_exec(self._handle, *extent)
        del self._attached[extent]

    # --- restore and check ---

    @_under_contract
    def restore(self, *, stream: Any = None) -> None:
        """Queues the copy of the originals of all restored buffers: for managers with restore="stream"."""
        _ffi.restore(self._handle, self._device.stream_handle(stream))

    @_under_contract
    def restore_all(self, bucket: ExtentLike, *, stream: Any = None) -> None:
        """Queues the copy of all originals: what a warm-up run of `bucket` should see."""
        _ffi.restore_all(self._handle, self._device.stream_handle(stream), *to_extent(bucket))

    @_under_contract
    def poll(self) -> list[Violation]:
        """The reports that have arrived since the last call. Never blocks."""
        rows = _ffi.poll(self._handle)
        return [] if rows is None else to_violations(rows)

    @_under_contract
    def verify(self, *, stream: Any = None) -> list[Violation]:
        """Waits for `stream`, then compares constants and originals with what was sealed. Empty: clean.

        Includes reports not yet polled. Does not heal.
        """
        return to_violations(_ffi.verify(self._handle, self._device.stream_handle(stream)))

    @_under_contract
    def signature_hash(self, bucket: ExtentLike) -> int:
        """What ranks compare before they replay: 64 bits over the bucket, the options and the buffers of its prologue.

        Limits, dummies and originals are left out: they follow from each rank's own memory. `NotFoundError`: no
        prologue was recorded for `bucket`.
        """
        return int(_ffi.signature_hash(self._handle, *to_extent(bucket))) % 2**64

    def generation(self, buffer: Buffer) -> int:
        """How often `buffer` was refilled or kept."""
        self._check_owner("generation", buffer)
        return int(_ffi.generation(self._handle, buffer.id))

    def stats(self) -> Stats:
        """Counts of what has run by now. Does not block."""
        return Stats(*_ffi.stats(self._handle))

    def _check_owner(self, what: str, buffer: Buffer) -> None:
        if not isinstance(buffer, Buffer) or buffer._owner is not self._handle:
            raise InvalidArgumentError(f"{what}: {buffer!r} is no buffer of this manager; adopt returns them")
