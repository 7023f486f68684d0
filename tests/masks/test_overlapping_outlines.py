"""Outlines of one structure on one slice that are nested, overlap in part, or are stored twice.

Expected values are counted by hand, or follow from comparing the corners of rectangles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuprep.masks.overlapping_outlines import OutlineGroups, grouped
from gpuprep.masks.rasterize import filled, filled_union

SHAPE = (40, 44)

Box = tuple[float, float, float, float]


def box(left: float, top: float, right: float, bottom: float) -> NDArray[np.float64]:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=float)


def disc(x: float, y: float, radius: float, points: int = 60) -> NDArray[np.float64]:
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.array([x, y]) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def mask(polygons: list[NDArray[np.float64]]) -> NDArray[np.bool_]:
    found = grouped(polygons, SHAPE)
    painted = filled(found.alone, SHAPE)
    for group in found.united:
        painted ^= filled_union(group, SHAPE)
    return painted


def counts(found: OutlineGroups) -> tuple[int, list[int], int, int]:
    """Return the counts of separate outlines, of outlines in each united group, of repeated ones and of holes."""
    return len(found.alone), sorted(map(len, found.united)), found.repeated, found.holes


def inside(polygon: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the pixels inside an outline by casting a ray from every centre; no centre may lie on the outline."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    found = np.zeros(SHAPE, dtype=bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 != y1:
            found ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return found


class TestCombinations:
    def test_two_outlines_that_overlap_in_part_are_one_area(self) -> None:
        found = [box(10.3, 10.3, 20.3, 20.3), box(15.3, 15.3, 25.3, 25.3)]
        assert mask(found).sum() == 175
        assert counts(grouped(found, SHAPE)) == (0, [2], 0, 0)

    def test_two_crossing_bars_are_one_area_although_no_corner_lies_inside(self) -> None:
        found = [box(4.5, 14.5, 34.5, 18.5), box(16.5, 2.5, 22.5, 36.5)]
        assert mask(found).sum() == 30 * 4 + 6 * 34 - 6 * 4
        assert counts(grouped(found, SHAPE)) == (0, [2], 0, 0)

    def test_a_chain_of_overlapping_discs_is_one_area(self) -> None:
        found = [disc(8 + 5 * n, 20.3, 4.2) for n in range(6)]
        expected = np.any([inside(p) for p in found], axis=0)
        np.testing.assert_array_equal(mask(found), expected)
        assert counts(grouped(found, SHAPE)) == (0, [6], 0, 0)

    def test_a_nested_outline_is_a_hole_and_one_in_the_hole_an_island(self) -> None:
        found = [box(2.5, 2.5, 32.5, 32.5), box(7.5, 7.5, 27.5, 27.5), box(12.5, 12.5, 22.5, 22.5)]
        assert mask(found).sum() == 900 - 400 + 100
        assert counts(grouped(found, SHAPE)) == (3, [], 0, 1)  # one hole; the island is no hole

    def test_a_hole_may_share_an_edge_with_the_outline_around_it(self) -> None:
        found = [box(2.5, 2.5, 32.5, 32.5), box(2.5, 7.5, 12.5, 27.5)]
        assert mask(found).sum() == 900 - 200
        assert counts(grouped(found, SHAPE)) == (2, [], 0, 1)

    @pytest.mark.parametrize("off", [-0.2, -0.01, 0.01, 0.2])
    def test_a_hole_that_crosses_the_outer_outline_by_rounding_stays_a_hole(self, off: float) -> None:
        found = [box(2.45, 2.45, 32.45, 32.45), box(2.45 + off, 7.5, 12.5, 27.5)]
        np.testing.assert_array_equal(mask(found), inside(found[0]) & ~inside(found[1]))

    @pytest.mark.parametrize("off", [-0.4, -3.0])
    def test_an_outline_that_crosses_further_is_united(self, off: float) -> None:
        found = [box(2.45, 2.45, 32.45, 32.45), box(2.45 + off, 7.5, 12.5, 27.5)]
        np.testing.assert_array_equal(mask(found), inside(found[0]) | inside(found[1]))

    def test_an_outline_inside_two_united_ones_is_a_hole(self) -> None:
        found = [box(2.5, 2.5, 20.5, 32.5), box(16.5, 2.5, 36.5, 32.5), box(5.5, 5.5, 10.5, 10.5)]
        assert mask(found).sum() == 34 * 30 - 25
        assert counts(grouped(found, SHAPE)) == (1, [2], 0, 1)
        found[2] = box(17.5, 5.5, 19.5, 10.5)  # in the overlap of the two
        assert mask(found).sum() == 34 * 30 - 10
        assert counts(grouped(found, SHAPE)) == (1, [2], 0, 1)

    def test_a_keyhole_is_a_hole_in_which_islands_may_lie(self) -> None:
        outer, inner = box(2.5, 2.5, 32.5, 32.5), box(7.5, 7.5, 27.5, 27.5)[::-1]
        keyhole = np.concatenate([outer, outer[:1], inner, inner[:1]])
        assert mask([keyhole]).sum() == 900 - 400
        assert mask([keyhole, box(12.5, 12.5, 22.5, 22.5)]).sum() == 900 - 400 + 100
        assert mask([keyhole, box(3.5, 3.5, 5.5, 5.5)]).sum() == 900 - 400 - 4

    def test_touching_outlines_are_both_filled(self) -> None:
        found = [box(2.5, 2.5, 12.5, 12.5), box(12.5, 2.5, 20.5, 12.5), box(12.5, 12.5, 15.5, 15.5)]
        assert mask(found).sum() == 100 + 80 + 9
        found = [box(2.5, 2.5, 12.51, 12.5), box(12.49, 2.5, 20.5, 12.5)]
        assert mask(found).sum() == 100 + 80

    def test_outlines_that_overlap_by_less_than_a_pixel_are_both_filled(self) -> None:
        for found in ([box(2, 2, 12.2, 12), box(11.8, 3, 20, 9)], [box(2, 2, 12, 12.2), box(3, 11.8, 9, 20)]):
            np.testing.assert_array_equal(mask(found), filled(found[:1], SHAPE) | filled(found[1:], SHAPE), strict=True)


class TestRepeats:
    @pytest.mark.parametrize("start", [0, 1, 17])
    @pytest.mark.parametrize("backwards", [False, True])
    @pytest.mark.parametrize("closed", [False, True])
    def test_the_same_outline_counts_once(self, start: int, backwards: bool, closed: bool) -> None:
        first = disc(20.3, 18.7, 9.1)
        again = np.roll(first, -start, axis=0)
        again = again[::-1] if backwards else again
        again = np.concatenate([again, again[:1]]) if closed else again
        np.testing.assert_array_equal(mask([first, again]), inside(first))
        assert counts(grouped([first, again], SHAPE)) == (1, [], 1, 0)
        assert counts(grouped([first, again, first], SHAPE)) == (1, [], 2, 0)

    def test_a_rounded_copy_of_an_outline_is_no_hole_in_it(self) -> None:
        first = disc(20.3, 18.7, 9.1)
        rounded = np.round(first, 1)
        np.testing.assert_array_equal(mask([first, rounded]), inside(first) | inside(rounded))

    def test_a_ring_stored_twice_is_a_ring(self) -> None:
        ring = [box(2.5, 2.5, 32.5, 32.5), box(7.5, 7.5, 27.5, 27.5)]
        found = [*ring, *(np.roll(p, 1, axis=0)[::-1] for p in ring)]
        assert mask(found).sum() == 900 - 400
        assert counts(grouped(found, SHAPE)) == (2, [], 2, 1)

    def test_the_same_points_in_another_order_are_another_outline(self) -> None:
        square = box(4.5, 4.5, 24.5, 24.5)
        bow = square[[0, 2, 1, 3]]
        np.testing.assert_array_equal(mask([square, bow]), filled([square], SHAPE) & ~filled([bow], SHAPE))
        assert counts(grouped([square, bow], SHAPE)) == (2, [], 0, 1)


corner = st.integers(0, 18)
boxes = st.tuples(corner, corner, st.integers(1, 18), st.integers(1, 18)).map(
    lambda v: (v[0] + 0.5, v[1] + 0.5, v[0] + v[2] + 0.5, v[1] + v[3] + 0.5)
)


def by_corners(found: list[Box]) -> NDArray[np.bool_]:
    """Return the expected mask of rectangles with corners between pixels."""
    once = list(dict.fromkeys(found))
    group = list(range(len(once)))
    for n, a in enumerate(once):
        for m, b in enumerate(once[:n]):
            overlap = a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
            if overlap and not _contains(a, b) and not _contains(b, a):
                group = [group[m] if number == group[n] else number for number in group]
    painted = np.zeros(SHAPE, dtype=bool)
    for number in set(group):
        area = np.zeros(SHAPE, dtype=bool)
        for n, (left, top, right, bottom) in enumerate(once):
            if group[n] == number:
                area[int(top + 0.5) : int(bottom + 0.5), int(left + 0.5) : int(right + 0.5)] = True
        painted ^= area
    return painted


def _contains(a: Box, b: Box) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2] and a[3] >= b[3]


@given(st.lists(boxes, min_size=1, max_size=7))
def test_random_rectangles_combine_as_expected_from_their_corners(found: list[Box]) -> None:
    np.testing.assert_array_equal(mask([box(*b) for b in found]), by_corners(found))


@given(st.lists(boxes, min_size=1, max_size=6), st.permutations(range(6)))
def test_the_order_of_outlines_and_axes_does_not_matter(found: list[Box], order: Any) -> None:
    polygons = [box(*b) for b in found]
    expected = mask(polygons)
    np.testing.assert_array_equal(mask([polygons[n] for n in order if n < len(polygons)]), expected)
    turned = mask([p[:, ::-1] for p in polygons])
    np.testing.assert_array_equal(turned[:36, :36].T, expected[:36, :36])


@given(st.lists(boxes, min_size=0, max_size=5))
def test_the_union_contains_every_pixel_inside_any_outline(found: list[Box]) -> None:
    polygons = [box(*b) for b in found]
    expected = np.zeros(SHAPE, dtype=bool)
    for polygon in polygons:
        expected |= inside(polygon)
    np.testing.assert_array_equal(filled_union(polygons, SHAPE), expected)


def test_separate_outlines_are_unchanged() -> None:
    found = [disc(6 + 10 * x, 6 + 10 * y, 4) for x in range(4) for y in range(3)]
    arrangement = grouped(found, SHAPE)
    assert all(a is b for a, b in zip(arrangement.alone, found, strict=True))
    assert counts(arrangement) == (12, [], 0, 0)


def test_outlines_may_extend_beyond_the_slice() -> None:
    found = [box(-50.5, -20.5, 30.5, 60.5), box(-40.5, 4.5, 20.5, 24.5), box(20.5, -9.5, 90.5, 10.5)]
    expected = (inside(found[0]) | inside(found[2])) & ~inside(found[1])
    np.testing.assert_array_equal(mask(found), expected)


@pytest.mark.parametrize("count", [2, 40])
def test_many_edges_are_compared_in_chunks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("gpuprep.masks.overlapping_outlines.MOST_AT_ONCE", 100)
    found = [disc(15.3, 20.3, 9, count + 60), disc(24.3, 20.3, 9, count + 50)]
    np.testing.assert_array_equal(mask(found), inside(found[0]) | inside(found[1]))
