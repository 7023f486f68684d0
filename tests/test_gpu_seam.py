"""The seam to CuPy and cuCIM, as far as it can be tried without a GPU; on a GPU `-m gpu` runs the rest."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from gpuprep.backend import NumpyBackend, _gpu_or_cpu, get_backend
from gpuprep.errors import BackendError

HAVE_CUPY = find_spec("cupy") is not None and find_spec("cucim") is not None
needs_cupy = pytest.mark.skipif(not HAVE_CUPY, reason="CuPy or cuCIM is not installed")


def gpu_works() -> bool:
    try:
        get_backend("gpu")
    except BackendError:
        return False
    return True


def test_the_package_imports_nothing_heavy() -> None:
    heavy = ("cupy", "cupyx", "cucim", "skimage", "rich", "numpy", "scipy", "pydicom")
    code = f"import gpuprep, sys; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_gpu_by_name_never_falls_back_and_says_what_to_do() -> None:
    if gpu_works():
        pytest.skip("a GPU works here")
    with pytest.raises(BackendError, match=r"gpuprep\[cuda12\]|nvidia-smi|does not work"):
        get_backend("gpu")


def test_auto_falls_back_to_the_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    if gpu_works():
        pytest.skip("a GPU works here")
    _gpu_or_cpu.cache_clear()
    with caplog.at_level("WARNING", logger="gpuprep"):
        assert [get_backend("auto").name for _ in range(3)] == ["cpu"] * 3
    assert len(caplog.records) == 1
    assert "the CPU computes" in caplog.text


@needs_cupy
def test_without_a_driver_cupy_is_no_traceback() -> None:
    if gpu_works():
        pytest.skip("a GPU works here")
    with pytest.raises(BackendError, match="finds no GPU"):
        get_backend("gpu")


@needs_cupy
def test_tensor_float_32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its products are wrong by more than the tolerance between backends.
    monkeypatch.setitem(os.environ, "CUPY_TF32", "1")
    with pytest.raises(BackendError, match="CUPY_TF32"):
        get_backend("gpu")


@needs_cupy
def test_the_library_calls_take_the_arguments_they_are_given() -> None:
    module: Any = import_module("gpuprep._cupy")
    volume = np.zeros((2, 2, 2), dtype=np.float32)
    zoom = inspect.signature(module.cupy_ndimage.zoom)
    zoom.bind(volume, [1.0, 2.0, 2.0], order=3, mode="nearest", grid_mode=True)
    inspect.signature(module.cupy_ndimage.gaussian_filter).bind(volume, [0.0, 1.0, 1.0], mode="nearest")
    inspect.signature(module.cucim_resize).bind(
        volume, (2, 4, 4), order=1, mode="edge", clip=False, preserve_range=True, anti_aliasing=False
    )


def test_both_backends_offer_the_same_methods() -> None:
    def public(source: str) -> set[str]:
        return {line.split("(")[0].split()[-1] for line in source.splitlines() if line.startswith("    def ")}

    from gpuprep import backend

    file = os.path.join(os.path.dirname(backend.__file__), "_cupy.py")
    with open(file) as f:
        cupy_methods = {m for m in public(f.read()) if not m.startswith("_")}
    numpy_methods = {m for m in vars(NumpyBackend) if callable(getattr(NumpyBackend, m)) and not m.startswith("_")}
    assert cupy_methods == numpy_methods
