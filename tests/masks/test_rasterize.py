"""Rasterizing outlines; expected pixels are counted by hand, by formulas for areas, or by a test of each centre."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuprep.masks.rasterize import filled, on_outline

Points = list[tuple[float, float]]


def polygon(points: Points) -> NDArray[np.float64]:
    return np.array(points, dtype=np.float64)


def square(low: float, high: float) -> NDArray[np.float64]:
    return polygon([(low, low), (high, low), (high, high), (low, high)])


def inside(point: tuple[int, int], polygons: list[Points]) -> bool:
    """Return whether a ray to the left from slightly left of and above a centre crosses an odd number of edges.

    Coordinates are exact fractions.
    """
    x, y = point
    crossed = 0
    for points in polygons:
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if (y0 < y) != (y1 < y):  # an end at the height of the centre lies below the ray
                at = Fraction(x0) + Fraction(y - Fraction(y0)) * (Fraction(x1) - Fraction(x0)) / (
                    Fraction(y1) - Fraction(y0)
                )
                crossed += at < x
    return crossed % 2 == 1


def filled_pixel_by_pixel(polygons: list[Points], shape: tuple[int, int]) -> NDArray[np.bool_]:
    return np.array([[inside((c, r), polygons) for c in range(shape[1])] for r in range(shape[0])])


coordinates = st.integers(-2 * 8, 10 * 8).map(lambda n: n / 8)
outlines = st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=9)


@given(st.lists(outlines, min_size=1, max_size=3))
def test_filled_pixels_are_those_whose_centres_are_inside(polygons: list[Points]) -> None:
    shape = (7, 9)
    np.testing.assert_array_equal(filled([polygon(p) for p in polygons], shape), filled_pixel_by_pixel(polygons, shape))


@given(outlines, coordinates, coordinates)
def test_areas_that_share_an_edge_share_no_pixel_and_leave_none_out(points: Points, x: float, y: float) -> None:
    # A fan of triangles from any point to the edges of a polygon combines to the polygon by parity.
    shape = (8, 10)
    fan = [polygon([(x, y), a, b]) for a, b in zip(points, points[1:] + points[:1], strict=True)]
    parity = np.zeros(shape, dtype=bool)
    for triangle in fan:
        parity ^= filled([triangle], shape)
    np.testing.assert_array_equal(parity, filled([polygon(points)], shape))


@given(outlines, st.integers(0, 8), st.booleans(), st.booleans())
def test_start_and_direction_of_an_outline_make_no_difference(
    points: Points, start: int, backwards: bool, closed: bool
) -> None:
    expected = filled([polygon(points)], (8, 10))
    start %= len(points)
    other = points[start:] + points[:start]
    other = other[::-1] if backwards else other
    np.testing.assert_array_equal(filled([polygon(other + other[:1] * closed)], (8, 10)), expected)


@given(outlines, st.integers(0, 5), st.integers(0, 5))
def test_moving_an_outline_by_whole_pixels_moves_its_pixels(points: Points, right: int, down: int) -> None:
    here = filled([polygon(points) + 4], (20, 20))
    there = filled([polygon(points) + 4 + np.array([right, down])], (25, 25))
    np.testing.assert_array_equal(there[down : down + 20, right : right + 20], here)


def test_a_square_between_centres_contains_the_pixels_within() -> None:
    mask = filled([square(1.5, 4.5)], (8, 8))
    assert {tuple(p) for p in np.argwhere(mask).tolist()} == {(r, c) for r in (2, 3, 4) for c in (2, 3, 4)}


def test_a_square_through_centres_includes_only_its_right_and_lower_edges() -> None:
    # A side of 3 pixels contains 3 pixels anywhere, so the area is kept: no "+ 3.4 % on a cube of 60 mm" (trap 39).
    mask = filled([square(1, 4)], (8, 8))
    assert {tuple(p) for p in np.argwhere(mask).tolist()} == {(r, c) for r in (2, 3, 4) for c in (2, 3, 4)}


def test_noise_far_below_a_pixel_does_not_change_a_square_through_centres() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        noisy = square(1, 4) + rng.uniform(-3e-5, 3e-5, (4, 2))
        np.testing.assert_array_equal(filled([noisy], (8, 8)), filled([square(1, 4)], (8, 8)))


def test_a_nested_outline_is_a_hole_and_one_in_the_hole_an_island() -> None:
    mask = filled([square(0.5, 9.5), square(2.5, 7.5), square(4.5, 5.5)], (11, 11))
    assert mask.sum() == 81 - 25 + 1
    assert mask[1, 1]
    assert not mask[3, 3]
    assert mask[5, 5]


def test_a_keyhole_is_a_hole() -> None:
    outer = [(0.5, 0.5), (9.5, 0.5), (9.5, 9.5), (0.5, 9.5)]
    inner = [(2.5, 2.5), (2.5, 7.5), (7.5, 7.5), (7.5, 2.5)]
    keyhole = polygon([*outer, outer[0], *inner, inner[0]])  # in and out along one line
    np.testing.assert_array_equal(filled([keyhole], (11, 11)), filled([polygon(outer), polygon(inner)], (11, 11)))


def test_an_outline_that_crosses_itself_is_filled_by_parity() -> None:
    # The middle of a pentagram is enclosed twice, and so lies outside.
    angles = np.pi / 2 + np.arange(5) * 4 * np.pi / 5
    star = 20 + 15 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = filled([star], (41, 41))
    assert not mask[20, 20]
    assert mask[33, 20]


def test_outlines_are_cut_off_at_the_edges_of_the_slice() -> None:
    mask = filled([polygon([(-1e6, -1e6), (1e6, -1e6), (1e6, 2.5), (-1e6, 2.5)])], (5, 7))
    np.testing.assert_array_equal(np.flatnonzero(mask.any(axis=1)), [0, 1, 2])
    assert mask[:3].all()
    assert not filled([square(7.5, 9)], (5, 7)).any()
    assert not filled([square(-9, -0.5)], (5, 7)).any()


@pytest.mark.parametrize("radius", [10.0, 30.0])
def test_a_disc_has_the_area_of_its_formula(radius: float) -> None:
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    for centre in ((40.1, 40.2), (40.3, 40.7), (40.55, 40.45)):
        disc = np.array(centre) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        # Pixels on the border are inside or outside by chance, so their errors cancel to under a tenth of its length.
        assert abs(filled([disc], (81, 81)).sum() - np.pi * radius**2) < 0.1 * 2 * np.pi * radius


def test_empty_and_degenerate_outlines_contain_no_pixel() -> None:
    assert not filled([], (3, 3)).any()
    assert not filled([polygon([(1, 1), (1, 1), (1, 1)])], (3, 3)).any()
    assert not filled([polygon([(0.2, 1.2), (2.2, 1.2), (1.2, 1.2)])], (3, 3)).any()


def test_pixels_on_an_outline_are_those_whose_centres_it_passes() -> None:
    mask = on_outline(polygon([(1, 1), (4, 1), (4, 3)]), (5, 6))
    # The slanting edge from (4, 3) to (1, 1) passes no centre in between.
    assert {tuple(p) for p in np.argwhere(mask).tolist()} == {(1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (3, 4)}
    slanted = on_outline(polygon([(0, 0), (4, 2), (0, 4)]), (5, 5))
    assert {(1, 2), (3, 2), (2, 0)} <= {tuple(p) for p in np.argwhere(slanted).tolist()}
    assert on_outline(polygon([(-3, 0), (3, 0), (3, 9)]), (2, 2)).sum() == 2
