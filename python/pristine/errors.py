"""A class per status code, all below `Error`. Messages have the name, the value found, and what would be accepted."""

import tvm_ffi


class Error(Exception):
    """Any status of Pristine that is not OK."""


class InvalidArgumentError(Error):
    """An argument is wrong whatever the state: a dtype, a stride, a number of elements."""


class OutOfRangeError(Error):
    """Larger than anything that was set up: an extent that does not fit in its bucket."""


class NotFoundError(Error):
    """The named thing does not exist."""


class AlreadyExistsError(Error):
    """The name is taken."""


class FailedPreconditionError(Error):
    """Right call, wrong state: a stale plan, a missing refill, a second thread.

    The contract between engine and manager is broken: the manager raises it again from every later call until
    `BufferManager.clear_error`.
    """


class ResourceExhaustedError(Error):
    """No memory, or every staging slot in flight: `BufferManager.wait_for_slot`, then try again."""


class DataLossError(Error):
    """Something wrote where it must not."""


class UnimplementedError(Error):
    """Built without CUDA, or no kernel for this configuration."""


class UnavailableError(Error):
    """There is no such device."""


class InternalError(Error):
    """The driver or a kernel failed; final for that stream."""


class DeviceLostError(Error):
    """The device's context is dead; every later call raises this. The message has the first failure, and the last
    violation that was recorded; `BufferManager.poll` and what was read before still answer."""


for _class, _code in {
    InvalidArgumentError: "INVALID_ARGUMENT",
    OutOfRangeError: "OUT_OF_RANGE",
    NotFoundError: "NOT_FOUND",
    AlreadyExistsError: "ALREADY_EXISTS",
    FailedPreconditionError: "FAILED_PRECONDITION",
    ResourceExhaustedError: "RESOURCE_EXHAUSTED",
    DataLossError: "DATA_LOSS",
    UnimplementedError: "UNIMPLEMENTED",
    UnavailableError: "UNAVAILABLE",
    InternalError: "INTERNAL",
    DeviceLostError: "ABORTED",
}.items():
    tvm_ffi.register_error(f"pristine.{_code}", _class)

# The rest of absl's codes, which have no meaning of their own here: still an Error, never a bare RuntimeError.
for _code in ("CANCELLED", "UNKNOWN", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED"):
    tvm_ffi.register_error(f"pristine.{_code}", Error)
