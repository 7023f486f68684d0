"""Shapes with a volume known by formula, outlined as RTSTRUCT and as text and converted to labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray
from scipy import ndimage
from segmentations import write_rtstruct

import gpuprep
from gpuprep import Masks, Recipe
from gpuprep.compute.backend import Backend
from gpuprep.executors.processes import InProcessExecutor
from gpuprep.testing import write_series

SHAPE = (20, 100, 110)
SPACING_MM = (3.0, 0.8, 0.7)
ORIGIN_MM = np.array([-31.0, -52.0, 7.0])  # x, y, z
CENTRE_MM = ORIGIN_MM + np.array([38.1, 40.2, 28.4])

Outlines = list[NDArray[np.float64]]
Inside = Callable[[NDArray[np.float64]], NDArray[np.bool_]]


def circle(radius: float, z: float, points: int = 720) -> Any:
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return CENTRE_MM + np.stack(
        [radius * np.cos(angles), radius * np.sin(angles), 0 * angles + z - CENTRE_MM[2]], axis=1
    )


def box(half_x: float, half_y: float, z: float, turn_deg: float = 0) -> Any:
    corners = np.array([(-half_x, -half_y), (half_x, -half_y), (half_x, half_y), (-half_x, half_y)])
    c, s = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
    return np.column_stack([corners @ np.array([[c, s], [-s, c]]) + CENTRE_MM[:2], np.full(4, z)])


class Shape:
    """Shape: test whether points relative to its centre are inside, outlines at a given z, and volume in mm³."""

    def __init__(self, inside: Inside, outlines: Callable[[float], Outlines], volume_mm3: float) -> None:
        self.inside = inside
        self.outlines = outlines
        self.volume_mm3 = volume_mm3


def ball(radius: float, z: float) -> Outlines:
    height = z - CENTRE_MM[2]
    return [circle(np.sqrt(radius**2 - height**2), z)] if abs(height) < radius else []


def norm(p: NDArray[np.float64], axes: int = 3) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.linalg.norm(p[..., :axes], axis=-1)
    return found


SHAPES = {
    "cube": Shape(
        lambda p: np.abs(p).max(axis=-1) < 18.1,
        lambda z: [box(18.1, 18.1, z)] if abs(z - CENTRE_MM[2]) < 18.1 else [],
        36.2**3,
    ),
    "sphere": Shape(lambda p: norm(p) < 20, lambda z: ball(20, z), 4 / 3 * np.pi * 20**3),
    "hollow sphere": Shape(
        lambda p: (norm(p) < 22) & ~(norm(p) < 12), lambda z: ball(22, z) + ball(12, z), 4 / 3 * np.pi * (22**3 - 12**3)
    ),
    "cylinder": Shape(
        lambda p: (norm(p, 2) < 15.03) & (np.abs(p[..., 2]) < 19.9),
        lambda z: [circle(15.03, z)] if abs(z - CENTRE_MM[2]) < 19.9 else [],
        np.pi * 15.03**2 * 39.8,
    ),
    "straw": Shape(
        lambda p: (norm(p, 2) < 9) & ~(norm(p, 2) < 6) & (np.abs(p[..., 2]) < 22),
        lambda z: [circle(9, z), circle(6, z)] if abs(z - CENTRE_MM[2]) < 22 else [],
        np.pi * (9**2 - 6**2) * 44,
    ),
    "thin sheet": Shape(  # two pixels thick, rotated about z
        lambda p: (
            (np.abs(p[..., 0] * np.cos(0.5) + p[..., 1] * np.sin(0.5)) < 0.8)
            & (np.abs(-p[..., 0] * np.sin(0.5) + p[..., 1] * np.cos(0.5)) < 25)
            & (np.abs(p[..., 2]) < 20)
        ),
        lambda z: [box(0.8, 25, z, np.degrees(0.5))] if abs(z - CENTRE_MM[2]) < 20 else [],
        1.6 * 50 * 40,
    ),
}


def heights() -> Any:
    return ORIGIN_MM[2] + SPACING_MM[0] * np.arange(SHAPE[0])


def truth(shape: Shape, grid: Any) -> Any:
    """Return whether the voxel centres of a grid lie inside, by formula alone."""
    index = np.moveaxis(np.indices(grid["shape"]), 0, -1)
    affine = np.array(grid["affine_lps"])
    return shape.inside(index @ affine[:3, :3].T + affine[:3, 3] - CENTRE_MM)


def write_ct(folder: Path, shape: Shape | None = None) -> str:
    """Write a series with the shape at 1000 HU in air; return its UID."""
    spacing = np.array(SPACING_MM[::-1])
    index = np.moveaxis(np.indices(SHAPE), 0, -1)[..., ::-1]
    bright = shape.inside(index * spacing + ORIGIN_MM - CENTRE_MM) if shape else np.zeros(SHAPE, bool)
    files = write_series(
        folder, np.where(bright, 2024, 24).astype(np.int16), SPACING_MM, origin_mm=tuple(ORIGIN_MM.tolist())
    )
    return str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)


def write_points(path: Path, outlines: Outlines) -> Path:
    lines = ["contour x y z"]
    lines += [f"{n} {x:.4f} {y:.4f} {z:.4f}" for n, points in enumerate(outlines) for x, y, z in points]
    path.write_text("\n".join(lines))
    return path


def as_rtstruct(path: Path, shape: Shape, series_uid: str) -> Path:
    return write_rtstruct(
        path / "rs.dcm", {"shape": [o for z in heights() for o in shape.outlines(float(z))]}, series_uid=series_uid
    )


def as_text(path: Path, shape: Shape, _: str) -> Path:
    return write_points(path / "shape.txt", [o for z in heights() for o in shape.outlines(float(z))])


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep runs on a device in this process: each of their workers would import the simulated GPU anew."""
    monkeypatch.setattr("gpuprep.executors.resources.ProcessExecutor", lambda *_: InProcessExecutor())


@pytest.fixture(scope="module")
def air(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Write a series of air; return its folder and its UID."""
    folder = tmp_path_factory.mktemp("air") / "dicom"
    return folder, write_ct(folder)


def masks(
    dicom: Path, tmp_path: Path, segmentation: Path, recipe: Recipe, **options: Any
) -> tuple[NDArray[Any], dict[str, Any]]:
    run = gpuprep.convert(dicom, tmp_path / "out", recipe, masks=segmentation, **options)
    assert run.counts == {"ok": 1}, run.results[0].reason
    folder = tmp_path / "out" / run.results[0].folder
    sidecar = json.loads((folder / "volume.json").read_text())
    return np.stack([tifffile.imread(f) for f in sorted((folder / "labels").iterdir())]), sidecar


def dice(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = a != 0, b != 0
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


NATIVE = Recipe(spacing_mm=None, size=None, image=False, masks=Masks(units="mm"))


@pytest.mark.parametrize("write", [as_rtstruct, as_text])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_mask_at_native_resolution_has_the_voxels_whose_centres_are_inside(
    air: tuple[Path, str], tmp_path: Path, shape: Shape, write: Any
) -> None:
    # Traps 37 and 39.
    dicom, uid = air
    got, sidecar = masks(dicom, tmp_path, write(tmp_path, shape, uid), NATIVE)
    expected = truth(shape, sidecar)
    # A polygon of 720 points lies up to 2e-4 mm inside of the circle, so a few centres may lie in between.
    assert (got.astype(bool) != expected).sum() <= 2
    (label,) = sidecar["labels"]
    voxel_mm3 = float(np.prod(SPACING_MM))
    assert label["source_voxels"] == label["voxels"] == got.sum()
    assert label["source_ml"] * 1000 == pytest.approx(got.sum() * voxel_mm3)
    round_ = shape in (SHAPES["sphere"], SHAPES["hollow sphere"])
    bound = 0.01 if round_ else 0.5 * SPACING_MM[0] / 18.1  # a prism may have half a slice too much or too few per end
    assert label["ml"] * 1000 == pytest.approx(shape.volume_mm3, rel=bound)


BOUNDS = {
    "cube": (0.965, 0.965),
    "sphere": (0.965, 0.975),
    "hollow sphere": (0.955, 0.965),
    "cylinder": (0.96, 0.965),
    "straw": (0.88, 0.91),
    "thin sheet": (0.84, 0.88),
}
"""Smallest Dice coefficient with the formula, for nearest and smooth, on voxels of 1 mm from slices of 3 mm. Errors are
up to half a slice at the ends and half a pixel at the sides, which weighs most for a sheet two pixels thick."""

VOLUME_CHANGES = {"nearest": 0.07, "smooth": 0.02}
"""Largest relative change of the volume by resampling. The thin sheet changes most, as nearest takes whole pixels."""


@pytest.mark.parametrize("resampling", ["nearest", "smooth"])
@pytest.mark.parametrize("name", SHAPES)
def test_resampling_to_1_mm_keeps_shape_and_volume(
    air: tuple[Path, str], tmp_path: Path, name: str, resampling: Literal["nearest", "smooth"], backend: Backend
) -> None:
    # Trap 22.
    shape = SHAPES[name]
    dicom, uid = air
    recipe = Recipe(size=None, image=False, masks=Masks(resampling=resampling, units="mm"))
    got, sidecar = masks(dicom, tmp_path, as_text(tmp_path, shape, uid), recipe, backend=backend)
    assert got.shape == (60, 80, 77)
    assert dice(got, truth(shape, sidecar)) > BOUNDS[name][resampling == "smooth"]
    (label,) = sidecar["labels"]
    assert label["voxels"] == (got == 1).sum()
    assert label["ml"] == pytest.approx(got.sum() * np.prod(sidecar["spacing_mm"]) / 1000)
    assert label["ml"] == pytest.approx(label["source_ml"], rel=VOLUME_CHANGES[resampling])


@pytest.mark.parametrize("resampling", ["nearest", "smooth"])
@pytest.mark.parametrize("name", ["sphere", "hollow sphere", "cube", "cylinder"])
def test_image_and_mask_of_a_bright_object_coincide_after_the_default_recipe(
    tmp_path: Path, name: str, resampling: Literal["nearest", "smooth"]
) -> None:
    shape = SHAPES[name]
    uid = write_ct(tmp_path / "dicom", shape)
    recipe = Recipe(size=(96, 90), masks=Masks(resampling=resampling, units="mm"))
    got, _ = masks(tmp_path / "dicom", tmp_path, as_text(tmp_path, shape, uid), recipe)
    folder = next((tmp_path / "out").rglob("volume.json")).parent
    image = np.stack([tifffile.imread(f) for f in sorted(folder.glob("*.tif"))])
    assert image.shape == got.shape == (60, 96, 90)
    bright = image > 0.5
    around = np.ones((3, 3, 3), bool)
    assert not (bright & ~ndimage.binary_dilation(got != 0, around)).any()
    assert not (ndimage.binary_erosion(got != 0, around) & ~bright).any()
    assert dice(got, bright) > 0.95
