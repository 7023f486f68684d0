"""Tests of `gpuprep.dicom.stack`: order, spacing and affine from positions, irregularities and rejections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import UID
from scipy.spatial.transform import Rotation

from gpuprep.core.series import Series, SliceHeader
from gpuprep.core.stacking_rules import Rules
from gpuprep.dicom.discover import discover
from gpuprep.dicom.read import read
from gpuprep.dicom.stack import Stack, stack
from gpuprep.errors import GeometryError, InputError, IntensityError, MissingTagError
from gpuprep.testing import write_series

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
STRICT = Rules(policy="strict")
Xyz = tuple[float, float, float]
Change = Callable[[Dataset, int], None]


def header(name: str, position_mm: Xyz | None, pixel_bytes: int = 640) -> SliceHeader:
    return SliceHeader(
        path=f"/data/{name}", member=None, frame=0, frames=1, file_bytes=1000 + pixel_bytes, mtime_ns=1,
        sop_instance_uid=name, instance_number=None, position_mm=position_mm, localizer=False, secondary=False,
        modality="CT", temporal_position=None, acquisition_number=None, acquisition_time="", reconstruction="",
        phase="", rescale_slope=1.0, rescale_intercept=-1024.0, rescale_type="HU", photometric="MONOCHROME2",
        samples_per_pixel=1, bits_allocated=16, bits_stored=16, high_bit=15, signed=True, padding=None,
        padding_limit=None, transfer_syntax="1.2.840.10008.1.2.1", pixel_offset=1000, pixel_bytes=pixel_bytes,
    )  # fmt: skip


def series(
    positions_mm: Sequence[Xyz],
    *,
    orientation: Sequence[float] = AXIAL,
    pixel_spacing_mm: tuple[float, float] = (0.8, 0.7),
    shape: tuple[int, int] = (16, 20),
) -> Series:
    """Return a series of headers without files; slices are named s0, s1, … in the given order."""
    return Series(
        series_uid="1.2.3", study_uid="1.2", frame_of_reference_uid="1.4", series_number=1, rows=shape[0],
        columns=shape[1], pixel_spacing_mm=pixel_spacing_mm, orientation=tuple(orientation), part=0, folder="/data",
        slices=tuple(header(f"s{n}", p, 2 * shape[0] * shape[1]) for n, p in enumerate(positions_mm)),
    )  # fmt: skip


def axial_series(z_mm: Sequence[float]) -> Series:
    """Return an axial series with slices at the given z positions."""
    return series([(-100.0, -120.0, z) for z in z_mm])


def names(stacked: Stack) -> list[str]:
    return [s.name for s in stacked.slices]


def write_and_discover(folder: Path, change: Change | None = None, *, slices: int = 5, **options: Any) -> Series:
    """Write a series with changed headers and discover it; the stored values of slice k depend on k."""
    stored = np.arange(slices, dtype=np.int16)[:, None, None] * 100 + np.arange(320, dtype=np.int16).reshape(16, 20)
    write_series(folder, stored, (2.5, 0.8, 0.7), change=change, **options)
    (found,) = discover(folder)
    return found


# Order and spacing


@settings(deadline=None)
@given(st.permutations(range(9)))
def test_the_stack_does_not_depend_on_the_order_of_files(order: list[int]) -> None:
    # Trap 1.
    z_mm = [-300 + 2.5 * n for n in range(9)]
    whole = axial_series(z_mm)
    stacked = stack(replace(whole, slices=tuple(whole.slices[n] for n in order)))
    assert names(stacked) == [f"s{n}" for n in range(9)]
    np.testing.assert_array_equal(stacked.geometry.affine, stack(whole).geometry.affine)


def test_slices_are_ordered_by_position_alone(tmp_path: Path) -> None:
    # Traps 1, 2, 3: all other attributes and the file names contradict the positions.
    lots = [3, 7, 0, 5, 1, 6, 2, 4]

    def contradict_positions(ds: Dataset, k: int) -> None:
        ds.InstanceNumber = lots[k]
        ds.SliceLocation = f"{-lots[k] * 3.5:g}"
        ds.AcquisitionNumber = lots[k]
        ds.SliceThickness = "5"
        ds.SpacingBetweenSlices = "-1.25"

    write_and_discover(tmp_path, contradict_positions, slices=8)
    for k, file in enumerate(sorted(tmp_path.iterdir())):
        file.rename(tmp_path / f"{lots[k]:02}")
    volume = read(discover(tmp_path)[0])
    assert volume.stored[:, 0, 0].tolist() == [100 * k for k in range(8)]
    assert volume.geometry.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    assert volume.geometry.origin_mm == pytest.approx((-100, -120, -300))


@pytest.mark.parametrize("numbers", [None, 0, 1])
def test_instance_numbers_may_be_absent_or_equal(tmp_path: Path, numbers: int | None) -> None:
    # Trap 1.
    def change(ds: Dataset, _: int) -> None:
        ds.InstanceNumber = numbers

    assert stack(write_and_discover(tmp_path, change)).geometry.origin_mm == pytest.approx((-100, -120, -300))


def test_spacing_is_measured_between_positions_and_not_taken_from_thickness(tmp_path: Path) -> None:
    # Trap 2: slices of 5 mm thickness every 2.5 mm.
    def change(ds: Dataset, _: int) -> None:
        ds.SliceThickness = "5"

    assert stack(write_and_discover(tmp_path, change)).geometry.spacing_mm[0] == pytest.approx(2.5)


def test_row_and_column_spacing_are_not_exchanged(tmp_path: Path) -> None:
    # Trap 35: Pixel Spacing is between rows, then between columns; 16 rows and 20 columns.
    geometry = stack(write_and_discover(tmp_path)).geometry
    assert geometry.shape == (5, 16, 20)
    assert geometry.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    # The last voxel of the last slice: x grows with columns, y with rows, z with slices.
    assert geometry.points_mm((4, 15, 19)) == pytest.approx((-100 + 19 * 0.7, -120 + 15 * 0.8, -300 + 4 * 2.5))


def test_the_spacing_is_measured_over_the_whole_stack() -> None:
    # Trap 5: rounding to hundredths must not add up over the stack.
    spacing = 1.2457
    z_mm = [round(n * spacing, 2) for n in range(101)]
    assert z_mm[1] == 1.25
    assert stack(axial_series(z_mm)).geometry.spacing_mm[0] == pytest.approx(spacing, abs=0.005 / 100)


# The affine, for any orientation


@st.composite
def oblique(draw: st.DrawFn) -> tuple[Series, NDArray[np.float64]]:
    """Draw a series with any orientation, spacing, origin and order of slices, and its positions in spatial order."""
    rotation = Rotation.from_rotvec(draw(st.tuples(*[st.floats(-3, 3)] * 3))).as_matrix()
    count = draw(st.integers(2, 12))
    step_mm = draw(st.floats(0.3, 10))
    origin = np.array(draw(st.tuples(*[st.floats(-500, 500)] * 3)))
    positions = origin + np.outer(np.arange(count) * step_mm, rotation[:, 2])
    order = draw(st.permutations(range(count)))
    shape = (draw(st.integers(1, 600)), draw(st.integers(1, 600)))
    return series(
        [tuple(positions[n]) for n in order],
        orientation=[*rotation[:, 0], *rotation[:, 1]],
        pixel_spacing_mm=(draw(st.floats(0.1, 4)), draw(st.floats(0.1, 4))),
        shape=shape,
    ), positions


@settings(deadline=None)
@given(oblique())
def test_the_affine_follows_the_formula_of_the_standard(given_: tuple[Series, NDArray[np.float64]]) -> None:
    # Trap 35. PS3.3, C.7.6.2.1.1: P = S + X·Δi·i + Y·Δj·j, where i counts columns, X is the direction of a row and Δi
    # the distance between columns; j counts rows, Y is the direction of a column and Δj the distance between rows.
    found, positions = given_
    assert found.orientation is not None
    assert found.pixel_spacing_mm is not None
    x, y = np.array(found.orientation[:3]), np.array(found.orientation[3:])
    delta_j, delta_i = found.pixel_spacing_mm
    stacked = stack(found)
    assert stacked.geometry.shape == (len(positions), found.rows, found.columns)
    for k, s in enumerate(positions):
        assert stacked.slices[k].position_mm == tuple(s)
        for i, j in ((0, 0), (found.columns - 1, 0), (0, found.rows - 1), (found.columns - 1, found.rows - 1)):
            expected = s + x * delta_i * i + y * delta_j * j
            assert stacked.geometry.points_mm((k, j, i)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("orientation", "step"),
    [
        ((1, 0, 0, 0, 1, 0), (0, 0, 1)),  # axial: feet to head
        ((-1, 0, 0, 0, -1, 0), (0, 0, 1)),  # axial, prone
        ((0, 1, 0, 0, 0, -1), (-1, 0, 0)),  # sagittal
        ((1, 0, 0, 0, 0, -1), (0, 1, 0)),  # coronal
    ],
)
def test_slices_are_ordered_along_the_cross_product_of_row_and_column(
    tmp_path: Path, orientation: tuple[float, ...], step: Xyz
) -> None:
    # Trap 1: sagittal and coronal series have one z only.
    volume = read(write_and_discover(tmp_path, orientation=orientation))
    assert volume.stored[:, 0, 0].tolist() == [0, 100, 200, 300, 400]
    assert volume.geometry.affine[:3, 0] == pytest.approx(2.5 * np.array(step))
    assert volume.geometry.affine[:3, 1] == pytest.approx(0.8 * np.array(orientation[3:]))
    assert volume.geometry.affine[:3, 2] == pytest.approx(0.7 * np.array(orientation[:3]))


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
@pytest.mark.parametrize("orientation", [AXIAL, (0.8, 0.6, 0.0, -0.6, 0.8, 0.0), (1.0, 0.0, 0.0, 0.0, 0.8, -0.6)])
def test_simpleitk_gives_the_same_voxel_positions(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    SimpleITK: Any = pytest.importorskip("SimpleITK")  # noqa: N806 - its name
    reader = SimpleITK.ImageSeriesReader()
    volume = read(write_and_discover(tmp_path, orientation=orientation))
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), volume.stored - 1024)
    assert image.GetSpacing() == pytest.approx(volume.geometry.spacing_mm[::-1])
    assert image.GetOrigin() == pytest.approx(volume.geometry.origin_mm)
    for k, j, i in ((0, 0, 0), (4, 15, 19), (2, 15, 0), (3, 0, 19)):
        expected = image.TransformIndexToPhysicalPoint((i, j, k))
        assert volume.geometry.points_mm((k, j, i)) == pytest.approx(expected, abs=1e-6)


def test_rounded_direction_cosines_are_normalised() -> None:
    # 30° about x, in two digits: the direction of a column is 1.0034 long.
    normal = np.array([0, -0.5, 0.87]) / np.hypot(0.5, 0.87)
    x, y, z = (2 * normal).tolist()
    geometry = stack(
        series([(0, 0, 0), (x, y, z), (2 * x, 2 * y, 2 * z)], orientation=(1, 0, 0, 0, 0.87, 0.5))
    ).geometry
    assert geometry.spacing_mm == pytest.approx((2.0, 0.8, 0.7), rel=1e-9)


# Irregularities: corrected by default, rejected by policy "strict"


def layers(stacked: Stack) -> list[float]:
    """Return the layer index of each slice in the grid."""
    assert stacked.placement is not None
    assert stacked.placement.shift is None
    return [float(v) for v in stacked.placement.along]


def codes(stacked: Stack) -> list[str]:
    return [i.code for i in stacked.irregularities]


def test_a_missing_slice_is_reported_with_its_neighbours(tmp_path: Path) -> None:
    # Trap 4: a gap does not change the mean spacing silently.
    write_and_discover(tmp_path, slices=12)
    (tmp_path / "S1-0008.dcm").unlink()
    found = discover(tmp_path)[0]
    where = "1 missing in 5.000 mm between S1-0009.dcm and S1-0007.dcm"
    with pytest.raises(GeometryError, match=rf"strict rejects: {where}") as caught:
        stack(found, STRICT)
    assert caught.value.code == "gap"
    stacked = stack(found)
    assert stacked.geometry.shape == (12, 16, 20)
    assert stacked.geometry.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    assert layers(stacked) == pytest.approx([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11])
    assert codes(stacked) == ["gap"]
    assert where in stacked.irregularities[0].text


def test_more_than_ten_percent_missing_slices_are_rejected_by_default(tmp_path: Path) -> None:
    # Trap 4: 1 of 9 is 11 %.
    write_and_discover(tmp_path, slices=9)
    (tmp_path / "S1-0005.dcm").unlink()
    with pytest.raises(
        GeometryError,
        match=r"2\.500 mm apart \(median\).*5\.000 mm between S1-0006\.dcm and S1-0004\.dcm: 11% of all, more than 10%",
    ):
        stack(discover(tmp_path)[0])


def test_one_missing_slice_in_a_stack_of_three_is_detected() -> None:
    # Trap 4: the median of the two distances is equally far from both.
    found = axial_series([0, 2.5, 7.5])
    with pytest.raises(GeometryError, match=r"5\.000 mm between s1 and s2"):
        stack(found, STRICT)
    stacked = stack(found)
    spacing_mm = stacked.geometry.spacing_mm[0]
    assert [spacing_mm * layer for layer in layers(stacked)] == pytest.approx([0, 2.5, 7.5])


def with_repeated_image(folder: Path, change: Change | None = None) -> Series:
    """Write five slices and a copy of the fourth, S1-0001.dcm, to which `change` is applied."""

    def repeat_position(ds: Dataset, k: int) -> None:
        if k == 5:
            ds.ImagePositionPatient = [-100, -120, -300 + 3 * 2.5]
            ds.PixelData = (np.frombuffer(ds.PixelData, "<i2") - 200).astype("<i2").tobytes()
            if change:
                change(ds, k)

    return write_and_discover(folder, repeat_position, slices=6)


def test_a_duplicate_image_is_dropped_and_named(tmp_path: Path) -> None:
    # Trap 6.
    found = with_repeated_image(tmp_path)
    with pytest.raises(GeometryError, match=r"1 repeated image: S1-000[13]\.dcm") as caught:
        stack(found, STRICT)
    assert caught.value.code == "duplicate"
    stacked = stack(found)
    assert codes(stacked) == ["duplicate"]
    assert stacked.placement is None
    assert stacked.geometry.shape == (5, 16, 20)
    ((index, duplicate),) = stacked.duplicates
    assert index == 3
    assert {duplicate.name, stacked.slices[3].name} == {"S1-0001.dcm", "S1-0003.dcm"}
    assert read(found).stored[:, 0, 0].tolist() == [0, 100, 200, 300, 400]


def test_a_second_image_at_one_position_with_other_pixels_is_rejected(tmp_path: Path) -> None:
    # Trap 6: equal headers, one different pixel.
    def change(ds: Dataset, _: int) -> None:
        ds.PixelData = ds.PixelData[:-2] + b"\7\7"

    found = with_repeated_image(tmp_path, change)
    with pytest.raises(GeometryError, match=r"S1-0001\.dcm and S1-0003\.dcm share a position and differ") as caught:
        read(found)
    assert caught.value.code == "duplicate"


@pytest.mark.parametrize(
    "other",
    [
        {"acquisition_number": 2}, {"acquisition_time": "b"}, {"temporal_position": 2}, {"reconstruction": "b"},
        {"rescale_slope": 2.0}, {"rescale_intercept": 0.0}, {"signed": False}, {"bits_stored": 12},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_different_images_at_one_position_are_rejected_by_name(other: dict[str, Any]) -> None:
    # Trap 6: every position twice. Discovery splits such images only into regular stacks.
    found = axial_series([n // 2 * 2.5 for n in range(10)])
    slices = tuple(s._replace(**other) if n % 2 else s for n, s in enumerate(found.slices))
    with pytest.raises(
        GeometryError, match=r"share a position, 5 times, .*: s0 and s1 at 0\.00 mm, s2 and .* and 2 more"
    ) as caught:
        stack(replace(found, slices=slices))
    assert caught.value.code == "duplicate"


def test_a_distance_below_the_median_is_uneven() -> None:
    # Traps 5, 7: the first two slices do not determine the spacing.
    z_mm = [0, *(1 + 2.5 * n for n in range(6))]
    with pytest.raises(GeometryError) as caught:
        stack(axial_series(z_mm), STRICT)
    assert caught.value.code == "uneven"
    stacked = stack(axial_series(z_mm))
    assert codes(stacked) == ["uneven"]
    for text in (str(caught.value), stacked.irregularities[0].text):
        assert "2.500 mm apart (median)" in text
        assert "1.000 mm between s0 and s1" in text
        assert "s2" not in text
    spacing_mm = stacked.geometry.spacing_mm[0]
    assert [spacing_mm * layer for layer in layers(stacked)] == pytest.approx(z_mm)


def test_a_distance_of_twice_the_median_is_a_missing_slice() -> None:
    # Traps 4, 5, 7: 1 of 8 is more than a tenth.
    with pytest.raises(GeometryError) as caught:
        stack(axial_series([0, *(5 + 2.5 * n for n in range(6))]))
    text = str(caught.value)
    assert "2.500 mm apart (median)" in text
    assert "1 missing in 5.000 mm between s0 and s1" in text
    assert "s2" not in text


def test_a_second_regular_spacing_is_uneven_and_not_a_gap() -> None:
    # Trap 7: head CT, 2.5 mm below and 7.5 mm above.
    heights = [*(2.5 * n for n in range(8)), 25, 32.5, 40, 47.5]
    stacked = stack(axial_series(heights))
    assert codes(stacked) == ["uneven"]
    assert stacked.geometry.shape[0] == 20
    assert stacked.placement is not None
    assert stacked.placement.along * 2.5 == pytest.approx(heights)
    # Two equal distances in a row are not yet regular; distances that are too wide are rejected in any number.
    with pytest.raises(GeometryError, match=r"2 missing in 7\.500 mm between s7 and s8.*: 29% of all"):
        stack(axial_series(heights[:10]))
    with pytest.raises(GeometryError, match=r"4 missing in 12\.500 mm between s7 and s8.*more than 3 in a row"):
        stack(axial_series([*(2.5 * n for n in range(8)), 30, 42.5, 55]))


@pytest.mark.parametrize(
    ("step_mm", "error_mm", "accepted"),
    [(5.0, 0.04, True), (5.0, 0.08, False), (0.5, 0.009, True), (0.5, 0.03, False), (1.0, 1e-13, True)],
)
def test_position_errors_are_accepted_within_the_tolerance_only(
    step_mm: float, error_mm: float, accepted: bool
) -> None:
    # Trap 8: 1 % of the spacing, or 0.02 mm. One slice is displaced, which changes the distances before and after it.
    found = axial_series([step_mm * n + error_mm * (n == 4) for n in range(9)])
    assert stack(found).geometry.spacing_mm[0] == pytest.approx(step_mm)
    if accepted:
        assert stack(found, STRICT).placement is None
        assert stack(found).placement is None
        assert codes(stack(found)) == []
    else:
        with pytest.raises(GeometryError, match=r"between s3 and s4, .* between s4 and s5"):
            stack(found, STRICT)
        assert codes(stack(found)) == ["uneven"]
        assert layers(stack(found)) == pytest.approx([0, 1, 2, 3, 4 + error_mm / step_mm, 5, 6, 7, 8])


@pytest.mark.parametrize(
    ("rules", "accepted"),
    [
        (Rules(policy="strict", spacing_tolerance=0.02), True),
        (Rules(policy="strict", position_tolerance_mm=0.09), True),
        (Rules(policy="strict", spacing_tolerance=0.015), False),
    ],
)
def test_tolerances_are_taken_from_the_rules(rules: Rules, accepted: bool) -> None:
    # Trap 8: 0.08 mm of 5 mm are 1.6 %.
    found = axial_series([5.0 * n + 0.08 * (n == 4) for n in range(9)])
    if accepted:
        assert stack(found, rules).placement is None
    else:
        with pytest.raises(GeometryError, match=r"between s3 and s4, .* between s4 and s5"):
            stack(found, rules)


def test_spacing_errors_that_add_up_along_the_stack_are_detected() -> None:
    # Trap 7: 2.5 mm, then 2.52 mm. No distance deviates by 1 %, but an even grid would be off by 2 mm in the middle.
    z_mm = np.cumsum([0, *[2.5] * 200, *[2.52] * 200])
    with pytest.raises(GeometryError, match=r"s200 lies 2\.00 mm from its place in a grid of 2\.510 mm"):
        stack(axial_series(z_mm.tolist()), STRICT)
    stacked = stack(axial_series(z_mm.tolist()))
    assert codes(stacked) == ["uneven"]
    assert stacked.geometry.spacing_mm[0] == pytest.approx(2.51)
    assert layers(stacked) == pytest.approx(z_mm / 2.51)


@pytest.mark.parametrize("tilt_deg", [0.5, -4.5, 10.0, 25.0])
def test_a_gantry_tilt_is_measured_and_corrected(tmp_path: Path, tilt_deg: float) -> None:
    # Trap 11. The sign of Gantry/Detector Tilt is not reliable, so the attribute is not read.
    lean_mm = 2.5 * np.tan(np.radians(tilt_deg))

    def tilt(ds: Dataset, k: int) -> None:
        ds.GantryDetectorTilt = -tilt_deg
        ds.ImagePositionPatient = [-100, round(-120 + lean_mm * k, 6), -300 + 2.5 * k]

    found = write_and_discover(tmp_path, tilt, slices=10)
    with pytest.raises(GeometryError, match=rf"leans by {abs(tilt_deg):.2f}° \(gantry tilt\)") as caught:
        stack(found, STRICT)
    assert caught.value.code == "tilt"
    stacked = stack(found)
    assert codes(stacked) == ["tilt"]
    assert f"up to {9 * abs(lean_mm):.2f} mm beside the normal" in stacked.irregularities[0].text
    # The grid is orthogonal and contains every slice at its position.
    assert stacked.geometry.affine[:3, :3] == pytest.approx(np.array([[0, 0, 0.7], [0, 0.8, 0], [2.5, 0, 0]]))
    assert stacked.geometry.shape == (10, 16 + int(np.ceil(9 * abs(lean_mm) / 0.8)), 20)
    assert stacked.placement is not None
    assert stacked.placement.shift is not None
    for k, (row, column) in enumerate(stacked.placement.shift):
        expected = (-100, -120 + lean_mm * k, -300 + 2.5 * k)
        assert stacked.geometry.points_mm((k, row, column)) == pytest.approx(expected, abs=1e-5)


def test_the_gantry_tilt_attribute_is_ignored(tmp_path: Path) -> None:
    # Trap 11.
    def change(ds: Dataset, _: int) -> None:
        ds.GantryDetectorTilt = "15"

    assert stack(write_and_discover(tmp_path, change)).geometry.spacing_mm[0] == pytest.approx(2.5)


def test_a_slice_that_is_shifted_sideways_is_placed_correctly() -> None:
    found = series([(float(n == 3), 0, 2.5 * n) for n in range(6)])
    with pytest.raises(GeometryError, match=r"moved sideways: up to 1\.00 mm beside the normal") as caught:
        stack(found, STRICT)
    assert caught.value.code == "shift"
    stacked = stack(found)
    assert codes(stacked) == ["shift"]
    assert stacked.placement is not None
    assert stacked.placement.shift is not None
    assert stacked.placement.shift == pytest.approx(np.array([[0, 1 / 0.7 * (n == 3)] for n in range(6)]))
    assert stacked.geometry.shape == (6, 16, 22)


def test_slices_shifted_by_more_than_their_width_are_rejected() -> None:
    # 20 columns of 0.7 mm.
    with pytest.raises(GeometryError, match=r"up to 14\.1 mm beside each other, more than they are wide") as caught:
        stack(series([(14.1 * (n == 3), 0, 2.5 * n) for n in range(6)]))
    assert caught.value.code == "shift"


def test_small_sideways_shifts_are_accepted() -> None:
    # Trap 8.
    assert stack(series([(0.05 * (n % 2), 0, 2.5 * n) for n in range(6)])).geometry.spacing_mm[0] == pytest.approx(2.5)


def test_a_single_slice_is_rejected_by_name() -> None:
    with pytest.raises(GeometryError, match=r"one slice only \(s0\)"):
        stack(axial_series([0]))


def test_two_slices_form_a_stack() -> None:
    assert stack(axial_series([7.5, 0])).geometry.spacing_mm[0] == 7.5


@pytest.mark.parametrize(
    "orientation",
    [(1, 0, 0, 1, 0, 0), (1, 0, 0, 0.1, 0.995, 0), (1, 0, 0, 0, 0, 0), (2, 0, 0, 0, 1, 0), (0.9, 0, 0, 0, 0.9, 0)],
)
def test_directions_that_are_not_perpendicular_unit_vectors_are_rejected(orientation: tuple[float, ...]) -> None:
    with pytest.raises(GeometryError, match="not a pair of perpendicular unit vectors"):
        stack(series([(0, 0, 0), (0, 0, 1)], orientation=orientation))


REQUIRED = {
    "SeriesInstanceUID": (MissingTagError, "no Series Instance UID in"),
    "ImageOrientationPatient": (MissingTagError, r"Image Orientation \(Patient\) absent, unreadable or impossible in"),
    "ImagePositionPatient": (MissingTagError, r"Image Position \(Patient\) absent, unreadable or impossible in"),
    "PixelSpacing": (MissingTagError, "Pixel Spacing absent, unreadable or impossible in"),
    "Rows": (MissingTagError, "Rows and Columns absent, unreadable or impossible in"),
    "Columns": (MissingTagError, "Rows and Columns absent, unreadable or impossible in"),
    "BitsAllocated": (MissingTagError, "Bits Allocated absent, unreadable or impossible in"),
    # Without it, −2000 would be 63536, which is 62512 HU.
    "PixelRepresentation": (MissingTagError, "Pixel Representation absent, unreadable or impossible in"),
    "RescaleSlope": (MissingTagError, "Rescale Slope absent, unreadable or impossible in"),
    "RescaleIntercept": (MissingTagError, "Rescale Intercept absent, unreadable or impossible in"),
    "PixelData": (MissingTagError, "Pixel Data absent, unreadable or impossible in"),
    "PhotometricInterpretation": (IntensityError, "Photometric Interpretation not MONOCHROME2 or MONOCHROME1 in"),
}


def without(keyword: str, slices: set[int]) -> Change:
    def change(ds: Dataset, k: int) -> None:
        ds["PixelData"].VR = "OW"  # otherwise pydicom derives it from the attribute that is deleted
        if k in slices:
            delattr(ds, keyword)

    return change


@pytest.mark.parametrize("keyword", REQUIRED)
def test_a_required_attribute_missing_in_all_slices_is_named(tmp_path: Path, keyword: str) -> None:
    # Trap 41 for the rescale, trap 42 for the pixels.
    error, text = REQUIRED[keyword]
    with pytest.raises(error, match=rf"{text} S1-0001\.dcm, S1-0002\.dcm, S1-0003\.dcm and 2 more"):
        stack(write_and_discover(tmp_path, without(keyword, {0, 1, 2, 3, 4})))


@pytest.mark.parametrize("keyword", sorted(REQUIRED))
@pytest.mark.parametrize("which", [{4}, {1, 2, 3}], ids=["the last", "most"])
def test_a_required_attribute_missing_in_some_slices_rejects_the_series(
    tmp_path: Path, keyword: str, which: set[int]
) -> None:
    # Without the top slice, the rest would still be a regular stack.
    error, text = REQUIRED[keyword]
    stored = np.zeros((5, 16, 20), dtype=np.int16)
    write_series(tmp_path, stored, (2.5, 0.8, 0.7), change=without(keyword, which))
    cohort = discover(tmp_path)
    assert len(cohort) == (2 if keyword == "SeriesInstanceUID" else 1)
    incomplete = cohort[-1] if keyword != "SeriesInstanceUID" else next(s for s in cohort if not s.series_uid)
    with pytest.raises(error, match=text) as caught:
        stack(incomplete)
    named = {f"S1-{5 - k:04d}.dcm" for k in range(5) if f"S1-{5 - k:04d}.dcm" in str(caught.value)}
    # The attribute may be missing in most slices.
    assert named == {f"S1-{5 - k:04d}.dcm" for k in which} or len(which) == 3


@pytest.mark.parametrize("keyword", ["InstanceNumber", "SeriesNumber", "SliceThickness", "HighBit", "RescaleType"])
def test_an_attribute_that_is_not_required_may_be_absent(tmp_path: Path, keyword: str) -> None:
    stacked = stack(write_and_discover(tmp_path, without(keyword, {0, 1, 2, 3, 4})))
    assert stacked.geometry.spacing_mm == pytest.approx((2.5, 0.8, 0.7))


@pytest.mark.parametrize(
    ("keyword", "value", "text"),
    [
        ("PhotometricInterpretation", "YBR_FULL", "Photometric Interpretation not MONOCHROME2 or MONOCHROME1"),
        ("PhotometricInterpretation", "PALETTE COLOR", "Photometric Interpretation not MONOCHROME2 or MONOCHROME1"),
        ("RescaleType", "US", "Rescale Type not HU"),
        ("RescaleType", "OD", "Rescale Type not HU"),
        ("RescaleSlope", "0", "Rescale Slope 0"),
        ("BitsAllocated", 32, "Bits Allocated neither 8 nor 16"),
        ("BitsAllocated", 12, "Bits Allocated neither 8 nor 16"),
    ],
)
def test_values_that_are_not_hu_are_rejected_by_name(tmp_path: Path, keyword: str, value: Any, text: str) -> None:
    # Trap 41.
    def change(ds: Dataset, k: int) -> None:
        ds["PixelData"].VR = "OW"
        if k in (1, 2):
            setattr(ds, keyword, value)

    with pytest.raises(IntensityError, match=rf"{text} in S1-0003\.dcm, S1-0004\.dcm: the values cannot be called HU"):
        stack(write_and_discover(tmp_path, change))


def colour(slices: set[int]) -> Change:
    def change(ds: Dataset, k: int) -> None:
        ds["PixelData"].VR = "OW"
        if k in slices:
            ds.SamplesPerPixel = 3

    return change


def test_a_series_of_colour_images_is_rejected(tmp_path: Path) -> None:
    # Trap 41.
    with pytest.raises(IntensityError, match=r"several samples per pixel in S1-0001\.dcm, .* cannot be called HU"):
        stack(write_and_discover(tmp_path, colour({0, 1, 2, 3, 4})))


def test_colour_images_among_slices_are_left_out(tmp_path: Path) -> None:
    # Trap 10: dose sheets and screenshots.
    found = write_and_discover(tmp_path, colour({0, 4}))
    assert found.left_out == (("S1-0001.dcm", "colour"), ("S1-0005.dcm", "colour"))
    assert names(stack(found)) == ["S1-0004.dcm", "S1-0003.dcm", "S1-0002.dcm"]


@pytest.mark.parametrize("sop_class", ["1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"])
def test_a_multi_frame_image_without_frame_positions_is_rejected_by_name(tmp_path: Path, sop_class: str) -> None:
    def change(ds: Dataset, _: int) -> None:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID(sop_class)
        ds.NumberOfFrames = 7
        ds.PixelData = bytes(ds.PixelData) * 7
        del ds.ImagePositionPatient

    with pytest.raises(MissingTagError, match=r"multi-frame image of 7 frames \(S1-0001\.dcm frame 1\)") as caught:
        stack(write_and_discover(tmp_path, change, slices=1))
    assert caught.value.code == "multi-frame"


def test_frames_without_their_own_positions_reject_the_series(tmp_path: Path) -> None:
    # One position for seven frames: the volume must not consist of the first frame alone.
    def change(ds: Dataset, _: int) -> None:
        ds.NumberOfFrames = 7
        ds.PixelData = bytes(ds.PixelData) * 7

    with pytest.raises(InputError, match="7 frames"):
        stack(write_and_discover(tmp_path, change))


def test_messages_name_no_more_than_three_slices() -> None:
    found = axial_series([2.5 * n for n in range(9)])
    slices = tuple(s._replace(rescale_slope=None) for s in found.slices)
    with pytest.raises(MissingTagError, match=r"in s0, s1, s2 and 6 more$"):
        stack(replace(found, slices=slices))


def test_control_characters_of_names_are_escaped_in_messages() -> None:
    found = series([(0, 0, 0)])
    slices = (found.slices[0]._replace(path="/data/\x1b[31m\n\udce9"),)
    with pytest.raises(GeometryError, match=r"\(\\x1b\[31m\\n\\udce9\)"):
        stack(replace(found, slices=slices))


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("RescaleSlope", "1E30", "Rescale Slope absurd"),
        ("RescaleIntercept", "1E38", "Rescale Intercept absurd"),
        ("BitsStored", 99, "Bits Stored above Bits Allocated"),
        ("PixelRepresentation", 7, "Pixel Representation absent, unreadable or impossible"),
        ("PixelSpacing", ["400", "400"], "Pixel Spacing absent, unreadable or impossible"),
        ("ImagePositionPatient", ["0", "0", "1E30"], "Position \\(Patient\\) absent, unreadable or impossible"),
    ],
)
def test_implausible_numbers_are_rejected(tmp_path: Path, keyword: str, value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        stack(write_and_discover(tmp_path, lambda ds, _: setattr(ds, keyword, value), slices=4))
