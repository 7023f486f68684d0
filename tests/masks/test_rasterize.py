"""Outlines to pixels: by counting on the fingers, by formulas for areas, and by a rule written out pixel by pixel."""

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
    """Cast a ray to the left from a hair left of and above a centre, in exact arithmetic; count what it crosses."""
    x, y = point
    crossed = 0
    for points in polygons:
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if (y0 < y) != (y1 < y):  # ends at the height of the centre lie below the hair
                at = Fraction(x0) + Fraction(y - Fraction(y0)) * (Fraction(x1) - Fraction(x0)) / (
                    Fraction(y1) - Fraction(y0)
                )
                crossed += at < x
    return crossed % 2 == 1


def brute(polygons: list[Points], shape: tuple[int, int]) -> NDArray[np.bool_]:
    return np.array([[inside((c, r), polygons) for c in range(shape[1])] for r in range(shape[0])])


coordinates = st.integers(-2 * 8, 10 * 8).map(lambda n: n / 8)
outlines = st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=9)


@given(st.lists(outlines, min_size=1, max_size=3))
def test_a_pixel_is_inside_by_the_rule_written_out(polygons: list[Points]) -> None:
    shape = (7, 9)
    np.testing.assert_array_equal(filled([polygon(p) for p in polygons], shape), brute(polygons, shape))


@given(outlines, coordinates, coordinates)
def test_areas_that_share_an_edge_share_no_pixel_and_leave_none_out(points: Points, x: float, y: float) -> None:
    # A fan of triangles from any point to the edges of a polygon: by parity they are the polygon.
    shape = (8, 10)
    fan = [polygon([(x, y), a, b]) for a, b in zip(points, points[1:] + points[:1], strict=True)]
    parity = np.zeros(shape, dtype=bool)
    for triangle in fan:
        parity ^= filled([triangle], shape)
    np.testing.assert_array_equal(parity, filled([polygon(points)], shape))


@given(outlines, st.integers(0, 8), st.booleans(), st.booleans())
def test_where_an_outline_begins_and_which_way_it_runs_makes_no_difference(
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


def test_a_square_between_centres_holds_the_pixels_within() -> None:
    mask = filled([square(1.5, 4.5)], (8, 8))
    assert {tuple(p) for p in np.argwhere(mask).tolist()} == {(r, c) for r in (2, 3, 4) for c in (2, 3, 4)}


def test_a_square_through_centres_holds_those_on_its_right_and_lower_sides_only() -> None:
    # A side of 3 pixels holds 3, wherever it lies, so that the area is kept: no "+ 3.4 % on a cube of 60 mm" (trap 39).
    mask = filled([square(1, 4)], (8, 8))
    assert {tuple(p) for p in np.argwhere(mask).tolist()} == {(r, c) for r in (2, 3, 4) for c in (2, 3, 4)}


def test_noise_far_below_a_pixel_does_not_move_what_was_drawn_through_centres() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        noisy = square(1, 4) + rng.uniform(-3e-5, 3e-5, (4, 2))
        np.testing.assert_array_equal(filled([noisy], (8, 8)), filled([square(1, 4)], (8, 8)))


def test_a_hole_and_an_island_in_it() -> None:
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


def test_an_outline_that_crosses_itself_is_taken_by_parity() -> None:
    # A pentagram: its middle is surrounded twice, and so outside.
    angles = np.pi / 2 + np.arange(5) * 4 * np.pi / 5
    star = 20 + 15 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = filled([star], (41, 41))
    assert not mask[20, 20]
    assert mask[33, 20]


def test_what_lies_outside_of_the_slice_is_cut_off() -> None:
    mask = filled([polygon([(-1e6, -1e6), (1e6, -1e6), (1e6, 2.5), (-1e6, 2.5)])], (5, 7))
    np.testing.assert_array_equal(np.flatnonzero(mask.any(axis=1)), [0, 1, 2])
    assert mask[:3].all()
    assert not filled([square(7.5, 9)], (5, 7)).any()
    assert not filled([square(-9, -0.5)], (5, 7)).any()


@pytest.mark.parametrize("radius", [10.0, 30.0])
def test_the_area_of_a_disc(radius: float) -> None:
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    for centre in ((40.1, 40.2), (40.3, 40.7), (40.55, 40.45)):
        disc = np.array(centre) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        # Pixels on the border are in or out by chance: of its length, a tenth and more would be no chance.
        assert abs(filled([disc], (81, 81)).sum() - np.pi * radius**2) < 0.1 * 2 * np.pi * radius


def test_no_outline_no_pixel() -> None:
    assert not filled([], (3, 3)).any()
    assert not filled([polygon([(1, 1), (1, 1), (1, 1)])], (3, 3)).any()
    assert not filled([polygon([(0.2, 1.2), (2.2, 1.2), (1.2, 1.2)])], (3, 3)).any()


def test_the_pixels_of_an_outline() -> None:
    mask = on_outline(polygon([(1, 1), (4, 1), (4, 3)]), (5, 6))
    # The slanting edge from (4, 3) to (1, 1) passes no centre in between.
    assert {tuple(p) for p in np.argwhere(mask).tolist()} == {(1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (3, 4)}
    slanted = on_outline(polygon([(0, 0), (4, 2), (0, 4)]), (5, 5))
    assert {(1, 2), (3, 2), (2, 0)} <= {tuple(p) for p in np.argwhere(slanted).tolist()}
    assert on_outline(polygon([(-3, 0), (3, 0), (3, 9)]), (2, 2)).sum() == 2
