"""The interface to CuPy and cuCIM: to the packages if they are installed, without a GPU, and to the stand-in."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuprep.compute.backend
from gpuprep.compute.backend import NumpyBackend, _gpu_or_cpu, get_backend
from gpuprep.compute.cuda_engine import KernelBackend
from gpuprep.errors import BackendError, DeviceLostError, DeviceMemoryError
from gpuprep.executors.fork_server import VOLUME_MODULES

HAVE_CUPY = find_spec("cupy") is not None and find_spec("cucim") is not None
needs_cupy = pytest.mark.skipif(not HAVE_CUPY, reason="CuPy or cuCIM is not installed")


@pytest.fixture
def cupy(request: pytest.FixtureRequest) -> Any:
    """Return CuPy, or the stand-in if CuPy is not installed."""
    if not HAVE_CUPY:
        request.getfixturevalue("cupy_on_host")
    return import_module("cupy")


def gpu_works() -> bool:
    try:
        get_backend("gpu")
    except BackendError:
        return False
    return True


def test_importing_gpuprep_loads_no_large_package() -> None:
    heavy = ("cupy", "cupyx", "cucim", "skimage", "rich", "numpy", "scipy", "pydicom")
    code = f"import gpuprep, sys; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_backend_gpu_never_falls_back_and_its_error_names_a_remedy() -> None:
    if gpu_works():
        pytest.skip("a GPU works here")
    with pytest.raises(BackendError, match=r"gpuprep\[cuda12\]|nvidia-smi|does not work"):
        get_backend("gpu")


def test_backend_auto_falls_back_to_the_cpu_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    if gpu_works():
        pytest.skip("a GPU works here")
    _gpu_or_cpu.cache_clear()
    with caplog.at_level("WARNING", logger="gpuprep"):
        assert [get_backend("auto").name for _ in range(3)] == ["cpu"] * 3
    assert len(caplog.records) == 1
    assert "the CPU computes" in caplog.text


@needs_cupy
def test_cupy_without_a_driver_is_a_backend_error() -> None:
    if gpu_works():
        pytest.skip("a GPU works here")
    with pytest.raises(BackendError, match="finds no GPU"):
        get_backend("gpu")


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize(("visible", "name"), [(None, "1"), ("", "1"), ("4,7", "7"), ("GPU-aa,GPU-bb", "GPU-bb")])
def test_a_worker_sees_one_gpu_and_uses_it_as_its_first(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, name: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    module: Any = import_module("gpuprep.compute.cupy_backend")
    backend = module.CupyBackend.__new__(module.CupyBackend)  # without opening a device
    backend._ordinal, backend.device = 1, "H200 (device 1)"
    assert backend.environment() == {"CUDA_VISIBLE_DEVICES": name, "GPUPREP_DEVICE": "H200 (device 1)"}
    assert (backend.alone()._ordinal, backend._ordinal) == (0, 1)


def test_the_gpu_backend_has_the_methods_of_the_other_one_and_those_that_run_the_kernel() -> None:
    file = Path(gpuprep.compute.backend.__file__).with_name("cupy_backend.py")
    (cupys,) = (
        node
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "CupyBackend"
    )
    methods = {n.name: n for n in cupys.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
    expected = {
        name: function
        for owner in (NumpyBackend, KernelBackend)
        for name, function in vars(owner).items()
        if inspect.isfunction(function) and not name.startswith("_")
    }
    assert set(methods) == set(expected)
    for name, function in expected.items():
        args = methods[name].args
        names = [a.arg for a in (*args.args, *args.kwonlyargs)]
        assert names == list(inspect.signature(function).parameters), name


@needs_cupy
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from an event whose creation failed
def test_copies_and_events_are_created_with_arguments_that_cupy_accepts() -> None:
    # A wrong argument is a TypeError; correct arguments get as far as the missing driver.
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
    with pytest.raises(TypeError):
        cupy.cuda.Event(blocks=True)  # shows that wrong arguments are detected


@needs_cupy
def test_the_stand_in_has_the_signatures_of_cupy() -> None:
    import_module("gpuprep.compute.cupy_backend")._libraries()
    import simulated_array
    import simulated_cupy

    pairs: list[tuple[Any, Any]] = [
        (import_module("cupyx.scipy.ndimage").zoom, simulated_cupy.zoom),
        (import_module("cupyx.scipy.ndimage").gaussian_filter, simulated_cupy.gaussian_filter),
        (import_module("cucim.skimage.transform").resize, simulated_cupy.resize),
    ]
    for real, simulated in pairs:
        names = [name for name in inspect.signature(real).parameters if name != "axes"]
        assert [name for name in inspect.signature(simulated).parameters if name != "axes"] == names
    cupy: Any = import_module("cupy")
    own = {name for name in vars(simulated_array.ndarray) if not name.startswith("_")}
    assert own <= set(dir(cupy.ndarray))
    assert set(vars(simulated_cupy.modules()["cupy"])) <= set(dir(cupy)) | {"__path__"}


@pytest.mark.usefixtures("cupy_on_host")
def test_an_unwritable_kernel_cache_is_a_backend_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/kernel_cache/x")

    monkeypatch.setattr(import_module("cupy.cuda.compiler"), "_compile_module_with_cache", refuse)
    with pytest.raises(BackendError, match=r"/kernel_cache/x.*set CUPY_CACHE_DIR"):
        get_backend("gpu")


@pytest.mark.usefixtures("cupy")
def test_a_backend_is_pickled_without_a_handle_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = import_module("gpuprep.compute.cupy_backend")
    checked: list[int] = []

    def checked_device(ordinal: int) -> str:
        checked.append(ordinal)
        return "imaginary (device 0)"

    monkeypatch.setattr(module, "_checked_device", checked_device)
    backend = module.CupyBackend()
    backend.chunk_slices = 7
    unpickled = pickle.loads(pickle.dumps(backend))  # noqa: S301
    assert (unpickled.device, unpickled.chunk_slices) == ("imaginary (device 0)", 7)
    assert checked == [0]  # by the parent; a worker checks the device when its first session begins
    assert all(isinstance(v, str | int) for v in vars(unpickled).values())


@pytest.mark.usefixtures("cupy")
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
def test_errors_of_cupy_become_backend_errors(raised: tuple[str, str, Any], expected: Any) -> None:
    module: Any = import_module("gpuprep.compute.cupy_backend")
    source, name, args = raised
    backend = object.__new__(module.CupyBackend)
    backend._ordinal, backend.device = 0, "imaginary"
    exc = getattr(import_module(source), name)(*args)
    found = module.device_error(exc, backend)
    assert (None if found is None else type(found)) == expected
    if expected is DeviceMemoryError:
        assert "imaginary has" in str(found)
        assert "free" in str(found)


@needs_cupy
def test_importing_the_backend_does_not_load_the_driver() -> None:
    # CUDA does not work in a process forked after the driver was initialised, so the fork server must not load it.
    code = "import gpuprep.compute.cupy_backend; print(any('libcuda.so' in line for line in open('/proc/self/maps')))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"


@needs_cupy
def test_the_fork_server_does_not_import_cupy() -> None:
    assert not any("cupy" in module or "cucim" in module for module in VOLUME_MODULES)
    code = (
        "import gpuprep.compute.process, gpuprep.dicom.read, gpuprep.output.writers, sys; print('cupy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"
