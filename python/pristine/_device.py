"""Device: a GPU, or the Host backend."""

from __future__ import annotations

import sys
from typing import Any

from pristine import _ffi
from pristine.errors import InvalidArgumentError


class Device:
    """A GPU ("cuda", "cuda:1", a torch.device), or the Host backend ("host") with its own worker threads.

    Managers keep their device alive. Raises `UnavailableError` if there is no such GPU, `UnimplementedError` if the
    library was built without CUDA (`pristine.__cuda__` is None), `InvalidArgumentError` for any other text.
    """

    def __init__(self, place: Any = "host") -> None:
        text = str(place)
        kind, _, ordinal = text.partition(":")
        self.is_cuda = kind == "cuda"
        self.ordinal = 0
        if text == "host":
            self._handle = _ffi.create_host()
            return
        if not self.is_cuda or not (ordinal.isdecimal() or text == "cuda"):
            raise InvalidArgumentError(f'device is "{text}"; one of host, cuda, cuda:N')
        self.ordinal = int(ordinal or _current_cuda_device())
        self._handle = _ffi.create_cuda(self.ordinal)

    @property
    def name(self) -> str:
        """For example "host (eager)" or "cuda:0 (NVIDIA H200)"."""
        return str(_ffi.device_name(self._handle))

    def synchronize(self) -> None:
        """Waits until all queued work is done. On Host this is what makes adopted arrays readable after a prologue."""
        _ffi.synchronize(self._handle)

    def stream_handle(self, stream: Any = None) -> int:
        """The native handle of `stream`: a torch.cuda.Stream, anything with __cuda_stream__, or the handle itself.

        None: PyTorch's current stream of this device where PyTorch is loaded, else CUDA's default stream. On Host: 0.
        """
        if stream is None:
            torch = sys.modules.get("torch")
            if not self.is_cuda or torch is None:
                return 0
            return int(torch.cuda.current_stream(self.ordinal).cuda_stream)
        if hasattr(stream, "cuda_stream"):
            return int(stream.cuda_stream)
        if hasattr(stream, "__cuda_stream__"):
            return int(stream.__cuda_stream__()[1])
        if isinstance(stream, int):
            return stream
        raise InvalidArgumentError(
            f"stream is a {type(stream).__name__}; a torch.cuda.Stream, an object with __cuda_stream__, or an int"
        )

    def __repr__(self) -> str:
        return f"pristine.Device({self.name})"


def _current_cuda_device() -> int:
    torch = sys.modules.get("torch")
    return int(torch.cuda.current_device()) if torch is not None and torch.cuda.is_available() else 0
