"""`gpuprep doctor --gpu`: each check, with devices that fail in different ways; no GPU is needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from simulated_cuda import Gpu, Machine
from typer.testing import CliRunner

from gpuprep.cli import doctor
from gpuprep.cli.app import app
from gpuprep.compute import gpu_checks, gpu_environment
from gpuprep.compute.backend import NoTransfers, NumpyBackend, check_engine, import_cupy_backend
from gpuprep.compute.cuda_kernels import VARIANTS
from gpuprep.compute.gpu_findings import GpuFinding
from gpuprep.compute.gpu_timing import pass_bytes
from gpuprep.core import hounsfield
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.errors import BackendError
from gpuprep.testing import thorax_volume

SMALL, SPACING_MM = (9, 24, 28), (3.0, 1.8, 1.8)


def no_fault(_: NDArray[Any]) -> None:
    """Leave the results of the device as they are."""


class HostDevice(NumpyBackend):
    """A device that computes with NumPy as the kernel does, and changes its results by `fault`."""

    name = "gpu"
    device = "Host device (device 0)"
    fault: Callable[[NDArray[Any]], None] = staticmethod(no_fault)

    def __init__(self, ordinal: int = 0) -> None:
        super().__init__("kernels")
        self.ordinal = ordinal
        self.chunk_slices, self.slab_slices = 16, 8

    @contextmanager
    def session(self) -> Any:
        transfers = NoTransfers()
        transfers.seconds = lambda: {"upload_s": 0.1, "kernels_s": 0.2, "download_s": 0.3}  # type: ignore[method-assign]
        yield transfers

    def free_bytes(self) -> int:  # type: ignore[override]
        return 10**10

    def to_device(self, host: Any) -> Any:
        return np.array(host)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.full(shape, 77, dtype)

    def resample(
        self, values: Any, out: Any, tables: Any, *, transposed: bool = False, window: Any = None, rescale: Any = None
    ) -> None:
        hu = values if rescale is None else hounsfield.to_hu(values, *rescale)
        matrix = np.zeros((8 * len(tables.first), hu.shape[1]))
        for block, first in enumerate(tables.first):
            for t, weights in enumerate(tables.weights[block]):
                matrix[8 * block : 8 * block + 8, (first + t) % hu.shape[1]] += weights
        matrix = matrix[: tables.n_out]
        if np.array_equal(matrix, np.eye(len(matrix))):
            values = hu.copy()
        else:
            values = np.einsum("qr,orx->oqx", matrix, hu.astype(np.float64)).astype(np.float32)
        if window is not None:
            values = hounsfield.window(values, window.low_hu, window.high_hu, window.scale, window.shift_hu)
        out[...] = hounsfield.quantise(values.swapaxes(1, 2) if transposed else values, out.dtype.name)
        self.fault(out)

    def to_hu(self, stored: Any, slope: Any, intercept: Any, padding: Any, rule: str) -> Any:
        hu = hounsfield.to_hu(stored, slope, intercept, padding, rule)
        self.fault(hu)
        return hu

    def finish(self, values: Any, window: Any, dtype: str) -> Any:
        found = hounsfield.finish(values, window, dtype).copy()
        self.fault(found)
        return found


PROPERTIES: dict[str, Any] = {
    "name": b"Host device", "major": 9, "minor": 0, "multiProcessorCount": 132, "l2CacheSize": 50 * 2**20,
    "totalGlobalMem": 16 * 10**9, "freeMem": 10**10, "ECCEnabled": 1, "uuid": bytes(range(16)),
}  # fmt: skip


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A machine with one device, in place of CuPy; tests change its parts."""

    def copy(target: Any, source: Any) -> None:
        target[...] = source

    module = SimpleNamespace(
        CupyBackend=HostDevice,
        device_count=lambda: 1,
        cuda_versions=lambda: {"driver": 13000, "runtime": 12090, "nvrtc": 12090},
        device_properties=lambda _: PROPERTIES,
        page_locked=lambda size: np.empty(size, np.uint8),
        copy_on_device=copy,
        device_seconds=lambda _: 0.001,
        compiler_seconds=lambda _: 0.4,
        check_ndimage=lambda: None,
    )
    monkeypatch.setattr(gpu_checks, "import_cupy_backend", lambda: module)
    monkeypatch.setattr("gpuprep.compute.gpu_timing.import_cupy_backend", lambda: module)
    monkeypatch.setattr(HostDevice, "fault", staticmethod(no_fault))
    quick(monkeypatch)
    for name in (*gpu_environment.VARIABLES, *gpu_environment.WITHOUT_EFFECT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(gpu_environment, "installed", lambda prefix: {f"{prefix}-x": "1.0"})
    monkeypatch.setattr(gpu_environment, "torch_version", lambda: None)
    return module


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examine small phantoms, and repeat nothing."""
    monkeypatch.setattr(doctor, "SMALL_PHANTOM", (SMALL, SPACING_MM))
    monkeypatch.setattr(doctor, "PHANTOM", (SMALL, SPACING_MM))
    monkeypatch.setattr(gpu_checks, "PARITY_SIZE", (20, 22))
    monkeypatch.setattr(gpu_checks, "SERIES_RECIPE", Recipe(size=(60, 64)))
    monkeypatch.setattr(gpu_checks, "IDENTITY_SHAPE", (2, 40, 70))
    monkeypatch.setattr(gpu_checks, "COPIED_BYTES", 2**12)
    monkeypatch.setattr(gpu_checks, "COPIES", 1)
    monkeypatch.setattr(gpu_checks, "RUNS", 1)


def examined() -> tuple[int, dict[str, Any], str]:
    """Run the command; return exit code, findings by topic and name, and standard error."""
    done = CliRunner().invoke(app, ["doctor", "--gpu", "--json"], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report["exit_code"] == done.exit_code
    assert report["trusted"] == (done.exit_code == 0)
    assert done.stderr.count("\n") == (done.exit_code != 0)
    return done.exit_code, {f"{f['topic']}: {f['name']}": f for f in report["findings"]}, done.stderr


def failed(findings: dict[str, Any]) -> list[str]:
    return [name for name, f in findings.items() if not f["ok"]]


CHECKS = [
    *("device: properties", "exact: identity", "exact: HU", "exact: output types", "equal to host: operators, default"),
    *("equal to host: operators, classic", "equal to host: ndimage, default", "equal to host: ndimage, classic"),
    *("repeatable: two runs", "memory: workers", "speed: compiler", "speed: copies", "speed: kernels"),
]


def test_a_device_that_computes_as_the_host_is_trusted(machine: SimpleNamespace) -> None:
    del machine
    code, findings, _ = examined()
    assert code == 0
    assert [name for name, f in findings.items() if f["device"] == 0] == CHECKS
    assert [name for name in failed(findings) if name != "version: NVIDIA driver"] == []
    assert all(
        f.keys() == {"topic", "name", "ok", "detail", "decisive", "figures", "device"} for f in findings.values()
    )
    decisive = [name for name, f in findings.items() if f["decisive"]]
    assert decisive == [c for c in CHECKS if c.startswith(("exact", "equal", "repeatable"))]
    properties = findings["device: properties"]["figures"]
    assert properties == {
        "name": "Host device", "compute_capability": "9.0", "multiprocessors": 132, "l2_bytes": 52428800,
        "total_bytes": 16 * 10**9, "free_bytes": 10**10, "ecc": True, "mig": False,
        "uuid": "00010203-0405-0607-0809-0a0b0c0d0e0f",
    }  # fmt: skip
    # 4096 bytes in a simulated millisecond; twice as many are moved within the device.
    copies = findings["speed: copies"]["figures"]
    assert copies["up_bytes_per_s"] == copies["down_pageable_bytes_per_s"] == 4_096_000
    assert copies["device_bytes_per_s"] == 8_192_000
    kernels = findings["speed: kernels"]["figures"]
    assert kernels["kernels_s"] == 0.2
    assert kernels["floor_s"] == pytest.approx(kernels["moved_bytes"] / 8_192_000)
    assert findings["memory: workers"]["figures"]["workers"] >= 1


def test_the_table_has_a_line_per_finding_and_a_verdict(machine: SimpleNamespace) -> None:
    del machine
    done = CliRunner().invoke(app, ["doctor", "--gpu"], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stderr == ""
    assert "results of the GPU can be trusted: all comparisons with the host passed" in done.stdout
    for words in ("identity (0)", "two runs (0)", "CUDA of CuPy", "12.9", "Host device, compute capability 9.0"):
        assert words in done.stdout


def rounded(out: NDArray[Any]) -> None:
    """Keep 10 bits of the mantissa, as TF32 does."""
    if out.dtype == np.float32:
        bits = np.ascontiguousarray(out).view(np.uint32)
        out[...] = ((bits + np.uint32(1 << 12)) >> 13 << 13).view(np.float32)


def too_high(out: NDArray[Any]) -> None:
    """Add 0.02 HU in units of the default window."""
    if out.dtype == np.float32 and out.max() <= 1.5:
        out += np.float32(0.02 / 1400)


def two_steps_off(out: NDArray[Any]) -> None:
    if out.dtype == np.uint8:
        out[...] = np.clip(out, 2, None) - 2


def not_a_number(out: NDArray[Any]) -> None:
    if out.dtype == np.float32:
        out.flat[0] = np.nan


@pytest.mark.parametrize(
    ("fault", "names", "words"),
    [
        (rounded, ["exact: identity", "exact: HU", "equal to host: operators, default"], "of 5600 values changed"),
        (too_high, ["equal to host: operators, default"], "too large for int16 to float32, uint16 to float32"),
        (two_steps_off, ["exact: output types", "equal to host: operators, default"], "differ from the host's"),
        (not_a_number, ["exact: identity", "exact: HU", "equal to host: operators, classic"], "values changed"),
    ],
)
def test_wrong_values_are_exit_code_1(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, fault: Any, names: list[str], words: str
) -> None:
    del machine
    monkeypatch.setattr(HostDevice, "fault", staticmethod(fault))
    code, findings, stderr = examined()
    assert code == 1
    assert set(names) <= set(failed(findings))
    assert words in findings[names[0]]["detail"]
    assert "do not use this device" in findings[names[0]]["detail"]
    assert stderr.startswith("gpuprep: results of the GPU cannot be trusted: ")
    assert findings["speed: copies"]["ok"]  # the other checks still run


def test_results_that_are_not_repeatable_are_exit_code_1(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    del machine
    rng = np.random.default_rng(0)

    def noisy(out: NDArray[Any]) -> None:
        if out.dtype == np.float32 and out.shape[1:] == (60, 64):  # output slices of the series
            out *= np.float32(1 + 2**-23 * rng.integers(2))

    monkeypatch.setattr(HostDevice, "fault", staticmethod(noisy))
    code, findings, stderr = examined()
    assert (code, failed(findings)[-1]) == (1, "repeatable: two runs")
    assert "two runs differ in" in findings["repeatable: two runs"]["detail"]
    assert "two runs differ in" in stderr


def test_wrong_hu_of_one_type_are_named(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    del machine

    def fault(_: HostDevice, stored: Any, slope: Any, intercept: Any, padding: Any, rule: str) -> Any:
        hu = hounsfield.to_hu(stored, slope, intercept, padding, rule)
        return hu + np.float32(stored.dtype == np.int8 and rule == "keep")

    monkeypatch.setattr(HostDevice, "to_hu", fault)
    code, findings, _ = examined()
    assert code == 1
    assert findings["exact: HU"]["figures"]["wrong_values"] == {"int8, keep": 6 * 64 * 64}
    assert "differ from the host's for int8, keep:" in findings["exact: HU"]["detail"]


def test_a_check_that_raises_is_one_line_and_the_others_run(machine: SimpleNamespace) -> None:
    def lost(_: Any) -> float:
        raise RuntimeError("cudaErrorIllegalAddress:\nan illegal memory access was encountered")

    machine.device_seconds = lost
    code, findings, _ = examined()
    assert code == 0  # the speed decides nothing
    detail = "RuntimeError: cudaErrorIllegalAddress: an illegal memory access was encountered"
    assert findings["speed: copies"]["detail"] == detail
    assert findings["speed: kernels"]["ok"]
    assert findings["speed: kernels"]["figures"]["floor_s"] is None


def test_a_device_without_memory_for_one_series_is_named(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    del machine
    monkeypatch.setattr(HostDevice, "free_bytes", lambda _: 7 * 10**8)
    code, findings, _ = examined()
    assert code == 0
    assert not findings["memory: workers"]["ok"]
    assert "free memory of the device" in findings["memory: workers"]["detail"]


@pytest.mark.parametrize("exc", [BackendError("the engine ndimage needs cuCIM"), AttributeError("no cupy.x")])
def test_cucim_that_is_absent_or_fails_does_not_affect_the_engine_operators(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, exc: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise exc

    machine.check_ndimage = refuse
    monkeypatch.setattr(HostDevice, "zoom", refuse)
    code, findings, _ = examined()
    assert code == 0
    expected = ["version: cuCIM import", "equal to host: ndimage, default", "equal to host: ndimage, classic"]
    assert [name for name in failed(findings) if name != "version: NVIDIA driver"] == expected
    assert str(exc) in findings["version: cuCIM import"]["detail"]


def test_one_of_two_devices_that_is_refused_is_exit_code_1(machine: SimpleNamespace) -> None:
    def opened(ordinal: int) -> HostDevice:
        if ordinal == 0:
            raise BackendError("a small test kernel returns wrong values: do not use this device")
        return HostDevice(ordinal)

    machine.device_count, machine.CupyBackend = lambda: 2, opened
    code, findings, stderr = examined()
    assert code == 1
    assert findings["device: test kernel"]["device"] == 0
    assert findings["exact: identity"]["device"] == 1
    assert "a small test kernel returns wrong values" in stderr


def test_a_mig_instance_is_recognised_by_its_name_or_by_the_visible_devices(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.device_properties = lambda _: PROPERTIES | {"name": b"NVIDIA H200 MIG 1g.18gb"}
    assert gpu_checks.device(machine, 0)[1]["mig"]
    assert "MIG instance" in gpu_checks.device(machine, 0)[0]
    machine.device_properties = lambda _: PROPERTIES
    assert not gpu_checks.device(machine, 0)[1]["mig"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-00010203-0405-0607-0809-0a0b0c0d0e0f")
    assert gpu_checks.device(machine, 0)[1]["mig"]


# Machines without a usable GPU


@pytest.mark.parametrize(
    ("cupy_on_host", "visible", "words"),
    [
        (Machine(driver_version=0), None, "no NVIDIA driver is loaded"),
        (Machine(driver_version=11080, runtime_version=12090), None, "the driver supports CUDA 11.8, CuPy needs 12.9"),
        (Machine(), "", "CUDA_VISIBLE_DEVICES is empty: unset it"),
        (Machine(gpus=()), None, "no CUDA-capable device is detected"),
    ],
    indirect=["cupy_on_host"],
    ids=["no driver", "old driver", "none visible", "no device"],
)
def test_without_a_usable_gpu_the_reason_is_one_line_and_exit_code_4(
    cupy_on_host: Machine, monkeypatch: pytest.MonkeyPatch, visible: str | None, words: str
) -> None:
    del cupy_on_host
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code, findings, stderr = examined()
    assert code == 4
    assert words in stderr
    assert words in findings["device: GPU"]["detail"]
    assert [name for name, f in findings.items() if f["decisive"]] == ["device: GPU"]


@pytest.mark.parametrize("cupy_on_host", [Machine(gpus=(Gpu(name="Simulated MIG 1g.18gb"),))], indirect=True)
def test_versions_properties_and_times_come_from_cupy(cupy_on_host: Machine) -> None:
    del cupy_on_host
    module = import_cupy_backend()
    assert {"driver": 13000, "runtime": 13000}.items() <= module.cuda_versions().items()
    detail, figures = gpu_checks.device(module, 0)
    assert (figures["name"], figures["mig"], figures["total_bytes"]) == ("Simulated MIG 1g.18gb", True, 10**10)
    assert detail.startswith("Simulated MIG 1g.18gb, compute capability 9.0, 132 multiprocessors")
    backend = module.CupyBackend(0)
    with backend.session():
        array = backend.empty((100,), np.uint8)
        assert module.device_seconds(lambda: array.set(module.page_locked(100))) > 0
    assert module.compiler_seconds(VARIANTS[0]) > 0


@pytest.mark.usefixtures("cupy_on_host")
def test_values_on_a_simulated_cupy_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(gpu_checks, "STORED_TYPES", {"int16": "short"})
    backend = import_cupy_backend().CupyBackend(0)
    assert gpu_checks.identity(backend)[1] == {f"wrong_values_axis_{axis}": 0 for axis in range(3)}
    assert gpu_checks.exact_hu(backend)[1]["wrong_values"] == {}


@pytest.mark.usefixtures("cupy_on_host")
def test_the_engine_ndimage_without_cucim_is_refused_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = import_cupy_backend().CupyBackend(0)
    check_engine(backend, "ndimage")
    import_cupy_backend()._libraries.cache_clear()
    monkeypatch.setitem(sys.modules, "cucim.skimage.transform", None)
    check_engine(backend, "operators")
    with pytest.raises(BackendError, match=r"needs cuCIM, .*pip install 'gpuprep\[cuda12\]'"):
        check_engine(backend, "ndimage")
    check_engine(NumpyBackend(), "ndimage")


def test_a_broken_cupy_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise AttributeError("module 'numpy' has no attribute 'x'")

    monkeypatch.setattr(gpu_checks, "import_cupy_backend", broken)
    code, findings, stderr = examined()
    assert code == 4
    assert findings["device: GPU"]["detail"] == "AttributeError: module 'numpy' has no attribute 'x'"
    assert findings["version: CUDA of CuPy"]["detail"] == "unknown without CuPy"
    assert "no GPU can be used" in stderr


# Software and environment


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    found = gpu_environment.cache_finding()
    assert not found.ok
    assert found.figures == {"path": str(tmp_path / "file" / "kernels"), "size_bytes": 0, "writable": False}
    assert found.detail.endswith("set CUPY_CACHE_DIR to a folder that can be written")


def test_a_path_that_no_file_system_holds_is_a_cache_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", "/" + "x" * 5000)
    found = gpu_environment.cache_finding()
    assert not found.ok
    assert "File name too long: set CUPY_CACHE_DIR" in found.detail


def test_control_characters_of_a_variable_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0\n\x1b[31m1")
    monkeypatch.setenv("CUPY_CACHE_DIR", "/proc/\x1b[31m")
    for found in gpu_environment.environment_findings():
        assert found.detail.isprintable(), found


def test_the_size_of_the_cache_is_that_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.cubin").write_bytes(bytes(1000))
    (tmp_path / "b.cubin").write_bytes(bytes(234))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    assert gpu_environment.cache_finding().figures == {"path": str(tmp_path), "size_bytes": 1234, "writable": True}
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "later"))
    assert gpu_environment.cache_finding().ok
    assert not (tmp_path / "later").exists()


def test_variables_of_matrix_products_are_shown_only_if_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in gpu_environment.WITHOUT_EFFECT:
        monkeypatch.delenv(name, raising=False)
    assert not [f for f in gpu_environment.environment_findings() if "TF32" in f.name]
    monkeypatch.setenv("CUPY_TF32", "1")
    monkeypatch.setenv("CUPY_GPU_MEMORY_LIMIT", "4000000000")
    found = {f.name: f for f in gpu_environment.environment_findings()}
    assert found["CUPY_TF32"].ok
    assert "without effect" in found["CUPY_TF32"].detail
    assert found["CUPY_GPU_MEMORY_LIMIT"].figures == {"value": "4000000000"}


def pairs(**changed: Any) -> dict[str, GpuFinding]:
    cuda = {"driver": 13000, "runtime": 12090, "nvrtc": 12090} | changed.pop("cuda", {})
    arguments = {"cupy": {"cupy-cuda12x": "14.2.0"}, "cucim": {"cucim-cu12": "26.10.0"}, "torch_cuda": "12.8"} | changed
    return {f.name: f for f in gpu_environment.pair_findings(cuda, **arguments)}


def test_versions_that_fit_are_listed() -> None:
    found = pairs()
    assert list(found) == ["driver and CuPy", "NVRTC and CuPy", "cuCIM and CuPy", "torch and CuPy"]
    assert all(f.ok for f in found.values())
    assert found["torch and CuPy"].detail == "CUDA 12.8 and 12.9"


@pytest.mark.parametrize(
    ("changed", "name", "remedy"),
    [
        ({"cuda": {"driver": 11080}}, "driver and CuPy", "update the driver, or pip install 'gpuprep[cuda11]'"),
        ({"cuda": {"nvrtc": 13000}}, "NVRTC and CuPy", "pip install 'cupy-cuda12x[ctk]'"),
        (
            {"cucim": {"cucim-cu13": "26.10.0"}},
            "cuCIM and CuPy",
            "pip uninstall cucim-cu13, then pip install 'gpuprep[cu",
        ),
        ({"torch_cuda": "13.0"}, "torch and CuPy", "pip install 'gpuprep[cuda13]', or install torch for CUDA 12"),
        ({"cupy": {"cupy-cuda12x": "1", "cupy-cuda13x": "1"}}, "CuPy twice", "pip uninstall cupy-cuda12x cupy-cuda13x"),
    ],
)
def test_versions_that_do_not_fit_have_a_remedy(changed: Any, name: str, remedy: str) -> None:
    found = pairs(**changed)
    assert [f.name for f in found.values() if not f.ok] == [name]
    assert remedy in found[name].detail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "__version__ = '2.9.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n",
            ("2.9.0+cu130", "13.0"),
        ),
        ("__version__ = '2.9.0+cpu'\ncuda: Optional[str] = None\n", ("2.9.0+cpu", "")),
        ("__version__ = '2.2.0'\ncuda = '12.1'\n", ("2.2.0", "12.1")),
    ],
)
def test_the_cuda_version_of_torch_is_known_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[str, str]
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert gpu_environment.torch_version() == expected


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n", "580.95.05"),
    ],
)
def test_the_version_of_the_driver_is_that_of_its_kernel_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: str
) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(gpu_environment, "KERNEL_MODULE", tmp_path / "version")
    assert gpu_environment.kernel_module_version() == version
    monkeypatch.setattr(gpu_environment, "KERNEL_MODULE", tmp_path / "absent")
    assert gpu_environment.kernel_module_version() is None


def test_the_bytes_of_the_passes_are_those_of_their_arrays() -> None:
    # 108 × 512 × 512 at 3 × 0.6816 mm becomes 324 × 349 × 349 at 1 mm, and 324 × 512 × 512 voxels of uint8.
    volume = thorax_volume((108, 4, 4), (3.0, 0.6816, 0.6816))
    geometry = volume.geometry.resized((108, 512, 512))
    geometry = type(geometry)((108, 512, 512), volume.geometry.affine)
    stored, in_plane, across = 2 * 108 * 512 * 512, 4 * 108 * 349 * 349, 4 * 324 * 349 * 349
    output = 324 * 512 * 512
    expected = (stored + in_plane, in_plane + across, across + output)
    assert pass_bytes(make_plan(geometry, Recipe(dtype="uint8")), 2) == expected
    unresized = make_plan(geometry, Recipe(size=None))
    assert pass_bytes(unresized, 2) == (stored + in_plane, in_plane + across)
