"""The installed package says what it is."""

import importlib.metadata
import pathlib

import pytest

import pristine


def test_the_library_does_not_depend_on_the_python_version():
    wheel = importlib.metadata.distribution("pristine").read_text("WHEEL")
    assert "Tag: py3-none-" in wheel


def test_the_version_says_what_the_library_was_built_for():
    label = pristine.__version__.partition("+")[2]
    if pristine.__cuda__ is None:
        assert label == "host"
    else:
        version, *architectures = pristine.__cuda__.split()
        assert label == "cu" + version.replace(".", "")
        assert architectures and all(name.startswith("sm_") for name in architectures)


def test_types_are_for_checkers_too():
    assert (pathlib.Path(pristine.__file__).parent / "py.typed").exists()


def test_a_device_is_named_as_pytorch_names_it():
    assert "host" in pristine.Device("host").name
    for wrong in ("cpu", "cuda:", "cuda:x", "cuda0", "hosts", ""):
        with pytest.raises(pristine.InvalidArgumentError, match=f'device is "{wrong}"; one of host, cuda, cuda:N'):
            pristine.Device(wrong)


def test_a_device_that_is_not_there_is_unavailable_and_a_build_without_cuda_says_so():
    kind = pristine.UnimplementedError if pristine.__cuda__ is None else pristine.UnavailableError
    with pytest.raises(kind):
        pristine.Device("cuda:63")
