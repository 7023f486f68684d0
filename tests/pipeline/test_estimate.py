"""Estimates of disk, memory and time of a run, compared with values computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_manifest import OK

from gpuprep.compute.backend import NumpyBackend
from gpuprep.core.recipe import Recipe
from gpuprep.errors import RequestError
from gpuprep.pipeline.cohort import convert
from gpuprep.pipeline.estimate import Experience, Forecast
from gpuprep.pipeline.planned_series import Needs
from gpuprep.pipeline.scan import scan
from gpuprep.testing import write_series

RECIPE = Recipe(spacing_mm=None, size=None, dtype="uint16")


@pytest.fixture
def dicom(tmp_path: Path, noise: Callable[..., NDArray[np.int16]]) -> Path:
    """Series of 4 and 6 slices of 10 × 12."""
    for n, slices in enumerate((4, 6)):
        write_series(tmp_path / "dicom" / f"p{n}", noise((slices, 10, 12), n), (2.5, 0.8, 0.7))
    return tmp_path / "dicom"


def empty(**facts: Any) -> Forecast:
    defaults: dict[str, Any] = {
        "workers": 2, "budget_bytes": None, "at_rest_bytes": 100, "free_disk_bytes": 1000, "experience": None,
        "compressed": False,
    }  # fmt: skip
    return Forecast(**(defaults | facts))


def filled(forecast: Forecast, dicom: Path, *memory: int) -> Forecast:
    """Add series that need the given memory, and 300 bytes of disk and 50 voxels each."""
    planned = scan(dicom, RECIPE).planned[0]
    for need in memory:
        forecast.add(replace(planned, needs=Needs(300, need, 50)))
    return forecast


def test_output_bytes_are_those_of_the_voxels(dicom: Path, tmp_path: Path) -> None:
    forecast = scan(dicom, RECIPE, out=tmp_path / "out").forecast
    assert (forecast.series, forecast.todo, forecast.output_bytes) == (2, 2, 10 * 10 * 12 * 2)
    assert forecast.disk_bytes == forecast.output_bytes
    assert forecast.free_disk_bytes is not None
    assert forecast.voxels == 2 * 10 * 10 * 12  # read and written
    assert forecast.expected_s is None
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_the_largest_concurrent_series_within_the_limit(dicom: Path) -> None:
    assert filled(empty(), dicom, 5, 70, 30, 60).memory_bytes == 2 * 100 + 70 + 60
    assert filled(empty(budget_bytes=90), dicom, 5, 70, 30, 60).memory_bytes == 2 * 100 + 90
    assert (
        filled(empty(budget_bytes=50), dicom, 5, 70, 30, 60).memory_bytes == 2 * 100 + 70
    )  # a larger series runs alone
    assert filled(empty(), dicom, 5, 70, 30).largest_bytes == 70


def test_time_is_proportional_to_voxels_and_divided_among_workers(dicom: Path) -> None:
    experience = Experience(s_per_voxel=0.1, disk_share=0.25, series=3)
    assert filled(empty(experience=experience), dicom, 1, 1, 1, 1).expected_s == pytest.approx(4 * 50 * 0.1 / 2)
    assert filled(empty(experience=experience), dicom, 1).expected_s == pytest.approx(
        50 * 0.1
    )  # a single series cannot be divided


def test_a_misfit_is_reported_with_its_numbers(dicom: Path) -> None:
    assert filled(empty(), dicom, 1, 1, 1).misfit == ""
    assert filled(empty(free_disk_bytes=10**9), dicom, 1).misfit == ""
    tight = filled(empty(free_disk_bytes=20_000_000), dicom)
    tight.output_bytes = 2_340_000_000
    assert tight.misfit.startswith("the outputs need 2.34 GB and 20 MB are free: free some,")
    unknown = filled(empty(compressed=True, free_disk_bytes=10), dicom, 1)
    assert (unknown.disk_bytes, unknown.misfit) == (None, "")
    known = filled(empty(compressed=True, experience=Experience(1, 0.25, 1)), dicom, 1, 1)
    assert known.disk_bytes == 150


def test_experience_is_time_and_disk_per_voxel_of_earlier_series() -> None:
    one = replace(OK, source_shape=(1, 10, 10), shape=(2, 10, 10), read_s=1, process_s=2, write_s=3, bytes=150)
    two = replace(one, masks_s=4.0, bytes=50)
    experience = Experience.of([one, two], Recipe(dtype="uint16"))
    assert experience == Experience(s_per_voxel=16 / 600, disk_share=200 / 800, series=2)
    assert Experience.of([], Recipe()) is None


def test_experience_comes_from_the_same_recipe_only(dicom: Path, tmp_path: Path) -> None:
    convert(dicom, tmp_path / "out", RECIPE, backend=NumpyBackend("matmul"))
    (dicom / "p0" / "more").mkdir()
    known = scan(dicom, RECIPE, out=tmp_path / "out", backend="cpu").forecast
    assert known.experience is not None
    assert (known.experience.series, known.skipped) == (2, 2)
    assert scan(dicom, replace(RECIPE, dtype="uint8"), out=tmp_path / "out").forecast.experience is None


def test_without_experience_one_series_is_converted_as_a_trial(dicom: Path, tmp_path: Path) -> None:
    found = scan(dicom, RECIPE, out=tmp_path / "out", calibrate=True).forecast
    assert found.experience is not None
    assert found.experience.series == 1
    assert found.expected_s is not None
    assert found.expected_s > 0
    assert not (tmp_path / "out").exists()


def test_outputs_to_be_replaced_count_as_free_space(dicom: Path, tmp_path: Path) -> None:
    before = convert(dicom, tmp_path / "out", RECIPE, backend=NumpyBackend("matmul"))
    smaller = scan(dicom, replace(RECIPE, dtype="uint8"), out=tmp_path / "out").forecast
    assert smaller.replaced_bytes == sum(r.bytes for r in before.results)
    assert smaller.disk_bytes == 0


def test_a_run_that_cannot_fit_starts_only_without_the_room_check(
    dicom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuprep.output.folder_store.Output.free_bytes", lambda _: 1000)
    with pytest.raises(RequestError, match=r"the outputs need 2\.4 kB and 1 kB are free: free some, choose"):
        convert(dicom, tmp_path / "out", RECIPE, backend=NumpyBackend("matmul"))
    assert not list((tmp_path / "out").rglob("*.tif"))
    run = convert(dicom, tmp_path / "out", RECIPE, backend=NumpyBackend("matmul"), room_check=False)
    # 4 × 10 × 12 × 2 = 960 bytes fit, 1440 do not.
    assert {r.slices: (r.status, r.codes) for r in run.results} == {4: ("ok", ()), 6: ("failed", ("disk-full",))}
    assert next(r.reason for r in run.results if r.slices == 6) == (
        "OutputError: it needs 1.44 kB and 1 kB are free: free some and run again"
    )
