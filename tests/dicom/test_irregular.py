"""Tests of corrections of irregular stacks: tilt, gaps, uneven spacing and orientations, on analytical objects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
from conftest import to_numpy
from numpy.typing import NDArray
from pydicom import Dataset
from scipy.interpolate import CubicSpline

import gpuprep
from gpuprep.compute.backend import Backend, NumpyBackend
from gpuprep.compute.process import host_chunks
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.stacking_rules import Rules
from gpuprep.core.volume import StoredVolume, Volume
from gpuprep.dicom.audit import audit
from gpuprep.testing import write_series

HU_ONLY = Recipe(window_hu=None, size=None)
AS_ACQUIRED = Recipe(window_hu=None, size=None, spacing_mm=None)


def voxel_positions_mm(volume: Volume) -> NDArray[np.float64]:
    """Return the position of every voxel of a volume in mm: array of shape (k, j, i, 3)."""
    indices = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), axis=-1)
    return np.asarray(indices @ volume.affine[:3, :3].T + volume.affine[:3, 3])


def write_object(
    folder: Path,
    hu: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    positions_mm: NDArray[np.float64],
    orientation: tuple[float, ...],
    matrix: tuple[int, int],
    spacing_mm: tuple[float, float],
    slope: float = 1.0,
) -> Path:
    """Write slices of an object, given as a function from (x, y, z) to HU, at these positions; return the folder."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    j, i = np.meshgrid(*map(np.arange, matrix), indexing="ij")
    points = (
        positions_mm[:, None, None]
        + (j * spacing_mm[0])[None, ..., None] * column
        + (i * spacing_mm[1])[None, ..., None] * row
    )
    stored = np.round((hu(points) + 1024) / slope).astype(np.int16)

    def position(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [f"{v:.10g}" for v in positions_mm[k]]
        ds.RescaleSlope, ds.RescaleIntercept = f"{slope:.10g}", "-1024"
        del ds.PixelPaddingValue

    write_series(folder, stored, (1.0, *spacing_mm), orientation=orientation, change=position)
    return folder


def process_folder(folder: Path, recipe: Recipe, backend: Backend | None = None) -> Volume:
    series = gpuprep.discover(folder, recipe.rules)
    assert len(series) == 1
    return gpuprep.process(gpuprep.read(series[0], recipe), recipe, backend=backend or "cpu")


RODS_MM = ((-20.0, -14.0), (13.0, -9.0), (2.0, 20.0))
ROD_RADIUS_MM = 8.0


def rods(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return HU of rods of 600 HU along z in a block of 40 HU, with edges some millimetres wide."""
    hu = np.full(points.shape[:-1], 40.0)
    for x, y in RODS_MM:
        distance = np.hypot(points[..., 0] - x, points[..., 1] - y)
        hu += 560 / (1 + np.exp((distance - ROD_RADIUS_MM) / 0.6))
    return hu


def write_tilted(folder: Path, tilt_deg: float) -> Path:
    """Write 40 slices, 2.5 mm apart along z, with planes tilted about x, as with a tilted gantry."""
    tilt = np.radians(tilt_deg)
    orientation = (1, 0, 0, 0, float(np.cos(tilt)), float(-np.sin(tilt)))
    z = np.arange(40) * 2.5 - 50
    positions = np.stack([np.full(40, -40.0), np.full(40, -45.0), z], axis=1)
    return write_object(folder, rods, positions, orientation, (112, 100), (0.8, 0.8))


@pytest.mark.parametrize("tilt_deg", [15.0, -15.0])
@pytest.mark.parametrize("recipe", [AS_ACQUIRED, HU_ONLY], ids=["as-acquired", "1 mm"])
def test_rods_scanned_with_a_tilted_gantry_are_straight_in_the_output(
    tmp_path: Path, tilt_deg: float, recipe: Recipe, backend: Backend
) -> None:
    # Trap 11. Without the correction, rods are shifted by 0.65 mm per slice.
    folder = write_tilted(tmp_path, tilt_deg)
    found = audit(gpuprep.discover(folder)[0])
    assert (found.verdict, found.codes) == ("fixed", ("tilt",))
    assert found.measures.tilt_deg == pytest.approx(15, abs=1e-3)
    assert found.measures.spacing_mm == pytest.approx(2.5 * np.cos(np.radians(15)))
    volume = process_folder(folder, recipe, backend)
    values, positions = to_numpy(volume.values), voxel_positions_mm(volume)
    affine = volume.affine[:3, :3] / volume.spacing_mm
    assert affine.T @ affine == pytest.approx(np.eye(3), abs=1e-6)  # orthogonal: no shear is left
    rods_seen = 0
    outer_layers = (
        (volume.spacing_mm[0] - 2.5 * np.cos(np.radians(15))) / 2 / volume.spacing_mm[0]
    )  # of the outer slices
    for k in range(int(np.ceil(-outer_layers)), volume.shape[0] - int(np.ceil(-outer_layers))):
        for x, y in RODS_MM:
            near = np.hypot(positions[k, ..., 0] - x, positions[k, ..., 1] - y) < 13
            weight = np.clip(values[k][near] - 40, 0, None)
            full = near.sum() * 0.8**2 if recipe.spacing_mm is None else near.sum()
            if full < 0.98 * np.pi * 13**2 / np.cos(np.radians(15)) or weight.sum() == 0:
                continue  # the slice does not contain the whole rod
            if values[k][near].min() < 0:
                continue  # air added by the correction is near
            rods_seen += 1
            centre = weight @ positions[k][near][:, :2] / weight.sum()
            assert np.hypot(*(centre - (x, y))) < 0.1
            inner = np.hypot(positions[k, ..., 0] - x, positions[k, ..., 1] - y) < 2
            assert np.abs(values[k][inner] - 600).max() < 1
    assert rods_seen > volume.shape[0]


@pytest.mark.parametrize("tilt_deg", [15.0, -15.0])
def test_tilt_correction_adds_air_and_loses_no_voxel(tmp_path: Path, tilt_deg: float) -> None:
    # Traps 11, 12.
    volume = process_folder(write_tilted(tmp_path, tilt_deg), AS_ACQUIRED)
    drift_mm = 39 * 2.5 * np.sin(np.radians(15))
    rows = 112 + int(np.ceil(drift_mm / 0.8))
    assert volume.shape == (40, rows, 100)
    values = np.asarray(volume)
    for k in range(40):
        shift = (k if tilt_deg < 0 else 39 - k) * 2.5 * np.sin(np.radians(15)) / 0.8
        inside = np.flatnonzero((np.arange(rows) >= shift - 0.499) & (np.arange(rows) <= shift + 111 + 0.499))
        outside = np.setdiff1d(np.arange(rows), [*inside, inside[0] - 1, inside[-1] + 1])
        assert (values[k, outside] == -1000).all()
        assert values[k, inside].min() > 30


def test_engines_agree_on_a_tilted_and_uneven_stack(tmp_path: Path) -> None:
    # Trap 16.
    tilt = np.radians(12)
    along = np.cumsum([0, 2, 2, 2.2, 1.7, 2, 2, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    positions = np.stack([np.full(20, -30.0), np.full(20, -35.0), along], axis=1)
    folder = write_object(tmp_path, rods, positions, (1, 0, 0, 0, np.cos(tilt), -np.sin(tilt)), (90, 80), (0.8, 0.9))
    for recipe in (HU_ONLY, Recipe(window_hu=None, size=(64, 60), spacing_mm=(5, 2, 2), anti_alias="both", order=1)):
        volume = gpuprep.read(gpuprep.discover(folder)[0], recipe)
        first, second = (
            np.asarray(gpuprep.process(volume, recipe, backend="cpu", engine=engine))
            for engine in ("operators", "ndimage")
        )
        assert np.abs(first - second).max() <= 0.01


UNEVEN_MM = np.array([0, 2, 4.1, 6, 8, 12.1, 14, 16, 18, 19.4, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 44.0])
"""2 mm apart, with one slice missing and two out of place."""


def write_uneven(folder: Path, hu: Callable[[NDArray[np.float64]], NDArray[np.float64]], slope: float = 1.0) -> Path:
    positions = np.stack([np.full(len(UNEVEN_MM), -10.0), np.full(len(UNEVEN_MM), -12.0), UNEVEN_MM - 20], axis=1)
    return write_object(folder, hu, positions, (1, 0, 0, 0, 1, 0), (24, 20), (1.0, 1.0), slope)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), (3.0, 1.0, 1.0)])
def test_a_ramp_in_z_is_preserved_with_uneven_slices(
    tmp_path: Path, order: int, spacing: tuple[float, float, float] | None, backend: Backend
) -> None:
    # Traps 4, 5, 7. Stored values in steps of 1/1000 HU represent positions of a tenth of a millimetre exactly.
    folder = write_uneven(tmp_path, lambda p: p[..., 2] - 1024 + 20, slope=0.01)
    found = audit(gpuprep.discover(folder)[0])
    assert (found.verdict, found.codes) == ("fixed", ("gap", "uneven"))
    ((after, gap_mm, missing),) = found.measures.gaps
    assert (after, missing) == ("S1-0018.dcm", 1)
    assert gap_mm == pytest.approx(4.1)
    volume = process_folder(
        folder, Recipe(window_hu=None, size=None, spacing_mm=spacing, order=order, padding="keep"), backend
    )
    z = voxel_positions_mm(volume)[..., 2]
    values = to_numpy(volume.values) + 1024 - 20
    inside = (z >= -20) & (z <= 24)
    assert inside.mean() > 0.9
    assert np.abs(values - z)[inside].max() < 1e-3


def test_cubic_resampling_of_uneven_slices_equals_the_spline_through_their_positions(tmp_path: Path) -> None:
    # Trap 7.
    rng = np.random.default_rng(7)
    noise = rng.uniform(-500, 500, (len(UNEVEN_MM), 24, 20)).round()
    folder = write_uneven(tmp_path, lambda _: noise)
    volume = process_folder(folder, Recipe(window_hu=None, size=None, spacing_mm=(1.0, 1.0, 1.0)))
    z = voxel_positions_mm(volume)[:, 0, 0, 2] + 20
    expected = CubicSpline(UNEVEN_MM, noise, axis=0)(np.clip(z, 0, 44))
    assert np.abs(np.asarray(volume) - expected).max() < 0.01


def test_policy_keep_stacks_irregular_slices_and_strict_rejects_them(tmp_path: Path) -> None:
    folder = write_uneven(tmp_path, lambda p: p[..., 0] * 10)
    kept = audit(gpuprep.discover(folder)[0], Rules(policy="keep"))
    assert (kept.verdict, kept.codes) == ("ok", ("gap",))
    assert kept.stack is not None
    assert kept.stack.geometry.shape == (22, 24, 20)
    assert kept.stack.geometry.spacing_mm == pytest.approx((44 / 21, 1, 1))
    strict = audit(gpuprep.discover(folder)[0], Rules(policy="strict"))
    assert (strict.verdict, strict.codes) == ("rejected", ("gap",))
    leaning = audit(gpuprep.discover(write_tilted(tmp_path / "tilt", 15))[0], Rules(policy="keep"))
    assert leaning.codes == ("tilt",)
    assert leaning.stack is not None
    assert leaning.stack.geometry.affine[:3, 0] == pytest.approx([0, 0, 2.5])  # sheared, with the true positions


@pytest.mark.parametrize(
    ("lost", "max_missing", "share", "verdict"),
    [
        ([10], 3, 0.1, "fixed"),
        ([10, 11, 12], 3, 0.1, "fixed"),
        ([10, 11, 12, 13], 3, 0.5, "rejected"),
        ([10, 11, 12, 13], 4, 0.5, "fixed"),
        ([5, 10, 15, 20], 3, 0.1, "fixed"),
        ([5, 10, 15, 20, 25], 3, 0.1, "rejected"),
        ([10], 0, 0.1, "rejected"),
    ],
)
def test_gaps_are_filled_up_to_the_limits(
    tmp_path: Path, lost: list[int], max_missing: int, share: float, verdict: str
) -> None:
    # Trap 4. Of 40 slices: 4 are 10 %, 5 are more.
    for n, file in enumerate(write_series(tmp_path, np.zeros((40, 8, 9), dtype=np.int16), (2.0, 1.0, 1.0))):
        if n in lost:
            file.unlink()
    rules = Rules(max_missing=max_missing, max_missing_share=share)
    found = audit(gpuprep.discover(tmp_path, rules)[0], rules)
    assert (found.verdict, found.codes) == (verdict, ("gap",))
    assert found.to_dict()["missing"] == len(lost)
    if found.stack is not None:
        assert found.stack.geometry.shape == (40, 8, 9)
        assert found.stack.geometry.spacing_mm == pytest.approx((2, 1, 1))


OBLIQUE = (0.9541666, -0.2080757, 0.2151061, 0.2785886, 0.880128, -0.3843997)
ORIENTATIONS = {
    "axial": ((1, 0, 0, 0, 1, 0), "axial SPL", [0, 1, 2], []),
    "prone": ((-1, 0, 0, 0, -1, 0), "axial SAR", [0, 1, 2], [1, 2]),
    "feet-first": ((1, 0, 0, 0, -1, 0), "axial IAL", [0, 1, 2], [0, 1]),
    "coronal": ((1, 0, 0, 0, 0, -1), "coronal PIL", [1, 0, 2], [0]),
    "sagittal": ((0, 1, 0, 0, 0, -1), "sagittal RIP", [1, 2, 0], [0, 2]),
    "oblique": (OBLIQUE, "axial SPL", [0, 1, 2], []),
}
"""Cosines; expected label of the orientation; axes and flips of the array for reorientation to axial LPS."""


@pytest.mark.parametrize(("orientation", "label", "axes", "flips"), ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_reorientation_to_axial_permutes_voxels_without_changing_values(
    tmp_path: Path, noise: Callable[..., NDArray[np.int16]], orientation: tuple[float, ...], label: str,
    axes: list[int], flips: list[int], backend: Backend,
) -> None:  # fmt: skip
    # Traps 3, 35.
    stored = noise((9, 12, 14))
    write_series(tmp_path, stored, (2.5, 0.8, 0.7), orientation=orientation)
    series = gpuprep.discover(tmp_path)[0]
    found = audit(series)
    assert found.measures.orientation == label
    native = gpuprep.process(gpuprep.read(series), AS_ACQUIRED, backend="cpu")
    assert np.array_equal(np.asarray(native), stored - 1024.0)
    recipe = Recipe(window_hu=None, size=None, spacing_mm=None, orient="LPS")
    turned = gpuprep.process(gpuprep.read(series), recipe, backend=backend)
    values = to_numpy(turned.values)
    assert np.array_equal(values, np.flip((stored - 1024.0).transpose(axes), tuple(flips)))
    lps_directions = turned.affine[[2, 1, 0], :3]
    assert (np.argmax(np.abs(lps_directions), axis=0) == [0, 1, 2]).all()
    assert (np.diag(lps_directions) > 0).all()
    # Each native voxel is found at the same position in the reoriented volume.
    inverse = np.linalg.inv(turned.affine)
    for index in [(0, 0, 0), (8, 11, 13), (3, 7, 2)]:
        position = native.affine @ [*index, 1]
        k, j, i = np.rint((inverse @ position)[:3]).astype(int)
        assert (inverse @ position)[:3] == pytest.approx([k, j, i], abs=1e-6)
        assert values[k, j, i] == np.asarray(native)[index]


@pytest.mark.parametrize("orientation", [o[0] for o in ORIENTATIONS.values()], ids=ORIENTATIONS)
def test_uneven_slices_keep_their_positions_after_reorientation(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    # Traps 7, 35: 30 slices, one missing, HU = a linear function of the position in the patient.
    direction = np.array([3.0, -2.0, 5.0])
    normal = np.cross(orientation[:3], orientation[3:])
    along = np.delete(np.arange(30) * 2.0, 10)
    folder = write_object(
        tmp_path, lambda p: p @ direction, along[:, None] * normal, orientation, (30, 34), (1.5, 1.2), slope=0.05
    )
    recipe = Recipe(window_hu=None, size=None, spacing_mm=(1.3, 1.0, 1.0), orient="LPS")
    volume = process_folder(folder, recipe)
    expected = voxel_positions_mm(volume) @ direction
    index = tuple(slice(n // 3, 2 * n // 3) for n in volume.shape)
    assert (
        np.abs(np.asarray(volume) - expected)[index].max() < 0.1
    )  # half a step of stored values, after cubic interpolation


def test_the_real_tilted_series_is_upright_in_the_output(data: Path) -> None:
    # Trap 11, geometry only: the pixels are noise.
    folder = data / "d2n-failing" / "gantrytilting"
    headers = [pydicom.dcmread(f) for f in sorted(folder.rglob("*.dcm"))]
    positions = np.array([h.ImagePositionPatient for h in headers], dtype=float)
    row, column = np.array(headers[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    normal = np.cross(row, column)
    volume = process_folder(folder, AS_ACQUIRED)
    ours = volume.affine[:3, :3] / volume.spacing_mm
    assert ours == pytest.approx(np.stack([normal, column, row], axis=1), abs=1e-6)
    assert volume.spacing_mm[0] == pytest.approx(np.ptp(positions @ normal) / 3)
    values = np.asarray(volume)
    for h, position in zip(headers, positions, strict=True):
        # The centre of each slice keeps its position in the patient.
        centre = position + 256 * 0.41796875 * column + 256 * 0.41796875 * row
        k, j, i = (np.linalg.inv(volume.affine) @ [*centre, 1])[:3]
        assert (k, i) == pytest.approx((round(k), 256), abs=1e-3)
        # Interpolation changes noise, but not its mean over a patch.
        patch = h.pixel_array[206:307, 206:307].astype(float) * h.RescaleSlope + h.RescaleIntercept
        mine = values[round(k), round(j) - 50 : round(j) + 51, 206:307]
        assert mine.mean() == pytest.approx(patch.mean(), abs=1.0)


def test_a_correction_is_recorded_in_result_and_sidecar_with_its_numbers(tmp_path: Path) -> None:
    write_uneven(tmp_path / "dicom", lambda p: p[..., 0] * 10)
    run = gpuprep.convert(tmp_path / "dicom", tmp_path / "out", Recipe(size=(32, 32)), backend="cpu")
    (result,) = run.results
    assert (result.status, result.codes) == ("fixed", ("gap", "uneven"))
    assert "1 missing in 4.100 mm between S1-0018.dcm and S1-0017.dcm" in result.irregularities[0]
    sidecar = json.loads((tmp_path / "out" / result.folder / "volume.json").read_text())
    assert sidecar["verdict"] == "fixed"
    assert sidecar["codes"] == ["gap", "uneven"]
    assert sidecar["audit"]["gaps"] == [{"after": "S1-0018.dcm", "mm": pytest.approx(4.1), "missing": 1}]
    assert len(list((tmp_path / "out" / result.folder).glob("*.tif"))) == 46  # 23 layers of 2 mm
    assert run.exit_code == 0


def test_a_tilted_series_is_read_in_order_and_each_slice_once() -> None:
    """Memory does not grow with the length of a series, as each slice is requested once and in order."""
    requested: list[tuple[int, int]] = []
    geometry, count = None, 60

    class Source:
        slope, intercept, padding = np.ones(count), np.zeros(count), None

        def __init__(self, volume: Any) -> None:
            self.geometry, self.placement = volume.geometry, volume.placement

        def slab(self, start: int, stop: int) -> NDArray[Any]:
            requested.append((start, stop))
            return np.zeros((stop - start, 8, 9), dtype=np.int16)

    from gpuprep.core.geometry import Geometry, Placement
    from gpuprep.core.hounsfield import HuStatistics

    shift = np.stack([np.linspace(0, 5, count), np.zeros(count)], axis=1)
    placement = Placement(np.arange(count, dtype=float), shift, (8, 9))
    geometry = Geometry((count, 13, 9), np.diag([2.0, 1, 1, 1]))
    volume = StoredVolume(
        np.zeros((count, 8, 9), dtype=np.int16), np.ones(count), np.zeros(count), None, geometry, HuStatistics(),
        placement=placement,
    )  # fmt: skip
    recipe = Recipe(window_hu=None, size=None)
    plan = make_plan(geometry, recipe, placement)
    for _ in host_chunks(Source(volume), plan, NumpyBackend()):
        pass
    assert [start for start, _ in requested] == [0, *(stop for _, stop in requested[:-1])]
    assert requested[-1][1] == count


def test_a_stack_file_equals_the_slice_files(tmp_path: Path) -> None:
    write_tilted(tmp_path / "dicom", 15)
    small = Recipe(spacing_mm=(5.0, 2.0, 2.0), size=None)
    one = gpuprep.convert(tmp_path / "dicom", tmp_path / "a", small, backend="cpu")
    recipe = Recipe(spacing_mm=(5.0, 2.0, 2.0), size=None, format="tif-stack")
    other = gpuprep.convert(tmp_path / "dicom", tmp_path / "b", recipe, backend="cpu")
    slices = sorted((tmp_path / "a" / one.results[0].folder).glob("*.tif"))
    stacked = tifffile.imread(tmp_path / "b" / other.results[0].folder / "volume.tif")
    assert np.array_equal(np.stack([tifffile.imread(f) for f in slices]), stacked)
