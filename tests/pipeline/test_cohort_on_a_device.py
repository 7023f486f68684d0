"""Cohorts on the simulated GPU: sharing of memory, lack of memory, loss of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from standin import SimulatedGpu

from gpuprep.compute.backend import NumpyBackend
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


def add(folder: Path, slices: int = 6, matrix: tuple[int, int] = (20, 24)) -> None:
    stored = np.random.default_rng(slices).integers(0, 3000, (slices, *matrix)).astype(np.int16)
    write_series(folder, stored, SPACING)


def images(out: Path) -> dict[str, Any]:
    return {str(f.relative_to(out)): tifffile.imread(f).tolist() for f in sorted(out.rglob("*.tif"))}


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


def on(backend: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuprep.pipeline.scan.get_backend", lambda _: backend)
    monkeypatch.setattr(resources, "get_backends", lambda *_: [backend])


def test_worker_processes_on_a_device_give_the_same_outputs_as_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        add(tmp_path / "dicom" / f"p{n}", slices=5 + n)
    on_cpu = convert(tmp_path / "dicom", tmp_path / "cpu", RECIPE, backend="cpu")
    on(SimulatedGpu(), monkeypatch)
    run = convert(tmp_path / "dicom", tmp_path / "device", RECIPE, jobs=2)
    assert run.counts == on_cpu.counts == {"ok": 4}
    assert len(images(tmp_path / "cpu")) > 40
    assert images(tmp_path / "device") == images(tmp_path / "cpu")
    assert {(r.backend, r.device) for r in run.results} == {("foreign", SimulatedGpu.device)}
    # 5 to 8 slices are one slab; 12 to 20 slices are downloaded, in chunks of 16 and slabs of 8.
    for name, result in by_name(run).items():
        slices = 5 + int(name[1])
        assert result.upload_s == 1
        assert result.download_s == 16 * sum(-(-min(16, rest) // 8) for rest in range(round(slices * 2.5), 0, -16))
        assert result.kernels_s > 0
    assert {r.kernels_s for r in on_cpu.results} == {None}


def test_a_lost_device_fails_its_series_and_the_next_one_gets_a_new_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the same process, every later call to the device would fail: see `standin`.
    for n, slices in enumerate((6, 7, 6, 6)):
        add(tmp_path / "dicom" / f"p{n}", slices=slices)
    on(SimulatedGpu(lost_at=7), monkeypatch)
    run = convert(tmp_path / "dicom", tmp_path / "out", RECIPE, jobs=1)
    results = by_name(run)
    assert {name: r.status for name, r in results.items()} == {"p0": "ok", "p1": "failed", "p2": "ok", "p3": "ok"}
    assert results["p1"].reason == "DeviceLostError: the stand-in failed: an illegal memory access was encountered"
    assert {r.backend for r in run.results} == {"foreign"}  # no fallback to another backend


def test_a_device_that_stays_lost_fails_every_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        add(tmp_path / "dicom" / f"p{n}", slices=7)
    on(SimulatedGpu(lost_at=7), monkeypatch)
    run = convert(tmp_path / "dicom", tmp_path / "out", RECIPE, jobs=2)
    assert run.counts == {"failed": 3}
    assert not images(tmp_path / "out")


def test_series_without_enough_device_memory_are_tried_again_alone_and_in_smaller_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: Watched
) -> None:
    # The largest arrays are the HU of a slab of 6, 4 or 1 slices, with 4 bytes per voxel. The limit is 12 kB.
    add(tmp_path / "dicom" / "a-never", matrix=(60, 60))  # a slice: 14.4 kB
    add(tmp_path / "dicom" / "b-fits", matrix=(20, 24))  # 6 slices: 11.5 kB
    add(tmp_path / "dicom" / "c-quarter", matrix=(30, 40))  # 6 slices: 28.8 kB; 2 slices: 9.6 kB
    add(tmp_path / "dicom" / "d-single", matrix=(45, 50))  # 2 slices: 18 kB; a slice: 9 kB
    expected = convert(tmp_path / "dicom", tmp_path / "cpu", RECIPE, backend="cpu")
    assert expected.counts == {"ok": 4}
    backend = SimulatedGpu(largest=12_000)
    on(backend, monkeypatch)
    run = convert(tmp_path / "dicom", tmp_path / "out", RECIPE)
    results = by_name(run)
    statuses = {name: r.status for name, r in results.items()}
    assert statuses == {"a-never": "failed", "b-fits": "ok", "c-quarter": "ok", "d-single": "ok"}
    assert results["a-never"].codes == ("device-memory",)
    need = device_bytes(make_plan(*planned(tmp_path / "dicom" / "a-never")), smallest(), "operators") / 1e9
    assert results["a-never"].reason == (
        "DeviceMemoryError: out of memory allocating 14400 bytes; the stand-in has 100000000000 bytes free; in chunks "
        f"of 1 slices the series needs about {need:.2f} GB, alone on the device: ask for a coarser --spacing or a "
        "smaller --size, or use --backend cpu"
    )
    # First all series; then each one alone after the workers have stopped, in chunks of 16, 4 and 1 slices.
    first, *later = watched.log
    assert first[:2] == (["a-never", "b-fits", "c-quarter", "d-single"], 16)
    ladder = [entry if entry == "stop" else entry[:2] for entry in later]
    assert ladder == [
        *("stop", (["a-never"], 16), "stop", (["a-never"], 4), "stop", (["a-never"], 1)),
        *("stop", (["c-quarter"], 16), "stop", (["c-quarter"], 4)),
        *("stop", (["d-single"], 16), "stop", (["d-single"], 4), "stop", (["d-single"], 1)),
        "stop",  # the end of the run
    ]
    assert (backend.chunk_slices, backend.slab_slices) == (16, 8)  # unchanged for other series
    cpu, device = images(tmp_path / "cpu"), images(tmp_path / "out")
    assert set(device) == {name for name in cpu if "a-never" not in name}
    worst = max(np.abs(np.subtract(device[name], cpu[name])).max() for name in device)
    assert worst <= 1  # products of other block sizes may round differently


def test_the_ndimage_engine_is_not_tried_in_smaller_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: Watched
) -> None:
    add(tmp_path / "dicom" / "large", matrix=(40, 40))
    on(SimulatedGpu(largest=5_000), monkeypatch)
    run = convert(tmp_path / "dicom", tmp_path / "out", RECIPE, engine="ndimage")
    assert run.counts == {"failed": 1}
    assert [entry[:2] for entry in watched.log if entry != "stop"][1:] == [(["large"], 16)]


def test_tasks_share_the_device_memory_that_the_contexts_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: Watched
) -> None:
    add(tmp_path / "dicom" / "p1")
    free = 4 * 10**9
    backend = SimulatedGpu(memory=free)
    on(backend, monkeypatch)
    assert convert(tmp_path / "dicom", tmp_path / "out", RECIPE, jobs=16).counts == {"ok": 1}
    # 0.8 · 4 GB / 2 = 1.6 GB, a context is 0.63 GB
    assert watched.places == [WorkerGroup(2, int(0.8 * free) - 2 * CONTEXT_BYTES)]
    (_, _, cost), *_ = watched.log
    plan = make_plan(*planned(tmp_path / "dicom" / "p1"))
    assert cost == [device_bytes(plan, backend, "operators")] > [0]


def test_backend_gpu_never_falls_back_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path / "dicom" / "p1")

    def broken(_: object) -> None:
        raise BackendError("the GPU does not work")

    monkeypatch.setattr("gpuprep.compute.backend.open_gpus", broken)
    with pytest.raises(BackendError, match="does not work"):
        convert(tmp_path / "dicom", tmp_path / "out", RECIPE, backend="gpu")
    assert not (tmp_path / "out").exists()


def scanned(folder: Path) -> Any:
    return scan(folder, RECIPE, backend=NumpyBackend())[1]


def planned(folder: Path) -> Any:
    (only,) = scanned(folder)
    assert only.plan is not None
    return only.plan.source, RECIPE


def smallest() -> Any:
    least = SimulatedGpu()
    least.chunk_slices = least.slab_slices = 1
    return least
