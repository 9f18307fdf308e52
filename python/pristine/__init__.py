"""Pristine keeps what a captured CUDA graph reads right, and names the culprit where it cannot.

An engine that captures by itself (PyTorch's ``torch.cuda.graph``) adopts its metadata tensors, seals them, records the
prologue as the first node of each capture, and hands over each step's values::

    manager = pristine.BufferManager(pristine.Device("cuda"))
    indptr = manager.adopt("kv_indptr", tensor, role="refilled", kind="indptr", axis=pristine.Axis.requests_plus_one())
    manager.seal()
    with torch.cuda.graph(graph):
        manager.record_prologue(bucket)
        forward()
    ...
    manager.begin_step(bucket, requests)
    manager.refill(indptr, values)
    manager.before_replay(bucket, requests)
    graph.replay()

`__cuda__` is the CUDA version and the architectures that the library was built with ("13.0 sm_90a"). None: Host only.
"""

from importlib.metadata import version as _version

from pristine._device import Device
from pristine._ffi import cuda_build as _cuda_build
from pristine._manager import BufferManager
from pristine._types import Axis, Buffer, Extent, Stats, Violation
from pristine.errors import (
    AlreadyExistsError,
    DataLossError,
    DeviceLostError,
    Error,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
)

__version__ = _version("pristine")
__cuda__: str | None = _cuda_build() or None

__all__ = [
    "AlreadyExistsError",
    "Axis",
    "Buffer",
    "BufferManager",
    "DataLossError",
    "Device",
    "DeviceLostError",
    "Error",
    "Extent",
    "FailedPreconditionError",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "OutOfRangeError",
    "ResourceExhaustedError",
    "Stats",
    "UnavailableError",
    "UnimplementedError",
    "Violation",
    "__cuda__",
    "__version__",
]
