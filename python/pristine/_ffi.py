"""The functions of the shared library (src/exports.cc)."""

import os
import pathlib
from typing import Any

# For a PyTorch that is too old for tvm-ffi's fast path, tvm-ffi compiles one when imported. Pristine does not need it.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

import tvm_ffi  # noqa: E402

from pristine import errors as errors  # noqa: E402  registers the classes that calls raise

_library = tvm_ffi.load_module(pathlib.Path(__file__).with_name("_pristine.so"))


def _function(name: str, blocks: bool) -> Any:
    function = _library[name]
    # Calls that wait let other threads run. The others take microseconds: giving the interpreter away in the middle
    # could cost the step a whole switch interval.
    function.release_gil = blocks
    return function


cuda_build = _function("cuda_build", blocks=False)
create_host = _function("create_host", blocks=True)
create_cuda = _function("create_cuda", blocks=True)
device_name = _function("device_name", blocks=False)
synchronize = _function("synchronize", blocks=True)
create_manager = _function("create_manager", blocks=True)
adopt = _function("adopt", blocks=True)
seal = _function("seal", blocks=True)
begin_step = _function("begin_step", blocks=False)
refill = _function("refill", blocks=False)
keep = _function("keep", blocks=False)
wait_for_slot = _function("wait_for_slot", blocks=True)
record_prologue = _function("record_prologue", blocks=False)
before_replay = _function("before_replay", blocks=False)
attach_exec = _function("attach_exec", blocks=True)
detach_exec = _function("detach_exec", blocks=True)
restore = _function("restore", blocks=False)
restore_all = _function("restore_all", blocks=False)
poll = _function("poll", blocks=False)
verify = _function("verify", blocks=True)
generation = _function("generation", blocks=False)
signature_hash = _function("signature_hash", blocks=False)
stats = _function("stats", blocks=False)
