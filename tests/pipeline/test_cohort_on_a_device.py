"""Cohorts on simulated GPUs, from files to files: several devices, lack of memory, loss of a device, interruption."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from simulated_cuda import DOWNLOAD_S, UPLOAD_S, Gpu, Machine

from gpuprep.compute.backend import NumpyBackend, open_gpus
from gpuprep.compute.memory_estimate import CONTEXT_BYTES, device_bytes
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.errors import BackendError
from gpuprep.executors import resources
from gpuprep.executors.processes import InProcessExecutor, WorkerGroup
from gpuprep.pipeline.cohort import convert
from gpuprep.pipeline.events import Run
from gpuprep.pipeline.scan import scan
from gpuprep.testing import write_series

RECIPE = Recipe(spacing_mm=(1.0, 2.0, 2.0), size=(12, 10), dtype="uint8")
SPACING = (2.5, 0.8, 0.7)
FATAL, STUCK = 3001, 3002
"""Stored values at which the device fails, or never ends; all others are smaller."""

ONE = Machine(gpus=(Gpu("GPU-0", "first"),), fatal_value=FATAL, stuck_value=STUCK)
TWO = replace(ONE, gpus=(Gpu("GPU-0", "first"), Gpu("GPU-1", "second")))
MIG = Machine(gpus=(Gpu("MIG-1", "instance 1"), Gpu("MIG-2", "instance 2")))


def machine(simulated: Machine) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cupy_on_host", [simulated], indirect=True, ids=[""])


def add(folder: Path, slices: int = 6, matrix: tuple[int, int] = (20, 24), value: int = 0) -> None:
    stored = np.random.default_rng(slices).integers(0, 3000, (slices, *matrix)).astype(np.int16)
    stored[0, 0, 0] = value
    write_series(folder, stored, SPACING)


def images(out: Path) -> dict[str, Any]:
    return {str(f.relative_to(out)): tifffile.imread(f).astype(int) for f in sorted(out.rglob("*.tif"))}


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> int:
    assert set(a) == set(b)
    return max(int(np.abs(a[name] - b[name]).max()) for name in a)


def by_name(run: Run) -> dict[str, Any]:
    return {Path(r.source).name: r for r in run.results}


class Watched(InProcessExecutor):
    """Executor in this process that logs tasks and stops in `log`."""

    def __init__(self) -> None:
        self.places: list[WorkerGroup] = []
        self.log: list[Any] = []

    def run(
        self, function: Callable[[Any], Any], tasks: Iterable[Any], cost: Any = None, **how: Any
    ) -> Iterator[tuple[Any, Any]]:
        tasks = list(tasks)
        if tasks and hasattr(tasks[0], "backend"):
            chunks = {t.backend.chunk_slices for t in tasks}
            self.log.append(([Path(t.planned.folder).name for t in tasks], max(chunks), [cost(t) for t in tasks]))
        yield from super().run(function, tasks, cost, **how)

    def stop(self) -> None:
        self.log.append("stop")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Replace the worker processes by an executor in this process."""
    executor = Watched()

    def processes(places: list[WorkerGroup], *_: object) -> Watched:
        executor.places = places
        return executor

    monkeypatch.setattr(resources, "ProcessExecutor", processes)
    return executor


@machine(TWO)
@pytest.mark.usefixtures("cupy_on_host")
def test_workers_on_two_gpus_give_the_same_outputs_as_the_cpu(tmp_path: Path) -> None:
    for n in range(4):
        add(tmp_path / "dicom" / f"p{n}", slices=5 + n)
    on_cpu = convert(tmp_path / "dicom", tmp_path / "cpu", RECIPE, backend="cpu")
    run = convert(tmp_path / "dicom", tmp_path / "gpu", RECIPE, backend="gpu", jobs=2)
    assert run.counts == on_cpu.counts == {"ok": 4}
    assert len(images(tmp_path / "cpu")) > 40
    # Products of other block sizes may round differently.
    assert largest_difference(images(tmp_path / "gpu"), images(tmp_path / "cpu")) <= 1
    assert {(r.backend, r.device) for r in run.results} == {("gpu", "first (device 0)"), ("gpu", "second (device 1)")}
    # 5 to 8 slices are one slab, and so are the 12 to 20 that are downloaded.
    assert {(r.upload_s, r.download_s) for r in run.results} == {(UPLOAD_S, DOWNLOAD_S)}
    assert all(r.kernels_s is not None and r.kernels_s > 0 for r in run.results)
    assert {r.kernels_s for r in on_cpu.results} == {None}


@pytest.mark.parametrize(
    ("cupy_on_host", "visible", "gpus", "device"),
    [(TWO, None, [1], "second (device 1)"), (MIG, "MIG-2", None, "instance 2 (device 0)")],
    indirect=["cupy_on_host"],
    ids=["second GPU", "instance of a GPU"],
)
@pytest.mark.usefixtures("cupy_on_host")
def test_a_worker_uses_the_device_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: list[int] | None, device: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    add(tmp_path / "dicom" / "p0")
    run = convert(tmp_path / "dicom", tmp_path / "gpu", RECIPE, backend="gpu", gpus=gpus, jobs=1)
    assert [(r.status, r.device) for r in run.results] == [("ok", device)]


@machine(ONE)
@pytest.mark.usefixtures("cupy_on_host")
def test_a_lost_device_fails_its_series_and_the_next_one_gets_a_new_worker(tmp_path: Path) -> None:
    # In the same process, every later call to the device would fail.
    for n, value in enumerate((0, FATAL, 0, 0)):
        add(tmp_path / "dicom" / f"p{n}", value=value)
    run = convert(tmp_path / "dicom", tmp_path / "out", RECIPE, backend="gpu", jobs=1)
    results = by_name(run)
    assert {name: r.status for name, r in results.items()} == {"p0": "ok", "p1": "failed", "p2": "ok", "p3": "ok"}
    assert results["p1"].reason == (
        "DeviceLostError: the GPU failed: CUDARuntimeError: cudaErrorIllegalAddress: an illegal memory access was "
        "encountered"
    )
    assert {r.backend for r in run.results} == {"gpu"}  # no fallback to another backend


@machine(ONE)
@pytest.mark.usefixtures("cupy_on_host")
def test_a_device_that_is_lost_again_and_again_fails_every_series(tmp_path: Path) -> None:
    for n in range(3):
        add(tmp_path / "dicom" / f"p{n}", value=FATAL)
    run = convert(tmp_path / "dicom", tmp_path / "out", RECIPE, backend="gpu", jobs=2)
    assert run.counts == {"failed": 3}
    assert not images(tmp_path / "out")


@machine(ONE)
@pytest.mark.usefixtures("cupy_on_host")
def test_a_series_on_which_the_device_never_ends_exceeds_the_time_limit(tmp_path: Path) -> None:
    for n, value in enumerate((0, STUCK, 0)):
        add(tmp_path / "dicom" / f"p{n}", value=value)
    run = convert(tmp_path / "dicom", tmp_path / "out", RECIPE, backend="gpu", jobs=2, limit_s=10)
    results = by_name(run)
    assert {name: r.status for name, r in results.items()} == {"p0": "ok", "p1": "failed", "p2": "ok"}
    assert results["p1"].codes == ("time",)


@machine(ONE)
@pytest.mark.usefixtures("cupy_on_host")
def test_a_second_ctrl_c_ends_a_run_whose_device_never_ends(tmp_path: Path) -> None:
    for n, value in enumerate((0, 0, STUCK)):
        add(tmp_path / "dicom" / f"p{n}", value=value)
    command = ["convert", str(tmp_path / "dicom"), "--out", str(tmp_path / "out"), "--backend", "gpu", "--jobs", "2"]
    run = subprocess.Popen(
        [sys.executable, "-m", "gpuprep", *command, "--size", "12"], stderr=subprocess.PIPE, text=True
    )
    try:
        while run.poll() is None and len(list((tmp_path / "out").rglob("volume.json"))) < 2:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        time.sleep(0.3)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, errors
    assert "gpuprep: interrupted; completed outputs are kept" in errors
    assert "Traceback" not in errors
    assert len(list((tmp_path / "out").rglob("volume.json"))) == 2
    assert not list((tmp_path / "out").rglob("p2*"))


PIECES = replace(ONE, largest_bytes=7168)  # fourteen blocks of the pool


@machine(PIECES)
@pytest.mark.usefixtures("cupy_on_host")
def test_series_without_enough_device_memory_are_tried_again_alone_and_in_smaller_chunks(
    tmp_path: Path, watched: Watched
) -> None:
    # An upload has 2 bytes per voxel, in slabs of up to 32, 8 or 1 slices. Other arrays are smaller.
    add(tmp_path / "dicom" / "a-never", 12, (60, 62))  # a slice: 7440 bytes
    add(tmp_path / "dicom" / "b-fits", 6, (20, 24))  # 6 slices: 5760 bytes
    add(tmp_path / "dicom" / "c-quarter", 12, (20, 22))  # 12 slices: 10,560 bytes; 8 slices: 7040 bytes
    add(tmp_path / "dicom" / "d-single", 12, (30, 32))  # 8 slices: 15,360 bytes; a slice: 1920 bytes
    recipe = replace(RECIPE, spacing_mm=(2.5, 4.0, 4.0))
    expected = convert(tmp_path / "dicom", tmp_path / "cpu", recipe, backend="cpu")
    assert expected.counts == {"ok": 4}
    run = convert(tmp_path / "dicom", tmp_path / "out", recipe, backend="gpu")
    results = by_name(run)
    statuses = {name: r.status for name, r in results.items()}
    assert statuses == {"a-never": "failed", "b-fits": "ok", "c-quarter": "ok", "d-single": "ok"}
    assert results["a-never"].codes == ("device-memory",)
    small = open_gpus([0])[0]
    small.chunk_slices = small.slab_slices = 1
    need = device_bytes(make_plan(*planned(tmp_path / "dicom" / "a-never", recipe)), small, "operators") / 1e9
    assert re.fullmatch(
        r"DeviceMemoryError: Out of memory allocating 7,680 bytes \(allocated so far: [\d,]+ bytes\)\.; first "
        r"\(device 0\) has 10\.00 GB free; in chunks of 1 slices the series needs about "
        rf"{need:.2f} GB, alone on the device: ask for a coarser --spacing or a smaller --size, or use --backend cpu",
        results["a-never"].reason,
    )
    # First all series; then each one alone after the workers have stopped, in chunks of 64, 16 and 1 slices.
    first, *later = watched.log
    assert first[:2] == (["a-never", "b-fits", "c-quarter", "d-single"], 64)
    ladder = [entry if entry == "stop" else entry[:2] for entry in later]
    assert ladder == [
        *("stop", (["a-never"], 64), "stop", (["a-never"], 16), "stop", (["a-never"], 1)),
        *("stop", (["c-quarter"], 64), "stop", (["c-quarter"], 16)),
        *("stop", (["d-single"], 64), "stop", (["d-single"], 16), "stop", (["d-single"], 1)),
        "stop",  # the end of the run
    ]
    cpu = {name: image for name, image in images(tmp_path / "cpu").items() if "a-never" not in name}
    assert largest_difference(images(tmp_path / "out"), cpu) <= 1


@machine(replace(ONE, largest_bytes=5120))
@pytest.mark.usefixtures("cupy_on_host")
def test_the_ndimage_engine_is_not_tried_in_smaller_chunks(tmp_path: Path, watched: Watched) -> None:
    add(tmp_path / "dicom" / "large", matrix=(40, 40))
    run = convert(tmp_path / "dicom", tmp_path / "out", RECIPE, engine="ndimage", backend="gpu")
    assert run.counts == {"failed": 1}
    assert [entry[:2] for entry in watched.log if entry != "stop"][1:] == [(["large"], 64)]


@machine(replace(ONE, gpus=(Gpu("GPU-0", "first", memory_bytes=4 * 10**9),)))
@pytest.mark.usefixtures("cupy_on_host")
def test_tasks_share_the_device_memory_that_the_contexts_leave(tmp_path: Path, watched: Watched) -> None:
    add(tmp_path / "dicom" / "p1")
    assert convert(tmp_path / "dicom", tmp_path / "out", RECIPE, backend="gpu", jobs=16).counts == {"ok": 1}
    # 0.8 · 4 GB / 2 = 1.6 GB, a context is 0.63 GB
    (place,) = watched.places
    assert place.workers == 2
    assert place.budget_bytes == pytest.approx(0.8 * 4 * 10**9 - 2 * CONTEXT_BYTES, abs=10_000)
    (_, _, cost), *_ = watched.log
    plan = make_plan(*planned(tmp_path / "dicom" / "p1"))
    assert cost == [device_bytes(plan, open_gpus([0])[0], "operators")] > [0]


def test_backend_gpu_never_falls_back_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path / "dicom" / "p1")

    def broken(_: object) -> None:
        raise BackendError("the GPU does not work")

    monkeypatch.setattr("gpuprep.compute.backend.open_gpus", broken)
    with pytest.raises(BackendError, match="does not work"):
        convert(tmp_path / "dicom", tmp_path / "out", RECIPE, backend="gpu")
    assert not (tmp_path / "out").exists()


def planned(folder: Path, recipe: Recipe = RECIPE) -> Any:
    (only,) = scan(folder, recipe, backend=NumpyBackend()).planned
    assert only.plan is not None
    return only.plan.source, recipe
