"""Placing outlines and painted pixels on the slices of a series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import gpuprep
from gpuprep.core.geometry import Geometry
from gpuprep.core.mask_options import ReadingOptions
from gpuprep.dicom.stack import Stack, stack
from gpuprep.errors import SegmentationError
from gpuprep.masks.joined_files import joined
from gpuprep.masks.model import Contour, Raster, Segmentation, SliceKey, Structure, bounding_raster
from gpuprep.masks.place_on_slices import place
from gpuprep.masks.rasterize import filled, on_outline
from gpuprep.testing import write_series

MATRIX = (12, 15)
IN_ORDER = ReadingOptions(slice_order="stack", index_base=0)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    folder = tmp_path_factory.mktemp("ct")
    write_series(folder, np.zeros((4, *MATRIX), np.int16), (2.0, 1.0, 1.0))
    return stack(gpuprep.discover(folder)[0])


def segmentation(*structures: Structure, **fields: Any) -> Segmentation:
    return Segmentation(**({"path": "a", "format": "f", "why": "w", "structures": structures} | fields))


def on_slice(stacked: Stack, *structures: Structure, n: int = 1) -> NDArray[np.bool_]:
    placed, _ = place(segmentation(*structures), stacked, IN_ORDER)
    whole = np.zeros(MATRIX, dtype=bool)
    for one in placed:
        within, mask = one.paint(n, MATRIX)
        whole[within] |= mask
    return whole


coordinates = st.integers(-1 * 4, 15 * 4).map(lambda n: n / 4)
rows = st.integers(-1 * 4, 12 * 4).map(lambda n: n / 4)
outlines = st.lists(st.tuples(coordinates, rows), min_size=3, max_size=7).map(np.array)
KEY = SliceKey("number", 1)


@given(st.lists(outlines, min_size=1, max_size=3, unique_by=lambda points: points.tobytes()))
def test_a_structure_painted_in_a_rectangle_equals_one_painted_on_the_whole_slice(
    stacked: Stack, polygons: list[NDArray[np.float64]]
) -> None:
    structure = Structure("a", tuple(Contour(p, "pixel", KEY, "xor") for p in polygons))
    np.testing.assert_array_equal(on_slice(stacked, structure), filled(polygons, MATRIX))


@given(outlines.map(np.rint), outlines.map(np.rint))
def test_insides_and_holes_exclude_the_pixels_of_their_outlines(
    stacked: Stack, inside: NDArray[np.float64], hole: NDArray[np.float64]
) -> None:
    structure = Structure("a", (Contour(inside, "pixel", KEY, "inside"), Contour(hole, "pixel", KEY, "hole")))
    expected = filled([inside], MATRIX) & ~on_outline(inside, MATRIX)
    expected &= ~(filled([hole], MATRIX) | on_outline(hole, MATRIX))
    np.testing.assert_array_equal(on_slice(stacked, structure), expected)


@given(st.integers(0, 2**32), st.integers(-4, 4), st.integers(-4, 4), st.booleans(), st.booleans())
def test_a_painted_plane_is_placed_by_its_position_and_orientation(
    stacked: Stack, seed: int, down: int, right: int, flipped: bool, turned: bool
) -> None:
    # A plane of another size, shifted by whole pixels, perhaps flipped or transposed.
    values = np.random.default_rng(seed).random((9, 10)) < 0.3
    affine = stacked.geometry.affine.copy()
    affine[:3, 3] = stacked.geometry.points_mm((1, down, right))
    expected = np.zeros((40, 40), bool)
    shown = values
    if flipped:
        affine[:3, 3] += affine[:3, 1] * 8
        affine[:3, 1] *= -1
        shown = shown[::-1]
    if turned:
        affine[:3, 3] = stacked.geometry.points_mm((1, down, right))
        affine[:3, :3] = stacked.geometry.affine[:3, [0, 2, 1]]
        shown = values.T
    expected[10 + down : 10 + down + shown.shape[0], 10 + right : 10 + right + shown.shape[1]] = shown
    raster = bounding_raster(values, geometry=Geometry((1, 9, 10), affine))
    structure = Structure("a", rasters=(raster,) if raster else ())
    np.testing.assert_array_equal(on_slice(stacked, structure), expected[10 : 10 + MATRIX[0], 10 : 10 + MATRIX[1]])


def test_a_repeated_outline_counts_once(stacked: Stack) -> None:
    square = np.array([(2.5, 2.5), (6.5, 2.5), (6.5, 6.5), (2.5, 6.5)])
    twice = Structure("a", (Contour(square, "pixel", KEY), Contour(square.copy(), "pixel", KEY)))
    assert on_slice(stacked, twice).sum() == 16
    _, notes = place(segmentation(twice), stacked, IN_ORDER)
    assert notes == ["a: 1 outline left out: the same as another, point by point"]


def test_a_contour_half_way_between_slices_lies_on_the_lower_one(stacked: Stack) -> None:
    square = np.array([(2.5, 2.5), (6.5, 2.5), (6.5, 6.5), (2.5, 6.5)])
    for off in (-1e-4, 0, 1e-4):
        contours = []
        for k in (0, 1, 2):
            points = np.column_stack([np.full(4, k + 0.5 + off), square[:, ::-1]])
            contours.append(Contour(stacked.geometry.points_mm(points), "patient"))
        (placed,), notes = place(segmentation(Structure("a", tuple(contours))), stacked, IN_ORDER)
        assert sorted(placed.parts) == [0, 1, 2]
        assert notes == []


def test_a_raster_of_another_matrix_is_refused_with_both_sizes(stacked: Stack) -> None:
    raster = Raster(np.ones((1, 1), bool), 0, 0, (512, 512), KEY)
    with pytest.raises(SegmentationError, match="it has 512 × 512 pixels, the slices of the series have 12 × 15"):
        place(segmentation(Structure("a", rasters=(raster,))), stacked, IN_ORDER)


def test_mm_from_the_image_corner_are_converted_to_pixels(tmp_path: Path) -> None:
    write_series(tmp_path, np.zeros((4, *MATRIX), np.int16), (2.0, 0.703125, 0.351562))
    stacked = stack(gpuprep.discover(tmp_path)[0])
    px = np.array([(2.0, 3.0), (6.0, 3.0), (6.0, 8.0), (2.0, 8.0)])
    mm = np.round(px * (0.351562, 0.703125), 4)
    mask = on_slice(stacked, Structure("a", (Contour(mm, "corner", KEY),)))
    expected = np.zeros(MATRIX, bool)
    expected[3:8, 2:6] = True
    np.testing.assert_array_equal(mask, expected)


def test_contours_far_outside_of_the_slice_are_refused(stacked: Stack) -> None:
    contour = Contour(np.array([(40.0, 3.0), (60.0, 3.0), (60.0, 8.0)]), "pixel", KEY)
    message = r"from column 40, row 3 to 60, 8, but slices have 15 columns and 12 rows"
    with pytest.raises(SegmentationError, match=message):
        place(segmentation(Structure("a", (contour,))), stacked, IN_ORDER)


def test_a_file_that_names_no_slice_is_refused(stacked: Stack) -> None:
    contour = Contour(np.array([(1.0, 3.0), (6.0, 3.0), (6.0, 8.0)]), "pixel")
    with pytest.raises(SegmentationError, match=r"--slice-from name\|column\|z\|uid"):
        place(segmentation(Structure("a", (contour,))), stacked, IN_ORDER)


def test_files_with_one_slice_each_are_joined_by_folder() -> None:
    def one(path: str, n: int, name: str) -> Segmentation:
        contour = Contour(np.zeros((3, 2)), "pixel", SliceKey("number", n))
        return segmentation(Structure(name, (contour,)), path=path, per_slice=True)

    files = [one("/a/x1.txt", 1, "x"), one("/a/x2.txt", 2, "x"), one("/a/y2.txt", 2, "y"), one("/b/x1.txt", 1, "x")]
    whole = segmentation(Structure("z"), path="/a/rs.dcm")
    found = {s.path: {t.name: len(t.contours) for t in s.structures} for s in joined([*files, whole])}
    assert found == {"/a": {"x": 2, "y": 1}, "/b/x1.txt": {"x": 1}, "/a/rs.dcm": {"z": 0}}
