"""Boxes of body and lungs, compared with the extents of the voxels that phantoms were painted with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from gpuprep.compute.coarse_hu import coarse_hu
from gpuprep.compute.crop_box import FoundBox, find_box
from gpuprep.core.geometry import Geometry, Placement
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.volume import StoredVolume

Mask = NDArray[np.bool_]
SOFT, LUNG, CARBON, FOAM = 40, -850, 100, -950
AXIAL = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=float)
"""Directions of slices, rows and columns, as columns (x, y, z)."""


class Scene:
    """A phantom, painted in mm from the middle of a field of view; z is along slices, y along rows, x along columns.

    `body` holds what was painted as body, and `lungs` what was painted as lung.
    """

    def __init__(
        self, shape: tuple[int, int, int] = (16, 240, 256), spacing_mm: Sequence[float] = (3, 1.5, 1.5)
    ) -> None:
        self.hu = np.full(shape, -1000.0)
        self.body, self.lungs = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        self.spacing_mm = tuple(float(s) for s in spacing_mm)
        self.z, self.y, self.x = np.meshgrid(
            *((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=True)),
            indexing="ij", sparse=True,
        )  # fmt: skip

    def cylinder(self, y: float, x: float, ry: float, rx: float) -> Mask:
        """Return an ellipse with half axes `ry` and `rx` in all slices."""
        return self.ellipsoid(0, y, x, np.inf, ry, rx)

    def ellipsoid(self, z: float, y: float, x: float, rz: float, ry: float, rx: float) -> Mask:
        inside: Mask = ((self.z - z) / rz) ** 2 + ((self.y - y) / ry) ** 2 + ((self.x - x) / rx) ** 2 <= 1
        return np.broadcast_to(inside, self.hu.shape)

    def slab(self, y0: float, y1: float, x0: float = -np.inf, x1: float = np.inf) -> Mask:
        inside: Mask = (self.y >= y0) & (self.y < y1) & (self.x >= x0) & (self.x < x1)
        return np.broadcast_to(inside, self.hu.shape)

    def add_body(self, mask: Mask, hu: float = SOFT) -> None:
        self.hu[mask] = hu
        self.body |= mask

    def add_lung(self, mask: Mask, hu: float = LUNG) -> None:
        self.hu[mask] = hu
        self.lungs |= mask

    def add_behind(self, mask: Mask, hu: float) -> None:
        """Paint what is not body where there is no body."""
        self.hu[mask & ~self.body] = hu

    def noise(self, sd_hu: float = 20, seed: int = 0) -> None:
        self.hu += np.random.default_rng(seed).normal(0, sd_hu, self.hu.shape)

    def volume(
        self,
        directions: NDArray[np.float64] = AXIAL,
        *,
        intercept: float = -1024,
        padding: NDArray[Any] | None = None,
        placement: Placement | None = None,
        grid_shape: tuple[int, int, int] | None = None,
    ) -> StoredVolume:
        affine = np.eye(4)
        affine[:3, :3] = directions * self.spacing_mm
        count = len(self.hu)
        return StoredVolume(
            np.round(self.hu - intercept).astype(np.int16), np.ones(count), np.full(count, float(intercept)),
            padding, Geometry(grid_shape or self.hu.shape, affine), HuStatistics(), placement=placement,
        )  # fmt: skip


def found(volume: StoredVolume, kind: Any = "body") -> FoundBox:
    return find_box(volume, coarse_hu(volume), kind)


def codes(result: FoundBox) -> list[str]:
    return [w.code for w in result.warnings]


def extent(mask: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and the last index of a mask along each axis."""
    inside = np.argwhere(mask)
    return inside.min(axis=0), inside.max(axis=0)


def assert_around(result: FoundBox, mask: Mask, pixels: int = 1) -> None:
    """Assert that a box holds all of a mask, and is at most some pixels larger on each side."""
    assert result.box is not None, result.warnings
    first, last = extent(mask)
    assert_faces(result, first, last, pixels)


def assert_faces(result: FoundBox, first: NDArray[Any], last: NDArray[Any], pixels: int = 1) -> None:
    assert result.box is not None, result.warnings
    low, high = first - result.box.start, np.array(result.box.stop) - 1 - last
    message = f"box {result.box}, object from {first} to {last}"
    assert (low >= 0).all(), message
    assert (high >= 0).all(), message
    assert (low <= pixels).all(), message
    assert (high <= pixels).all(), message


def torso(scene: Scene, y: float = 0, x: float = 0) -> None:
    """Paint a body with two arms that touch it."""
    scene.add_body(scene.cylinder(y, x, 75, 115), -90)
    scene.add_body(scene.cylinder(y, x, 68, 108))
    for side in (-1, 1):
        scene.add_body(scene.cylinder(y + 10, x + side * 130, 30, 24))


def adult(**kwargs: Any) -> Scene:
    scene = Scene(**kwargs)
    torso(scene)
    return scene


def below(scene: Scene) -> float:
    """Return the position below the last row of the body, in mm."""
    return float((extent(scene.body)[1][1] + 0.5 - (scene.hu.shape[1] - 1) / 2) * scene.spacing_mm[1])


def table(scene: Scene, gap_mm: float, thickness_mm: float = 4.5, hu: float = CARBON) -> None:
    """Paint a table across the field of view, below the body."""
    top = below(scene) + gap_mm
    scene.add_behind(scene.slab(top, top + thickness_mm), hu)


def curved_table(scene: Scene, gap_mm: float, radius_mm: float, thickness_mm: float = 4.5) -> None:
    """Paint a table in the shape of a cylinder, which rises at the sides."""
    bottom = below(scene) + gap_mm
    distance = np.hypot(scene.y - (bottom - radius_mm), scene.x)
    plate = (distance >= radius_mm) & (distance < radius_mm + thickness_mm) & (scene.y > bottom - 60)
    scene.add_behind(np.broadcast_to(plate, scene.hu.shape), CARBON)


def test_coarse_hu_are_every_fourth_row_and_column_with_padding_as_air() -> None:
    stored = np.arange(2 * 6 * 9, dtype=np.int16).reshape(2, 6, 9)
    stored[0, 0, 0], stored[0, 4, 4], stored[1, 4, 8] = -2000, 7, 3000
    volume = StoredVolume(
        stored, np.array([1.0, 2.0]), np.array([-1000.0, -900.0]), np.array([[7, 7], [1, 0]], dtype=np.int16),
        Geometry(stored.shape, np.eye(4)), HuStatistics(),
    )  # fmt: skip
    # Row 4 begins at 36 in slice 0, and at 54 + 36 = 90 in slice 1.
    expected = [[[-1000, -996, -992], [-964, -1000, -956]], [[-792, -784, -776], [-720, -712, 5100]]]
    coarse = coarse_hu(volume)
    assert coarse.dtype == np.int16
    assert coarse.tolist() == expected


@pytest.mark.parametrize("spacing_mm", [(0.5, 0.6, 0.6), (3, 0.7, 0.7), (10, 1.5, 1.5), (5, 0.98, 0.7)])
def test_a_body_with_arms_is_found_at_every_spacing(spacing_mm: tuple[float, float, float]) -> None:
    shape = (10, round(230 / spacing_mm[1]), round(340 / spacing_mm[2]))
    scene = Scene(shape, spacing_mm)
    torso(scene, 3.3, -4.1)
    scene.noise()
    result = found(scene.volume())
    assert_around(result, scene.body)
    assert result.warnings == ()


@pytest.mark.parametrize("gap_mm", [5, 1.5, 0])
@pytest.mark.parametrize("spacing_mm", [1.5, 0.8])
def test_a_flat_table_below_or_at_the_back_is_left_out(gap_mm: float, spacing_mm: float) -> None:
    scene = adult(shape=(8, round(300 / spacing_mm), round(384 / spacing_mm)), spacing_mm=(3, spacing_mm, spacing_mm))
    table(scene, gap_mm)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


@pytest.mark.parametrize("gap_mm", [5, 0])
def test_a_curved_table_is_left_out(gap_mm: float) -> None:
    scene = Scene((8, 400, 480), (3, 0.8, 0.8))
    scene.add_body(scene.cylinder(0, 0, 90, 120))
    curved_table(scene, gap_mm, 260)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


def test_a_table_of_two_skins_with_foam_is_left_out_though_it_touches_the_back() -> None:
    scene = adult()
    top = below(scene)
    scene.add_behind(scene.slab(top, top + 24), FOAM)
    table(scene, 0, 3)
    table(scene, 21, 3)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


def test_a_mattress_of_foam_with_a_cover_is_left_out() -> None:
    scene = adult()
    top = below(scene)
    scene.add_behind(scene.slab(top - 4, top + 40, -150, 150), FOAM)
    scene.add_behind(scene.slab(top, top + 1.5, -150, 150), -650)
    table(scene, 40)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


def test_both_legs_are_the_body() -> None:
    scene = Scene()
    scene.add_body(scene.cylinder(5, -90, 60, 62))
    scene.add_body(scene.cylinder(-4, 84, 52, 55))
    table(scene, 0)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


@pytest.mark.parametrize("radius_mm", [24, 32])
def test_arms_beside_a_large_trunk_are_in_the_box_though_they_do_not_touch_it(radius_mm: float) -> None:
    scene = Scene((8, 400, 520), (5, 1, 1))
    scene.add_body(scene.cylinder(0, 0, 150, 190))
    for side in (-1, 1):
        scene.add_body(scene.cylinder(20, side * (196 + radius_mm), radius_mm, radius_mm))
    table(scene, 2)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


def test_a_child_on_a_pad_is_found() -> None:
    scene = Scene((12, 320, 320), (2, 0.7, 0.7))
    scene.add_body(scene.ellipsoid(0, -20, 10, 60, 38, 46))
    top = below(scene)
    scene.add_behind(scene.slab(top - 3, top + 30, -100, 100), -880)
    scene.add_behind(scene.slab(top + 30, top + 32), CARBON)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


def test_a_prone_body_and_a_table_above_it_are_told_apart() -> None:
    scene = adult()
    table(scene, 0)
    scene.hu, scene.body = scene.hu[:, ::-1], scene.body[:, ::-1]  # the table is at the first rows
    assert_around(found(scene.volume()), scene.body)


def test_a_body_on_its_side_is_told_from_a_table_at_the_last_column() -> None:
    scene = adult()
    table(scene, 0)
    scene.hu, scene.body = scene.hu.transpose(0, 2, 1).copy(), scene.body.transpose(0, 2, 1)
    assert_around(found(scene.volume()), scene.body)


def test_a_body_cut_by_the_field_of_view_reaches_its_border_and_is_reported() -> None:
    scene = Scene()
    torso(scene, x=90)
    table(scene, 5)
    scene.noise()
    result = found(scene.volume())
    assert_around(result, scene.body)
    assert codes(result) == ["crop-edge"]
    assert "last column" in result.warnings[0].text
    assert "row" not in result.warnings[0].text


@pytest.mark.parametrize("radius_mm", [3, 1.5])
def test_tubes_and_cables_on_the_skin_do_not_widen_the_box(radius_mm: float) -> None:
    scene = Scene((10, 400, 420), (3, 0.7, 0.7))
    scene.add_body(scene.cylinder(0, 0, 80, 110))
    scene.add_behind(scene.cylinder(-80 - radius_mm + 0.7, 0, radius_mm, radius_mm), 100)
    scene.add_behind(scene.cylinder(-10, 115, radius_mm, radius_mm), 100)
    scene.noise()
    assert_around(found(scene.volume()), scene.body, 2 if radius_mm > 2.5 else 1)


def test_a_blanket_around_the_body_does_not_widen_the_box() -> None:
    scene = adult(shape=(10, 300, 400), spacing_mm=(3, 1, 1))
    sheet = scene.cylinder(-4, 0, 100, 170) & ~scene.cylinder(-4, 0, 97, 167)
    scene.add_behind(sheet, -600)
    on_skin = scene.cylinder(0, 0, 77, 117) & (scene.y < 0)
    scene.add_behind(on_skin, -600)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


def test_a_nose_and_ears_are_in_the_box() -> None:
    scene = Scene((40, 400, 400), (2, 0.5, 0.5))
    scene.add_body(scene.ellipsoid(0, 0, 0, 110, 90, 72))
    scene.add_body(scene.ellipsoid(0, -95, 0, 20, 18, 9))
    for side in (-1, 1):
        scene.add_body(scene.ellipsoid(4, 10, side * 76, 25, 14, 5))
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


@pytest.mark.parametrize("wall_mm", [14, 8])
def test_a_thin_chest_wall_is_in_the_box(wall_mm: float) -> None:
    scene = Scene((12, 300, 400), (3, 0.9, 0.9))
    scene.add_body(scene.cylinder(0, 0, 88, 130))
    lung = scene.cylinder(0, 0, 88 - wall_mm, 130 - wall_mm) & (np.abs(scene.x) > 30) & (scene.y < 50)
    scene.add_lung(lung)
    table(scene, 0)
    scene.noise()
    volume = scene.volume()
    assert_around(found(volume), scene.body)
    assert_around(found(volume, "lungs"), scene.lungs)


def test_fingers_are_in_the_box() -> None:
    scene = Scene((120, 250, 400), (1, 0.4, 0.4))
    scene.add_body(scene.ellipsoid(-30, 0, 0, 30, 14, 42))
    for n in range(4):
        scene.add_body(scene.ellipsoid(15, 0, 20 * n - 30, 40, 8, 8.5))
    table(scene, 2, 3)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


def test_blurred_skin_is_in_the_box_with_the_pixels_that_it_fills_in_part() -> None:
    scene = adult()
    table(scene, 6)
    scene.hu = gaussian_filter(scene.hu, (0, 0.8, 0.8))
    scene.noise()
    result = found(scene.volume())
    assert_around(result, scene.body)
    assert result.box is not None
    _, rows, columns = result.box.slices
    above_table = scene.hu[:, : extent(scene.body)[1][1]]
    for line in (scene.hu[:, rows.start - 1], above_table[:, :, columns.start - 1], above_table[:, :, columns.stop]):
        assert line.max() < -700  # less than a third of a pixel


def test_a_body_is_found_in_much_noise() -> None:
    scene = adult()
    scene.noise(120)
    assert_around(found(scene.volume()), scene.body)


def test_samples_that_are_noise_alone_do_not_cut_the_body() -> None:
    scene = chest()
    scene.noise(250)
    box = found(scene.volume()).box
    assert box is not None
    first, last = extent(scene.body)
    assert (first >= box.start).all()
    assert (last < box.stop).all()


def test_a_curved_head_rest_is_left_out() -> None:
    scene = Scene((40, 400, 400), (3, 0.6, 0.6))
    scene.add_body(scene.ellipsoid(-20, 0, 0, 80, 95, 75))
    distance = np.hypot(scene.y + 10, scene.x)
    rest = (distance > 110) & (distance < 115) & (scene.y > 30)
    scene.add_behind(np.broadcast_to(rest, scene.hu.shape), 50)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


def test_a_head_that_ends_in_the_stack_has_its_slices_only() -> None:
    scene = Scene((40, 200, 200), (4, 1.2, 1.2))
    scene.add_body(scene.ellipsoid(-40, 5, 0, 70, 90, 70))
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


@pytest.mark.parametrize("declared", [True, False])
def test_padding_around_the_circle_is_air(declared: bool) -> None:
    scene = adult(shape=(10, 256, 256))
    scene.noise()
    outside = np.broadcast_to(np.hypot(scene.y, scene.x) > 192, scene.hu.shape)
    scene.hu[outside] = -1010 if declared else -2000
    padding = np.full((10, 2), 14, dtype=np.int16) if declared else None
    result = found(scene.volume(padding=padding))
    assert_around(result, scene.body)
    assert result.warnings == ()


def test_padding_denser_than_all_tissue_is_not_body() -> None:
    scene = adult(shape=(10, 256, 256))
    scene.hu[np.broadcast_to(np.hypot(scene.y, scene.x) > 170, scene.hu.shape)] = 4000
    padding = np.full((10, 2), 5024, dtype=np.int16)
    assert_around(found(scene.volume(padding=padding)), scene.body & (scene.hu < 3000))


def test_a_body_cut_by_the_circle_is_reported() -> None:
    scene = Scene((10, 256, 256))
    torso(scene, x=40)
    outside = np.broadcast_to(np.hypot(scene.y, scene.x) > 185, scene.hu.shape)
    scene.hu[outside], scene.body[outside] = -2000, False
    result = found(scene.volume())
    assert_around(result, scene.body)
    assert codes(result) == ["crop-edge"]
    assert "circle" in result.warnings[0].text


CORONAL = np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]], dtype=float)
SAGITTAL = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=float)


@pytest.mark.parametrize("kind", ["body", "lungs"])
@pytest.mark.parametrize("gap_mm", [4, 0])
@pytest.mark.parametrize(("directions", "order"), [(CORONAL, (1, 0, 2)), (SAGITTAL, (2, 0, 1))])
def test_coronal_and_sagittal_stacks_have_the_same_box(
    directions: NDArray[np.float64], order: tuple[int, int, int], gap_mm: float, kind: str
) -> None:
    scene = chest((150, 150, 180), (2, 2, 2))
    table(scene, gap_mm, 4)
    scene.noise()
    # From the head down, as rows of such stacks go.
    for name in ("hu", "body", "lungs"):
        setattr(scene, name, getattr(scene, name)[::-1].transpose(order))
    result = found(scene.volume(directions), kind)
    # A pixel is 2 mm in the plane of the slices, and a slice too.
    assert_around(result, scene.body if kind == "body" else scene.lungs)


def test_an_oblique_stack_has_the_same_box() -> None:
    scene = adult()
    table(scene, 0)
    scene.noise()
    c, s = np.cos(0.5), np.sin(0.5)
    turned = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ AXIAL
    assert_around(found(scene.volume(turned)), scene.body)


def test_columns_and_rows_may_be_exchanged_and_reversed() -> None:
    scene = adult()
    table(scene, 0)
    scene.hu, scene.body = scene.hu.transpose(0, 2, 1)[:, :, ::-1], scene.body.transpose(0, 2, 1)[:, :, ::-1]
    swapped = np.array([[0, -1, 0], [0, 0, 1], [-1, 0, 0]], dtype=float)
    assert_around(found(scene.volume(swapped)), scene.body)


@pytest.mark.parametrize("kind", ["body", "lungs"])
def test_a_tilted_stack_has_a_box_on_its_canvas(kind: str) -> None:
    scene = chest((20, 200, 240), (3, 1.6, 1.6))
    table(scene, 3)
    scene.noise()
    shift = np.stack([np.linspace(0, 33.4, 20)[::-1], np.linspace(0, 7.5, 20)], axis=1)
    shift[:, 0] -= shift[:, 0].min()
    placement = Placement(np.arange(20.0), shift, (200, 240))
    canvas = (20, *placement.canvas)
    result = found(scene.volume(placement=placement, grid_shape=canvas), kind)
    mask = scene.body if kind == "body" else scene.lungs
    at = np.argwhere(mask).astype(float)
    at[:, 1:] += shift[at[:, 0].astype(int)]
    assert_faces(result, at.min(axis=0), at.max(axis=0))


def test_uneven_slices_have_a_box_in_layers_of_the_grid() -> None:
    scene = Scene((20, 200, 200), (4, 1.2, 1.2))
    scene.add_body(scene.ellipsoid(0, 5, 0, 26, 80, 70))
    along = np.cumsum([0, *([1.0, 1.3, 0.7, 2.0, 1.0] * 4)[:19]])
    placement = Placement(along, None, (200, 200))
    shape = (int(np.ceil(along[-1])) + 1, 200, 200)
    result = found(scene.volume(placement=placement, grid_shape=shape))
    first, last = extent(scene.body)
    assert_faces(
        result,
        np.array([np.floor(along[first[0]]), *first[1:]]),
        np.array([np.ceil(along[last[0]]), *last[1:]]),
        pixels=2,  # along slices: one slice, which may be two layers
    )


def test_slices_may_have_rescales_of_their_own_also_negative_ones() -> None:
    scene = adult()
    table(scene, 3)
    scene.noise()
    plain = scene.volume()
    slope = np.resize([1.0, 2.0, -0.5], 16)
    intercept = np.resize([-1024.0, -800.0, 30.0], 16)
    stored = np.round((scene.hu - intercept[:, None, None]) / slope[:, None, None]).astype(np.int16)
    volume = StoredVolume(stored, slope, intercept, None, plain.geometry, HuStatistics())
    assert_around(found(volume), scene.body)


def test_air_alone_is_no_body() -> None:
    scene = Scene()
    scene.noise(60)
    result = found(scene.volume())
    assert result.box is None
    assert codes(result) == ["crop-not-found"]
    assert "-500 HU" in result.warnings[0].text


def test_a_table_alone_is_no_body() -> None:
    scene = Scene()
    scene.add_behind(scene.slab(40, 44.5), CARBON)
    scene.add_behind(scene.slab(70, 73, -150, 150), CARBON)
    scene.noise()
    assert found(scene.volume()).box is None


def test_an_incubator_is_no_body() -> None:
    scene = Scene((16, 240, 256), (3, 1.5, 1.5))
    scene.add_behind(scene.cylinder(0, 0, 150, 170) & ~scene.cylinder(0, 0, 130, 150), 120)
    scene.add_behind(scene.cylinder(80, 0, 30, 38), SOFT)
    result = found(scene.volume())
    assert result.box is None
    assert codes(result) == ["crop-not-found"]
    assert "air" in result.warnings[0].text


def test_an_infant_in_a_thin_incubator_is_found() -> None:
    scene = Scene((16, 240, 256), (3, 1.5, 1.5))
    scene.add_body(scene.cylinder(60, 0, 45, 60))
    scene.add_behind(scene.cylinder(0, 0, 150, 170) & ~scene.cylinder(0, 0, 146, 166), 120)
    assert_around(found(scene.volume()), scene.body)


def test_a_phantom_of_water_is_cropped_like_a_body() -> None:
    scene = Scene()
    scene.add_body(scene.cylinder(0, 12, 100, 100), 0)
    table(scene, 8)
    scene.noise()
    assert_around(found(scene.volume()), scene.body)


def test_a_finger_in_a_large_field_of_view_is_reported_as_small() -> None:
    scene = Scene((10, 256, 256))
    scene.add_body(scene.cylinder(0, 0, 18, 22))
    result = found(scene.volume())
    assert_around(result, scene.body)
    assert codes(result) == ["crop-small"]


def test_a_stack_without_air_is_a_body_as_a_whole() -> None:
    scene = Scene((4, 60, 50))
    scene.add_body(np.ones(scene.hu.shape, dtype=bool))
    result = found(scene.volume())
    assert_around(result, scene.body, 0)
    assert codes(result) == ["crop-edge"]


@settings(max_examples=60)
@given(data=st.data())
def test_random_ellipses_with_random_tables_are_within_a_pixel(data: st.DataObject) -> None:
    def number(low: float, high: float, name: str) -> float:
        return data.draw(st.floats(low, high), label=name)

    row_mm, column_mm = number(0.5, 1.5, "row_mm"), number(0.5, 1.5, "column_mm")
    shape = (5, round(300 / row_mm), round(330 / column_mm))
    scene = Scene(shape, (number(0.5, 10, "slice_mm"), row_mm, column_mm))
    y, x = number(-30, 30, "y"), number(-50, 50, "x")
    ry, rx = number(35, 100, "ry"), number(35, 110, "rx")
    scene.add_body(scene.cylinder(y, x, ry, rx))
    gap_mm = data.draw(st.sampled_from([0.0, 0.0, 2.0, 5.0, 11.0]), label="gap_mm")
    # Plates that are thinner than a pixel would have no voxels, and thicker ones are no tables.
    table(scene, gap_mm, number(1.6, 5.0, "thickness_mm"), number(-300, 300, "table_hu"))
    scene.noise(seed=data.draw(st.integers(0, 99), label="seed"))
    assert_around(found(scene.volume()), scene.body)


@settings(max_examples=60)
@given(data=st.data())
def test_any_content_has_a_box_within_the_grid_or_a_reason(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 50), st.integers(1, 50)), label="shape")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    scene = Scene(shape, data.draw(st.tuples(*[st.floats(0.1, 6)] * 3), label="spacing_mm"))
    # Blocks of a few voxels, so that there are thin and thick objects.
    block = data.draw(st.integers(1, 20), label="block")
    coarse = rng.choice([-2000, -1000, -850, -600, 40], [-(-n // block) for n in shape])
    k, j, i = shape
    scene.hu = coarse.repeat(block, 0).repeat(block, 1).repeat(block, 2)[:k, :j, :i].astype(float)
    shift = rng.uniform(0, 30, (k, 2))
    shift -= shift.min(axis=0)
    placement = Placement(np.arange(float(k)), shift, (j, i))
    for volume in (
        scene.volume(data.draw(st.sampled_from([AXIAL, CORONAL, SAGITTAL]), label="directions")),
        scene.volume(placement=placement, grid_shape=(k, *placement.canvas)),
    ):
        for kind in ("body", "lungs"):
            result = found(volume, kind)
            if result.box is None:
                assert codes(result) == ["crop-not-found"]
            else:
                assert min(result.box.shape) > 0
                assert min(result.box.start) >= 0
                assert (np.array(result.box.stop) <= volume.geometry.shape).all()


def chest(
    shape: tuple[int, int, int] = (60, 200, 240), spacing_mm: Sequence[float] = (4, 1.6, 1.6), *, sides: Any = (-1, 1)
) -> Scene:
    """Paint a chest with lungs, and a trachea that leaves it at the top."""
    scene = Scene(shape, spacing_mm)
    height_mm = shape[0] * spacing_mm[0]
    scene.add_body(scene.cylinder(0, 0, 95, 150))
    for side in sides:
        scene.add_lung(scene.ellipsoid(-0.1 * height_mm, -5, side * 72, 0.33 * height_mm, 70, 48))
    trachea = scene.cylinder(15, 0, 9, 10) & (scene.z > -0.1 * height_mm)
    bronchi = scene.ellipsoid(-0.1 * height_mm, 15, 0, 7, 7, 20)
    scene.hu[(trachea | bronchi) & ~scene.lungs] = -1000
    return scene


@pytest.mark.parametrize("spacing_mm", [(4, 1.6, 1.6), (8, 1.2, 1.2), (1.5, 2, 2)])
@pytest.mark.parametrize("sides", [(-1, 1), (1,)])
def test_lungs_are_found_and_the_trachea_is_left_out(spacing_mm: tuple[float, ...], sides: tuple[int, ...]) -> None:
    shape = (round(240 / spacing_mm[0]), round(260 / spacing_mm[1]), round(360 / spacing_mm[2]))
    scene = chest(shape, spacing_mm, sides=sides)
    table(scene, 2)
    scene.noise()
    result = found(scene.volume(), "lungs")
    assert_around(result, scene.lungs)
    assert result.warnings == ()


def test_lungs_with_much_noise_and_vessels_are_found() -> None:
    scene = chest()
    rng = np.random.default_rng(1)
    for _ in range(150):
        z, y, x = rng.uniform(-60, 40), rng.uniform(-50, 50), rng.choice([-1, 1]) * rng.uniform(50, 95)
        scene.hu[scene.ellipsoid(z, y, x, 5, 4, 4) & scene.lungs] = SOFT
    scene.noise(60)
    assert_around(found(scene.volume(), "lungs"), scene.lungs)


def test_lungs_with_emphysema_are_found() -> None:
    scene = chest()
    destroyed = np.random.default_rng(0).random(scene.hu.shape) < 0.45
    scene.hu[destroyed & scene.lungs] = -985
    scene.noise()
    assert_around(found(scene.volume(), "lungs"), scene.lungs)


@pytest.mark.parametrize(("pixel_mm", "scale", "lung_hu"), [(0.4, 1.0, -850), (0.1, 0.22, -600)])
def test_an_infant_and_a_mouse_are_found(pixel_mm: float, scale: float, lung_hu: float) -> None:
    scene = Scene((60, 300, 360), (1.4 * scale, pixel_mm, pixel_mm))
    scene.add_body(scene.cylinder(0, 0, 40 * scale, 52 * scale))
    for side in (-1, 1):
        lung = scene.ellipsoid(0, 0, side * 24 * scale, 32 * scale, 31 * scale, 19 * scale)
        scene.add_lung(lung & scene.cylinder(0, 0, 33 * scale, 45 * scale), lung_hu)
    table(scene, 0, 3 * scale)
    scene.noise(30)
    volume = scene.volume()
    assert_around(found(volume), scene.body)
    assert_around(found(volume, "lungs"), scene.lungs)


@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_a_short_object_between_many_thin_slices_is_found_also_in_micro_ct(scale: float) -> None:
    mm = 1.2 * scale
    scene = Scene((60, 260, 300), (mm, mm, mm))
    scene.add_body(scene.ellipsoid(5 * mm, 0, 0, 16 * mm, 90 * mm, 110 * mm))
    for side in (-1, 1):
        scene.add_lung(scene.ellipsoid(5 * mm, 0, side * 50 * mm, 10 * mm, 60 * mm, 36 * mm))
    scene.noise()
    volume = scene.volume()
    assert_around(found(volume), scene.body)
    assert_around(found(volume, "lungs"), scene.lungs)


def test_an_effusion_leaves_the_aerated_part() -> None:
    scene = chest()
    effusion = scene.lungs & (scene.y > 20) & (scene.x < 0)
    scene.hu[effusion] = 15
    scene.lungs &= ~effusion
    scene.noise()
    assert_around(found(scene.volume(), "lungs"), scene.lungs)


def test_a_nearly_compressed_second_lung_is_in_the_box() -> None:
    scene = chest(sides=(1,))
    scene.add_lung(scene.ellipsoid(10, -30, -80, 30, 25, 25))
    scene.noise()
    assert_around(found(scene.volume(), "lungs"), scene.lungs)


def test_gas_in_stomach_and_bowel_does_not_enlarge_the_box() -> None:
    scene = chest()
    for y, x, radius in ((-30, 60, 28), (-40, -30, 20), (-50, 10, 14)):
        scene.hu[scene.ellipsoid(-112, y, x, 12, radius, radius) & ~scene.lungs] = -1000
    scene.noise()
    assert_around(found(scene.volume(), "lungs"), scene.lungs)


def test_lungs_that_end_with_the_stack_have_all_its_slices() -> None:
    scene = chest((20, 200, 240))
    scene.hu[:], scene.lungs[:] = scene.hu[10], scene.lungs[10]
    scene.noise()
    assert_around(found(scene.volume(), "lungs"), scene.lungs)


def test_lungs_cut_by_the_field_of_view_reach_its_border() -> None:
    scene = chest()
    scene.hu, scene.lungs, scene.body = scene.hu[:, :, 45:-45], scene.lungs[:, :, 45:-45], scene.body[:, :, 45:-45]
    result = found(scene.volume(), "lungs")
    assert_around(result, scene.lungs)
    assert codes(result) == ["crop-edge"]


def test_lungs_cut_by_the_circle_are_found() -> None:
    scene = chest((40, 150, 150), (4, 1.1, 1.1))
    outside = np.broadcast_to(np.hypot(scene.y, scene.x) > 80, scene.hu.shape)
    scene.hu[outside], scene.lungs[outside] = -2000, False
    result = found(scene.volume(), "lungs")
    assert_around(result, scene.lungs)
    assert codes(result) == ["crop-edge"]


def test_a_head_with_sinuses_has_no_lungs() -> None:
    scene = Scene((40, 256, 256), (3, 0.9, 0.9))
    scene.add_body(scene.ellipsoid(0, 0, 0, 90, 95, 72))
    for z, y, x, radius in ((-20, -60, 22, 14), (-20, -60, -22, 14), (15, -75, 0, 12), (-10, -45, 0, 10)):
        scene.hu[scene.ellipsoid(z, y, x, radius, radius, radius)] = -1000
    for side in (-1, 1):  # air cells of the mastoids
        scene.hu[scene.ellipsoid(-25, 15, side * 52, 14, 12, 9)] = -650
    scene.noise()
    result = found(scene.volume(), "lungs")
    assert result.box is None
    assert codes(result) == ["crop-not-found"]
    assert "%" in result.warnings[0].text


def test_an_abdomen_with_gas_and_stool_has_no_lungs() -> None:
    scene = adult(shape=(40, 240, 256))
    rng = np.random.default_rng(2)
    for _ in range(25):
        z, y, x, radius = rng.uniform(-60, 60), rng.uniform(-40, 20), rng.uniform(-70, 70), rng.uniform(8, 25)
        scene.hu[scene.ellipsoid(z, y, x, radius, radius, radius) & scene.cylinder(0, 0, 60, 100)] = -1000
    stool = scene.ellipsoid(0, 0, 85, 50, 14, 14)
    scene.hu[stool] = rng.uniform(-900, 50, np.count_nonzero(stool))
    scene.noise()
    assert found(scene.volume(), "lungs").box is None


def test_legs_under_a_blanket_have_no_lungs() -> None:
    scene = Scene()
    scene.add_body(scene.cylinder(5, -90, 60, 62))
    scene.add_body(scene.cylinder(5, 90, 60, 62))
    scene.add_behind(scene.slab(-55, -51, -160, 160), -600)
    scene.add_behind(scene.slab(45, 80, -160, 160), -880)
    scene.noise()
    assert found(scene.volume(), "lungs").box is None
