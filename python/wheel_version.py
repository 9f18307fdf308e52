"""The wheel's version: CMake's, and what the library inside was built for, as in 0.1.0+cu130 or 0.1.0+host."""

import os
import pathlib
import re


def dynamic_metadata(field: str, settings: object = None, project: object = None) -> str:
    """Called by scikit-build-core. `./run wheel` sets PRISTINE_WHEEL_LABEL; a build by hand has no label."""
    cmake = (pathlib.Path(__file__).parent.parent / "CMakeLists.txt").read_text()
    version = re.search(r"project\(pristine VERSION ([0-9.]+)", cmake).group(1)
    label = os.environ.get("PRISTINE_WHEEL_LABEL")
    return f"{version}+{label}" if label else version
