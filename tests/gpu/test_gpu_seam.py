"""The seam to CuPy and cuCIM, as far as it can be tried without a GPU; on a GPU `-m gpu` runs the rest."""

from __future__ import annotations

import ast
import inspect
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuprep.compute.backend
from gpuprep.compute import cuda_kernels
from gpuprep.compute.backend import NumpyBackend, _gpu_or_cpu, get_backend
from gpuprep.errors import BackendError, DeviceLostError, DeviceMemoryError
from gpuprep.executors.processes import FOR_VOLUMES

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
    module: Any = import_module("gpuprep.compute.cupy_backend")
    volume = np.zeros((2, 2, 2), dtype=np.float32)
    zoom = inspect.signature(module.cupy_ndimage.zoom)
    zoom.bind(volume, [1.0, 2.0, 2.0], order=3, mode="nearest", grid_mode=True)
    inspect.signature(module.cupy_ndimage.gaussian_filter).bind(volume, [0.0, 1.0, 1.0], mode="nearest")
    inspect.signature(module.cucim_resize).bind(
        volume, (2, 4, 4), order=1, mode="edge", clip=False, preserve_range=True, anti_aliasing=False
    )


@needs_cupy
@pytest.mark.parametrize(("visible", "name"), [(None, "1"), ("", "1"), ("4,7", "7"), ("GPU-aa,GPU-bb", "GPU-bb")])
def test_a_worker_is_shown_one_gpu_and_takes_the_first_it_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, name: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    module: Any = import_module("gpuprep.compute.cupy_backend")
    backend = module.CupyBackend.__new__(module.CupyBackend)  # one that opens no device
    backend._ordinal, backend.device = 1, "H200 (device 1)"
    assert backend.environment() == {"CUDA_VISIBLE_DEVICES": name, "GPUPREP_DEVICE": "H200 (device 1)"}
    assert (backend.alone()._ordinal, backend._ordinal) == (0, 1)


def test_both_backends_offer_the_same_methods() -> None:
    file = Path(gpuprep.compute.backend.__file__).with_name("cupy_backend.py")
    (cupys,) = (
        node
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "CupyBackend"
    )
    methods = {n.name: n for n in cupys.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
    numpys = {n: f for n, f in vars(NumpyBackend).items() if callable(f) and not n.startswith("_")}
    assert set(methods) == set(numpys)
    for name, function in numpys.items():
        args = methods[name].args
        names = [a.arg for a in (*args.args, *args.kwonlyargs)]
        assert names == list(inspect.signature(function).parameters), name


@needs_cupy
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of an event that never came to be
def test_copies_and_events_are_asked_for_in_words_that_cupy_knows() -> None:
    # A wrong argument is a TypeError before anything else; a right one gets as far as the driver.
    if gpu_works():
        pytest.skip("a GPU works here")
    cupy: Any = import_module("cupy")
    module: Any = import_module("gpuprep.compute.cupy_backend")
    missing = cupy.cuda.runtime.CUDARuntimeError
    copies = module._Copies()
    calls: list[Callable[[], Any]] = [
        lambda: copies.pinned(10),
        lambda: copies.mark(),
        lambda: module._event(),
        lambda: copies.start_upload(np.zeros((2, 2, 2), np.int16)),
    ]
    for call in calls:
        with pytest.raises(missing, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
            call()
    get = cupy.ndarray.get.__doc__
    assert "out=None, blocking=True" in get
    with pytest.raises(TypeError):
        cupy.cuda.Event(blocks=True)  # so that the above means something


@needs_cupy
@pytest.mark.parametrize("file", ["gpuprep/compute/cupy_backend.py", "bench/micro/kernels.py", "tests/gpu/test_gpu.py"])
def test_every_name_of_cupy_that_is_used_is_there(file: str) -> None:
    tree = ast.parse((Path(__file__).parents[2] / file).read_text("utf-8"))
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    dotted = {name for name in used if re.fullmatch(r"(cupy|cupyx)(\.\w+)+", name)}
    assert len(dotted) >= 3
    for name in dotted:
        found: Any = import_module(name.split(".")[0])
        for part in name.split(".")[1:]:
            found = getattr(found, part)


@needs_cupy
def test_the_fused_kernels_are_parsed_by_cupy() -> None:
    module: Any = import_module("gpuprep.compute.cupy_backend")
    counts = {"HU": (8, 1), "WINDOW": (5, 1), "QUANTISE": (7, 1)}
    for name, (inputs, outputs) in counts.items():
        kernel = getattr(module, name)
        assert (kernel.nin, kernel.nout) == (inputs, outputs)
        assert kernel.name == getattr(cuda_kernels, name).name
    raw = [p.name for p in module.HU.in_params if p.raw]
    assert raw == ["slope", "intercept", "padding"]


@needs_cupy
def test_kernels_that_cannot_be_kept_are_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, ours = import_module("cupy"), import_module("gpuprep.compute.cupy_backend")
    monkeypatch.delenv("CUPY_TF32", raising=False)
    monkeypatch.setattr(cupy, "is_available", lambda: True)
    monkeypatch.setattr(cupy.cuda, "Device", lambda _: nullcontext())

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/kernel_cache/x")

    monkeypatch.setattr(cupy, "ones", refuse)  # the first kernel is written into CuPy's folder
    with pytest.raises(BackendError, match=r"/kernel_cache/x.*set CUPY_CACHE_DIR"):
        ours._checked_device(99)


@needs_cupy
def test_a_backend_travels_without_a_handle_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = import_module("gpuprep.compute.cupy_backend")
    asked: list[int] = []

    def opened(ordinal: int) -> str:
        asked.append(ordinal)
        return "imaginary (device 0)"

    monkeypatch.setattr(module, "_checked_device", opened)
    backend = module.CupyBackend()
    backend.chunk_slices = 7
    there = pickle.loads(pickle.dumps(backend))  # noqa: S301
    assert (there.device, there.chunk_slices) == ("imaginary (device 0)", 7)
    assert asked == [0]  # by the parent; a worker asks once it has work
    assert all(isinstance(v, str | int) for v in vars(there).values())


@needs_cupy
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (("cupy.cuda.memory", "OutOfMemoryError", (10, 20, 0)), DeviceMemoryError),
        (("cupy_backends.cuda.api.runtime", "CUDARuntimeError", (2,)), DeviceMemoryError),
        (("cupy_backends.cuda.api.runtime", "CUDARuntimeError", (700,)), DeviceLostError),
        (("cupy.cuda.compiler", "CompileException", ("no", "x", "y", ())), DeviceLostError),
        (("builtins", "ValueError", ("a bug",)), None),
        (("gpuprep.errors", "DecodeError", ("truncated",)), None),
    ],
)
def test_errors_of_cupy_become_ours(raised: tuple[str, str, Any], expected: Any) -> None:
    module: Any = import_module("gpuprep.compute.cupy_backend")
    where, name, args = raised
    backend = object.__new__(module.CupyBackend)
    backend._ordinal, backend.device = 0, "imaginary"
    exc = getattr(import_module(where), name)(*args)
    known = module.device_error(exc, backend)
    assert (None if known is None else type(known)) == expected
    if expected is DeviceMemoryError:
        assert "imaginary has" in str(known)
        assert "free" in str(known)


@needs_cupy
def test_importing_the_backend_loads_no_driver() -> None:
    # A process that has talked to the driver cannot be forked, and the fork server must stay one that can.
    code = "import gpuprep.compute.cupy_backend; print(any('libcuda.so' in line for line in open('/proc/self/maps')))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"


@needs_cupy
def test_the_fork_server_does_not_even_import_it() -> None:
    assert not any("cupy" in module or "cucim" in module for module in FOR_VOLUMES)
    code = (
        "import gpuprep.compute.process, gpuprep.dicom.read, gpuprep.output.writers, sys; print('cupy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"
