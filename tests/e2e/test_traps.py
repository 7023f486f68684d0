"""Numbered traps in stacking CT DICOM, HU conversion, resampling and masks: ``pytest tests/e2e/test_traps.py -v``.

Expected values are computed by hand or with pydicom, SciPy and SimpleITK, never with gpuprep.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import math
import os
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from conftest import axial, renamed, stored_volume
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from scipy import ndimage
from segmentations import write_rtstruct, write_seg

import gpuprep
from gpuprep.compute.backend import Backend, Engine, NumpyBackend, get_backend
from gpuprep.compute.process import host_chunks
from gpuprep.core.geometry import Geometry, Placement
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.stacking_rules import Rules
from gpuprep.core.volume import Volume
from gpuprep.dicom import decode
from gpuprep.dicom.audit import audit
from gpuprep.dicom.headers import read_headers
from gpuprep.errors import GeometryError, InputError, OutputError
from gpuprep.executors.processes import InProcessExecutor
from gpuprep.output.read_volume import FinishedOutput
from gpuprep.output.records import SeriesResult
from gpuprep.output.verify import verify
from gpuprep.output.writers import tiff
from gpuprep.pipeline.events import Run
from gpuprep.pipeline.scan import scan
from gpuprep.report.html import write_report
from gpuprep.testing import write_series

sitk: Any = pytest.importorskip("SimpleITK")

Array = NDArray[Any]
Change = Callable[[Dataset, int], None]
Xyz = tuple[float, float, float]

TESTED: list[int] = []

SPACING = (2.5, 0.8, 0.7)
ORIGIN = (-100.0, -120.0, -300.0)
"""Default of `write_series`."""
HU = Recipe(spacing_mm=None, size=None, window_hu=None)
"""HU without resampling."""
KEEP = replace(HU, policy="keep")
"""HU without resampling, also of values that are no CT numbers."""
ENGINES: tuple[Engine, ...] = ("operators", "ndimage")


def trap(number: int, name: str) -> pytest.MarkDecorator:
    """Mark the test of a trap by number."""
    TESTED.append(number)
    return pytest.mark.parametrize("row", [pytest.param(number, id=f"trap-{number:02}-{name}")], indirect=True)


@pytest.fixture(autouse=True)
def row(request: pytest.FixtureRequest) -> int | None:
    return getattr(request, "param", None)


def test_every_trap_has_a_test() -> None:
    assert sorted(set(TESTED)) == list(range(1, 63))


# Helpers


def noise(slices: int = 6, rows: int = 20, columns: int = 24, seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(0, 3000, (slices, rows, columns)).astype(np.int16)


def found(folder: Path, rules: Rules | None = None) -> gpuprep.Series:
    (series,) = gpuprep.discover(folder, rules)
    return series


def in_hu(series: gpuprep.Series, recipe: Recipe = HU, engine: Engine = "operators") -> Volume:
    return gpuprep.process(gpuprep.read(series, recipe), recipe, backend="cpu", engine=engine)


def convert(folder: Path, out: Path, recipe: Recipe = HU) -> Run:
    return gpuprep.convert(folder, out, recipe, backend="cpu")


def alone(run: Run) -> SeriesResult:
    (result,) = run.results
    return result


def written(out: Path, result: SeriesResult) -> Array:
    return np.stack([tifffile.imread(f) for f in sorted((out / result.folder).glob("[0-9]*.tif"))])


def by_pydicom(files: list[Path]) -> NDArray[np.float64]:
    """Return HU decoded by pydicom, ordered by position along the normal."""
    slices = [pydicom.dcmread(f) for f in files]
    normal = np.cross(slices[0].ImageOrientationPatient[:3], slices[0].ImageOrientationPatient[3:])
    slices.sort(key=lambda ds: float(np.dot(ds.ImagePositionPatient, normal)))
    return np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices])


def places_mm(shape: tuple[int, ...], affine: Array) -> Array:
    """Return the positions (x, y, z) of voxels in mm, shape (k, j, i, 3)."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.asarray(indices @ affine[:3, :3].T + affine[:3, 3])


def number(value: float) -> str:
    return f"{value:.10g}"


def at_heights(z_mm: list[float], hu: Callable[[float], float]) -> Change:
    """Return a change that moves axial slices to these heights; HU are `hu(z)` plus the values of `columns`."""

    def change(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [number(v) for v in (*ORIGIN[:2], z_mm[k])]
        ds.RescaleIntercept = number(hu(z_mm[k]))
        del ds.PixelPaddingValue

    return change


def columns(slices: int) -> NDArray[np.int16]:
    """Return slices whose pixels are their column index, so that no image is blank and its corners differ."""
    return np.broadcast_to(np.arange(10, dtype=np.int16), (slices, 8, 10)).copy()


def check_heights(volume: Volume, hu: Callable[[float], float], atol: float = 0.01) -> None:
    """Assert that the values of every slice are the `hu` of its height by the affine."""
    z_mm = volume.affine[2, 3] + volume.affine[2, 0] * np.arange(volume.shape[0])
    expected = np.array([hu(z) for z in z_mm])[:, None, None] + np.arange(10)
    np.testing.assert_allclose(np.asarray(volume.values), np.broadcast_to(expected, volume.shape), rtol=0, atol=atol)


# Order, spacing, completeness


@trap(1, "order")
@pytest.mark.parametrize(
    "orientation",
    [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (0.8, 0.6, 0, 0, 0, -1)],
    ids=["axial", "sagittal", "oblique"],
)
def test_slices_are_ordered_by_position_only(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    lots = [3, 7, 0, 5, 1, 6, 2, 4]

    def lie(ds: Dataset, k: int) -> None:
        ds.InstanceNumber, ds.SliceLocation = lots[k], f"{-lots[k]}"

    files = write_series(tmp_path, noise(8), SPACING, orientation=orientation, change=lie)
    files = [file.rename(tmp_path / f"{lots[k]:02}.dcm") for k, file in enumerate(files)]
    expected = by_pydicom(files)
    for order in (files, files[::-1], sorted(files)):
        (series,) = gpuprep.discover(order)
        np.testing.assert_array_equal(in_hu(series).values, expected)


@trap(2, "thickness-is-no-spacing")
def test_spacing_between_slices_comes_from_positions(tmp_path: Path) -> None:
    def lie(ds: Dataset, _: int) -> None:
        ds.SliceThickness, ds.SpacingBetweenSlices = "5", "1.25"

    write_series(tmp_path, noise(12), SPACING, change=lie)
    series = found(tmp_path)
    assert gpuprep.stack(series).geometry.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    volume = in_hu(series, replace(HU, spacing_mm=(1, 0.8, 0.7)))
    assert volume.shape == (30, 20, 24)  # 12 · 2.5 mm
    assert volume.spacing_mm[0] == pytest.approx(1)


@trap(3, "negative-spacing")
def test_a_negative_spacing_between_slices_does_not_reverse_the_stack(tmp_path: Path) -> None:
    def lie(ds: Dataset, _: int) -> None:
        ds.SpacingBetweenSlices = "-2.5"

    stored = noise()
    write_series(tmp_path, stored, SPACING, change=lie)
    volume = in_hu(found(tmp_path))
    np.testing.assert_array_equal(volume.values, stored - 1024.0)
    np.testing.assert_allclose(volume.affine[:3, 0], (0, 0, 2.5), atol=1e-9)
    assert volume.geometry.origin_mm == pytest.approx(ORIGIN)


@trap(4, "missing-slice")
def test_a_missing_slice_is_interpolated_and_recorded_without_shifting_others(tmp_path: Path) -> None:
    z_mm = [2.0 * k for k in range(12) if k != 4]
    hu = lambda z: 10 * z - 50  # noqa: E731
    write_series(tmp_path / "one", columns(11), (2, 0.8, 0.7), change=at_heights(z_mm, hu))
    stacked = gpuprep.stack(found(tmp_path / "one"))
    assert stacked.geometry.shape[0] == 12
    assert stacked.geometry.spacing_mm[0] == pytest.approx(2)
    for order, engine in product((1, 3), ENGINES):
        check_heights(in_hu(found(tmp_path / "one"), replace(HU, order=order), engine), hu)
    result = alone(convert(tmp_path / "one", tmp_path / "out"))
    assert (result.status, result.codes) == ("fixed", ("gap",))
    before = stacked.slices[3].name
    assert result.audit is not None
    assert result.audit["gaps"] == [{"after": before, "mm": pytest.approx(4), "missing": 1}]
    assert before in result.irregularities[0]
    assert alone(convert(tmp_path / "one", tmp_path / "strict", replace(HU, policy="strict"))).codes == ("gap",)

    many = [2.0 * k for k in range(60) if k not in (20, 21, 22, 23)]  # more than three in a row
    write_series(tmp_path / "many", columns(56), (2, 0.8, 0.7), change=at_heights(many, hu))
    result = alone(convert(tmp_path / "many", tmp_path / "out-many"))
    assert (result.status, result.codes) == ("rejected", ("gap",))


@trap(5, "first-two-slices")
def test_the_spacing_is_not_that_of_the_first_two_slices(tmp_path: Path) -> None:
    z_mm = [0.0, 1.0, *(1 + 2.5 * n for n in range(1, 11))]
    hu = lambda z: 7 * z - 20  # noqa: E731
    write_series(tmp_path, columns(len(z_mm)), SPACING, change=at_heights(z_mm, hu))
    stacked = gpuprep.stack(found(tmp_path))
    assert stacked.measures.spacing_mm == pytest.approx(2.5)
    assert stacked.measures.spacing_deviation_mm == pytest.approx(1.5)
    assert [i.code for i in stacked.irregularities] == ["uneven"]
    check_heights(in_hu(found(tmp_path)), hu)


@trap(6, "doubles")
def test_duplicates_are_dropped_separated_or_rejected(tmp_path: Path) -> None:
    stored = noise(10)
    first = write_series(tmp_path / "same", stored, (2, 0.8, 0.7))
    again = pydicom.dcmread(first[4])
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    again.save_as(tmp_path / "same" / "again.dcm")
    result = alone(convert(tmp_path / "same", tmp_path / "out-same"))
    assert (result.status, result.codes) == ("fixed", ("duplicate",))
    assert result.source_shape == (10, 20, 24)
    assert result.source_spacing_mm == pytest.approx((2, 0.8, 0.7))  # 11 slices would be 1.8 mm apart
    np.testing.assert_array_equal(written(tmp_path / "out-same", result), stored - 1024.0)

    other = noise(10, seed=1)
    uid = generate_uid()

    def acquisition(n: int) -> Change:
        def change(ds: Dataset, _: int) -> None:
            ds.AcquisitionNumber = n

        return change

    for n, values in ((1, stored), (2, other)):
        write_series(tmp_path / "two" / f"{n}", values, SPACING, series_uid=uid, change=acquisition(n))
    one, two = gpuprep.discover(tmp_path / "two")
    assert one.key != two.key
    np.testing.assert_array_equal(in_hu(one).values, stored - 1024.0)
    np.testing.assert_array_equal(in_hu(two).values, other - 1024.0)

    again.PixelData = other[4].tobytes()
    again.save_as(tmp_path / "same" / "again.dcm")
    with pytest.raises(GeometryError, match=r"again\.dcm") as error:
        gpuprep.read(found(tmp_path / "same"))
    assert error.value.code == "duplicate"
    result = alone(convert(tmp_path / "same", tmp_path / "out-unlike"))
    assert (result.status, result.codes) == ("rejected", ("duplicate",))


@trap(6, "interleaved-acquisitions")
@pytest.mark.parametrize("offset_mm", [1.25, 1.0])
def test_interleaved_acquisitions_are_not_one_volume(tmp_path: Path, offset_mm: float) -> None:
    uid = generate_uid()
    stacks = [noise(12, seed=n) for n in (1, 2)]
    for n, stored in enumerate(stacks):

        def acquisition(ds: Dataset, _: int, n: int = n) -> None:
            ds.AcquisitionNumber, ds.AcquisitionTime = n + 1, f"10150{n}"

        origin = (*ORIGIN[:2], ORIGIN[2] + n * offset_mm)
        write_series(tmp_path / "in" / f"{n}", stored, SPACING, series_uid=uid, origin_mm=origin, change=acquisition)
    run = convert(tmp_path / "in", tmp_path / "out")
    if run.counts != {"rejected": 1}:
        assert sorted(r.source_shape or () for r in run.results) == [(12, 20, 24)] * 2
        for result in run.results:
            values = written(tmp_path / "out", result)
            assert any(np.array_equal(values, stored - 1024.0) for stored in stacks)


@trap(7, "variable-spacing")
def test_uneven_slices_are_resampled_from_their_positions(tmp_path: Path) -> None:
    steps = [2.5] * 8 + [3.5] * 6
    z_mm = [0.0]
    for step in steps:
        z_mm.append(z_mm[-1] + step)
    square = lambda z: 0.2 * (z - 15) ** 2 - 100  # noqa: E731 - a cubic spline reproduces it exactly
    write_series(tmp_path / "a", columns(len(z_mm)), SPACING, change=at_heights(z_mm, square))
    result = alone(convert(tmp_path / "a", tmp_path / "out"))
    assert (result.status, result.codes) == ("fixed", ("uneven",))
    for engine in ENGINES:
        volume = in_hu(found(tmp_path / "a"), engine=engine)
        assert volume.affine[2, 3] + volume.affine[2, 0] * (volume.shape[0] - 1) == pytest.approx(z_mm[-1])
        check_heights(volume, square)

    head = [2.5 * n for n in range(12)] + [27.5 + 7.5 * n for n in range(1, 9)]  # a head CT: 2.5, then 7.5 mm
    write_series(tmp_path / "head", columns(len(head)), SPACING, change=at_heights(head, square))
    # Eight equal distances in a row are a second spacing, not gaps with missing slices.
    result = alone(convert(tmp_path / "head", tmp_path / "out-head"))
    assert (result.status, result.codes) == ("fixed", ("uneven",))
    check_heights(in_hu(found(tmp_path / "head")), square)


@trap(8, "tolerance")
def test_the_spacing_tolerance_allows_1_percent_or_rounding_and_can_be_set(tmp_path: Path) -> None:
    def codes(name: str, z_mm: list[float], recipe: Recipe = HU) -> tuple[str, ...]:
        if not (tmp_path / name).exists():
            spacing = (z_mm[1] - z_mm[0], 0.8, 0.7)
            write_series(tmp_path / name, columns(len(z_mm)), spacing, change=at_heights(z_mm, lambda z: z))
        (planned,) = scan(tmp_path / name, recipe).planned
        return planned.codes

    assert codes("float", [n * 0.1 * 7 + 1e-13 * (n % 2) for n in range(9)]) == ()
    assert codes("rounded", [round(0.625 * n, 2) for n in range(33)]) == ()  # gaps of 0.62 and 0.63
    assert codes("hundredth", [2.5 * n + 0.01 * (n % 2) for n in range(9)]) == ()  # gaps of 2.49 and 2.51
    uneven = [2.5 * n + (0.1 if n == 4 else 0) for n in range(9)]  # 4 % of the spacing
    assert codes("uneven", uneven) == ("uneven",)
    assert codes("uneven", uneven, replace(HU, spacing_tolerance=0.05)) == ()
    assert codes("hundredth", [], replace(HU, spacing_tolerance=0.001, position_tolerance_mm=0.001)) == ("uneven",)


@trap(9, "strangers")
def test_scouts_screenshots_and_report_pages_are_left_out_and_reported(tmp_path: Path) -> None:
    uid = generate_uid()
    stored = noise(8)
    write_series(tmp_path, stored, SPACING, series_uid=uid)

    def scout(ds: Dataset, _: int) -> None:
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    def page(ds: Dataset, _: int) -> None:
        ds.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        del ds.PixelPaddingValue
        ds.PixelData = bytes(ds.Rows * ds.Columns * 3)

    def screenshot(ds: Dataset, _: int) -> None:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage

    def lost(ds: Dataset, _: int) -> None:
        ds.ImageType = ["DERIVED", "SECONDARY"]
        del ds.ImagePositionPatient

    def coronal(ds: Dataset, _: int) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    strangers = (
        (scout, (32, 64)),
        (coronal, (20, 24)),
        (scout, (20, 24)),
        (page, (20, 24)),
        (lost, (20, 24)),
        (screenshot, (20, 24)),
    )
    for n, (change, shape) in enumerate(strangers, 2):
        write_series(tmp_path, noise(1, *shape), SPACING, series_uid=uid, series_number=n, change=change)
    cohort = gpuprep.discover(tmp_path)
    assert cohort.passed_over == {"Secondary Capture Image Storage": 1}
    (series,) = cohort
    reasons = ["colour", "localizer", "localizer", "other orientation", "secondary image"]
    assert sorted(why for _, why in series.left_out) == reasons
    assert {name for name, _ in series.left_out} == {f"S{n}-0001.dcm" for n in range(2, 7)}
    result = alone(convert(tmp_path, tmp_path / "out"))
    assert (result.status, result.codes) == ("fixed", ("left-out",))
    np.testing.assert_array_equal(written(tmp_path / "out", result), stored - 1024.0)


@trap(9, "image-type")
def test_a_derived_page_with_a_position_is_left_out(tmp_path: Path) -> None:
    uid = generate_uid()
    stored = noise(12)
    write_series(tmp_path / "in", stored, SPACING, series_uid=uid)

    def page(ds: Dataset, _: int) -> None:
        ds.ImageType = ["DERIVED", "SECONDARY", "OTHER"]

    next_place = (*ORIGIN[:2], ORIGIN[2] + 12 * SPACING[0])
    write_series(tmp_path / "in", noise(1), SPACING, series_uid=uid, series_number=2, origin_mm=next_place, change=page)
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    if result.status != "rejected":
        assert result.source_shape == (12, 20, 24)
        np.testing.assert_array_equal(written(tmp_path / "out", result), stored - 1024.0)
        assert any("S2-0001.dcm" in text for text in result.irregularities)


@trap(10, "mixed-matrices")
def test_different_matrices_and_pixel_spacings_become_separate_volumes_or_are_left_out(tmp_path: Path) -> None:
    uid = generate_uid()
    large, small, fine = noise(7, 20, 24), noise(6, 20, 1, seed=1), noise(5, 20, 24, seed=2)
    write_series(tmp_path, large, SPACING, series_uid=uid)
    write_series(tmp_path, small, SPACING, series_uid=uid, series_number=2, origin_mm=(-100, -120, 0))
    write_series(tmp_path, fine, (2.5, 0.4, 0.35), series_uid=uid, series_number=3, origin_mm=(-100, -120, 100))
    write_series(tmp_path, noise(1, 10, 12), SPACING, series_uid=uid, series_number=4)
    volumes = sorted(gpuprep.discover(tmp_path), key=lambda s: -len(s.slices))
    assert [why for v in volumes for _, why in v.left_out] == ["other matrix"]
    expected = ((large, (0.8, 0.7)), (small, (0.8, 0.7)), (fine, (0.4, 0.35)))
    for series, (values, spacing) in zip(volumes, expected, strict=True):
        volume = in_hu(series)
        np.testing.assert_array_equal(volume.values, values - 1024.0)
        assert volume.spacing_mm == pytest.approx((2.5, *spacing))
    run = convert(tmp_path, tmp_path / "out")
    assert run.counts == {"fixed": 3}
    assert all("mixed" in r.codes for r in run.results)


# Tilt

TILT_DEG = 14.0
TILTED_SHAPE = (14, 30, 10)


def tilted(sign: int, hu_along: int | None) -> tuple[tuple[float, ...], Change]:
    """Return orientation and change of a series with a tilted gantry and table steps of 5 mm along z.

    HU are the patient coordinate `hu_along` (1: y, 2: z); None: as stored.
    """
    c, s = math.cos(math.radians(TILT_DEG)), sign * math.sin(math.radians(TILT_DEG))

    def change(ds: Dataset, k: int) -> None:
        place = (ORIGIN[0], ORIGIN[1], ORIGIN[2] + 5 * k)
        ds.ImagePositionPatient = [number(v) for v in place]
        ds.GantryDetectorTilt = number(-sign * 30)  # wrong on purpose: it is unreliable in practice
        del ds.PixelPaddingValue
        if hu_along is not None:
            ds.RescaleSlope = number(0.8 * (c if hu_along == 1 else s))
            ds.RescaleIntercept = number(place[hu_along])

    return (1, 0, 0, 0, c, s), change


def source_rows(points: Array, sign: int) -> Array:
    """Return the fractional row index of points on the planes of slices."""
    c, s = math.cos(math.radians(TILT_DEG)), sign * math.sin(math.radians(TILT_DEG))
    column, normal = np.array([0, c, s]), np.array([0, -s, c])
    k = np.rint((points - ORIGIN) @ normal / (5 * c))
    return np.asarray(((points - ORIGIN - k[..., None] * np.array([0, 0, 5])) @ column) / 0.8)


@trap(11, "gantry-tilt")
@pytest.mark.parametrize("sign", [1, -1])
def test_a_tilted_stack_is_straightened_with_every_value_at_its_position(tmp_path: Path, sign: int) -> None:
    stored = np.broadcast_to(np.arange(30, dtype=np.int16)[:, None], TILTED_SHAPE).copy()
    for axis in (1, 2):
        orientation, change = tilted(sign, axis)
        write_series(tmp_path / f"{axis}", stored, (5, 0.8, 0.7), orientation=orientation, change=change)
        stacked = gpuprep.stack(found(tmp_path / f"{axis}"))
        assert [i.code for i in stacked.irregularities] == ["tilt"]
        assert stacked.measures.tilt_deg == pytest.approx(TILT_DEG, abs=1e-3)
        assert stacked.measures.spacing_mm == pytest.approx(5 * math.cos(math.radians(TILT_DEG)))  # and not 5
        for order, engine in product((1, 3), ENGINES):
            volume = in_hu(found(tmp_path / f"{axis}"), replace(HU, order=order), engine)
            steps = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
            np.testing.assert_allclose(steps.T @ steps, np.eye(3), atol=1e-6)
            points = places_mm(volume.shape, volume.affine)
            rows = source_rows(points, sign)
            inside = (rows >= 0) & (rows <= 29)
            assert inside.sum() > 0.9 * stored.size
            np.testing.assert_allclose(volume.values[inside], points[..., axis][inside], rtol=0, atol=1e-3)


@trap(12, "new-area-is-air")
@pytest.mark.parametrize("sign", [1, -1])
def test_area_added_by_straightening_is_air(tmp_path: Path, sign: int) -> None:
    orientation, change = tilted(sign, None)
    stored = noise(*TILTED_SHAPE) % 3 + 1064  # 40 to 42 HU
    write_series(tmp_path, stored, (5, 0.8, 0.7), orientation=orientation, change=change)
    for order, engine in product((1, 3), ENGINES):
        volume = in_hu(found(tmp_path), replace(HU, order=order), engine)
        rows = source_rows(places_mm(volume.shape, volume.affine), sign)
        new = (rows < -0.51) | (rows > 29.51)
        assert new.sum() > 500
        assert (volume.values[new] == -1000).all()
        old = volume.values[(rows > -0.49) & (rows < 29.49)]
        assert old.min() > 38
        assert old.max() < 44


# Resampling: sample positions


def hu_along_z(values: Array) -> gpuprep.StoredVolume:
    """Return a volume of constant slices with these HU, 5 mm apart."""
    volume = stored_volume(np.zeros((len(values), 4, 5), np.int16), (5, 0.8, 0.7))
    return replace(volume, intercept=np.asarray(values, dtype=np.float64))


@trap(13, "past-the-last-voxel")
def test_the_grid_has_the_extent_of_the_volume_and_border_values_are_repeated() -> None:
    hu = np.random.default_rng(0).uniform(-900, 900, 7)
    for engine in ENGINES:
        recipe = replace(HU, spacing_mm=(1, 0.8, 0.7), order=1)
        values = gpuprep.process(hu_along_z(hu), recipe, backend="cpu", engine=engine).values
        assert len(values) == 35
        for k, layer in enumerate(values):  # at most 2 mm beyond the first or last slice; linear in between
            expected = np.interp((k + 0.5) * 1.0 - 2.5, np.arange(7) * 5, hu)
            np.testing.assert_allclose(layer, expected, rtol=0, atol=0.01)
        np.testing.assert_allclose(values[:3, 0, 0], hu[0], rtol=0, atol=0.01)
        np.testing.assert_allclose(values[-3:, 0, 0], hu[-1], rtol=0, atol=0.01)


@trap(14, "corners-or-edges")
@pytest.mark.parametrize("align", ["edge", "corner"])
def test_a_ramp_in_mm_agrees_with_the_affine(align: Any) -> None:
    z_mm = -300 + 5 * np.arange(60.0)
    for engine in ENGINES:
        volume = gpuprep.process(
            hu_along_z(z_mm), replace(HU, spacing_mm=(1, 0.8, 0.7), align=align), backend="cpu", engine=engine
        )
        q = np.arange(300)
        expected = -302.5 + (q + 0.5) if align == "edge" else -300 + q * 295 / 299
        np.testing.assert_allclose(places_mm(volume.shape, volume.affine)[:, 0, 0, 2], expected, atol=1e-9)
        inside = slice(60, -60)
        np.testing.assert_allclose(volume.values[inside, 2, 2], expected[inside], rtol=0, atol=1e-3)


@trap(15, "half-a-voxel")
def test_the_origin_moves_by_half_the_change_in_spacing() -> None:
    shape, spacing, recipe = (11, 33, 47), (2.5, 0.7, 0.9), replace(HU, size=(64, 30))
    volume = gpuprep.process(stored_volume(noise(*shape), spacing), recipe, backend="cpu")
    assert volume.shape == (11, 64, 30)
    out = (2.5, 0.7 * 33 / 64, 0.9 * 47 / 30)
    assert volume.spacing_mm == pytest.approx(out)
    expected = [o + (b - a) / 2 for o, a, b in zip(ORIGIN, spacing[::-1], out[::-1], strict=True)]
    assert volume.geometry.origin_mm == pytest.approx(expected)
    corners = []  # the ends of both volumes, computed by SimpleITK
    for n, s, o in ((shape, spacing, ORIGIN), (volume.shape, volume.spacing_mm, volume.geometry.origin_mm)):
        image = sitk.Image([*n[::-1]], sitk.sitkUInt8)
        image.SetSpacing(s[::-1])
        image.SetOrigin(o)
        ends = ([-0.5] * 3, [m - 0.5 for m in n[::-1]])
        corners.append([image.TransformContinuousIndexToPhysicalPoint(e) for e in ends])
    np.testing.assert_allclose(corners[0], corners[1], atol=1e-9)


@trap(16, "parity")
def test_engines_and_backends_equal_scipy_over_orders_and_factors(backend: Backend) -> None:
    stored = noise(9, 22, 26)
    for order, spacing in product(range(6), ((3.0, 0.6816, 0.7), (0.5, 1.9, 1.3), (1.0, 2.0, 0.4))):
        shape = tuple(round(n * s) for n, s in zip(stored.shape, spacing, strict=True))
        factors = [m / n for n, m in zip(stored.shape, shape, strict=True)]
        hu = stored.astype(np.float64) - 1024
        expected = ndimage.zoom(hu, factors, order=order, mode="nearest", grid_mode=True)
        for engine in ENGINES:
            recipe = replace(HU, spacing_mm=(1, 1, 1), order=order, padding="keep")
            volume = stored_volume(stored, spacing)
            chunks = host_chunks(volume, make_plan(volume.geometry, recipe), backend, engine)
            values = np.concatenate([chunk.copy() for chunk in chunks])
            assert values.shape == shape
            np.testing.assert_allclose(values, expected, rtol=0, atol=0.02, err_msg=f"{engine} {order} {spacing}")


@trap(17, "true-spacing")
def test_the_actual_spacing_is_recorded_not_the_requested_one(tmp_path: Path) -> None:
    write_series(tmp_path / "in", noise(133, 8, 9), (2.5, 0.703125, 0.6))
    result = alone(convert(tmp_path / "in", tmp_path / "out", replace(HU, spacing_mm=(1, 1, 1), order=1)))
    assert result.shape == (332, 6, 5)
    expected = (332.5 / 332, 8 * 0.703125 / 6, 9 * 0.6 / 5)
    assert result.spacing_mm == pytest.approx(expected)
    sidecar = json.loads((tmp_path / "out" / result.folder / "volume.json").read_text())
    assert sidecar["spacing_mm"] == pytest.approx(expected)
    assert np.linalg.norm(np.array(sidecar["affine_lps"])[:3, :3], axis=0) == pytest.approx(expected)
    with tifffile.TiffFile(tmp_path / "out" / result.folder / "0000.tif") as tif:
        x, y = (tif.pages.first.tags[t].value for t in (282, 283))
    assert (10 * x[1] / x[0], 10 * y[1] / y[0]) == pytest.approx((expected[2], expected[1]), rel=1e-6)


@trap(18, "off-by-one")
def test_output_sizes_equal_exact_arithmetic_and_are_at_least_1() -> None:
    texts = ("0.1", "0.3", "0.35", "0.625", "0.7", "0.703125", "0.9765625", "1.1", "1.25", "2.5", "4.7")
    for spacing, target, n in product(texts, ("1", "0.8", "0.7", "1.5", "0.1"), (1, 2, 3, 5, 49, 115, 133, 346)):
        exact = max(1, round(n * Fraction(spacing) / Fraction(target)))  # exact, half to even
        s, t = float(spacing), float(target)
        plan = make_plan(axial((n, 3, 3), (s, 1, 1)), replace(HU, spacing_mm=(t, 1, 1)))
        assert plan.target.shape == (exact, 3, 3), (n, spacing, target)
    volume = stored_volume(noise(3, 4, 5), (0.2, 0.1, 0.1))
    thin = gpuprep.process(volume, replace(HU, spacing_mm=(5, 5, 5)), backend="cpu")
    assert thin.shape == (1, 1, 1)
    assert np.isfinite(thin.values).all()


@trap(19, "zero-border")
def test_a_constant_volume_stays_constant_up_to_its_last_row() -> None:
    zeros = 0
    for n, m, order, engine in product((5, 7, 10), (3, 8, 11, 23), (0, 1, 3), ENGINES):
        volume = stored_volume(np.full((n, n, n), 1724, np.int16), (m / n, m / n, m / n))
        values = gpuprep.process(volume, replace(HU, spacing_mm=(1, 1, 1), order=order), backend="cpu", engine=engine)
        assert values.shape == (m, m, m)
        np.testing.assert_allclose(values.values, 700, rtol=0, atol=0.01)
        naive = ndimage.zoom(np.full((n, n), 700.0), m / n, order=order, mode="grid-constant", grid_mode=True)
        zeros += int(abs(naive[-1, -1] - 700) > 1)
    assert zeros  # with zeros beyond the border, SciPy does change border values


@trap(20, "anti-aliasing")
def test_anti_aliasing_reduces_noise_and_keeps_a_ramp() -> None:
    white = np.clip(np.random.default_rng(0).normal(1024, 100, (12, 120, 120)), 0, 4000).astype(np.int16)
    ramp = np.broadcast_to(np.arange(120, dtype=np.int16) * 10 + 500, (12, 120, 120)).copy()
    steps: tuple[tuple[Recipe, Any], ...] = (
        (replace(HU, spacing_mm=(1, 2, 2)), "resample"), (replace(HU, size=(30, 30)), "resize")
    )  # fmt: skip
    for (recipe, step), engine in product(steps, ENGINES):
        on = replace(recipe, anti_alias=step)

        def values(stored: Array, recipe: Recipe, engine: Engine = engine) -> Array:
            volume = gpuprep.process(stored_volume(stored, (1, 0.5, 0.5)), recipe, backend="cpu", engine=engine)
            return np.asarray(volume.values)[:, 4:-4, 4:-4]

        assert values(white, on).shape == (12, 22, 22)
        # A Gaussian of 1.5 voxels reduces the SD of white noise in two dimensions to 1/(2·σ·√π) = 0.188.
        share = values(white, on).std() / values(white, recipe).std()
        # Interpolation between voxels alone reduces the SD to 0.5 (linear) or about 0.8 (cubic); less after the blur.
        assert share < 0.4
        assert values(white, on).std() == pytest.approx(18.8, rel=0.15)
        np.testing.assert_allclose(values(ramp, on), values(ramp, recipe), rtol=0, atol=0.1)
        centres = (np.arange(30) + 0.5) * 4 - 0.5
        expected = np.broadcast_to((centres * 10 - 524)[4:-4], (12, 22, 22))
        np.testing.assert_allclose(values(ramp, on), expected, rtol=0, atol=0.1)


@trap(21, "overshoot")
def test_cubic_overshoot_is_clipped_after_resampling_and_linear_has_none() -> None:
    stored = np.full((6, 40, 20), 24, np.int16)
    stored[:, 20:] = 2524  # −1000 | 1500 HU
    spacing = (1, 0.9, 0.8)
    factors = [1, 36 / 40, 16 / 20]
    cubic = ndimage.zoom(stored - 1024.0, factors, order=3, mode="nearest", grid_mode=True)
    assert cubic.min() < -1050  # there is overshoot to clip
    assert cubic.max() > 1550
    for engine in ENGINES:
        volume = stored_volume(stored, spacing)
        recipe = replace(HU, spacing_mm=(1, 1, 1), window_hu=(-1000, 1500))
        values = gpuprep.process(volume, recipe, backend="cpu", engine=engine).values
        assert values.min() == 0
        assert values.max() == 1
        np.testing.assert_allclose(values, (np.clip(cubic, -1000, 1500) + 1000) / 2500, rtol=0, atol=1e-5)
        linear = gpuprep.process(volume, replace(recipe, order=1, window_hu=None), backend="cpu", engine=engine).values
        assert linear.min() >= -1000.01
        assert linear.max() <= 1500.01


# Stored values to HU


@trap(23, "rescale-of-each-slice")
def test_rescale_and_stored_type_are_applied_per_slice(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = ("1", "0.0444", "2", "0.5", "1.5", "1")[k], str(-1024 + 10 * k)
        if k in (2, 5):  # unsigned, with values outside the type of the first slice
            ds.PixelRepresentation = 0
            del ds.PixelPaddingValue
            ds.PixelData = (np.frombuffer(ds.PixelData, "<i2") + 32000).astype("<u2").tobytes()
        if k == 3:
            ds.BitsStored, ds.HighBit = 13, 12
            ds.RescaleIntercept = "-1000.5"

    files = write_series(tmp_path, noise(6), SPACING, change=change)
    expected = by_pydicom(files)
    assert expected.max() > 60000
    np.testing.assert_allclose(in_hu(found(tmp_path), KEEP).values, expected, rtol=1e-6, atol=1e-3)
    result = alone(convert(tmp_path, tmp_path / "out", KEEP))
    assert result.status == "ok"
    assert (result.hu_min, result.hu_max) == pytest.approx((expected.min(), expected.max()))


@trap(24, "bits")
@pytest.mark.parametrize(
    ("signed", "bits", "high"), [(False, 16, 15), (False, 12, 11), (True, 12, 11), (True, 16, 15), (False, 12, 13)]
)
def test_only_the_declared_bits_of_a_word_are_read(tmp_path: Path, signed: bool, bits: int, high: int) -> None:
    rng = np.random.default_rng(bits)
    low = -(2 ** (bits - 1)) if signed else 0
    values = rng.integers(low, low + 2**bits, (4, 20, 24))
    assert signed or bits < 16 or values.max() > 32767
    shift = high - bits + 1
    overlay = rng.integers(0, 2**16, values.shape)
    if shift:  # a random overlay could not be distinguished from the image
        overlay[:] = np.where(np.arange(24) % 24 < 6, 0xFFFF, 0)
    junk = overlay & ~(((1 << bits) - 1) << shift)
    words = (((values & ((1 << bits) - 1)) << shift) | junk).astype("<u2")

    def change(ds: Dataset, _: int) -> None:
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, high, int(signed)
        ds.RescaleIntercept = "0"

    write_series(tmp_path, words, SPACING, change=change)
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path), KEEP).stored, values)
    np.testing.assert_array_equal(in_hu(found(tmp_path), replace(KEEP, padding="keep")).values, values)


def encode(syntax: UID, values: Array, bits: int = 16) -> bytes:
    """Return pixels as a code stream with the signedness of `values`."""
    if syntax == JPEG2000Lossless:
        options: dict[str, Any] = {"level": 0, "codecformat": "j2k", "reversible": True, "bitspersample": bits}
        return bytes(imagecodecs.jpeg2k_encode(values, **options))
    if syntax == JPEGLSLossless:
        return bytes(imagecodecs.jpegls_encode(values.view("u2")))
    return bytes(imagecodecs.ljpeg_encode(values.view("u2"), bitspersample=16))


def put(ds: Dataset, syntax: UID, stream_as: str = "u2") -> None:
    """Encode the pixels of a data set in another transfer syntax."""
    ds.file_meta.TransferSyntaxUID = syntax
    pixels = np.frombuffer(ds.PixelData, "<u2").reshape(ds.Rows, ds.Columns)
    if syntax == ExplicitVRBigEndian:
        ds.set_original_encoding(None, None)
        ds.PixelData = pixels.astype(">u2").tobytes()
    elif syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless, generate_instance_uid=False)
    elif syntax.is_encapsulated:
        ds.PixelData = encapsulate([encode(syntax, pixels.view(stream_as))])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True


@trap(25, "sign-of-the-code-stream")
@pytest.mark.parametrize(
    ("syntax", "stream_as"),
    [(JPEG2000Lossless, "u2"), (JPEG2000Lossless, "i2"), (JPEGLSLossless, "u2")],
    ids=["J2K-unsigned", "J2K-signed", "JPEG-LS"],
)
def test_the_header_determines_the_sign_not_the_code_stream(tmp_path: Path, syntax: UID, stream_as: str) -> None:
    signed = noise(4) - 2000
    unsigned = (noise(4).astype(np.int32) + 31500).astype(np.uint16)
    assert signed.min() < 0
    assert unsigned.max() > 32767
    for name, values in (("signed", signed), ("unsigned", unsigned)):
        write_series(tmp_path / name, values, SPACING, change=lambda ds, _: put(ds, syntax, stream_as))
        stored = gpuprep.read(found(tmp_path / name), KEEP).stored
        assert stored.dtype == values.dtype
        np.testing.assert_array_equal(stored, values)

    twelve = noise(4) % 4096 - 2048  # the sign is the 12th bit, and the bits above are zero

    def change(ds: Dataset, k: int) -> None:
        ds.BitsStored, ds.HighBit = 12, 11
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate([encode(syntax, (twelve[k] & 0xFFF).view("u2"), 12)])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True

    write_series(tmp_path / "twelve", twelve, SPACING, change=change)
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path / "twelve")).stored, twelve)


# Padding

CIRCLE_SHAPE = (5, 64, 60)


def outside_circle() -> NDArray[np.bool_]:
    y, x = np.mgrid[:64, :60]
    return np.asarray((y - 31.5) ** 2 + (x - 29.5) ** 2 > 30**2)


def padded(fill: int, air: int, body: int) -> NDArray[np.int16]:
    """Return stored values: a circle of air that contains a body of 6 × 6 pixels, and `fill` outside the circle."""
    stored = np.full(CIRCLE_SHAPE, air, np.int16)
    stored[:, outside_circle()] = fill
    stored[:, 29:35, 27:33] = body
    return stored


def rescaled(intercept: int, padding: tuple[str, int] | None, limit: int | None = None) -> Change:
    def change(ds: Dataset, _: int) -> None:
        ds.RescaleIntercept = str(intercept)
        del ds.PixelPaddingValue
        if padding is not None:
            ds.add_new("PixelPaddingValue", *padding)
        if limit is not None:
            ds.add_new("PixelPaddingRangeLimit", "SS", limit)

    return change


@trap(26, "padding")
@pytest.mark.parametrize(
    ("fill", "intercept", "padding", "limit", "code"),
    [
        (-2000, -1024, ("US", 63536), None, None),
        (-2000, -1024, ("SS", -2000), None, None),
        (-2000, 0, ("US", 63536), None, None),  # replaced by 0, it would be water
        (-2000, 0, ("SS", 0), None, None),  # the declared value is another
        (-2000, -1000, ("SS", -32768), None, None),
        (-2000, 0, None, None, None),
        (-960, 0, ("SS", -990), -950, None),  # a range
        (0, 0, None, None, "padding"),  # found because it is constant outside the circle
        (-476, -1024, None, None, "padding"),  # −1500 HU
        (-1024, 0, None, None, None),
    ],
)
def test_declared_and_undeclared_padding_becomes_air(
    tmp_path: Path, fill: int, intercept: int, padding: tuple[str, int] | None, limit: int | None, code: str | None
) -> None:
    stored = padded(fill, -1010 - intercept, 40 - intercept)
    stored[:, 30:32, 28:30] = -intercept  # 0 HU inside the body
    write_series(tmp_path, stored, SPACING, change=rescaled(intercept, padding, limit))
    expected = stored.astype(np.float64) + intercept
    expected[:, outside_circle()] = -1000
    if fill == -1024:
        expected[:, outside_circle()] = -1024  # a CT number that scanners use
    if code == "padding" and fill + intercept < -1024:
        code = None  # below −1024 HU it is no CT number, so it is padding in any case
    result = alone(convert(tmp_path, tmp_path / "out"))
    np.testing.assert_array_equal(written(tmp_path / "out", result), expected)
    not_believed = padding == ("SS", 0)
    assert result.codes == ((code,) if code else ()) + (("padding-ignored",) if not_believed else ())
    if code:
        assert "5 slices" in result.irregularities[0]
    if not_believed:
        assert any("Pixel Padding Value 0" in w for w in result.warnings)
    if fill == -2000:
        assert result.padding_share == pytest.approx(outside_circle().mean())


@trap(27, "halo")
@pytest.mark.parametrize(
    ("fill", "intercept", "padding"),
    [(-2000, -1024, ("US", 63536)), (-2000, 0, None), (-476, -1024, None), (0, 0, None), (-960, 0, ("SS", -960))],
)
def test_padding_leaves_no_halo_around_the_circle(
    tmp_path: Path, fill: int, intercept: int, padding: tuple[str, int] | None
) -> None:
    write_series(
        tmp_path, padded(fill, -1000 - intercept, 40 - intercept), SPACING, change=rescaled(intercept, padding)
    )
    for engine in ENGINES:
        values = in_hu(found(tmp_path), replace(HU, spacing_mm=(1, 0.5, 0.45)), engine).values
        rows, columns_ = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(values.shape[1:], (64, 60), strict=True))
        far = (
            np.hypot(rows[:, None] - 31.5, columns_ - 29.5) > 20
        )  # the influence of the body on a cubic spline falls by 0.268 per pixel
        assert far.mean() > 0.5
        np.testing.assert_allclose(values[:, far], -1000, rtol=0, atol=0.01)
        assert values.max() > 0


@trap(28, "quantise-last")
def test_values_are_rounded_to_integers_last() -> None:
    stored = noise(9, 22, 26)
    factors = [27 / 9, 15 / 22, 31 / 26]
    spacing = (3.0, 15 / 22, 31 / 26)
    hu = stored - 1024.0
    exact = 255 * np.clip((ndimage.zoom(hu, factors, order=3, mode="nearest", grid_mode=True) + 1000) / 1400, 0, 1)
    early = np.round(255 * np.clip((hu + 1000) / 1400, 0, 1))
    early = np.clip(ndimage.zoom(early, factors, order=3, mode="nearest", grid_mode=True), 0, 255)
    assert np.abs(np.round(early) - exact).max() > 1  # the error if values were rounded first
    for engine in ENGINES:
        recipe = Recipe(size=None, dtype="uint8")
        values = gpuprep.process(stored_volume(stored, spacing), recipe, backend="cpu", engine=engine).values
        assert values.dtype == np.uint8
        assert np.abs(values - exact).max() < 0.501


# Files and decoders

SYNTAXES = (
    ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless,
    JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1,
)  # fmt: skip


@trap(29, "transfer-syntax")
@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.keyword)
def test_every_transfer_syntax_gives_the_same_integers(tmp_path: Path, syntax: UID) -> None:
    stored = noise(4) - 1500
    files = write_series(tmp_path, stored, SPACING, change=lambda ds, _: put(ds, syntax))
    assert pydicom.dcmread(files[0]).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path)).stored, stored)


def other_end(file: Path, end: bytes) -> None:
    """Replace the sequence delimiter at the end of a file."""
    content = file.read_bytes()
    assert content.endswith(b"\xfe\xff\xdd\xe0\0\0\0\0")
    file.write_bytes(content[:-8] + end)


@trap(54, "encapsulation")
@pytest.mark.parametrize("policy", ["fix", "strict", "keep"])
@pytest.mark.parametrize("end", [b"", bytes(8), bytes(16), b"\xfe\xff\xdd\xe0"], ids=["none", "8", "16", "half"])
@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless], ids=lambda uid: uid.keyword)
def test_fragments_without_delimiter_are_read_if_complete_and_rejected_if_truncated(
    tmp_path: Path, syntax: UID, end: bytes, policy: Any
) -> None:
    stored = noise(4)
    files = write_series(tmp_path / "in", stored, SPACING, change=lambda ds, _: put(ds, syntax))
    for file in files:
        other_end(file, end)
    recipe = replace(HU, policy=policy)
    result = alone(convert(tmp_path / "in", tmp_path / "out", recipe))
    assert (result.status, result.codes) == ("ok", ("encapsulation",))
    np.testing.assert_array_equal(written(tmp_path / "out", result), stored - 1024.0)
    for cut in (1, 5, 100):  # within the last fragment
        content = files[2].read_bytes()
        files[2].write_bytes(content[: len(content) - len(end) - cut])
        result = alone(convert(tmp_path / "in", tmp_path / str(cut), recipe))
        assert (result.status, result.codes) == ("rejected", ("truncated",))
        files[2].write_bytes(content)


def itemized(*values: bytes) -> bytes:
    """Return a sequence of items (PS3.5, A.4)."""
    return b"".join(b"\xfe\xff\x00\xe0" + len(v).to_bytes(4, "little") + v for v in values)


@trap(54, "offset-of-each-fragment")
@pytest.mark.parametrize("table", [[0, 108, 216], [0, 108], [8], [108, 0]], ids=str)
def test_a_single_frame_consists_of_all_fragments_despite_its_offset_table(tmp_path: Path, table: list[int]) -> None:
    def change(ds: Dataset, _: int) -> None:
        put(ds, JPEG2000Lossless)
        stream = next(generate_frames(ds.PixelData, number_of_frames=1))
        offsets = b"".join(n.to_bytes(4, "little") for n in table)
        ds.PixelData = itemized(offsets, stream[:100], stream[100:200], stream[200:])
        ds["PixelData"].is_undefined_length = True

    stored = noise(4)
    write_series(tmp_path / "in", stored, SPACING, change=change)
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    assert (result.status, result.codes) == ("ok", ("encapsulation",))
    np.testing.assert_array_equal(written(tmp_path / "out", result), stored - 1024.0)


@trap(54, "run-lengths-go-on")
@pytest.mark.parametrize("padding", [bytes(4), bytes(64), b"\0\x55"], ids=["4", "64", "more"])
def test_data_after_a_full_rle_segment_are_ignored(tmp_path: Path, padding: bytes) -> None:
    def change(ds: Dataset, k: int) -> None:
        put(ds, RLELossless)
        planes = [(stored[k] >> 8).astype("u1").tobytes(), stored[k].astype("u1").tobytes()]
        runs = [b"".join(bytes([95]) + plane[n : n + 96] for n in range(0, 480, 96)) + padding for plane in planes]
        header = b"".join(n.to_bytes(4, "little") for n in (2, 64, 64 + len(runs[0]), *[0] * 13))
        ds.PixelData = encapsulate([header + runs[0] + runs[1]])
        ds["PixelData"].is_undefined_length = True

    stored = noise(4)
    write_series(tmp_path / "in", stored, SPACING, change=change)
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    assert (result.status, result.codes) == ("ok", ("encapsulation",))
    np.testing.assert_array_equal(written(tmp_path / "out", result), stored - 1024.0)


@trap(54, "no-frames")
def test_number_of_frames_0_is_one_frame(tmp_path: Path) -> None:
    def none(ds: Dataset, _: int) -> None:
        ds.NumberOfFrames = 0

    stored = noise(4)
    write_series(tmp_path / "in", stored, SPACING, change=none)
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    assert (result.status, result.codes) == ("ok", ("encapsulation",))
    np.testing.assert_array_equal(written(tmp_path / "out", result), stored - 1024.0)


NEWER: dict[str, tuple[str, Callable[[Array], bytes]]] = {
    "1.2.840.10008.1.2.4.110": ("JPEG XL Lossless", lambda v: bytes(imagecodecs.jpegxl_encode(v, lossless=True))),
    "1.2.840.10008.1.2.8.1": (
        "Deflated Image Frame Compression",
        lambda v: zlib.compress(v.tobytes(), wbits=-zlib.MAX_WBITS),
    ),
    "1.2.840.10008.1.2.1.98": (
        "Encapsulated Uncompressed Explicit VR Little Endian",
        lambda v: v.tobytes(),
    ),
}


@trap(55, "newer-syntaxes")
@pytest.mark.parametrize("syntax", NEWER)
def test_transfer_syntaxes_unknown_to_pydicom_are_read_and_named(tmp_path: Path, syntax: str) -> None:
    name, encode = NEWER[syntax]

    def change(ds: Dataset, k: int) -> None:
        put(ds, JPEGLSLossless)  # so that pydicom can write it
        ds.PixelData = encapsulate([encode(stored[k].view("u2"))])

    stored = noise(4)
    for file in write_series(tmp_path / "in", stored, SPACING, change=change):
        renamed(file, syntax)
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    assert (result.status, result.codes) == ("ok", ())
    np.testing.assert_array_equal(written(tmp_path / "out", result), stored - 1024.0)
    sidecar = json.loads((tmp_path / "out" / result.folder / "volume.json").read_text())
    assert sidecar["source"]["transfer_syntaxes"] == [name]


@trap(55, "unread-syntaxes")
@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.102", " (MPEG-4 AVC/H.264 High Profile / Level 4.1)"),
        ("1.2.840.10008.1.2.4.94", " (JPIP Referenced)"),
        ("1.2.3.4.5", ""),
    ],
)
def test_scan_and_convert_reject_an_unsupported_syntax_with_the_same_text(
    tmp_path: Path, syntax: str, name: str
) -> None:
    for file in write_series(tmp_path / "in", noise(4), SPACING, change=lambda ds, _: put(ds, JPEGLSLossless)):
        renamed(file, syntax)
    (planned,) = scan(tmp_path / "in", HU).planned
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    assert (planned.verdict, planned.codes) == (result.status, result.codes) == ("rejected", ("syntax",))
    assert planned.reason == result.reason
    assert result.reason.startswith(f"DecodeError: transfer syntax {syntax}{name} in S1-")


@trap(30, "decoder-fails")
def test_the_next_decoder_is_tried_and_if_all_fail_their_errors_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = noise(4)
    write_series(tmp_path / "in" / "ls", stored, SPACING, change=lambda ds, _: put(ds, JPEGLSLossless))
    write_series(tmp_path / "in" / "plain", stored, SPACING)

    def failing(decoder: decode.Decoder, words: str) -> decode.Decoder:
        def decode(*_: Any) -> Any:
            raise RuntimeError(words)

        return replace(decoder, decode=decode)

    first, *others = decode.DECODERS["JPEG-LS"]
    assert others
    broken = (failing(first, "library is missing"), *others)
    monkeypatch.setitem(decode.DECODERS, "JPEG-LS", broken)
    run = convert(tmp_path / "in", tmp_path / "out")
    assert run.counts == {"ok": 2}
    for result in run.results:
        np.testing.assert_array_equal(written(tmp_path / "out", result), stored - 1024.0)

    broken = tuple(failing(d, f"no {n}") for n, d in enumerate((first, *others)))
    monkeypatch.setitem(decode.DECODERS, "JPEG-LS", broken)
    bad, good = convert(tmp_path / "in", tmp_path / "out2").results
    assert (bad.status, good.status) == ("rejected", "ok")
    assert JPEGLSLossless.name in bad.reason
    for n, decoder in enumerate(broken):
        assert f"{decoder.name}: no {n}" in bad.reason


class LargeSource:
    """Source of more than 2 GiB of float32, whose slices are generated on demand."""

    geometry = Geometry((540, 1000, 1000), axial((540, 1000, 1000), (1, 1, 1)).affine)
    placement: Placement | None = None
    padding: Array | None = None
    slope = np.ones(540)
    intercept = np.zeros(540)

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def slab(self, start: int, stop: int) -> Array:
        self.asked.append((start, stop))
        values = np.arange(start, stop, dtype=np.int16)[:, None, None] + np.arange(1000, dtype=np.int16)[:, None]
        return np.broadcast_to(values, (stop - start, 1000, 1000))


@trap(31, "two-gigabytes")
def test_more_than_2_gib_are_processed_in_bounded_chunks() -> None:
    source = LargeSource()
    assert math.prod(source.geometry.shape) * 4 > 2**31
    plan = make_plan(source.geometry, replace(HU, spacing_mm=(1, 100, 250), order=1, padding="keep"))
    tracemalloc.start()
    try:
        chunks = [chunk.copy() for chunk in host_chunks(source, plan, NumpyBackend())]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    values = np.concatenate(chunks)
    assert values.shape == (540, 10, 4)
    assert max(map(len, chunks)) <= 16
    assert [a for a, _ in source.asked] == [0, *(b for _, b in source.asked[:-1])]  # each slice once, in order
    assert peak < 256 * 2**20
    centres = (np.arange(10) + 0.5) * 100 - 0.5
    for k in (0, 1, 538, 539):
        np.testing.assert_allclose(values[k], np.broadcast_to((k + centres)[:, None], (10, 4)), rtol=0, atol=0.01)

    most = make_plan(axial((1024, 2048, 2047), (1, 1, 1)), HU)
    assert most.output_bytes == 1024 * 2048 * 2047 * 4  # 16 GB: more than 32 bits can represent
    assert most.output_bytes > tiff.BIGTIFF_BYTES


@trap(32, "compiled-per-shape")
@pytest.mark.usefixtures("cupy_on_host")
def test_no_kernel_is_compiled_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    # The source of the kernel has options for voxel types only. CuPy's `ndimage` puts shapes into the source of its
    # kernels, so the engine "operators" must not use it.
    compiler, compiled = import_module("cupy.cuda.compiler"), []
    original = compiler._compile_module_with_cache

    def count(source: str, options: tuple[str, ...]) -> Any:
        compiled.append(options)
        return original(source, options)

    monkeypatch.setattr(compiler, "_compile_module_with_cache", count)
    backend = get_backend("gpu")
    for name in ("zoom", "gaussian_filter", "resize"):
        monkeypatch.delattr(type(backend), name)
    for recipe in (Recipe(size=(30, 30), dtype="uint8"), Recipe(window_hu=None, size=None, anti_alias="both")):
        for shape in ((9, 22, 26), (17, 41, 33), (5, 60, 19)):
            gpuprep.process(stored_volume(noise(*shape), (3.0, 0.7, 0.6)), recipe, backend=backend)
    types = {("-DIN=short", "-DOUT=float"), ("-DIN=float", "-DOUT=float"), ("-DIN=float", "-DOUT=unsigned char")}
    assert len(compiled) == len(types)
    assert {options[:2] for options in compiled} == types

    kernels = {"RawKernel", "RawModule", "ElementwiseKernel", "ReductionKernel", "fuse", "jit"}
    for file in Path(gpuprep.__file__).parent.rglob("*.py"):
        names = {n.attr for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Attribute)}
        assert names & kernels == ({"RawKernel"} if file.name == "cupy_backend.py" else set()), file.name


# Output


@trap(33, "names")
def test_outputs_have_unique_names_and_keep_leading_zeros(tmp_path: Path) -> None:
    folders = ("007/CT", "7/CT", "07/CT")
    for n, folder in enumerate(folders):

        def patient(ds: Dataset, _: int, number: str = folder.split("/")[0]) -> None:
            ds.PatientID = number

        for seed in (0, 1):  # two series with the same number in one folder
            files = write_series(tmp_path / "new", noise(4, seed=2 * n + seed), SPACING, change=patient)
            (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
            for file in files:
                file.rename(tmp_path / "in" / folder / f"{seed}-{file.name}")
    run = convert(tmp_path / "in", tmp_path / "out")
    assert run.counts == {"ok": 6}
    places = [r.folder for r in run.results]
    assert len({p.casefold() for p in places}) == 6
    assert {p.split("/")[1] for p in places} == {"007", "07", "7"}
    means = [written(tmp_path / "out", r).mean() for r in run.results]
    expected = [noise(4, seed=s).mean() - 1024 for s in range(6)]
    assert sorted(means) == pytest.approx(sorted(expected), abs=0.01)  # six volumes, none overwritten
    with (tmp_path / "out" / "manifest.csv").open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert {Path(r["source"]).parts[-2] for r in rows} == {"007", "07", "7"}
    assert {r["folder"] for r in rows} == set(places)


@trap(34, "partial-output")
def test_a_partial_output_never_counts_as_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_series(source, noise(6), SPACING)
    first = alone(convert(source, out))
    expected = written(out, first)
    slices = sorted((out / first.folder).glob("*.tif"))

    def cut() -> None:
        os.truncate(slices[2], slices[2].stat().st_size - 1)

    for damage in (cut, slices[5].unlink, (out / first.folder / "volume.json").unlink):
        assert alone(convert(source, out)).status == "skipped"
        damage()
        assert alone(convert(source, out)).status == "ok"
        np.testing.assert_array_equal(written(out, first), expected)

    class Interrupted(NumpyBackend):
        def finish(self, values: Any, window: Any, dtype: str) -> Any:
            if len(list((tmp_path / "new").rglob("0003.tif"))):
                raise KeyboardInterrupt
            return super().finish(values, window, dtype)

        chunk_slices = 2

    monkeypatch.setattr("gpuprep.executors.resources.get_backends", lambda *_: [Interrupted("matmul")])
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new")
    monkeypatch.undo()
    assert not list((tmp_path / "new").rglob("*.tif"))
    result = alone(convert(source, tmp_path / "new"))
    assert result.status == "ok"
    np.testing.assert_array_equal(written(tmp_path / "new", result), expected)


@trap(35, "swapped-axes")
def test_axes_agree_with_simpleitk(tmp_path: Path) -> None:
    stored = noise(7, 18, 26)
    orientation = (0.8, 0.6, 0, 0, 0, -1)
    files = write_series(tmp_path, stored, (2.5, 0.8, 0.5), orientation=orientation, origin_mm=(3, -7, 11))
    image = sitk.ReadImage([str(f) for f in files])
    assert image.GetSpacing() == pytest.approx((0.5, 0.8, 2.5))
    volume = in_hu(found(tmp_path))
    assert volume.shape == (7, 18, 26)
    assert volume.spacing_mm == pytest.approx(image.GetSpacing()[::-1])
    np.testing.assert_array_equal(volume.values, sitk.GetArrayFromImage(image))
    for index in ((0, 0, 0), (6, 0, 0), (0, 17, 0), (0, 0, 25), (2, 3, 5)):
        place = volume.affine @ [*index, 1]
        assert tuple(place[:3]) == pytest.approx(image.TransformIndexToPhysicalPoint(index[::-1]), abs=1e-4)


@trap(36, "tiff")
def test_a_tiff_stack_of_57_slices_has_57_slices_in_every_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = noise(57, 9, 11)
    write_series(tmp_path / "in", stored, SPACING)
    recipe = replace(HU, format="tif-stack")
    result = alone(convert(tmp_path / "in", tmp_path / "out", recipe))
    with tifffile.TiffFile(tmp_path / "out" / result.folder / "volume.tif") as tif:
        assert (tif.series[0].axes, tif.series[0].shape) == ("ZYX", (57, 9, 11))
        metadata = tif.imagej_metadata or {}
        assert (metadata["images"], metadata["slices"], metadata["unit"]) == (57, 57, "mm")
        assert metadata["spacing"] == pytest.approx(2.5)
        assert "channels" not in metadata
        x, y = (tif.pages.first.tags[t].value for t in (282, 283))
        assert (x[1] / x[0], y[1] / y[0]) == pytest.approx((0.7, 0.8))
        np.testing.assert_array_equal(tif.asarray(), stored - 1024.0)
    assert result.warnings == ()

    assert tiff.BIGTIFF_BYTES < 2**32
    monkeypatch.setattr(tiff, "BIGTIFF_BYTES", stored.size * 4 - 1)
    result = alone(convert(tmp_path / "in", tmp_path / "big", recipe))
    assert [w for w in result.warnings if "BigTIFF" in w]
    with tifffile.TiffFile(tmp_path / "big" / result.folder / "volume.tif") as tif:
        assert tif.is_bigtiff
        assert not tif.is_imagej
        assert tif.series[0].shape == (57, 9, 11)
        assert tif.series[0].axes == "ZYX"


# Images that are no CT, and damaged images


def palette(ds: Dataset, _: int) -> None:
    ds.PhotometricInterpretation = "PALETTE COLOR"


def unspecified(ds: Dataset, _: int) -> None:
    ds.RescaleType = "US"


def no_rescale(ds: Dataset, k: int) -> None:
    if k == 3:
        del ds.RescaleSlope, ds.RescaleIntercept


def magnetic(ds: Dataset, _: int) -> None:
    ds.Modality = "MR"


@trap(41, "not-hu")
@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (palette, "photometric", "Photometric Interpretation not MONOCHROME2"),
        (unspecified, "rescale-type", "Rescale Type not HU"),
        (no_rescale, "rescale", "Rescale Slope"),
        (magnetic, "modality", "Modality is MR, not CT"),
    ],
    ids=["palette", "type-US", "no-rescale", "MR"],
)
def test_values_that_may_not_be_hu_are_rejected(tmp_path: Path, change: Change, code: str, words: str) -> None:
    stored = noise(6)
    write_series(tmp_path / "in", stored, SPACING, change=change)
    with pytest.raises(InputError, match=words) as error:
        gpuprep.read(found(tmp_path / "in"))
    assert error.value.code == code
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    assert (result.status, result.codes) == ("rejected", (code,))
    assert words in result.reason
    assert not list((tmp_path / "out").rglob("*.tif"))
    believed = alone(convert(tmp_path / "in", tmp_path / "believed", replace(HU, assume_hu=True)))
    assert (believed.status == "rejected") == (code in ("photometric", "modality"))
    if code == "rescale-type":
        np.testing.assert_array_equal(written(tmp_path / "believed", believed), stored - 1024.0)


@trap(41, "monochrome1")
@pytest.mark.parametrize("policy", ["fix", "strict", "keep"])
def test_monochrome1_gives_the_same_hu_and_a_warning(tmp_path: Path, policy: Any) -> None:
    # It only defines that displays show low values bright (PS3.3, C.7.6.3.1.2); HU are not affected.
    def inverted(ds: Dataset, k: int) -> None:
        ds.PhotometricInterpretation = "MONOCHROME1" if k > 1 else "MONOCHROME2"

    stored = noise()
    files = write_series(tmp_path / "in", stored, SPACING, change=inverted)
    series = found(tmp_path / "in")
    hu = in_hu(series).values
    np.testing.assert_array_equal(hu, stored - 1024.0)
    np.testing.assert_array_equal(hu, by_pydicom(files))
    result = alone(convert(tmp_path / "in", tmp_path / "out", replace(HU, policy=policy)))
    assert (result.status, result.codes) == ("ok", ("monochrome1",))
    (warning,) = result.warnings
    assert warning.endswith("in S1-0001.dcm, S1-0002.dcm, S1-0003.dcm and 1 more")


@trap(49, "hounsfield-spelt-otherwise")
@pytest.mark.parametrize(
    "word",
    ["Houndsfield Unit", "Hounsfield", "HOUNSFIELD UNITS", "hounsfield_unit", "Hounsfeild Units (HU)", "H.U.", "hu"],
)
def test_every_spelling_of_hounsfield_is_hu(tmp_path: Path, word: str) -> None:
    def spell(ds: Dataset, _: int) -> None:
        ds.RescaleType = word

    stored = noise()
    write_series(tmp_path / "in", stored, SPACING, change=spell)
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    assert (result.status, result.codes) == ("ok", ())
    np.testing.assert_array_equal(written(tmp_path / "out", result), stored - 1024.0)


@trap(48, "hu-beyond-the-output")
@pytest.mark.parametrize("engine", ENGINES)
def test_hu_outside_the_output_type_are_counted_and_impossible_hu_rejected(tmp_path: Path, engine: Engine) -> None:
    # The stored value 60000 is 58976 HU. 7 of 2880 voxels may be metal; 480 mean a wrong rescale.
    stored = noise(6).astype(np.uint16)
    stored[2, 3, 5:12] = 60000
    write_series(tmp_path / "metal", stored, SPACING)
    whole = replace(HU, dtype="int16")
    run = gpuprep.convert(tmp_path / "metal", tmp_path / "out", whole, backend="cpu", engine=engine)
    result = alone(run)
    expected = np.minimum(stored.astype(int) - 1024, 32767)
    np.testing.assert_array_equal(written(tmp_path / "out", result), expected)
    texts = (
        "HU of 7 voxels are above 30000, the upper limit of CT numbers: up to 58976 in S1-0004.dcm",
        "HU of 7 voxels, 58976 to 58976, were clipped to the range of int16, −32768 to 32767; "
        "--dtype float32 holds them",
    )
    assert (result.status, result.codes, result.warnings) == ("ok", ("hu-range",), texts)
    sidecar = json.loads((tmp_path / "out" / result.folder / "volume.json").read_text())
    assert (sidecar["codes"], sidecar["warnings"]) == (["hu-range"], list(texts))
    page = Path(write_report(tmp_path / "out")).read_text()
    assert '"hu-range"' in page
    assert "up to 58976 in" in page
    held = alone(gpuprep.convert(tmp_path / "metal", tmp_path / "float", HU, backend="cpu", engine=engine))
    assert held.warnings == texts[:1]
    np.testing.assert_array_equal(written(tmp_path / "float", held), stored - 1024.0)

    stored[4] = 60000 + stored[4]
    write_series(tmp_path / "wrong", stored, SPACING)
    rejected = alone(gpuprep.convert(tmp_path / "wrong", tmp_path / "none", whole, backend="cpu", engine=engine))
    assert (rejected.status, rejected.codes) == ("rejected", ("hu-range",))
    assert not list((tmp_path / "none").rglob("*.tif"))
    kept = alone(gpuprep.convert(tmp_path / "wrong", tmp_path / "kept", KEEP, backend="cpu", engine=engine))
    assert (kept.status, kept.codes) == ("ok", ("hu-range",))
    np.testing.assert_array_equal(written(tmp_path / "kept", kept), stored - 1024.0)


@trap(61, "lost-plane")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("shape", "spacing", "said"),
    [
        ((50, 8, 8), (3.0, 1.0, 1.0), "slice 149"),
        ((4, 50, 8), (1.0, 3.0, 1.0), "row 149"),
        ((4, 8, 50), (1.0, 1.0, 3.0), "column 149"),
        ((50, 50, 8), (3.0, 3.0, 1.0), "slice 149 and row 149"),
        ((51, 8, 8), (3.0, 1.0, 1.0), ""),
    ],
)
def test_planes_that_the_classic_zoom_sets_to_0_are_named_and_other_recipes_set_none(
    tmp_path: Path, engine: Engine, shape: tuple[int, int, int], spacing: Xyz, said: str
) -> None:
    write_series(tmp_path / "in", noise(*shape) // 100 + 1124, spacing)  # 100 to 129 HU: no zeros
    classic = replace(Recipe.preset("classic"), size=None, window_hu=None)
    result = alone(gpuprep.convert(tmp_path / "in", tmp_path / "out", classic, backend="cpu", engine=engine))
    factors = [round(n * s) / n for n, s in zip(shape, spacing, strict=True)]
    expected = ndimage.zoom(noise(*shape) // 100 + 100.0, factors, order=3)
    values = written(tmp_path / "out", result)
    assert np.abs(values - expected).max() < 1e-3
    empty = {(axis, n) for axis in range(3) for n in range(values.shape[axis]) if not np.take(values, n, axis).any()}
    words = [f"{('slice', 'row', 'column')[axis]} {n}" for axis, n in sorted(empty)]
    assert " and ".join(words) == said
    sidecar = json.loads((tmp_path / "out" / result.folder / "volume.json").read_text())
    assert sidecar["codes"] == list(result.codes) == (["lost-plane"] if said else [])
    assert [w.split(",")[0] for w in result.warnings] == ([said] if said else [])
    (seen,) = scan(tmp_path / "in", classic).planned
    assert seen.codes == result.codes
    assert [w.text for w in seen.warnings] == list(result.warnings)

    edge = replace(classic, align="edge")
    whole = alone(gpuprep.convert(tmp_path / "in", tmp_path / "edge", edge, backend="cpu", engine=engine))
    assert not whole.codes
    assert written(tmp_path / "edge", whole).min() > 90


@trap(62, "ome-zarr")
@pytest.mark.parametrize(
    ("recipe", "low"),
    [
        (replace(HU, dtype="int16"), -1000),
        (HU, -1000),
        (replace(HU, window_hu=(-500.0, 300.0), dtype="uint8"), -500),
        (replace(HU, window_hu=(-1350.0, 150.0), dtype="uint16"), -1000),
    ],
    ids=["int16", "float32", "uint8", "uint16"],
)
def test_a_lost_chunk_of_an_ome_zarr_reads_as_air_and_is_detected_by_gpuprep(
    tmp_path: Path, recipe: Recipe, low: float
) -> None:
    zarr = pytest.importorskip("zarr", minversion="3")
    recipe = replace(recipe, format="zarr")
    air = np.full((70, 12, 14), 24, np.int16)  # −1000 HU, except for one voxel in each slice
    air[:, 3, 4] = 1024
    write_series(tmp_path / "in", air, SPACING, change=lambda ds, _: ds.__delattr__("PixelPaddingValue"))
    uid = found(tmp_path / "in").series_uid
    drawn = write_rtstruct(tmp_path / "rs.dcm", {"a": [in_patient(rectangle(2, 6), 1)]}, series_uid=uid)
    run = gpuprep.convert(tmp_path / "in", tmp_path / "out", recipe, masks=drawn, backend="cpu")
    folder = tmp_path / "out" / alone(run).folder
    hu = json.loads((folder / "volume.json").read_text())["hu"]
    for name, lost in (("volume.ome.zarr", low), ("volume.ome.zarr/labels/labels", 0)):
        array = zarr.open_array(folder / name / "0", mode="r")
        shards = sorted((folder / name / "0" / "c").glob("*/0/0"))
        assert len(shards) == -(-70 // array.shards[0]) > 1  # also for chunks without any label
        shards[1].unlink()
        depth = array.shards[0]
        values = zarr.open_array(folder / name / "0", mode="r")[depth : 2 * depth].astype(float)
        if name == "volume.ome.zarr":
            values = values * hu["slope"] + hu["intercept"]
        np.testing.assert_allclose(values, lost, atol=2.0)  # a step of uint8 is 3 HU
        lost_files = [f.path for f in verify(tmp_path / "out", InProcessExecutor(), lambda: None)]
        assert f"in/{name}/0/c/1/0/0" in lost_files
        with pytest.raises(OutputError, match="cannot be read"):
            _ = FinishedOutput(folder).image() if name == "volume.ome.zarr" else FinishedOutput(folder).mask(name)


# Masks


def masks(
    tmp_path: Path, write: Callable[[Path, gpuprep.Series], object], recipe: Recipe = HU
) -> tuple[dict[str, NDArray[np.bool_]], SeriesResult]:
    """Return the masks by structure of the series in ``in``, converted from the file that `write` writes."""
    write(tmp_path / "segmentation", found(tmp_path / "in"))
    run = gpuprep.convert(tmp_path / "in", tmp_path / "out", recipe, masks=tmp_path / "segmentation", backend="cpu")
    result = alone(run)
    assert result.status in ("ok", "fixed"), result.reason
    folder = tmp_path / "out" / result.folder
    labels = np.stack([tifffile.imread(f) for f in sorted((folder / "labels").iterdir())])
    return {label["name"]: labels == label["value"] for label in result.labels or ()}, result


def in_patient(points: list[tuple[float, float]], k: float) -> NDArray[np.float64]:
    """Return the positions in mm of points (column, row) on slice k of a series written by `write_series`."""
    column, row = np.array(points, dtype=float).T
    return np.stack([column * SPACING[2], row * SPACING[1], np.full(len(points), k * SPACING[0])], axis=1) + ORIGIN


def rectangle(low: float, high: float) -> list[tuple[float, float]]:
    return [(low, low), (high, low), (high, high), (low, high)]


@trap(22, "labels-are-no-numbers")
@pytest.mark.parametrize("resampling", ["nearest", "smooth"])
def test_labels_are_not_interpolated_and_lost_structures_are_reported(tmp_path: Path, resampling: Any) -> None:
    write_series(tmp_path / "in", noise(6), SPACING)
    rois = {
        "one": [in_patient(rectangle(3.5, 9.5), k) for k in range(6)],
        "two": [in_patient(rectangle(9.5, 15.5), k) for k in range(6)],  # touches the first at a corner
        "dot": [in_patient(rectangle(18.6, 19.4), 2)],  # one voxel, far smaller than the output voxels
    }
    recipe = Recipe(spacing_mm=(2.0, 1.0, 1.0), size=None, masks=gpuprep.Masks(resampling=resampling))
    got, result = masks(tmp_path, lambda path, s: write_rtstruct(path, rois, series_uid=s.series_uid), recipe)
    labels = {label["name"]: label for label in result.labels or ()}
    assert labels["dot"]["source_voxels"] == 1
    if not got["dot"].any():
        assert "dot: of its 1 voxel none is left" in " ".join(result.warnings)
    for name in ("one", "two"):
        # 36 voxels of 2.5 × 0.8 × 0.7 mm on each of 6 slices.
        assert labels[name]["ml"] == pytest.approx(6 * 36 * 2.5 * 0.8 * 0.7 / 1000, rel=0.1)
    assert labels["one"]["value"] != labels["two"]["value"]
    files = sorted((tmp_path / "out" / result.folder / "labels").iterdir())
    values = set(np.unique(np.stack([tifffile.imread(f) for f in files])).tolist())
    assert values <= {0, *(label["value"] for label in labels.values())}


@trap(37, "holes")
def test_holes_keyholes_and_several_polygons_are_filled_correctly(tmp_path: Path) -> None:
    write_series(tmp_path / "in", noise(6), SPACING)
    outer, inner = rectangle(1.5, 14.5), rectangle(4.5, 9.5)
    keyhole = [*outer, outer[0], *inner, inner[0]]
    rois = {
        "ring": [in_patient(p, 1) for p in (outer, inner, rectangle(6.5, 7.5), rectangle(16.5, 18.5))],
        "keyhole": [in_patient(keyhole, 3)],
    }
    got, _ = masks(tmp_path, lambda path, s: write_rtstruct(path, rois, series_uid=s.series_uid))
    ring = np.zeros((20, 24), bool)
    ring[2:15, 2:15] = True
    ring[5:10, 5:10] = False
    np.testing.assert_array_equal(got["keyhole"][3], ring)
    ring[7, 7] = ring[17:19, 17:19] = True
    np.testing.assert_array_equal(got["ring"][1], ring)


@trap(38, "lidc-outlines-lie-outside")
def test_the_outlines_of_a_nodule_and_of_its_exclusion_are_outside_the_nodule(tmp_path: Path) -> None:
    write_series(tmp_path / "in", noise(6), SPACING)

    def outline(low: int, high: int) -> str:
        side = range(low, high)
        chain = [(c, low) for c in side] + [(high, r) for r in side]
        chain += [(c, high) for c in range(high, low, -1)] + [(low, r) for r in range(high, low, -1)]
        return "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in [*chain, chain[0]])

    def write(path: Path, series: gpuprep.Series) -> None:
        z = f"<imageZposition>{ORIGIN[2] + 2 * SPACING[0]}</imageZposition>"
        rois = f"<roi>{z}<inclusion>TRUE</inclusion>{outline(2, 14)}</roi>"
        rois += f"<roi>{z}<inclusion>FALSE</inclusion>{outline(5, 9)}</roi>"
        path.write_text(
            '<?xml version="1.0"?><LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader>'
            f"<SeriesInstanceUid>{series.series_uid}</SeriesInstanceUid></ResponseHeader><readingSession>"
            f"<unblindedReadNodule><noduleID>n</noduleID>{rois}</unblindedReadNodule></readingSession></LidcReadMessage>"
        )

    got, _ = masks(tmp_path, write)
    expected = np.zeros((6, 20, 24), bool)
    expected[2, 3:14, 3:14] = True  # inside the outline, without its pixels
    expected[2, 5:10, 5:10] = False  # inside the exclusion, with the pixels of its outline
    np.testing.assert_array_equal(next(iter(got.values())), expected)


@trap(39, "pixel-centres")
def test_a_cube_of_60_mm_has_its_volume(tmp_path: Path) -> None:
    # Filling the border too, as many programs do, adds 3.4 % here and more on coarser pixels.
    write_series(tmp_path / "in", np.zeros((30, 100, 110), np.int16), SPACING)
    rows, columns, slices = 60 / SPACING[1], 60 / SPACING[2], 60 / SPACING[0]
    square = [(10.0, 12.0), (10 + columns, 12.0), (10 + columns, 12 + rows), (10.0, 12 + rows)]
    rois = {"cube": [in_patient(square, k) for k in range(3, 3 + round(slices))]}
    got, result = masks(tmp_path, lambda path, s: write_rtstruct(path, rois, series_uid=s.series_uid))
    (label,) = result.labels or ()
    # 60 mm are exactly 75 rows; 85.7 columns become 85 or 86.
    assert got["cube"].any(axis=(0, 2)).sum() == 75
    assert label["ml"] == pytest.approx(216, rel=0.01)


@trap(40, "contours-by-position")
def test_contours_are_matched_to_slices_by_position(tmp_path: Path) -> None:
    # An oblique series with uneven slices: z varies along each contour, and slice numbers are misleading.
    places = np.array([0.0, 1.0, 2.15, 3.0, 3.9, 5.0])  # in slice spacings
    turn = np.array([[0.8, 0.36, 0.48], [-0.6, 0.48, 0.64], [0, -0.8, 0.6]])  # columns: row, column, normal
    row, column, normal = turn.T

    def move(ds: Dataset, k: int) -> None:
        ds.ImageOrientationPatient = [*row, *column]
        ds.ImagePositionPatient = [round(v, 6) for v in normal * places[k] * SPACING[0]]

    write_series(tmp_path / "in", noise(6), SPACING, change=move)
    corners = np.array(rectangle(4.5, 9.5))

    def on(layer: float) -> NDArray[np.float64]:
        in_plane = corners[:, :1] * SPACING[2] * row + corners[:, 1:] * SPACING[1] * column
        return np.asarray(in_plane + normal * layer * SPACING[0])

    rois = {"on slices": [on(p) for p in places[1:5]], "outside": [on(5.6)]}
    recipe = replace(HU, policy="keep")
    got, result = masks(tmp_path, lambda path, s: write_rtstruct(path, rois, series_uid=s.series_uid), recipe)
    expected = np.zeros((6, 20, 24), bool)
    expected[1:5, 5:10, 5:10] = True
    np.testing.assert_array_equal(got["on slices"], expected)
    assert "outside: 1 contour left out: on no slice of the series" in " ".join(result.warnings)


@trap(57, "frame-of-each-roi")
def test_an_roi_in_another_frame_of_reference_is_left_out(tmp_path: Path) -> None:
    def elsewhere(ds: Dataset) -> None:
        ds.StructureSetROISequence[1].ReferencedFrameOfReferenceUID = "1.2.3.99"

    def write(path: Path, series: gpuprep.Series) -> None:
        rois = {name: [in_patient(rectangle(low, low + 4), k)] for name, low, k in (("A", 3.5, 1), ("B", 9.5, 2))}
        frame = series.frame_of_reference_uid
        write_rtstruct(path, rois, series_uid=series.series_uid, frame_uid=frame, change=elsewhere)

    write_series(tmp_path / "in", noise(6), SPACING)
    got, result = masks(tmp_path, write)
    expected = np.zeros((6, 20, 24), bool)
    expected[1, 4:8, 4:8] = True
    assert set(got) == {"A"}
    np.testing.assert_array_equal(got["A"], expected)
    assert "B: left out, it is drawn in another frame of reference" in " ".join(result.warnings)


@trap(58, "seg-across-the-slices")
def test_a_sagittal_segmentation_keeps_its_position(tmp_path: Path) -> None:
    # Each frame is a column of the series; the mask covers slices 2 and 3, rows 4 to 9 and columns 6 to 10.
    affine = np.eye(4)
    affine[:3, :3] = np.array([[SPACING[2], 0, 0], [0, 0, SPACING[1]], [0, SPACING[0], 0]])  # x, z, y
    affine[:3, 3] = ORIGIN
    frames = np.zeros((24, 6, 20), bool)
    frames[6:11, 2:4, 4:10] = True
    write_series(tmp_path / "in", noise(6), SPACING)
    grid = Geometry(frames.shape, affine)
    got, _ = masks(tmp_path, lambda path, s: write_seg(path, {"a": frames}, grid, series_uid=s.series_uid))
    np.testing.assert_array_equal(got["a"], frames.transpose(1, 2, 0))


@trap(58, "seg-of-overlapping-slices")
def test_a_frame_drawn_on_one_of_several_overlapping_slices_stays_on_it(tmp_path: Path) -> None:
    # Slices of 5 mm every 2.5 mm, without Spacing Between Slices.
    def thick(ds: Dataset) -> None:
        measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        measures.SliceThickness = "5"
        del measures.SpacingBetweenSlices

    def write(path: Path, series: gpuprep.Series) -> None:
        by_z = sorted(series.slices, key=lambda header: (header.position_mm or ORIGIN)[2])
        uids = [header.sop_instance_uid for header in by_z]
        write_seg(path, {"a": mask}, grid, series_uid=series.series_uid, sop_uids=uids, change=thick)

    affine = np.eye(4)
    affine[:3, :3] = np.diag(SPACING)[::-1]
    affine[:3, 3] = ORIGIN
    mask = np.zeros((6, 20, 24), bool)
    mask[4, 5:15, 5:15] = True
    grid = Geometry(mask.shape, affine)
    write_series(tmp_path / "in", noise(6), SPACING)
    got, _ = masks(tmp_path, write)
    np.testing.assert_array_equal(got["a"], mask)


@trap(59, "outlines-that-overlap")
@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
def test_outlines_that_partly_overlap_or_repeat_are_one_region_except_with_xor(tmp_path: Path, kind: str) -> None:
    one, other, inner = rectangle(2.5, 12.5), rectangle(7.5, 17.5), rectangle(4.5, 8.5)
    rois = {
        "overlap": [in_patient(one, 1), in_patient(other, 1)],
        "twice": [in_patient(one, 2), in_patient([*one[2:], *one[:2]][::-1], 2)],
        "hole": [in_patient(one, 3), in_patient(inner, 3)],
    }
    write_series(tmp_path / "in", noise(6), SPACING)
    got, result = masks(tmp_path, lambda path, s: write_rtstruct(path, rois, series_uid=s.series_uid, kind=kind))
    notes = " | ".join(result.warnings)
    counts = {name: int(mask.sum()) for name, mask in got.items()}
    if kind == "CLOSED_PLANAR":
        assert counts == {"overlap": 100 + 100 - 25, "twice": 100, "hole": 100 - 16}
        assert "overlap: 2 outlines on 1 slice united: they overlap in part" in notes
        assert "twice: 1 outline left out: the same as another" in notes
        assert "hole: 1 outline inside others taken as hole" in notes
    else:
        assert counts == {"overlap": 100 + 100 - 2 * 25, "twice": 0, "hole": 100 - 16}
        assert "united" not in notes


@trap(42, "broken-neighbours")
def test_a_damaged_series_is_named_and_does_not_affect_others(tmp_path: Path) -> None:
    stored = noise(len(SYNTAXES))
    folder = tmp_path / "in"
    write_series(folder, stored, SPACING, change=lambda ds, k: put(ds, SYNTAXES[k]))
    cut = write_series(folder, noise(4), SPACING, series_number=2)[1]
    os.truncate(cut, cut.stat().st_size - 100)

    def empty(ds: Dataset, k: int) -> None:
        if k == 2:
            del ds.PixelData

    def garbled(ds: Dataset, k: int) -> None:
        if k == 2:
            put(ds, JPEG2000Lossless)
            ds.PixelData = encapsulate([b"this is no code stream"])
            ds["PixelData"].is_undefined_length = True

    def report(ds: Dataset, _: int) -> None:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
        ds.Modality = "SR"
        del ds.PixelData

    without = write_series(folder, noise(4), SPACING, series_number=3, change=empty)[2]
    code = write_series(folder, noise(4), SPACING, series_number=4, change=garbled)[2]
    write_series(folder, noise(1), SPACING, series_number=5, change=report)
    (folder / "notes.txt").write_text("no DICOM")
    header, half = write_series(folder, noise(2), SPACING, series_number=6)
    os.truncate(header, 150)  # in the meta group
    os.truncate(half, 360)  # after the attributes that identify it as CT

    run = convert(folder, tmp_path / "out")
    results = {r.series_number: r for r in run.results}
    expected = {1: "ok", 2: "rejected", 3: "rejected", 4: "rejected", None: "rejected"}
    assert {n: r.status for n, r in results.items()} == expected
    np.testing.assert_array_equal(written(tmp_path / "out", results[1]), stored - 1024.0)
    assert [results[n].codes for n in (2, 3, 4)] == [("truncated",), ("missing-tag",), ("pixels",)]
    for n, file in ((2, cut), (3, without), (4, code), (None, half)):
        assert file.name in results[n].reason
        assert results[n].folder == ""
    assert run.passed_over == {"Basic Text SR Storage": 1, "not DICOM": 1}
    assert [path for path, _ in run.unreadable] == [str(header)]
    assert run.exit_code == 1
    with (tmp_path / "out" / "manifest.csv").open(newline="", encoding="utf-8") as f:
        assert sum(line["status"] == "rejected" for line in csv.DictReader(f)) == 4


# Interpretation of stored words


@trap(45, "vr-of-the-pixels")
@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("vr", [b"UN\0\0", b"OF\0\0", b"OL\0\0", b"OD\0\0", b"OV\0\0", b"UT\0\0", b"OW  ", b"OB\0\x01"])
def test_pixels_start_after_their_explicit_element_header(tmp_path: Path, vr: bytes, size: int) -> None:
    files = write_series(tmp_path, noise(3, size, size), SPACING)
    expected = by_pydicom(files)
    for file in files:
        data = file.read_bytes()
        at = data.rindex(b"\xe0\x7f\x10\x00OW\0\0") + 4
        file.write_bytes(data[:at] + vr + data[at + 4 :])
    stored = gpuprep.read(found(tmp_path)).stored
    assert stored[0, 0, 0] == expected[0, 0, 0] + 1024
    np.testing.assert_array_equal(stored, expected + 1024)


@trap(56, "masks-on-the-named-volume")
@pytest.mark.parametrize("how", ["two patients", "two phases"])
def test_masks_go_to_the_volume_they_were_drawn_on_if_volumes_share_a_series_uid(tmp_path: Path, how: str) -> None:
    uid, drawn_on = generate_uid(), []

    def write(n: int) -> None:
        def change(ds: Dataset, k: int) -> None:
            ds.AcquisitionNumber = n
            if how == "two phases":  # otherwise the frames of reference differ too
                ds.FrameOfReferenceUID = "1.2.3.5"
            else:
                ds.StudyInstanceUID = f"1.2.3.6.{n}"
            if n == 2 and k == 1:
                drawn_on.append(ds.SOPInstanceUID)

        folder = tmp_path / "in" / (f"p{n}" if how == "two patients" else "")
        write_series(folder, noise(6, seed=n), SPACING, series_uid=uid, series_number=n, change=change)

    write(1)
    write(2)

    def name_the_image(ds: Dataset) -> None:
        reference = Dataset()
        reference.ReferencedSOPInstanceUID = drawn_on[0]
        for contour in ds.ROIContourSequence[0].ContourSequence:
            contour.ContourImageSequence = [reference]

    rois = {"a": [in_patient(rectangle(4.5, 9.5), 1)]}
    write_rtstruct(tmp_path / "rs.dcm", rois, series_uid=uid, change=name_the_image)
    run = gpuprep.convert(tmp_path / "in", tmp_path / "out", HU, masks=tmp_path / "rs.dcm", backend="cpu")
    assert run.counts == {"fixed": 2}
    other, named = sorted(
        run.results, key=lambda r: np.array_equal(written(tmp_path / "out", r), noise(6, seed=2) - 1024.0)
    )
    assert other.labels is None
    expected = np.zeros((6, 20, 24), np.uint8)
    expected[1, 5:10, 5:10] = 1
    labels = sorted((tmp_path / "out" / named.folder / "labels").iterdir())
    np.testing.assert_array_equal(np.stack([tifffile.imread(f) for f in labels]), expected)


@trap(60, "masks-of-another-modality")
def test_structures_of_an_mr_are_not_applied_to_the_ct_in_its_frame_of_reference(tmp_path: Path) -> None:
    def shared(ds: Dataset, _: int) -> None:
        ds.FrameOfReferenceUID = "1.2.3.5"

    def mr(ds: Dataset, k: int) -> None:
        shared(ds, k)
        ds.Modality, ds.SOPClassUID = "MR", MRImageStorage
        ds.file_meta.MediaStorageSOPClassUID = MRImageStorage

    write_series(tmp_path / "in" / "ct", noise(6), SPACING, series_uid="1.2.3.1", change=shared)
    write_series(tmp_path / "in" / "mr", noise(6), SPACING, series_uid="1.2.3.2", change=mr)
    square = [in_patient(rectangle(4.5, 9.5), k) for k in range(1, 4)]  # on one series, both would overlap
    write_rtstruct(tmp_path / "in" / "ct.dcm", {"GTV": square}, series_uid="1.2.3.1")
    write_rtstruct(tmp_path / "in" / "mr.dcm", {"GTV_MR": square}, series_uid="1.2.3.2")
    run = gpuprep.convert(tmp_path / "in", tmp_path / "out", HU, masks="auto", backend="cpu")
    result = alone(run)
    assert (result.status, run.exit_code) == ("ok", 0)
    assert [label["name"] for label in result.labels or ()] == ["GTV"]
    ((path, why),) = run.unused
    assert path == str(tmp_path / "in" / "mr.dcm")
    assert why == "it refers to series 1.2.3.2 of modality MR, which is not converted"


def plainly(intercept: int, bits: int, high: int) -> Change:
    def change(ds: Dataset, _: int) -> None:
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = bits, high, 0, intercept
        if "PixelPaddingValue" in ds:
            del ds.PixelPaddingValue

    return change


@trap(46, "high-bit")
@pytest.mark.parametrize("shift", [0, 4])
def test_the_bits_that_vary_determine_the_position_of_the_values(tmp_path: Path, shift: int) -> None:
    values = noise(4).astype(np.uint16)
    write_series(tmp_path / "in", values << shift, SPACING, change=plainly(-1024, 12, 15))
    np.testing.assert_array_equal(in_hu(found(tmp_path / "in")).values, values - 1024.0)
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    assert (result.status, result.codes) == (("ok", ()) if shift else ("fixed", ("bits",)))
    np.testing.assert_array_equal(written(tmp_path / "out", result), values - 1024.0)


@trap(46, "high-bit")
def test_a_series_whose_bits_fit_both_interpretations_is_rejected(tmp_path: Path) -> None:
    write_series(tmp_path / "in", (noise(4) % 256).astype(np.uint16) << 4, SPACING, change=plainly(-1024, 12, 15))
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    assert (result.status, result.codes) == ("rejected", ("bits",))
    assert "-1024 to -769 HU" in result.reason
    assert "-1024 to 3056 HU" in result.reason


@trap(47, "sign-against-the-header")
@pytest.mark.parametrize(
    ("syntax", "stream_as"),
    [(JPEG2000Lossless, "i2"), (JPEG2000Lossless, "u2"), (JPEGLSLossless, "u2"), (JPEGLosslessSV1, "u2")],
    ids=["J2K-signed", "J2K-unsigned", "JPEG-LS", "JPEG"],
)
def test_the_sign_that_gives_ct_numbers_is_used_and_recorded(tmp_path: Path, syntax: UID, stream_as: str) -> None:
    hu = (noise(4) % 2000 - 1024).astype(np.int16)

    def change(ds: Dataset, k: int) -> None:
        plainly(0, 16, 15)(ds, k)
        put(ds, syntax, stream_as)

    write_series(tmp_path / "in", hu, SPACING, change=change)
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path / "in")).stored, hu)
    result = alone(convert(tmp_path / "in", tmp_path / "out"))
    assert (result.status, result.codes) == ("fixed", ("sign",))
    assert (result.hu_min, result.hu_max) == (hu.min(), hu.max())
    np.testing.assert_array_equal(written(tmp_path / "out", result), hu)


# Traps 43 to 53: grouping of images into series and volumes


def flat(value: int, slices: int = 9) -> NDArray[np.int16]:
    """Return constant slices of `value` + 1, + 2, … HU, so that each slice has a different value."""
    hu = value + 1 + np.arange(slices, dtype=np.int16)
    return np.broadcast_to((hu + 1024)[:, None, None], (slices, 8, 10)).astype(np.int16)


def volumes_of(folder: Path, rules: Rules | None = None) -> list[tuple[list[float], list[float]]]:
    """Return heights and HU of the slices of each volume."""
    volumes = []
    for series in gpuprep.discover(folder, rules):
        volume = gpuprep.read(series)
        heights = [round(float(volume.geometry.points_mm((k, 0, 0))[2]), 4) for k in range(len(volume.stored))]
        volumes.append((heights, [float(v) for v in volume.stored[:, 4, 5] - 1024.0]))
    return volumes


def passes(folder: Path, starts_mm: list[float], separated_by: Callable[[int, int], dict[str, Any]]) -> None:
    """Write passes of one series, of 9 slices 2.5 mm apart, that start at these heights; HU are those of `flat`."""
    series, study = generate_uid(), generate_uid()
    for n, start in enumerate(starts_mm):

        def change(ds: Dataset, k: int, n: int = n) -> None:
            ds.InstanceNumber, ds.StudyInstanceUID, ds.FrameOfReferenceUID = 20 * n + k + 1, study, "1.2.3"
            for keyword, value in separated_by(n, k).items():
                setattr(ds, keyword, value)

        write_series(
            folder / str(n), flat(100 * n), (2.5, 0.8, 0.7), series_uid=series, origin_mm=(0, 0, start), change=change
        )


def pass_of(n: int, start_mm: float) -> tuple[list[float], list[float]]:
    """Return the expected result of `volumes_of` for one pass."""
    return [round(start_mm + 2.5 * k, 4) for k in range(9)], [100.0 * n + 1 + k for k in range(9)]


SEPARATED_BY: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "number": lambda n, _: {"AcquisitionNumber": n + 1},
    "time": lambda n, _: {"AcquisitionTime": f"10000{n}"},
    "time-of-each-slice": lambda n, k: {"AcquisitionTime": f"100{n}{k:02}"},
    "kernel": lambda n, _: {"ConvolutionKernel": f"B{n}"},
}


@trap(43, "overlapping-passes")
@pytest.mark.parametrize("separated_by", SEPARATED_BY)
@pytest.mark.parametrize(
    "starts_mm",
    [[0, 19.0], [0, 16.0], [0, 10.7], [0, 1.0], [0, 18.75], [0, 20.0], [0, 17.5], [0, 0], [0, 16.0, 32.0]],
    ids=[
        "one gap",
        "out of register",
        "half",
        "all",
        "half register",
        "one slice",
        "two slices",
        "in register",
        "three",
    ],
)
def test_overlapping_passes_are_separate_volumes(tmp_path: Path, starts_mm: list[float], separated_by: str) -> None:
    passes(tmp_path, starts_mm, SEPARATED_BY[separated_by])
    assert volumes_of(tmp_path) == [pass_of(n, start) for n, start in enumerate(starts_mm)]


@trap(43, "end-to-end")
@pytest.mark.parametrize("separated_by", SEPARATED_BY)
@pytest.mark.parametrize("count", [2, 3])
def test_adjacent_acquisitions_of_one_scan_are_one_volume(tmp_path: Path, count: int, separated_by: str) -> None:
    passes(tmp_path, [22.5 * n for n in range(count)], SEPARATED_BY[separated_by])
    heights, values = [2.5 * k for k in range(9 * count)], [100.0 * n + k + 1 for n in range(count) for k in range(9)]
    assert volumes_of(tmp_path) == [(heights, values)]
    assert found(tmp_path).irregularities == ()


@trap(43, "policies")
def test_overlapping_passes_are_rejected_by_strict_and_reported_by_keep(tmp_path: Path) -> None:
    passes(tmp_path / "in", [0, 16.0], SEPARATED_BY["number"])
    strict = alone(convert(tmp_path / "in", tmp_path / "strict", replace(HU, policy="strict")))
    assert (strict.status, strict.codes) == ("rejected", ("acquisitions",))
    kept = alone(convert(tmp_path / "in", tmp_path / "keep", replace(HU, policy="keep")))
    assert (kept.status, kept.codes[0]) == ("ok", "acquisitions")
    assert "2 acquisitions overlap, separated by acquisition number" in kept.irregularities[0]


@trap(44, "two-studies")
@pytest.mark.parametrize("start_mm", [22.5, 1.25, 0, 16.0], ids=["end to end", "between", "same place", "overlap"])
@pytest.mark.parametrize("policy", ["fix", "keep"])
def test_a_series_uid_shared_by_two_studies_gives_two_series(tmp_path: Path, start_mm: float, policy: Any) -> None:
    passes(tmp_path, [0, start_mm], lambda n, _: {"StudyInstanceUID": f"1.2.{n}", "PatientID": f"P{n}"})
    rules = Rules(policy=policy)
    assert volumes_of(tmp_path, rules) == [pass_of(0, 0), pass_of(1, start_mm)]
    one, two = gpuprep.discover(tmp_path, rules)
    assert (one.study_uid, two.study_uid) == ("1.2.0", "1.2.1")
    assert (one.key, two.key) == (f"{one.series_uid}#1", f"{one.series_uid}#2")
    assert [i.code for s in (one, two) for i in s.irregularities] == ["studies", "studies"]


@trap(44, "two-patients")
def test_a_series_uid_shared_by_two_patients_gives_two_series(tmp_path: Path) -> None:
    passes(tmp_path / "in", [0, 22.5], lambda n, _: {"PatientID": f"MRN-{n}"})
    run = convert(tmp_path / "in", tmp_path / "out")
    assert [(r.status, r.codes[0], r.slices) for r in run.results] == [("fixed", "studies", 9)] * 2
    assert {tuple(written(tmp_path / "out", r)[:, 4, 5]) for r in run.results} == {
        tuple(pass_of(n, 0)[1]) for n in range(2)
    }
    assert "2 patients share a series" in run.results[0].irregularities[0]
    assert b"MRN-" not in b"".join(f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file())


PHASES: dict[str, tuple[Callable[[int], dict[str, Any]], str | None]] = {
    "respiratory": (lambda n: {"NominalPercentageOfRespiratoryPhase": 25.0 * n}, "respiratory phase 25 %"),
    "cardiac": (lambda n: {"NominalPercentageOfCardiacPhase": 40.0 + 30 * n}, "cardiac phase 70 %"),
    "delay": (lambda n: {"NominalCardiacTriggerDelayTime": 100.5 * n}, "cardiac trigger delay 100.5 ms"),
    "breath": (lambda n: {"NominalRespiratoryTriggerDelayTime": 250.0 * n}, "respiratory trigger delay 250 ms"),
    "trigger": (lambda n: {"TriggerTime": f"{n * 75}"}, "trigger time 75 ms"),
    "position": (lambda n: {"TemporalPositionIdentifier": n + 1}, "temporal position 2"),
    "offset": (lambda n: {"TemporalPositionTimeOffset": 1.5 * n}, "temporal offset 1.5 s"),
    "energy": (lambda n: {"MultienergyCTProcessingSequence": [energy(40.0 + 30 * n)]}, "energy 70 keV"),
    "options": (lambda n: {"ScanOptions": ["HELICAL", f"TP{n}"]}, None),
    "content": (lambda n: {"ContentDate": "20250131", "ContentTime": f"11{n}000"}, None),
    "series": (lambda n: {"SeriesTime": f"11{n}000"}, None),
}


def energy(kev: float) -> Dataset:
    item = Dataset()
    item.MonoenergeticEnergyEquivalent = kev
    return item


@trap(50, "files")
@pytest.mark.parametrize("phase", PHASES)
def test_phases_and_energies_of_single_frame_images_are_separate_volumes(tmp_path: Path, phase: str) -> None:
    of, label = PHASES[phase]
    passes(tmp_path, [0, 0, 0], lambda n, _: of(n))
    assert volumes_of(tmp_path) == [pass_of(n, 0) for n in range(3)]
    texts = [series.irregularities[0].what for series in gpuprep.discover(tmp_path)]
    assert all(text.startswith("3 acquisitions overlap, separated by ") for text in texts)
    assert [label in text for text in texts] == [False, True, False] if label else len(set(texts)) == 1
    assert not any(secret in text for text in texts for secret in ("TP", "2025", "11"))


def frames(
    file: Path, values: list[int], heights_mm: list[float], groups: Callable[[int], dict[str, dict[str, Any]]]
) -> None:
    """Write an Enhanced CT image of constant frames; `groups(n)` gives the functional groups of frame n."""
    (plain,) = write_series(file.parent / "plain", flat(0, 1), (2.5, 0.8, 0.7), series_uid="1.2.9")
    ds = pydicom.dcmread(plain)
    plain.unlink()
    shared, measures, plane, rescale = (Dataset() for _ in range(4))
    measures.PixelSpacing, plane.ImageOrientationPatient = ds.PixelSpacing, ds.ImageOrientationPatient
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1024, "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    shared.PixelValueTransformationSequence = [rescale]
    own = []
    for n, height in enumerate(heights_mm):
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, height]
        group.PlanePositionSequence = [place]
        for sequence, attributes in groups(n).items():
            item = Dataset()
            for keyword, value in attributes.items():
                setattr(item, keyword, value)
            setattr(group, sequence, [item])
        own.append(group)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope",
                    "RescaleIntercept", "RescaleType", "PixelPaddingValue"):  # fmt: skip
        del ds[keyword]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.2.1")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.FrameOfReferenceUID = "1.2", "1.2.3"
    ds.NumberOfFrames = len(heights_mm)
    ds.PixelData = b"".join(np.full((8, 10), v + 1024, "<i2").tobytes() for v in values)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], own
    ds.save_as(file, enforce_file_format=True)


GROUPS: dict[str, tuple[Callable[[int], dict[str, dict[str, Any]]], str]] = {
    "respiratory": (
        lambda n: {"RespiratorySynchronizationSequence": {"NominalPercentageOfRespiratoryPhase": 25.0 * (n // 5)}},
        "respiratory phase 25 %",
    ),
    "delay": (
        lambda n: {"CardiacSynchronizationSequence": {"NominalCardiacTriggerDelayTime": 100.0 * (n // 5)}},
        "cardiac trigger delay 100 ms",
    ),
    "offset": (
        lambda n: {"TemporalPositionSequence": {"TemporalPositionTimeOffset": 2.0 * (n // 5)}}, "temporal offset 2 s",
    ),
    "index": (
        lambda n: {"FrameContentSequence": {"TemporalPositionIndex": n // 5 + 1}}, "temporal position 2",
    ),
    "energy": (
        lambda n: {"MultienergyCTProcessingSequence": {"MonoenergeticEnergyEquivalent": 40.0 + 30 * (n // 5)}},
        "energy 70 keV",
    ),
    "dimension": (
        lambda n: {"FrameContentSequence": {"DimensionIndexValues": [1, n % 5 + 1, n // 5 + 1]}},
        "dimension index 3 = 2",
    ),
}  # fmt: skip


@trap(50, "frames")
@pytest.mark.parametrize("phase", GROUPS)
def test_phases_and_energies_of_frames_are_separate_volumes(tmp_path: Path, phase: str) -> None:
    groups, label = GROUPS[phase]
    values = [100 * (n // 5) + n % 5 for n in range(20)]
    frames(tmp_path / "0.dcm", values, [2.0 * (n % 5) for n in range(20)], groups)
    assert volumes_of(tmp_path) == [
        ([0, 2, 4, 6, 8], [float(100 * q + k) for k in range(5)]) for q in range(4)
    ]  # fmt: skip
    texts = [series.irregularities[0].what for series in gpuprep.discover(tmp_path)]
    assert [label in text for text in texts] == [False, True, False, False]


@trap(50, "instances")
def test_frames_separated_by_instance_only_are_separate_volumes(tmp_path: Path) -> None:
    for q in range(3):
        values = [100 * q + k for k in range(5)]
        times = lambda n, q=q: {"FrameContentSequence": {"FrameAcquisitionDateTime": f"2022022316432{q}.7{n:02}"}}  # noqa: E731
        frames(tmp_path / f"{q}.dcm", values, [2.0 * k for k in range(5)], times)
    expected = [([0, 2, 4, 6, 8], [float(100 * q + k) for k in range(5)]) for q in range(3)]
    assert volumes_of(tmp_path) == expected
    assert "separated by instance" in gpuprep.discover(tmp_path)[0].irregularities[0].what


@trap(51, "many-times")
def test_1000_acquisition_times_have_different_hashes(tmp_path: Path) -> None:
    # With 16 bits, 7.3 pairs of 1000 times would be expected to have equal hashes.
    times = [f"{10 + n // 3600:02}{n // 60 % 60:02}{n % 60:02}" for n in range(1000)]

    def at(ds: Dataset, _: int) -> None:
        ds.AcquisitionDate, ds.AcquisitionTime = "20250131", "235959"

    (one,) = write_series(tmp_path, np.zeros((1, 1, 1), np.int16), (2.5, 0.8, 0.7), series_uid="1.2.3", change=at)
    content, element = one.read_bytes(), b"TM\x06\0"
    assert content.count(element + b"235959") == 1
    files = [tmp_path / f"{time}.dcm" for time in times]
    for file, time in zip(files, times, strict=True):
        file.write_bytes(content.replace(element + b"235959", element + time.encode()))
    images = [image for contents in read_headers([str(f) for f in files]) for image in contents.images]
    assert len({image.header.acquisition_time for image in images}) == 1000


@trap(51, "equal-hashes")
def test_times_with_equal_16_bit_hashes_are_two_volumes(tmp_path: Path) -> None:
    uid = "1.2.3.4"
    short: dict[str, str] = {}
    for second in range(10 * 3600, 14 * 3600):
        time = f"{second // 3600:02}{second // 60 % 60:02}{second % 60:02}"
        digest = hashlib.sha256((uid + time).encode()).hexdigest()[:4]
        if digest in short:
            pair = short[digest], time
            break
        short[digest] = time
    passes(tmp_path, [0, 0], lambda n, _: {"AcquisitionTime": pair[n], "SeriesInstanceUID": uid})
    assert volumes_of(tmp_path) == [pass_of(0, 0), pass_of(1, 0)]


@trap(52, "one-stack")
def test_a_stack_distributed_over_several_instances_is_one_volume(tmp_path: Path) -> None:
    heights = [2.0 * k for k in range(24)]
    for q in range(4):
        content = lambda n, q=q: {"FrameContentSequence": {  # noqa: E731
            "FrameAcquisitionNumber": q + 1, "StackID": "1", "InStackPositionNumber": 4 * n + q + 1,
        }}  # fmt: skip
        frames(tmp_path / f"{q}.dcm", list(range(q, 24, 4)), heights[q::4], content)
    assert volumes_of(tmp_path) == [(heights, [float(v) for v in range(24)])]
    assert found(tmp_path).irregularities == ()


@trap(52, "two-stacks")
@pytest.mark.parametrize("start_mm", [150.0, 10.0, 1.0, 0.0], ids=["apart", "end to end", "between", "same place"])
@pytest.mark.parametrize("names", [("1", "2"), ("Müller", "chest")])
def test_two_stacks_are_two_volumes(tmp_path: Path, start_mm: float, names: tuple[str, str]) -> None:
    heights = [2.0 * k for k in range(5)]
    content = lambda n: {"FrameContentSequence": {"StackID": names[n // 5], "InStackPositionNumber": n % 5 + 1}}  # noqa: E731
    frames(tmp_path / "0.dcm", list(range(10)), [*heights, *(start_mm + z for z in heights)], content)
    assert volumes_of(tmp_path) == [
        (heights, [0.0, 1, 2, 3, 4]), ([start_mm + z for z in heights], [5.0, 6, 7, 8, 9]),
    ]  # fmt: skip
    one, two = gpuprep.discover(tmp_path)
    assert [i.code for i in (*one.irregularities, *two.irregularities)] == ["mixed", "mixed"]
    assert ("this one has Stack ID 2" in two.irregularities[0].what) is (names[1] == "2")
    assert "chest" not in two.irregularities[0].what


@trap(53, "fine-voxels")
@pytest.mark.parametrize("spacing_mm", [0.1, 0.035, 0.02, 0.009, 0.002])
def test_slices_of_fine_voxels_are_not_duplicates(tmp_path: Path, spacing_mm: float) -> None:
    def at(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [0, 0, f"{spacing_mm * k:.6f}"]

    write_series(tmp_path, flat(0), (spacing_mm,) * 3, change=at)
    series = found(tmp_path)
    volume = in_hu(series)
    assert audit(series).verdict == "ok"
    np.testing.assert_allclose(volume.spacing_mm, [spacing_mm] * 3, rtol=1e-4)
    assert np.asarray(volume.values)[:, 4, 5].tolist() == list(range(1, 10))


@trap(53, "fine-jump")
def test_a_shift_of_three_fine_voxels_is_corrected(tmp_path: Path) -> None:
    def at(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [0.09 * (k > 4), 0, f"{0.03 * k:.2f}"]

    write_series(tmp_path, flat(0), (0.03, 0.03, 0.03), change=at)
    judged = audit(found(tmp_path))
    assert (judged.verdict, judged.codes) == ("fixed", ("shift",))
    assert "up to 0.090 mm beside the normal" in judged.irregularities[0].what
    assert judged.stack is not None
    assert judged.stack.placement is not None
    assert judged.stack.placement.shift is not None
    assert judged.stack.placement.shift[:, 1] == pytest.approx([0] * 5 + [3] * 4)
